"""How processes are timed and what is said of them; that `launch.train` prints the marks, tests/launch says."""
import json
import pathlib
import sys

import pytest

from benchmarks import startup

TRAINS = """
import os, pathlib, time
cache = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
print("a greeting")
time.sleep(0.0 if cache.exists() else 0.3)
cache.mkdir(exist_ok=True)
print("first update after 0.3 s")
time.sleep(0.1)
print("2/2  return 1.000")
print("2/2  0.1 s/it")
"""


def test_marks_are_timed_where_they_are_first_printed(tmp_path):
    seconds = startup.run([sys.executable, "-c", TRAINS], tmp_path / "cache")
    assert 0.3 < seconds["first update"] < seconds["second update"] - 0.09 < seconds["end"]


@pytest.mark.parametrize("code, says", [("import nowhere", r"status 1 and printed lines for end; .*\n.*nowhere"),
                                        ("print('2/2')", "status 0 and printed lines for second update, end; ")])
def test_a_command_that_fails_or_says_nothing_is_one_error(tmp_path, code, says):
    with pytest.raises(RuntimeError, match=f"(?s)`.*` ended with {says}"):
        startup.run([sys.executable, "-c", code], tmp_path)


def test_the_command_times_a_cold_process_and_then_a_warm_one(tmp_path, monkeypatch, capsys):
    asked, run = [], startup.run
    monkeypatch.setattr(startup, "run", lambda command, cache: asked.append((command, cache)) or run(
        [sys.executable, "-c", TRAINS], cache))
    startup.main(["--repeats=2", "--config.env.length=12", "--json", str(tmp_path / "numbers.json")])
    result = json.loads((tmp_path / "numbers.json").read_text())
    said = capsys.readouterr().out
    assert startup.report(result) + "\n" == said and "--config.env.length=12`" in said
    for cold, warm in zip(result["seconds"]["cold"], result["seconds"]["warm"], strict=True):
        assert cold["first update"] > warm["first update"] + 0.2
    caches = [cache for _, cache in asked]
    assert caches[0] == caches[1] != caches[2] == caches[3]
    folders = [pathlib.Path(command[-1].removeprefix("--workdir=")) for command, _ in asked]
    assert len(set(folders)) == 4 and asked[0][0][1:4] == ["-m", "launch.train", "--config=configs/quickstart.py"]


def test_the_table(capsys):
    rows = [{"first update": 9.0, "second update": 9.5, "end": 20.0},
            {"first update": 8.0, "second update": 8.5, "end": 10.0}]
    about = {"processor": "Abacus", "cores": 2, "device": "cpu"}
    said = startup.report({"settings": ["--config=x.py"], "machine": about, "others": None, "versions": {"jax": "1"},
                           "seconds": {"cold": rows, "warm": rows[1:]}})
    assert "| cold | 8.5 | 9.0 | 15.0 |" in said and "| warm | 8.0 | 8.5 | 10.0 |" in said
    assert "jax 1; Abacus, 2 cores. Seconds from the start of the process, median of 2." in said
    with pytest.raises(SystemExit):
        startup.main(["--episodes=3"])
    assert "unknown arguments --episodes=3; settings are --config.SETTING=VALUE" in capsys.readouterr().err
