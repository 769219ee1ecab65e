"""The peer of the completion part is trained on what kl_reg's policies are."""
import json

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from benchmarks.peers import trl_rloo
from kl_reg.rewards.vader import sentiment


def test_the_peer_s_reward_is_kl_reg_s():
    texts = ["", " I am good, how about you?", "what a terrible day", " I love it!", "haha :)", "\ufffd"]
    rewards = [trl_rloo.sentiment(SentimentIntensityAnalyzer(), text) for text in texts]
    assert rewards == [sentiment(text) for text in texts] and min(rewards) < 0.4 and max(rewards) > 0.8


def test_a_policy_is_trained_once(tmp_path):
    """For a folder of any name, and whatever other coefficients there are."""
    settings = {"model": "a", "rate": 1e-3, "coefficients": [0.1, 0.2], "out": "there"}
    assert not trl_rloo.finished(settings, tmp_path)
    stored = {"tokens": 1, "settings": {"model": "a", "rate": 1e-3}}
    (tmp_path / "sampled.json").write_text(json.dumps(stored))
    assert trl_rloo.finished(settings | {"coefficients": [0.1], "out": "here"}, tmp_path)
    assert not trl_rloo.finished(settings | {"rate": 2e-3}, tmp_path)
