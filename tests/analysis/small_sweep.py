"""What a small sweep wrote: numbers that are known."""
from __future__ import annotations

import numpy as np

from kl_reg.pretrained import tokenizer
from kl_reg.types import AGENT, FORCED, OPENING, PAD, STUDENT

ATTACK = "<script>alert(1)</script> \" onmouseover='x' &"
LINES = ((OPENING, -1, "<|start|>"), (FORCED, 0, "A:"), (AGENT, 0, f" {ATTACK}\n"), (FORCED, 1, "B:"),
         (STUDENT, 1, f" hello {ATTACK}\n"), (FORCED, 2, "A:"), (AGENT, 2, "\n"))


def final(episode_return, kl, error=0.1):
    keys = {"return": episode_return, "kl/nats_per_episode": kl, "teacher/silent_rate": 0.25,
            "student/silent_rate": None, "replies": 3.0}
    return {**keys, **{f"{key}_se": None if value is None else error for key, value in keys.items()},
            "kl/nats_per_token": kl / 10, "episodes": 3}


def row(member, coef, budget, seed, episode_return, kl, **others):
    return {"member": member, "hyper": {"kl.coef": coef, "kl.budget": budget, "seed": seed, **others},
            "final": final(episode_return, kl), "best": {"iteration": 1, "return": 9.75, "kl/nats_per_episode": kl}}


def summary():
    """Two seeds at coefficient 0 and one at 1, and a budget with two seeds; the base last."""
    return [row(0, 0.0, None, 0, 2.0, 8.0), row(1, 1.0, None, 0, 1.2, 0.5), row(2, 0.0, None, 1, 3.0, 6.0),
            row(3, 0.0, 5.0, 0, 1.5, 2.0), row(4, 0.0, 5.0, 1, 1.7, 4.0),
            {"member": "base", "hyper": {}, "final": final(1.0, 0.0, 0.05)}]


def arrays(folder, nats):
    """Three equal episodes, each agent token `nats`; one slot of left padding and two of right padding."""
    loaded = tokenizer.load(folder)
    slots = [(token, role, turn, nats * (role == AGENT))
             for role, turn, text in LINES for token in tokenizer.encode(loaded, text)]
    slots = [(0, PAD, -1, 0.0), *slots, (0, PAD, -1, 0.0), (0, PAD, -1, 0.0)]
    tokens, roles, turns, kl = (np.tile(np.array(x), (3, 1)) for x in zip(*slots, strict=True))
    return {"tokens": tokens.astype(np.int32), "roles": roles.astype(np.int8), "turns": turns.astype(np.int32),
            "kl": kl.astype(np.float32), "returns": np.array([1.0, 2.0, 3.0], np.float32)}
