"""The log-likelihood reward against torch."""
import importlib
import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from reward_staging import reply

from kl_reg import rewards
from kl_reg.pretrained import tokenizer

module = importlib.import_module("kl_reg.rewards.log_likelihood")      # whose name its function has, too


@pytest.fixture(scope="module")
def torch_model(tiny_folder):
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def reward(tiny_folder):
    return module.log_likelihood(str(tiny_folder))


def expected(torch_model, before, said):
    """Mean log-probability of the tokens `said` behind `before`."""
    with torch.no_grad():
        log_probs = torch_model(torch.tensor([before + said])).logits[0].log_softmax(-1).numpy()
    return np.mean([log_probs[len(before) + i - 1, token] for i, token in enumerate(said)])


LONG = "I am good, it is a nice day, how are you? " * 20


PLAIN = [("A: hello there\nB:", " I am good"), ("A: hello there\nB:", "!"), ("how are yo", "u 12?"), ("é", "ü – ok"),
         ("hello\n", "there, how are you 3?" * 4)]
MOVED = {("A: hello there\nB:", "I am good"): ("A: hello there\nB:", " I am good"),     # which the environment cuts
         ("A: hello there\nB: ", "I am good"): ("A: hello there\nB:", " I am good"), (LONG, "you"): (LONG[:-1], " you")}


@pytest.mark.parametrize(("given", "read"), [*zip(PLAIN, PLAIN, strict=True), *MOVED.items()], ids=range(8))
def test_the_mean_is_torchs_over_the_completions_tokens(reward, torch_model, given, read):
    before, said = (tokenizer.encode(reward.words, text) for text in read)
    before = before[max(0, len(before) + len(said) - 64):]      # the context has 64 tokens
    assert 0 < len(said) < 64
    (score,) = reward(prompts=[given[0]], completions=[given[1]], answer=["x"])
    assert score == pytest.approx(expected(torch_model, before, said), abs=1e-4)


def test_a_token_with_nothing_before_it_is_not_scored(reward, torch_model):
    ids = tokenizer.encode(reward.words, "hello there")
    assert len(ids) > 1
    said = reward(prompts=["", "", "hello", ""], completions=["hello there", "", "", "!"])
    assert said[1:] == [None, None, None]
    assert said[0] == pytest.approx(expected(torch_model, ids[:1], ids[1:]), abs=1e-4)


def test_a_chat_is_read_by_the_models_template(tiny_folder, torch_model, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "chat")
    (tmp_path / "chat/tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
                         "{% if add_generation_prompt %}<assistant>{% endif %}"}))
    reward = rewards.of(module.log_likelihood(str(tmp_path / "chat")))
    words = tokenizer.load(tmp_path / "chat")
    before, said = tokenizer.encode(words, "<user> how are you\n<assistant>"), tokenizer.encode(words, " good")
    out = rewards.score(reward, [reply(" good", prompt=[{"role": "user", "content": "how are you"}])])
    assert out.total[0] == pytest.approx(expected(torch_model, before, said), abs=1e-4)


def test_a_prefill_is_read_as_the_beginning_of_the_completion(tiny_folder, torch_model, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "chat")
    (tmp_path / "chat/tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"}), encoding="utf-8")
    reward, words = rewards.of(module.log_likelihood(str(tmp_path / "chat"))), tokenizer.load(tmp_path / "chat")
    before, said = tokenizer.encode(words, "<assistant> I am"), tokenizer.encode(words, " good")
    out = rewards.score(reward, [reply(" good", prompt=[{"role": "assistant", "content": "I am"}])])
    assert out.total[0] == pytest.approx(expected(torch_model, before, said), abs=1e-4)


def test_a_chat_without_a_template_and_a_text_beyond_the_context_are_named(reward):
    for bad, message in ((reply(prompt=[{"role": "user", "content": "hi"}]), "no chat template"),
                         (reply(LONG), "completion has .* tokens; .* context of 64")):
        with pytest.raises(ValueError, match=f"'LogLikelihood' raised ValueError: .*{message}"):
            rewards.score(rewards.of(reward), [bad])


def test_nothing_is_compiled_for_another_number_of_texts(reward):
    texts = [f"hello {number}" for number in range(70)]
    reward(prompts=["hello"], completions=["hello 1"])
    compiled = module._means._cache_size()
    with jax.transfer_guard("disallow"):
        assert len(set(reward(prompts=["hello"] * 70, completions=texts))) == 70
    assert module._means._cache_size() == compiled


def test_a_token_without_an_embedding_is_refused_where_it_is_used(tiny_folder, tmp_path, reward):
    shutil.copytree(tiny_folder, tmp_path / "other")
    words = tokenizer.load(tiny_folder)
    words.add_tokens([f"word{number}" for number in range(50)])
    words.save(str(tmp_path / "other/tokenizer.json"))
    other = module.log_likelihood(str(tmp_path / "other"))
    assert other(prompts=["hello"], completions=[" there"]) == reward(prompts=["hello"], completions=[" there"])
    with pytest.raises(ValueError, match="token .*'word49'.* no embedding .* 300 rows"):
        other(prompts=["hello"], completions=[" word49"])


def test_its_digest_is_of_the_folder(tiny_folder, reward, tmp_path):
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    assert module.log_likelihood(str(other)).digest() == reward.digest()
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    assert module.log_likelihood(str(other)).digest() != reward.digest()
