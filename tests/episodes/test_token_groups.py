from __future__ import annotations

import pathlib
import re
import string
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_episode_metrics import recorded

from kl_reg import config as configs
from kl_reg.episodes.metrics import objective, summarise
from kl_reg.episodes.token_groups import BUILT_IN, compile_expressions, kl_by_group, token_groups
from kl_reg.pretrained import chitchat, tokenizer, weights
from kl_reg.sampling import rollout
from kl_reg.training.build import build
from kl_reg.training.compile import compile_program
from kl_reg.types import AGENT, OPENING, PAD, STUDENT, Frozen, Transcript

PAGE = pathlib.Path(__file__).parents[2] / "docs/metrics.md"
EXPRESSIONS = {"greeting": "(?i)hello|hi", "short": "^.$"}
BEYOND = 5000           # no token of the tokenizer: a model's vocabulary may be padded


@pytest.fixture(scope="module")
def ids(tiny_tokenizer):
    """Tokens by what they say, and the one whose text is that."""
    texts = {tokenizer.decode(tiny_tokenizer, [i]): i for i in range(tiny_tokenizer.get_vocab_size())}
    return lambda text: texts[text]


def episodes(tokens, turns, kl):
    """Rows of agent tokens, each in its turn, all with a student's token behind every turn; None: no token."""
    width, rows = 2 * len(tokens[0]) + 1, len(tokens)
    slot, mask = np.zeros((rows, len(tokens[0])), np.int32), np.array([[t is not None for t in row] for row in tokens])
    roles, in_turn = np.full((rows, width), PAD), np.full((rows, width), -1)
    roles[:, 0] = OPENING
    for e, row in enumerate(turns):
        at = 1
        for k, turn in enumerate(row):
            if mask[e, k]:
                slot[e, k], roles[e, at], in_turn[e, at] = at, AGENT, turn
                if k + 1 == len(row) or row[k + 1] != turn:
                    at += 1
                    roles[e, at], in_turn[e, at] = STUDENT, turn + 1
                at += 1
    transcript = Transcript(np.zeros((rows, width), np.int32), roles, in_turn, np.zeros(rows, np.int32))
    action = np.array([[0 if t is None else t for t in row] for row in tokens])
    return recorded(mask, transcript=transcript, slot=slot, action=action, kl=kl)


def test_two_episodes_by_hand(tiny_tokenizer, ids):
    hi, end, mark, word = ids("h"), ids("\n"), ids("!"), ids("a")
    batch = episodes([[hi, mark, end, end], [mark, word, BEYOND, None]], [[0, 0, 0, 2], [0, 0, 0, 0]],
                     [[4.0, 2.0, 1.0, 0.5], [8.0, 0.25, 0.125, 9.0]])
    out = kl_by_group(batch, token_groups(tiny_tokenizer, "\n", {"letters": "[a-h]"}))
    nats = {"first": [4.5, 8.0], "end": [1.0, 0.0], "punctuation": [2.0, 0.0], "other": [0.0, 0.375],
            "letters": [4.0, 0.25]}
    tokens = {"first": 3, "end": 1, "punctuation": 1, "other": 2, "letters": 2}
    for name, (one, two) in nats.items():
        assert out[f"kl/group/{name}/nats_per_episode"] == (one + two) / 2
        assert out[f"kl/group/{name}/nats_per_episode_se"] == pytest.approx(abs(one - two) / 2)
        assert out[f"kl/group/{name}/nats_per_token"] == pytest.approx((one + two) / tokens[name])
        assert out[f"kl/group/{name}/share"] == pytest.approx((one + two) / 15.875)
    assert len(out) == 5 * 3 * 2


def test_a_group_without_tokens_and_a_batch_without_kl(tiny_tokenizer, ids):
    batch = episodes([[ids("a"), ids("b")]], [[0, 0]], [[0.0, 0.0]])
    out = kl_by_group(batch, token_groups(tiny_tokenizer, "\n", {"nothing": "no such text"}))
    assert out["kl/group/nothing/nats_per_episode"] == 0.0 and out["kl/group/nothing/nats_per_token"] is None
    assert out["kl/group/other/nats_per_token"] == 0.0 and out["kl/group/other/share"] is None


def name_of(text, is_first, end):
    """The built-in group, read from the definition one token at a time."""
    if is_first:
        return "first"
    if end in text:
        return "end"
    punctuation = [c for c in text if c in string.punctuation or c.isspace() or unicodedata.category(c).startswith("P")]
    return "punctuation" if text and len(punctuation) == len(text) else "other"


@given(st.data())
def test_groups_are_those_of_a_count_by_token(tiny_tokenizer, data):
    vocab, end = tiny_tokenizer.get_vocab_size(), data.draw(st.sampled_from(["\n", " ", "e"]))
    lengths = data.draw(st.lists(st.integers(0, 7), min_size=3, max_size=3))
    tokens = [[data.draw(st.integers(0, vocab - 1)) if k < n else None for k in range(7)] for n in lengths]
    seven = lambda each: [data.draw(st.lists(each, min_size=7, max_size=7)) for _ in lengths]  # noqa: E731
    turns, kl = np.cumsum(seven(st.sampled_from([0, 0, 2])), axis=1).tolist(), seven(st.floats(0, 8, width=32))
    out = kl_by_group(episodes(tokens, turns, kl), token_groups(tiny_tokenizer, end, EXPRESSIONS))
    nats, count, total = dict.fromkeys((*BUILT_IN, *EXPRESSIONS), 0.0), dict.fromkeys((*BUILT_IN, *EXPRESSIONS), 0), 0.0
    for e, n in enumerate(lengths):
        for k in range(n):
            text = tokenizer.decode(tiny_tokenizer, [tokens[e][k]])
            is_first = k == 0 or turns[e][k] != turns[e][k - 1]
            groups = [name_of(text, is_first, end)] + [g for g, x in EXPRESSIONS.items() if re.search(x, text)]
            for group in groups:
                nats[group] += kl[e][k]
                count[group] += 1
            total += kl[e][k]
    for group in nats:
        per_token, share = out[f"kl/group/{group}/nats_per_token"], out[f"kl/group/{group}/share"]
        assert out[f"kl/group/{group}/nats_per_episode"] == pytest.approx(nats[group] / 3)
        assert per_token == (pytest.approx(nats[group] / count[group]) if count[group] else None)
        assert share == (pytest.approx(nats[group] / total) if total else None)
    assert sum(out[f"kl/group/{g}/nats_per_episode"] for g in BUILT_IN) == pytest.approx(total / 3)
    assert sum(count[g] for g in BUILT_IN) == sum(lengths)


@pytest.mark.parametrize(("text", "group"), [
    ("!", "punctuation"), ("$", "punctuation"), (" ", "punctuation"), ("\n", "end"), ("a", "other"), ("7", "other"),
    (chitchat.SPEAKERS[0], "other"), (tokenizer.START, "other"), ("\N{REPLACEMENT CHARACTER}", "other")])
def test_tokens_are_sorted_by_their_text(tiny_tokenizer, ids, text, group):
    assert BUILT_IN[token_groups(tiny_tokenizer, "\n", {}).kind[ids(text)]] == group


@pytest.mark.parametrize(("expressions", "says"), [
    ({"good": "a", "open": "(hello"}, r"log\.groups\['open'\]='\(hello' is no regular expression: .*unterminated"),
    ({"huge": "a{99999999999999999999}"}, r"log\.groups\['huge'\].*is no regular expression"),
    ({"number": 3}, r"log\.groups\['number'\]=3 must be a regular expression"),
    ({"first": "a"}, "name 'first' must.*none of first, end"), ({"a/b": "a"}, "name 'a/b' must consist"),
    ({"": "a"}, "name '' must"), ({3: "a"}, "name 3 must")])
def test_a_bad_group_is_one_error_that_names_it(expressions, says):
    with pytest.raises(ValueError, match=says):
        compile_expressions(expressions)


def test_groups_are_one_setting_that_a_program_reads_back():
    config = configs.default()
    config.log.groups = EXPRESSIONS
    assert configs.flat(config)["log.groups"] == EXPRESSIONS
    static, _, _ = configs.split(configs.override(config, {"seed": 1}))
    assert static.config().log.groups.to_dict() == EXPRESSIONS
    assert configs.fingerprint(config) == configs.fingerprint(configs.default())


def names_of_update():
    """What `step.update` logs, without computing it."""
    config = configs.default()
    config.env.length, config.rl.episodes, config.policy.hidden, config.kl.budget = 3, 2, 4, 1.0
    static, hyper, _ = configs.split(config)
    model = weights.load(config.model.path)
    run = compile_program(build(static, model))
    hyper = jax.tree.map(lambda x: x[None], hyper)

    def update(base):
        state = run.init(base, jnp.zeros(1, jnp.int32), hyper)
        drawn = run.draw(state.params, state.reference, hyper, Frozen(base),
                           rollout.member_keys(state.seed, state.iteration), jnp.zeros(1, jnp.int32))
        return run.update(state, hyper, Frozen(base), drawn, jnp.zeros(drawn.mask.shape))[1]

    return set(jax.eval_shape(update, model.params))


def test_the_page_lists_every_metric_and_no_other(tiny_tokenizer):
    """The loop adds iteration, seconds, the number of evaluation episodes and what it knows of the rewards."""
    batch = episodes([[5, 6], [7, None]], [[0, 0], [0, 0]], [[1.0, 2.0], [3.0, 0.0]])
    row = {**summarise(batch, [], np.zeros(2)), "kl/coef": 0.1,
           **kl_by_group(batch, token_groups(tiny_tokenizer, "\n", {}))}
    real = {*row, *objective(row), *names_of_update(), "iteration", "seconds", "tokens_per_second", "episodes",
            "reward/unjudged_rate", "reward/unjudged_rate_se"}
    listed = set()
    for name, with_error in re.findall(r"^\| `([^`]+)` \| (±?) ?\|", PAGE.read_text(), re.MULTILINE):
        for expanded in [name.replace("<name>", group) for group in BUILT_IN] if "<name>" in name else [name]:
            assert expanded not in listed, f"{expanded} is listed twice"
            listed |= {expanded, f"{expanded}_se"} if with_error else {expanded}
    assert listed == real
