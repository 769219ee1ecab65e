"""How probable a language model finds each completion, on the device."""
from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from kl_reg.models import decoder
from kl_reg.pretrained import embeddings, folders, tokenizer, weights
from kl_reg.rewards.buckets import batches
from kl_reg.rewards.chat import texts


@dataclasses.dataclass(frozen=True, eq=False)
class LogLikelihood:
    """The mean log-probability, nats per token, of a completion given its prompt; a reward function.

    Both are read by the model's own tokenizer, a chat by its chat template. Spaces at a prompt's end belong to the
    completion's first word. One is put between a colon and a letter or digit, since a reply's text comes without the
    space behind its speaker's prefix. What does not fit the context is cut from the prompt's beginning.
    """

    model: weights.Model
    words: Tokenizer

    def __call__(self, prompts: list, completions: list, **columns) -> list[float | None]:
        """The reward of each completion; None of an empty one, and of one token with nothing before it.

        Raises:
            ValueError: a completion is longer than the model's context, a text has a token without an embedding, or
                there is a chat and no chat template.
        """
        rows = [self._row(*pair) for pair in zip(prompts, texts(completions), strict=True)]
        rows = {i: row for i, row in enumerate(rows) if row[1]}
        scores = np.empty(len(rows), np.float32)
        for part, said in self._score(list(rows.values())):
            scores[part] = jax.device_get(said)[:len(part)]
        known = dict(zip(rows, scores.tolist(), strict=True))
        return [known.get(i) for i in range(len(prompts))]

    def _row(self, prompt, text):
        """Tokens, and how many of the last of them are scored."""
        if isinstance(prompt, str):
            head = prompt.rstrip(" ")
            gap = prompt[len(head):] or " " * (head.endswith(":") and text[:1].isalnum())
            before, text = tokenizer.opening(self.words, head), gap * bool(text) + text
        else:
            before = tokenizer.chat(self.words, prompt)
        said, longest = tokenizer.encode(self.words, text), self.model.config.max_position
        if len(said) >= longest:
            raise ValueError(f"a completion has {len(said)} tokens; the model in {self.model.folder} has a context of "
                             f"{longest}, and a token of the prompt must fit, too")
        ids = (before + said)[-longest:]
        embeddings.check(ids, self.model.config.vocab, "a text that the reward is asked of", str(self.model.folder),
                         self.words)
        return ids, min(len(said), max(len(ids) - 1, 0))    # of the first token of all there is no probability

    def _score(self, rows):
        config, params, _ = self.model
        return [(part, _means(config, params, *jax.device_put(_pad([rows[i] for i in part], *shape))))
                for part, shape in batches([len(ids) for ids, _ in rows], config.max_position)]

    def digest(self) -> str:
        """SHA-256 of weights, tokenizer and config.json."""
        return folders.digest(self.model.folder)


def log_likelihood(path: str) -> LogLikelihood:
    """The model in `path` (anything that `folders.find` knows) as a reward function.

    Raises:
        FileNotFoundError, ValueError: as `check` and `weights.load` do.
    """
    check(path)
    model = weights.load(str(folders.find(path, "reward.path")))
    return LogLikelihood(model, tokenizer.load(model.folder))


def check(path: str) -> None:
    """Whether `path` has a model that scores text, without reading its weights.

    Raises:
        FileNotFoundError: there is none, or a file is missing.
        ValueError: an unknown family, or a setting that is not supported.
    """
    if not path:
        raise ValueError("reward.path='' with reward.name='log_likelihood': give the folder or hub name of a language "
                         "model")
    tokenizer.load(folders.find(path, "reward.path"))


@partial(jax.jit, static_argnums=0)
def _means(config, params, tokens, start, first):
    """Mean log-probability [b] of the tokens [b, t] from slot `first` on. Logits are made a row at a time: all at once
    they would be [b, t, v]."""
    def mean(row):
        hidden, tokens, first = row
        log_probs = jax.nn.log_softmax(decoder.logits(config, params, hidden[:-1]))
        said = jnp.take_along_axis(log_probs, tokens[1:, None], axis=1)[:, 0]
        scored = jnp.arange(1, len(tokens)) >= first
        return jnp.where(scored, said, 0.0).sum() / scored.sum()

    return jax.lax.map(mean, (decoder.forward(config, params, tokens, start).last, tokens, first))


def _pad(rows, count, size):
    """Tokens [count, size], padded on the left, where each row starts, and where its scored tokens do."""
    tokens, start, first = np.zeros((count, size), np.int32), np.zeros(count, np.int32), np.zeros(count, np.int32)
    for i, (ids, scored) in enumerate(rows):
        tokens[i, size - len(ids):], start[i], first[i] = ids, size - len(ids), size - scored
    return tokens, start, first
