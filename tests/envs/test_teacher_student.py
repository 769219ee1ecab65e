"""The teacher-student environment, driven by hand and by random tokens."""
import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from staging import LENGTH, Stage, digits, letters, said
from tokenizers import AddedToken, Tokenizer

from kl_reg.types import AGENT, FORCED, PAD, STUDENT


def test_forced_markers_by_hand(tiny_tokenizer):
    stage = Stage(tiny_tokenizer, length=11)
    roles, turns, tokens = stage.play(stage.bytes("xy\nz\n\nww"))
    assert letters(roles) == "AAAFSSFAFSS"
    assert digits(turns) == "00011122333"
    assert said(tiny_tokenizer, tokens) == "xy\nB:z\nA:\nB:ww"
    replies = stage.env.read(stage.transcript((roles, turns, tokens)))
    first = stage.env.openings.tokens.shape[1]
    assert [(r.episode, r.turn, r.role, r.end - first, r.text, r.prompt, r.finished) for r in replies] == [
        (0, 0, AGENT, 2, "xy", "<|start|>A:", True),
        (0, 1, STUDENT, 5, "z", "<|start|>A:xy\nB:", True),
        (0, 2, AGENT, 7, "", "<|start|>A:xy\nB:z\nA:", True),
        (0, 3, STUDENT, 10, "ww", "<|start|>A:xy\nB:z\nA:\nB:", False)]
    assert [r.ids for r in replies] == [stage.bytes("xy"), stage.bytes("z"), [], stage.bytes("ww")]


def test_markers_of_several_tokens_by_hand(tiny_tokenizer):
    stage = Stage(tiny_tokenizer, length=40, end="\n\n", teacher="Teacher:", student="Student:")
    teacher, student = len(stage.ids("Teacher:")), len(stage.ids("Student:"))
    assert teacher > 1 and student > 1 and len(stage.ids("\n\n")) == 2
    roles, turns, tokens = stage.play(stage.bytes("x\n\ny\nz\n\n\n\nw\n"))
    expected = [("A", 3, 0), ("F", student, 1), ("S", 5, 1), ("F", teacher, 2), ("A", 2, 2), ("F", student, 3)]
    count = sum(count for _, count, _ in expected)
    expected += [("S", 40 - count, 3)]
    assert letters(roles) == "".join(letter * count for letter, count, _ in expected)
    assert digits(turns) == "".join(str(turn) * count for _, count, turn in expected)
    assert said(tiny_tokenizer, tokens[:count + 2]) == "x\n\nStudent:y\nz\n\nTeacher:\n\nStudent:w\n"
    replies = stage.env.read(stage.transcript((roles, turns, tokens)))
    assert [(r.text, r.finished) for r in replies][:3] == [("x", True), ("y\nz", True), ("", True)]
    assert replies[1].prompt == "<|start|>Teacher:x\n\nStudent:"
    assert not replies[3].finished


def test_written_markers_by_hand(tiny_tokenizer):
    stage = Stage(tiny_tokenizer, length=12, markers="written")
    roles, turns, tokens = stage.play(stage.ids("x\nB:y\nz\nA:\nB:w"))
    assert letters(roles[:11]) == "AAASSSSSAAS"
    assert digits(turns[:11]) == "00011111223"
    assert said(tiny_tokenizer, tokens[:11]) == "x\nB:y\nz\nA:\nB:w"
    replies = stage.env.read(stage.transcript((roles, turns, tokens)))
    assert [(r.role, r.text, r.finished) for r in replies[:3]] == [
        (AGENT, "x", True), (STUDENT, "y\nz", True), (AGENT, "", True)]
    assert replies[1].prompt == "<|start|>A:x\nB:"
    assert not replies[3].finished


def test_written_markers_end_only_the_turn_of_the_other_speakers_prefix(tiny_tokenizer):
    stage = Stage(tiny_tokenizer, length=8, markers="written")
    roles, _, _ = stage.play(stage.ids("x\nA:y\nB:z\nB:"))    # the agent's "\nA:" and the student's "\nB:" end nothing
    assert letters(roles) == "AAAAAASS"


def test_an_end_marker_must_be_the_writers_own(tiny_tokenizer):
    stage = Stage(tiny_tokenizer, length=9, end="\n\n", student="B:\n")
    roles, _, tokens = stage.play(stage.bytes("\n\n\ny\n\n"))    # the prefix's newline and the student's end nothing
    assert letters(roles) == "AAFFSSSSF"
    assert said(tiny_tokenizer, tokens) == "\n\nB:\n\ny\n\nA:"


@pytest.mark.parametrize(("markers", "script", "whole"), [("forced", "\nz\n", 4), ("written", "\nB:z\nA:", 5)])
def test_a_reply_is_finished_exactly_if_the_episode_holds_its_end_marker(tiny_tokenizer, markers, script, whole):
    for length in (whole - 1, whole):
        stage = Stage(tiny_tokenizer, length=length, markers=markers)
        reply = stage.env.read(stage.transcript(stage.play(stage.ids(script))))[1]
        assert (reply.role, reply.finished, reply.text) == (STUDENT, length == whole, "z")


def test_episodes_of_a_batch_are_read_one_by_one(tiny_tokenizer):
    stage = Stage(tiny_tokenizer, length=6)
    batch = stage.transcript(*(stage.play(stage.bytes(script)) for script in ("xx\nyy", "\n\n\n\n", "xxxxxx")))
    assert [(r.episode, r.turn, r.text, r.finished) for r in stage.env.read(batch)] == [
        (0, 0, "xx", True), (0, 1, "yy", False), (1, 0, "", True), (1, 1, "", True), (1, 2, "", True),
        (2, 0, "xxxxxx", False)]


SETTINGS = [{}, {"markers": "written"}, {"end": "\n\n", "teacher": "A:", "student": "Student:\n"},
            {"end": "ab", "teacher": "Teacher:", "student": "ba", "markers": "written"}]


@pytest.fixture(scope="module", params=SETTINGS, ids=["forced", "written", "forced-long", "written-long"])
def stage(request, tiny_tokenizer):
    return Stage(tiny_tokenizer, **request.param)


def ends_with(ids, end):
    return list(ids[-len(end):]) == end


@given(st.data())
def test_no_stream_of_tokens_breaks_the_rules(stage, data):
    config = stage.config
    end, teacher, student = stage.ids(config.end), stage.ids(config.teacher), stage.ids(config.student)
    words = [end, teacher, student, end + teacher, end + student, *([x] for x in end + student), stage.ids("x")]
    script = sum(data.draw(st.lists(st.sampled_from(words), min_size=LENGTH, max_size=LENGTH)), [])
    roles, turns, tokens = stage.play(script)

    forced = config.markers == "forced"
    terminators = [end, end] if forced else [end + student, end + teacher]
    prefixes = [teacher, student] if forced else [[], []]
    assert turns[0] == 0 and set(np.diff(turns)) <= {0, 1}
    assert tokens[roles != FORCED].tolist() == script[:(roles != FORCED).sum()]
    for turn in range(turns[-1] + 1):
        mine = turns == turn
        prefix = prefixes[turn % 2] if turn else []
        assert tokens[mine][:len(prefix)].tolist() == prefix[:mine.sum()]
        writer = AGENT if turn % 2 == 0 else STUDENT
        assert roles[mine].tolist() == ([FORCED] * len(prefix) + [writer] * LENGTH)[:mine.sum()]
        own = tokens[mine][len(prefix):].tolist()
        assert not any(ends_with(own[:i], terminators[turn % 2]) for i in range(len(own)))
        assert turn == turns[-1] or ends_with(own, terminators[turn % 2])


@given(st.data())
def test_what_is_read_is_what_was_said(stage, data):
    words = [*([x] for x in stage.ids(stage.config.end)), *([x] for x in stage.ids(stage.config.student)),
             *([x] for x in stage.ids(stage.config.teacher)), stage.ids("x"), stage.ids(" y")]
    script = sum(data.draw(st.lists(st.sampled_from(words), min_size=LENGTH, max_size=LENGTH)), [])
    transcript = stage.transcript(stage.play(script))
    replies = stage.env.read(transcript)
    tokens, roles, turns = transcript.tokens[0], transcript.roles[0], transcript.turns[0]
    assert [r.turn for r in replies] == sorted(set(turns[(roles == AGENT) | (roles == STUDENT)].tolist()))
    end, teacher, student = (stage.ids(stage.config[name]) for name in ("end", "teacher", "student"))
    for reply in replies:
        slots = np.flatnonzero((turns == reply.turn) & (roles != FORCED))
        terminator = end + {"forced": [], "written": student if reply.role == AGENT else teacher}[stage.config.markers]
        assert reply.ids + terminator * reply.finished == tokens[slots].tolist()
        assert reply.finished == ends_with(tokens[slots], terminator)
        assert (reply.end, reply.role) == (slots[-1], roles[slots[0]])
        assert reply.prompt == said(stage.tokenizer, tokens[:slots[0]])


def test_a_fixed_opening_ends_with_the_teachers_prefix(tiny_tokenizer):
    stage = Stage(tiny_tokenizer, opening="<|start|>A: hi\n", teacher="Teacher:")
    assert stage.env.openings.tokens.tolist() == [stage.ids("<|start|>A: hi\n") + stage.ids("Teacher:")]
    assert stage.env.openings.start.tolist() == [0]


@pytest.fixture
def held_out(tmp_path, monkeypatch):
    """Three conversations in place of the embedded ones: short, long, and one with an empty turn."""
    conversations = [["hi", "yo", "not to be seen"], ["hello " * 30, "ok"], ["", "good day", "no", "no"]]
    lines = [json.dumps({"ident": str(i), "turns": turns}) for i, turns in enumerate(conversations)]
    (tmp_path / "held_out.jsonl").write_text("\n".join(lines) + "\n")
    module = sys.modules["kl_reg.envs.teacher_student"]       # the package's attribute of that name is the function
    monkeypatch.setattr(module, "EMBEDDED", tmp_path)


def test_held_out_openings_are_left_padded_and_the_long_left_out(tiny_tokenizer, held_out):
    stage = Stage(tiny_tokenizer, openings="held_out", opening_tokens=20)
    rows = [stage.ids(x) for x in ("<|start|>A: hi\nB: yo\nA:", "<|start|>A:\nB: good day\nA:")]
    width = max(map(len, rows))
    assert len(rows[0]) != len(rows[1])
    tokens, start = stage.env.openings
    assert start.tolist() == [width - len(row) for row in rows]
    assert [row[first:].tolist() for row, first in zip(tokens, start, strict=True)] == rows


def test_the_prompt_of_a_padded_episode_leaves_padding_out(tiny_tokenizer, held_out):
    stage = Stage(tiny_tokenizer, openings="held_out", opening_tokens=20, length=4)
    padded = int(stage.env.openings.start.argmax())
    assert stage.env.openings.start[padded] > 0
    reply = stage.env.read(stage.transcript(stage.play(stage.bytes("x\ny")), row=padded))[0]
    assert reply.prompt == ["<|start|>A: hi\nB: yo\nA:", "<|start|>A:\nB: good day\nA:"][padded]


def test_a_longer_allowance_lets_the_long_opening_in(tiny_tokenizer, held_out):
    stage = Stage(tiny_tokenizer, openings="held_out", opening_tokens=400)
    assert len(stage.env.openings.start) == 3


def test_opening_turns_counts_the_turns_that_are_taken(tiny_tokenizer, held_out):
    stage = Stage(tiny_tokenizer, openings="held_out", opening_turns=0)
    assert stage.env.openings.tokens.tolist() == [stage.ids("<|start|>A:")] * 3


@pytest.mark.parametrize(("settings", "words"), [
    ({"markers": "none"}, "env.markers='none'.*forced.*written"),
    ({"openings": "mine"}, "env.openings='mine'.*fixed.*held_out"),
    ({"end": ""}, "env.end=''"), ({"teacher": ""}, "env.teacher=''"), ({"student": ""}, "env.student=''"),
    ({"opening": ""}, "env.opening=''"),
    ({"openings": "held_out", "opening_tokens": 3}, "env.opening_tokens")])
def test_a_setting_that_cannot_work_is_named(tiny_tokenizer, held_out, settings, words):
    with pytest.raises(ValueError, match=words):
        Stage(tiny_tokenizer, **settings)


def test_a_token_that_contains_the_end_marker_ends_the_turn(tiny_tokenizer):
    """Many vocabularies have "!\\n" as one token."""
    tokenizer = Tokenizer.from_str(tiny_tokenizer.to_str())
    tokenizer.add_tokens([AddedToken("!\n", normalized=False)])
    stage, merged = Stage(tokenizer), tokenizer.token_to_id("!\n")
    episode = stage.play([*stage.bytes("hi"), merged, *stage.bytes("yo"), merged, *stage.bytes("so")])
    replies = stage.env.read(stage.transcript(episode))
    assert [(reply.text, reply.finished) for reply in replies[:2]] == [("hi!", True), ("yo!", True)]
    assert replies[2].text.startswith("so") and not replies[2].finished


def test_an_episode_is_over_behind_its_turns(tiny_tokenizer):
    for turns, roles, numbers in ((1, "AA" + "-" * 7, "00"), (3, "AAFSSFA--", "0011122"), (4, "AAFSSFAFS", "001112233"),
                                  (0, "AAFSSFAFS", "001112233")):
        stage = Stage(tiny_tokenizer, length=9, turns=turns)
        episode = stage.play(stage.bytes("x\ny\n\nzz"))
        assert letters(episode[0]) == roles and episode[1].tolist() == [*map(int, numbers)] + [-1] * (9 - len(numbers))
        replies = stage.env.read(stage.transcript(episode))
        assert [(r.text, r.finished, r.scored) for r in replies] == [
            ("x", True, False), ("y", True, True), ("", True, False), ("z", False, False)][:turns or 4]


@pytest.fixture(scope="module")
def endless_and_three_turns(tiny_tokenizer):
    return [Stage(tiny_tokenizer, length=9, turns=turns) for turns in (0, 3)]


@given(st.data())
def test_turns_cut_an_episode_and_change_nothing_before(endless_and_three_turns, data):
    endless, three = endless_and_three_turns
    script = data.draw(st.lists(st.sampled_from(endless.bytes("x\nA:")), min_size=9, max_size=9))
    before = endless.play(script)[1] < 3
    for whole, cut, nobody in zip(endless.play(script), three.play(script), (PAD, -1, 0), strict=True):
        assert cut.tolist() == np.where(before, whole, nobody).tolist()


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(stage):
    tokens, start = stage.env.openings
    return [row[first:].tolist() for row, first in zip(tokens, start, strict=True)]


def test_texts_of_a_file_are_openings_in_front_of_the_teachers_prefix(tiny_tokenizer, tmp_path):
    rows = [{"prompt": "A: hi\nB: yo\n", "topic": "greeting"}, {"prompt": "x" * 90, "topic": "long"},
            {"prompt": "B: so\n", "topic": "nothing"}]
    with pytest.warns(UserWarning, match="1 of 3 openings are left out"):
        stage = Stage(tiny_tokenizer, openings=jsonl(tmp_path / "a.jsonl", rows))
    kept = [rows[0], rows[2]]
    assert rows_of(stage) == [stage.ids(row["prompt"] + "A:") for row in kept]
    for number, row in enumerate(kept):
        replies = stage.env.read(stage.transcript(stage.play(stage.bytes("x\ny\n")), row=number))
        assert {reply.columns["topic"] for reply in replies} == {row["topic"]}
        assert replies[1].prompt == row["prompt"] + "A:x\nB:"
    assert len(stage.env.digest) == 64 and Stage(tiny_tokenizer).env.digest == ""


def test_lists_of_turns_are_openings_as_held_out_conversations_are(tiny_tokenizer, tmp_path, held_out):
    conversations = [["hi", "yo", "not to be seen"], ["", "good day", "no", "no"]]
    source = jsonl(tmp_path / "a.jsonl", [{"said": turns} for turns in conversations])
    stage = Stage(tiny_tokenizer, openings=source, column="said")
    assert rows_of(stage) == rows_of(Stage(tiny_tokenizer, openings="held_out", opening_tokens=20))
    with pytest.raises(ValueError, match="env.opening_turns=1 must be even"):
        Stage(tiny_tokenizer, openings=source, column="said", opening_turns=1)


def test_chats_are_not_of_this_environment(tiny_tokenizer, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(ValueError, match="'prompt' is a chat, which env.name='completion' takes"):
        Stage(tiny_tokenizer, openings=source)


@pytest.mark.parametrize("markers", ["forced", "written"])
def test_a_reply_is_cut_at_its_limit_and_counts_as_finished(tiny_tokenizer, markers):
    """Three tokens of the student; the environment then writes the end marker and the agent's prefix, and the agent's
    own turns have no limit."""
    stage = Stage(tiny_tokenizer, length=20, markers=markers, reply_limit=3)
    script = "abcd\nB:uvwefgh\nB:" if markers == "written" else "abcd\nuvwefgh\n"
    roles, turns, tokens = stage.play(stage.bytes(script))
    end = said(tiny_tokenizer, tokens)
    assert end.startswith("abcd\nB:uvw\nA:efgh\n")
    replies = stage.env.read(stage.transcript((roles, turns, tokens)))
    assert [(r.role, r.text, r.finished, r.scored) for r in replies[:3]] == [
        (AGENT, "abcd", True, False), (STUDENT, "uvw", True, True), (AGENT, "efgh", True, False)]


@pytest.mark.parametrize("markers", ["forced", "written"])
def test_the_models_end_tokens_end_a_turn_of_either_speaker(tiny_tokenizer, markers):
    """As its marker would: the environment writes end marker and prefix; the end token is no part of the text."""
    eos = tiny_tokenizer.token_to_id("<|start|>")
    stage = Stage(tiny_tokenizer, length=18, eos=frozenset([eos]), markers=markers, end_tokens=True)
    script = [*stage.bytes("ab"), eos, *stage.bytes("uv"), eos, eos, *stage.bytes("x")]
    roles, turns, tokens = stage.play(script)
    assert said(tiny_tokenizer, tokens).startswith("ab<|start|>\nB:uv<|start|>\nA:<|start|>\nB:x")
    replies = stage.env.read(stage.transcript((roles, turns, tokens)))
    assert [(r.role, r.text, r.finished, r.scored) for r in replies[:3]] == [
        (AGENT, "ab", True, False), (STUDENT, "uv", True, True), (AGENT, "", True, False)]
    assert replies[1].ids == stage.bytes("uv")
    with pytest.raises(ValueError, match="env.end_tokens=True: neither the model's config.json"):
        Stage(tiny_tokenizer, end_tokens=True)


def test_after_a_cut_written_markers_are_looked_for_as_before(tiny_tokenizer):
    eos = tiny_tokenizer.token_to_id("<|start|>")
    stage = Stage(tiny_tokenizer, length=22, eos=frozenset([eos]), markers="written", end_tokens=True)
    roles, _, tokens = stage.play([*stage.bytes("a"), eos, *stage.bytes("u\nA:b\nB:v\nA:")])
    assert said(tiny_tokenizer, tokens).startswith("a<|start|>\nB:u\nA:b\nB:v\nA:")
    assert letters(roles).startswith("AAFFF"[:2]) and letters(roles)[2] == "F" and "S" in letters(roles)
    assert letters(roles)[-1] == "A"


def test_an_opening_may_end_inside_the_agents_turn(tiny_tokenizer):
    stage = Stage(tiny_tokenizer, length=6, opening="B: hi\nA: Do you", opening_unfinished=True)
    assert said(tiny_tokenizer, stage.env.openings.tokens[0]) == "B: hi\nA: Do you"
    roles, turns, tokens = stage.play(stage.bytes(" x\ny\n"))
    replies = stage.env.read(stage.transcript((roles, turns, tokens)))
    assert letters(roles).startswith("AAA") and replies[0].text == "x" and replies[0].prompt == "B: hi\nA: Do you"
