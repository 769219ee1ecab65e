from __future__ import annotations

import json
import re

import numpy as np
import pytest
from small_sweep import ATTACK, row, summary

from kl_reg.analysis.report import figures
from kl_reg.analysis.report.page import write_report
from kl_reg.pretrained import folders
from launch import report as command


def page_of(workdir):
    """The page without the images' data, in which any short word may occur by chance."""
    return re.sub(r"base64,[^\"]+", "", write_report(workdir).read_text())


def section(page, title):
    """From a heading to the next."""
    return page[page.index(f"<h2>{title}"):].split("<h2>")[1]


def rewrite(workdir, rows=None, stored=(), curve=None, **settings):
    """Changes what the small sweep left: rows of the summary, keys of config.json, its settings, a metric's curve."""
    if rows is not None:
        (workdir / "summary.json").write_text(json.dumps([*rows, summary()[-1]]))
    config = {**json.loads((workdir / "config.json").read_text()), **dict(stored)}
    for key, value in settings.items():
        name, key = key.split("__")
        config["config"].setdefault(name, {})[key] = value
    (workdir / "config.json").write_text(json.dumps(config))
    for file in workdir.glob("members/[0-9]/metrics.jsonl") if curve else ():
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({**line, **curve(line["iteration"])}) + "\n" for line in lines))


def ways(coef=0.1):
    """Controllers with two estimators, of which one is biased, two seeds each; a budget of the same nats."""
    biased = {"kl.controller": "pi", "kl.estimator": "k1", "kl.placement": "loss", "kl.allow_biased": True}
    sound = {"kl.controller": "pi", "kl.estimator": "exact", "kl.placement": "full", "kl.allow_biased": False}
    return [row(0, coef, None, 0, 1.5, 9.0, **biased), row(1, coef, None, 1, 1.7, 10.0, **biased),
            row(2, coef, None, 0, 1.9, 10.0, **sound), row(3, coef, None, 1, 2.2, 11.0, **sound),
            row(4, 0.0, 10.0, 0, 2.0, 10.0, **{**sound, "kl.controller": "fixed"})]


@pytest.fixture
def unseen(monkeypatch):
    """Empty images, to save time."""
    def touch(figure, path):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\x89PNG")
        return path

    monkeypatch.setattr(figures, "save", touch)


@pytest.fixture
def drawn(monkeypatch):
    """By file name, the figures that a report draws."""
    found, save = {}, figures.save

    def keep(figure, path):
        found[path.stem] = figure
        return save(figure, path)

    monkeypatch.setattr(figures, "save", keep)
    return found


def test_ways_to_regularise_are_compared_at_equal_kl(workdir):
    """Returns are 0.3 (-1, 0, 1) around each mean, paired by seed: half of that is left of seed 0, half is seed 1's."""
    rewrite(workdir, ways())
    for member in ways():
        file = workdir / f"members/{member['member']}/evaluation.npz"
        with np.load(file) as stored:
            arrays = dict(stored)
        np.savez(file, **arrays | {"returns": np.float32(member["final"]["return"]) + [-0.3, 0.0, 0.3]})
    page = page_of(workdir)
    assert page.count("<img") == 5 and (workdir / "figures/equal_kl.png").is_file()
    assert "KL term: <b>exact in full</b> or <b>k1 in loss</b>" in page
    shown = section(page, "Reward at equal KL")
    names = ("exact full, pi to 10 nats", "budget 10", "k1 in loss, pi to 10 nats")       # returns 2.05, 2.0, 1.6
    assert re.search(".*".join(f"<tr><td>{name}</td>" for name in names), shown)
    assert "<td>exact full, pi to 10 nats − budget 10</td><td>0.05 <small>± 0.12</small>" in shown
    assert "<td>no</td><td>episodes</td><td>+0.50</td>" in shown


def test_plain_sweeps_have_no_section_that_they_do_not_need(workdir, unseen):
    page = page_of(workdir)
    for title in ("Reward at equal KL", "Where the KL sits", "help per token", "warning>", "counted at"):
        assert title not in page


def test_every_figure_says_what_kl_is_measured_to_and_who_is_biased(workdir, drawn):
    rewrite(workdir, ways(), {"base": "3f2a9c77", "references": {str(i): [] for i in range(5)}})
    page = page_of(workdir)
    warning = "k1 in loss, pi to 10 nats: k1 reverse KL, loss [biased: descends nothing]"
    assert f"<p class=warning>{warning}</p></header>" in page
    assert sorted(drawn) == ["empty_turns", "equal_kl", "frontier", "positions", "training"]
    assert all(figure.get_supxlabel() == warning for figure in drawn.values())
    axes = {name: [text for panel in figure.axes for text in (panel.get_xlabel(), panel.get_ylabel(),
                                                              panel.get_title("left"))]
            for name, figure in drawn.items()}
    assert all(any("KL to the base 3f2a9c" in text for text in axes[name]) for name in drawn if name != "empty_turns")
    assert "to <b>the base 3f2a9c</b>." in page


def test_a_run_without_digests_has_no_fingerprint_and_says_so(workdir, unseen):
    assert "to <b>the base</b> (which weights these are was not recorded)." in page_of(workdir)
    rewrite(workdir, stored={"base": "3f2a9c77", "references": {"0": []}})
    with pytest.raises(ValueError, match="config.json: expected 1, 2, 3, 4"):
        write_report(workdir)


def test_temperature_and_truncation_are_said(workdir, unseen):
    rewrite(workdir, sampling__temperature=0.7, sampling__top_p=0.9)
    assert "counted at <b>temperature 0.7, top_p 0.9</b>" in page_of(workdir)


def test_a_coefficient_that_moves_has_a_panel_and_targets_are_dotted(workdir, drawn):
    rewrite(workdir, ways(), curve=lambda i: {"kl/coef": 0.1 * 2**i})
    rewrite(workdir)
    write_report(workdir)
    panels = drawn["training"].axes
    moving = panels[4]
    assert moving.get_title("left") == "KL coefficient (reward per nat)" and moving.get_yscale() == "log"
    assert [list(line.get_ydata()) for line in moving.lines] == [pytest.approx([0.1, 0.2, 0.4])] * 7
    (target,) = [line for line in panels[1].lines if line.get_linestyle() == ":"]
    assert list(target.get_ydata()) == [10.0, 10.0]


def test_a_coefficient_at_rest_has_no_panel(workdir, drawn):
    rewrite(workdir, curve=lambda i: {"kl/coef": 0.1})
    write_report(workdir)
    assert len(drawn["training"].axes) == 4


def test_where_the_kl_sits(workdir, unseen):
    rows = summary()[:-1]
    for member in rows:
        member["final"] |= {"kl/top1_share": 0.25, "kl/group/first/share": 0.5, "kl/group/first/share_se": 0.01,
                            "kl/group/first/nats_per_token": 2.0, "kl/group/end/share": None,
                            "kl/group/end/share_se": None, "kl/group/<b>/share": 0.125, "kl/group/<b>/share_se": 0.01}
    rows[0]["final"]["kl/group/first/share"] = 0.6
    rewrite(workdir, rows)
    shown = section(page_of(workdir), "Where the KL sits")
    assert ("<th></th><th>first tokens of turns</th><th>end markers</th><th><i>&lt;b&gt;</i></th>"
            "<th>top 1 % of tokens</th>") in shown
    assert "<td>coef 0</td><td>55.0 <small>± 5.0</small> %</td><td>–</td><td>12.50 %</td><td>25.00 %</td>" in shown
    assert "<td>coef 1</td><td>50.0 <small>± 1.0</small> %</td><td>–</td>" in shown


@pytest.mark.parametrize("rate", [0.0, 0.02])
def test_help_is_shown_where_it_is_asked_for(workdir, rate, unseen):
    rows = summary()[:-1]
    for member in rows:
        member["final"] |= {"help/rate_per_token": 0.0, "help/rate_per_token_se": 0.0, "help/asked_rate": 0.25,
                            "help/asked_rate_se": 0.05}
    rows[1]["final"] |= {"help/rate_per_token": rate, "help/rate_per_token_se": 0.001}
    rewrite(workdir, rows)
    (workdir / "summary.json").write_text(json.dumps(
        [*rows, {**summary()[-1], "final": {**summary()[-1]["final"], **rows[0]["final"]}}]))
    shown = section(page_of(workdir), "Every run")
    assert ("help per token" in shown) == (rate > 0)
    cells = "<td>2.00 <small>± 0.10</small> %</td><td>25.0 <small>± 5.0</small> %</td>"
    assert (cells in shown) == (rate > 0)


def test_the_page_holds_every_member_and_needs_nothing_else(workdir):
    page = page_of(workdir)
    table = page[page.index("Every run"):page.index("Transcripts")]
    for member in summary()[:-1]:
        assert f"<tr><td>{member['member']}</td>" in table
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
    assert write_report(workdir).read_bytes() == write_report(workdir).read_bytes()


def test_the_human_rate_comes_with_the_embedded_model_only(workdir, unseen, model_folder, monkeypatch, tmp_path):
    assert "human" not in page_of(workdir)
    monkeypatch.setattr(folders, "EMBEDDED", tmp_path / "assets")
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
        write_report(workdir)


@pytest.mark.parametrize(("name", "text", "message"), [
    ("summary.json", "[", "not JSON"), ("summary.json", "[]", "at least one member and 'base'"),
    ("config.json", '{"config": {}}', "expected fingerprint"), ("members/0/metrics.jsonl", "", "is empty"),
    ("members/0/metrics.jsonl", '{"iteration": 0', "line 1, is not JSON"),
    ("members/0/metrics.jsonl", '{"iteration": 0}', "expected return")])
def test_a_file_that_does_not_fit_is_named(workdir, name, text, message):
    (workdir / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        write_report(workdir)


def test_an_evaluation_of_unequal_shapes_is_named(workdir):
    file = workdir / "members/1/evaluation.npz"
    with np.load(file) as stored:
        arrays = dict(stored)
    np.savez(file, **{**arrays, "kl": arrays["kl"][:, 1:]})
    with pytest.raises(ValueError, match="members/1/evaluation.npz: expected .* of one shape"):
        write_report(workdir)


def test_a_single_member_makes_a_page(workdir):
    rows = [row for row in summary() if row["member"] in (1, "base")]
    (workdir / "summary.json").write_text(json.dumps(rows))
    assert "1 run: 1 setting × 1 seed" in page_of(workdir)


def test_command(workdir, capsys):
    command.main([str(workdir)])
    assert capsys.readouterr().out.strip() == str(workdir / "report.html")
    with pytest.raises(SystemExit, match="2"):
        command.main([str(workdir / "nowhere")])
    assert "nowhere/config.json is missing" in capsys.readouterr().err
