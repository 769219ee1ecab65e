"""Policies as files that other libraries load: a Hugging Face folder, a PEFT adapter, a head with a PyTorch loader."""
from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kl_reg.pretrained import families, folders, hf_config, tokenizer, weight_files, weight_map, weights
from kl_reg.types import Sampling

LOADER = pathlib.Path(__file__).with_name("torch_head.py")
_NO_TEXT = ("config.json", "generation_config.json", "*.safetensors", weight_files.INDEX)
_TOKENIZER = tuple(name for name in folders.HUB_FILES if name not in _NO_TEXT)
_SPECIAL = ("bos", "eos", "pad", "unk")


class Origin(NamedTuple):
    """Where transformers finds a base: a folder (revision None), or a name on the hub with its commit."""

    path: str
    revision: str | None


def unloadable(folder: pathlib.Path) -> str:
    """Why other libraries cannot use the model in `folder` as a base where it lies; "" if they can."""
    if weight_files.weight_files(folder)[0].suffix == ".gguf":
        return "the base's weights are in a GGUF file"
    if folders.settings(folder)["model_type"] == "gemma3":
        return "the base is a Gemma 3 with images, of which only the language model was trained"
    return ""


def origin(path: str, folder: pathlib.Path) -> Origin:
    """Where transformers finds the model that `path` names and that lies in `folder`."""
    if folders.is_hub(path) and not pathlib.Path(path).expanduser().is_dir():
        return Origin(path.partition("@")[0], folder.name)      # the client names a snapshot by its commit
    return Origin(str(folder.resolve()), None)


def settings_of(found: dict) -> dict:
    """A base's config.json as that of its language model, which is all that is read of a Gemma 3 with images; without
    the dtype."""
    if found["model_type"] == "gemma3":
        hf = hf_config.parse(found, families.FAMILIES)
        found = hf.text_config.to_dict() | {"architectures": ["Gemma3ForCausalLM"],
                                            "tie_word_embeddings": bool(hf.tie_word_embeddings)}
    return {key: value for key, value in found.items() if key not in ("dtype", "torch_dtype")}


def as_floats(params: dict) -> dict:
    """Parameters without int8 (`quantize.quantize`): matrices times their scales, float32."""
    flat = flatten_dict(params)
    scales = {(*path[:-1], path[-1].removesuffix("_scale")): flat.pop(path)
              for path in list(flat) if path[-1].endswith("_scale")}
    return unflatten_dict({path: leaf * scales[path][..., None, :] if path in scales else leaf
                           for path, leaf in flat.items()})


def start_of(source: pathlib.Path) -> int | None:
    """The start token of a tokenizer that kl_reg has trained, where the folder declares no special tokens; else None.

    Pretraining joins documents that begin with this token, so that it ends the one before, too.
    """
    settings = folders.settings(source)
    declared = any(settings.get(f"{name}_token_id") is not None for name in _SPECIAL)
    if declared or (source / "tokenizer_config.json").is_file():
        return None
    return tokenizer.load(source).token_to_id(tokenizer.START)


def copy_tokenizer(source: pathlib.Path, folder: pathlib.Path) -> None:
    """The tokenizer's files and the chat template, so that transformers' AutoTokenizer finds them in `folder`; with the
    special tokens that `start_of` knows and no file declares."""
    for name in _TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (folder / "tokenizer_config.json").is_file() and (folder / "tokenizer.json").is_file():
        names = _SPECIAL if start_of(source) is not None else ()
        _write(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            **{f"{name}_token": tokenizer.START for name in names}})


def model(folder: pathlib.Path, source: pathlib.Path, params: dict, dtype: str, sampling: Sampling | None) -> None:
    """A folder that transformers loads: weights, config.json, tokenizer and, of the base's generation_config.json, its
    special tokens; the way of drawing is the run's.

    Args:
        source: the folder of the base.
        params: as `weights.load` gives them.
        sampling: its temperature is recorded, its truncations, which ask the reference, are not; None: as `source` has
            it all.
    """
    start = start_of(source)
    special = {} if start is None else {f"{name}_token_id": start for name in ("bos", "eos", "pad")}
    weights.save(folder, settings_of(folders.settings(source)) | special, params, dtype)
    copy_tokenizer(source, folder)
    file = source / "generation_config.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else special
    if sampling is not None:
        known = {key: value for key, value in known.items() if key.endswith("_token_id")}
        known |= drawing(sampling)
    if known:
        _write(folder / "generation_config.json", known)


def drawing(sampling: Sampling) -> dict:
    """What `generate` of transformers is to be told: without `top_k` it would keep 50 tokens."""
    return {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}


def adapted(source: pathlib.Path, names: Iterable[str]) -> dict[str, weight_map.Rule]:
    """The tensor of the checkpoint in `source` that each adapted matrix is.

    Raises:
        ValueError: it holds one of them in one tensor with others, which has no LoRA of its own.
    """
    found = settings_of(folders.settings(source))
    config, family = families.read(found)
    rules = {path: rule for rule in family.rules(config) for path in rule.ours}
    rules = {name: rules[f"layers/{name}/kernel"] for name in names}
    fused = {rule.theirs.removesuffix(".weight"): rule.ours for rule in rules.values() if len(rule.ours) > 1}
    if fused:
        text = "; ".join(f"{key} holds {', '.join(path.split('/')[1] for path in paths)}"
                         for key, paths in fused.items())
        raise ValueError(f"--adapter: {found['model_type']} keeps several adapted matrices in one ({text}), so they "
                         "have no adapter of their own; merge it (without --adapter)")
    return rules


def adapter(folder: pathlib.Path, source: pathlib.Path, base: Origin, low: dict, rank: int, alpha: float,
            dtype: str) -> None:
    """The folder of a PEFT adapter.

    Args:
        source: the folder of the base.
        low: {"query": {"a": [layers, d, r], "b": [layers, r, o]}, ...}.
        alpha: changes are multiplied by alpha / rank.

    Raises:
        ValueError: see `adapted`.
    """
    tensors, modules = {}, []
    for name, rule in adapted(source, low).items():
        key = rule.theirs.removesuffix(".weight")
        modules.append(key.partition("{i}.")[2])
        for i, (a, b) in enumerate(zip(low[name]["a"], low[name]["b"], strict=True)):
            for side, value in (("A", a), ("B", b)):
                tensors[f"base_model.model.{key.format(i=i)}.lora_{side}.weight"] = jnp.asarray(value.T, dtype)
    weights.save_tensors(tensors, folder / "adapter_model.safetensors")
    _write(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base.path, "revision": base.revision,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": modules,
        "fan_in_fan_out": folders.settings(source)["model_type"] == "gpt2",        # whose matrices are [in, out]
        "inference_mode": True})


def head(folder: pathlib.Path, source: pathlib.Path, actor: dict, settings: dict) -> None:
    """head.safetensors, head.json, the loader and the tokenizer.

    Args:
        source: the folder of the base.
        actor: parameters of `actor.Actor`.
        settings: what head.json says beside the name of the norm and the size of the head.
    """
    config, family = families.read(settings_of(folders.settings(source)))
    (norm,) = (rule.theirs for rule in family.rules(config) if rule.ours == ("norm/scale",))
    tensors = {"hidden.weight": actor["hidden"]["kernel"].T, "hidden.bias": actor["hidden"]["bias"],
               "change.weight": actor["change"]["kernel"].T}
    weights.save_tensors({key: jnp.asarray(value, jnp.float32) for key, value in tensors.items()},
                         folder / "head.safetensors")
    _write(folder / "head.json", settings | {"norm": norm.removesuffix(".weight"),
                                             "hidden": int(np.size(actor["hidden"]["bias"]))})
    shutil.copyfile(LOADER, folder / "head_policy.py")
    copy_tokenizer(source, folder)


def _write(file, content):
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
