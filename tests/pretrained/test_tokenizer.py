"""Text to tokens and back, with tokenizers of published models (tests/data/tokenizers/README.md)."""
import importlib.util
import json
import lzma
import pathlib
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer

from kl_reg.pretrained import folders, tokenizer

DATA = pathlib.Path(__file__).parent.parent / "data" / "tokenizers"
TEXT = st.text() | st.lists(st.sampled_from(["A:", "B:", "\n", "<|start|>", " ", "hello", "é", "😀", "\ufffd"])
                            ).map("".join)


@given(TEXT)
def test_text_survives_the_round_trip(tiny_tokenizer, text):
    assert tokenizer.decode(tiny_tokenizer, tokenizer.encode(tiny_tokenizer, text)) == text


@given(TEXT)
def test_the_pieces_of_a_text_concatenate_to_it(tiny_tokenizer, text):
    ids = tokenizer.encode(tiny_tokenizer, text)
    pieces = tokenizer.pieces(tiny_tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


@given(st.lists(st.integers(0, 299), max_size=20))
def test_the_pieces_of_any_tokens_concatenate_to_their_text(tiny_tokenizer, ids):
    ids = [i % tiny_tokenizer.get_vocab_size() for i in ids]
    pieces = tokenizer.pieces(tiny_tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(tiny_tokenizer, ids)


def test_a_character_split_over_tokens_comes_with_its_last(tiny_tokenizer):
    ids = tokenizer.encode(tiny_tokenizer, "x😀\n")
    assert tokenizer.pieces(tiny_tokenizer, ids) == ["x", "", "", "", "😀", "\n"]


@pytest.mark.parametrize("marker", ["A:", "B:", "\n", "<|start|>"])
def test_a_marker_is_one_token_wherever_it_stands(tiny_tokenizer, marker):
    [one] = tokenizer.encode(tiny_tokenizer, marker)
    for text in (f"hello{marker}", f"{marker} hello", f"a{marker}{marker}b", f"you? {marker}\n"):
        ids = tokenizer.encode(tiny_tokenizer, text)
        assert ids.count(one) == text.count(marker)
        assert all(marker not in piece or piece == marker for piece in tokenizer.pieces(tiny_tokenizer, ids))


def test_no_special_tokens_are_added(tiny_tokenizer):
    assert tokenizer.encode(tiny_tokenizer, "") == []
    start = tokenizer.encode(tiny_tokenizer, tokenizer.START)
    assert not set(start) & set(tokenizer.encode(tiny_tokenizer, "A: hello\n"))


def test_a_tokenizer_is_loaded_as_it_was_saved(tiny_folder, tiny_tokenizer):
    assert tokenizer.load(tiny_folder).to_str() == tiny_tokenizer.to_str()


def test_common_text_is_merged():
    trained = tokenizer.train(["hello hello hello\n"] * 5, 280, ["A:"])
    assert tokenizer.pieces(trained, tokenizer.encode(trained, "A: hello\n")) == ["A:", " hello", "\n"]
    assert trained.get_vocab_size() <= 280


def test_rows_are_padded_on_the_left_by_hand():
    tokens, start = tokenizer.left_pad([[1, 2, 3], [4], [5, 6]])
    assert tokens.tolist() == [[1, 2, 3], [0, 0, 4], [0, 5, 6]]
    assert start.tolist() == [0, 2, 1]


def raw(name):
    return lzma.decompress((DATA / name / "tokenizer.json.xz").read_bytes()).decode()


@pytest.fixture(scope="module")
def gpt2():
    return Tokenizer.from_str(raw("gpt2"))


@pytest.fixture(scope="module")
def mistral():
    """Puts a space in front of every text, as Llama-2's and Mistral's do: here in the pre-tokenizer."""
    return Tokenizer.from_str(raw("mistral"))


@pytest.fixture(scope="module")
def botchan():
    return Tokenizer.from_str(raw("botchan"))


@pytest.fixture(scope="module")
def prepending(mistral):
    """The same with that space put by the normalizer, as in older files."""
    return with_normalizer(mistral, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))


@pytest.fixture(scope="module")
def bare(mistral):
    """The same without that space, as Gemma's."""
    return with_normalizer(mistral, normalizers.Replace(" ", "▁"))


def with_normalizer(original, normalizer):
    other = Tokenizer(original.model)
    other.normalizer, other.decoder, other.post_processor = normalizer, original.decoder, original.post_processor
    other.add_special_tokens(["<unk>", "<s>", "</s>"])
    return other


@pytest.mark.parametrize("name", ["tiny_tokenizer", "gpt2"])
@given(data=st.data())
def test_any_tokens_are_decoded_as_the_tokenizers_library_does(name, request, data):
    real = request.getfixturevalue(name)
    ids = data.draw(st.lists(st.integers(0, real.get_vocab_size() - 1), max_size=20))
    assert tokenizer.decode(real, ids) == real.decode(ids, skip_special_tokens=False)
    assert "".join(tokenizer.pieces(real, ids)) == tokenizer.decode(real, ids)


@pytest.mark.parametrize("name", ["gpt2", "mistral", "prepending", "bare"])
@given(text=TEXT | st.sampled_from([" hello", "  two", "\n\n a", "<s>A: hi</s> ", "<0x0A>"]))
def test_text_that_continues_a_transcript_is_neither_more_nor_less(name, request, text):
    real, text = request.getfixturevalue(name), text.replace("▁", "_")       # sentencepiece's own sign for a space
    ids = tokenizer.encode(real, text)
    assert tokenizer.decode(real, ids) == "".join(tokenizer.pieces(real, ids)) == text


@pytest.mark.parametrize("name", ["tiny_tokenizer", "gpt2", "mistral", "prepending", "bare"])
@pytest.mark.parametrize("marker", ["A:", "Teacher:", " Teacher:"])
def test_a_marker_behind_a_newline_is_the_same_alone(name, request, marker):
    real = request.getfixturevalue(name)
    assert tokenizer.encode(real, "\n") + tokenizer.encode(real, marker) == tokenizer.encode(real, "\n" + marker)


def test_a_newline_of_sentencepiece_is_a_byte(mistral):
    assert [mistral.id_to_token(i) for i in tokenizer.encode(mistral, "A: hi\nB:")] == [
        "A", ":", "▁hi", "<0x0A>", "B", ":"]


def test_a_unigram_tokenizer_gives_each_word_its_space(botchan):
    ids = tokenizer.encode(botchan, "I did it\nnow")
    assert tokenizer.decode(botchan, ids) == " I did it now"
    assert tokenizer.pieces(botchan, ids)[0] == " I"


@pytest.mark.parametrize(("name", "text", "tokens"), [
    ("mistral", "A: hi", ["<s>", "▁A", ":", "▁hi"]), ("mistral", "<s>A: hi", ["<s>", "▁A", ":", "▁hi"]),
    ("mistral", "", ["<s>"]), ("prepending", "A: hi", ["<s>", "▁A", ":", "▁hi"]),
    ("prepending", "<s>A: hi", ["<s>", "▁A", ":", "▁hi"]), ("bare", "A: hi", ["<s>", "A", ":", "▁hi"]),
    ("gpt2", "A: hi", ["A", ":", "Ġhi"]), ("gpt2", "", []), ("botchan", "I did", ["▁I", "▁did"]),
    ("tiny_tokenizer", "<|start|>A:", ["<|start|>", "A:"])])
def test_an_opening_begins_with_what_the_tokenizer_puts_in_front_once(name, request, text, tokens):
    real = request.getfixturevalue(name)
    assert [real.id_to_token(i) for i in tokenizer.opening(real, text)] == tokens


def test_added_tokens_are_decoded_as_they_are_written(tiny_tokenizer):
    real = Tokenizer.from_str(tiny_tokenizer.to_str())
    assert tokenizer.decode(real, tokenizer.encode(real, "éé")) == "éé"
    real.add_tokens([AddedToken("éé", normalized=False)])       # in GPT-2's alphabet this character stands for a byte
    (one,) = tokenizer.encode(real, "éé")
    assert tokenizer.decode(real, [one]) == "éé"


def test_numbers_that_are_no_tokens_have_no_text(gpt2):
    hi = tokenizer.encode(gpt2, "hi")
    assert tokenizer.decode(gpt2, [*hi, 60000]) == "hi"
    assert tokenizer.pieces(gpt2, [60000, *hi]) == ["", "hi"]


def test_tokens_without_text_of_their_own_are_refused():
    real = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    real.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="decoder is WordPiece"):
        tokenizer.decode(real, [1, 2])


def test_a_file_that_asks_for_truncation_and_padding_is_not_obeyed(tmp_path, tiny_tokenizer):
    real = Tokenizer.from_str(tiny_tokenizer.to_str())
    real.enable_truncation(2)
    real.enable_padding(length=10)
    real.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.load(tmp_path).to_str() == tiny_tokenizer.to_str()


def test_older_files_are_converted(tmp_path, gpt2):
    model = json.loads(raw("gpt2"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert tokenizer.encode(tokenizer.load(tmp_path), "A: hello there\n\nB:") == tokenizer.encode(
        gpt2, "A: hello there\n\nB:")


def sentencepiece_folder(folder):
    (folder / "tokenizer.model").write_bytes(lzma.decompress((DATA / "botchan/tokenizer.model.xz").read_bytes()))
    (folder / "config.json").write_text('{"model_type": "t5"}')
    return folder


def test_a_sentencepiece_model_is_converted(tmp_path, botchan):
    pytest.importorskip("sentencepiece")
    text = "I did it, and then there was a man"
    assert tokenizer.encode(tokenizer.load(sentencepiece_folder(tmp_path)), text) == tokenizer.encode(botchan, text)


def test_a_sentencepiece_model_needs_its_library(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="tokenizer.model.*pip install sentencepiece protobuf"):
        tokenizer.load(sentencepiece_folder(tmp_path))


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json, vocab.json with merges.txt, .*tokenizer.model"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer"):
        tokenizer.load(tmp_path)


TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
            "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}"
            "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %} So{% endif %}")


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    (folder / "tokenizer.json").write_text(raw("mistral"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "chat_template": TEMPLATE}))
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    return folder


def test_a_conversation_is_written_by_the_chat_template(chat_folder, mistral):
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    asked = ["<s>", "[", "INST", "]", "▁hi", "▁[", "/", "INST", "]"]
    for messages, tokens in (([user], [*asked, "▁So"]), ([user, assistant], [*asked, "▁yes"]),
                             ([user, assistant, user], [*asked, "▁yes", "</s>", *asked[1:], "▁So"])):
        ids = tokenizer.chat(tokenizer.load(chat_folder), messages)
        assert [mistral.id_to_token(i) for i in ids] == tokens


TRIMS = TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}")
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def template_of(folder, tiny_tokenizer, template):
    """A folder with that chat template."""
    tiny_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|start|>", "chat_template": template}),
        encoding="utf-8")
    return folder


@pytest.mark.parametrize("template", [TEMPLATE, TRIMS, CHATML], ids=["mistral", "trims", "chatml"])
def test_a_prefill_is_left_open_as_transformers_does_it(tiny_tokenizer, tmp_path, template):
    folder = template_of(tmp_path, tiny_tokenizer, template)
    oracle, words = AutoTokenizer.from_pretrained(folder), tokenizer.load(folder)
    for answer in ("The answer is", " 4, because ", "yes\n", "<think>\n2 + 2", "hi"):
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
        want = oracle.apply_chat_template(messages, continue_final_message=True, return_dict=False)
        assert tokenizer.chat(words, messages) == want
        assert tokenizer.decode(words, want).endswith(answer.strip() if template == TRIMS else answer)


def test_a_prefill_that_cannot_be_continued_is_refused(tiny_tokenizer, tmp_path):
    template = TEMPLATE.replace(" {{ m.content }}{{ eos", "{{ m.content[:3] }}{{ eos")
    words = tokenizer.load(template_of(tmp_path, tiny_tokenizer, template))
    for answer, reason in (("", "ends with an empty message"), (" \n", "ends with an empty message"),
                           ("a long answer", f"template of {tmp_path} leaves the assistant's last message no text")):
        with pytest.raises(ValueError, match=reason):
            tokenizer.chat(words, [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}])


def test_half_of_a_surrogate_pair_is_no_text(tiny_tokenizer):
    for write in (tokenizer.opening, tokenizer.encode):
        with pytest.raises(ValueError, match=r"half of a surrogate pair, '\\ud83d', is no character"):
            write(tiny_tokenizer, "hi \ud83d")
    with pytest.raises(ValueError, match=r"env.end='\\udcff': half of a surrogate pair"):
        tokenizer.marker_ids(tiny_tokenizer, "env.end", "\udcff")


def test_the_folder_of_a_chat_is_read_once(chat_folder, tmp_path):
    folder = shutil.copytree(chat_folder, tmp_path / "chat")
    words, messages = tokenizer.load(folder), [{"role": "user", "content": "hi"}]
    before = tokenizer.chat(words, messages)
    shutil.rmtree(folder)
    assert tokenizer.chat(words, messages) == before


def test_messages_that_the_template_refuses_and_models_without_one_are_named(chat_folder, tiny_folder, mistral):
    with pytest.raises(ValueError, match="refuses the messages: only user and assistant"):
        tokenizer.chat(tokenizer.load(chat_folder), [{"role": "system", "content": "be brief"}])
    for words, reason in ((tokenizer.load(tiny_folder), f"{tiny_folder} has no chat template"),
                          (mistral, "not loaded from a model folder")):
        with pytest.raises(ValueError, match=reason):
            tokenizer.chat(words, [{"role": "user", "content": "hi"}])


@pytest.mark.skipif(not folders.place("smollm2").is_dir(), reason="`python -m launch.fetch smollm2` first")
def test_a_chat_of_a_real_model():
    """By hand: ChatML, with the template's own system message where there is none."""
    words = tokenizer.load(folders.find("smollm2"))
    user = {"role": "user", "content": "2 + 2?"}
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    for messages, system in (([user], default), ([{"role": "system", "content": "Be brief."}, user], "Be brief.")):
        ids = tokenizer.chat(words, messages)
        assert tokenizer.decode(words, ids) == (f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n2 + 2?"
                                                "<|im_end|>\n<|im_start|>assistant\n")
        marks = [words.token_to_id(mark) for mark in ("<|im_start|>", "<|im_end|>")]
        assert [ids.count(mark) for mark in marks] == [3, 2] and ids[0] == marks[0]
