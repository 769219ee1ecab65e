"""What a text classifier says of each completion, on the device."""
from __future__ import annotations

import dataclasses
import hashlib
from functools import partial

import jax
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from kl_reg.models import encoder
from kl_reg.models.encoder_families import Classifier, load

_SHORTEST = 16          # tokens of the shortest bucket; the others are twice as long each
_BATCH = 512            # tokens of a batch
_REMEMBERED = 65536     # texts


@dataclasses.dataclass(frozen=True, eq=False)
class ClassifierReward:
    """The probability of label number `output`, or what a regression says; a reward function.

    A text's own length decides the shape of its batch, which is padded up: so few programs are compiled, and a score
    does not depend, to the last bit, on what else is scored (a resumed run has forgotten its `memory`). In `memory` are
    the scores of the last texts: a trained policy hears the same replies again and again.
    """

    model: Classifier
    output: int
    memory: dict[str, float] = dataclasses.field(default_factory=dict)

    def __call__(self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns
                 ) -> list[float]:
        """The reward of each completion; an empty one is scored as the text it is."""
        del prompts, completion_ids, columns
        texts = [text for text in dict.fromkeys(completions) if text not in self.memory]
        self.memory.update(zip(texts, self._score(texts), strict=True))
        rewards = [self.memory[text] for text in completions]
        for text in list(self.memory)[:-_REMEMBERED]:
            del self.memory[text]
        return rewards

    def _score(self, texts):
        config, params, tokenizer = self.model
        rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        parts = [(part, _probabilities(config, params, *jax.device_put(_pad([rows[i] for i in part], *shape))))
                 for part, shape in _batches([len(row) for row in rows], config.max_length)]
        scores = np.empty(len(texts), np.float32)
        for part, said in parts:        # all batches are under way by now
            scores[part] = jax.device_get(said)[:len(part), self.output]
        return scores.tolist()

    def digest(self) -> str:
        """SHA-256 of everything that a score depends on: weights, settings, tokenizer and label."""
        config, params, tokenizer = self.model
        digest = hashlib.sha256(f"{config}\n{self.output}\n{tokenizer.to_str()}".encode())
        for path, leaf in tree_leaves_with_path(params):
            digest.update(keystr(path).encode() + np.asarray(leaf).tobytes())
        return digest.hexdigest()


def classifier(path: str, label: str = "", dtype: str = "float32") -> ClassifierReward:
    """The classifier in `path` as a reward function; with DistilBERT on SST-2 it is the paper's.

    Args:
        path: a folder or a hub name, anything that `folders.find` knows.
        label: one of the model's labels, in any case; see `output_of` for "".
        dtype: of parameters and activations.

    Raises:
        FileNotFoundError, ValueError: as `encoder_families.load` and `output_of` do.
    """
    model = load(path, dtype)
    return ClassifierReward(model, output_of(model.config.labels, label, path))


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


def _batches(lengths, longest):
    """(which rows, (number of rows, length) to pad them to), for rows of these lengths."""
    buckets = {}
    for row, length in enumerate(lengths):
        size = min(max(_SHORTEST, 1 << (length - 1).bit_length()), longest)
        buckets.setdefault(size, []).append(row)
    for size, rows in sorted(buckets.items()):
        count = max(_BATCH // size, 1)
        for first in range(0, len(rows), count):
            yield rows[first:first + count], (count, size)


def _pad(rows, count, size):
    tokens, length = np.zeros((count, size), np.int32), np.zeros(count, np.int32)
    for i, row in enumerate(rows):
        tokens[i, :len(row)], length[i] = row, len(row)
    return tokens, length
