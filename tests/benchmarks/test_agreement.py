"""The command with peers that need no environment: right ones, one that errs, one that fails; and kl_reg's side of
every comparison."""
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import agreement
from benchmarks.agreement import COMPARISONS
from benchmarks.peers import environment, exchange

PEER = """
import numpy as np
from benchmarks.peers.exchange import answer

def k3(log_prob, ref, *, name, exchanged):
    each = np.exp(ref - log_prob) - 1 - (ref - log_prob)
    return {"kl": FACTOR * each, "gradient": 1 - np.exp(ref - log_prob)}

answer({"kl": k3}, "numpy")
"""
(K3,) = (one for one in COMPARISONS if (one.theirs, one.ours) == ("verl kl_penalty, k3", "k3"))


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """Makes the peer "fake", which has k3 alone."""
    def make(factor="1", environment_of=lambda name: pathlib.Path(sys.executable)):
        (tmp_path / "peer.py").write_text(PEER.replace("FACTOR", factor))
        monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parents[2]))
        monkeypatch.setattr(agreement, "PEERS", {"fake": (str(tmp_path / "peer.py"),)})
        monkeypatch.setattr(agreement, "COMPARISONS", (K3._replace(peer="fake", theirs="fake k3"),))
        monkeypatch.setattr(environment, "python", environment_of)
    return make


def test_the_command_prints_and_stores_what_it_compared(peer, tmp_path, capsys):
    """Of 4 cases of 5 x 8 tokens, each with a value and a derivative."""
    peer()
    assert agreement.main(["--cases=4", "--json", str(tmp_path / "numbers.json")]) == 0
    result = json.loads((tmp_path / "numbers.json").read_text())
    said = capsys.readouterr().out
    assert agreement.report(result) + "\n" == said and "No difference exceeds its tolerance." in said
    assert "1 comparisons, 4 cases, 320 values, seed 0" in said and "| KL estimator | 4 | 320 |" in said
    (row,) = result["rows"]
    assert row["largest"].keys() == {"float64", "float32"} and all(x < 1e-5 for x in row["largest"].values())
    assert result["peers"]["fake"].keys() == {"numpy"}


def test_a_difference_ends_it_with_status_1(peer, capsys):
    peer("1.5")
    assert agreement.main(["--cases=4"]) == 1
    assert "fake k3 and k3 differ: kl of case" in capsys.readouterr().out


def test_a_peer_that_fails_is_one_error_with_what_it_said(peer):
    peer("unknown")
    with pytest.raises(RuntimeError, match="(?s)^fake ended with status 1; .*name 'unknown' is not defined"):
        agreement.main(["--cases=1"])


@pytest.mark.parametrize("options", ["--peers=nobody", "--cases=0"])
def test_bad_options_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        agreement.main([options])
    assert options.split("=")[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("ours", "theirs", "scale", "expected"), [
    ([1.0, 2.5], [1.0, 2.0], 1.0, 0.25), ([0.25], [0.0], 1.0, 0.25), ([1.0], [0.0], 4.0, 0.25),
    ([10.0, -np.inf], [8.0, -np.inf], 1.0, 0.25), ([np.nan], [np.nan], 1.0, np.inf), ([np.inf], [1.0], 1.0, np.inf),
    ([1.0], [np.inf], 1.0, np.inf), ([1.0, 1.0], [1.0], 1.0, np.inf), ([], [], 1.0, 0.0)])
def test_differences_by_hand(ours, theirs, scale, expected):
    assert agreement.difference(np.array(ours), np.array(theirs), scale) == expected


def test_files_hold_what_was_written(tmp_path):
    records = [(["f", {"a": 1}], {"x": np.arange(6.0).reshape(2, 3), "one": np.float32(2.5), "b": np.array([True])}),
               (["g", {}], {"i": np.zeros((0, 4), np.int32)}), (None, {})]
    exchange.write(tmp_path / "file.npz", records)
    found = exchange.read(tmp_path / "file.npz")
    assert [head for head, _ in found] == [head for head, _ in records]
    for (_, written), (_, read) in zip(records, found, strict=True):
        assert written.keys() == read.keys()
        for name, array in written.items():
            np.testing.assert_array_equal(read[name], array, strict=True)


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda one: f"{one.theirs} - {one.ours}")
def test_our_side_of_every_comparison_is_finite(comparison):
    """So that a function that moves or changes is noticed where no peer is installed; a case is the same when it is
    drawn again."""
    with jax.enable_x64(True):
        (case,), (again,) = (agreement.draw(comparison, 1, 3) for _ in range(2))
        values, scales = comparison.evaluate(jax.tree.map(jnp.asarray, case.arrays), **case.settings)
    for name, array in case.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])
    assert scales.keys() <= values.keys() and not any(np.isnan(value).any() for value in values.values())


def test_every_comparison_s_function_is_there_and_no_other():
    """By the text of the peers' modules, which cannot be imported here."""
    for peer, (_, module) in agreement.PEERS.items():
        file = pathlib.Path(agreement.__file__).parent / "peers" / f"{module.rsplit('.', 1)[1]}.py"
        called = {comparison.function for comparison in COMPARISONS if comparison.peer == peer}
        text = file.read_text()
        assert all(f"\ndef {name}(" in text for name in called), peer
        listed = text.partition("for function in (")[2].partition(")")[0]
        assert {name.strip() for name in listed.split(",")} == called
