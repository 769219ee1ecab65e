"""How functions are asked for rewards, and what they may say."""
import asyncio
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from reward_staging import reply

from kl_reg import rewards


def scores(functions, replies, weights=()):
    return rewards.score(rewards.of(functions, weights), replies)


def length_of(prompts, completions, completion_ids):
    """Checks what it is given."""
    assert prompts == [f"prompt of {text}" for text in completions]
    assert completion_ids == [[len(text)] for text in completions]
    return [len(text) / 3 for text in completions]


def test_scored_replies_are_shown_each_is_scored_in_its_place():
    replies = [reply(text, scored, prompt=f"prompt of {text}")
               for text, scored in (("a", True), ("bb", False), ("ccc", True), ("dddd", True))]
    out = scores(length_of, replies)
    assert out.total.dtype == out.parts["length_of"].dtype == np.float32
    np.testing.assert_allclose(out.total, [1 / 3, 0, 1, 4 / 3], rtol=1e-7)
    np.testing.assert_allclose(out.parts["length_of"], [1 / 3, np.nan, 1, 4 / 3], rtol=1e-7)


@pytest.mark.parametrize("replies", [[], [reply(scored=False)]])
def test_without_scored_replies_no_function_is_called(replies):
    def never(**columns):
        raise AssertionError

    out = scores(never, replies)
    assert out.total.tolist() == [0] * len(replies)
    assert np.isnan(out.parts["never"]).all() and out.parts["never"].shape == (len(replies),)


# ---- what a function is given

QUESTIONS = [reply("4", answer="4", level=1), reply("5", answer="4", level=2)]


def matches(completions, answer, **kwargs):     # as functions for TRL are written
    assert kwargs == {"prompts": ["a prompt"] * 2, "completion_ids": [[1], [1]], "level": [1, 2]}
    return [1.0 if said == right else 0.0 for said, right in zip(completions, answer, strict=True)]


class Judge:
    def __call__(self, completions, answer):
        return [float(said == right) for said, right in zip(completions, answer, strict=True)]

    def method(self, *, completions, answer, unused=None):
        assert unused is None
        return self(completions, answer)


@pytest.mark.parametrize("function", [matches, Judge(), Judge().method, functools.partial(matches),
                                      lambda completions, answer, level=(): [1 - (x - 1) for x in level],
                                      lambda **columns: Judge()(columns["completions"], columns["answer"])])
def test_a_function_gets_what_its_signature_names(function):
    assert scores(function, QUESTIONS).total.tolist() == [1, 0]


def test_a_parameter_that_is_no_column_is_named():
    def needy(completions, solution, difficulty, extra=1):
        return [0.0]

    with pytest.raises(ValueError, match=r"'needy' requires 'solution', 'difficulty'; .*here: answer, level\)"):
        scores(needy, QUESTIONS)
    with pytest.raises(ValueError, match=r"'needy' requires 'solution', 'difficulty'; .*here: none\)"):
        scores(needy, [reply()])


def test_a_parameter_without_a_name_is_refused():
    def positional(completions, /):
        return [0.0]

    with pytest.raises(ValueError, match="'positional' requires 'completions'; given by name"):
        scores(positional, [reply()])


def test_a_column_that_some_prompts_lack_is_named():
    with pytest.raises(ValueError, match="column 'answer' is there for only one of replies 1 and 2"):
        scores(Judge(), [reply(scored=False), reply(answer="4"), reply()])


def test_a_chats_completions_are_messages():
    chat = [{"role": "user", "content": "2 + 2?"}]

    def trl(prompts, completions, **kwargs):        # the form of the examples in TRL's documentation
        assert prompts[0][-1]["content"] == "2 + 2?" and set(completions[0][0]) == {"role", "content"}
        return [1.0 if completion[0]["content"] == "4" else 0.0 for completion in completions]

    assert scores(trl, [reply("4", prompt=chat), reply("5", prompt=chat)]).total.tolist() == [1, 0]


def test_a_function_cannot_change_what_the_next_one_is_given():
    def greedy(completions):
        return [completions.pop() and 1.0 for _ in range(len(completions))]

    assert scores([greedy, length_of], [reply("abc", prompt="prompt of abc")]).total.tolist() == [2]


# ---- several, None and asynchronous ones

NUMBERS = st.none() | st.floats(-1e3, 1e3, width=32)


@hypothesis.given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=6),
                  st.tuples(*[st.floats(-4, 4, width=16)] * 3))
def test_the_total_is_the_weighted_sum_of_what_is_said(rows, weights):
    def column(number):
        return lambda completions: [rows[int(text)][number] for text in completions]

    out = scores([column(0), column(1), column(2)], [reply(str(i)) for i in range(len(rows))], weights)
    expected = [sum(w * x for w, x in zip(weights, row, strict=True) if x is not None) for row in rows]
    assert out.total.dtype == np.float32
    np.testing.assert_array_equal(out.total, np.float32(expected))
    assert list(out.parts) == ["lambda", "lambda_2", "lambda_3"]
    for number, part in enumerate(out.parts.values()):
        np.testing.assert_array_equal(part, np.float32([np.nan if row[number] is None else row[number]
                                                        for row in rows]))


async def meeting(barrier, value):
    await asyncio.wait_for(barrier.wait(), 10)
    return [value]


class Client:
    """Asynchronous, and bound to the event loop that it is first used in, as clients of web services are."""

    def __init__(self):
        self.loop = None

    async def __call__(self, completions):
        self.loop = self.loop or asyncio.get_running_loop()
        assert self.loop is asyncio.get_running_loop()
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]


def test_asynchronous_functions_run_at_the_same_time():
    barrier = asyncio.Barrier(2)            # neither goes on before the other is there

    async def first(completions):
        return await meeting(barrier, 1.0)

    async def second(completions):
        return await meeting(barrier, 10.0)

    out = scores([first, lambda completions: [100.0], second], [reply()])
    assert out.total.tolist() == [111]
    assert {name: part.tolist() for name, part in out.parts.items()} == {"first": [1], "lambda": [100], "second": [10]}


@pytest.mark.parametrize("caller", ["main", "thread", "loop"])
def test_an_asynchronous_object_can_be_asked_from_anywhere_again_and_again(caller):
    client = Client()

    def ask():
        return [scores([client, functools.partial(client)], [reply("abc"), reply("a")]).total.tolist()
                for _ in range(2)]

    async def notebook():
        return ask()

    if caller == "main":
        out = ask()
    elif caller == "thread":
        with ThreadPoolExecutor(1) as worker:
            out = worker.submit(ask).result()
    else:
        out = asyncio.run(notebook())
    assert out == [[6, 2]] * 2


def test_what_an_asynchronous_function_raises_does_not_wait_for_the_others():
    stop = threading.Event()

    async def slow(completions):
        while not stop.is_set():
            await asyncio.sleep(0.01)
        return [0.0]

    async def failing(completions):
        raise TimeoutError("no answer")

    began = time.monotonic()
    try:
        with pytest.raises(ValueError, match="'failing' raised TimeoutError: no answer"):
            scores([failing, slow], [reply()])
    finally:
        stop.set()
    assert time.monotonic() - began < 5


# ---- what they say

@pytest.mark.parametrize("said", [[1, True], (1.0, 1), np.float64([1, 1]), np.array([True, True]), [np.float32(1)] * 2,
                                  jnp.ones(2), [jnp.bfloat16(1)] * 2, torch.ones(2), [torch.tensor(1.0)] * 2])
def test_numbers_of_any_kind_are_rewards(said):
    assert scores(lambda completions: said, [reply(), reply()]).total.tolist() == [1, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), np.float32("nan"), 1e39, 10**400, "good",
                                 "1.0", 1j, [1.0], np.ones(1), jnp.array(jnp.nan)], ids=str)
def test_a_reward_that_is_no_finite_number_names_function_and_sample(bad):
    def strange(**columns):
        return [1.0, bad]

    with pytest.raises(ValueError, match="'strange' returned .* for the completion 'the second' .reply 2 of its batch"):
        scores([length_of, strange][1:], [reply("the first"), reply("unscored", scored=False), reply("the second")])


@pytest.mark.parametrize("bad", [1.0, "ab", {"a": 1, "b": 2}, None, np.array(1.0), (x for x in (1.0, 2.0))],
                         ids=lambda bad: type(bad).__name__)
def test_what_is_no_list_is_refused(bad):
    with pytest.raises(ValueError, match="'lambda' returned .*no list, tuple or array"):
        scores(lambda completions: bad, [reply(), reply()])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_rewards_names_the_function(count):
    def miscounting(**columns):
        return [1.0] * count

    with pytest.raises(ValueError, match=f"'miscounting' returned {count} rewards for 2 completions, .*'x'"):
        scores(miscounting, [reply("x"), reply()])


def test_an_exception_names_the_function_and_keeps_its_cause():
    def failing(**columns):
        raise KeyError("what went wrong")

    with pytest.raises(ValueError, match="'failing' raised KeyError: 'what went wrong'; .*completion 'so'") as error:
        scores(failing, [reply("so")])
    assert isinstance(error.value.__cause__, KeyError)


def test_a_sum_that_float32_cannot_hold_names_the_sample():
    with pytest.raises(ValueError, match="lambda, lambda_2: .*sum is 6e[+]38 for the completion 'big'"):
        scores([lambda completions: [3e38]] * 2, [reply("big")])


def test_a_long_completion_is_cut_in_a_message():
    with pytest.raises(ValueError) as error:
        scores(lambda completions: [None, "x"], [reply(), reply("so " * 10_000)])
    assert len(str(error.value)) < 500
