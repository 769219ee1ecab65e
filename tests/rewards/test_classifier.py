"""The classifier reward against torch's DistilBERT, and its choice of a label."""
import dataclasses
import importlib

import hypothesis
import jax
import numpy as np
import pytest
import torch
import transformers
from hypothesis import strategies as st
from reward_staging import WORDS, settings, torch_model
from tokenizers import Tokenizer

from kl_reg import rewards
from kl_reg.rewards.classifier import classifier, output_of

module = importlib.import_module("kl_reg.rewards.classifier")      # whose name its function has, too

TEXTS = ["", "love", "not so good", " ".join(WORDS), " ".join(WORDS * 2), "unheard", " ".join(["day"] * 14),
         " ".join(["love"] * 15), " ".join(WORDS * 9)]      # up to and beyond the edges of a bucket and of the context


@pytest.fixture(scope="module")
def expected(distilbert):
    """Torch's probability of "POSITIVE" of each of TEXTS, alone and unpadded."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(distilbert / "tokenizer.json"))
    ids = [tokenizer(text, truncation=True, max_length=40)["input_ids"] for text in TEXTS]
    assert {len(row) for row in ids} >= {2, 16, 17, 40}
    out = [float(torch_model()(torch.tensor([row])).logits.softmax(-1)[0, 1]) for row in ids]
    assert len(set(np.round(out, 3))) == len(TEXTS)
    return dict(zip(TEXTS, out, strict=True))


@pytest.fixture(scope="module")
def reward(distilbert):
    return classifier(str(distilbert))


def scores(reward, texts):
    return reward(prompts=["A:"] * len(texts), completions=texts, completion_ids=[[0]] * len(texts), column=texts)


def fresh(reward):
    """The same reward, which remembers nothing."""
    return dataclasses.replace(reward, memory={})


def test_scores_are_torchs_probabilities_together_and_alone(reward, expected):
    together = scores(fresh(reward), TEXTS)
    np.testing.assert_allclose(together, list(expected.values()), atol=1e-5)
    for text, score in zip(TEXTS, together, strict=True):
        assert scores(fresh(reward), [text]) == [score]


@hypothesis.given(st.lists(st.sampled_from(TEXTS), max_size=80))
def test_any_batch_is_scored_in_its_order(reward, expected, texts):
    np.testing.assert_allclose(scores(fresh(reward), texts), [expected[text] for text in texts], atol=1e-5)


def test_a_score_is_the_same_to_the_last_bit_wherever_its_text_stands(reward):
    texts = [f"{a} {b}" for a in WORDS for b in WORDS]                            # three batches and a part of one
    together = scores(fresh(reward), texts)
    assert len(set(together)) > 90
    assert scores(fresh(reward), texts[::-1]) == together[::-1]
    assert [scores(fresh(reward), [text])[0] for text in texts[:40]] == together[:40]


def test_nothing_is_compiled_for_another_number_of_texts_or_another_length(reward):
    texts = [f"{a} {b}" for a in WORDS for b in WORDS]
    scores(fresh(reward), ["day", " ".join(["day"] * 20)])          # one of each bucket
    compiled = module._probabilities._cache_size()
    for count in (2, 31, 32, 33, 100):
        scores(fresh(reward), texts[:count])
    scores(fresh(reward), [" ".join(["day"] * length) for length in (1, 5, 14, 15, 21, 30)])
    assert module._probabilities._cache_size() == compiled


class Recording:
    """A tokenizer that says what it was asked for."""

    def __init__(self, tokenizer):
        self.tokenizer, self.seen = tokenizer, []

    def encode_batch(self, texts):
        self.seen += texts
        return self.tokenizer.encode_batch(texts)

    def id_to_token(self, number):
        return self.tokenizer.id_to_token(number)


def test_a_token_without_an_embedding_is_refused_where_it_is_used(reward):
    words = Tokenizer.from_str(reward.model.tokenizer.to_str())
    words.add_tokens([f"filler{i}" for i in range(words.get_vocab_size(), 72)] + ["unheard"])
    other = dataclasses.replace(reward, model=reward.model._replace(tokenizer=words), memory={})
    assert other(completions=["a nice day"]) == pytest.approx(reward(completions=["a nice day"]))
    with pytest.raises(ValueError, match="token .*'unheard'.* no embedding in the classifier, whose table has 72 rows"):
        other(completions=["a nice day", "unheard of"])


def test_a_text_is_scored_once(reward):
    tokenizer = Recording(reward.model.tokenizer)
    listener = dataclasses.replace(reward, model=reward.model._replace(tokenizer=tokenizer), memory={})
    first = scores(listener, ["love", "so good", "love", "love"])
    assert scores(listener, ["so good", "love", "so good"]) == [first[1], first[0], first[1]]
    assert tokenizer.seen == ["love", "so good"]


def test_the_oldest_texts_are_forgotten(reward, monkeypatch):
    monkeypatch.setattr(module, "_REMEMBERED", 2)
    listener = fresh(reward)
    assert scores(listener, ["love", "hate", "day"]) == scores(reward, ["love", "hate", "day"])
    assert list(listener.memory) == ["hate", "day"]


def test_what_moves_between_host_and_device_is_said(reward):
    with jax.transfer_guard("disallow"):
        assert 0 < scores(fresh(reward), ["love"])[0] < 1


def test_labels_are_each_others_complement(distilbert, reward):
    negative = scores(classifier(str(distilbert), "negative"), TEXTS)
    np.testing.assert_allclose(np.add(negative, scores(reward, TEXTS)), 1, atol=1e-6)


@pytest.mark.parametrize(("labels", "label", "number"), [
    (("NEGATIVE", "POSITIVE"), "", 1), (("Positive", "Neutral", "Negative"), "", 0), (("LABEL_0", "LABEL_1"), "", 1),
    (("LABEL_0",), "", 0), (("a", "b", "c"), "c", 2), (("POSITIVE", "NEGATIVE"), "negative", 1)])
def test_the_label_is_the_asked_one_or_the_positive_one(labels, label, number):
    assert output_of(labels, label, "x") == number


@pytest.mark.parametrize(("labels", "label"), [(("joy", "anger", "fear"), ""), (("joy", "anger"), "fear")])
def test_without_such_a_label_the_labels_are_listed(labels, label):
    with pytest.raises(ValueError, match=f"reward.label='{label}'.*joy, anger"):
        output_of(labels, label, "x")


def test_the_configuration_names_it(distilbert, reward):
    chosen = settings(name="classifier", path=str(distilbert))
    built = rewards.build(chosen.reward)
    assert scores(built.functions[0], TEXTS) == scores(fresh(reward), TEXTS)


def test_a_path_without_a_model_is_named():
    with pytest.raises(FileNotFoundError, match="reward.path='/nowhere': .*missing"):
        rewards.check(settings(name="classifier", path="/nowhere").reward)


def test_a_label_that_the_model_lacks_is_refused_before_the_weights_are_read(distilbert):
    with pytest.raises(ValueError, match="NEGATIVE, POSITIVE"):
        rewards.check(settings(name="classifier", path=str(distilbert), label="neutral").reward)


def test_its_digest_is_of_weights_and_label(distilbert, reward, tmp_path):
    torch_model(seed=6).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((distilbert / "tokenizer.json").read_bytes())
    same, other = classifier(str(distilbert)), classifier(str(tmp_path))
    label = classifier(str(distilbert), "NEGATIVE")
    assert rewards.digest(rewards.of(same)) == rewards.digest(rewards.of(reward))
    assert len({rewards.digest(rewards.of(x)) for x in (reward, other, label)}) == 3


def test_signed_confidence_is_that_of_the_winning_label(distilbert, reward, expected):
    """(±p + 1) / 2 with p, at least 1/2, the probability of the label that wins."""
    signed = classifier(str(distilbert), scale="signed_confidence")
    by_hand = [(p + 1) / 2 if p > 0.5 else (1 - (1 - p)) / 2 for p in expected.values()]
    got = scores(signed, TEXTS)
    np.testing.assert_allclose(got, by_hand, atol=1e-5)
    assert not any(0.25 < score < 0.75 for score in got)
    assert signed.digest() != reward.digest()


def test_a_scale_that_there_is_not_is_refused(distilbert):
    with pytest.raises(ValueError, match="reward.scale='loud' with reward.name='classifier'"):
        rewards.check(settings(name="classifier", path=str(distilbert), scale="loud").reward)
