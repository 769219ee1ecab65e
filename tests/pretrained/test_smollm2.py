"""A real model: SmolLM2-135M-Instruct from the package index, as `python -m launch.fetch smollm2` leaves it."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from kl_reg.models import decoder
from kl_reg.pretrained import folders, tokenizer, weights

PARAGRAPH = ("The water cycle has no beginning and no end. The sun warms the sea, and some of its water rises as vapour"
             " into the air, where it cools and forms clouds. In 1 of 10 years it rains too little, else too much.")

pytestmark = pytest.mark.skipif(not folders.place("smollm2").is_dir(), reason="`python -m launch.fetch smollm2` first")


def test_a_paragraph_costs_what_torch_says():
    model = weights.load("smollm2")
    ids = tokenizer.opening(tokenizer.load(model.folder), PARAGRAPH)
    tokens, start = jnp.array([ids]), jnp.zeros(1, jnp.int32)
    run = jax.jit(lambda params: decoder.logits(model.config, params, decoder.forward(
        model.config, params, tokens, start).last))
    (file,) = model.folder.glob("*.gguf")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model.folder, gguf_file=file.name)
    with torch.no_grad():
        theirs = oracle(torch.tensor([ids])).logits[0].numpy()
    ours = np.asarray(run(model.params))[0]
    assert 1 < -chosen(theirs, ids).mean() < 4
    np.testing.assert_allclose(chosen(ours, ids).mean(), chosen(theirs, ids).mean(), atol=1e-3)
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def chosen(logits, ids):
    """log-probabilities of the tokens behind the first."""
    return np.array(torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1)[range(len(ids) - 1), ids[1:]])
