"""What a batch of recorded episodes is worth: its rewards on the agent stream, and its metrics. On the host; of several
processes each asks the reward functions about its own episodes."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from kl_reg import rewards
from kl_reg.algorithms.advantages import leaves_out
from kl_reg.envs.environment import Reply
from kl_reg.episodes.metrics import rates, summarise
from kl_reg.episodes.token_groups import kl_by_group
from kl_reg.program import Program
from kl_reg.rewards import Reward, replies
from kl_reg.runs.fingerprint import name_of
from kl_reg.sharding import multihost
from kl_reg.types import Episodes


class Judges(NamedTuple):
    """`reward` is trained on; `gold`, where there is one, is measured beside it; `state`: how far the training is."""

    reward: Reward
    gold: Reward | None
    state: rewards.TrainerState = rewards.TrainerState()


class Answers(NamedTuple):
    """What the reward functions say of some of a batch's replies: those with these numbers. `logged`: what else they
    logged, by name."""

    numbers: list[int]
    reward: rewards.Scores
    gold: rewards.Scores | None
    logged: dict[str, list[float]]


class Judgement(NamedTuple):
    """What one policy's batch is worth: its turns, their rewards in reward units, and metrics of the reward."""

    turns: list[Reply]
    credit: replies.Credit
    row: dict


def judge(program: Program, judges: Judges, episodes: Episodes) -> Judgement:
    """Reads the turns of a batch [b, ...], asks the reward functions and credits what they say. It looks at what was
    said, not at the record.

    Raises:
        ValueError: a reward function raised, or gave something else than finite numbers.
    """
    return credit(program, episodes, multihost.everywhere(lambda: ask(program, judges, episodes)))


def judge_members(program: Program, judges: Judges, members: Sequence[Episodes]) -> list[Judgement]:
    """`judge` of each member's batch, from which it is to learn. The functions are called in this thread: where that is
    the main one, as it is when `train` is called there, they can set alarms.

    Raises:
        ValueError: as `judge`; or an episode cannot be judged, and the advantage cannot leave it out.
    """
    answers = multihost.everywhere(lambda: [ask(program, judges, own) for own in members])
    judged = [credit(program, *own) for own in zip(members, zip(*answers, strict=True), strict=True)]
    algorithm, known = program.algorithm, all(own.credit.judged.all() for own in judged)
    if algorithm.group > 1 and not leaves_out(algorithm.advantage) and not known:
        raise ValueError(f"rl.advantage={name_of(algorithm.advantage)!r} compares the episodes of a group and takes no "
                         "argument `judged`, so it would count those that no reward function could judge; "
                         "docs/extending.md shows how to leave them out")
    return judged


def ask(program: Program, judges: Judges, episodes: Episodes) -> Answers:
    """Asks about the replies in this process's part of the episodes; groups stay together. Raises as `judge`."""
    rows, group = len(episodes.mask), program.algorithm.group
    count = rows // group if rows % group == 0 else rows
    size, mine = rows // count, multihost.share(count)
    turns = program.task.env.read(episodes.transcript)
    numbers = [i for i, turn in enumerate(turns) if turn.episode // size in mine]
    turns = [turns[i] for i in numbers]
    trainer = rewards.Trainer(judges.state)
    with jax.transfer_guard("allow"):       # a user's function may use the device as it likes
        return Answers(numbers, rewards.score(judges.reward, turns, trainer),
                       rewards.score(judges.gold, turns, trainer) if judges.gold else None, trainer.logged)


def credit(program: Program, episodes: Episodes, answers: Sequence[Answers]) -> Judgement:
    """The judgement of a batch, with the answers of all processes."""
    turns = program.task.env.read(episodes.transcript)
    order = np.argsort(np.concatenate([own.numbers for own in answers]))
    join = lambda *parts: np.concatenate(parts)[order]  # noqa: E731
    scores = jax.tree.map(join, *(own.reward for own in answers))
    credited = replies.credit(turns, scores, episodes.slot, episodes.mask)
    row = rates({"reward/unjudged_rate": _unjudged(turns, scores, len(episodes.mask))})
    if len(scores.parts) > 1:
        row |= {f"reward/{name}": _mean(values) for name, values in scores.parts.items()}
    if answers[0].gold:
        gold = jax.tree.map(join, *(own.gold for own in answers))
        row["gold/return"] = _mean(replies.credit(turns, gold, episodes.slot, episodes.mask).returns)
    logged = [(name, values) for own in answers for name, values in own.logged.items()]
    row |= {f"reward/extra/{name}": float(np.mean(np.concatenate([x for other, x in logged if other == name])))
            for name in dict.fromkeys(name for name, _ in logged)}
    return Judgement(turns, credited, row)


def describe(program: Program, judged: Judgement, episodes: Episodes) -> dict:
    """The metrics of a batch [b, ...] with its record."""
    task, returns = program.task, judged.credit.returns
    return {**summarise(episodes, judged.turns, returns, task.empty_tokens), **kl_by_group(episodes, task.groups),
            **judged.row}


def _unjudged(turns, scores, count):
    """How many replies of each episode no function could judge, and about how many they were asked."""
    asked, judged = (replies.by_episode(turns, chosen, count) for chosen in (scores.asked, scores.judged))
    return asked - judged, asked


def _mean(values):
    """The mean of those that are judged; None without any."""
    said = values[~np.isnan(values)]
    return float(said.mean()) if len(said) else None
