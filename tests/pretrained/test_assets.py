"""The embedded base model, as it is shipped."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kl_reg.models import decoder
from kl_reg.pretrained import chitchat, folders, tokenizer, weights


@pytest.fixture(scope="module")
def conversations():
    return [json.loads(line) for line in (folders.EMBEDDED / "held_out.jsonl").read_text().splitlines()]


def test_the_package_carries_at_most_12_megabytes():
    assert sum(file.stat().st_size for file in folders.EMBEDDED.iterdir()) <= 12e6


def test_held_out_conversations_are_those_of_the_hash(conversations):
    train, held_out, _ = chitchat.load()
    assert [c["ident"] for c in conversations] == [c.ident for c in held_out]
    assert not {c["ident"] for c in conversations} & {c.ident for c in train}


@pytest.mark.filterwarnings("ignore")
def test_held_out_text_costs_what_torch_and_the_card_say(conversations):
    import torch
    from transformers import LlamaForCausalLM

    model = weights.load("embedded")
    card = json.loads((folders.EMBEDDED / "card.json").read_text())
    tok = tokenizer.load(folders.EMBEDDED)
    rows = [tokenizer.encode(tok, tokenizer.START + chitchat.transcript(c["turns"])) for c in conversations]
    rows = np.array([row[:model.config.max_position] for row in rows if len(row) >= model.config.max_position])
    batch = jnp.asarray(rows[:8])
    hidden = decoder.forward(model.config, model.params, batch, jnp.zeros(len(batch), jnp.int32)).last
    ours = jax.nn.log_softmax(hidden @ decoder.unembedding(model.params).T)
    with torch.no_grad():
        oracle = LlamaForCausalLM.from_pretrained(folders.EMBEDDED, torch_dtype=torch.float32)
        theirs = oracle(torch.tensor(np.asarray(batch))).logits.log_softmax(-1).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    nats = -np.take_along_axis(theirs[:, :-1], rows[:8, 1:, None], axis=2).mean()
    assert abs(nats - card["nats_per_token"]) < 0.3     # eight windows of many
