"""Turns of the teacher-student environment in whatever tokens they are written, and with published tokenizers."""
import functools
import lzma
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from staging import LENGTH, Stage, digits, letters, said
from tokenizers import AddedToken, Tokenizer

from kl_reg.pretrained import tokenizer as text
from kl_reg.types import AGENT, STUDENT

DATA = pathlib.Path(__file__).parent.parent / "data" / "tokenizers"


def with_tokens(tokenizer, *tokens):
    """A copy with more tokens, and their numbers."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return copy, [copy.token_to_id(token) for token in tokens]


def test_what_follows_a_written_prefix_in_its_token_is_the_next_speakers(tiny_tokenizer):
    tokenizer, [colon, newlines] = with_tokens(tiny_tokenizer, ":\n", "z\n\n")
    stage = Stage(tokenizer, length=16, markers="written", teacher="A:", student="S:")
    # The agent's ":\n" completes the prefix and brings the newline of "\nA:", so that the student's "A:" is a reply of
    # nothing; "yA:" behind the second ":\n" is none.
    roles, turns, tokens = stage.play([*stage.bytes("x\nS"), colon, *stage.bytes("A:"), newlines, *stage.bytes("S"),
                                       colon, *stage.bytes("yA:\nA:q")])
    assert said(tokenizer, tokens) == "x\nS:\nA:z\n\nS:\nyA:\nA:q"
    assert letters(roles) == "AAAASSAAASSSSSSA"
    assert digits(turns) == "0000112223333334"
    replies = stage.env.read(stage.transcript((roles, turns, tokens)))
    assert [(r.role, r.text, r.finished) for r in replies[:4]] == [
        (AGENT, "x", True), (STUDENT, "", True), (AGENT, "z", True), (STUDENT, "yA:", True)]
    assert [len(r.ids) for r in replies[:4]] == [1, 0, 1, 3]


def test_a_written_prefix_that_ended_a_turn_does_not_count_again(tiny_tokenizer):
    stage = Stage(tiny_tokenizer, length=10, markers="written", end=":", teacher="A:", student="B:")
    roles, _, _ = stage.play(stage.ids("x:") + stage.ids("B:") + stage.ids("A:") + stage.ids("y:") + stage.ids("A:"))
    assert letters(roles[:7]) == "AAASSSS"      # "B:" and then "A:" is no ":A:" of the student's
    assert letters(roles[7:]) == "AAA"


def test_one_token_ends_one_turn_at_most(tiny_tokenizer):
    tokenizer, [both] = with_tokens(tiny_tokenizer, "S:\nA:")
    stage = Stage(tokenizer, length=6, markers="written", student="S:")
    for ending, written, finished in ((stage.ids("\nA:w"), "AASSSA", True), (stage.bytes("zzz"), "AASSSS", False)):
        roles, turns, tokens = stage.play([*stage.bytes("\n"), both, *stage.bytes("y"), *ending])
        assert letters(roles) == written
        reply = stage.env.read(stage.transcript((roles, turns, tokens)))[1]
        assert (reply.text, reply.finished) == ("A:y" if finished else "A:yzzz", finished)


def test_an_end_marker_inside_a_forced_prefix_ends_nothing(tiny_tokenizer):
    stage = Stage(tiny_tokenizer, length=7, student="\nB")
    roles, turns, tokens = stage.play(stage.bytes("x\nyz\n"))
    assert letters(roles) == "AAFFSSS" and digits(turns) == "0011111"


def test_the_rest_of_a_token_is_lost_where_the_environment_writes_the_prefix(tiny_tokenizer):
    tokenizer, [merged] = with_tokens(tiny_tokenizer, "!\na")
    stage = Stage(tokenizer, length=8, end="\na")
    roles, turns, tokens = stage.play([merged, *stage.bytes("a\n"), *stage.bytes("a")])
    assert letters(roles) == "AFSSSFAA"
    replies = stage.env.read(stage.transcript((roles, turns, tokens)))
    assert [(r.text, r.ids) for r in replies[:2]] == [("!", [merged]), ("a", stage.bytes("a"))]


@functools.cache
def real(name):
    """A tokenizer of a published model (tests/data/tokenizers/README.md)."""
    return Tokenizer.from_str(lzma.decompress((DATA / name / "tokenizer.json.xz").read_bytes()).decode())


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_each_tokenisation_of_a_newline_ends_a_turn(name):
    stage = Stage(real(name), length=12, opening="B:\n")
    ways = {"gpt2": [["Ċ"], ["ĊĊ"], ["Ġ", "Ċ"], [".", "ĊĊ"]], "mistral": [["<0x0A>"], ["▁", "<0x0A>"], [".", "<0x0A>"]]}
    words = {"gpt2": ["Ġhi"], "mistral": ["▁hi"]}[name]
    for way in ways[name]:
        script = [stage.tokenizer.token_to_id(token) for token in (words + way) * 2]
        roles, turns, tokens = stage.play(script)
        own = len(words + way)
        assert letters(roles[:2 * own + 4]) == "A" * own + "FF" + "S" * own + "FF"
        replies = stage.env.read(stage.transcript((roles, turns, tokens)))
        assert [(r.text, r.finished) for r in replies[:2]] == [("hi." if "." in way else "hi", True)] * 2
        assert replies[1].prompt.endswith("B:")


@pytest.fixture(scope="module", params=["gpt2", "mistral"])
def paper(request):
    """The paper's markers with a real tokenizer."""
    return Stage(real(request.param), markers="written", end="\n", teacher=" Teacher:", student=" Student:")


@given(st.data())
def test_the_speaker_is_the_one_whose_written_marker_came_last(paper, data):
    """The paper's rule, by str.rfind, for text that is cut into tokens anywhere."""
    words = ["\n", " Teacher", ":", "\n Teacher:", " Student", "\n Student:", " Te", "acher", "\n\n", " ", "x"]
    parts = data.draw(st.lists(st.lists(st.sampled_from(words), min_size=1, max_size=4).map("".join), min_size=1))
    script = sum((paper.ids(part) for part in parts), [])[:LENGTH]
    roles, turns, tokens = paper.play(script)
    spoken, speakers = "\n Teacher:", []
    for i in range(len(script)):
        speakers.append(STUDENT if spoken.rfind("\n Student:") > spoken.rfind("\n Teacher:") else AGENT)
        spoken = "\n Teacher:" + text.decode(paper.tokenizer, script[:i + 1])
    assert roles[:len(script)].tolist() == speakers
    assert turns[:len(script)].tolist() == np.cumsum(np.diff(speakers, prepend=AGENT) != 0).tolist()


@pytest.mark.parametrize("opening", ["", "<s>"])
def test_an_opening_has_one_bos_where_the_tokenizer_adds_one(opening):
    stage = Stage(real("mistral"), opening=opening)
    assert stage.env.openings.tokens.tolist() == [stage.tokenizer.encode("A:").ids]


def test_an_opening_has_the_tokens_of_one_text():
    """GPT-2's pattern leaves the last newline before a word to that word."""
    stage = Stage(real("gpt2"), opening="B: hi\n\n", teacher="Teacher:", end="\n\n")
    tokens = [stage.tokenizer.id_to_token(token) for token in stage.env.openings.tokens[0]]
    assert tokens == stage.tokenizer.encode("B: hi\n\nTeacher:").tokens
    assert tokens.count("Ċ") == 2 and len(stage.ids("\n\n")) == 1


def test_a_number_that_is_no_token_is_nobodys_marker(tiny_tokenizer):
    stage = Stage(tiny_tokenizer, length=5, end="xy")
    roles, turns, tokens = stage.play([*stage.bytes("x"), 5000, *stage.bytes("yz")])
    assert letters(roles) == "AAAFS"
    reply = stage.env.read(stage.transcript((roles, turns, tokens)))[0]
    assert (reply.text, reply.finished) == ("", True)


def test_a_marker_that_the_tokenizer_cannot_write_is_named():
    with pytest.raises(ValueError, match=r"env.end='\\n' gives no tokens"):
        Stage(real("botchan"))
    with pytest.raises(ValueError, match="env.teacher='A:' comes back from the model's tokenizer as ' A:'"):
        Stage(real("botchan"), end=" .")
