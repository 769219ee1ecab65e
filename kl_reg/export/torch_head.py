"""A head that kl_reg trained on a frozen language model, for PyTorch: needs torch and transformers, nothing else.

    policy = load("DIR")                               # this folder: head.json, head.safetensors
    logits = policy(tokens, opening)                   # [b, t, v], of the token behind each of tokens [b, t]
    said = policy.generate(prompt, opening=len(prompt))

What the policy says of the next token is softmax(logits / temperature) with

    logits = base logits + U silu(x A + a) C
    x = [n last hidden layers, each through the base's final norm; two of the budget; time]

where U is the base's unembedding, A, a and C are the head, and n is `layers` of head.json. `time` is the part of the
episode that is over: an episode has `length` tokens (head.json) behind its opening, so the first token behind the
opening is written at time 0 and the i-th at (i - 1) / length. The head was trained with this clock; `opening` says when
it starts: the number of tokens of the transcript that were there before the episode began (with the prefix of the
agent's first turn). The two inputs of the budget are constants: zero without a hard budget.
"""
from __future__ import annotations

import hashlib
import json
import pathlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

_CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"     # renamed there


class HeadPolicy(torch.nn.Module):
    """`base` is the frozen model, `settings` are those of head.json."""

    def __init__(self, base: torch.nn.Module, settings: dict):
        super().__init__()
        self.base, self.settings = base, settings
        unembedding = base.get_output_embeddings().weight
        width = unembedding.shape[1]
        self.head = torch.nn.Sequential(OrderedDict(
            hidden=torch.nn.Linear(settings["layers"] * width + 3, settings["hidden"]), act=torch.nn.SiLU(),
            change=torch.nn.Linear(settings["hidden"], width, bias=False))).to(unembedding.device)

    def forward(self, tokens: torch.Tensor, opening: int, cache: DynamicCache | None = None) -> torch.Tensor:
        """Logits [b, t, v], float32, of the token behind each of `tokens` [b, t] (no padding). With a `cache` they
        continue what it holds, and it grows by them."""
        before = 0 if cache is None else cache.get_seq_length()
        out = self.base(input_ids=tokens, use_cache=cache is not None, output_hidden_states=True, **{_CACHE: cache})
        norm, states = self.base.get_submodule(self.settings["norm"]), out.hidden_states
        layers = [*(norm(x) for x in states[-self.settings["layers"]:-1]), states[-1]]      # which went through it
        features = torch.cat(layers, dim=-1).float()
        position = before + 1 + torch.arange(tokens.shape[1], device=tokens.device) - opening
        time = position.clamp(min=0) / self.settings["length"]
        situation = torch.cat([torch.tensor(self.settings["budget"], device=time.device).expand(len(time), 2),
                               time[:, None]], dim=-1)
        change = self.head(torch.cat([features, situation.expand(len(tokens), -1, -1)], dim=-1))
        unembedding = self.base.get_output_embeddings().weight
        return out.logits.float() + torch.nn.functional.linear(change.to(unembedding.dtype), unembedding).float()

    @torch.no_grad()
    def generate(self, prompt: Sequence[int], opening: int, new_tokens: int | None = None, greedy: bool = False,
                 stop: Callable[[list[int]], bool] = lambda said: False,
                 generator: torch.Generator | None = None) -> list[int]:
        """Tokens that the policy writes behind the transcript `prompt`.

        Args:
            opening: how many tokens of the prompt were there before the episode began.
            new_tokens: at most so many; None: up to the end of the episode.
            greedy: the most probable token each time, instead of a draw at the run's temperature.
            stop: asked after each token, with the new ones so far.
            generator: of torch, for the draws.

        Raises:
            ValueError: the episode has no room for that many tokens.
        """
        room = self.settings["length"] - (len(prompt) - opening)
        new_tokens = room if new_tokens is None else new_tokens
        if not 0 < opening <= len(prompt) or new_tokens > room:
            raise ValueError(f"opening={opening}, {len(prompt)} tokens of prompt, {new_tokens} new ones: an episode "
                             f"has {self.settings['length']} tokens behind its opening")
        device = self.base.get_output_embeddings().weight.device
        cache, said, tokens = DynamicCache(config=self.base.config), [], torch.tensor([list(prompt)], device=device)
        while len(said) < new_tokens and not (said and stop(said)):
            logits = self(tokens, opening, cache)[0, -1]
            if greedy:
                chosen = logits.argmax()
            else:
                chosen = torch.multinomial((logits / self.settings["temperature"]).softmax(-1), 1, generator=generator)
            said.append(int(chosen))
            tokens = chosen.reshape(1, 1)
        return said


def load(folder: str | pathlib.Path, base: str | pathlib.Path | None = None, dtype: str | None = None,
         device: str = "cpu") -> HeadPolicy:
    """The policy of an exported folder.

    Args:
        base: a folder that holds the base model, where it is no longer where head.json says.
        dtype: of the base; None: as in training. The head is float32.

    Raises:
        ValueError: the base's weights are not those that the head was trained on.
    """
    folder = pathlib.Path(folder).expanduser()
    settings = json.loads((folder / "head.json").read_text(encoding="utf-8"))
    known, options = settings["base"], {"dtype": dtype or settings["dtype"]}
    if base is None and known["revision"]:
        place, options["revision"] = known["path"], known["revision"]
    else:
        there = known["path"] if base is None else pathlib.Path(base).expanduser().absolute()
        place = folder / there      # known["path"] may be absolute, too
        if _digest(place) != known["digest"].split("-")[0]:
            raise ValueError(f"{place} does not hold the weights that this head was trained on")
    model = AutoModelForCausalLM.from_pretrained(place, **options).to(device).eval()
    policy = HeadPolicy(model.requires_grad_(False), settings)
    policy.head.load_state_dict(load_file(folder / "head.safetensors"))
    return policy


def _digest(folder):
    """SHA-256 of a folder's weights; where they are several files, of their digests."""
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if not files[0].is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index, *(folder / name for name in shards)]
    digests = []
    for file in files:
        with open(file, "rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
