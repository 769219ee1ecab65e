import json
import os
import socket
import subprocess

import pytest

import kl_reg
from kl_reg.sharding import multihost
from kl_reg.sweeps import gather, job, plan, progress


@pytest.fixture
def sweep(config, tmp_path):
    sweep = plan.plan(config, tmp_path / "x", members_per_job=1)
    plan.write(sweep)
    return sweep


def test_a_program_that_fails_is_on_record_and_stops_no_other(sweep, trains):
    job.run(sweep.workdir, 0)
    with pytest.raises(job.ProgramFailed, match=r"program 1 \(member 2\): ValueError: loss not finite"):
        job.run(sweep.workdir, 1)
    assert sweep.missing() == [1, 2]
    assert [progress.state(sweep, number) for number in range(3)] == ["done", "failed", "waiting"]
    assert progress.recorded(sweep, 1)["error"] == "ValueError: loss not finite"
    end = progress.log_end(sweep, 1)
    assert "about to diverge" in sweep.log(1).read_text() and end[-2:] == ["ValueError: loss not", "finite"]
    assert progress.log_end(sweep, 1, lines=1) == ["finite"]
    assert "about to diverge" not in "".join(progress.log_end(sweep, 0))


def test_what_it_and_its_children_print_is_in_its_log_and_nowhere_else(sweep, monkeypatch, capfd):
    def train(config, workdir):
        print("from Python")
        os.system("echo from a child; echo and its errors >&2")

    monkeypatch.setattr(kl_reg, "train", train)
    job.run(sweep.workdir, 0)
    job.run(sweep.workdir, 0)       # a second attempt goes on in the same file
    print("afterwards")
    assert capfd.readouterr() == ("afterwards\n", "")
    lines = [line for line in sweep.log(0).read_text().splitlines() if not line[0].isdigit()]
    assert lines == ["from Python", "from a child", "and its errors"] * 2


def test_a_signal_leaves_it_stopped(sweep, monkeypatch):
    def train(config, workdir):
        raise SystemExit(1)

    monkeypatch.setattr(kl_reg, "train", train)
    with pytest.raises(SystemExit):
        job.run(sweep.workdir, 0)
    assert progress.state(sweep, 0) == "stopped"


def test_two_processes_do_not_train_one_program(sweep, trains):
    with plan.locked(sweep.workdir / "logs/0.lock", otherwise="busy"), \
            pytest.raises(BlockingIOError, match=r"program 0 \(member 0\) .* by another process"):
        job.run(sweep.workdir, 0)
    assert progress.state(sweep, 0) == "waiting"


def test_the_last_one_gathers(sweep, trains, monkeypatch):
    gathered = []
    monkeypatch.setattr(gather, "gather", gathered.append)
    for number in (2, 0):
        job.run(sweep.workdir, number)
    assert not gathered
    sweep.folder(1).mkdir()
    (sweep.folder(1) / "summary.json").write_text("[]")
    job.run(sweep.workdir, 2)
    assert gathered == [sweep.workdir]


def test_a_program_that_is_not_there(sweep):
    with pytest.raises(ValueError, match="programs 0 to 2; there is no 3"):
        job.run(sweep.workdir, 3)
    with pytest.raises(FileNotFoundError, match="sweep.json is missing"):
        job.run(sweep.workdir / "programs", 0)


def test_rows_tell_how_far_each_member_is(sweep, trains):
    job.run(sweep.workdir, 0)
    file = sweep.folder(2) / "members/0/metrics.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text('{"iteration": 0, "return": 0.5}\n{"iteration": 1, "ret')       # a line that is being written
    job.record(sweep, 2, "running", host="elsewhere", pid=1)
    rows = progress.rows(sweep.workdir)
    assert [row.member for row in rows] == [0, 1, 2] and [row.program for row in rows] == [0, 2, 1]
    assert [row.state for row in rows] == ["done", "running", "waiting"]
    assert [(row.iteration, row.iterations) for row in rows] == [(2, 2), (1, 2), (0, 2)]
    assert rows[1].last == {"iteration": 0, "return": 0.5} and rows[2].last == {} and rows[2].seconds is None
    assert rows[1].settings == {"reference.name": "ema", "kl.coef": 0.1, "seed": 1}
    os.utime(file, (0, 0))
    assert progress.rows(sweep.workdir)[1].seconds > 1e9


def test_a_process_that_is_gone_without_a_word_is_lost(sweep):
    done = subprocess.Popen(["true"])
    done.wait()
    job.record(sweep, 0, "running", host=socket.gethostname(), pid=done.pid)
    job.record(sweep, 1, "running", host=socket.gethostname(), pid=os.getpid())
    job.record(sweep, 2, "running", host="elsewhere", pid=done.pid)
    assert [progress.state(sweep, number) for number in range(3)] == ["lost", "running", "running"]


def test_a_run_of_one_process_has_rows_too(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": json.loads(config.to_json()), "fingerprint": "x"}))
    assert {(row.program, row.state) for row in progress.rows(tmp_path)} == {(None, "unfinished")}
    (tmp_path / "summary.json").write_text("[]")
    assert [row.state for row in progress.rows(tmp_path)] == ["done"] * 3
    with pytest.raises(FileNotFoundError, match="holds no run"):
        progress.rows(tmp_path / "nowhere")


def test_of_several_processes_the_first_keeps_the_record(sweep, trains, monkeypatch):
    monkeypatch.setattr(multihost, "index", lambda: 3)
    with plan.locked(sweep.workdir / "logs/0.lock", otherwise="busy"):       # as the first does meanwhile
        job.run(sweep.workdir, 0)
        with pytest.raises(ValueError, match="loss not"):
            job.run(sweep.workdir, 1)
    assert not [file for i in (0, 1) for file in (sweep.log(i), sweep.workdir / f"logs/{i}.json") if file.exists()]
    assert "about to diverge" in (sweep.workdir / "logs/1.3.txt").read_text()
