"""Text to tokens and back."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kl_reg.models import tokenizer

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
