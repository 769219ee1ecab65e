"""The work of `benchmarks.rl_step`, the same for every trainer: a model folder, prompts, settings; and its FLOPs."""
from __future__ import annotations

import pathlib
from typing import NamedTuple

import jax
from tokenizers import Tokenizer

from kl_reg.export import huggingface
from kl_reg.models import decoder
from kl_reg.models.decoder import DecoderConfig
from kl_reg.models.layers import Rope
from kl_reg.pretrained import families, folders, weights
from kl_reg.pretrained import tokenizer as text

TOKENIZER = "smollm2"
TINY = DecoderConfig(vocab=49152, width=192, layers=4, heads=3, kv_heads=1, head_width=64, mlp_width=512,
                     max_position=2048, rope=Rope(10000.0, 64))
SMOLLM2 = DecoderConfig(vocab=49152, width=576, layers=30, heads=9, kv_heads=3, head_width=64, mlp_width=1536,
                        max_position=8192, rope=Rope(100000.0, 64))
MINIATURE = DecoderConfig(vocab=2048, width=32, layers=3, heads=2, kv_heads=1, head_width=16, mlp_width=64,
                          max_position=512, rope=Rope(10000.0, 16))
RANDOM = {"tiny": TINY, "shapes": SMOLLM2, "miniature": MINIATURE}
"""Models of random weights, for time and memory alone. The last two need nothing that is fetched: one is of SmolLM2's
shapes, the other for rehearsals."""

_TEXT = ("The harbour lay quiet under the first snow of the year, and the two sisters who kept the lighthouse were "
         "still arguing about which of them had left the door open during the storm of the night before. A good recipe "
         "for bread begins with patience: flour, water, salt and a little yeast are mixed in the evening, and nobody "
         "touches the bowl again until the kitchen smells of it on the next morning.")


class Work(NamedTuple):
    """One step: `sequences` of `prompt` + `generated` tokens, `group` of them on the same prompt."""

    sequences: int
    prompt: int
    generated: int
    group: int

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.sequences * (self.prompt + self.generated)


WORK = {"smollm2": Work(16, 26, 32, 8), "tiny": Work(64, 26, 64, 8), "shapes": Work(16, 26, 32, 8),
        "miniature": Work(4, 6, 2, 2)}


def write_model(name: str, folder: pathlib.Path) -> DecoderConfig:
    """Writes the model as float32 safetensors with its tokenizer, and no end of sequence, so that nobody stops early.

    Raises:
        FileNotFoundError: SmolLM2 was not fetched, whose tokenizer "tiny" has, too; others have the embedded model's.
    """
    source = folders.find(TOKENIZER if name in ("smollm2", "tiny") else "embedded")
    if name in RANDOM:
        settings, params = families.llama_settings(RANDOM[name]), decoder.init(RANDOM[name], jax.random.key(0))
    else:
        settings, params = huggingface.settings_of(folders.settings(source)), weights.load(name).params
    no_ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    weights.save(folder, settings | no_ends, params, "float32")
    huggingface.copy_tokenizer(source, folder)
    return weights.load_config(str(folder))


def prompts(tokenizer: Tokenizer, count: int, number: int = 2) -> list[str]:
    """`number` prompts of `count` tokens, parts of one text that come back from the tokenizer as they are.

    Raises:
        ValueError: the text has fewer of them.
    """
    ids, found = text.opening(tokenizer, _TEXT), []
    for begin in range(len(ids) - count + 1):
        said = text.decode(tokenizer, ids[begin:begin + count])
        if said.strip() and len(text.opening(tokenizer, said)) == count:
            found.append(said)
    if len(found) < number:
        raise ValueError(f"--prompt={count}: the text of {len(ids)} tokens has {len(found)} such prompts, not "
                         f"{number}; choose fewer tokens")
    return [found[i * len(found) // number] for i in range(number)]


def settings_of(work: Work, model: pathlib.Path, scratch: pathlib.Path, vocabulary: int, said: list[str]) -> dict:
    """What a trainer is told, for JSON. `scratch` is room for its files; the reward of a completion is the mean of its
    token ids over `vocabulary`; it runs where JAX does here."""
    return {**work._asdict(), "model": str(model), "scratch": str(scratch), "prompts": said, "vocabulary": vocabulary,
            "kl_coef": 0.04, "learning_rate": 1e-5, "backend": jax.default_backend()}


def flops(shapes: DecoderConfig, work: Work, policy: str, read: int = 3, hidden: int = 128) -> dict[str, int]:
    r"""Floating-point operations of matrix products that a step needs at least, however a trainer goes about it.

    A multiply-add is two. All but a sequence's last token pass the layers, each attending to itself and what is before
    it; generated tokens are unembedded. Policy "full": once each to sample and for the reference, three times for the
    update (a backward pass is two forward ones). Policy "head": one pass of the layers serves sampling, reference and
    update; base and change are unembedded, and the update repeats the change's part, without a gradient for the
    unembedding. Prompts that a group shares count for each sequence.

    Args:
        read, hidden: `policy.layers` and `policy.hidden` of a head.
    """
    read_tokens, heads = work.prompt + work.generated - 1, shapes.heads * shapes.head_width
    keys = shapes.kv_heads * shapes.head_width
    matrices = shapes.width * (2 * heads + 2 * keys + 3 * shapes.mlp_width)
    pairs = read_tokens * (read_tokens + 1) // 2
    layers = shapes.layers * (2 * matrices * read_tokens + 4 * heads * pairs)
    unembed = 2 * shapes.width * shapes.vocab * work.generated
    change = 2 * ((read * shapes.width + 3) * hidden + hidden * shapes.width) * work.generated
    full = {"rollout": layers + unembed, "reference": layers + unembed, "update": 3 * (layers + unembed)}
    head = {"rollout": layers + unembed + change, "reference": unembed, "update": 2 * unembed + 3 * change}
    return {phase: count * work.sequences for phase, count in {"full": full, "head": head}[policy].items()}
