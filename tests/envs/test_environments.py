"""What every environment of the registry keeps to, by its name alone; its words are the letters a to d."""
import pytest
from hypothesis import given
from hypothesis import strategies as st
from staging import Stage, said

from kl_reg.envs import ENVIRONMENTS
from kl_reg.types import AGENT, FORCED, PAD, STUDENT

LENGTH = 8


@pytest.fixture(scope="module", params=ENVIRONMENTS.names())
def staged(request, letter_tokenizer):
    return Stage(letter_tokenizer, name=request.param, opening="a", end="b", teacher="c", student="d", turns=3,
                 length=LENGTH, eos=frozenset({3}))


scripts = st.lists(st.integers(0, 3), min_size=LENGTH, max_size=LENGTH)


@given(scripts)
def test_turns_go_up_one_by_one_and_nothing_follows_the_end(staged, script):
    roles, turns, tokens = (x.tolist() for x in staged.play(script))
    written = roles.index(PAD) if PAD in roles else LENGTH
    assert set(roles[:written]) <= {FORCED, AGENT, STUDENT} and roles[written:] == [PAD] * (LENGTH - written)
    assert turns[0] == 0 and all(0 <= b - a <= 1 for a, b in zip(turns[:written], turns[1:written], strict=False))
    drawn = [token for token, role in zip(tokens, roles, strict=True) if role >= AGENT]
    assert drawn == script[:len(drawn)]


@given(st.lists(scripts, min_size=3, max_size=3))
def test_replies_are_of_what_was_written(staged, several):
    episodes = [staged.play(script) for script in several]
    replies = staged.env.read(staged.transcript(*episodes))
    first = staged.env.openings.tokens.shape[1]
    assert [(r.episode, r.turn) for r in replies] == sorted({(r.episode, r.turn) for r in replies})
    for reply in replies:
        roles, turns, tokens = episodes[reply.episode]
        assert roles[reply.end - first] in (AGENT, STUDENT) and turns[reply.end - first] == reply.turn
        assert reply.role in (AGENT, STUDENT) and reply.prompt.startswith("a")
        assert said(staged.tokenizer, tokens[:reply.end - first + 1]).find(reply.text) >= 0
        assert "".join("abcd"[i] for i in reply.ids) == reply.text
    alone = [staged.env.read(staged.transcript(episode)) for episode in episodes]
    assert replies == [reply._replace(episode=e) for e, own in enumerate(alone) for reply in own]
