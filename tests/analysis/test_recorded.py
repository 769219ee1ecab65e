import numpy as np
import pytest

from kl_reg.analysis.recorded import ratio_and_error, summarise
from kl_reg.envs.teacher_student import Reply
from kl_reg.types import AGENT, STUDENT, Episodes


def reply(episode, role, text, finished=True):
    return Reply(episode, 0, role, 0, [], text, "", finished)


def recorded(kl, entropy, mask):
    nothing = np.zeros_like(kl)
    return Episodes(None, (), nothing, nothing, mask, nothing, nothing, kl, entropy, nothing, nothing)


def test_two_episodes_by_hand():
    mask = np.array([[True, True, True], [True, False, False]])
    episodes = recorded(np.array([[1.0, 0.5, 0.5], [4.0, 0.0, 0.0]]), np.where(mask, 2.0, 0.0), mask)
    replies = [reply(0, AGENT, ""), reply(0, STUDENT, "ok"), reply(0, AGENT, "hi"), reply(0, STUDENT, ""),
               reply(1, AGENT, "", finished=False), reply(1, STUDENT, "yes")]
    out = summarise(episodes, replies, np.array([1.0, 3.0]))
    assert out["return"] == 2.0 and out["return_se"] == pytest.approx(1.0)
    assert out["kl/nats_per_episode"] == 3.0 and out["kl/nats_per_token"] == 1.5
    assert out["entropy/nats_per_token"] == 2.0 and out["replies"] == 1.5
    assert out["teacher/silent_rate"] == 0.5            # the unfinished turn does not count
    assert out["student/silent_rate"] == pytest.approx(1 / 3)


def test_a_rate_without_trials_is_none():
    assert ratio_and_error(np.zeros(3), np.zeros(3)) == (None, None)


def test_the_error_of_a_rate_counts_episodes_not_turns():
    """Ten identical turns an episode tell no more than one: the standard error is that of the episodes."""
    events = np.array([1.0, 0.0, 1.0, 0.0, 0.0])
    once, many = ratio_and_error(events, np.ones(5)), ratio_and_error(10 * events, 10 * np.ones(5))
    assert once == pytest.approx(many) and once[1] == pytest.approx(np.sqrt(0.4 * 0.6 / 5))
