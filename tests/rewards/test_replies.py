"""From the rewards of replies to rewards on the agent stream."""
import numpy as np
from reward_staging import reply

from kl_reg.rewards import replies
from kl_reg.rewards.calls import Scores


def credit(turns, rewards, slot, mask):
    """Of replies that are all asked about; None: no function could judge that one."""
    judged = np.array([reward is not None for reward in rewards])
    total = np.float32([reward or 0 for reward in rewards])
    return replies.credit(turns, Scores(total, {}, np.array([turn.scored for turn in turns]), judged), slot, mask)


def test_a_reward_stands_at_the_last_agent_token_before_the_replys_end():
    # slots: 0-1 opening, 2-4 agent, 5 prefix, 6-8 student, 9 prefix, 10 agent, 11 prefix, 12-13 student, 14 prefix
    slot, mask = np.array([[2, 3, 4, 10, 0, 0]]), np.array([[True] * 4 + [False] * 2])
    stream, returns, judged = credit([reply(end=8), reply(end=13)], [0.25, 0.5], slot, mask)
    assert judged.tolist() == [True]
    assert stream.dtype == returns.dtype == np.float32
    assert stream.tolist() == [[0, 0, 0.25, 0.5, 0, 0]]
    assert returns.tolist() == [0.75]


def test_replies_without_an_agent_token_between_them_share_its_place():
    slot, mask = np.array([[2, 3, 9]]), np.array([[True] * 3])
    stream, returns, _ = credit([reply(end=5), reply(end=8)], [1, 2], slot, mask)
    assert stream.tolist() == [[0, 3, 0]]
    assert returns.tolist() == [3]


def test_a_reply_before_the_first_agent_token_counts_in_the_return_only():
    slot, mask = np.array([[5, 6], [0, 0]]), np.array([[True, True], [False, False]])
    turns = [reply(end=4), reply(end=9), reply(end=3, episode=1)]
    stream, returns, _ = credit(turns, [1, 2, 4], slot, mask)
    assert stream.tolist() == [[0, 2], [0, 0]]
    assert returns.tolist() == [3, 4]


def test_each_episode_gets_its_own():
    slot, mask = np.array([[2, 3], [2, 7]]), np.ones((2, 2), bool)
    stream, returns, _ = credit([reply(episode=1, end=5), reply(episode=0, end=5)], [1, 2], slot, mask)
    assert stream.tolist() == [[0, 2], [1, 0]]
    assert returns.tolist() == [2, 1]


def test_a_reply_that_cannot_be_judged_adds_nothing_and_an_episode_of_such_is_not_judged():
    """Episodes: one reply of two is judged; none of two; none at all; one that is not asked about; one worth 0."""
    slot, mask = np.tile([2, 3], (5, 1)), np.ones((5, 2), bool)
    turns = [reply(end=2), reply(end=5), reply(episode=1, end=2), reply(episode=1, end=5),
             reply(episode=3, end=5, scored=False), reply(episode=4, end=5)]
    stream, returns, judged = credit(turns, [None, 2, None, None, None, 0], slot, mask)
    assert judged.tolist() == [True, False, True, True, True]
    np.testing.assert_array_equal(returns, np.float32([2, np.nan, 0, 0, 0]))
    np.testing.assert_array_equal(stream, np.float32([[0, 2], [0, 0], [0, 0], [0, 0], [0, 0]]))
