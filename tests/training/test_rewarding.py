"""What a batch is worth, and what is said of those that no function could judge."""

import numpy as np
import pytest

from kl_reg import rewards
from kl_reg.algorithms import advantages
from kl_reg.envs.environment import Reply
from kl_reg.training.rewarding import Judges, judge, judge_members
from kl_reg.types import STUDENT, Episodes, Transcript
from tests.programs import by_hand, changed


def batch(*episodes, group=1, advantage=advantages.group_mean):
    """A program and its episodes, two agent tokens each, with the texts of their scored replies."""
    turns = [Reply(e, n, STUDENT, n + 1, [0], text, "", True, True) for e, texts in enumerate(episodes)
             for n, text in enumerate(texts)]
    mask, nothing = np.ones((len(episodes), 2), bool), np.zeros(len(episodes), np.int32)
    transcript = Transcript(nothing[:, None], nothing[:, None], nothing[:, None], nothing)
    fields = dict.fromkeys(Episodes._fields, np.zeros(mask.shape, np.float32)) | {
        "transcript": transcript, "mask": mask, "slot": np.tile([1, 2], (len(mask), 1)), "allowed": None}
    program = by_hand(group=group, advantage=advantage)
    return changed(program, env=program.task.env._replace(read=lambda transcript: turns)), Episodes(**fields)


def worth(judges, *episodes):
    program, recorded = batch(*episodes)
    return judge(program, judges, recorded)


def number(completions):
    return [None if text == "?" else float(text) for text in completions]


def tenth(completions):
    return [None if text in "?7" else float(text) / 10 for text in completions]


def test_completions_that_no_function_could_judge():
    """Rewards 1, 1, none and 7, which only one of the functions can judge."""
    judged = worth(Judges(rewards.of([number, tenth]), rewards.of(tenth)), ["1"], ["1"], ["?"], ["7"])
    assert judged.credit.judged.tolist() == [True, True, False, True]
    np.testing.assert_allclose(judged.credit.returns, np.float32([1.1, 1.1, np.nan, 7]))
    assert judged.row["reward/unjudged_rate"] == 1 / 4 and judged.row["reward/unjudged_rate_se"] == pytest.approx(1 / 4)
    assert judged.row["reward/number"] == 3 and judged.row["reward/tenth"] == pytest.approx(0.1)
    assert judged.row["gold/return"] == pytest.approx(0.1)      # of the two that it can judge


def test_replies_of_a_conversation_that_no_function_could_judge():
    """They add nothing; an episode in which nothing could be judged is not judged."""
    judged = worth(Judges(rewards.of(number), None), ["1", "?"], ["?", "?"], [], ["2", "3", "?"])
    np.testing.assert_array_equal(judged.credit.returns, np.float32([1, np.nan, 0, 5]))
    assert judged.row["reward/unjudged_rate"] == 4 / 7
    assert worth(Judges(rewards.of(number), None), [], []).row["reward/unjudged_rate"] is None


def test_an_advantage_that_would_count_what_was_not_judged_is_refused():
    def five(rewards, values, mask, discount, gae_lambda):
        raise AssertionError

    judges = Judges(rewards.of(number), None)
    for texts, group, advantage in (("1?", 2, advantages.group), ("12", 2, five), ("1?", 1, five)):
        program, episodes = batch(*texts, group=group, advantage=advantage)
        judge_members(program, judges, [episodes])
    program, episodes = batch(*"1?", group=2, advantage=five)
    with pytest.raises(ValueError, match=r"rl.advantage='test_rewarding.*five' .* no argument `judged`.*extending.md"):
        judge_members(program, judges, [episodes])
