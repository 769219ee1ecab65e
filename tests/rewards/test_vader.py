"""The lexicon reward."""
import pytest
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from kl_reg.rewards.vader import scaled, vader

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


def test_signed_confidence_by_hand():
    """r = (sign(c) (1 + |c|) / 2 + 1) / 2, 0 counted as positive: nothing in between 0.25 and 0.75."""
    texts = LIKED + DISLIKED + NEITHER
    compounds = [SentimentIntensityAnalyzer().polarity_scores(text)["compound"] for text in texts]
    expected = [(1 + (1 + c) / 2) / 2 if c >= 0 else (1 - (1 - c) / 2) / 2 for c in compounds]
    got = scaled("signed_confidence")(completions=texts)
    assert got == pytest.approx(expected) and got[-1] == 0.75
    assert max(got[3:6]) < 0.25 and min(got[:3]) > 0.75
    assert scaled("compound") is scaled("") is vader
    with pytest.raises(ValueError, match="reward.scale='loud' with reward.name='vader': choose of compound, signed"):
        scaled("loud")
