"""Commands print on terminals of any encoding."""
import ast
import io
import pathlib
import sys

import pytest

from kl_reg.runs import log as run_log
from launch import command

LAUNCH = pathlib.Path(command.__file__).parent
COMMANDS = sorted(file for file in LAUNCH.glob("*.py") if file.stem not in ("command", "parent"))
ROW = {"return": 1.5, "return_se": 0.25, "kl/nats_per_episode": 2.0, "kl/nats_per_episode_se": None,
       "teacher/silent_rate": None, "student/silent_rate": 0.1}
SUMMARY = [{"member": "base", "hyper": {}, "final": ROW}, {"member": 0, "hyper": {"seed": 0}, "final": ROW}]


@pytest.fixture
def written(monkeypatch):
    """Replaces standard output by a strict one of an encoding; what it got is returned by a call."""
    def into(encoding):
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding, write_through=True)
        monkeypatch.setattr(sys, "stdout", stream)
        return lambda: raw.getvalue().decode(encoding)

    return into


@pytest.mark.parametrize("encoding, error", [("ascii", "?"), ("latin-1", "±"), ("cp1252", "±"), ("utf-8", "±")])
def test_the_summary_is_printed_whatever_the_encoding(written, encoding, error):
    said = written(encoding)
    command.guarded(["train"], lambda: command.print_summary(SUMMARY, pathlib.Path("runs/\udcff"), "é"))
    assert f"1.50 {error} 0.25" in said() and "report" in said()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_text_of_models_is_printed_too(written, encoding):
    said = written(encoding)
    command.guarded(["sample"], lambda: print("A: ± – ⏎ ◌ 漢 \ud83d B: end"))
    assert said().startswith("A: ") and said().endswith("B: end\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_line_above_the_progress_bar_is_printed_too(written, encoding):
    said = written(encoding)
    with run_log.progress_bar("train", 1) as bar:
        bar.log("runs/漢字\udcff: already trained")
    assert said().startswith("runs/") and said().endswith(": already trained\n")


@pytest.mark.parametrize("file", COMMANDS, ids=lambda file: file.stem)
def test_every_command_goes_through_it(file):
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
             if isinstance(node, ast.Call)}
    assert calls & {"command.guarded", "command.run"}
