"""An agent that says nothing: the sentences and the picture, against numbers that were written down."""
from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from small_sweep import LINES, arrays, summary

from kl_reg.analysis.report import figures, results, silence, stats
from kl_reg.analysis.report.page import write_report
from kl_reg.pretrained import tokenizer


def silent(workdir, rates):
    """The small sweep with these shares of empty teacher turns, by member."""
    rows = summary()
    for member in rows:
        if member["member"] in rates:
            member["final"]["teacher/silent_rate"] = rates[member["member"]]
    (workdir / "summary.json").write_text(json.dumps(rows))
    return results.read(workdir)


def by_turn(*nats):
    """What the agent's turns cost, nats per episode, each at one position."""
    nats = np.array(nats)
    return stats.ByPosition(nats, nats, nats.cumsum(), nats)


def test_who_has_learned_silence_by_hand(workdir):
    # The settings in order: coef 0 (members 0 and 2), coef 1 (member 1), budget 5 (members 3 and 4).
    sweep = silent(workdir, {"base": 0.125, 0: 0.5, 2: 0.75, 1: 0.2, 3: 1.0, 4: 0.75})
    parts = [by_turn(2.0, 1.0), by_turn(0.5), by_turn(3.0, 0.5, 0.25)]
    budget, free = silence.learned(sweep.settings, sweep.base, parts)
    assert (budget.setting.label, budget.rate, budget.first_turn, budget.spent, budget.remaining) == (
        "budget 5", 0.875, 3.0, 3.75, 1.25)
    assert (free.setting.label, free.rate, free.first_turn, free.spent) == ("coef 0", 0.625, 2.0, 3.0)
    assert np.isnan(free.remaining)
    assert silence.sentence(budget, sweep.base) == (
        "budget 5: the teacher says nothing in 88% of its turns (base 12%). Its first turn costs 3.0 of the 3.8 nats "
        "that it spends in an episode; 1.2 nats of the budget remain.")
    assert silence.sentence(free, sweep.base).endswith("2.0 of the 3.0 nats that it spends in an episode.")


def test_a_base_that_is_silent_itself_has_taught_it(workdir):
    sweep = silent(workdir, {"base": 0.95, **dict.fromkeys(range(5), 1.0)})
    assert silence.learned(sweep.settings, sweep.base, [by_turn(1.0)] * 3) == []


def test_the_page_begins_with_it(workdir):
    silent(workdir, {"base": 0.0, 3: 1.0, 4: 1.0, 0: 0.05, 2: 0.0, 1: 0.0})
    page = write_report(workdir).read_text()
    facts = page[page.index("class=glance"):]
    assert facts.index("<li>budget 5: the teacher says nothing in 100% of its turns (base 0%)") < facts.index("Return:")
    assert page.index("<h2>Silence") < page.index("<h2>Reward against KL") and "Empty teacher turns" not in page
    assert (workdir / "figures/silence.png").read_bytes().startswith(b"\x89PNG")


def test_the_turns_of_an_episode(model_folder):
    loaded = tokenizer.load(model_folder)
    evaluation = arrays(model_folder, 0.5)
    first, student, last = silence.lines(evaluation, lambda ids: tokenizer.pieces(loaded, ids))
    (spoken, reply) = (text.strip() for role, turn, text in LINES if turn in (0, 1) and len(text) > 4)
    assert (first.speaker, first.text, student.speaker, student.text, student.nats) == (
        "teacher", spoken, "student", reply, None)
    assert last == silence.Line("teacher", "", pytest.approx(0.5 * len(tokenizer.encode(loaded, "\n"))))
    assert first.nats == pytest.approx(0.5 * len(tokenizer.encode(loaded, LINES[2][2])))


@pytest.mark.parametrize(("y", "alone"), [([np.nan, 1, np.nan, 2, 3, np.nan, 4], [1, 6]), ([1.0], [0]), ([1, 2], [])])
def test_points_that_no_line_shows_have_a_marker(y, alone, workdir, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, path: kept.append(figure) or path)
    (setting, *_) = results.read(workdir).settings
    y = np.array(y, float)
    figures.draw_positions([setting], [by_turn(1.0)._replace(per_token=y)], tmp_path / "positions.png")
    (figure,) = kept
    assert isinstance(figure, Figure)
    markers = [line for line in figure.axes[0].lines if line.get_linestyle() == "None"]
    assert [list(line.get_xdata()) for line in markers] == [alone]
    assert list(markers[0].get_ydata()) == list(y[alone])
