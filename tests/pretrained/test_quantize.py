"""int8 matrices: against numpy's rounding, the same decoder on the rounded float weights, and scipy's KL."""
import dataclasses
import json
from functools import partial

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from scipy.special import log_softmax, rel_entr, softmax

from kl_reg import config as configs
from kl_reg import validation
from kl_reg.kl.exact import reverse_kl
from kl_reg.models import decoder
from kl_reg.policies import kinds as policies
from kl_reg.policies import lora
from kl_reg.policies.actor import Situation
from kl_reg.pretrained import chitchat, folders, quantize, tokenizer, weights
from kl_reg.runs import checkpoint
from kl_reg.training import loop
from kl_reg.types import Transcript

START = jnp.array([0, 2, 0, 1])


def dequantised(params):
    """The same weights as float: numpy's product of each int8 matrix with its scales."""
    def walk(tree):
        out = {}
        for name, leaf in tree.items():
            if isinstance(leaf, dict):
                out[name] = walk(leaf)
            elif f"{name}_scale" in tree:
                out[name] = jnp.asarray(np.float32(leaf) * np.asarray(tree[f"{name}_scale"])[..., None, :])
            elif not name.endswith("_scale"):
                out[name] = leaf
        return out

    return walk(params)


def random_model(shapes, experts):
    """(shapes, params) of two layers with biases, random weights."""
    shapes, rng = dataclasses.replace(shapes, layers=2, qkv_bias=True, experts=experts), np.random.default_rng(1)
    tree = jax.eval_shape(partial(decoder.init, shapes), jax.random.key(0))
    return shapes, jax.tree.map(lambda x: jnp.float32(0.4 * rng.standard_normal(x.shape)), tree)


@pytest.fixture(scope="module")
def dense(tiny_shapes):
    return random_model(tiny_shapes, 0)


@pytest.fixture(scope="module", params=[0, 3], ids=["dense", "experts"])
def model(request, tiny_shapes):
    return random_model(tiny_shapes, request.param)


@pytest.fixture(scope="module")
def adapter():
    """Of two members, of queries and keys."""
    rng, random = np.random.default_rng(2), lambda *shape: jnp.float32(0.3 * rng.standard_normal(shape))
    return {"query": {"a": random(2, 2, 16, 3), "b": random(2, 2, 3, 32)},
            "key": {"a": random(2, 2, 16, 3), "b": random(2, 2, 3, 16)}}


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(3), (4, 6), 0, 300)


weights_of = arrays.arrays(np.float32, (2, 4, 3), elements=st.floats(-2.0**40, 2.0**40, width=32))


@hypothesis.given(weights_of)
@hypothesis.example(np.zeros((2, 4, 3), np.float32))
@hypothesis.example(np.full((2, 4, 3), 1e-39, np.float32))
def test_no_weight_moves_by_more_than_half_a_step(weight):
    layer = quantize.quantize({"layers": {"up": {"kernel": jnp.asarray(weight)}}})["layers"]["up"]
    q, scale = np.asarray(layer["kernel"]), np.asarray(layer["kernel_scale"], np.float64)
    assert q.dtype == np.int8 and scale.shape == (2, 3) and layer["kernel_scale"].dtype == jnp.float32
    largest = np.abs(np.float64(weight)).max(1)
    normal = largest > 1e-35
    np.testing.assert_allclose(scale[normal], largest[normal] / 127, rtol=1e-6)
    assert np.all(np.abs(q).max(1)[normal] == 127) and np.all(scale > 0)
    assert np.all(np.abs(q * scale[:, None] - weight) <= 0.5001 * scale[:, None])


def test_matrices_become_int8_and_nothing_else_changes(model):
    shapes, params = model
    before, after = (flatten_dict(tree, sep="/") for tree in (params, quantize.quantize(params)))
    names = ["query", "key", "value", "out", *([] if shapes.experts else ["gate", "up", "down"])]
    matrices = {f"layers/{name}/kernel" for name in names}
    matrices |= {f"layers/experts/{name}" for name in ("gate", "up", "down")} if shapes.experts else set()
    assert after.keys() - before.keys() == {f"{path}_scale" for path in matrices}
    for path, leaf in before.items():
        if path in matrices:
            assert after[path].dtype == jnp.int8 and after[path].shape == leaf.shape
            assert after[f"{path}_scale"].shape == (*leaf.shape[:-2], leaf.shape[-1])
        else:
            assert after[path] is leaf


def test_float_matrices_are_deleted_only_where_that_is_asked_for(dense):
    own = jax.tree.map(jnp.copy, dense[1])
    quantize.quantize(own)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(own))
    quantize.quantize(own, donate=True)
    assert own["layers"]["query"]["kernel"].is_deleted() and not own["embed"].is_deleted()


def test_what_is_int8_is_neither_rounded_again_nor_changed(model, adapter):
    rounded = quantize.quantize(model[1])
    with pytest.raises(ValueError, match="layers/query/kernel.*: int8 already"):
        quantize.quantize(rounded, donate=True)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(rounded))
    with pytest.raises(ValueError, match="layers/key/kernel is int8"):
        lora.merged(rounded, jax.tree.map(lambda x: x[:, 0], adapter), 1.0)


@partial(jax.jit, static_argnums=0)
def every_path(shapes, params, tokens, adapter):
    """Hidden states of `forward`, and of `prefill` and `decode` one after the other."""
    whole = decoder.forward(shapes, params, tokens, START, adapter=adapter).last
    first, cache = decoder.prefill(shapes, params, tokens[:, :-1], START, 6, adapter=adapter)
    last, _ = decoder.decode(shapes, params, tokens[:, -1], START, jnp.int32(5), cache, adapter=adapter)
    return whole, first.last, last.last


def test_the_decoder_reads_int8_as_the_rounded_float_weights(model, tokens, adapter):
    shapes, params = model
    rounded = quantize.quantize(params)
    ours, theirs = (every_path(shapes, p, tokens, adapter) for p in (rounded, dequantised(rounded)))
    for x, y in zip(ours, theirs, strict=True):
        assert np.abs(y).mean() > 0.1
        np.testing.assert_allclose(x, y, atol=1e-5)
    moved = jnp.abs(ours[0] - every_path(shapes, params, tokens, adapter)[0]).max()
    assert moved > 1e-3                                  # it is not the float model


def test_gradients_pass_through_int8_and_keep_no_float_copy_of_it(model, tokens, adapter):
    shapes, params = model
    rounded = quantize.quantize(params)

    def last(params, adapter):
        return (decoder.forward(shapes, params, tokens, START, adapter=adapter).last[:, 3:] ** 3).sum()

    ours, theirs = (jax.jit(jax.grad(last, 1))(p, adapter) for p in (rounded, dequantised(rounded)))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(y).max()))
    shapes_of = {leaf.shape for leaf in jax.tree.leaves(rounded["layers"]) if leaf.dtype == jnp.int8}
    kept = jax.eval_shape(lambda a: jax.vjp(partial(last, rounded), a)[1], adapter)
    same = [leaf.dtype for leaf in jax.tree.leaves(kept) if leaf.shape in shapes_of]
    assert same and set(same) == {jnp.dtype("int8")}


def kl_rows(p_logits, q_logits):
    """D(p || q) of each token, float64."""
    return rel_entr(softmax(np.float64(p_logits), -1), softmax(np.float64(q_logits), -1)).sum(-1)


def test_the_divergence_is_scipys_with_errors_over_conversations(tiny_shapes, tiny_params):
    shapes = dataclasses.replace(tiny_shapes, logit_cap=5.0)
    rng = np.random.default_rng(4)
    before = jnp.float32(rng.standard_normal((3, 5, 16)))
    after = before + jnp.float32(3 * rng.standard_normal((3, 5, 16)))
    got = quantize.measure(shapes, tiny_params, before, after)
    old, new = (5 * np.tanh(np.float64(x) @ np.float64(tiny_params["embed"]).T / 5) for x in (before, after))
    for rows, mean, error in ((kl_rows(new, old), got.to_float, got.to_float_se),
                              (kl_rows(old, new), got.from_float, got.from_float_se)):
        each = rows.mean(1)
        np.testing.assert_allclose((mean, error), (each.mean(), each.std(ddof=1) / 3**0.5), rtol=1e-4)
    assert abs(got.to_float / got.from_float - 1) > 0.01


def test_a_model_is_converted_and_what_that_costs_is_said(tiny_folder):
    loaded = weights.load(str(tiny_folder))
    before = jax.tree.map(jnp.copy, loaded.params)
    got, rounding = quantize.convert(loaded)
    words, line = tokenizer.load(tiny_folder), (folders.EMBEDDED / "held_out.jsonl").read_text().splitlines()[0]
    seen = quantize.held_out(got)
    assert seen.shape == (16, 64)                       # the model's context is shorter than 128
    assert seen[0].tolist() == words.encode(chitchat.transcript(json.loads(line)["turns"])).ids[:64]
    old, new = (np.float64(decoder.logits(got.config, p, quantize.hidden(got.config, p, seen)))
                for p in (before, dequantised(got.params)))
    np.testing.assert_allclose(rounding.divergence.to_float, kl_rows(new, old).mean(), rtol=1e-3)
    np.testing.assert_allclose(rounding.divergence.from_float, kl_rows(old, new).mean(), rtol=1e-3)
    assert log_softmax(old, -1).min() < -10 and rounding.divergence.to_float > 1e-5
    matrices = 3 * (16 * 32 + 2 * 16 * 16 + 32 * 16 + 3 * 16 * 32)       # query, key, value, out and the MLP's three
    others = 300 * 16 + 7 * 16                                           # embeddings and norms
    scales = 3 * (32 + 2 * 16 + 16 + 2 * 32 + 16)
    assert (rounding.float_bytes, rounding.bytes) == (4 * (matrices + others), matrices + 4 * (others + scales))
    assert rounding.tokens == 16 * 64


def test_the_line_writes_small_numbers_out():
    kl = quantize.Divergence(0.00120345, 0.0000912, 0.0013, 0.0001)
    line = str(quantize.Rounding(kl, 2048, 89_012_345, 538_060_032))
    assert line == ("KL to the float model 0.00120 ± 0.00009 nats per token (held-out text, 2048 tokens), weights "
                    "89.01 MB instead of 538.1 MB")


@pytest.mark.parametrize(("kind", "rounding"), [("head", 0.0), ("lora", 1e-10)])
def test_the_first_policy_on_an_int8_base_is_that_base(kind, rounding, dense, tokens):
    shapes, params = dense
    base, settings = quantize.quantize(params), configs.default().policy.unlock()
    settings.layers, settings.targets = 2, "query|key"
    made = policies.build(kind, shapes, settings)
    own = made.init(jax.random.key(5), base)
    slot = jnp.broadcast_to(jnp.arange(3, 6), (4, 3))

    @jax.jit
    def read(own):
        features = made.reread(own, base, Transcript(tokens, tokens, tokens, START), slot)
        situation = Situation(*(jnp.full((4, 3), 0.5) for _ in Situation._fields))
        reading = made.read(own, base, features, situation)
        log_base = jax.nn.log_softmax(reading.base_logits)
        return log_base, jax.vmap(jax.vmap(reverse_kl))(jax.nn.log_softmax(reading.base_logits + reading.gap), log_base)

    log_base, kl = read(own)
    assert np.abs(kl).max() <= rounding
    theirs = decoder.logits(shapes, base, decoder.forward(shapes, dequantised(base), tokens, START).last)
    np.testing.assert_allclose(log_base, jax.nn.log_softmax(theirs[:, 2:5]), atol=1e-4)
    moved = jax.tree.map(lambda x: x + 0.1, own)
    assert np.asarray(read(moved)[1]).mean() > 1e-4


@pytest.mark.parametrize(("settings", "words"), [
    ({"model.quantize": "int4"}, "model.quantize='int4'.*'int8'"),
    ({"model.quantize": "int8", "policy.kind": "full"}, "policy.kind='full'.*model.quantize='int8'.*lora")])
def test_what_does_not_go_together_is_refused(settings, words):
    config = configs.default()
    config.update_from_flattened_dict(settings)
    with pytest.raises(ValueError, match=words):
        validation.validate(config)


def test_a_run_says_and_records_what_its_base_lost(tiny_folder, tmp_path, monkeypatch, capsys):
    class Claimed(Exception):
        """Raised where training would begin."""

    def claim(workdir, resolved):
        raise Claimed(resolved)

    monkeypatch.setattr(checkpoint, "claim", claim)
    config = configs.default()
    config.model.path, config.model.quantize, config.env.length = str(tiny_folder), "int8", 16
    with pytest.raises(Claimed) as stopped:
        loop.train(config, workdir=tmp_path)
    (resolved,) = stopped.value.args
    _, rounding = quantize.convert(weights.load(str(tiny_folder)))
    assert f"model.quantize=int8: {rounding}\n" in capsys.readouterr().out
    assert json.loads(json.dumps(resolved))["quantize"] == rounding.record()
