"""The decoder against torch's Llama, and its cached path against its uncached one."""
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from kl_reg.models import decoder, weights

LENGTH = 10
START = jnp.array([0, 3, 7])


def torch_llama(tied, seed=0):
    """A Llama in which every setting is unlike its default and every weight is random, norms included."""
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        intermediate_size=40, max_position_embeddings=64, rope_theta=500.0, rms_norm_eps=1e-3, tie_word_embeddings=tied)
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.copy_(0.3 * torch.randn_like(weight) + (weight.ndim == 1))
    return model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tiny_tokenizer):
    """Tied or not -> (torch's model, ours loaded from what it saved)."""
    out = {}
    for tied in (True, False):
        folder, model = tmp_path_factory.mktemp("llama"), torch_llama(tied)
        model.save_pretrained(folder)
        tiny_tokenizer.save(str(folder / "tokenizer.json"))
        out[tied] = model, weights.load(str(folder))
    return out


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def pair(request, pairs):
    return pairs[request.param]


@pytest.fixture
def untied(pairs):
    return pairs[False]


@pytest.fixture(scope="module")
def tokens():
    """Random tokens [3, LENGTH], those before START included."""
    return jax.random.randint(jax.random.key(1), (3, LENGTH), 0, 96)


@partial(jax.jit, static_argnums=(0, 4))
def forward(config, params, tokens, start, features=0):
    return decoder.forward(config, params, tokens, start, features)


@partial(jax.jit, static_argnums=(0, 4, 5))
def prefill(config, params, tokens, start, slots, features=0):
    return decoder.prefill(config, params, tokens, start, slots, features)


@partial(jax.jit, static_argnums=(0, 6))
def decode(config, params, token, start, index, cache, features=0):
    return decoder.decode(config, params, token, start, index, cache, features)


def logits(model, hidden):
    return hidden @ decoder.unembedding(model.params).T


def ask(torch_model, row):
    return torch_model(torch.tensor(np.array(row))[None], output_hidden_states=True)


def test_the_shapes_are_read_from_config_json(pair):
    torch_model, model = pair
    assert model.config == decoder.DecoderConfig(
        vocab=96, width=32, layers=3, heads=4, kv_heads=2, head_width=12, mlp_width=40, max_position=64,
        rope_theta=500.0, norm_eps=1e-3, tied=torch_model.config.tie_word_embeddings)


def test_logits_are_those_of_torch(pair, tokens):
    torch_model, model = pair
    ours = logits(model, forward(model.config, model.params, tokens, jnp.zeros(3, jnp.int32)).last)
    theirs = torch_model(torch.tensor(np.array(tokens))).logits.numpy()
    assert theirs.std() > 0.5                                   # so the tolerance means something
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_left_padded_row_gives_what_torch_gives_without_padding(pair, tokens):
    torch_model, model = pair
    ours = logits(model, forward(model.config, model.params, tokens, START).last)
    for row, row_tokens, start in zip(ours, tokens, START, strict=True):
        np.testing.assert_allclose(row[start:], ask(torch_model, row_tokens[start:]).logits[0].numpy(), atol=1e-4)


def test_padding_is_never_looked_at(untied, tokens):
    _, model = untied
    other = jnp.where(jnp.arange(LENGTH)[None] < START[:, None], (tokens + 1) % 96, tokens)
    here, there = (forward(model.config, model.params, x, START).last for x in (tokens, other))
    for row in range(3):
        np.testing.assert_array_equal(here[row, START[row]:], there[row, START[row]:])


@pytest.mark.parametrize("count", [1, 3])
def test_features_are_the_normed_outputs_of_the_last_layers(untied, tokens, count):
    torch_model, model = untied
    ours = forward(model.config, model.params, tokens, START, count)
    assert ours.features.shape == (3, LENGTH, 32 * count)
    np.testing.assert_array_equal(ours.features[..., -32:], ours.last)
    for row, row_tokens, start in zip(ours.features, tokens, START, strict=True):
        states = ask(torch_model, row_tokens[start:]).hidden_states     # the last of them is normed already
        theirs = [*map(torch_model.model.norm, states[-count:-1]), states[-1]]
        np.testing.assert_allclose(row[start:], torch.cat(theirs, -1)[0].numpy(), atol=1e-4)


def test_no_features_are_returned_unasked(untied, tokens):
    _, model = untied
    assert forward(model.config, model.params, tokens, START).features.shape == (3, LENGTH, 0)


@pytest.mark.parametrize(("prompt", "start"), [(1, [0, 0, 0]), (4, [0, 3, 1]), (8, [7, 0, 3])])
def test_prefill_and_decode_say_what_forward_says(untied, tokens, prompt, start):
    _, model = untied
    start = jnp.array(start)
    whole = forward(model.config, model.params, tokens, start, 2)
    first, cache = prefill(model.config, model.params, tokens[:, :prompt], start, LENGTH + 2, 2)
    steps = [jax.tree.map(lambda x, i=i: x[:, i], first) for i in range(prompt)]
    for i in range(prompt, LENGTH):
        step, cache = decode(model.config, model.params, tokens[:, i], start, jnp.int32(i), cache, 2)
        steps.append(step)
    for i, step in enumerate(steps):
        real = np.array(start) <= i
        np.testing.assert_allclose(step.last[real], whole.last[real, i], atol=1e-4)
        np.testing.assert_allclose(step.features[real], whole.features[real, i], atol=1e-4)


def test_greedy_generation_is_that_of_torch(untied, tokens):
    torch_model, model = untied
    new = 32
    hidden, cache = prefill(model.config, model.params, tokens, START, LENGTH + new)
    greedy = lambda last: logits(model, last).argmax(-1)  # noqa: E731

    @jax.jit
    def generate(token, cache):
        def step(carry, index):
            hidden, cache = decoder.decode(model.config, model.params, carry[0], START, index, carry[1])
            return (greedy(hidden.last), cache), carry[0]

        return jax.lax.scan(step, (token, cache), LENGTH + jnp.arange(new))[1].T

    ours = generate(greedy(hidden.last[:, -1]), cache)
    for row, row_tokens, start in zip(ours, tokens, START, strict=True):
        prompt = torch.tensor(np.array(row_tokens[start:]))[None]
        theirs = torch_model.generate(prompt, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert row.tolist() == theirs[0, prompt.shape[1]:].tolist()
    assert len(np.unique(ours)) > 20


def test_an_untied_model_has_an_unembedding_of_its_own(tiny_shapes):
    shapes = lambda tied: jax.eval_shape(  # noqa: E731
        partial(decoder.init, dataclasses.replace(tiny_shapes, tied=tied)), jax.random.key(0))
    assert shapes(False).pop("unembed").shape == (300, 16)
    assert "unembed" not in shapes(True)
