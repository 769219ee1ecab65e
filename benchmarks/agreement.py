"""kl_reg's losses, advantages, KL estimators, reductions, divergences and tilts beside those of other libraries.

    python -m benchmarks.agreement
    python -m benchmarks.agreement --peers=rlax --cases 10

Random cases are drawn here and written to a file; each peer is a process in an environment of its own, made at first
use (peers/environment.py), which calls the library's own functions on them. What is compared with what, and which
conventions differ, stands in comparisons/ and in the second table that is printed. Ends with status 1 where a
difference exceeds its tolerance.
"""
from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import machine
from benchmarks.comparisons import advantages, divergences, losses
from benchmarks.comparisons.comparison import Arrays, Comparison
from benchmarks.peers import environment, exchange

PEERS = {"trl": ("-m", "benchmarks.peers.trl_functions"), "verl": ("-m", "benchmarks.peers.verl_functions"),
         "rlax": ("-m", "benchmarks.peers.rlax_functions")}
COMPARISONS = (*losses.COMPARISONS, *advantages.COMPARISONS, *divergences.COMPARISONS)
_ROOT = pathlib.Path(__file__).parent.parent


class Drawn(NamedTuple):
    """A case of a comparison, in float64 or float32."""

    comparison: Comparison
    precision: str
    arrays: Arrays
    settings: dict


def draw(comparison: Comparison, count: int, seed: int) -> list[Drawn]:
    """Cases of a comparison; they depend on the seed and on what is compared, not on other comparisons."""
    rng = np.random.default_rng([seed, *f"{comparison.theirs} {comparison.ours}".encode()])
    cases = []
    for number in range(count):
        precision = comparison.precisions[number % len(comparison.precisions)]
        arrays, settings = comparison.draw(rng)
        arrays = {name: np.asarray(array, precision if np.asarray(array).dtype.kind == "f" else None)
                  for name, array in arrays.items()}
        cases.append(Drawn(comparison, precision, arrays, settings))
    return cases


def ask(peer: str, cases: Sequence[Drawn], python: pathlib.Path) -> tuple[dict, list[Arrays]]:
    """The peer's versions, and what its functions give for each case.

    Raises:
        RuntimeError: it failed; with the end of its standard error.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [pathlib.Path(folder) / name for name in ("cases.npz", "answers.npz")]
        exchange.write(files[0], (((case.comparison.function, case.settings | dict(case.comparison.given)), case.arrays)
                                  for case in cases))
        done = subprocess.run([str(python), *PEERS[peer], *map(str, files)], cwd=_ROOT, text=True,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={
                                  **os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""})
        if done.returncode:
            end = "\n".join(done.stderr.strip().splitlines()[-15:])
            raise RuntimeError(f"{peer} ended with status {done.returncode}; the end of its standard error:\n{end}")
        (versions, _), *answers = exchange.read(files[1])
    return versions, [arrays for _, arrays in answers]


def difference(ours: np.ndarray, theirs: np.ndarray, scale: np.ndarray | float) -> float:
    """The largest difference, relative to the larger of the scale and the peer's value; infinite where one of them is
    no number, or has another shape."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape or np.isnan(ours).any() or np.isnan(theirs).any():
        return float("inf")
    with np.errstate(invalid="ignore", over="ignore"):
        relative = np.abs(ours - theirs) / np.maximum(np.asarray(scale, np.float64), np.abs(theirs))
    relative = np.where(ours == theirs, 0.0, np.where(np.isnan(relative), np.inf, relative))
    return float(relative.max(initial=0.0))


def compare(comparison: Comparison, cases: Sequence[Drawn], answers: Sequence[Arrays]) -> dict:
    """How many cases and values were compared, the largest difference by precision, and the case that has it."""
    evaluate = jax.jit(comparison.evaluate, static_argnames=sorted({name for case in cases for name in case.settings}))
    row = {"kind": comparison.kind, "theirs": comparison.theirs, "ours": comparison.ours, "mapping": comparison.mapping,
           "tolerance": {name: getattr(comparison.tolerance, name) for name in comparison.precisions},
           "cases": len(cases), "values": 0, "largest": dict.fromkeys(comparison.precisions, 0.0), "worst": {}}
    for number, (case, theirs) in enumerate(zip(cases, answers, strict=True)):
        ours, scales = evaluate(case.arrays, **case.settings)
        if ours.keys() != theirs.keys():
            raise ValueError(f"{comparison.theirs}: {sorted(theirs)} are no {sorted(ours)}")
        for name, value in ours.items():
            found = difference(value, theirs[name], scales.get(name, 1.0))
            row["values"] += np.size(value)
            excess = found / row["tolerance"][case.precision]
            if not row["worst"] or excess > row["worst"]["tolerances"]:
                row["worst"] = {"case": number, "value": name, "tolerances": excess}
            row["largest"][case.precision] = max(found, row["largest"][case.precision])
    row["agrees"] = all(row["largest"][name] <= limit for name, limit in row["tolerance"].items())
    return row


def _largest(rows, precision):
    found = [row["largest"][precision] for row in rows if precision in row["largest"]]
    return f"{max(found):.0e}" if found else ""


def report(result: dict) -> str:
    """Two tables in Markdown: the largest differences by kind, and what was compared with what."""
    rows, kinds = result["rows"], list(dict.fromkeys(row["kind"] for row in result["rows"]))
    by_kind = [[kind, *(str(sum(row[name] for row in rows if row["kind"] == kind)) for name in ("cases", "values")),
                *(_largest([row for row in rows if row["kind"] == kind], name) for name in ("float64", "float32"))]
               for kind in kinds]
    each = [[row["theirs"], row["ours"], row["mapping"], str(row["cases"]),
             *(_largest([row], name) + (f" of {row['tolerance'][name]:.0e}" if name in row["tolerance"] else "")
               for name in ("float64", "float32"))] for row in rows]
    wrong = [f"{row['theirs']} and {row['ours']} differ: {row['worst']['value']} of case {row['worst']['case']}."
             for row in rows if not row["agrees"]]
    total = {name: sum(row[name] for row in rows) for name in ("cases", "values")}
    peers = "; ".join(machine.listed(versions) for versions in result["peers"].values())
    return "\n".join([
        f"{len(rows)} comparisons, {total['cases']} cases, {total['values']} values, seed {result['seed']}: "
        f"{machine.ran(result)}. Peers: {peers}. Differences are relative to the larger of 1 (or the size of what is "
        "added up) and the peer's value.", "",
        machine.table(("kind", "cases", "values", "largest difference, float64", "float32"), by_kind), "",
        machine.table(("peer's function", "kl_reg's", "convention", "cases", "float64", "float32"), each), "",
        " ".join(wrong) or "No difference exceeds its tolerance."])


def main(argv=None):
    parser = machine.benchmark(__doc__)
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS), help="of " + ",".join(PEERS))
    parser.add_argument("--cases", type=int, default=60, help="of each comparison")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    unknown = [peer for peer in options.peers if peer not in PEERS]
    if unknown or options.cases < 1:
        parser.error(f"--peers={','.join(unknown)}: choose of {', '.join(PEERS)}" if unknown
                     else f"--cases={options.cases} must be at least 1")
    peers, rows = {}, []
    for peer in options.peers:
        python = environment.python(peer)
        chosen = [comparison for comparison in COMPARISONS if comparison.peer == peer]
        with jax.enable_x64(True):
            drawn = [draw(comparison, options.cases, options.seed) for comparison in chosen]
            peers[peer], answers = ask(peer, [case for cases in drawn for case in cases], python)
            for number, comparison in enumerate(chosen):
                own = slice(number * options.cases, (number + 1) * options.cases)
                rows.append(compare(comparison, drawn[number], answers[own]))
    result = {"seed": options.seed, "rows": rows, "peers": peers, "machine": machine.about(),
              "versions": machine.versions()}
    machine.tell(result, report(result), options.json)
    return 0 if all(row["agrees"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
