"""The rewards that only count, by hand."""
import importlib

import hypothesis
import pytest
from hypothesis import strategies as st

from kl_reg.rewards import texts

length, regex, distinct = (importlib.import_module(f"kl_reg.rewards.{name}").__dict__[name]
                           for name in ("length", "regex", "distinct"))


def test_the_length_is_of_tokens_relative_to_the_target():
    said = length(4)(completions=["a b c"] * 5, completion_ids=[[], [1], [1] * 4, [1] * 5, [1] * 12])
    assert said == [-1, -0.75, 0, -0.25, -2]


@pytest.mark.parametrize(("pattern", "said"), [
    ("yes", [1, 1, 0, 0]), ("^yes", [1, 0, 0, 0]), ("(?i)yes$", [1, 1, 1, 0]), (r"\d", [0, 0, 0, 0]),
    (r"^\s*$", [0, 0, 0, 1])])
def test_a_pattern_is_found_anywhere(pattern, said):
    assert regex(pattern)(completions=["yes", "oh yes", "YES", ""]) == said


@pytest.mark.parametrize(("text", "n", "said"), [
    ("a b a b", 1, 2 / 4), ("a b a b", 2, 2 / 3), ("a b a b", 3, 1), ("a b a b", 4, 1), ("a b a b", 5, 0),
    ("", 1, 0), (" \n", 1, 0), ("so  so\nso", 1, 1 / 3), ("so so so", 2, 1 / 2), ("So so", 1, 1)])
def test_distinct_n_by_hand(text, n, said):
    assert distinct(n)(completions=[text]) == [pytest.approx(said, abs=1e-15)]


@hypothesis.given(st.lists(st.sampled_from("abc"), max_size=8), st.integers(1, 3))
def test_distinct_n_is_one_just_where_no_ngram_comes_twice(words, n):
    (said,) = distinct(n)(completions=[" ".join(words)])
    repeated = any(words[i:i + n] == words[j:j + n] for j in range(len(words) - n + 1) for i in range(j))
    assert 0 <= said <= 1 and (said == 1) == (len(words) >= n and not repeated)


def test_messages_are_read_for_their_content():
    message = {"role": "assistant", "content": "so"}
    assert texts(["so", [message], [message, message], []]) == ["so", "so", "so\nso", ""]
