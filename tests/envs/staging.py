"""An environment on a stage: its writers write a script."""
import jax
import jax.numpy as jnp
import numpy as np

from kl_reg import config as configs
from kl_reg.envs import ENVIRONMENTS
from kl_reg.pretrained import tokenizer as text
from kl_reg.types import AGENT, FORCED, OPENING, PAD, STUDENT, Transcript

LENGTH = 24
LETTERS = {PAD: "-", FORCED: "F", AGENT: "A", STUDENT: "S"}


class Stage:
    """An environment, and the transcript of a script: what its writers write, one token after the other."""

    def __init__(self, tokenizer, length=LENGTH, eos=frozenset(), **settings):
        config = configs.default().env
        config.update({"length": length} | settings)
        self.config, self.tokenizer = config, tokenizer
        self.env = ENVIRONMENTS[config.name](config, tokenizer, eos)
        self._play = jax.jit(self._scan)

    def ids(self, string):
        return text.encode(self.tokenizer, string)

    def _scan(self, script):
        def step(carry, _):
            state, used = carry
            role, forced = self.env.turn(state)
            written = jnp.where(role == PAD, 0, script[used])
            token = jnp.where(role == FORCED, forced, written)
            turn = jnp.where(role == PAD, -1, state.turn)
            return (self.env.observe(state, token), used + (role >= AGENT)), (role, turn, token)

        return jax.lax.scan(step, (self.env.reset(), 0), length=self.config.length)[1]

    def play(self, script):
        """Roles, turns and tokens [length] of an episode whose writers write `script`."""
        script = jnp.array(list(script) + [0] * self.config.length)[:self.config.length]
        return [np.asarray(x) for x in self._play(script)]

    def transcript(self, *episodes, row=0):
        """The episodes behind opening number `row`, as one batch of numpy arrays."""
        opening, start = (x[[row] * len(episodes)] for x in self.env.openings)
        before = np.where(np.arange(opening.shape[1]) >= start[:, None], OPENING, PAD)
        roles, turns, tokens = (np.stack(x) for x in zip(*episodes, strict=True))
        return Transcript(np.concatenate([opening, tokens], 1), np.concatenate([before, roles], 1),
                          np.concatenate([np.full_like(opening, -1), turns], 1), start,
                          np.full(len(episodes), row, np.int32))

    def bytes(self, string):
        """One token a character, markers as they are written by `ids`."""
        return [token for character in string for token in self.ids(character)]


def letters(roles):
    return "".join(LETTERS[int(role)] for role in roles)


def said(tokenizer, tokens):
    return text.decode(tokenizer, tokens.tolist())


def digits(turns):
    return "".join(map(str, turns))
