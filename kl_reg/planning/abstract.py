"""The real programs of a configuration on arrays that have shapes and no content: nothing but config.json is needed."""
from __future__ import annotations

import json
import pathlib
import shutil
from typing import NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kl_reg import config as configs
from kl_reg import storage, validation
from kl_reg.models import decoder
from kl_reg.planning import flops
from kl_reg.pretrained import families, folders, hf_config, quantize, weights
from kl_reg.program import Program
from kl_reg.runs import directory as run_directory
from kl_reg.sampling import rollout
from kl_reg.training import member_groups, scoring
from kl_reg.training.build import build
from kl_reg.training.compile import compile_program
from kl_reg.types import Episodes, Frozen, Hyper, Openings, TrainState

PUBLISHED = pathlib.Path(__file__).parent / "published.json"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model")


class Stream(NamedTuple):
    """What an iteration passes on: keys and first episodes of the rollout, its episodes, their rewards; and `cache`,
    the keys and values of policy, reference and student that a rollout keeps."""

    keys: object
    first: object
    episodes: Episodes
    rewards: object
    cache: object


class Abstract(NamedTuple):
    """One program of a sweep; all arrays are `jax.ShapeDtypeStruct`, with the member axis that training gives them.

    `members` are their numbers in the sweep, and `seeds` how many different seeds they have; `shapes` the base model's;
    `flops` the operations of rollout and update, of all devices together; `guessed`: the tokens that openings have
    where there is no tokenizer to count them, `env.opening_tokens`; else 0.
    """

    members: list[int]
    seeds: int
    config: ConfigDict
    program: Program
    shapes: decoder.DecoderConfig
    frozen: Frozen
    hyper: Hyper
    state: TrainState
    stream: Stream
    flops: dict[str, float]
    guessed: int


def programs(config: ConfigDict, scratch: pathlib.Path) -> list[Abstract]:
    """The programs of a sweep, as `training.sweep.plan` makes them of real weights.

    Args:
        scratch: an empty folder, for what stands in for model folders.

    Raises:
        ValueError, FileNotFoundError: a setting is wrong, or a model's config.json cannot be had.
    """
    config, guessed = _at_hand(config, scratch)
    validation.validate(config)
    return [_abstract(group, guessed) for group in run_directory.groups(config)]


def _traced(built, state, hyper, frozen) -> tuple[Stream, dict[str, float]]:
    """What an iteration passes on, and its operations."""
    count, run = state.seed.shape[0], compile_program(built)
    keys, first = jax.eval_shape(rollout.member_keys, state.seed, state.iteration), _integers(count)
    draw = run.draw.trace(state.params, state.reference, hyper, frozen, keys, first, group=built.algorithm.group)
    episodes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), draw.out_info)

    def begin(state, hyper, frozen, keys, first):
        keys = rollout.episode_keys(keys, first, built.schedule.episodes)
        chosen = rollout.choose_openings(built.task.env.openings, keys)
        return rollout.begin(built, state.params, state.reference, frozen, scoring.caps_of(hyper), keys, chosen,
                             rollout.shared_openings(built, built.algorithm.group))[2]

    carry = jax.eval_shape(begin, state, hyper, frozen, keys, first)
    rewards = jax.ShapeDtypeStruct((count, built.schedule.episodes, built.task.env.length), jnp.float32)
    update = run.update.trace(state, hyper, frozen, episodes, rewards)
    # The rollout's loop ends with the last episode; the ledger's, of the update, once it has read all tokens before an
    # epoch has changed anything.
    work = {name: flops.count(traced.jaxpr.jaxpr, turns)
            for name, traced, turns in (("rollout", draw, built.task.env.length), ("update", update, 1))}
    return Stream(keys, first, episodes, rewards, (carry.policy, carry.reference, carry.student)), work


def _integers(count):
    return jax.ShapeDtypeStruct((count,), jnp.int32)


def _abstract(group, guessed) -> Abstract:
    (config, *_), numbers = [own for _, own in group], [number for number, _ in group]
    statics, hypers, seeds = zip(*(configs.split(own) for _, own in group), strict=True)
    base = _weights(config.model.path, config.model.dtype, config.model.quantize)
    student = _weights(config.env.student_model, config.model.dtype) if config.env.student_model else None
    paths, start, reference = tuple(config.reference.paths), None, ()
    if paths and run_directory.parse(paths[0]):
        reference, start, _ = member_groups.load_reference(paths)
    elif paths:
        reference = _stacked(_weights(paths[0]).params, len(paths))
    built = build(statics[0], base, start, cpu=False)
    if guessed:
        env = built.task.env._replace(openings=_openings(**guessed))
        built = built._replace(task=built.task._replace(env=env))
    hyper = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(group),), x.dtype), hypers[0])
    state = jax.eval_shape(compile_program(built).init, base.params, _integers(len(seeds)), hyper)
    frozen = Frozen(base.params, reference, student.params if student else ())
    return Abstract(numbers, len(set(seeds)), config, built, base.config, frozen, hyper, state,
                    *_traced(built, state, hyper, frozen), guessed["tokens"] if guessed else 0)


def _weights(path, dtype="float32", quantized="") -> weights.Model:
    """The model without its weights' content."""
    shapes = weights.load_config(path, dtype)
    params = jax.eval_shape(lambda key: jax.tree.map(lambda x: x.astype(dtype), decoder.init(shapes, key)),
                            jax.random.key(0))
    params = jax.eval_shape(quantize.quantize, params) if quantized else params
    return weights.Model(shapes, params, folders.find(path))


def _stacked(params, count):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), params)


def _at_hand(config, scratch) -> tuple[ConfigDict, dict]:
    """The configuration with a folder in place of each model that is not whole here; and, where the base model's
    tokenizer is none of its own, how many openings there are and of how many tokens."""
    config, guessed = config.copy_and_resolve_references(), {}
    places = {}

    def place(setting, path):
        if path not in places:
            places[path] = _place(setting, path, scratch / str(len(places)))
        return places[path]

    config.model.path, own_words = place("model.path", config.model.path)
    if config.env.student_model:
        config.env.student_model, _ = place("env.student_model", config.env.student_model)
    if not (config.reference.paths and run_directory.parse(config.reference.paths[0])):
        config.reference.paths = tuple(place("reference.paths", path)[0] for path in config.reference.paths)
    config.reward = configs.default().reward         # which is no part of these programs
    config.model.attention = config.model.attention and "xla"       # the GPU for the other is not here
    if not own_words:
        guessed = {"count": 1 if config.env.openings == "fixed" else 2, "tokens": config.env.opening_tokens}
        config.env.openings, config.env.opening = "fixed", "a"
    return config, guessed


def _place(setting, path, folder) -> tuple[str, bool]:
    """A folder with all that a model has, but for the content of its weights; and whether the tokenizer is its own."""
    if path in ("embedded", *folders.PACKAGED):
        return path, True
    own = storage.local(path, setting)
    if own.is_dir():
        try:
            folders.check(own, path)
            return path, True
        except FileNotFoundError:
            settings = folders.settings(own)
    else:
        settings = _settings(setting, path)
    with hf_config.errors_of(own):
        families.read(settings)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "model.safetensors").touch()      # is looked for, and never read
    words = [own / name for name in _TOKENIZER_FILES if (own / name).is_file()]
    for file in words:
        shutil.copyfile(file, folder / file.name)
    if not words:
        _bytes_and_fillers(settings["vocab_size"]).save(str(folder / "tokenizer.json"))
    return str(folder), bool(words)


def _settings(setting, path) -> dict:
    """config.json of a model of the hub."""
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    if path in published:
        return published[path]["config"]
    if not folders.is_hub(path):
        raise FileNotFoundError(f"{setting}={path!r}: no such folder; a plan needs one that holds config.json, or a "
                                "model of the Hugging Face hub")
    repo, _, revision = path.partition("@")
    try:
        file = huggingface_hub.hf_hub_download(repo, "config.json", revision=revision or None)
    except Exception as error:      # the hub's client raises dozens of kinds
        raise FileNotFoundError(f"{setting}={path!r}: the Hugging Face hub does not give its config.json "
                                f"({' '.join(str(error).split())}); a folder that holds it is enough for a plan, and "
                                f"these are known without: {', '.join(published)}") from error
    return json.loads(pathlib.Path(file).read_text(encoding="utf-8"))


def _bytes_and_fillers(vocab: int) -> Tokenizer:
    """A tokenizer of single bytes, with as many tokens as the model's own has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = (f"filler{i}" for i in range(max(vocab - len(alphabet), 0)))
    words = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, *fillers])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    return words


def _openings(count: int, tokens: int) -> Openings:
    return Openings(jnp.zeros((count, tokens), jnp.int32), jnp.zeros(count, jnp.int32))
