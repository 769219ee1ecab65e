import numpy as np
import pytest

from kl_reg import chitchat
from kl_reg.analysis.price import price_of_script
from kl_reg.models import tokenizer, weights


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", ["", "hello there"])
def test_the_first_turn_costs_what_torch_says(tiny_folder, tiny_tokenizer, script):
    import torch
    from transformers import LlamaForCausalLM

    opening = ["hi", "hello"]
    price, reached = price_of_script(weights.load(str(tiny_folder)), [opening], script, turns=1, episodes=3, seed=0)
    assert reached == 3
    before = tokenizer.encode(tiny_tokenizer, tokenizer.START + chitchat.transcript(opening) + "A:")
    turn = tokenizer.encode(tiny_tokenizer, (" " + script if script else "") + "\n")
    torch_model = LlamaForCausalLM.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    with torch.no_grad():
        log_probs = torch_model(torch.tensor([before + turn])).logits[0].log_softmax(-1).numpy()
    expected = -sum(log_probs[len(before) - 1 + i, token] for i, token in enumerate(turn))
    np.testing.assert_allclose(price[0], expected, rtol=1e-4)


def test_turns_that_fit_in_no_episode_have_no_price(tiny_folder):
    price, reached = price_of_script(weights.load(str(tiny_folder)), [["hi", "hello"]], "hello there, how are you",
                                     turns=40, episodes=2, seed=0)
    assert reached == 0 and np.isnan(price).all()
