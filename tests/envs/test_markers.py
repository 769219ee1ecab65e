"""Markers in tokens, against str.find on the text; with tokenizers of published models (tests/data/tokenizers)."""
import functools
import itertools
import lzma
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from kl_reg.envs import markers
from kl_reg.pretrained import tokenizer

DATA = pathlib.Path(__file__).parent.parent / "data" / "tokenizers"
LENGTH = 24


@pytest.fixture(scope="module")
def gpt2():
    return real("gpt2")


@functools.cache
def real(name):
    return Tokenizer.from_str(lzma.decompress((DATA / name / "tokenizer.json.xz").read_bytes()).decode())


@jax.jit
def hits(finder, tokens):
    """Whether each token [b, t] completes a marker."""
    def step(state, token):
        return jax.vmap(finder.step)(state, token)

    return jax.lax.scan(step, jnp.zeros(len(tokens), jnp.int32), tokens.T)[1].T


def found(finder, ids):
    rows = np.array([list(ids) + [10**6] * (LENGTH - len(ids))] * 2)     # numbers that are no tokens fill it up
    both = np.asarray(hits(finder, rows))[:, :len(ids)].tolist()
    assert both[0] == both[1]
    return both[0]


def found_in_text(wanted, texts):
    """The same, by str.find in the texts up to each token."""
    base, before, order, out = 0, "", itertools.cycle(wanted), []
    marker = next(order)
    for text in texts:
        complete = len(before.rstrip("\N{REPLACEMENT CHARACTER}"))       # a character may not be whole yet
        at = text.find(marker, max(base, complete + 1 - len(marker)))
        out.append(at >= 0)
        if at >= 0:
            base, marker = at + len(marker), next(order)
        before = text
    return out


class Case:
    """A tokenizer and what is looked for; texts come from the tokenizers library, behind a word, because its decoders
    take a space from the beginning."""

    def __init__(self, name, wanted, words):
        self.tokenizer, self.wanted, self.words = real(name), wanted, words
        self.finder = markers.finder(self.tokenizer, *wanted)
        self.word = self.tokenizer.token_to_id("a")
        # Where single bytes are tokens, that library writes a whole run of them off if one of them is out of place.
        self.strays = [i for token, i in self.tokenizer.get_vocab().items() if not token.startswith("<0x")]

    def texts(self, ids):
        return [self.tokenizer.decode([self.word, *ids[:i + 1]], skip_special_tokens=False)[1:]
                for i in range(len(ids))]


SPEAKERS = ["\n", "A", ":", "B", " ", "é", "\n\n", "A:", "B:", "\nA:", "\nB:", ".\n", " \n", "<s>", "x", " the"]
CASES = {
    "gpt2": ("gpt2", ["\nA:", "\nB:"], SPEAKERS), "mistral": ("mistral", ["\nA:", "\nB:"], SPEAKERS),
    "overlapping": ("gpt2", ["aab", "b\n\n"], ["\n", "\n\n", "a", "aa", "aab", "b", "b\n"]),
    "characters": ("gpt2", ["é😀"], ["é", "😀", "é😀", "x", "è"]),
    "one": ("mistral", [" the"], [" the", "the", " ", "  ", "e the", " there"]),
    "unigram": ("botchan", [" the"], [" the", " then", "other", "r the m"])}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request):
    return Case(*request.param)


@given(st.data())
def test_markers_are_found_where_the_text_has_them(case, data):
    parts = data.draw(st.lists(st.lists(st.sampled_from(case.words), max_size=4).map("".join), max_size=8))
    strays = data.draw(st.lists(st.sampled_from(case.strays), max_size=4))
    rows = [tokenizer.encode(case.tokenizer, part) for part in parts] + [[stray] for stray in strays]
    ids = sum(data.draw(st.permutations(rows)), [])[:LENGTH]     # cut anywhere, each piece has its own tokenisation
    assert found(case.finder, ids) == found_in_text(case.wanted, case.texts(ids))


def test_many_newlines_in_one_token_are_one_find(gpt2):
    one, two = gpt2.token_to_id("Ċ"), gpt2.token_to_id("ĊĊ")
    finder = markers.finder(gpt2, "\n")
    assert found(finder, [two, one, 0, two, 10**6, one]) == [True, True, False, True, False, True]
    assert found(markers.finder(gpt2, "\n\n"), [one, two, one, one]) == [False, True, True, False]


def test_a_marker_that_begins_within_a_failed_or_a_second_one_is_found(gpt2):
    a, b, four = (gpt2.token_to_id(token) for token in ("a", "b", "aaaa"))
    assert found(markers.finder(gpt2, "aab"), [a, a, a, b, a, b]) == [False, False, False, True, False, False]
    # The second "aa" in "aaaa" is not taken, so its last letter may begin one.
    assert found(markers.finder(gpt2, "aa"), [four, a, a, a]) == [True, True, False, True]


def test_the_next_marker_begins_in_the_rest_of_the_last_ones_token(gpt2):
    newlines, a, x = gpt2.token_to_id("ĊĊ"), gpt2.token_to_id("A"), gpt2.token_to_id("x")
    finder = markers.finder(gpt2, "x\n", "\nA", "A")
    # "\nA" is completed from the second newline; its A does not count for the third marker, which is found then.
    assert found(finder, [x, newlines, a, a, x, a, x, newlines]) == [False, True, True, True, False, False, False, True]


def test_a_character_that_is_cut_over_tokens_is_found(gpt2):
    ids = tokenizer.encode(gpt2, "x😀")
    assert len(ids) > 2
    assert found(markers.finder(gpt2, "😀"), ids) == [False] * (len(ids) - 1) + [True]


def test_numbers_that_are_no_tokens_leave_the_search_as_it_is(gpt2):
    finder = markers.finder(gpt2, "AB")
    a, b = gpt2.token_to_id("A"), gpt2.token_to_id("B")
    assert found(finder, [a, 50257, b, 50257]) == [False, False, True, False]


def test_long_markers_get_a_wider_table(gpt2):
    marker = "ab" * 100
    assert markers.finder(gpt2, "ab").table.dtype == np.uint8
    finder = markers.finder(gpt2, marker)
    assert finder.table.dtype == np.uint16
    seen = np.asarray(hits(finder, np.array([tokenizer.encode(gpt2, "ab") * 100])))[0].tolist()
    assert seen == [False] * (len(seen) - 1) + [True]


@pytest.mark.parametrize(("wanted", "words"), [((), r"non-empty"), (("\n", ""), r"non-empty"),
                                               (("a" * 2**15, "b"), "32,?769 bytes in all: at most 32,768")])
def test_markers_that_cannot_be_looked_for_are_named(tiny_tokenizer, wanted, words):
    with pytest.raises(ValueError, match=words):
        markers.finder(tiny_tokenizer, *wanted)
