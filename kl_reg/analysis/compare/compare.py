"""Comparisons of two policies, or of all members of a run with one: what `python -m launch.compare` reports."""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kl_reg import storage
from kl_reg.analysis.compare import policies as compared
from kl_reg.analysis.compare.divergence import Writer, meanings, measure, summarise
from kl_reg.analysis.report.conditions import Setting, settings
from kl_reg.envs.environment import Environment
from kl_reg.pretrained import embeddings, folders, tokenizer
from kl_reg.program import replace
from kl_reg.runs import directory as run_directory
from kl_reg.runs import log as run_log
from kl_reg.sampling.agent_step import AgentState
from kl_reg.training import member_groups, scoring
from kl_reg.types import OPENING, PAD, Transcript

_BATCH = 32      # episodes that are sampled and read at a time


def compare(first: str, second: str, on: str | None = None, episodes: int = 128, seed: int | None = None,
            openings: str = "held_out", steps: bool = False) -> dict:
    """What `python -m launch.compare` reports, as docs/compare.md has it; each side is "base", an address or a model.

    Raises:
        ValueError: sides that cannot be compared, or a wrong setting.
        FileNotFoundError: there is no such checkpoint, or the model of a run lacks a file.
    """
    addresses = [run_directory.parse(name) for name in (first, second)]
    moving = next((i for i in (1, 0) if addresses[i]), None)
    on = on or ("held_out" if moving is None else "AB"[moving])
    _check(addresses, moving, on, episodes, seed, openings, steps)
    speaker = {"A": 0, "B": 1, "held_out": moving or 0}[on]
    pair = compared.open_sides((first, second), "run" if on == "held_out" else openings, min(episodes, _BATCH))
    matches = compared.pairs(*pair)
    seed = pair[speaker].config.evaluation.seed if seed is None else seed
    iterations = run_directory.iterations(addresses[moving].workdir) if steps else [None]
    rows, shown, functions = [], None, {}
    pair = [side if steps and i == moving else compared.load(side, addresses[i] and addresses[i].iteration)
            for i, side in enumerate(pair)]
    with run_log.progress_bar("compare", len(iterations) * len(matches)) as bar:
        for iteration in iterations:
            if steps:
                pair[moving] = compared.load(pair[moving], iteration)
            if on == "held_out":
                shown = shown or [held_out(pair[speaker], episodes, seed)] * len(matches)
            elif shown is None or speaker == moving:
                spoken = sample(pair[speaker], episodes, seed)
                shown = [spoken[match[speaker]] for match in matches]
            for match, transcript in zip(matches, shown, strict=True):
                rows.append(_row(pair, match, transcript, seed, speaker, functions))
                bar.step()
    return {"a": _named(pair[0]), "b": _named(pair[1]), "on": on, "openings": None if on == "held_out" else openings,
            "episodes": episodes, "seed": seed, "quantities": meanings(on, _drawn(pair)), "rows": rows}


def _check(addresses, moving, on, episodes, seed, openings, steps):
    """Raises on settings that make no sense together."""
    if on not in ("A", "B", "held_out") or openings not in ("held_out", "run"):
        raise ValueError(f"on={on!r}, openings={openings!r}: choose 'A', 'B' or 'held_out', and 'held_out' or 'run'")
    if episodes < 2:
        raise ValueError(f"--episodes {episodes}: an interval needs two at least")
    if seed is not None and not 0 <= seed < 2**31:
        raise ValueError(f"--seed {seed} must be in [0, 2^31)")
    if openings == "run" and moving is None:
        raise ValueError("--openings run: neither side is a run")
    if steps and moving is None:
        raise ValueError("--steps goes along the checkpoints of a run, and neither side is one")
    if steps and addresses[moving].iteration is not None:
        raise ValueError(f"--steps goes along all checkpoints; leave @{addresses[moving].iteration} out")
    if steps and not run_directory.iterations(addresses[moving].workdir):
        raise FileNotFoundError(f"{addresses[moving].workdir}: there are no checkpoints")


def sample(side: compared.Side, count: int, seed: int) -> dict[int, Transcript]:
    """`count` episodes of each member."""
    shown = {}
    for team in side.teams:
        whole = compared.sample(team, count, seed).transcript
        shown |= {number: jax.tree.map(lambda x, i=i: x[i], whole) for i, number in enumerate(team.numbers)}
    return shown


def held_out(side: compared.Side, count: int, seed: int) -> Transcript:
    """The beginnings of held-out human conversations as episodes of the side's environment, its agent the first
    speaker; `env.length` tokens of each, fewer where the conversation ends.

    Raises:
        ValueError: there are fewer conversations.
    """
    lines = (folders.EMBEDDED / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    if count > len(lines):
        raise ValueError(f"--episodes {count}: there are {len(lines)} held-out conversations")
    env, env_settings, vocabulary = side.teams[0].program.task.env, side.config.env, tokenizer.load(side.model.folder)
    ids = {name: tokenizer.encode(vocabulary, env_settings[name]) for name in ("end", "teacher", "student")}
    opening = tokenizer.opening(vocabulary, compared.special_tokens(vocabulary, env_settings.opening)
                                + env_settings.teacher)
    tokens, lengths = np.zeros((count, len(opening) + env.length), np.int32), np.zeros(count, np.int32)
    tokens[:, :len(opening)] = opening
    for row, line in enumerate(np.random.default_rng(seed).permutation(lines)[:count]):
        written = _conversation(vocabulary, env_settings, ids, json.loads(line)["turns"])[:env.length]
        tokens[row, len(opening):len(opening) + len(written)], lengths[row] = written, len(written)
    embeddings.check(np.unique(tokens).tolist(), side.model.config.vocab, "held-out conversations",
                     str(side.model.folder), vocabulary)
    return _attribute(env, tokens, lengths, len(opening))


def _conversation(vocabulary, env_settings, ids, turns: Sequence[str]) -> list[int]:
    """Tokens behind the first prefix. Terminators stand alone where the environment expects them to."""
    written = []
    for i, turn in enumerate(turns):
        said = f" {turn}" if turn else ""
        if env_settings.markers == "forced":
            written += tokenizer.encode(vocabulary, said + env_settings.end)
        else:
            written += (tokenizer.encode(vocabulary, said) if said else []) + ids["end"]
        written += ids[("student", "teacher")[i % 2]] if i + 1 < len(turns) else []
    return written


def _attribute(env: Environment, tokens, lengths, width):
    """Who wrote each token, by the environment's own account."""
    def step(state, token):
        return env.observe(state, token), (env.turn(state)[0], state.turn)

    _, (roles, turns) = jax.vmap(lambda row: jax.lax.scan(step, env.reset(), row))(jnp.asarray(tokens[:, width:]))
    there = np.arange(env.length) < lengths[:, None]
    behind = np.where(there, roles, PAD).astype(np.int32), np.where(there, turns, -1).astype(np.int32)
    roles, turns = (np.concatenate([np.full((len(tokens), width), value, np.int32), x], axis=1)
                    for value, x in zip((OPENING, -1), behind, strict=True))
    return Transcript(tokens, roles, turns, np.zeros(len(tokens), np.int32))


def _row(pair, match, transcript, seed, speaker, functions):
    """One line of the report: two policies on one set of transcripts."""
    env = pair[speaker].teams[0].program.task.env
    for side in pair:
        if transcript.tokens.shape[1] > side.model.config.max_position:
            raise ValueError(f"transcripts of {transcript.tokens.shape[1]} tokens do not fit into the context of "
                             f"{side.name}, {side.model.config.max_position}")
    places = [side.place(number) for side, number in zip(pair, match, strict=True)]
    teams = [side.teams[team] for side, (team, _) in zip(pair, places, strict=True)]
    programs = tuple(replace(team.program, task=team.program.task._replace(env=env)) for team in teams)
    both = tuple(team for team, _ in places)
    if both not in functions:
        functions[both] = jax.jit(partial(measure, programs))
    writers = tuple(writer_of(team, i) for team, (_, i) in zip(teams, places, strict=True))
    key = compared.keys_of(teams[speaker], seed)[places[speaker][1]]       # which has drawn the transcripts
    numbers = batched(partial(functions[both], writers), transcript, key)
    behind = transcript.tokens.shape[1] - env.length
    return {name: _policy(side, number) for name, side, number in zip("ab", pair, match, strict=True)} | summarise(
        numbers, transcript.roles[:, behind:], transcript.turns[:, behind:])


def _policy(side, number):
    """Which one a row is about."""
    if side.kind != "run":
        return {"member": None, "iteration": None, "setting": side.name, "hyper": {}}
    setting, hyper = setting_of(side.address.workdir, number)
    return {"member": number, "iteration": side.iteration, "setting": setting.label, "hyper": hyper}


def setting_of(workdir: storage.Path, number: int) -> tuple[Setting, dict]:
    """The setting of a member of a run, and the member's own hyperparameters."""
    return next((setting, row["hyper"]) for setting in settings_of(workdir) for row in setting.members
                if row["member"] == number)


def settings_of(workdir: storage.Path) -> list[Setting]:
    """The settings of a run, be it finished or not."""
    config, stored = run_directory.config_of(workdir), storage.read_json(workdir / "config.json")
    rows = [{"member": i, "hyper": hyper} for i, hyper in enumerate(member_groups.hyper_of(config))]
    if "base" not in stored:        # written by hand, or by another program
        return settings(rows, config, "", {i: () for i in range(len(rows))})
    return settings(rows, config, stored["base"], {i: stored["references"][str(i)] for i in range(len(rows))})


def writer_of(team: compared.Team, i: int) -> Writer:
    """A team's i-th member."""
    params, memory, hyper = jax.tree.map(lambda x: x[i], (team.params, team.memory, team.hyper))
    return Writer(AgentState(params, memory, scoring.caps_of(hyper)), team.frozen)


def batched(function: Callable, transcript: Transcript, key: Array) -> np.ndarray:
    """function(transcript, keys) on batches of one size, the last one filled up with the first episodes.

    Args:
        key: of the member that has drawn the episodes (`policies.keys_of`).
    """
    count = len(transcript.start)
    size = min(count, _BATCH)
    parts = []
    for first in range(0, count, size):
        index = np.arange(first, first + size) % count
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(index))
        parts.append(np.asarray(function(jax.tree.map(lambda x, index=index: jnp.asarray(x)[index], transcript), keys)))
    return np.concatenate(parts)[:count]


def _drawn(pair):
    return any(team.program.algorithm.kl.config.drawn for side in pair for team in side.teams)


def _named(side):
    return {"name": side.name, "kind": side.kind, "model": str(side.model.folder)}
