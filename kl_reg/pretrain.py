"""Next-token prediction on human conversation: makes the embedded base model."""
from __future__ import annotations

import hashlib
import importlib.metadata
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

from kl_reg import checkpoint, chitchat
from kl_reg.analysis.price import price_of_script
from kl_reg.metrics import progress_bar
from kl_reg.models import decoder, tokenizer, weights

_RESUMABLE = ("steps", "decay", "output", "eval_every")      # may change when a training is resumed


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
    logits = jnp.einsum("btd,vd->btv", hidden.last, decoder.unembedding(params), preferred_element_type=jnp.float32)
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


def train(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """Trains, resumes from `workdir` where it can, and writes the model folder `config.output` with its card.

    Raises:
        ImportError: chitchat-dataset is not installed.
        FileExistsError: `workdir` holds another training.
    """
    train_set, held_out, counts = chitchat.load()
    kept = {key: value for key, value in config.to_dict().items() if key not in _RESUMABLE}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]
    checkpoint.claim(workdir, {"config": config.to_dict(), "fingerprint": digest})
    tok = _tokenizer(config, train_set, workdir)
    start = tok.token_to_id(tokenizer.START)
    documents, held = ([np.array([start, *tokenizer.encode(tok, chitchat.transcript(c.turns))], np.int32) for c in part]
                       for part in (train_set, held_out))
    shapes = decoder.DecoderConfig(
        vocab=config.vocab, width=config.width, layers=config.layers, heads=config.heads, kv_heads=config.kv_heads,
        head_width=config.width // config.heads, mlp_width=config.mlp_width,
        max_position=config.context, dtype=config.dtype)
    state = _fit(config, shapes, documents, held, workdir)
    output = pathlib.Path(config.output)
    weights.save(output, shapes, state.params)
    tok.save(str(output / "tokenizer.json"))
    with open(output / "held_out.jsonl", "w") as file:
        file.writelines(json.dumps(c._asdict(), ensure_ascii=False) + "\n" for c in held_out)
    licence = importlib.metadata.distribution("chitchat-dataset").read_text("LICENSE")
    (output / "held_out.LICENSE").write_text(licence)
    _write_card(config, output, held_out, len(documents), sum(map(len, documents)), float(state.seconds), counts)
    return output


def _tokenizer(config, train_set, workdir):
    path = workdir / "tokenizer.json"
    if not path.exists():
        texts = (chitchat.transcript(c.turns) for c in train_set)
        tokenizer.train(texts, config.vocab, chitchat.SPEAKERS).save(str(path))
    return tokenizer.load(workdir)


def _fit(config, shapes, documents, held, workdir):
    optim = optimizer(config)

    @partial(jax.jit, donate_argnums=0)
    def step(state, tokens):
        value, grads = jax.value_and_grad(partial(loss, shapes))(state.params, tokens)
        updates, opt_state = optim.update(grads, state.opt_state, state.params)
        return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state,
                              step=state.step + 1), value

    params = decoder.init(shapes, jax.random.key(config.seed))
    state = State(params, optim.init(params), jnp.int32(0), jnp.float32(0))
    manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(
        max_to_keep=1, save_interval_steps=config.eval_every))
    if manager.latest_step() is not None:
        state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
    data = batches(documents, config.seed, config.rows, config.context + 1)
    for _ in range(int(state.step)):
        next(data)
    valid = jax.jit(partial(loss, shapes))
    windows = next(batches(held, 0, 64, config.context + 1))
    began, spent = time.monotonic(), float(state.seconds)
    with progress_bar("pretrain", config.steps, int(state.step)) as bar:
        for i in range(int(state.step) + 1, config.steps + 1):
            state, value = step(state, jnp.asarray(next(data)))
            bar.step(train=value)
            if i % config.eval_every == 0 or i == config.steps:
                state = state._replace(seconds=jnp.float32(spent + time.monotonic() - began))
                bar.log(f"step {i}: held-out {valid(state.params, windows):.3f} nats per token")
                manager.save(i, args=ocp.args.StandardSave(state), force=i == config.steps)
    manager.wait_until_finished()
    return state


def held_out_loss(model: weights.Model, documents: list[np.ndarray], context: int) -> float:
    """Nats per token over all held-out windows of `context` predictions."""
    stream = np.concatenate(documents)
    windows = stream[:len(stream) // (context + 1) * (context + 1)].reshape(-1, context + 1)
    value = jax.jit(partial(loss, model.config))
    parts = [windows[i:i + 32] for i in range(0, len(windows), 32)]
    return float(np.average([value(model.params, jnp.asarray(part)) for part in parts], weights=list(map(len, parts))))


def _write_card(config, output, held_out, documents, tokens, seconds, counts):
    model = weights.load(str(output))
    tok = tokenizer.load(output)
    texts = [chitchat.transcript(c.turns) for c in held_out]
    ids = [np.array([tok.token_to_id(tokenizer.START), *tokenizer.encode(tok, text)]) for text in texts]
    nats = held_out_loss(model, ids, config.context)
    chars = sum(map(len, texts)) / sum(map(len, ids))
    count = sum(x.size for x in jax.tree.leaves(model.params))
    openings = [c.turns[:2] for c in held_out if sum(map(len, c.turns[:2])) < 160]
    silence, reached = price_of_script(model, openings, "", turns=10, episodes=512, seed=0)
    card = {
        "data": "chitchat-dataset 0.9.0 (BYU PCC lab), MIT", "licence": "Apache-2.0 (weights); MIT (held_out.jsonl)",
        "parameters": count, "context": config.context, "train_conversations": documents, "train_tokens": tokens,
        "held_out_conversations": len(held_out), **counts,
        "human_turns": sum(len(c.turns) for c in held_out),
        "human_empty_turns": sum(not turn for c in held_out for turn in c.turns),
        "nats_per_token": nats, "bits_per_character": nats / np.log(2) / chars, "characters_per_token": chars,
        "steps": config.steps, "tokens_seen": config.steps * config.rows * config.context,
        "minutes": seconds / 60, "machine": f"{os.cpu_count()} cores ({platform.machine()}), {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}", "price_of_silence_nats": [round(float(x), 3) for x in silence],
        "price_of_silence_episodes": reached}
    (output / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    (output / "README.md").write_text(_card_text(card))


def _card_text(card):
    price = card["price_of_silence_nats"]
    cheaper = price[-1] < 0.5 * price[0]
    verdict = ("It gets cheaper with repetition: the model continues the pattern." if cheaper else
               "It does not get much cheaper with repetition: this model is too weak to continue the pattern, so it\n"
               "cannot show the paper's cheap silence.")
    return f"""# The embedded base model

A Llama-style decoder of {card['parameters']:,} parameters (bfloat16), context {card['context']} tokens, byte-level BPE.
Made by `python -m launch.pretrain --config=configs/pretrain_chitchat.py`. It is a small, real model of human small talk
for experiments on KL-regularised RL, and of no use as a chat model.

| | |
|---|---|
| data | {card['data']}: {card['conversations']:,} conversations, {card['messages']:,} messages |
| used | those with at least two turns: {card['train_conversations']:,} conversations, {card['train_tokens']:,} tokens |
| held out | {card['held_out_conversations']} conversations, chosen by a hash of their identifier (`held_out.jsonl`) |
| format | one turn a line, speakers `A:` and `B:`, consecutive messages of one speaker joined |
| empty human messages | {card['empty_messages']} of {card['messages']:,} |
| empty human turns, held out | {card['human_empty_turns']} of {card['human_turns']:,} |
| held-out loss | {card['nats_per_token']:.3f} nats per token, {card['bits_per_character']:.3f} bits per character \
({card['characters_per_token']:.2f} characters per token) |
| training | {card['steps']:,} steps, {card['tokens_seen']:,} tokens, {card['minutes']:.0f} minutes on \
{card['machine']} |
| licence | {card['licence']} |

## The price of silence
-log beta of an empty turn of A, turn after turn, in nats: mean over the {card['price_of_silence_episodes']} of 512
transcripts whose ten turns fit the context (held-out openings of two turns; B answers by sampling from the model):

{' '.join(f'{x:.2f}' for x in price)}

{verdict}
"""
