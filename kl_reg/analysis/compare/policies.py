"""The two sides of a comparison: the base, members of a run, or a model."""
from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from kl_reg import algorithms, storage
from kl_reg import config as configs
from kl_reg.kl.spends import SPENDS
from kl_reg.models import decoder
from kl_reg.policies import kinds as policies
from kl_reg.policies.actor import Situation
from kl_reg.policies.finetuned import TwinFeatures
from kl_reg.policies.interface import Policy, Reading
from kl_reg.pretrained import quantize, tokenizer, weights
from kl_reg.program import Program, replace
from kl_reg.references import kinds as references
from kl_reg.runs import directory as run_directory
from kl_reg.sampling import rollout
from kl_reg.training import member_groups
from kl_reg.training.build import build
from kl_reg.training.compile import compile_program
from kl_reg.types import Episodes, Frozen, Hyper


class Team(NamedTuple):
    """The policies of one program. `numbers` are the members', from 0 for a model, and `seeds` their seeds, 0 for a
    model; the last three have a member axis."""

    numbers: list[int]
    seeds: list[int]
    program: Program
    sample: Callable               # as `compile.Compiled.sample`
    frozen: Frozen
    hyper: Hyper
    params: object
    memory: object                 # of the reference


class Side(NamedTuple):
    """`name` as it was asked for; `kind` is base, model or run; `config` of the run that gives the environment, the
    default one without a run; `iteration` that the parameters are of. Before `load` a run has no parameters."""

    name: str
    kind: str
    address: run_directory.Address | None
    model: weights.Model
    config: ConfigDict
    teams: list[Team]
    iteration: int | None

    @property
    def numbers(self) -> list[int]:
        return sorted(number for team in self.teams for number in team.numbers)

    def place(self, number: int) -> tuple[int, int]:
        """Which team, and which of its members."""
        return next((i, team.numbers.index(number)) for i, team in enumerate(self.teams) if number in team.numbers)

    def sampling_as(self, run: Side, number: int) -> int:
        """Which policy of this model samples as that member does."""
        sampling = run.teams[run.place(number)[0]].program.agent.sampling
        return next(team.numbers[0] for team in self.teams if team.program.agent.sampling == sampling)


def open_sides(names: tuple[str, str], openings: str, batch: int) -> list[Side]:
    """Both sides, those of a run without parameters.

    Args:
        names: "base", RUN[:MEMBER][@ITERATION] or a model as in `model.path`, each.
        openings: "run": a run's own; "held_out": of held-out conversations.
        batch: episodes that `sample` draws at a time, of each member.

    Raises:
        ValueError: a name that is nothing of these, or sides with different vocabularies.
        FileNotFoundError: the model of a run lacks a file.
    """
    opened = {name: open_side(name, openings, batch, {}) for name in names if run_directory.parse(name)}
    run = next(iter(opened.values()), None)
    models = [opened[name].model if name in opened else run.model if run and name == "base" else
              _model(name, run.config.model.dtype if run else "float32") for name in names]
    same_vocabulary(names, models)
    return [opened[name] if name in opened else _open_model(name, model, run, openings, batch, {})
            for name, model in zip(names, models, strict=True)]


def open_side(name: str, openings: str, batch: int, changes: Mapping[str, object]) -> Side:
    """One side by itself: a run without parameters, or a model that plays both speakers in the default environment.

    Args:
        name, openings, batch: see `open_sides`; "base" is the embedded model.
        changes: settings of `env` for a model.

    Raises:
        ValueError, FileNotFoundError: see `open_sides`.
    """
    address = run_directory.parse(name)
    if address is None:
        return _open_model(name, _model(name, "float32"), None, openings, batch, changes)
    config = run_directory.config_of(address.workdir)
    model = weights.load(config.model.path, config.model.dtype)
    if config.model.quantize:
        model = model._replace(params=quantize.quantize(model.params, donate=True))
    return _open_run(name, address, config, model, openings, batch)


def _model(name, dtype):
    try:
        return weights.load("embedded" if name == "base" else name, dtype)
    except FileNotFoundError as error:
        raise ValueError(f"{name!r} is neither 'base', nor a run as RUN[:MEMBER][@ITERATION] (there is no config.json "
                         f"of a run), nor a model: {error}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def same_vocabulary(names: tuple[str, str], models: Sequence[weights.Model]) -> None:
    """Raises a ValueError that names both where one token is not the same for both."""
    known = [weights.vocabulary(str(model.folder)) for model in models]
    if known[0] != known[1]:
        first, second = (f"{name} ({model.folder}: {len(words)} tokens, {logits} logits)"
                         for name, model, (words, logits) in zip(names, models, known, strict=True))
        raise ValueError(f"{first} and {second} have different vocabularies: their next-token distributions cannot be "
                         "compared")


def _open_run(name, address, config, model, openings, batch):
    stored = storage.read_json(address.workdir / "config.json")
    run_directory.check_base(address.workdir, model.folder)
    if openings == "held_out":
        _held_out_openings(config, model)
    numbers = list(range(len(configs.members(config))))
    if address.member is not None:
        if address.member not in numbers:
            raise ValueError(f"{name}: there is no member {address.member}; the run has members 0 to {numbers[-1]}")
        numbers = [address.member]
        config = configs.override(config, configs.members(config)[address.member])
    teams = []
    for group in _plan(name, config, model, openings):
        if "references" in stored and list(group.digests) != stored["references"][str(numbers[group.members[0]])]:
            raise ValueError(f"{name}: what is in reference.paths={config.reference.paths} now was not in training")
        program = replace(group.program, schedule=group.program.schedule._replace(episodes=batch))
        teams.append(Team([numbers[i] for i in group.members], np.asarray(group.seeds).tolist(), program,
                          compile_program(program).sample, group.frozen, group.hyper, None, None))
    return Side(name, "run", address, model, config, teams, None)


def _plan(name, config, model, openings):
    config = ConfigDict(config.copy_and_resolve_references())
    config.kl.allow_biased = True                                        # whatever it was trained on
    try:
        # Nothing is trained: the loss that it was trained with may be gone.
        return member_groups.plan(config, model, algorithms.LOSSES["reinforce"])
    except ValueError as error:
        hint = "; --openings run keeps the run's own opening" if openings == "held_out" else ""
        raise ValueError(f"{name}: {error}{hint}") from None


def _held_out_openings(config, model):
    """Episodes begin with turns of held-out conversations, behind the special tokens of the run's own opening."""
    env, vocabulary = config.env, tokenizer.load(model.folder)
    if env.openings != "held_out":
        env.opening, env.openings = special_tokens(vocabulary, env.opening), "held_out"
        prefix = len(tokenizer.encode(vocabulary, env.end + env.teacher)) - len(tokenizer.encode(vocabulary, env.end))
        env.opening_tokens = min(env.opening_tokens, model.config.max_position - env.length - prefix)


def special_tokens(vocabulary: Tokenizer, text: str) -> str:
    """The special tokens that `text` begins with: a model's start of text."""
    special = {number for number, token in vocabulary.get_added_tokens_decoder().items() if token.special}
    return tokenizer.decode(vocabulary, list(itertools.takewhile(special.__contains__,
                                                                 tokenizer.encode(vocabulary, text))))


def _open_model(name, model, run, openings, batch, changes):
    """The base, or another model. Against a run it plays the agent in the run's environment, whose student is the
    run's base, once for each way in which members sample; without one it plays both, in the default environment."""
    if run:
        config, base = run.config, run.model
        starts = {team.program.agent.sampling: (team.program, team.frozen.student) for team in run.teams}
    else:
        config, base = configs.default(), model
        config.model.path = str(model.folder)
        config.env.update(changes)
        if openings == "held_out":
            _held_out_openings(config, model)       # in the room that `changes` leave
            config.env.update(changes)              # with the opening that they name
        try:
            starts = {None: (build(configs.split(config)[0], model), ())}
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if run and name != "base":
        policy, params = in_place_of_agent(base.config, model.config), model.params
    else:                                                   # an untrained head changes nothing
        small = configs.default().policy
        small.layers = small.hidden = 1
        policy = policies.build("head", base.config, small)
        params = policy.init(jax.random.key(0), base.params)
    hyper, params = jax.tree.map(lambda x: x[None], (configs.split(configs.default())[1], params))
    teams = []
    for start, student in starts.values():
        base_model = references.build(ConfigDict({"name": "base"}), policy, start.agent.sampling, None)
        agent = start.agent._replace(policy=policy, reference=base_model, constrained=False, spend=SPENDS["neuron"](1))
        plain = replace(start, agent=agent, schedule=start.schedule._replace(episodes=batch))
        frozen = Frozen(base.params, student=student)
        teams.append(Team([len(teams)], [0], plain, compile_program(plain).sample, frozen, hyper, params, ()))
    return Side(name, "base" if name == "base" else "model", None, model, config, teams, None)


def pairs(first: Side, second: Side) -> list[tuple[int, int]]:
    """The policies that are compared: each of a run with a model that samples as it does, with a single one of the
    other run, or with that of the same place there.

    Raises:
        ValueError: two runs with different numbers of members.
    """
    if second.kind == "run" and first.kind != "run":
        return [(first.sampling_as(second, number), number) for number in second.numbers]
    if first.kind == "run" and second.kind != "run":
        return [(number, second.sampling_as(first, number)) for number in first.numbers]
    a, b = first.numbers, second.numbers
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        raise ValueError(f"{first.name} has {len(a)} members and {second.name} has {len(b)}: choose one, as "
                         f"{first.name}:0")
    count = max(len(a), len(b))
    return list(zip(a * (count // len(a)), b * (count // len(b)), strict=True))


def in_place_of_agent(config: decoder.DecoderConfig, other: decoder.DecoderConfig) -> Policy:
    """Another model of the base's vocabulary writes the agent's tokens, and the base the environment's."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    single = lambda params: jax.tree.map(lambda x: x[0], params)  # noqa: E731

    def prefill(params, base, tokens, start, chosen, slots, group=1):
        return tuple(decoder.prefill(c, p, tokens, start, slots, group=group, chosen=flat(chosen))[1]
                     for c, p in ((config, base), (other, single(params))))

    def decode(params, base, token, start, index, state):
        steps = [decoder.decode(c, p, flat(token), flat(start), index, cache)
                 for c, p, cache in ((config, base, state[0]), (other, single(params), state[1]))]
        return TwinFeatures(*(hidden.last.reshape(*token.shape, -1) for hidden, _ in steps)), tuple(
            cache for _, cache in steps)

    def reread(params, base, transcript, slot):
        both = (decoder.forward(c, p, transcript.tokens, transcript.start).last
                for c, p in ((config, base), (other, params)))
        return TwinFeatures(*(jnp.take_along_axis(x, jnp.maximum(slot - 1, 0)[..., None], axis=1) for x in both))

    def read(params, base, features, situation: Situation):
        logits, nothing = decoder.logits(config, base, features.base), jnp.zeros(features.base.shape[:-1])
        return Reading(logits, decoder.logits(other, params, features.policy) - logits, nothing, nothing)

    return Policy(None, prefill, decode, None, reread, read, relative=False, shared=False)


def sample(team: Team, count: int, seed: int | Sequence[int]) -> Episodes:
    """`count` episodes [members, count, ...]; with the seed of a run's evaluation, those of its evaluation.

    Args:
        seed: of all members, or one each.
    """
    members, keys, parts = len(team.numbers), keys_of(team, seed), []
    for first in range(0, count, team.program.schedule.episodes):
        episodes = team.sample(team.params, team.memory, team.hyper, team.frozen, keys,
                               jnp.full(members, first, jnp.int32))
        parts.append(jax.device_get(episodes._replace(features=(), reference=(), allowed=None)))
    return jax.tree.map(lambda *x: np.concatenate(x, axis=1)[:, :count], *parts)


def keys_of(team: Team, seed: int | Sequence[int]) -> Array:
    """One key a member, as its run's evaluation has it where `seed` is `evaluation.seed`.

    Args:
        seed: of all members, or one each.
    """
    return rollout.evaluation_keys(jnp.broadcast_to(jnp.asarray(seed), len(team.seeds)), jnp.array(team.seeds))


def load(side: Side, iteration: int | None) -> Side:
    """With the parameters of a run's checkpoint, of the last one for None; a model has its own.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    if side.kind != "run":
        return side
    members, teams = run_directory.load(side.address.workdir, iteration), []
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    for team in side.teams:
        own = [members[number] for number in team.numbers]
        teams.append(team._replace(params=stack([m.params for m in own]), memory=stack([m.memory for m in own])))
    return side._replace(teams=teams, iteration=members[0].iteration)
