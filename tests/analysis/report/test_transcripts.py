from __future__ import annotations

import html
import html.parser

import numpy as np
import pytest
from small_sweep import ATTACK, arrays

from kl_reg.analysis.report import transcripts
from kl_reg.types import AGENT, OPENING, PAD, STUDENT


class Reader(html.parser.HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def read(page):
    reader = Reader()
    reader.feed(page)
    return reader


def test_model_text_is_shown_and_never_parsed():
    roles = np.array([PAD, OPENING, AGENT, STUDENT])
    pieces = [ATTACK, f'"><img src=x onerror=alert(1)>{ATTACK}', "</div></article>"]
    reader = read(transcripts.episode(pieces, roles, np.array([-1, -1, 0, 1]), np.array([0, 0, 1.5, 0]), 2, 2.0))
    assert reader.text == "".join(pieces)
    assert {tag for tag, _ in reader.tags} == {"div", "i"}
    assert {key for _, attrs in reader.tags for key in attrs} <= {"class", "style", "title"}


def test_tokens_tell_cost_position_and_writer():
    roles = np.array([OPENING, AGENT, STUDENT])
    reader = read(transcripts.episode(["x", "y", "z"], roles, np.array([-1, 0, 1]), np.array([0, 0.5, 0]), 1, 2.0))
    assert [attrs for tag, attrs in reader.tags if tag == "i"] == [
        {"class": "o", "title": "opening"},
        {"class": "a", "style": "--k:0.50", "title": "0.500 nats · position 0 · turn 0 · agent (teacher)"},
        {"class": "s", "title": "position 1 · turn 1 · student"}]


@pytest.mark.parametrize(("text", "shown"), [
    ("a\n", 'a<b class="nl">⏎</b>\n'), ("", "◌"), ("\u202eb\x00", "\\u{202e}b\\u{0}"), ("'", "&#x27;")])
def test_line_breaks_and_invisible_characters_are_visible(text, shown):
    assert transcripts.visible(text) == shown


def test_the_same_episodes_of_every_run(model_folder):
    shown = [(name, {"return": 1.0, "kl/nats_per_episode": nats}, arrays(model_folder, nats))
             for name, nats in (("base", 0.0), ("<b>", 0.5))]
    page = transcripts.folded(shown, lambda ids: ["x"] * len(ids), 2, opened=1)
    assert page.count("Episode 0") == page.count("Episode 1") == 2
    assert "Episode 2" not in page
    assert "&lt;b&gt;" in page


def test_colours_grow_with_cost_up_to_the_ceiling():
    assert [transcripts.shade(nats, 4.0) for nats in (0.0, 1.0, 4.0, 9.0)] == [0.0, 0.5, 1.0, 1.0]
    assert transcripts.shade(0.0, 0.0) == 0.0
