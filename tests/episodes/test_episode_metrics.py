from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kl_reg.analysis.report.stats import kl_by_position
from kl_reg.envs.environment import Reply
from kl_reg.episodes.metrics import ledger, means, objective, pooled, rates, summarise, top1_share
from kl_reg.types import AGENT, FORCED, OPENING, PAD, STUDENT, Episodes, Transcript

MASK = np.array([[True, True, True], [True, False, False]])


def reply(episode, role, text, finished=True):
    return Reply(episode, 0, role, 0, [], text, "", finished, True)


def recorded(mask=MASK, **fields):
    """Episodes [b, k] with these fields, lists as float32, and zeros; all agent tokens are in one turn."""
    nothing = np.zeros(mask.shape, np.float32)
    transcript = Transcript(np.zeros(mask.shape, np.int32), np.where(mask, AGENT, PAD), np.where(mask, 0, -1),
                            np.zeros(len(mask), np.int32))
    known = {"transcript": transcript, "features": (), "reference": (), "allowed": None, "mask": mask,
             "slot": np.where(mask, np.arange(mask.shape[1]), 0), "asked": np.zeros(len(mask), bool),
             "judged": np.ones(len(mask), bool)}
    known |= {name: np.float32(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Episodes(**(dict.fromkeys(Episodes._fields, nothing) | known))


def test_two_episodes_by_hand():
    episodes = recorded(kl=[[1.0, 0.5, 0.5], [4.0, 9.0, 9.0]], entropy=[[2.0] * 3, [2.0, 9.0, 9.0]],
                        log_ratio=[[3.0, -1.0, 0.0], [-1.0, 9.0, 9.0]], log_prob=[[-1.0, -2.0, -3.0], [-4.0, 9.0, 9.0]],
                        floor=[[math.log(2), 0.0, math.log(4)], [0.0, 9.0, 9.0]], asked=np.array([False, True]))
    replies = [reply(0, AGENT, ""), reply(0, STUDENT, "ok"), reply(0, AGENT, "hi"), reply(0, STUDENT, ""),
               reply(1, AGENT, "", finished=False), reply(1, STUDENT, "yes")]
    episodes = episodes._replace(estimate=np.array([[0.5, 0.5, 0.5], [1.0, 9.0, 9.0]]))
    out = summarise(episodes, replies, np.array([1.0, 3.0]))
    per_episode = {"return": [1.0, 3.0], "kl/nats_per_episode": [2.0, 4.0], "kl/sampled/nats_per_episode": [2.0, -1.0],
                   "kl/estimate/nats_per_episode": [1.5, 1.0], "surprisal/nats_per_episode": [6.0, 4.0],
                   "replies": [2.0, 1.0], "help/asked_rate": [0.0, 1.0]}
    for name, values in per_episode.items():
        assert out[name] == pytest.approx(np.mean(values)), name
        assert out[f"{name}_se"] == pytest.approx(scipy.stats.sem(values)), name
    assert out["kl/nats_per_token"] == 1.5 and out["entropy/nats_per_token"] == 2.0
    assert out["help/rate_per_token"] == pytest.approx((1 / 2 + 3 / 4) / 4)
    assert out["teacher/silent_rate"] == 0.5            # the unfinished turn does not count
    assert out["student/silent_rate"] == pytest.approx(1 / 3)
    assert out["kl/top1_share"] == pytest.approx(4 / 6)
    assert out["val/num_eos_tokens"] == 2 and out["tokens"] == 4
    assert {name for name in out if not name.endswith("_se") and f"{name}_se" not in out} == {
        "kl/top1_share", "val/num_eos_tokens", "tokens"}


@given(arrays(np.float64, st.tuples(st.integers(1, 4), st.just(6)), elements=st.floats(-5, 5)))
def test_batches_of_one_size_are_pooled_as_independent_strata(batches):
    rows = [means({"x": batch}) | {"tokens": 3} for batch in batches]
    out, n = pooled(rows), len(batches)
    assert out["x"] == pytest.approx(batches.mean()) and out["tokens"] == 3 * n
    assert out["x_se"] ** 2 == pytest.approx(sum(scipy.stats.sem(batch) ** 2 for batch in batches) / n**2)


def test_what_a_batch_lacks_is_pooled_over_the_others():
    assert pooled([{"x": None, "x_se": None}, {"x": 2.0, "x_se": 0.5}]) == {"x": 2.0, "x_se": 0.5}
    assert pooled([{"x": 1.0, "x_se": None}, {"x": 2.0, "x_se": 0.5}]) == {"x": 1.5, "x_se": None}
    assert pooled([{"x": None, "x_se": None}] * 2) == {"x": None, "x_se": None}


def test_tokens_are_those_behind_the_opening_whoever_wrote_them():
    roles = np.array([[PAD, OPENING, OPENING, FORCED, AGENT, STUDENT], [OPENING, OPENING, AGENT, AGENT, PAD, PAD]])
    transcript = Transcript(np.zeros((2, 6), np.int32), roles, np.zeros((2, 6), int), np.array([1, 0]))
    assert summarise(recorded(transcript=transcript), [], np.zeros(2))["tokens"] == 5


def test_a_batch_of_which_nothing_is_known_says_so():
    """One episode without a token: no rate, no share, and no error of anything."""
    out = summarise(recorded(np.zeros((1, 3), bool)), [], np.array([1.0]))
    assert out["return"] == 1.0 and out["kl/nats_per_episode"] == 0.0 and out["help/asked_rate"] == 0.0
    unknown = {"kl/nats_per_token", "entropy/nats_per_token", "help/rate_per_token", "teacher/silent_rate",
               "teacher/short_rate", "student/silent_rate", "kl/top1_share"}
    assert {name for name, value in out.items() if value is None} == unknown | {
        name for name in out if name.endswith("_se")}


def test_an_episode_that_was_not_judged_is_no_part_of_the_mean_return():
    out = summarise(recorded(np.ones((4, 3), bool), kl=[[1.0] * 3] * 4), [], np.array([1.0, 1.0, np.nan, 4.0]))
    assert out["return"] == 2.0 and out["return_se"] == pytest.approx(scipy.stats.sem([1.0, 1.0, 4.0]))
    assert out["kl/nats_per_episode"] == 3.0 and objective({**out, "kl/coef": 2.0})["objective/rlhf_reward"] == 2.0


def test_where_no_episode_was_judged_there_is_no_return():
    out = summarise(recorded(), [], np.full(2, np.nan))
    assert out["return"] is None and out["return_se"] is None and out["kl/nats_per_episode"] == 0.0
    said = objective({**out, "kl/coef": 2.0})
    assert said["objective/scores"] is None and said["objective/rlhf_reward"] is None


def test_a_value_that_is_not_finite_is_not_left_out():
    episodes = recorded(kl=[[1.0, 0.5, 0.5], [np.inf, 0.0, 0.0]], log_ratio=[[1.0, 0.5, np.nan], [1.0, 0.0, 0.0]])
    out = summarise(episodes, [], np.zeros(2))
    assert out["kl/nats_per_episode"] == out["kl/nats_per_token"] == np.inf
    assert np.isnan(out["kl/sampled/nats_per_episode"])
    assert out["kl/nats_per_episode_se"] is out["kl/sampled/nats_per_episode_se"] is None


def test_the_error_of_a_rate_counts_episodes_not_turns():
    """Ten identical turns an episode tell no more than one: the standard error is that of the episodes."""
    events = np.array([1.0, 0.0, 1.0, 0.0, 0.0])
    once, many = rates({"x": (events, np.ones(5))}), rates({"x": (10 * events, 10 * np.ones(5))})
    assert once == pytest.approx(many) and once == pytest.approx(means({"x": events}))
    assert once["x_se"] == pytest.approx(scipy.stats.sem(events))


def test_the_error_of_a_rate_is_close_to_the_jackknifes():
    """Leaving out one episode at a time is another estimator of the same error; they differ in order 1 / b."""
    rng = np.random.default_rng(0)
    trials = rng.integers(3, 30, 400)
    events = rng.gamma(2.0, 1.0, 400) * trials
    left_out = (events.sum() - events) / (trials.sum() - trials)
    jackknife = np.sqrt(399 / 400 * ((left_out - left_out.mean())**2).sum())
    assert rates({"x": (events, trials)})["x_se"] == pytest.approx(jackknife, rel=0.01)


def test_the_share_of_the_top_1_percent():
    kl = np.full(250, 0.01, np.float32)
    kl[[3, 77, 200]] = 5.0, 1.0, 4.0                    # two tokens are in 1 % of 250
    assert top1_share(kl) == pytest.approx(9 / (10 + 247 * 0.01), rel=1e-5)
    assert top1_share(np.full(300, 0.5)) == pytest.approx(3 / 300)      # ties
    assert top1_share(np.array([0.0, 3.0])) == 1.0      # at least one token
    assert top1_share(np.zeros(5)) is top1_share(np.zeros(0)) is None


@given(arrays(np.float32, 230, elements=st.floats(0, 100, width=32)))
def test_the_share_is_that_of_the_sorted_tokens(kl):
    share, ordered = top1_share(kl), sorted(map(float, kl), reverse=True)
    assert (share is None) == (max(ordered) == 0)
    if share is not None:
        assert 2 / 230 - 1e-9 <= share <= 1
        assert share == pytest.approx(math.fsum(ordered[:2]) / math.fsum(ordered))


def test_the_objective_is_that_of_trl():
    """As its PPO trainer computes them from padded log-probabilities, on which k1 is 0; entropy without the padding."""
    rng, coef = np.random.default_rng(1), 0.3
    mask = np.arange(6) < np.array([[6], [2], [5], [1]])
    log_prob, log_ref = (np.where(mask, -rng.exponential(2.0, mask.shape), 1.0) for _ in range(2))
    scores = rng.normal(size=4)
    episodes = recorded(mask, log_prob=np.where(mask, log_prob, 0), log_ratio=log_prob - log_ref)
    row = summarise(episodes._replace(estimate=episodes.log_ratio), [], scores) | {"kl/coef": coef}
    policy, reference, padding = torch.tensor(log_prob), torch.tensor(log_ref), torch.tensor(~mask)
    kl = policy - reference
    non_score_reward = (-coef * kl).sum(1).mean()
    expected = {"objective/kl": kl.sum(1).mean(), "objective/non_score_reward": non_score_reward,
                "objective/entropy": (-policy * (~padding).double()).sum(1).mean(),
                "objective/scores": scores.mean(), "objective/rlhf_reward": non_score_reward + scores.mean()}
    assert objective(row) == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)


def stream():
    """Two episodes of 6 slots, the opening filling two: agent tokens in slots 2, 3, 5 and in slots 3, 4."""
    roles = np.array([[PAD, OPENING, AGENT, AGENT, STUDENT, AGENT], [OPENING, OPENING, FORCED, AGENT, AGENT, PAD]])
    turns = np.array([[-1, -1, 0, 0, 1, 2], [-1, -1, 0, 0, 0, -1]])
    mask = np.array([[True, True, True], [True, True, False]])
    return recorded(mask, transcript=Transcript(np.zeros((2, 6), np.int32), roles, turns, np.array([1, 0])),
                    slot=np.array([[2, 3, 5], [3, 4, 0]]), kl=[[4.0, 2.0, 1.0], [1.0, 0.5, 0.0]],
                    spent_before=[[0.0, 4.0, 6.0], [0.0, 1.0, 0.0]], floor=[[0.5, 0.25, 0.0], [0.0, 0.125, 0.0]],
                    log_ratio=[[-1.0, 2.0, 3.0], [4.0, -5.0, 0.0]])


def test_the_ledger_stands_in_the_slots_of_its_tokens():
    out = ledger(stream())
    assert set(out) == {"kl", "log_ratio", "spent_before", "floor"} and out["kl"].dtype == np.float32
    np.testing.assert_array_equal(out["kl"], [[0, 0, 4, 2, 0, 1], [0, 0, 0, 1, 0.5, 0]])
    np.testing.assert_array_equal(out["log_ratio"], [[0, 0, -1, 2, 0, 3], [0, 0, 0, 4, -5, 0]])
    np.testing.assert_array_equal(out["spent_before"], [[0, 0, 0, 4, 0, 6], [0, 0, 0, 0, 1, 0]])
    np.testing.assert_array_equal(out["floor"], [[0, 0, 0.5, 0.25, 0, 0], [0, 0, 0, 0, 0.125, 0]])


def test_cumulative_kl_is_what_the_ledgers_have_spent_by_then():
    """At each position, the mean over episodes of spent_before + kl at the last agent token so far."""
    episodes = stream()
    out, transcript = ledger(episodes), episodes.transcript
    cumulative = kl_by_position(transcript.roles, transcript.turns, out["kl"]).cumulative
    for position, value in enumerate(cumulative):
        spent = []
        for e in range(2):
            so_far = [slot for slot in range(2, 3 + position) if transcript.roles[e, slot] == AGENT]
            spent.append(out["spent_before"][e, so_far[-1]] + out["kl"][e, so_far[-1]] if so_far else 0.0)
        assert value == pytest.approx(np.mean(spent))


def test_short_turns_are_counted_by_tokens():
    """Finished turns of the agent of at most two tokens, by hand: 2 of 3 in the first episode, none of 1 in the other;
    the student's, and one that the episode cuts, do not count."""
    roles = np.array([[AGENT, AGENT, STUDENT, AGENT, AGENT, AGENT, STUDENT, AGENT], [AGENT] * 8])
    turns = np.array([[0, 0, 1, 2, 2, 2, 3, 4], [0] * 8])
    transcript = Transcript(np.zeros((2, 8), int), roles, turns, np.zeros(2, int))
    reply = lambda e, turn, role, finished=True: Reply(e, turn, role, 0, [], "text", "", finished, False)  # noqa: E731
    replies = [reply(0, 0, AGENT), reply(0, 1, STUDENT), reply(0, 2, AGENT), reply(0, 3, STUDENT), reply(0, 4, AGENT),
               reply(1, 0, AGENT)]
    episodes = recorded(np.ones((2, 8), bool), transcript=transcript)
    assert summarise(episodes, replies, np.zeros(2), short=2)["teacher/short_rate"] == 0.5
    assert summarise(episodes, replies, np.zeros(2), short=8)["teacher/short_rate"] == 1.0
    replies[-1] = reply(1, 0, AGENT, finished=False)
    assert summarise(episodes, replies, np.zeros(2), short=8)["teacher/short_rate"] == 1.0
