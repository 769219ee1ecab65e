"""From a reward function to rewards on the agent stream."""
import numpy as np
import pytest

from kl_reg.envs.teacher_student import Reply
from kl_reg.rewards.replies import credit, digest, score_replies
from kl_reg.types import AGENT, STUDENT


def reply(text="ok", role=STUDENT, finished=True, episode=0, end=0):
    return Reply(episode, 1, role, end, [len(text)], text, f"prompt of {text}", finished)


def length_of(prompts, completions, completion_ids):
    """A reward function that checks what it is given."""
    assert prompts == [f"prompt of {text}" for text in completions]
    assert completion_ids == [[len(text)] for text in completions]
    return [len(text) / 3 for text in completions]


def test_finished_student_replies_are_scored_each_in_its_place():
    rewards = score_replies(length_of, [reply("a"), reply("bb", role=AGENT), reply("ccc"), reply("dddd")])
    assert rewards.dtype == np.float32
    np.testing.assert_allclose(rewards, [1 / 3, 0, 1, 4 / 3], rtol=1e-7)


def test_a_cut_reply_is_worth_nothing_and_is_not_shown():
    rewards = score_replies(length_of, [reply("a", finished=False), reply("bb")])
    np.testing.assert_allclose(rewards, [0, 2 / 3], rtol=1e-7)


@pytest.mark.parametrize("replies", [[], [reply(finished=False)], [reply(role=AGENT)]])
def test_without_finished_student_replies_the_function_is_not_called(replies):
    def never(**columns):
        raise AssertionError

    assert score_replies(never, replies).tolist() == [0] * len(replies)


def test_none_is_worth_nothing():
    assert score_replies(lambda **columns: [None, 2], [reply(), reply()]).tolist() == [0, 2]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_rewards_names_the_function(count):
    def miscounting(**columns):
        return [1.0] * count

    with pytest.raises(ValueError, match=f"'miscounting' returned {count} rewards for 2 completions"):
        score_replies(miscounting, [reply(), reply()])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), np.float32("nan"), 1e39],
                         ids=["nan", "inf", "-inf", "numpy", "too large for float32"])
def test_a_reward_that_is_no_finite_number_names_function_and_sample(bad):
    def infinite(**columns):
        return [1.0, bad]

    with pytest.raises(ValueError, match="'infinite' returned .* for the completion 'the second'"):
        score_replies(infinite, [reply("the first"), reply("the second")])


def test_an_exception_names_the_function_and_keeps_its_cause():
    def failing(**columns):
        raise KeyError("what went wrong")

    with pytest.raises(ValueError, match="'failing' raised KeyError: 'what went wrong'") as error:
        score_replies(failing, [reply()])
    assert isinstance(error.value.__cause__, KeyError)


def test_a_reward_stands_at_the_last_agent_token_before_the_replys_end():
    # slots: 0-1 opening, 2-4 agent, 5 prefix, 6-8 student, 9 prefix, 10 agent, 11 prefix, 12-13 student, 14 prefix
    slot, mask = np.array([[2, 3, 4, 10, 0, 0]]), np.array([[True] * 4 + [False] * 2])
    stream, returns = credit([reply(end=8), reply(end=13)], np.float32([0.25, 0.5]), slot, mask)
    assert stream.dtype == returns.dtype == np.float32
    assert stream.tolist() == [[0, 0, 0.25, 0.5, 0, 0]]
    assert returns.tolist() == [0.75]


def test_replies_without_an_agent_token_between_them_share_its_place():
    slot, mask = np.array([[2, 3, 9]]), np.array([[True] * 3])
    stream, returns = credit([reply(end=5), reply(end=8)], np.float32([1, 2]), slot, mask)
    assert stream.tolist() == [[0, 3, 0]]
    assert returns.tolist() == [3]


def test_a_reply_before_the_first_agent_token_counts_in_the_return_only():
    slot, mask = np.array([[5, 6], [0, 0]]), np.array([[True, True], [False, False]])
    replies = [reply(end=4), reply(end=9), reply(end=3, episode=1)]
    stream, returns = credit(replies, np.float32([1, 2, 4]), slot, mask)
    assert stream.tolist() == [[0, 2], [0, 0]]
    assert returns.tolist() == [3, 4]


def test_each_episode_gets_its_own():
    slot, mask = np.array([[2, 3], [2, 7]]), np.ones((2, 2), bool)
    stream, returns = credit([reply(episode=1, end=5), reply(episode=0, end=5)], np.float32([1, 2]), slot, mask)
    assert stream.tolist() == [[0, 2], [1, 0]]
    assert returns.tolist() == [2, 1]


def test_another_lambda_is_another_reward():
    first, same, other = (lambda **columns: [1.0]), (lambda **columns: [1.0]), (lambda **columns: [2.0])
    assert digest(first) == digest(same) != digest(other)


def test_a_reward_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="'words' returned 'good'"):
        score_replies(words, [Reply(0, 1, STUDENT, 3, [1], "hi", "", True)])


def words(prompts, completions, completion_ids):
    return ["good"] * len(completions)
