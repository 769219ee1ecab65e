"""Conversations: cleaning, turns, transcripts, and the split of the real data."""
import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kl_reg.pretrained import chitchat

MESSY = st.text() | st.lists(st.sampled_from(["A", "B", ":", " ", "\n", "\u2028", "x", "A:", "B:"])).map("".join)


def test_consecutive_messages_of_a_sender_are_one_turn():
    texts = [("u", "hi"), ("u", "there"), ("v", "hello"), ("u", "a"), ("u", ""), ("u", "b"), ("v", "")]
    assert chitchat.join_speakers(texts) == ["hi there", "hello", "a b", ""]


def test_an_empty_message_adds_nothing_to_a_turn():
    assert chitchat.join_speakers([("u", ""), ("u", "hi"), ("v", "yo"), ("v", "")]) == ["hi", "yo"]
    assert chitchat.join_speakers([]) == []


@pytest.mark.parametrize(("text", "cleaned"), [
    ("  hi \n\n there\t", "hi there"), ("B: no", "B : no"), ("NASA: yes", "NASA : yes"), ("C: \r\n", "C:"), ("", "")])
def test_clean_by_hand(text, cleaned):
    assert chitchat.clean(text) == cleaned


@given(MESSY)
def test_a_clean_message_is_one_line_and_cannot_pass_for_a_turn(text):
    cleaned = chitchat.clean(text)
    assert len(cleaned.splitlines()) <= 1
    assert "A:" not in cleaned and "B:" not in cleaned
    assert chitchat.clean(cleaned) == cleaned
    assert re.sub(r"\s", "", cleaned) == re.sub(r"\s", "", text)      # whitespace apart, nothing is lost


def test_a_transcript_by_hand():
    assert chitchat.transcript(["hello there", "", "ok"]) == "A: hello there\nB:\nA: ok\n"
    assert chitchat.transcript([]) == ""


@given(st.lists(MESSY.map(chitchat.clean)))
def test_turns_can_be_read_back_from_a_transcript(turns):
    lines = chitchat.transcript(turns).split("\n")
    assert lines.pop() == ""
    assert [line[:2] for line in lines] == ["A:" if i % 2 == 0 else "B:" for i in range(len(turns))]
    assert [line[2:].removeprefix(" ") for line in lines] == turns


def test_the_split_is_that_of_the_identifiers_hash():
    assert hashlib.sha256(b"four").hexdigest().startswith("04ef")     # 0x04ef / 0x10000 = 0.019
    assert chitchat.held_out("four") and not chitchat.held_out("blue")
    assert hashlib.sha256(b"blue").hexdigest().startswith("1647")     # 0.087


def test_one_in_twenty_is_held_out():
    share = sum(chitchat.held_out(f"conversation {i}") for i in range(20000)) / 20000
    assert abs(share - 0.05) < 0.005                                  # three standard deviations


@pytest.fixture(scope="module")
def data():
    return chitchat.load()


def test_the_counts_are_those_of_the_data(data):
    assert data[2] == {"conversations": 7168, "messages": 258145, "empty_messages": 33}


def test_no_conversation_is_in_both_parts(data):
    train, held_out, _ = data
    idents = [conversation.ident for conversation in train + held_out]
    assert len(set(idents)) == len(idents)
    assert 0.04 < len(held_out) / len(idents) < 0.06
    assert all(chitchat.held_out(conversation.ident) for conversation in held_out)


def test_a_conversation_by_hand(data):
    [conversation] = [c for c in data[0] + data[1] if c.ident == "a07edb12-6b91-4138-b11e-02421888d699"]
    assert conversation.turns[:2] == ["Hello How are you doing today?", "whats up MD im doing good how are you doing?"]
    assert conversation.turns[3:5] == ["oh wow haha so you still feel tired huh?", "Yeah"]


def test_every_conversation_has_two_speakers_and_clean_turns(data):
    for conversation in data[0] + data[1]:
        assert len(conversation.turns) > 1
        assert not any(re.search("[AB]:|\n|  ", turn) for turn in conversation.turns)


def test_loading_twice_gives_the_same(data):
    assert chitchat.load() == data
