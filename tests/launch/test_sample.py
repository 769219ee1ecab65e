"""`python -m launch.sample` on a small run, whose evaluation says what has to be printed; and conversations, against
the rollout's record and against a forward pass without a cache."""
from __future__ import annotations

import json
import os
import re
import signal
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kl_reg.analysis.compare import conversation, single_policy
from kl_reg.config import default
from kl_reg.envs import ENVIRONMENTS
from kl_reg.models import decoder
from kl_reg.pretrained import tokenizer, weights
from kl_reg.types import AGENT, FORCED, OPENING, STUDENT
from launch import sample

EPISODES, SEED = 40, 1_000_002      # of the run's evaluation


class Record(NamedTuple):
    """One episode of a member's evaluation."""

    tokens: np.ndarray
    roles: np.ndarray
    turns: np.ndarray
    kl: np.ndarray
    spent_before: np.ndarray
    returns: np.ndarray


def recorded(run, member):
    with np.load(run / f"members/{member}/evaluation.npz") as arrays:
        columns = [arrays[name] for name in Record._fields]
    return [Record(*(column[e] for column in columns)) for e in range(EPISODES)]


@pytest.fixture
def roomy_folder(tiny_folder, tmp_path):
    """The tiny model with a context that is long enough for the default environment."""
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(tiny_folder / name)
    settings = json.loads((tiny_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 96}))
    return tmp_path


@pytest.fixture
def call(capsys, monkeypatch):
    """The command with what is typed: its exit status and what it printed."""
    def call(*arguments, typed=()):
        lines = iter(typed)

        def line(prompt):
            print(prompt, end="")
            given = next(lines, EOFError())
            if isinstance(given, BaseException):
                raise given
            return given

        capsys.readouterr()
        monkeypatch.setattr("builtins.input", line)
        monkeypatch.setenv("COLUMNS", "300")
        try:
            sample.main(list(map(str, arguments)))
            status = 0
        except SystemExit as error:
            status = error.code
        return status, capsys.readouterr()

    return call


def test_the_transcripts_of_the_evaluation_with_its_numbers(run, call, tiny_tokenizer):
    """Nats of each turn and episode, returns and text, as evaluation.npz has them."""
    status, printed = call(f"{run}:1", "--seed", SEED, "--episodes", 12)
    assert status == 0 and f"{run}:1@2" in printed.out and "\x1b" not in printed.out
    head, *shown = re.split(r"^Episode \d+ · ", printed.out, flags=re.MULTILINE)
    assert "exact KL to the reference" in head and len(shown) == 12
    for text, episode in zip(shown, recorded(run, 1)[:12], strict=True):
        agent = episode.roles == AGENT
        assert text.startswith(f"return {episode.returns:.2f} · {episode.kl.sum():.2f} nats\n")
        turns = [episode.kl[agent & (episode.turns == turn)].sum() for turn in np.unique(episode.turns[agent])]
        assert re.findall(r"  ([\d.]+) nats$", text, re.MULTILINE) == [f"{nats:.2f}" for nats in turns]
        said = re.sub(r"  [\d.]+ nats$", "", text.split("\n", 1)[1], flags=re.MULTILINE)
        expected = tokenizer.decode(tiny_tokenizer, episode.tokens.tolist())
        assert re.sub(r"\\u\{\w+\}|[⏎◌\s]", "", said) == re.sub(r"\s", "", "".join(
            c for c in expected if c.isprintable() or c == "\n"))


def test_surprisal_is_the_references(run, call, tiny_folder):
    """Member 0 is the base: -log of the base's probability of each token, by a forward pass."""
    _, printed = call(f"{run}:0", "--seed", SEED, "--episodes", 3, "--colour", "surprisal")
    totals = [float(x) for x in re.findall(r"^Episode .* ([\d.]+) nats$", printed.out, re.MULTILINE)]
    expected = [surprisal(tiny_folder, episode.tokens)[episode.roles == AGENT].sum()
                for episode in recorded(run, 0)[:3]]
    np.testing.assert_allclose(totals, expected, atol=0.006)


def surprisal(folder, tokens):
    """-log of the model's probability of each token; 0 of the first."""
    model = weights.load(str(folder))
    padded = jnp.zeros(60, jnp.int32).at[:len(tokens)].set(jnp.asarray(tokens))       # one shape for all
    hidden = jax.jit(decoder.forward, static_argnums=0)(model.config, model.params, padded[None], jnp.zeros(1, int))
    log_probs = jax.nn.log_softmax(decoder.logits(model.config, model.params, hidden.last[0]))
    return -np.append(0.0, np.take_along_axis(np.asarray(log_probs)[:len(tokens) - 1],
                                              np.asarray(tokens)[1:, None], axis=1))


def kl_of(terms):
    return single_policy.SHOWN["kl"][1](terms)


@pytest.mark.parametrize("member", [1, 2])
def test_a_conversation_is_the_episode_in_which_the_student_says_the_same(run, member):
    """Tokens, writers, nats and ledger of the first two episodes of the evaluation, the student's tokens given."""
    one = single_policy.open_policy(f"{run}:{member}", "run", 8, {})
    policy = conversation.compile_policy(one.team, kl_of)
    moment, ids = policy.begin(SEED)
    for attempt, episode in enumerate(recorded(run, member)[:2]):
        at = policy.again(conversation.State(moment, tuple(ids), (), None, 0.0).kept().moment, SEED, attempt)
        assert episode.tokens[episode.roles == OPENING].tolist() == ids
        for slot in range(len(ids), len(episode.tokens)):
            assert at.role == episode.roles[slot]
            if at.role == AGENT:
                assert at.spent == pytest.approx(episode.spent_before[slot], rel=1e-4, abs=1e-6)
            at, spoken = policy.add(at, int(episode.tokens[slot]) if at.role == STUDENT else -1)
            assert (spoken.token, spoken.role) == (episode.tokens[slot], episode.roles[slot])
            assert spoken.nats == pytest.approx(episode.kl[slot], rel=1e-4, abs=1e-6)
    assert (recorded(run, member)[0].roles == STUDENT).any()


def test_a_talk_with_a_run(run, call, tiny_tokenizer):
    """The agent's first turn is that of the evaluation; what was typed is said; the ledger goes on."""
    episode = recorded(run, 2)[0]
    first = (episode.roles == AGENT) & (episode.turns == 0)
    status, printed = call(f"{run}:2", "--talk", "--seed", SEED, "--length", 56,
                           typed=["/what", KeyboardInterrupt(), "", "x" * 60, "/retry", "hello", "/quit"])
    assert status == 0 and "/retry  another turn" in printed.out and "and there is room for" in printed.out
    turns = re.findall(r"  ([\d.]+) nats · ([\d.]+) nats in all · ([\d.]+) of 0.5 left$", printed.out, re.MULTILINE)
    turns = np.array(turns, float)
    assert len(turns) == 4
    assert turns[1, 1] == pytest.approx(turns[0, 0] + turns[1, 0], abs=0.011)
    assert turns[2, 1] == pytest.approx(turns[0, 0] + turns[2, 0], abs=0.011)       # instead of the second
    assert turns[3, 2] <= turns[2, 2] <= 0.5
    # The policy reads which part of the episode is gone, so that the record's first turn is one of the same length.
    _, printed = call(f"{run}:2", "--talk", "--seed", SEED, typed=["/quit"])
    nats = re.search(r"  ([\d.]+) nats · ", printed.out)[1]
    assert float(nats) == pytest.approx(episode.kl[first].sum(), abs=0.006)
    said = tokenizer.decode(tiny_tokenizer, episode.tokens[:np.flatnonzero(first)[-1] + 1].tolist()).rstrip("\n")
    assert re.sub(r"\\u\{\w+\}|[⏎◌]", "", printed.out.split("typed.\n\n")[1]).startswith(
        "".join(c for c in said if c.isprintable() or c == "\n"))


def test_it_ends_when_the_context_is_full(run, call):
    status, printed = call(f"{run}:1", "--talk", typed=["a"] * 16)
    assert status == 0 and printed.out.rstrip().endswith("The 16 tokens are full; --length says how many there are.")


def test_what_ends_the_agents_turn_from_outside_is_nobodys_and_free(run, tiny_tokenizer):
    """ctrl-C behind the first token: the end marker and the student's prefix are written, and nothing is charged."""
    one = single_policy.open_policy(f"{run}:1", "run", 8, {})
    manners = conversation.as_student(one.config.env, one.team.program.task.env, tiny_tokenizer, frozenset())
    policy = conversation.compile_policy(one.team, kl_of)
    moment, ids = policy.begin(5)
    start = conversation.State(moment, tuple(ids), (), None, 0.0)
    (state, token), *rest = list(conversation.agent_turn(policy, manners, start, lambda: True))
    assert token.role == AGENT and [spoken.role for _, spoken in rest] == [FORCED, FORCED]
    assert tokenizer.decode(tiny_tokenizer, [spoken.token for _, spoken in rest]) == "\nB:"
    last, _ = rest[-1]
    assert last.moment.role == STUDENT and last.nats == state.nats == token.nats == pytest.approx(last.moment.spent)
    assert last.said == (token.token,)


def test_a_chat_whose_template_writes_the_past_anew(roomy_folder, tiny_tokenizer):
    """What the model saw is the template's rendering: each token's surprisal is that of a forward pass over the ids."""
    def render(messages):
        text = "".join(f"{message['role']}: {message['content'].strip().upper()}\n" for message in messages)
        return tokenizer.encode(tiny_tokenizer, text + "B:")

    ends = frozenset(tokenizer.encode(tiny_tokenizer, "\n"))
    one = single_policy.open_policy(str(roomy_folder), "run", 1, {})
    manners = conversation.as_user(render, ends)
    team = single_policy.in_env(one.team, manners.env._replace(length=58))
    manners = manners._replace(env=team.program.task.env)
    policy = conversation.compile_policy(team, single_policy.SHOWN["surprisal"][1])
    moment, ids = policy.begin(3)
    state, shortened = conversation.State(moment, tuple(ids), (), None, 0.0), 0
    for text in ("hi", "oh"):
        before = state.ids
        state = conversation.person_turn(policy, manners, tiny_tokenizer, state, text)
        shortened += state.ids[:len(before)] != before
        said = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(state.turns)]
        assert list(state.ids) == render(said) and said[-1]["content"] == text
        start, stop = len(state.ids), iter([False] * 5 + [True] * 50)
        states, spoken = zip(*conversation.agent_turn(policy, manners, state, partial(next, stop)), strict=True)
        state, nats = states[-1], [one.nats for one in spoken]
        np.testing.assert_allclose(nats, surprisal(roomy_folder, state.ids)[start:], rtol=1e-3, atol=1e-4)
    assert shortened == 1


def test_a_model_is_opened_once_in_the_environment_that_was_asked_for(tiny_folder, monkeypatch):
    """64 tokens, the default, do not fit the tiny model's context."""
    loaded = []
    monkeypatch.setattr(weights, "load", lambda *path, load=weights.load: loaded.append(path) or load(*path))
    changes = {"teacher": "T:", "end": "\n\n", "opening": "B: hi\n\n"}
    one = single_policy.open_policy(str(tiny_folder), "run", 2, changes, 20)
    env, words = one.team.program.task.env, tokenizer.load(tiny_folder)
    assert tokenizer.decode(words, env.openings.tokens[0].tolist()) == "B: hi\n\nT:" and env.length == 20
    assert len(loaded) == 1
    with pytest.raises(ValueError, match="env.length=64 .* context is 64"):
        single_policy.open_policy(str(tiny_folder), "run", 2, changes)


@pytest.mark.parametrize("markers, prompt", [("forced", "B: "), ("written", "> ")])
def test_the_students_prefix_is_shown_once(tiny_tokenizer, markers, prompt):
    """With "written" it is what the agent's turn ended with."""
    settings = default().env
    settings.markers = markers
    env = ENVIRONMENTS[settings.name](settings, tiny_tokenizer)
    assert conversation.as_student(settings, env, tiny_tokenizer, frozenset()).person == prompt


def test_ctrl_c_waits_for_the_token():
    with sample._stoppable() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("arguments, says", [
    (("nowhere",), "'nowhere' is no run"), (("{run}",), "choose one, as {run}:0"), (("{run}:7",), "members 0 to 2"),
    (("{run}:1@9",), "there are 1, 2"), (("{run}:1", "--episodes", "0"), "--episodes 0"), ((), "required: POLICY"),
    (("{run}:1", "--chat"), "--chat is a way to --talk"), (("{run}:1", "--talk", "--chat"), "--chat is for a model"),
    (("{run}:1", "--end", "x"), "env.end: "), (("{run}:1", "--length", "99"), "has room for"),
    (("{run}:2", "--colour", "surprisal"), "kl.spend='sampled'"), (("embedded", "--end="), "env.end=''"),
    (("embedded", "--talk", "--chat", "--end", "x"), "leave --end out"),
    (("embedded", "--talk", "--episodes", "2"), "leave --episodes out")])
def test_a_wrong_call_is_one_line(run, call, arguments, says):
    status, printed = call(*(text.format(run=run) for text in arguments))
    assert status == 2 and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert says.format(run=run) in printed.err
