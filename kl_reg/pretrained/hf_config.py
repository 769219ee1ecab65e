"""config.json as transformers reads it: its configuration classes know every family's defaults and old spellings."""
from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import pathlib
import tempfile
from collections.abc import Collection, Iterator

from huggingface_hub.errors import StrictDataclassError

from kl_reg.models.layers import ACTIVATIONS

_NEUTRAL = {"is_causal": (True,), "attention_chunk_size": (None,), "kv_sharing_modes": (None,),
            "per_layer_config": (None, {}), "quantization_config": (None, {}), "compression_config": (None, {}),
            "configuration_files": (None, []), "transformers_weights": (None, "model.safetensors")}
"""Settings that transformers obeys in every family and the decoder in none, with the values that change nothing."""


def check_family(settings: dict, known: Collection[str]) -> None:
    """Refuses a model of a family that is not one of `known`.

    Raises:
        ValueError: model_type is missing, or names another family; the message names the nearest one.
    """
    if "model_type" not in settings:
        raise ValueError(f"lacks model_type; known: {', '.join(sorted(known))}")
    if settings["model_type"] not in known:
        raise ValueError(unsupported("model_type", settings["model_type"], known))


def unsupported(setting: str, name: object, known: Collection[str]) -> str:
    """What is said of a family of models that is not supported; the nearest one is the first, where no name is like
    it."""
    nearest = [*difflib.get_close_matches(str(name), known, 1, 0.5), *known][0]
    return (f"{setting} {name!r} is not supported; the nearest supported family is {nearest!r}, and docs/models.md "
            f"says how to add another (supported: {', '.join(sorted(known))})")


def parse(settings: dict, known: Collection[str]):
    """transformers' configuration object for these settings, as its `AutoConfig` reads a folder with this config.json.
    No code that a checkpoint brings is run.

    Raises:
        ValueError: model_type is missing or none of `known`, the checkpoint is quantised, or a setting changes the
            model in a way that is not implemented.
    """
    check_family(settings, known)
    for part in ("", "text_config"):
        for name, value in (settings.get(part) or {} if part else settings).items():
            if value not in _NEUTRAL.get(name, (value,)):
                hint = "; model.quantize quantises a model as it is loaded" * (name == "quantization_config")
                raise ValueError(f"{part}{'.' * bool(part)}{name}={value!r} is not supported{hint}")
    from transformers import AutoConfig  # takes seconds

    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        hf = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    check_family({"model_type": hf.model_type}, known)      # it may read one family's settings as those of another
    _check_windows(hf, settings)
    return hf


def _check_windows(hf, settings):
    """The cache of torch's models obeys these two even in families that do not have them, and whose masks do not."""
    declared = {field.name for field in dataclasses.fields(hf)}
    kinds, window = settings.get("layer_types") or (), settings.get("sliding_window")
    if "layer_types" not in declared and set(kinds) - {"full_attention"}:
        raise ValueError(f"layer_types={kinds!r} is not supported with model_type {hf.model_type!r}, which knows "
                         "full_attention alone")
    if not {"sliding_window", "text_config"} & declared and (window or math.inf) < hf.max_position_embeddings:
        raise ValueError(f"sliding_window={window!r} is not supported with model_type {hf.model_type!r}, which has no "
                         "windows")


def activation(hf, field: str) -> str:
    """The activation that a configuration object has in this field.

    Raises:
        ValueError: it is not supported.
    """
    name = getattr(hf, field)
    if name not in ACTIVATIONS:
        raise ValueError(f"{field} {name!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    return name


@contextlib.contextmanager
def errors_of(folder: pathlib.Path) -> Iterator[None]:
    """What is wrong with a configuration inside becomes one ValueError that names the folder's config.json."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    except KeyError as error:       # whose text is quoted; transformers words its own
        raise ValueError(f"{folder / 'config.json'}: {error.args[0]}") from None
