"""Tokens beyond a model's table are refused where they are used, and nowhere else."""
import json
import shutil
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kl_reg import config as configs
from kl_reg.analysis.behaviour import script_price
from kl_reg.analysis.compare import compare
from kl_reg.analysis.compare.conversation import Manners, Policy, State, person_turn
from kl_reg.analysis.compare.policies import Side
from kl_reg.pretrained import chitchat, embeddings, families, quantize, tokenizer, weights
from kl_reg.pretrained.tokenizer import START
from kl_reg.rewards.log_likelihood import log_likelihood
from kl_reg.training import build as builder
from tests.programs import by_hand


@pytest.fixture(scope="module")
def short(tiny_folder, tiny_tokenizer, tmp_path_factory):
    """The tiny model without embeddings for the tokens that were added to its tokenizer: START and the speakers."""
    folder = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(tiny_folder, folder)
    whole, rows = weights.load(str(tiny_folder)), tiny_tokenizer.token_to_id(START)
    settings = families.llama_settings(whole.config) | {"vocab_size": rows}
    weights.save(folder, settings, whole.params | {"embed": whole.params["embed"][:rows]}, "float32")
    return folder


@given(st.lists(st.integers(-2, 300)), st.integers(1, 300))
def test_exactly_ids_outside_the_table_are_refused(tiny_tokenizer, ids, rows):
    outside = [number for number in ids if number < 0 or number >= rows]
    if not outside:
        return embeddings.check(ids, rows, "x", "y", tiny_tokenizer)
    with pytest.raises(ValueError, match=f"^x: token {min(outside)} .* no embedding in y, whose table has {rows} rows"):
        embeddings.check(ids, rows, "x", "y", tiny_tokenizer)


def build(model, **changes):
    config = configs.override(configs.default(), {"env.length": 8, "policy.hidden": 8} | changes)
    return builder.build(configs.static_of(config), weights.load(model))


PLAIN = {"env.name": "completion", "env.opening": "hello", "env.end": "\n"}


@pytest.mark.parametrize(("changes", "source", "token"), [
    (PLAIN | {"env.opening": f"{START}hello"}, "opening 1 of 1", START),
    (PLAIN | {"env.end": "B:"}, "env.end, env.teacher or env.student", "B:"),
    ({"env.opening": "hello\n", "env.teacher": "hello"}, "env.end, env.teacher or env.student", "B:"),
    ({"env.opening": "hello\n", "env.student": "hello"}, "opening 1 of 1", "A:")])
def test_a_base_without_an_embedding_for_what_is_used_is_refused(short, changes, source, token):
    with pytest.raises(ValueError, match=f"^{source}: token .*{token.replace('|', '.')}.* no embedding in model.path="):
        build(str(short), **changes, **{"model.path": str(short)})


def test_a_file_of_prompts_says_which(short, tmp_path):
    (tmp_path / "prompts.txt").write_text("hello\nnice day\nhello A: you\nA:\n")
    with pytest.raises(ValueError, match="^opening 3 of 4: token"):
        build(str(short), **PLAIN, **{"env.openings": str(tmp_path / "prompts.txt")})


def test_unused_tokens_may_lie_beyond_the_table(short):
    assert build(str(short), **PLAIN).agent.policy


def test_an_end_token_beyond_the_table_is_refused(short, tiny_tokenizer, tmp_path):
    shutil.copytree(short, tmp_path / "model")
    config = json.loads((short / "config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"eos_token_id": tiny_tokenizer.token_to_id("A:")}))
    with pytest.raises(ValueError, match="^the end tokens of the model: token .*'A:'"):
        build(str(tmp_path / "model"), **PLAIN)


@pytest.mark.parametrize("setting", ["env.student_model", "reference.paths"])
def test_a_student_or_a_reference_without_an_embedding_is_refused(tiny_folder, short, setting):
    other = {"env.student_model": str(short)} if setting == "env.student_model" else {
        "reference.name": "checkpoint", "reference.paths": (str(short),)}
    with pytest.raises(ValueError, match=f"^opening 1 of 1: token .* no embedding in {setting}="):
        build(str(tiny_folder), **other)
    assert build(str(tiny_folder)).agent.policy


def test_a_judge_reads_what_it_has_embeddings_for(short):
    reward = log_likelihood(str(short))
    assert reward(prompts=["hello"], completions=[" there"])[0] < 0
    for prompt, said in ((f"{START}hello", " there"), ("hello", " there\nA: you")):
        with pytest.raises(ValueError, match="^a text that the reward is asked of: token .* no embedding"):
            reward(prompts=[prompt], completions=[said])


def test_texts_of_the_analyses_are_looked_at_too(short):
    """Each writes START or a speaker."""
    model, words = weights.load(str(short)), tokenizer.load(short)
    with pytest.raises(ValueError, match="^the markers: token"):
        script_price.price_of_script(model, ["hello"], ["nice"], 1, 1, 0, script_price.Dialogue("A:", "B:", "\n"))
    with pytest.raises(ValueError, match="^held-out conversations: token"):
        quantize.held_out(model)
    env = SimpleNamespace(length=8)
    side = Side("x", "model", None, model, configs.default(), [SimpleNamespace(program=by_hand(length=8))], None)
    with pytest.raises(ValueError, match="^held-out conversations: token"):
        compare.held_out(side, 1, 0)
    manners = Manners(env, "", "", False, frozenset(), [], lambda ids, turns, text: (1, words.encode(text).ids))
    state = State(None, (5,), (), None, 0.0)
    with pytest.raises(ValueError, match="^that turn: token"):
        person_turn(Policy(None, None, None, len(model.params["embed"])), manners, words, state, "hello A:")
    assert {START, *chitchat.SPEAKERS} == {words.id_to_token(number) for number in range(
        model.config.vocab, words.get_vocab_size())}
