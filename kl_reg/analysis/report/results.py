"""What a sweep left in its directory, read and checked."""
from __future__ import annotations

import io
import json
import pathlib
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from kl_reg import storage
from kl_reg.analysis.report.conditions import Setting, settings
from kl_reg.analysis.report.figures import CURVES
from kl_reg.pretrained import folders
from kl_reg.runs import directory as run_directory

FINAL = ("return", "return_se", "kl/nats_per_episode", "kl/nats_per_episode_se", "kl/nats_per_token",
         "teacher/silent_rate", "teacher/silent_rate_se", "student/silent_rate", "student/silent_rate_se",
         "replies", "replies_se", "episodes")
CURVE = ("iteration", *(key for key, _ in CURVES))
ARRAYS = ("tokens", "roles", "turns", "kl", "returns")
SEEDS = "seeds"
"""The array of evaluation.npz that says whose random numbers each episode was drawn with; earlier versions, in which
all members had the same, did not write it."""


class Sweep(NamedTuple):
    """A sweep's directory. `curves` and `evaluations` are by member; "base" has an evaluation only."""

    config: ConfigDict                  # settings that the file lacks at their defaults
    fingerprint: str
    fingerprinted: bool                 # whether the run recorded which weights KL is measured to
    base: dict                          # the base model's row of the summary
    settings: list[Setting]             # with the other rows
    curves: dict[int, list[dict]]
    evaluations: dict[int | str, dict[str, np.ndarray]]
    human: tuple[int, int] | None       # empty turns among the held-out human turns
    folder: pathlib.Path                # of the model, for its tokenizer
    start: dict | None                  # the run from whose final state it started, as `runs.lineage` records it

    @property
    def independent(self) -> bool:
        """True if different seeds were evaluated on different random numbers."""
        return SEEDS in self.evaluations["base"]

    def base_returns(self) -> dict[int, np.ndarray]:
        """The base's returns [e] on the random numbers of each member's seed."""
        base, seeds = self.evaluations["base"], {m["hyper"]["seed"] for s in self.settings for m in s.members}
        return {seed: base["returns"][base[SEEDS] == seed] if self.independent else base["returns"] for seed in seeds}


def read(workdir: storage.Path) -> Sweep:
    """Reads and checks what a sweep wrote.

    Raises:
        FileNotFoundError: a file is missing (named, with what writes it).
        ValueError: a file does not hold what it should (named, with what was expected).
    """
    file = workdir / "config.json"
    stored, summary = _json(file), _json(workdir / "summary.json")
    _need(file, stored, ("config", "fingerprint"))
    _need(file, stored["config"], ("model", "env", "reward", "kl"))
    config = run_directory.config_of(workdir)
    _check(workdir / "summary.json", summary)
    members = {row["member"]: row for row in summary if row["member"] != "base"}
    base, references = _digests(file, stored, members)
    folder = folders.find(config.model.path)
    return Sweep(config, stored["fingerprint"], bool(base), next(row for row in summary if row["member"] == "base"),
                 settings(list(members.values()), config, base, references),
                 {i: _lines(workdir / f"members/{i}/metrics.jsonl") for i in members},
                 {i: _arrays(workdir / f"members/{i}/evaluation.npz") for i in (*members, "base")},
                 _human(config, folder), folder, stored.get("from"))


def _digests(file, stored, members):
    """Of the base and of each member's reference; older runs did not record them."""
    if "base" not in stored:
        return "", dict.fromkeys(members, ())
    _need(file, stored, ("references",))
    _need(file, stored["references"], [str(i) for i in members])
    return stored["base"], {i: stored["references"][str(i)] for i in members}


def _human(config, folder):
    card = folder / "card.json"
    if config.model.path != "embedded" or not card.is_file():
        return None
    facts = _json(card)
    return facts["human_empty_turns"], facts["human_turns"]


def _check(file, summary):
    for row in summary:
        _need(file, row, ("member", "hyper", "final"))
        _need(file, row["final"], FINAL)
        if row["member"] != "base":
            _need(file, row, ("best",))
            _need(file, row["hyper"], ("kl.coef", "kl.budget", "seed"))
    ids = [row["member"] for row in summary]
    if "base" not in ids or len(ids) < 2:
        raise ValueError(f"{file}: expected at least one member and 'base', found {ids}")


def _present(file):
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: a finished sweep writes it (python -m launch.sweep "
                                "--config=... --workdir=...); is this a sweep's directory, and did it end?")
    return file


def _json(file):
    try:
        return storage.read_json(_present(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None


def _need(file, row, keys):
    missing = [key for key in keys if key not in row]
    if missing:
        raise ValueError(f"{file}: expected {', '.join(missing)} in {json.dumps(row)[:200]}")


def _lines(file):
    rows = []
    for i, line in enumerate(storage.read_text(_present(file)).splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {i}, is not JSON: {error}") from None
        _need(file, rows[-1], CURVE)
    if not rows:
        raise ValueError(f"{file} is empty: expected a line an iteration")
    return rows


def _arrays(file):
    with np.load(io.BytesIO(_present(file).read_bytes())) as stored:
        _need(file, dict.fromkeys(stored.files), ARRAYS)
        arrays = {key: stored[key] for key in (*ARRAYS, SEEDS) if key in stored.files}
    shape = arrays["tokens"].shape
    if any(arrays[key].shape != shape for key in ("roles", "turns", "kl")) or arrays["returns"].shape != shape[:1]:
        raise ValueError(f"{file}: expected tokens, roles, turns and kl of one shape [episodes, slots] and returns "
                         f"[episodes], found {({key: a.shape for key, a in arrays.items()})}")
    return arrays
