"""Every setting of a family's config.json, changed in turn: our logits are those of the torch model that transformers
makes of the changed folder, or the folder is refused."""
import dataclasses
import inspect
import json
import pathlib
import re
import zlib
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers import cache_utils, masking_utils, modeling_rope_utils

from kl_reg.models import decoder, encoder
from kl_reg.pretrained import encoder_families, families, weights
from tests.models.test_encoder import word_pieces

WINDOW, PROMPT, NEW = 4, 9, 3
TOKENS = np.random.default_rng(1).integers(5, 20, (1, PROMPT + NEW))      # none of them is special
SIZES = dict(vocab_size=24, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-3)
LAYERS = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=WINDOW)
GEMMA2 = SIZES | LAYERS | dict(head_dim=8, query_pre_attn_scalar=5, attn_logit_softcapping=2.0,
                               final_logit_softcapping=6.0)
GEMMA3 = GEMMA2 | dict(rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=300.0),
                                            sliding_attention=dict(rope_type="default", rope_theta=60.0)))
BERT = dict(vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=12,
            max_position_embeddings=40, layer_norm_eps=1e-3)
SETTINGS = {
    "llama": SIZES,
    "mistral": SIZES | dict(head_dim=8, sliding_window=WINDOW),
    "ministral": SIZES | LAYERS | dict(head_dim=8),
    "mixtral": SIZES | dict(num_local_experts=3, num_experts_per_tok=2, sliding_window=WINDOW),
    "qwen2": SIZES | dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": SIZES | dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, head_dim=8),
    "gemma": SIZES | dict(head_dim=8),
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gemma3": dict(text_config=GEMMA3 | dict(final_logit_softcapping=None), mm_tokens_per_image=4,
                   image_token_index=20, boi_token_index=21,
                   eoi_token_index=22, vision_config=dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                                          num_attention_heads=2, image_size=8, patch_size=4)),
    "olmo2": SIZES,
    "gpt2": dict(vocab_size=24, n_embd=16, n_layer=2, n_head=4, n_positions=64, n_inner=12, layer_norm_epsilon=1e-3),
    "gpt_neox": SIZES | dict(num_attention_heads=2, layer_norm_eps=1e-3, rotary_pct=0.5),
    "distilbert": dict(vocab_size=24, dim=16, n_layers=2, n_heads=4, hidden_dim=12, max_position_embeddings=40),
    "bert": BERT,
    "roberta": BERT | dict(type_vocab_size=1),
    "xlm-roberta": BERT | dict(type_vocab_size=1),
}
pytestmark = pytest.mark.filterwarnings("ignore")       # those of transformers about the changed settings

MADE_ELSEWHERE = ("dtype", "transformers_version", "vision_config", "text_config", "rope_parameters", "label2id")
"""Settings that are left alone: `model.dtype` decides the dtype; the parts are changed by themselves."""

ACTIVATIONS = ["gelu", "gelu_fast", "swish", "tanh", "mish"]
FULL, SLIDING = "full_attention", "sliding_attention"
VALUES = dict.fromkeys(("hidden_act", "hidden_activation", "activation_function", "activation"), ACTIVATIONS) | dict(
    head_dim=[None, 2, 6, 16], num_key_value_heads=[None, 1, 4], num_attention_heads=[2, 8], n_head=[2, 8], n_heads=[2],
    num_hidden_layers=[1, 3], n_layer=[1], n_layers=[1], hidden_size=[8, 32], n_embd=[32], dim=[32], n_inner=[None, 20],
    layer_types=[None, [FULL] * 2, [SLIDING] * 2, [FULL, SLIDING], ["chunked_attention"] * 2,
                 ["linear_attention", FULL]], sliding_window=[None, 6, 100], max_window_layers=[0, 2],
    attn_logit_softcapping=[None, 1.0], final_logit_softcapping=[None, 1.0], is_causal=[False],
    attention_chunk_size=[3], kv_sharing_modes=[["reuse"] * 2], per_layer_config=[{"0": {"sliding_window": 2}}],
    pad_token_id=[None, 3], bos_token_id=[None, 3], eos_token_id=[None, 3, [3, 4]], problem_type=["regression"],
    use_bidirectional_attention=[True, False], partial_rotary_factor=[0.5], rope_theta=[77.0], rotary_pct=[0.25],
    rotary_emb_base=[77], rope_scaling=[None, {"type": "linear", "factor": 2.0}], rope_local_base_freq=[77.0],
    sliding_window_pattern=[2, 1], original_max_position_embeddings=[16], num_experts=[2], architectures=[["Other"]],
    id2label=[{"0": "a"}, {"0": "a", "1": "b", "2": "c"}], position_embedding_type=["relative_key"], num_labels=[3],
    quantization_config=[{"quant_method": "gptq"}], auto_map=[{"AutoConfig": "x.Y"}], summary_activation=["tanh"],
    classifier_dropout=[0.5], tie_word_embeddings=[True, False], transformers_weights=["other.safetensors"])
OTHER_NAMES = ("per_layer_config", "partial_rotary_factor", "rope_theta", "rotary_pct", "rotary_emb_base",
               "rope_scaling", "rope_local_base_freq", "sliding_window_pattern", "original_max_position_embeddings",
               "num_experts", "position_embedding_type", "quantization_config", "num_labels", "auto_map", "is_decoder")
"""Old spellings, and what no configuration class declares."""

ROPES = [dict(rope_type=kind, rope_theta=77.0, **more) for kind, more in {
    "default": {}, "linear": dict(factor=2.0), "dynamic": dict(factor=2.0), "proportional": dict(factor=2.0),
    "longrope": dict(factor=4.0, original_max_position_embeddings=16, short_factor=[1.0, 2.0], long_factor=[1.5, 2.0]),
    "llama3": dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    "yarn": dict(factor=4.0, original_max_position_embeddings=16)}.items()]
ROPE_VALUES = dict(
    partial_rotary_factor=0.5, factor=3.0, original_max_position_embeddings=32, attention_factor=1.5, beta_fast=4.0,
    beta_slow=0.5, short_factor=[3.0, 4.0], long_factor=[3.0, 4.0], low_freq_factor=0.5, high_freq_factor=2.0,
    mscale=1.5, mscale_all_dim=0.5, truncate=False, mrope_section=[1, 1, 0], rope_theta=13.0)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than they bring in models as small as these; and torch's tensors need no gradient."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def auto(family):
    return (transformers.AutoModelForSequenceClassification if family in encoder_families.FAMILIES
            else transformers.AutoModelForCausalLM)


def made(family, settings, folder):
    """Torch's model of a folder with this config.json; its weights depend on their names and shapes alone."""
    (folder / "config.json").write_text(json.dumps(settings))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = auto(family).from_config(config, attn_implementation="eager").eval()
    for name, weight in model.named_parameters():
        around = weight.ndim == 1 and "bias" not in name and "gemma" not in family
        drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(weight.shape), np.float32)
        weight.copy_(torch.from_numpy(0.5 * drawn + around))
    return model


def theirs(family, model):
    """Torch's logits; of a language model without the cache, and with it [2, t, v]."""
    tokens = torch.from_numpy(TOKENS)
    whole = model(tokens).logits.numpy()
    if family in encoder_families.FAMILIES:
        return whole
    (cache,) = {"cache", "past_key_values"} & set(inspect.signature(model.forward).parameters)     # by version
    out = model(tokens[:, :PROMPT], use_cache=True)
    rows = [out.logits[0]]
    for i in range(PROMPT, PROMPT + NEW):
        out = model(tokens[:, i:i + 1], use_cache=True, **{cache: out[cache]})
        rows.append(out.logits[0])
    return np.stack([whole[0], torch.cat(rows).numpy()])


def loop(function, carry, xs):
    """`jax.lax.scan` that compiles nothing for another configuration: each operation is compiled by itself, once."""
    out = []
    for i in range(len(jax.tree.leaves(xs)[0])):
        carry, y = function(carry, jax.tree.map(lambda x, i=i: x[i], xs))
        out.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *out)


def ours(family, folder):
    tokens = jnp.asarray(TOKENS, jnp.int32)
    if family in encoder_families.FAMILIES:
        model = encoder_families.load(str(folder))
        return encoder.forward(model.config, model.params, tokens, jnp.array([tokens.shape[1]]))
    model = weights.load(str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "scan", loop)
        hidden = decoder.forward(model.config, model.params, tokens, jnp.zeros(1, jnp.int32))
    return decoder.logits(model.config, model.params, hidden.last)


def outcome(family, settings, folder, known):
    """What becomes of a folder with this config.json, and what ours is; `known` are our logits by configuration, which
    says all about the weights of `made`."""
    try:
        model = made(family, settings, folder)
        expected = theirs(family, model)
    except Exception:       # transformers' classes raise whatever they run into
        return "torch has no such model", None
    read = (encoder_families if family in encoder_families.FAMILIES else families).read
    try:
        config = read(settings)[0]
        if config not in known:
            model.save_pretrained(folder)
            (folder / "config.json").write_text(json.dumps(settings))
            known[config] = ours(family, folder)
    except ValueError:
        return "refused", None
    assert np.abs(expected).max() > 0.1         # so the tolerance means something
    found = known[config]
    same = found.shape[-2:] == expected.shape[-2:] and np.abs(found - expected).max() < 1e-4
    return "equal" if same else "DIFFERENT", config


def names(family, config):
    """The settings that the family's configuration class declares, and those that torch's code looks for beside."""
    module = inspect.getmodule(auto(family)._model_mapping[type(config)])
    files = [inspect.getsourcefile(part) for part in (module, masking_utils, cache_utils, modeling_rope_utils)]
    asked = {name for file in files for name in re.findall(r"(?:get|has)attr\([\w.]*config, \"(\w+)\"",
                                                           pathlib.Path(file).read_text())}
    return sorted({field.name for field in dataclasses.fields(config)} | asked | set(OTHER_NAMES))


def values(name, now):
    if name in VALUES:
        return VALUES[name]
    if isinstance(now, bool | int | float):
        return [not now if isinstance(now, bool) else now + 1 if isinstance(now, int) else 1.5 * now + 0.1]
    return ["other"]


def ropes(family):
    """What `rope_parameters` may be: each kind, and the settings of kinds where their code is not shared."""
    changed = {"llama": ROPES[-2:], "gemma3_text": ROPES[-1:]}.get(family, [])
    kinds = ROPES + [rope | {name: value} for rope in changed for name, value in ROPE_VALUES.items()]
    nested = GEMMA3["rope_parameters"]
    return [nested | {part: rope} for rope in kinds for part in nested] if family == "gemma3_text" else kinds


def changes(family):
    """Each change of the family's settings, in turn."""
    config = transformers.AutoConfig.for_model(family, **json.loads(json.dumps(SETTINGS[family])))
    for name in names(family, config):
        if name not in MADE_ELSEWHERE:
            for value in values(name, getattr(config, name, None)):
                yield {name: value}
        elif name == "rope_parameters":
            yield from ({name: value} for value in ropes(family))
        elif name == "text_config":
            for change in changes("gemma3_text"):
                if "rope_parameters" not in change:
                    yield {name: SETTINGS[family][name] | change}


@pytest.mark.slow
@pytest.mark.parametrize("family", SETTINGS)
def test_a_changed_setting_changes_what_torch_changes_or_is_refused(family, tmp_path):
    word_pieces().save(str(tmp_path / "tokenizer.json"))
    settings, known = {"model_type": family} | SETTINGS[family], {}
    assert outcome(family, settings, tmp_path, known)[0] == "equal"
    found = [(outcome(family, settings | change, tmp_path, known)[0], change) for change in changes(family)]
    assert [change for kind, change in found if kind == "DIFFERENT"] == []
    counts = Counter(kind for kind, _ in found)
    assert len(known) > 5 and counts["equal"] > 30 and counts["refused"] > 3, (len(known), counts)


KNOWN = frozenset({*families.FAMILIES, *encoder_families.FAMILIES})     # before another test adds one of its own


def test_every_family_is_changed():
    assert set(SETTINGS) == KNOWN


def test_mistral_with_layer_types_has_windows_in_those_layers(tmp_path):
    """Its configuration class has no such field; transformers reads the folder as another family's."""
    (tmp_path / "tokenizer.json").write_text("{}")
    settings = SIZES | LAYERS | dict(model_type="mistral", head_dim=8)
    kind, config = outcome("mistral", settings, tmp_path, {})
    assert kind == "equal" and config.local == (True, False) and config.window == WINDOW
