"""config.json as transformers reads it: its configuration classes know every family's defaults and old spellings."""
from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Collection, Iterator

from huggingface_hub.errors import StrictDataclassError

from kl_reg.models.layers import ACTIVATIONS


def parse(settings: dict, known: Collection[str]):
    """transformers' configuration object for these settings.

    Raises:
        ValueError: model_type is missing or none of `known`, or the checkpoint is quantised.
    """
    if "model_type" not in settings:
        raise ValueError(f"lacks model_type; known: {', '.join(sorted(known))}")
    name = settings["model_type"]
    if name not in known:
        raise ValueError(f"model_type {name!r} is not supported; known: {', '.join(sorted(known))}")
    if settings.get("quantization_config"):
        raise ValueError(f"quantization_config {settings['quantization_config']} is not supported; model.quantize "
                         "quantises a model as it is loaded")
    from transformers import AutoConfig  # takes seconds

    return AutoConfig.for_model(**settings)


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
