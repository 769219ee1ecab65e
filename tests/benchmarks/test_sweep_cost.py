"""The table by hand, and sweeps of one and of two members at a small size."""
import json
import shutil

import pytest

from benchmarks import sweep_cost
from benchmarks.peers import work
from benchmarks.peers.work import Work

SMALL = Work(sequences=2, prompt=3, generated=2, group=1)


def row(rollout, update):
    return {"rollout": rollout, "reward": 0.5, "update": update}


def test_the_table():
    """One member 2, 4 and 9 s, sixteen 8, 10 and 12 s, of 16 x 2 x 2 tokens."""
    seconds = {"1": [row(1.0, 0.5), row(1.5, 2.0), row(4.0, 4.5)], "16": [row(4.0, 3.5), row(6.5, 5.0), row(5.0, 4.5)]}
    result = {"model": "tiny", "policy": "head", "work": SMALL._asdict(), "backend": "cpu", "others": None,
              "machine": {"processor": "Abacus", "cores": 2, "device": "cpu"}, "versions": {"jax": "1"},
              "seconds": seconds}
    said = sweep_cost.report(result)
    assert "| 1 | 4.00 | 1.50 | 0.50 | 2.00 | 1.00 |  | 1 |" in said
    assert "| 16 | 10.00 | 5.00 | 0.50 | 4.50 | 2.50 | 8 | 6 |" in said and "jax 1; Abacus, 2 cores" in said
    assert "| 2.5 | 6 |" in sweep_cost.report(result | {"backend": "gpu"})
    assert "| 2.50 |  | 6 |" in sweep_cost.report(result | {"policy": "lora"})


def test_members_differ_and_one_is_among_them():
    assert sweep_cost.coefficients(3) == pytest.approx((0.01, 0.1, 1.0)) and len(sweep_cost.coefficients(1)) == 1
    assert sweep_cost._members("16,4") == [1, 4, 16]


@pytest.mark.parametrize("policy, members", [("head", 2), ("lora", 1)])
def test_the_command_runs_sweeps_in_which_every_member_learns(policy, members, tiny_folder, tiny_shapes, tmp_path,
                                                              monkeypatch, capsys):
    monkeypatch.setattr(work, "write_model", lambda name, folder: shutil.copytree(tiny_folder, folder) and tiny_shapes)
    sizes = [f"--{name}={size}" for name, size in SMALL._asdict().items()]
    sweep_cost.main(["--model=tiny", f"--members={members}", f"--policy={policy}", "--steps=2", "--warmup=1",
                     *sizes, "--json", str(tmp_path / "numbers.json")])
    result = json.loads((tmp_path / "numbers.json").read_text())
    assert sweep_cost.report(result) + "\n" == capsys.readouterr().out
    assert result["seconds"].keys() == {"1", str(members)}
    assert all(value > 0 for rows in result["seconds"].values() for one in rows for value in one.values())
