"""A prompt and a completion, by hand and against str.find on the text, with tokenizers of published models."""
import functools
import json
import lzma
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from staging import Stage, letters
from tokenizers import AddedToken, Tokenizer

from kl_reg.pretrained import tokenizer as text
from kl_reg.types import AGENT, OPENING, PAD

DATA = pathlib.Path(__file__).parent.parent / "data" / "tokenizers"
LENGTH = 10
END = 299      # of the tiny model


def stage(tokenizer, **settings):
    return Stage(tokenizer, **{"name": "completion", "length": LENGTH, "opening": "B: hi\nA:"} | settings)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def outcome(reply):
    return reply.text, reply.ids, reply.finished, reply.scored


def test_a_completion_ends_with_the_end_marker_and_nothing_follows(tiny_tokenizer):
    made = stage(tiny_tokenizer, opening="A:\n")      # the opening's newline ends nothing
    roles, turns, tokens = made.play(made.bytes(" xy \nzz"))
    assert letters(roles) == "AAAAA-----" and turns.tolist() == [0] * 5 + [-1] * 5
    (reply,) = made.env.read(made.transcript((roles, turns, tokens)))
    assert outcome(reply) == (" xy ", made.bytes(" xy "), True, True)
    assert (reply.episode, reply.turn, reply.role, reply.prompt, reply.columns) == (0, 0, AGENT, "A:\n", {})
    assert reply.end == made.env.openings.tokens.shape[1] + 4


def test_a_completion_ends_with_an_end_token_or_the_length(tiny_tokenizer):
    made = stage(tiny_tokenizer, end="", eos=frozenset({END, 298}))
    batch = made.transcript(*(made.play([*made.bytes(script), end, *made.bytes("zz")])
                              for script, end in (("x\n", END), ("", 298), ("y" * LENGTH, END))))
    assert [letters(row[-LENGTH:]) for row in batch.roles] == ["AAA" + "-" * 7, "A" + "-" * 9, "A" * LENGTH]
    replies = made.env.read(batch)
    assert [outcome(reply) for reply in replies] == [
        ("x\n", made.bytes("x\n"), True, True), ("", [], True, True), ("y" * 10, made.bytes("y" * 10), False, True)]
    assert [reply.end - batch.tokens.shape[1] + LENGTH for reply in replies] == [2, 0, 9]


def test_what_nothing_ends_is_warned_about(tiny_tokenizer):
    with pytest.warns(UserWarning, match="env.end='': .* no end token, so completions only end at .*env.length=10"):
        made = stage(tiny_tokenizer, end="")
    assert letters(made.play(made.bytes("y\n" * LENGTH))[0]) == "A" * LENGTH
    assert stage(tiny_tokenizer, end="xy").env.ends == frozenset()          # without a warning
    made = stage(tiny_tokenizer, end="xy", eos=frozenset({END}))
    assert made.env.ends == {END} and made.env.markers == set(made.ids("xy"))


def test_with_an_end_marker_end_tokens_end_it_too(tiny_tokenizer):
    made = stage(tiny_tokenizer, end="xy", eos=frozenset({END}))
    roles, turns, tokens = made.play([*made.bytes("x"), END, *made.bytes("y")])
    assert letters(roles) == "AA" + "-" * 8
    assert outcome(made.env.read(made.transcript((roles, turns, tokens)))[0]) == ("x", made.bytes("x"), True, True)


def test_a_token_that_holds_the_end_marker_ends_it_and_belongs_to_it_in_part(tiny_tokenizer):
    tokenizer = Tokenizer.from_str(tiny_tokenizer.to_str())
    tokenizer.add_tokens([AddedToken("!\n", normalized=False)])
    made, merged = stage(tokenizer), tokenizer.token_to_id("!\n")
    roles, turns, tokens = made.play([*made.bytes("x"), merged, *made.bytes("y")])
    assert letters(roles) == "AA" + "-" * 8
    assert outcome(made.env.read(made.transcript((roles, turns, tokens)))[0]) == (
        "x!", [*made.bytes("x"), merged], True, True)


def test_an_agent_that_asks_for_help_at_once_has_said_nothing(tiny_tokenizer):
    made = stage(tiny_tokenizer)
    roles, turns, tokens = (np.full(LENGTH, value) for value in (PAD, -1, 0))
    transcript = made.transcript((roles, turns, tokens))
    (reply,) = made.env.read(transcript)
    assert outcome(reply) == ("", [], False, True)
    assert transcript.roles[0, reply.end] == OPENING and (transcript.roles[0, reply.end + 1:] == PAD).all()


@functools.cache
def real(name):
    """A tokenizer of a published model (tests/data/tokenizers/README.md)."""
    return Tokenizer.from_str(lzma.decompress((DATA / name / "tokenizer.json.xz").read_bytes()).decode())


@pytest.fixture(scope="module", params=[("gpt2", "\n\n"), ("mistral", "</answer>"), ("botchan", " that is")],
                ids=lambda param: param[0])
def published(request):
    name, end = request.param
    return stage(real(name), end=end, eos=frozenset({2}), opening=f"hi{end[:1]}")


@given(st.data())
def test_an_episode_is_over_behind_the_first_end(published, data):
    """What was written up to each token, as one text: str.find says where it ends."""
    end, tokenizer = published.config.end, published.tokenizer
    words = [end, end[:-1], end[1:], *end, "x", " yes", "."]
    numbers = {2: [2], 10**6: [10**6]}      # an end token, and no token at all
    parts = data.draw(st.lists(st.sampled_from([*words, *numbers]), min_size=LENGTH, max_size=LENGTH))
    script = sum((numbers[part] if part in numbers else published.ids(part) for part in parts), [])
    script = (script + published.ids("x") * LENGTH)[:LENGTH]
    roles, turns, tokens = published.play(script)
    (reply,) = published.env.read(published.transcript((roles, turns, tokens)))

    texts = [text.decode(tokenizer, script[:count]) for count in range(LENGTH + 1)]
    ends = [script[i] == 2 or end in texts[i + 1] for i in range(LENGTH)]
    written = ends.index(True) + 1 if any(ends) else LENGTH
    assert roles.tolist() == [AGENT] * written + [PAD] * (LENGTH - written)
    assert tokens[:written].tolist() == script[:written]
    assert (reply.finished, reply.end) == (any(ends), published.env.openings.tokens.shape[1] + written - 1)
    marked = end in texts[written]
    before = written - (any(ends) and not marked)
    assert reply.text == texts[before].partition(end)[0]
    if marked:      # tokens that begin in it are left out
        before = next(i for i, said in enumerate(texts) if len(said) >= len(reply.text))
    assert [token for token in reply.ids if token != 10**6] == [token for token in script[:before] if token != 10**6]


def test_prompts_and_columns_of_a_file_reach_the_reward(tiny_tokenizer, tmp_path):
    rows = [{"prompt": "<|start|>A: hi\nB:", "answer": 1}, {"prompt": "x" * 100, "answer": 2},
            {"prompt": "A: how are you today?\nB:", "answer": 3}]
    with pytest.warns(UserWarning, match="1 of 3 openings are left out"):
        made = stage(tiny_tokenizer, openings=jsonl(tmp_path / "a.jsonl", rows))
    tokens, start = made.env.openings
    kept = [rows[0], rows[2]]
    assert [row[first:].tolist() for row, first in zip(tokens, start, strict=True)] == [
        made.ids(row["prompt"]) for row in kept]
    for number, row in enumerate(kept):
        (reply,) = made.env.read(made.transcript(made.play(made.ids("x\n")), row=number))
        assert (reply.prompt, reply.columns) == (row["prompt"], {"answer": row["answer"]})


def test_an_opening_that_is_nobodys_is_told_as_it_reads(tiny_tokenizer):
    made = stage(tiny_tokenizer, opening="A: hi\nB:")
    transcript = made.transcript(made.play(made.ids("x\n")))._replace(opening=None)
    assert made.env.read(transcript)[0].prompt == "A: hi\nB:"


def test_the_digest_names_the_prompts_that_are_used(tiny_tokenizer, tmp_path):
    assert stage(tiny_tokenizer).env.digest == ""
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]
    source = jsonl(tmp_path / "a.jsonl", rows)
    one = stage(tiny_tokenizer, openings=source).env.digest
    assert one == stage(tiny_tokenizer, openings=jsonl(tmp_path / "b.jsonl", rows)).env.digest and len(one) == 64
    jsonl(tmp_path / "a.jsonl", [rows[0], rows[1] | {"answer": 3}])
    assert stage(tiny_tokenizer, openings=source).env.digest != one


@pytest.fixture
def chat_model(tmp_path, tiny_tokenizer):
    """A tokenizer loaded from a folder with a chat template."""
    folder = tmp_path / "chat"
    folder.mkdir()
    tiny_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|start|>",
        "chat_template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
                         "{% if add_generation_prompt %}<assistant>{% endif %}"}))
    return text.load(folder)


def test_a_chat_is_written_by_the_template_and_told_as_messages(chat_model, tiny_tokenizer, tmp_path):
    chats = [[{"role": "user", "content": "hi"}],
             [{"role": "system", "content": "be brief"}, {"role": "user", "content": "yo"}]]
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": chat} for chat in chats])
    made = stage(chat_model, openings=source, end="", eos=frozenset({END}))
    want = ["<user>hi<|start|><assistant>", "<system>be brief<|start|><user>yo<|start|><assistant>"]
    tokens, start = made.env.openings
    assert [row[first:].tolist() for row, first in zip(tokens, start, strict=True)] == [
        tiny_tokenizer.encode(chat).ids for chat in want]
    reply = made.env.read(made.transcript(made.play([END]), row=1))[0]
    assert reply.prompt == chats[1] and reply.finished


def test_a_chat_that_ends_with_the_assistant_is_continued_or_refused(chat_model, tiny_tokenizer, tmp_path):
    """By hand: the turn is left open, and nothing is asked for a second time."""
    chats = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well, "}],
             [{"role": "user", "content": "yo"}]]
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": chat} for chat in reversed(chats)])
    with pytest.raises(ValueError, match="a.jsonl', line 2: the chat ends with .*assistant.*env.prefill='continue'"):
        stage(chat_model, openings=source, end="")
    made = stage(chat_model, openings=source, end="", eos=frozenset({END}), prefill="continue")
    tokens, start = made.env.openings
    assert [row[first:].tolist() for row, first in zip(tokens, start, strict=True)] == [
        tiny_tokenizer.encode(chat).ids for chat in ("<user>yo<|start|><assistant>",
                                                     "<user>hi<|start|><assistant>well, ")]
    reply = made.env.read(made.transcript(made.play([*made.ids("fine"), END]), row=1))[0]
    assert (reply.prompt, reply.text, reply.finished) == (chats[0], "fine", True)


def test_a_gold_answer_is_refused_in_every_form_of_a_chat(chat_model, tmp_path):
    for chat in ([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}],
                 [{"role": "user", "content": "hi"}, {"role": "model", "content": "yes"}],
                 [{"role": "user", "content": "hi"},
                  {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]):
        with pytest.raises(ValueError, match="line 1: the chat ends with a message of the assistant"):
            stage(chat_model, openings=jsonl(tmp_path / "a.jsonl", [{"prompt": chat}]))


def test_chats_need_a_template(chat_model, tiny_tokenizer, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(ValueError, match="a.jsonl', line 1: this tokenizer was not loaded from a model folder"):
        stage(Tokenizer.from_str(tiny_tokenizer.to_str()), openings=source)
    (chat_model.folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="a.jsonl', line 1: .*has no chat template"):
        stage(chat_model, openings=source)


def test_settings_that_cannot_work_are_named(tiny_tokenizer, tmp_path):
    turns = jsonl(tmp_path / "a.jsonl", [{"prompt": ["hi", "yo"]}])
    texts = jsonl(tmp_path / "b.jsonl", [{"prompt": "hi"}])
    for settings, words in (({"opening": ""}, "env.opening=''"), ({"openings": "held_out"}, "teacher_student"),
                            ({"openings": turns}, "'prompt' is a list of turns, which env.name='teacher_student'"),
                            ({"prefill": "yes"}, "env.prefill='yes': choose '' or 'continue'"),
                            ({"openings": texts, "prefill": "continue"}, "env.prefill='continue'.*'prompt' is a text")):
        with pytest.raises(ValueError, match=words):
            stage(tiny_tokenizer, **settings)
    with pytest.raises(ValueError, match=r"env.end='\\n' gives no tokens"):
        stage(real("botchan"))
