"""The sides of a comparison and the human conversations that they are compared on."""
from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kl_reg.analysis.compare import compare
from kl_reg.analysis.compare import policies as compared
from kl_reg.config import default
from kl_reg.envs import ENVIRONMENTS
from kl_reg.models import decoder
from kl_reg.policies.actor import Situation
from kl_reg.pretrained import chitchat, folders, tokenizer
from kl_reg.types import AGENT, FORCED, PAD, STUDENT, Transcript
from tests.programs import changed


def test_another_model_in_place_of_the_agent_leaves_the_base_to_the_student(tiny_shapes, tiny_params):
    """Both logits, from a whole transcript and token by token, against each model by itself; two rows, one padded."""
    shapes = decoder.DecoderConfig(vocab=300, width=24, layers=1, heads=2, kv_heads=1, head_width=8, mlp_width=16,
                                   max_position=64)
    params = decoder.init(shapes, jax.random.key(1))
    policy = compared.in_place_of_agent(tiny_shapes, shapes)
    prefill, decode, reread = jax.jit(policy.prefill, static_argnums=5), jax.jit(policy.decode), jax.jit(policy.reread)
    forward = jax.jit(decoder.forward, static_argnums=0)
    tokens, start = jax.random.randint(jax.random.key(2), (2, 6), 0, 300), jnp.array([0, 2])

    def logits(config, params):
        return jnp.einsum("btd,vd->btv", forward(config, params, tokens, start).last, params["embed"])

    base, own = logits(tiny_shapes, tiny_params), logits(shapes, params)
    slots = jnp.tile(jnp.arange(3, 6), (2, 1))
    nothing = Situation(*[jnp.zeros(2)] * 3)
    along = reread(params, tiny_params, Transcript(tokens, tokens, tokens, start), slots)
    reading = policy.read(params, tiny_params, along, nothing)
    np.testing.assert_allclose(reading.base_logits, base[:, 2:5], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(reading.base_logits + reading.gap, own[:, 2:5], rtol=1e-4, atol=1e-5)
    lifted = jax.tree.map(lambda x: x[None], params)
    state = prefill(lifted, tiny_params, tokens[:, :3], start, jnp.arange(2)[None], 6)
    features, _ = decode(lifted, tiny_params, tokens[None, :, 3], start[None], jnp.int32(3), state)
    reading = policy.read(params, tiny_params, jax.tree.map(lambda x: x[0], features), nothing)
    np.testing.assert_allclose(reading.base_logits, base[:, 3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(reading.base_logits + reading.gap, own[:, 3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text, special", [("<|start|>A: hi\n", "<|start|>"), ("A: hi\n", ""), ("", "")])
def test_the_special_tokens_that_an_opening_begins_with(tiny_tokenizer, text, special):
    assert compared.special_tokens(tiny_tokenizer, text) == special


def test_a_model_samples_as_the_member_that_it_is_compared_with(tiny_folder, tmp_path):
    config = default()
    config.model.path, config.env.length = str(tiny_folder), 8
    config.sweep = [{"sampling.temperature": (0.5, 1.0), "seed": (0, 1)}]
    (tmp_path / "config.json").write_text(json.dumps({"config": json.loads(config.to_json()), "fingerprint": "0"}))
    for names in (("base", f"{tmp_path}"), (f"{tiny_folder}", f"{tmp_path}:1")):
        model, run = compared.open_sides(names, "run", 4)
        matches = compared.pairs(model, run)
        assert [number for _, number in matches] == run.numbers
        for match in matches:
            drawn = [side.teams[side.place(number)[0]].program.agent.sampling.temperature
                     for side, number in zip((model, run), match, strict=True)]
            assert drawn == [0.5 if match[1] < 2 else 1.0] * 2


@pytest.mark.parametrize("markers", ["forced", "written"])
def test_held_out_conversations_are_as_they_were_written(markers):
    """The teacher's turns are the agent's tokens; text as chitchat writes it."""
    side, _ = compared.open_sides(("base", "base"), "run", 2)
    side.config.env.markers, side.config.env.length = markers, 100
    words = tokenizer.load(side.model.folder)
    env = ENVIRONMENTS["teacher_student"](side.config.env, words)
    team = side.teams[0]._replace(program=changed(side.teams[0].program, env=env))
    shown = compare.held_out(side._replace(teams=[team]), 6, 0)
    lines = map(json.loads, (folders.EMBEDDED / "held_out.jsonl").read_text().splitlines())
    texts = [tokenizer.START + chitchat.transcript(line["turns"]) for line in lines]
    found = set()
    for tokens, roles, turns in zip(shown.tokens, shown.roles, shown.turns, strict=True):
        there = roles != PAD
        (text,) = [text for text in texts if text.startswith(tokenizer.decode(words, tokens[there].tolist()))]
        found.add(text)
        for number in range(turns.max()):
            own = (turns == number) & (roles != FORCED)
            assert set(roles[own]) == {AGENT if number % 2 == 0 else STUDENT}
            said = text.splitlines()[number].split(":", 1)[1]
            decoded = tokenizer.decode(words, tokens[own].tolist())
            assert decoded == said + "\n" if markers == "forced" else decoded[:-2] == said + "\n"
        assert (roles[~there] == PAD).all() and (turns[~there] == -1).all()
    assert len(found) == 6
