"""What a text classifier says of each completion, on the device."""
from __future__ import annotations

import dataclasses
import hashlib
from functools import partial

import jax
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from kl_reg.models import encoder
from kl_reg.pretrained import embeddings
from kl_reg.pretrained.encoder_families import Classifier, load, load_config
from kl_reg.rewards.buckets import batches
from kl_reg.rewards.chat import texts

SST2 = "distilbert/distilbert-base-uncased-finetuned-sst-2-english"
"""The classifier of the paper, DistilBERT on the Stanford Sentiment Treebank: what `reward.path=""` means."""

_REMEMBERED = 65536     # texts


@dataclasses.dataclass(frozen=True, eq=False)
class ClassifierReward:
    """The probability of label number `output`, or what a regression says; a reward function.

    With `signed` it is (s p + 1) / 2, p the probability of the most probable label and s = 1 where that is `output`,
    else -1: as the paper's authors have it, so that with two labels nothing is worth between 0.25 and 0.75.

    A text's own length decides the shape of its batch, which is padded up: so few programs are compiled, and a score
    does not depend, to the last bit, on what else is scored (a resumed run has forgotten its `memory`). In `memory` are
    the scores of the last texts: a trained policy hears the same replies again and again.
    """

    model: Classifier
    output: int
    memory: dict[str, float] = dataclasses.field(default_factory=dict)
    signed: bool = False

    def __call__(self, completions: list, **columns) -> list[float]:
        """The reward of each completion; an empty one is scored as the text it is.

        Raises:
            ValueError: a text has a token for which the model has no embedding.
        """
        said = texts(completions)
        new = [text for text in dict.fromkeys(said) if text not in self.memory]
        self.memory.update(zip(new, self._score(new), strict=True))
        rewards = [self.memory[text] for text in said]
        for text in list(self.memory)[:-_REMEMBERED]:
            del self.memory[text]
        return rewards

    def _score(self, new):
        config, params, tokenizer = self.model
        rows = [encoding.ids for encoding in tokenizer.encode_batch(new)]
        for row in rows:
            embeddings.check(row, config.vocab, "a text that the reward is asked of", "the classifier", tokenizer)
        parts = [(part, _probabilities(config, params, *jax.device_put(_pad([rows[i] for i in part], *shape))))
                 for part, shape in batches([len(row) for row in rows], config.max_length)]
        scores = np.empty(len(new), np.float32)
        for part, said in parts:        # all batches are under way by now
            scores[part] = self._worth(jax.device_get(said)[:len(part)])
        return scores.tolist()

    def _worth(self, said):
        if not self.signed:
            return said[:, self.output]
        return (np.where(said.argmax(1) == self.output, 1, -1) * said.max(1) + 1) / 2

    def digest(self) -> str:
        """SHA-256 of everything that a score depends on: weights, settings, tokenizer and label."""
        config, params, tokenizer = self.model
        digest = hashlib.sha256(f"{config}\n{self.output}\n{tokenizer.to_str()}{self.signed or ''}".encode())
        for path, leaf in tree_leaves_with_path(params):
            digest.update(keystr(path).encode() + np.asarray(leaf).tobytes())
        return digest.hexdigest()


SCALES = ("probability", "signed_confidence")
"""Choices of `reward.scale`; "" is the first."""


def classifier(path: str, label: str = "", scale: str = "", dtype: str = "float32") -> ClassifierReward:
    """The classifier in `path` as a reward function; with DistilBERT on SST-2 it is the paper's.

    Args:
        path: a folder or a hub name, anything that `folders.find` knows; "": SST2.
        label: one of the model's labels, in any case; see `output_of` for "".
        scale: one of SCALES.
        dtype: of parameters and activations.

    Raises:
        FileNotFoundError, ValueError: as `encoder_families.load` and `output_of` do.
    """
    path = path or SST2
    model = load(path, dtype)
    _check_scale(scale, model.config.labels, path)
    return ClassifierReward(model, output_of(model.config.labels, label, path), signed=scale == "signed_confidence")


def check(path: str, label: str = "", scale: str = "") -> None:
    """Whether `path` has a classifier with that label, without reading its weights.

    Raises:
        FileNotFoundError, ValueError: as `encoder_families.load_config` and `output_of` do.
    """
    path = path or SST2
    labels = load_config(path).labels
    output_of(labels, label, path)
    _check_scale(scale, labels, path)


def _check_scale(scale, labels, path):
    if scale not in ("", *SCALES):
        raise ValueError(f"reward.scale={scale!r} with reward.name='classifier': choose of {', '.join(SCALES)}")
    if scale == "signed_confidence" and len(labels) < 2:
        raise ValueError(f"reward.scale={scale!r} with reward.path={path!r}: a regression has no confidence; choose "
                         "'probability'")


def output_of(labels: tuple[str, ...], label: str, path: str) -> int:
    """The number of a label; of "" the one called "positive", else the only one, else the second of two.

    Raises:
        ValueError: there is no such label, or none of those; lists the labels.
    """
    names = [name.lower() for name in labels]
    wanted = label.lower() or "positive"
    if wanted in names:
        return names.index(wanted)
    if label or len(labels) > 2:
        raise ValueError(f"reward.label={label!r} with reward.path={path!r}: choose one of {', '.join(labels)}")
    return len(labels) - 1


@partial(jax.jit, static_argnums=0)
def _probabilities(config, params, tokens, length):
    return encoder.probabilities(config, encoder.forward(config, params, tokens, length))


def _pad(rows, count, size):
    tokens, length = np.zeros((count, size), np.int32), np.zeros(count, np.int32)
    for i, row in enumerate(rows):
        tokens[i, :len(row)], length[i] = row, len(row)
    return tokens, length
