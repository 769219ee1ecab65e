"""Next-token prediction on human conversation: makes the embedded base model, and ensembles of its like."""
from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from kl_reg import storage
from kl_reg.analysis.behaviour.script_price import Dialogue, price_of_script
from kl_reg.analysis.report.stats import mean_and_error
from kl_reg.models import decoder
from kl_reg.models.layers import Rope
from kl_reg.pretrained import chitchat, families, folders, tokenizer, weights
from kl_reg.pretraining import model_card
from kl_reg.runs import checkpoint
from kl_reg.runs.log import progress_bar

_RESUMABLE = ("steps", "decay", "output", "eval_every", "members")      # may change when a training is resumed
_SINGLE = {"members": 1, "bootstrap": False, "tokenizer": None}         # where a configuration does not name them
_COUNTS = ("members", "vocab", "width", "layers", "heads", "kv_heads", "mlp_width", "context", "rows", "steps",
           "warmup", "eval_every")
_RATES = ("decay", "muon_learning_rate", "adam_learning_rate", "weight_decay")


class State(NamedTuple):
    """What a resumed training needs beside its configuration; `seconds` is the time spent so far."""

    params: dict
    opt_state: tuple
    step: jax.Array
    seconds: jax.Array


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Muon on the layers' matrices, Adam elsewhere; linear warm-up, constant, then linear decay to zero."""
    decay = int(config.decay * config.steps)
    shape = optax.join_schedules([optax.linear_schedule(0.0, 1.0, config.warmup), optax.constant_schedule(1.0),
                                  optax.linear_schedule(1.0, 0.0, decay)], [config.warmup, config.steps - decay])
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    kinds = partial(jax.tree_util.tree_map_with_path,
                    lambda path, x: matrix if path[0].key == "layers" and x.ndim == 3 else None)
    muon = optax.contrib.muon(
        lambda step: config.muon_learning_rate * shape(step), weight_decay=config.weight_decay,
        adam_learning_rate=lambda step: config.adam_learning_rate * shape(step),
        adam_b2=0.98, muon_weight_dimension_numbers=kinds)
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def loss(shapes: decoder.DecoderConfig, params: dict, tokens: jax.Array) -> jax.Array:
    """Mean next-token cross-entropy of windows [b, t + 1], nats per token."""
    hidden = decoder.forward(shapes, params, tokens[:, :-1], jnp.zeros(len(tokens), jnp.int32))
    logits = decoder.logits(shapes, params, hidden.last)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def batches(documents: list[np.ndarray], seed: int, rows: int, length: int):
    """Endless windows [rows, length]: each epoch the documents are shuffled, joined and cut anew."""
    order, left = np.random.default_rng(seed), np.zeros(0, np.int32)
    while True:
        left = np.concatenate([left, *(documents[i] for i in order.permutation(len(documents)))])
        count = len(left) // (rows * length)
        cut = left[:count * rows * length].reshape(rows, count, length)   # neighbours in time fall into one row
        yield from (cut[:, i] for i in order.permutation(count))
        left = left[count * rows * length:]


def resolve(config: ConfigDict) -> ConfigDict:
    """The configuration with every setting: a single model without resampling where it does not say otherwise.

    Raises:
        ValueError: names the setting, its value and what is accepted.
    """
    config = ConfigDict(_SINGLE | config.to_dict())
    known = {*_SINGLE, *_COUNTS, *_RATES, "seed", "output", "dtype"}
    if set(config) != known:
        raise ValueError(f"config: unknown settings {sorted({*config} - known)}, missing {sorted(known - {*config})}")
    wrong = [f"{key}={config[key]!r} must be a whole number of at least 1" for key in _COUNTS
             if not isinstance(config[key], int) or config[key] < 1]
    wrong += [f"{key}={config[key]!r} must be a number of at least 0" for key in _RATES
              if not 0 <= config[key] < np.inf]
    for error in wrong or _misfits(config):
        raise ValueError(error)
    return config


def _misfits(c):
    embedded, least = c.tokenizer == "embedded", 256 + 1 + len(chitchat.SPEAKERS)
    size = tokenizer.load(folders.find("embedded")).get_vocab_size() if embedded else c.vocab
    checks = {
        f"tokenizer={c.tokenizer!r}: choose 'embedded', or None to train one": embedded or c.tokenizer is None,
        f"vocab={c.vocab} must be at least {least}: bytes, start token and speakers": c.vocab >= least,
        f"vocab={c.vocab}: tokenizer='embedded' has {size} tokens; use vocab={size}": c.vocab == size,
        f"seed={c.seed}: the seeds of all members must lie in 0 ... 2**31 - 1": 0 <= c.seed <= 2**31 - c.members,
        f"steps={c.steps}: too few; warmup={c.warmup}, decay={c.decay}": c.warmup + int(c.decay * c.steps) <= c.steps,
        "muon_learning_rate=0 and adam_learning_rate=0 train nothing": c.muon_learning_rate or c.adam_learning_rate,
        f"width={c.width} must be a multiple of 2 * heads, {2 * c.heads}": c.width % (2 * c.heads) == 0,
        f"heads={c.heads} must be a multiple of kv_heads={c.kv_heads}": c.heads % c.kv_heads == 0,
        f"dtype={c.dtype!r}: choose 'float32' or 'bfloat16'": c.dtype in ("float32", "bfloat16")}
    return [error for error, right in checks.items() if not right]


def shapes(config: ConfigDict) -> decoder.DecoderConfig:
    """Of every model that this configuration trains."""
    head = config.width // config.heads
    return decoder.DecoderConfig(
        vocab=config.vocab, width=config.width, layers=config.layers, heads=config.heads, kv_heads=config.kv_heads,
        head_width=head, mlp_width=config.mlp_width, max_position=config.context, rope=Rope(10000.0, head),
        dtype=config.dtype)


def resample(count: int, seed: int) -> np.ndarray:
    """Indices [count] of a bootstrap resample (Efron 1979), with replacement; not the stream that orders `batches`."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,))).integers(count, size=count)


def train(config: ConfigDict, workdir: pathlib.Path, command: str) -> list[pathlib.Path]:
    """Trains the members, resumes from `workdir` where it can, and gives their model folders, each with its card.

    A single model is written to `config.output`; several to `config.output`/<k>, described by
    `config.output`/ensemble.json. Member k has the seed `config.seed` + k (initialisation, order of the batches, and
    the resample of the training conversations where `config.bootstrap` is true), and is the model that a single
    training with that seed gives. Tokenizer, shapes and held-out conversations are those of all.

    Args:
        command: what started the training, for the cards.

    Raises:
        ValueError: a setting is wrong.
        ImportError: chitchat-dataset is not installed.
        FileExistsError: `workdir` holds another training.
    """
    config = resolve(config)
    data = chitchat.load()
    kept = {key: value for key, value in config.to_dict().items() if key not in _RESUMABLE}
    kept["ensemble"] = config.members > 1
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]
    checkpoint.claim(workdir, {"config": config.to_dict(), "fingerprint": digest})
    tok = _tokenizer(config, data[0], workdir)
    made = [_member(config, k, data, tok, workdir, command) for k in range(config.members)]
    if config.members > 1:
        cards = {folder: json.loads((folder / "card.json").read_text(encoding="utf-8")) for folder in made}
        members = [{"folder": folder.name, "seed": card["seed"], "digest": folders.digest(folder),
                    "held_out_nats_per_token": card["nats_per_token"]} for folder, card in cards.items()]
        index = json.dumps({"bootstrap": config.bootstrap, "members": members}, indent=2)
        (_output(config) / "ensemble.json").write_text(index + "\n", encoding="utf-8")
    return made


def _output(config):
    return storage.local(config.output, "config.output")


def _tokenizer(config, train_set, workdir):
    path = workdir / "tokenizer.json"
    if not path.exists():
        texts = (chitchat.transcript(c.turns) for c in train_set)
        tok = (tokenizer.load(folders.EMBEDDED) if config.tokenizer == "embedded" else
               tokenizer.train(texts, config.vocab, chitchat.SPEAKERS))
        tok.save(str(path))
    return tokenizer.load(workdir)


def _member(config, k, data, tok, workdir, command):
    """Member k, trained unless it is finished; `workdir` is that of all."""
    single, seed = config.members == 1, config.seed + k
    part, name = ("", "pretrain") if single else (str(k), f"member {k} ({k + 1} of {config.members})")
    workdir, output = workdir / part, _output(config) / part
    record, ended = workdir / "finished.json", {"steps": config.steps, "decay": config.decay}
    if record.exists() and (output / "card.json").exists() and (
            json.loads(record.read_text(encoding="utf-8")) == ended | {"digest": folders.digest(output)}):
        return output
    train_set, held_out, counts = data
    used = resample(len(train_set), seed) if config.bootstrap else np.arange(len(train_set))
    documents, held = [_ids(tok, train_set[i]) for i in used], [_ids(tok, c) for c in held_out]
    state = _fit(config, seed, documents, held, workdir, name)
    weights.save(output, families.llama_settings(shapes(config)), state.params)
    tok.save(str(output / "tokenizer.json"))
    with open(output / "held_out.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(c._asdict(), ensure_ascii=False) + "\n" for c in held_out)
    licence = importlib.metadata.distribution("chitchat-dataset").read_text("LICENSE")
    (output / "held_out.LICENSE").write_text(licence, encoding="utf-8")
    made = {"command": command, "member": None if single else k, "seed": seed, "bootstrap": config.bootstrap,
            "tokenizer": config.tokenizer, "train_conversations": len(used), "train_tokens": sum(map(len, documents)),
            "train_conversations_distinct": len(np.unique(used)), **counts, "minutes": float(state.seconds) / 60}
    _write_card(config, output, held_out, held, made)
    record.write_text(json.dumps(ended | {"digest": folders.digest(output)}) + "\n", encoding="utf-8")
    return output


def _ids(tok, conversation):
    text = tokenizer.START + chitchat.transcript(conversation.turns)
    return np.array(tokenizer.encode(tok, text), np.int32)


def _fit(config, seed, documents, held, workdir, name):
    optim, model = optimizer(config), shapes(config)

    @partial(jax.jit, donate_argnums=0)
    def step(state, tokens):
        value, grads = jax.value_and_grad(partial(loss, model))(state.params, tokens)
        updates, opt_state = optim.update(grads, state.opt_state, state.params)
        return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state,
                              step=state.step + 1), value

    params = decoder.init(model, jax.random.key(seed))
    state = State(params, optim.init(params), jnp.int32(0), jnp.float32(0))
    options = ocp.CheckpointManagerOptions(max_to_keep=1, save_interval_steps=config.eval_every)
    with (ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options) as manager,
          progress_bar(name, config.steps, manager.latest_step() or 0) as bar):
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        bar.log(f"{name}: seed {seed}, from step {int(state.step)} to {config.steps}")
        data = itertools.islice(batches(documents, seed, config.rows, config.context + 1), int(state.step), None)
        valid = jax.jit(partial(loss, model))
        windows = next(batches(held, 0, 64, config.context + 1))
        began, spent = time.monotonic(), float(state.seconds)
        for i in range(int(state.step) + 1, config.steps + 1):
            state, value = step(state, jnp.asarray(next(data)))
            bar.step(train=value)
            if i % config.eval_every == 0 or i == config.steps:
                state = state._replace(seconds=jnp.float32(spent + time.monotonic() - began))
                bar.log(f"{name}: step {i}, held-out {valid(state.params, windows):.3f} nats per token")
                manager.save(i, args=ocp.args.StandardSave(state), force=i == config.steps)
    return state


def held_out_loss(model: weights.Model, documents: list[np.ndarray], context: int) -> float:
    """Nats per token over all held-out windows of `context` predictions."""
    stream = np.concatenate(documents)
    windows = stream[:len(stream) // (context + 1) * (context + 1)].reshape(-1, context + 1)
    value = jax.jit(partial(loss, model.config))
    parts = [windows[i:i + 32] for i in range(0, len(windows), 32)]
    return float(np.average([value(model.params, jnp.asarray(part)) for part in parts], weights=list(map(len, parts))))


def _write_card(config, output, held_out, held, made):
    """Measures the model in `output` on the held-out conversations; `made` is what the card says of its making."""
    model = weights.load(str(output))
    nats = held_out_loss(model, held, config.context)
    chars = sum(len(chitchat.transcript(c.turns)) for c in held_out) / sum(map(len, held))
    openings = [tokenizer.START + chitchat.transcript(c.turns[:2]) for c in held_out
                if sum(map(len, c.turns[:2])) < 160]
    silence, = price_of_script(model, openings, ("",), turns=10, episodes=512, seed=0,
                               dialogue=Dialogue(*chitchat.SPEAKERS, chitchat.END))
    card = {
        "data": "chitchat-dataset 0.9.0 (BYU PCC lab), MIT", "licence": "Apache-2.0 (weights); MIT (held_out.jsonl)",
        **made, "parameters": sum(x.size for x in jax.tree.leaves(model.params)), "context": config.context,
        "held_out_conversations": len(held_out), "human_turns": sum(len(c.turns) for c in held_out),
        "human_empty_turns": sum(not turn for c in held_out for turn in c.turns),
        "nats_per_token": nats, "bits_per_character": nats / np.log(2) / chars, "characters_per_token": chars,
        "steps": config.steps, "tokens_seen": config.steps * config.rows * config.context,
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}", "price_of_silence_episodes": len(silence.nats),
        "price_of_silence_nats": [round(float(x), 3) for x in mean_and_error(silence.nats)[0]]}
    (output / "README.md").write_text(model_card.text(card), encoding="utf-8")
    (output / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
