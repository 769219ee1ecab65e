"""The lexicon reward."""
import pytest
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from kl_reg.rewards.vader import vader

LIKED = ["I love it!", "what a great day", "haha that is awesome :)"]
DISLIKED = ["I hate it", "what a terrible day", "that is not good"]
NEITHER = ["", "the table is in the kitchen", "?"]


def scores(texts):
    return vader(prompts=["A:"] * len(texts), completions=texts, completion_ids=[[0]] * len(texts))


def test_liked_neutral_and_disliked_replies_fall_on_their_sides_of_one_half():
    assert min(scores(LIKED)) > 0.5
    assert scores(NEITHER) == [0.5] * 3
    assert max(scores(DISLIKED)) < 0.5


def test_the_score_is_the_compound_on_the_unit_interval():
    texts = LIKED + DISLIKED + NEITHER
    compounds = [SentimentIntensityAnalyzer().polarity_scores(text)["compound"] for text in texts]
    assert scores(texts) == pytest.approx([0.5 + compound / 2 for compound in compounds])


def test_only_the_completion_counts():
    assert vader(prompts=["I hate it"], completions=["ok then"], completion_ids=[[1]], column=["love"]) \
        == scores(["ok then"])
