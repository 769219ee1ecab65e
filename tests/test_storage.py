"""Runs in stores of objects: one in memory in place of Amazon S3, and a server in place of Google Cloud Storage, which
gcsfs and TensorStore ask over HTTP."""
import io
import json
import os
import pathlib
import shutil
import sys

import chex
import fsspec
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

import kl_reg
from kl_reg import config as configs
from kl_reg import storage
from kl_reg.analysis.report import page
from kl_reg.envs import prompts
from kl_reg.pretrained import folders
from kl_reg.rewards.table import table
from kl_reg.runs import checkpoint
from kl_reg.runs import directory as run_directory
from kl_reg.sweeps import gather, job, plan, progress
from launch import command
from launch.backends import options, slurm, tpu_vm
from tests.fake_gcs import BUCKET, FakeGCS


class MemoryS3(MemoryFileSystem):
    """Objects in memory under s3://, which are not appended to; there are no folders but those that objects make."""

    protocol, store, pseudo_dirs = "s3", {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("s3://"))

    def _open(self, path, mode="rb", **more):
        assert mode in ("rb", "wb"), f"objects are not opened with {mode!r}"
        return super()._open(path, mode, **more)

    def makedirs(self, path, exist_ok=False):
        pass

    def mkdir(self, path, create_parents=True, **more):
        pass


@pytest.fixture(scope="module")
def s3():
    """An empty store in memory."""
    fsspec.register_implementation("s3", MemoryS3, clobber=True)
    MemoryS3.clear_instance_cache()
    yield "s3://bucket"
    MemoryS3.store.clear()


@pytest.fixture(scope="module")
def gs():
    """An empty store behind HTTP."""
    with pytest.MonkeyPatch.context() as patch, FakeGCS() as server:
        for name, value in {"STORAGE_EMULATOR_HOST": server.url, "TENSORSTORE_GCS_HTTP_URL": server.url,
                            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
                            "GOOGLE_CLOUD_PROJECT": "none"}.items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        yield f"gs://{BUCKET}"


@pytest.fixture(scope="module", params=["s3", "gs"])
def root(request):
    """An empty store."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def config(tiny_folder):
    config = configs.default()
    config.model.path, config.policy.hidden = str(tiny_folder), 4
    config.env.opening, config.env.length = "<|start|>A: hi\n", 12
    config.rl.iterations, config.rl.episodes, config.evaluation.episodes = 3, 2, 4
    config.checkpoint.every, config.checkpoint.keep, config.optim.learning_rate = 1, 2, 1e-2
    return config


def longer(prompts, completions, completion_ids):
    return [len(ids) / 10 for ids in completion_ids]


class Stops(Exception):
    """Ends a run as a signal would."""


@pytest.fixture(scope="module")
def interrupted(config, root):
    """A run that was stopped in its third iteration, and the directory of it then."""
    asked = []

    def stops(log, row):
        asked.append(row["iteration"])
        if row["iteration"] == 2:
            raise Stops
        write(log, row)

    write = kl_reg.runs.log.MemberLog.write
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stops):
        patch.setattr(kl_reg.runs.log.MemberLog, "write", stops)
        kl_reg.train(config, longer, f"{root}/run")
    assert asked == [0, 1, 2]
    workdir = storage.path(root) / "run"
    return workdir, progress.rows(f"{root}/run"), run_directory.iterations(workdir)


@pytest.fixture(scope="module")
def resumed(interrupted, config, root):
    return kl_reg.train(config, longer, f"{root}/run")


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    return kl_reg.train(config, longer, tmp_path_factory.mktemp("whole") / "run")


def lines(workdir):
    rows = [json.loads(line) for line in storage.read_text(workdir / "members/0/metrics.jsonl").splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")} for row in rows]


def test_what_an_interrupted_run_has_is_there(interrupted):
    workdir, (row,), iterations = interrupted
    assert iterations == [1, 2] and (row.state, row.iteration, row.iterations) == ("unfinished", 2, 3)
    assert (workdir / "config.json").exists() and not (workdir / "summary.json").exists()


def test_a_run_resumes_from_where_it_is_and_ends_as_one_that_was_not_stopped(resumed, whole, root):
    chex.assert_trees_all_equal(resumed.params, whole.params)
    assert resumed.summary == whole.summary == storage.read_json(resumed.workdir / "summary.json")
    assert lines(resumed.workdir) == lines(whole.workdir) and len(lines(whole.workdir)) == 3
    assert storage.read_json(resumed.workdir / "config.json") == storage.read_json(whole.workdir / "config.json")
    with np.load(io.BytesIO((resumed.workdir / "members/0/evaluation.npz").read_bytes())) as ours, \
            np.load(whole.workdir / "members/0/evaluation.npz") as theirs:
        chex.assert_trees_all_equal(dict(ours), dict(theirs))
    assert str(resumed.workdir) == f"{root}/run"


def test_its_checkpoints_are_read_and_old_ones_are_gone(resumed, whole):
    assert run_directory.iterations(resumed.workdir) == run_directory.iterations(whole.workdir) == [2, 3]
    for iteration in (None, 2):
        ours, theirs = (run_directory.load(result.workdir, iteration) for result in (resumed, whole))
        assert [(m.iteration, m.digest) for m in ours] == [(m.iteration, m.digest) for m in theirs]
        chex.assert_trees_all_equal([m.params for m in ours], [m.params for m in theirs])


def test_its_report_and_its_status_are_those_of_a_local_one(resumed, whole):
    assert page.write_report(str(resumed.workdir)) == resumed.report
    html = storage.read_text(resumed.report)
    assert html.startswith("<!doctype html>") and html.count("data:image/png;base64,") >= 3
    names = sorted(file.name for file in (resumed.workdir / "figures").iterdir())
    assert names == sorted(file.name for file in (whole.workdir / "figures").iterdir())
    (row,) = progress.rows(str(resumed.workdir))
    assert (row.state, row.iteration, row.last["iteration"]) == ("done", 3, 2)


def test_its_scalars_are_in_event_files(resumed, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    storage.copy_tree(resumed.workdir / "members/0/tensorboard", tmp_path / "events")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [event.step for event in events.Scalars("return")] == [0, 1, 2]


def test_it_is_addressed_as_a_local_one(resumed):
    assert run_directory.parse(f"{resumed.workdir}:0@2") == (resumed.workdir, 0, 2)
    assert run_directory.parse(str(resumed.workdir / "members")) is None


def test_another_experiment_is_refused_there(resumed, config, root):
    other = config.copy_and_resolve_references()
    other.kl.coef = 0.5
    with pytest.raises(FileExistsError, match="holds another experiment"):
        kl_reg.train(other, longer, resumed.workdir)
    storage.write_text(storage.path(root) / "notes/a.txt", "hi")
    with pytest.raises(FileExistsError, match="is not empty and holds no config.json"):
        kl_reg.train(config, longer, f"{root}/notes")


def test_a_sweep_of_several_programs_is_run_and_gathered_there(config, root, resumed, monkeypatch):
    """Training is a copy of a run; what is around it is the real thing."""
    config = config.copy_and_resolve_references()
    config.sweep = [{"kl.coef": (0.0, 0.1)}]
    sweep = plan.plan(config, f"{root}/sweep", members_per_job=1)
    plan.write(sweep)
    assert plan.read(f"{root}/sweep").programs == [[0], [1]]

    def train(config, workdir):
        print("trains")
        for name in ("members", "checkpoints", "config.json", "summary.json"):
            copy = storage.copy_tree if (resumed.workdir / name).is_dir() else copy_file
            copy(resumed.workdir / name, workdir / name)

    monkeypatch.setattr(kl_reg, "train", train)
    for number in (0, 1):
        job.run(f"{root}/sweep", number)
    assert not sweep.missing() and gather.gather(f"{root}/sweep").exists()
    assert [row["member"] for row in storage.read_json(sweep.workdir / "summary.json")] == ["base", 0, 1]
    assert [row.state for row in progress.rows(f"{root}/sweep")] == ["done", "done"]
    assert [line for line in progress.log_end(sweep, 1) if line == "trains"] == ["trains"]
    assert run_directory.iterations(sweep.workdir) == [2, 3]


def copy_file(source, target):
    storage.write_bytes(target, source.read_bytes())


def test_a_checkpoint_that_is_not_whole_does_not_count(s3):
    folder = storage.path(f"{s3}/torn")
    storage.write_text(folder / "4/state/a", "x")
    storage.write_text(folder / "3/state/a", "x")
    storage.write_text(folder / "3/commit_success.txt", "")
    assert checkpoint.steps(folder) == [3]
    assert checkpoint.steps(folder / "nowhere") == []


def test_several_processes_cannot_copy_checkpoints(s3, monkeypatch):
    monkeypatch.setattr(checkpoint.jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="s3://bucket/x: several processes .* shared directory or to gs://"):
        checkpoint.Checkpoints(storage.path(f"{s3}/x"), {}, 1)


@given(st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=5), max_size=5),
       st.integers(0, 6), st.lists(st.booleans(), max_size=5))
def test_lines_are_those_of_a_local_file(s3, tmp_path_factory, written, kept, flushed):
    """A file in a store against one that Python appends to."""
    local = tmp_path_factory.getbasetemp() / "lines.txt"
    for file in (local, storage.path(f"{s3}/lines.txt")):
        for _ in range(2):
            log = storage.Lines(file, kept)
            for line, flush in zip(written, [*flushed, *[False] * 5], strict=False):
                log.write(line)
                if flush:
                    log.flush()
            log.close()
    assert storage.read_text(storage.path(f"{s3}/lines.txt")) == storage.read_text(local)
    local.unlink()
    storage.path(f"{s3}/lines.txt").unlink()


def test_lines_reach_the_store_when_they_are_flushed_and_after_a_while(s3, monkeypatch):
    file, now = storage.path(f"{s3}/slow.txt"), [0.0]
    monkeypatch.setattr(storage.time, "monotonic", lambda: now[0])
    log = storage.Lines(file, 0)
    log.write("a")
    assert storage.read_text(file) == ""
    log.flush()
    assert storage.read_text(file) == "a\n"
    now[0] = 31.0
    log.write("b")
    assert storage.read_text(file) == "a\nb\n"


@given(st.binary(max_size=40), st.integers(1, 50))
def test_the_end_of_a_file(s3, tmp_path_factory, data, size):
    for file in (tmp_path_factory.getbasetemp() / "tail", storage.path(f"{s3}/tail")):
        file.write_bytes(data)
        assert storage.tail(file, size) == data[-size:]


def test_what_is_appended_comes_behind_what_is_there(root):
    file = storage.path(root) / "logs/a.txt"
    for text in ("ä", "b"):
        with storage.appended(file) as here, open(here, "a", encoding="utf-8") as target:
            target.write(text)
    with storage.appended(file):
        pass
    assert storage.read_text(file) == "äb"


def test_texts_are_utf8_in_every_locale(root, monkeypatch):
    monkeypatch.setattr("locale.getencoding", lambda: "latin-1")
    file = storage.path(root) / "texts/ä.txt"
    storage.write_text(file, "漢字 ±")
    assert file.read_bytes() == "漢字 ±".encode() and storage.read_text(file) == "漢字 ±"


def test_nothing_is_left_beside_a_file(root):
    folder = storage.path(root) / "whole"
    storage.write_json(folder / "a.json", {"a": 1})
    storage.write_json(folder / "a.json", {"a": 2})
    assert [file.name for file in folder.iterdir()] == ["a.json"] and storage.read_json(folder / "a.json") == {"a": 2}


def test_tilde_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.path("~/runs") == storage.local("~/runs", "x") == tmp_path / "runs"
    assert storage.path(pathlib.Path("~/runs")) == tmp_path / "runs"
    assert storage.path("runs/~") == epath.Path("runs/~")


def test_tilde_works_in_every_setting_and_flag_that_names_a_path(monkeypatch, tmp_path, tiny_folder):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny_folder, tmp_path / "model")
    assert folders.find("~/model") == tmp_path / "model"
    (tmp_path / "prompts.txt").write_text("hi\n", encoding="utf-8")
    env = configs.default().env
    env.openings = "~/prompts.txt"
    assert prompts.read(env).prompts == ["hi"]
    np.save(tmp_path / "table.npy", np.ones(3))
    assert table("~/table.npy").values.tolist() == [1.0, 1.0, 1.0]
    storage.write_json(tmp_path / "run/config.json", {"fingerprint": "x"})
    assert run_directory.parse("~/run:1@2") == (tmp_path / "run", 1, 2)
    passed = []
    monkeypatch.setattr(command.app, "parse_flags_with_usage", passed.extend)
    command.parse(["train", "--config=~/a.py", "--config.env.end=~"])
    assert passed == ["train", f"--config={tmp_path}/a.py", "--config.env.end=~"]


def test_what_a_store_cannot_hold_says_so(s3, config):
    with pytest.raises(ValueError, match="model.path=s3://bucket/x: this must be a local path"):
        folders.find(f"{s3}/x")
    sweep = plan.Sweep(storage.path(f"{s3}/sweep"), config, [[0]])
    for backend, needed in ((slurm, {"minutes": 1}), (tpu_vm, {"zone": "z", "accelerator": "a", "runtime": "r"})):
        with pytest.raises(ValueError, match=f"--backend={backend.__name__.split('.')[-1]}, .* must be a local path"):
            backend.prepare(sweep, options.Options(**needed))


@pytest.mark.parametrize("text, says", [
    ("memory://x", "memory:// is not known; give a local path, or .* gs://, s3://, az://, hf://"),
    ("file:///x", "file:// is not known"), (pathlib.Path("gs://bucket/x"), "pathlib.Path has taken a / from this")])
def test_an_address_that_is_none_is_named(text, says):
    with pytest.raises(ValueError, match=says):
        storage.path(text)


def test_a_store_without_its_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(ImportError, match="az:// needs another package: pip install 'adlfs'"):
        storage.path("az://container/x")


def test_what_must_be_local_says_so():
    with pytest.raises(ValueError, match="--out=gs://bucket/x: this must be a local path"):
        storage.local("gs://bucket/x", "--out")


def test_paths_of_pathlib_and_of_stores_meet(tmp_path):
    assert storage.is_local(tmp_path) and storage.is_local("C:/x") and not storage.is_local("gs://b/x")
    assert storage.absolute(storage.path("a")) == pathlib.Path(os.getcwd(), "a")
    assert str(storage.absolute(epath.Path("gs://b/x"))) == "gs://b/x"
