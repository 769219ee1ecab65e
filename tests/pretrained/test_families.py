"""Every model family against transformers' torch model of it, from the files that transformers writes."""
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from kl_reg.models import decoder
from kl_reg.pretrained import families, weight_map, weights
from kl_reg.pretrained.weight_files import open_source

PROMPTS = (20, 13, 5)       # longer and shorter than WINDOW; one left-padded batch
NEW = 64
WINDOW = 8
START = max(PROMPTS) - np.array(PROMPTS)

SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-3, pad_token_id=0, bos_token_id=1,
             eos_token_id=None)
BIASED = dict(attention_bias=True)
LAYERS = dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"])
GEMMA = SIZES | BIASED | dict(head_dim=12)
GEMMA2 = GEMMA | dict(sliding_window=WINDOW, query_pre_attn_scalar=20, attn_logit_softcapping=2.0,
                      final_logit_softcapping=6.0)
GEMMA3 = GEMMA2 | LAYERS | dict(rope_parameters={
    "full_attention": dict(rope_type="linear", rope_theta=700.0, factor=4.0),
    "sliding_attention": dict(rope_type="default", rope_theta=60.0)})
NEOX = SIZES | dict(num_key_value_heads=4, layer_norm_eps=1e-3, hidden_act="gelu_new",
                    rope_parameters=dict(rope_type="default", rope_theta=300.0, partial_rotary_factor=0.5))
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8,
              patch_size=4)


def rope(kind="default", **more):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=300.0, **more))


SETTINGS = {
    "llama, llama3 rope": ("llama", SIZES | BIASED | dict(mlp_bias=True, head_dim=12) | rope(
        "llama3", factor=8.0, low_freq_factor=1.5, high_freq_factor=3.0, original_max_position_embeddings=32)),
    "llama, linear rope": ("llama", SIZES | dict(hidden_act="gelu") | rope("linear", factor=3.0)),
    "llama, yarn rope": ("llama", SIZES | dict(head_dim=16) | rope(
        "yarn", factor=4.0, original_max_position_embeddings=100, beta_fast=2.0, beta_slow=0.5,
        mscale=1.5, mscale_all_dim=0.5, truncate=False)),
    "llama as smollm2": ("llama", SIZES | rope() | dict(
        hidden_size=36, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)),
    "mistral": ("mistral", SIZES | rope() | dict(head_dim=12, sliding_window=WINDOW)),
    "ministral": ("ministral", SIZES | rope() | LAYERS | dict(head_dim=12, sliding_window=WINDOW)),
    "mixtral": ("mixtral", SIZES | rope() | dict(num_local_experts=5, num_experts_per_tok=3)),
    "qwen2": ("qwen2", SIZES | rope() | dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)),
    "qwen3": ("qwen3", SIZES | rope() | BIASED | LAYERS | dict(
        head_dim=12, use_sliding_window=True, sliding_window=WINDOW)),
    "gemma": ("gemma", GEMMA | rope()),
    "gemma2": ("gemma2", GEMMA2 | rope()),
    "gemma3_text": ("gemma3_text", GEMMA3),
    "gemma3": ("gemma3", dict(text_config=GEMMA3 | dict(final_logit_softcapping=None), vision_config=VISION,
                            mm_tokens_per_image=4)),
    "olmo2": ("olmo2", SIZES | rope() | BIASED),
    "gpt2": ("gpt2", dict(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=128, n_inner=40, bos_token_id=1,
                          eos_token_id=None, layer_norm_epsilon=1e-3, activation_function="relu")),
    "gpt_neox, parallel": ("gpt_neox", NEOX | dict(use_parallel_residual=True)),
    "gpt_neox, sequential": ("gpt_neox", NEOX | dict(use_parallel_residual=False, attention_bias=False)),
}


def torch_model(name):
    """A torch model in which every weight is random, biases and norms included."""
    kind, settings = SETTINGS[name]
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **settings), attn_implementation="eager")
    model.eval().requires_grad_(False)
    for path, weight in model.named_parameters():
        one = weight.ndim == 1 and not path.endswith("bias") and kind != "gemma"
        weight.copy_((0.2 if weight.ndim == 1 else 0.3) * torch.randn_like(weight) + one)
    return model


@partial(jax.jit, static_argnums=0)
def generate(config, params, tokens):
    """Greedy text [b, t] that continues `tokens`, its logits from the cache, and those without one."""
    start, prompt = jnp.array(START), tokens.shape[1]

    def step(carry, index):
        hidden, cache = decoder.decode(config, params, carry[0], start, index, carry[1])
        logits = decoder.logits(config, params, hidden.last)
        return (logits.argmax(-1).astype(jnp.int32), cache), (carry[0], logits)

    hidden, cache = decoder.prefill(config, params, tokens, start, prompt + NEW)
    first = decoder.logits(config, params, hidden.last)
    carry = first[:, -1].argmax(-1).astype(jnp.int32), cache
    new, rest = jax.tree.map(lambda x: x.swapaxes(0, 1), jax.lax.scan(step, carry, prompt + jnp.arange(NEW))[1])
    text = jnp.concatenate([tokens, new], axis=1)
    whole = decoder.logits(config, params, decoder.forward(config, params, text, start).last)
    return text, jnp.concatenate([first, rest], axis=1), whole


class Case:
    """A family's torch model, ours loaded from its files, and what ours writes."""

    def __init__(self, name, folder):
        self.torch, self.folder = torch_model(name), folder
        self.torch.save_pretrained(folder, max_shard_size="40KB")
        (folder / "tokenizer.json").write_text("{}")
        self.ours = weights.load(str(folder))
        tokens = np.random.default_rng(1).integers(3, 96, (len(PROMPTS), max(PROMPTS)), np.int32)
        self.text, self.cached, self.whole = map(np.asarray, generate(self.ours.config, self.ours.params, tokens))

    def rows(self):
        """Each row's first real slot, and its text without padding, as torch takes it."""
        return [(row, start, torch.tensor(self.text[row, start:]).long()[None]) for row, start in enumerate(START)]


@pytest.fixture(scope="module")
def one_thread():
    """Threads cost more than they bring in models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=SETTINGS)
def case(request, tmp_path_factory, one_thread):
    return Case(request.param, tmp_path_factory.mktemp("family"))


def test_logits_are_those_of_torch_for_each_row_without_padding(case):
    for row, start, text in case.rows():
        theirs = case.torch(text).logits[0].numpy()
        assert theirs.std() > 1                                     # nats: so the tolerance means something
        np.testing.assert_allclose(case.whole[row, start:], theirs, atol=1e-4)


def test_logits_from_the_cache_are_those_without_it(case):
    for row, start, _ in case.rows():
        np.testing.assert_allclose(case.cached[row, start:], case.whole[row, start:], atol=1e-4)


def test_greedy_generation_is_that_of_torch(case):
    for (_, _, text), prompt in zip(case.rows(), PROMPTS, strict=True):
        theirs = case.torch.generate(text[:, :prompt], max_new_tokens=NEW, do_sample=False)
        assert text.tolist() == theirs.tolist()
    assert len(np.unique(case.text[:, max(PROMPTS):])) > 5


def test_the_tensors_that_were_read_are_written_again(case):
    config, family = families.read(json.loads((case.folder / "config.json").read_text()))
    assert config == case.ours.config
    written = dict(weight_map.write(family.rules(config), case.ours.params))
    source = open_source(case.folder)
    for key in source.shapes:
        if not key.startswith(("vision_tower.", "multi_modal_projector.")):
            np.testing.assert_array_equal(written.pop(key.removeprefix("language_model.")), source.read(key))
    assert not written
