"""What every reward of the registry holds to."""
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from reward_staging import reply, settings

from kl_reg import rewards

TEXTS = ["I love it", "", "no", "not so good " * 3, "hello there how are you", "I love it", "day " * 30, "?"]
LENGTHS = 1, 2, 3, 6        # that a table of 64 entries can have
REPLIES = [reply(text, prompt=f"A: number {i}\nB:" if i else "", ids=[(i + j) % 2 for j in range(LENGTHS[i % 4])])
           for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def named(distilbert, tiny_folder, tmp_path_factory):
    """The settings that a name needs; a new one is to be added here."""
    path = tmp_path_factory.mktemp("table") / "table.npy"
    np.save(path, np.random.default_rng(0).normal(size=64))
    return {"vader": {}, "length": {"target": 2}, "regex": {"pattern": "o+"}, "distinct": {"ngram": 1},
            "classifier": {"path": str(distilbert)}, "log_likelihood": {"path": str(tiny_folder)},
            "table": {"path": str(path)}}


@pytest.fixture(scope="module", params=rewards.REWARDS.names())
def build(request, named):
    """Makes a reward that remembers nothing."""
    chosen = settings(name=request.param, **named[request.param]).reward
    return lambda: rewards.build(chosen)


def test_rewards_are_float32_and_finite_or_nan(build):
    (name,), out = rewards.names(build()), rewards.score(build(), REPLIES)
    part = out.parts[name]
    assert out.total.dtype == part.dtype == np.float32 and out.total.shape == part.shape == (len(REPLIES),)
    assert np.isfinite(out.total).all() and len(set(out.total.tolist())) > 1
    np.testing.assert_array_equal(out.total, np.nan_to_num(part))


def test_a_reward_depends_neither_on_order_nor_on_neighbours(build):
    together = rewards.score(build(), REPLIES).total
    np.testing.assert_array_equal(rewards.score(build(), REPLIES[::-1]).total, together[::-1])
    alone = np.concatenate([rewards.score(build(), [one]).total for one in REPLIES])
    np.testing.assert_array_equal(alone, together)


def test_a_batch_without_scored_replies_is_worth_nothing(build):
    assert rewards.score(build(), []).total.shape == (0,)
    out = rewards.score(build(), [REPLIES[0]._replace(scored=False)])
    assert out.total.tolist() == [0] and all(np.isnan(part).all() for part in out.parts.values())


def test_a_chats_reply_is_scored_as_its_text(build, request):
    if "log_likelihood" in request.node.name:
        pytest.skip("it reads the prompt, too; see test_log_likelihood.py")
    chat = [{"role": "user", "content": "hi"}]
    np.testing.assert_array_equal(rewards.score(build(), [one._replace(prompt=chat) for one in REPLIES]).total,
                                  rewards.score(build(), REPLIES).total)


def test_a_worker_thread_is_told_the_same_and_says_what_it_moves(build):
    def work():
        with jax.transfer_guard("disallow"):
            return rewards.score(reward, REPLIES).total

    reward = build()
    with ThreadPoolExecutor(1) as worker:
        np.testing.assert_array_equal(worker.submit(work).result(), rewards.score(build(), REPLIES).total)


def test_its_digest_is_the_same_when_it_is_built_again(build):
    assert rewards.digest(build()) == rewards.digest(build())
