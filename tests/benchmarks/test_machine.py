"""What the benchmarks share, at small sizes."""
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from benchmarks import machine


def test_a_table_is_markdown():
    assert machine.table(("what", "s"), [("a", "1.0"), ("b", "2.0")]) == (
        "| what | s |\n| --- | ---: |\n| a | 1.0 |\n| b | 2.0 |")


def test_versions_are_listed():
    told = machine.versions("numpy")
    assert list(told) == ["kl_reg", "jax", "numpy", "python"] and told["jax"] == jax.__version__
    assert machine.listed({"a": "1", "b": "2.0"}) == "a 1, b 2.0"


def test_where_names_devices_beside_a_processor():
    about = {"processor": "Abacus", "cores": 2, "device": "cpu", "devices": 8}
    assert machine.where(about) == "Abacus, 2 cores"
    assert machine.where(about | {"device": "Loom 9", "devices": 4}) == "Abacus, 2 cores, 4 x Loom 9"
    assert machine.about().keys() == {"processor", "cores", "device", "devices", "system"}


def test_limits_are_what_was_moved_over_the_fastest_time(monkeypatch):
    """Products of 64, 4, 16 and 32 rows with 32 x 32, each in 2 s: that of 64 rows is the best. A copy moves twice."""
    monkeypatch.setattr(machine, "_fastest", lambda call, repeats: call() is None or 2.0)
    assert machine.matmul_peak(width=32) == 2 * 64 * 32 * 32 / 2.0
    assert machine.matmul_peak(width=32, dtype=jnp.bfloat16) == 2 * 64 * 32 * 32 / 2.0
    assert machine.bandwidth(size=2**20) == 2 * 2**20 / 2.0


def test_the_fastest_call_counts_and_the_first_does_not(monkeypatch):
    times = iter([0.0, 5.0, 10.0, 12.0, 20.0, 27.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(times))
    called = []
    assert machine._fastest(lambda: called.append(1), 3) == 2.0 and len(called) == 4


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="other processes are seen in /proc")
def test_a_watch_counts_others_and_not_own_children():
    """What a child works is another's until it is waited for, and then our own."""
    watch = machine.Watch()
    code = "import time\nwhile time.process_time() < 1: pass\nprint(flush=True)\ninput()"

    def seconds():
        return watch.others() * os.cpu_count() * (time.monotonic() - watch._began)

    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        worker.stdout.readline()
        before = seconds()
        assert before >= 0.9
        worker.communicate(b"\n")
    assert seconds() <= before - 0.5
    assert machine.disturbed(0.124) == "Other processes took 12% of the cores' time meanwhile."
    assert machine.disturbed(None) == ""


def test_the_result_is_printed_and_stored(tmp_path, capsys):
    options = machine.benchmark("Measures.\n\n    command").parse_args(["--json", str(tmp_path / "x.json")])
    machine.tell({"a": 1}, "said", options.json)
    assert capsys.readouterr().out == "said\n" and json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    machine.tell({"a": 1}, "said", None)
