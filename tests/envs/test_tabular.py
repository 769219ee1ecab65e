"""The enumerable environment by hand, and the small models that are made for it."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from staging import Stage, digits, letters

from kl_reg.envs.tabular import make_model
from kl_reg.models import decoder
from kl_reg.pretrained import tokenizer as text
from kl_reg.pretrained import weights
from kl_reg.types import AGENT, OPENING, PAD


def stage(tokenizer, **settings):
    return Stage(tokenizer, **{"name": "tabular", "opening": "a", "length": 6} | settings)


@pytest.mark.parametrize(("writers", "roles", "turns"), [
    ("", "AAAAAA", "000000"), ("AASSAS", "AASSAS", "001123"), ("SAAAAA", "SAAAAA", "011111")])
def test_writers_take_turns_as_they_are_told(letter_tokenizer, writers, roles, turns):
    made = stage(letter_tokenizer, writers=writers)
    episode = made.play([0, 1, 2, 3, 0, 1])
    assert (letters(episode[0]), digits(episode[1])) == (roles, turns)
    (reply,) = made.env.read(made.transcript(episode))
    assert (reply.text, reply.ids, reply.prompt) == ("abcdab", [0, 1, 2, 3, 0, 1], "a")
    assert (reply.episode, reply.role, reply.scored, reply.finished) == (0, AGENT, True, True)
    assert (reply.end, reply.turn) == (made.env.openings.tokens.shape[1] + 5, int(turns[-1]))


def test_nothing_is_written_behind_the_horizon(letter_tokenizer):
    env = stage(letter_tokenizer, length=2, writers="AS").env
    state = env.reset()
    for role in (AGENT, AGENT + 1, PAD, PAD):
        assert int(env.turn(state)[0]) == role
        state = env.observe(state, jnp.int32(1))


def test_an_episode_that_asked_for_help_has_what_was_written_before(letter_tokenizer):
    made = stage(letter_tokenizer)
    roles, turns, tokens = made.play([0, 1, 2, 3, 0, 1])
    for written in (0, 2):
        cut = [np.where(np.arange(6) < written, x, gone) for x, gone in ((roles, PAD), (turns, -1), (tokens, 0))]
        transcript = made.transcript(cut)
        (reply,) = made.env.read(transcript)
        assert (reply.ids, reply.turn) == ([0, 1][:written], 0)
        assert transcript.roles[0, reply.end] == (AGENT if written else OPENING)


def test_settings_that_cannot_be_enumerated_are_named(letter_tokenizer, tiny_tokenizer):
    with pytest.raises(ValueError, match="vocabulary has 300 tokens, at most 16"):
        stage(tiny_tokenizer)
    for settings, message in (({"length": 9}, "env.length=9.*at most 8"), ({"writers": "AAS"}, "env.writers='AAS'"),
                              ({"writers": "SSSSSS"}, "env.writers='SSSSSS'.*at least one A"),
                              ({"writers": "AABAAA"}, "env.writers='AABAAA'.*A .the agent. or S"),
                              ({"opening": ""}, "env.opening='' has no tokens"),
                              ({"opening": "<|start|>"}, r"env.opening='<\|start\|>' cannot .*\(a, b, c, d\)")):
        with pytest.raises(ValueError, match=message):
            stage(letter_tokenizer, **settings)


def test_tokens_are_letters(letter_tokenizer):
    assert text.opening(letter_tokenizer, "cab") == [2, 0, 1] == text.encode(letter_tokenizer, "cab")
    assert text.decode(letter_tokenizer, [3, 3, 0]) == "dda"


def test_the_same_seed_makes_the_same_files(letter_folders, tmp_path):
    make_model(tmp_path, 4, 3)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert files == {file.name: file.read_bytes() for file in letter_folders[3].iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} == set(files)
    assert files["model.safetensors"] != (letter_folders[2] / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def next_tokens(letter_folders):
    """log-probabilities [seed, context, position, token] behind an opening and each sequence of 3 tokens."""
    config = weights.load_config(str(letter_folders[0]))
    contexts = jnp.array([(0, *rest) for rest in itertools.product(range(4), repeat=3)])

    @jax.jit
    def read(params):
        hidden = decoder.forward(config, params, contexts, jnp.zeros(64, jnp.int32)).last
        return jax.nn.log_softmax(decoder.logits(config, params, hidden))

    return np.stack([read(weights.load(str(folder)).params) for folder in letter_folders])


def test_next_tokens_are_neither_even_nor_certain(next_tokens):
    entropy = -(np.exp(next_tokens) * next_tokens).sum(-1).mean((1, 2)) / np.log(4)
    assert (entropy > 0.55).all() and (entropy < 0.95).all() and 0.6 < entropy.mean() < 0.9


def test_next_tokens_depend_on_more_than_the_last_one(next_tokens):
    last = np.exp(next_tokens[:, :, -1]).reshape(6, 16, 4, 4)       # [seed, earlier tokens, last token, next token]
    assert (np.abs(last - last.mean(1, keepdims=True)).sum(-1).mean((1, 2)) > 0.05).all()


def test_other_vocabularies_are_refused(tmp_path):
    for vocabulary in (1, 17):
        with pytest.raises(ValueError, match=f"vocabulary={vocabulary} must be 2 to 16"):
            make_model(tmp_path, vocabulary, 0)
    assert not list(tmp_path.iterdir())
