"""At small shapes: what the benchmark compares is right, and what it says of memory holds."""
from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from benchmarks import kl_memory

SHAPE = kl_memory.Shape(rows=256, vocab=2000, width=16, chunk=16)


def test_both_are_the_exact_kl():
    policy, table, base = (np.float64(x) for x in kl_memory.make_inputs(SHAPE))
    expected = rel_entr(softmax(policy @ table.T, axis=1), softmax(base @ table.T, axis=1)).sum(1)
    assert 0.2 < expected.mean() < 2
    inputs = kl_memory.make_inputs(SHAPE)
    for kl in (kl_memory.naive(*inputs), kl_memory.chunked(*inputs, SHAPE.chunk)):
        np.testing.assert_allclose(kl, expected, rtol=1e-5, atol=1e-5)


def test_the_command_prints_and_stores_the_comparison(tmp_path, capsys):
    sizes = [word for name, size in SHAPE._asdict().items() for word in (f"--{name}", str(size))]
    kl_memory.main([*sizes, "--repeats", "2", "--no-resident", "--json", str(tmp_path / "numbers.json")])
    printed = capsys.readouterr().out
    assert "n = 256, v = 2000, d = 16, chunk 16" in printed and "compiled temp + output, MB" in printed
    result = json.loads((tmp_path / "numbers.json").read_text())
    assert result["largest_difference_kl"] < 1e-5
    assert result["largest_difference_gradient"] < 1e-5 * result["largest_gradient"] + 1e-8
    naive, chunked = (result["compiled_bytes"][kind] for kind in kl_memory.KINDS)
    assert naive >= 2 * 4 * SHAPE.rows * SHAPE.vocab
    assert chunked <= naive / 4
    for kind in kl_memory.KINDS:
        assert 0 < result["seconds_min"][kind] <= result["seconds_median"][kind]


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc")
def test_resident_memory_rises_by_all_logits_or_by_much_less():
    """The first is measured in a process of its own, as the command does it."""
    shape = kl_memory.Shape(rows=1024, vocab=20_000, width=8, chunk=16)
    logits = 4 * shape.rows * shape.vocab
    naive = kl_memory.resident_rise_alone("naive", shape)
    assert 2 * logits <= naive <= 10 * logits
    assert kl_memory.resident_rise("chunked", shape) <= naive / 4
