import pytest
from rich.console import Console

from kl_reg.config import default
from kl_reg.sweeps import job, plan, progress
from launch import status


def row(member, program, state, **facts):
    given = {"settings": {"kl.coef": 0.1}, "iteration": 3, "iterations": 5, "last": {}, "seconds": None} | facts
    return progress.Row(member=member, program=program, state=state, **given)


def test_the_table_has_a_line_a_member():
    rows = [row(0, 1, "running", last={"return": 1.234, "kl/nats_per_episode": 5.0, "tokens_per_second": 99.6},
                seconds=130.0), row(1, None, "unfinished", settings={}, iteration=0)]
    console = Console(width=110, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(status.table(rows))
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()][2:]
    assert lines == [["0", "kl.coef=0.1", "1", "running", "3/5", "1.23", "5.00", "100", "2", "min"],
                     ["1", "–", "–", "unfinished", "0/5", "–", "–", "–", "–"]]


@pytest.mark.parametrize("seconds, text", [(None, "–"), (0.4, "0 s"), (59, "59 s"), (7000, "2 h"), (200000, "2 d")])
def test_ages_are_short(seconds, text):
    assert status._ago(seconds) == text


def test_without_a_terminal_it_tells_what_changes(monkeypatch, capsys):
    looks = iter([["waiting", "running"], ["waiting", "running"], ["running", "done"], ["done", "done"]])
    monkeypatch.setattr(progress, "rows", lambda workdir: [row(i, i, state) for i, state in enumerate(next(looks))])
    status.follow("x", lambda rows: all(row.state == "done" for row in rows), every=0)
    told = [line[10:] for line in capsys.readouterr().out.splitlines() if "): " in line]
    assert told == ["program 0 (member 0): waiting", "program 1 (member 1): running", "program 0 (member 0): running",
                    "program 1 (member 1): done", "program 0 (member 0): done"]


def test_problems_are_told_with_the_end_of_the_log(tmp_path):
    sweep = plan.Sweep(tmp_path, default(), [[0], [1], [2]])
    plan.write(sweep)
    job.record(sweep, 0, "failed", error="ValueError: no")
    sweep.log(0).write_text("".join(f"line {i}\n" for i in range(40)))
    job.record(sweep, 1, "lost", error="killed by SIGKILL")
    job.record(sweep, 2, "queued")
    lines = status.problems(tmp_path)
    assert lines[1:3] == ["program 0 (member 0) failed: ValueError: no", f"{tmp_path}/logs/0.txt ends with"]
    assert lines[3:18] == [f"  | line {i}" for i in range(25, 40)]
    assert "program 1 (member 1) was lost: killed by SIGKILL" in lines and not any("program 2" in x for x in lines)
