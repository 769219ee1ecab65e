"""The roofline by hand, the table, and kl_reg's sampler at a small size."""
import json
import shutil

import pytest

from benchmarks import decode, machine
from benchmarks.peers import work
from benchmarks.peers.work import Work

SMALL = Work(sequences=4, prompt=3, generated=2, group=2)


def test_operations_by_hand(tiny_shapes):
    """3 layers: matrices 16 x 32, two 16 x 16, 32 x 16, three 16 x 32, 3072 multiply-adds; attention 2 x 32 a pair. Two
    prompts or four of 3 tokens, whose first 2 are one pass, 3 pairs; then 4 tokens that see 3, and 4 that see 4, all
    unembedded, 16 x 300. Keys and values of 2 x 2 x 8 numbers a token and layer."""
    token, weights, table = 3 * 2 * 3072, 3 * 3072, 16 * 300
    first, second = (4 * (token + 3 * 2 * 64 * seen + 2 * table) for seen in (3, 4))
    assert decode.passes(tiny_shapes, SMALL, shared=False, size=4) == [
        (4 * (2 * token + 3 * 3 * 2 * 64), 4 * weights),
        (first, 4 * (weights + table + 3 * 32 * 12)), (second, 4 * (weights + table + 3 * 32 * 16))]
    assert decode.passes(tiny_shapes, SMALL, shared=True, size=2) == [
        (2 * (2 * token + 3 * 3 * 2 * 64), 2 * weights),
        (first, 2 * (weights + table + 3 * 32 * 6)), (second, 2 * (weights + table + 3 * 32 * 10))]


def test_every_pass_takes_the_longer_of_both():
    """8 FLOPs in 2 s against 1 s of memory; 4 FLOPs in 1 s against 3 s."""
    assert decode.least([(8, 10), (4, 30)], peak=4.0, rate=10.0) == (5.0, 3 / 5)


def test_the_table():
    result = {"model": "tiny", "policy": "head", "dtype": "float32", "work": SMALL._asdict(), "others": None,
              "machine": {"processor": "Abacus", "cores": 2, "device": "Loom", "devices": 1},
              "versions": dict.fromkeys(("separate", "shared"), {"kl_reg": "1"}) | {"generate": {"torch": "2"}},
              "matmul_flops_per_second": 2e11, "memory_bytes_per_second": 3e10,
              "seconds": {"separate": [1.0, 4.0, 2.0], "shared": [1.0, 1.0, 9.0], "generate": [4.0, 3.0, 8.0]},
              "least_seconds": {"separate": 1.0, "shared": 0.5, "generate": 1.0},
              "part_of_memory": {"separate": 0.25, "shared": 1.0, "generate": 0.25}}
    said = decode.report(result)
    assert "| kl_reg 1, prompts separate | 4 | 2.00 | 50% | 2.00 | 1.25 |" in said
    assert "| kl_reg 1, prompts shared | 8 | 1.00 | 50% | 4.00 | 1.7 |" in said
    assert "| torch 2, generate | 2 | 4.00 | 25% |  |  |" in said
    assert "Abacus, 2 cores, 1 x Loom" in said
    assert "(goal on an accelerator: 60%): 25% (separate), 100% (shared)" in said


def test_the_command_samples_both_ways(tiny_folder, tiny_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(work, "write_model", lambda name, folder: shutil.copytree(tiny_folder, folder) and tiny_shapes)
    monkeypatch.setattr(machine, "matmul_peak", lambda dtype: 1e9)
    monkeypatch.setattr(machine, "bandwidth", lambda: 1e9)
    sizes = [f"--{name}={size}" for name, size in SMALL._asdict().items()]
    decode.main(["--model=tiny", "--alone", "--shared", "--steps=2", "--warmup=1", *sizes, "--json",
                 str(tmp_path / "numbers.json")])
    result = json.loads((tmp_path / "numbers.json").read_text())
    assert decode.report(result) + "\n" == capsys.readouterr().out
    for kind in ("separate", "shared"):
        assert len(result["seconds"][kind]) == 2 and all(seconds > 0 for seconds in result["seconds"][kind])
        assert result["least_seconds"][kind] == pytest.approx(
            sum(max(each) for each in decode.passes(tiny_shapes, SMALL, kind == "shared", 4)) / 1e9)
