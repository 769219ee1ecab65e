"""The peer of the completion part is trained on what kl_reg's policies are."""
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from benchmarks.peers import trl_rloo
from kl_reg.rewards.vader import sentiment


def test_the_peer_s_reward_is_kl_reg_s():
    texts = ["", " I am good, how about you?", "what a terrible day", " I love it!", "haha :)", "\ufffd"]
    rewards = [trl_rloo.sentiment(SentimentIntensityAnalyzer(), text) for text in texts]
    assert rewards == [sentiment(text) for text in texts] and min(rewards) < 0.4 and max(rewards) > 0.8
