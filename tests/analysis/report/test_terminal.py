"""Transcripts in a terminal, as a terminal would get them."""
from __future__ import annotations

import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kl_reg.analysis.report import terminal
from kl_reg.types import AGENT, FORCED, OPENING, PAD, STUDENT

PIECES = ["<|start|>", "A:", " good", " day", "!\n", "B:", " hi", "\n", "A:", "\n"]
ROLES = [PAD, OPENING, FORCED, AGENT, AGENT, AGENT, FORCED, STUDENT, STUDENT, FORCED, AGENT, PAD]
TURNS = [-1, -1, 0, 0, 0, 0, 1, 1, 1, 2, 2, -1]
NATS = [0, 0, 0, 1.0, 0.25, 4.0, 0, 0, 0, 0, 0.5, 0]


def printed(renderable, width=80, **settings):
    """What a console writes."""
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, **settings).print(renderable)
    return out.getvalue()


def shown(pieces=PIECES):
    return terminal.episode(pieces, np.array(ROLES), np.array(TURNS), np.array(NATS), 4.0)


def test_an_episode_has_the_nats_of_each_turn_of_the_agent():
    assert printed(shown()) == ("<|start|>A: good day!⏎  5.25 nats\n"
                                "B: hi\n"
                                "A:⏎  0.50 nats\n")


@pytest.mark.parametrize("nats, background", [(0.0, "48;2;48;48;48"), (1.0, "48;2;137;43;39"), (4.0, "48;2;226;38;30"),
                                              (9.0, "48;2;226;38;30")])
def test_the_red_of_a_token_is_the_root_of_its_part_of_the_ceiling(nats, background):
    """By hand: halfway from the grey at a quarter of 4 nats."""
    writer = terminal.Writer(4.0)
    writer.token("word", AGENT, nats)
    assert f"{background}mword" in printed(writer.text, force_terminal=True, color_system="truecolor")


def test_the_legend_has_the_reds_of_the_tokens():
    console = Console(force_terminal=True, color_system="truecolor", width=200)
    out = printed(terminal.legend(console, 4.0, "KL"), force_terminal=True, color_system="truecolor", width=200)
    swatches = dict(re.findall(r"(48;2;[\d;]+)m ([\d.+]+) ", out))
    assert swatches["48;2;48;48;48"] == "0" and swatches["48;2;137;43;39"] == "1" and swatches["48;2;226;38;30"] == "4"
    assert list(swatches.values()) == ["0", "0.01", "0.1", "0.3", "1", "3", "4"]
    assert " 4+ " in terminal.legend(console, 4.0, "KL", more=True).plain
    assert "0.01" not in terminal.legend(Console(file=io.StringIO()), 4.0, "KL").plain


def test_only_the_agents_tokens_have_a_background():
    out = printed(shown(), force_terminal=True, color_system="truecolor")
    behind = [match for match in re.findall(r"48;2;[\d;]+m([^\x1b]*)", out) if match]
    assert behind == [" good", " day", "!⏎", "⏎"]


def test_without_colours_it_is_plain_text(monkeypatch):
    """No terminal: nothing but text. NO_COLOR: no colours on a terminal either."""
    assert "\x1b" not in printed(shown())
    monkeypatch.setenv("NO_COLOR", "1")
    out = printed(shown(), force_terminal=True, color_system="truecolor")
    codes = {code for codes in re.findall(r"\x1b\[([\d;]*)m", out) for code in codes.split(";")}
    assert codes <= {"", "0", "2", "3"}        # reset, dim and italic


@pytest.mark.parametrize("width", [12, 20, 40])
def test_lines_are_as_wide_as_the_terminal(width):
    pieces = ["<|start|>", "A:", *[" many words here"] * 2, " unbreakable" * 3 + "!\n", *PIECES[5:]]
    lines = printed(shown(pieces), width).splitlines()
    assert max(map(len, lines)) <= width
    whole = printed(shown(pieces), 500)
    assert "".join("".join(lines).split()) == "".join(whole.split())


@given(st.text(), st.sampled_from([AGENT, STUDENT, OPENING]))
def test_model_text_cannot_steer_the_terminal(piece, role):
    """Escape sequences, direction marks and the like are shown as codes; rich markup and emoji names are text."""
    out = io.StringIO()
    writer = terminal.Writer(1.0, Console(file=out, width=80))
    writer.token(f"[red]:smile:{piece}", role, 0.5)
    writer.end()
    assert out.getvalue().startswith("[red]:smile:")
    assert all(c.isprintable() or c == "\n" for c in out.getvalue())


def test_what_comes_token_by_token_is_what_is_written_at_once():
    out = io.StringIO()
    live, whole = terminal.Writer(4.0, Console(file=out, width=20)), terminal.Writer(4.0)
    for writer in (live, whole):
        for piece, role in zip(PIECES, [role for role in ROLES if role != PAD], strict=True):
            writer.token(piece, role, 1.0)
        writer.note("1 of many notes, wider than the line")
        writer.end()
    assert out.getvalue() == whole.text.plain
    assert whole.text.plain.endswith("A:⏎  1 of many notes, wider than the line\n")


@pytest.mark.parametrize("role, piece, text", [(AGENT, "", "◌"), (STUDENT, "", ""), (AGENT, "\n\n", "⏎\n⏎\n"),
                                               (STUDENT, "a\n", "a\n"), (AGENT, "\x1b[2J", "\\u{1b}[2J")])
def test_what_cannot_be_seen_is_shown(role, piece, text):
    assert terminal.visible(piece, role) == text
