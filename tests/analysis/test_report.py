from __future__ import annotations

import json
import re

import numpy as np
import pytest
from small_sweep import ATTACK, summary

from kl_reg.analysis import report
from kl_reg.models import weights
from launch import report as command


def page_of(workdir):
    """The page without the images' data, in which any short word may occur by chance."""
    return re.sub(r"base64,[^\"]+", "", report.write_report(workdir).read_text())


def test_the_page_holds_every_member_and_needs_nothing_else(workdir):
    page = page_of(workdir)
    table = page[page.index("Every run"):page.index("Transcripts")]
    for row in summary()[:-1]:
        assert f"<tr><td>{row['member']}</td>" in table
    assert table.count("<b>mean</b>") == 2
    assert "2.00 <small>± 0.10</small>" in table
    assert page.count("<img") == 4
    for word in ("http", "//", "<script", "url(", "@import", "<link", "<iframe"):
        assert word not in page
    assert ATTACK not in page
    assert sorted(p.name for p in (workdir / "figures").iterdir()) == [
        "empty_turns.png", "frontier.png", "positions.png", "training.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (workdir / "figures").iterdir())


def test_the_page_is_reproducible(workdir):
    assert report.write_report(workdir).read_bytes() == report.write_report(workdir).read_bytes()


def test_the_human_rate_comes_with_the_embedded_model_only(workdir, model_folder, monkeypatch, tmp_path):
    assert "human" not in page_of(workdir)
    monkeypatch.setattr(weights, "EMBEDDED", tmp_path / "assets")
    (tmp_path / "assets").mkdir()
    for file in model_folder.iterdir():
        (tmp_path / "assets" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "assets/card.json").write_text(json.dumps({"human_turns": 400, "human_empty_turns": 4}))
    stored = json.loads((workdir / "config.json").read_text())
    stored["config"]["model"]["path"] = "embedded"
    (workdir / "config.json").write_text(json.dumps(stored))
    assert "human, held out</td><td>1.00 <small>± 0.50</small> %" in page_of(workdir)


@pytest.mark.parametrize("name", ["config.json", "summary.json", "members/2/metrics.jsonl", "members/3/evaluation.npz",
                                  "members/base/evaluation.npz"])
def test_a_missing_file_is_named_with_what_writes_it(workdir, name):
    (workdir / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing: .*launch.sweep"):
        report.write_report(workdir)


@pytest.mark.parametrize(("name", "text", "message"), [
    ("summary.json", "[", "not JSON"), ("summary.json", "[]", "at least one member and 'base'"),
    ("config.json", '{"config": {}}', "expected fingerprint"), ("members/0/metrics.jsonl", "", "is empty"),
    ("members/0/metrics.jsonl", '{"iteration": 0', "line 1, is not JSON"),
    ("members/0/metrics.jsonl", '{"iteration": 0}', "expected return")])
def test_a_file_that_does_not_fit_is_named(workdir, name, text, message):
    (workdir / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        report.write_report(workdir)


def test_an_evaluation_of_unequal_shapes_is_named(workdir):
    file = workdir / "members/1/evaluation.npz"
    with np.load(file) as stored:
        arrays = dict(stored)
    np.savez(file, **{**arrays, "kl": arrays["kl"][:, 1:]})
    with pytest.raises(ValueError, match="members/1/evaluation.npz: expected .* of one shape"):
        report.write_report(workdir)


def test_a_single_member_makes_a_page(workdir):
    rows = [row for row in summary() if row["member"] in (1, "base")]
    (workdir / "summary.json").write_text(json.dumps(rows))
    assert "1 run: 1 setting × 1 seed" in page_of(workdir)


def test_command(workdir, capsys):
    command.main([str(workdir)])
    assert capsys.readouterr().out.strip() == str(workdir / "report.html")
    with pytest.raises(SystemExit, match="nowhere/config.json is missing"):
        command.main([str(workdir / "nowhere")])
