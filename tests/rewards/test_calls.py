"""How functions are asked for rewards, and what they may say."""
import asyncio
import functools
import itertools
import signal
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
    assert set(kwargs) == {"prompts", "completion_ids", "level", "trainer_state", "log_metric", "log_extra"}
    assert [kwargs[name] for name in ("prompts", "completion_ids", "level")] == [["a prompt"] * 2, [[1], [1]], [1, 2]]
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


# ---- functions in others

def noting(inner):
    """A wrapper that hands everything on."""
    @functools.wraps(inner)
    def wrapper(*args, **kwargs):
        return inner(*args, **kwargs)
    return wrapper


def weighing(inner):
    """A wrapper that needs a column that the function inside does not take."""
    @functools.wraps(inner)
    def wrapper(completions, answer, level):
        return [by * x for by, x in zip(level, inner(completions, answer), strict=True)]
    return wrapper


def blind(inner):
    """A wrapper that takes less than the function inside."""
    @functools.wraps(inner)
    def wrapper(completions):
        return inner(completions, ["4"] * len(completions))
    return wrapper


def filtering(inner):
    """A wrapper that takes everything and hands a part of it on."""
    @functools.wraps(inner)
    def wrapper(completions, **columns):
        return [x + by for x, by in zip(inner(completions, columns["answer"]), columns["level"], strict=True)]
    return wrapper


def exact(completions, answer):
    return [float(said == right) for said, right in zip(completions, answer, strict=True)]


class Counting:
    """A decorator that is an object."""

    def __init__(self, inner):
        functools.update_wrapper(self, inner)
        self.asked = 0

    def __call__(self, *args, **kwargs):
        self.asked += 1
        return self.__wrapped__(*args, **kwargs)


class Noted(Judge):
    __call__ = noting(Judge.__call__)
    method = noting(Judge.method)


@pytest.mark.parametrize(("function", "expected"), [
    (noting(exact), [1, 0]), (noting(noting(exact)), [1, 0]), (weighing(exact), [1, 0]), (blind(exact), [1, 0]),
    (filtering(exact), [2, 2]), (noting(weighing(exact)), [1, 0]), (weighing(noting(exact)), [1, 0]),
    (noting(matches), [1, 0]), (Counting(exact), [1, 0]), (Noted(), [1, 0]), (Noted().method, [1, 0]),
    (functools.partial(noting(exact)), [1, 0]), (functools.partial(weighing(exact), level=[3, 3]), [3, 0]),
    (noting(functools.partial(exact)), [1, 0]), (noting(Judge()), [1, 0])])
def test_a_wrapper_is_called_with_what_it_takes(function, expected):
    assert scores(function, QUESTIONS).total.tolist() == expected


def test_functions_of_jax_and_of_a_cache_take_what_they_wrap():
    @functools.cache
    def cached(log_metric):
        return [1.0]

    assert scores(cached, [reply()]).total.tolist() == [1]


def test_a_wrapper_that_requires_what_there_is_not_is_named_itself():
    with pytest.raises(ValueError, match=r"'exact', whose wrapper is weighing.<locals>.wrapper \(.*test_calls.py, "
                                         r"line \d+\), requires 'level'; .*here: answer\)"):
        scores(weighing(exact), [reply(answer="4")])
    with pytest.raises(ValueError, match="reward function 'exact' requires 'answer'; "):
        scores(noting(exact), [reply(level=1)])


# ---- what a function sees of the trainer

def test_the_trainer_is_given_as_trl_gives_it():
    def curriculum(completions, trainer_state, log_metric, log_extra):
        assert trainer_state.epoch == 0.75 * trainer_state.num_train_epochs
        log_metric("length", np.float32(2.5))
        log_metric("length", 3.5)
        log_extra("first", [text[0] for text in completions])
        log_extra("guess", [1.0, None, torch.tensor(4.0)])
        return [trainer_state.global_step / trainer_state.max_steps] * 3

    async def later(log_metric, **kwargs):
        log_metric("later", 1)
        return [0.0] * 3

    trainer = rewards.Trainer(rewards.TrainerState(3, 4))
    out = rewards.score(rewards.of([curriculum, later]), [reply("a"), reply("b"), reply("c")], trainer)
    assert out.total.tolist() == [0.75] * 3
    assert trainer.logged == {"length": [2.5, 3.5], "guess": [1.0, 4.0], "later": [1.0]}
    assert scores(lambda trainer_state: [trainer_state.epoch], [reply()]).total.tolist() == [1]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "1", [1.0]], ids=str)
def test_a_metric_that_is_no_number_names_the_function(value):
    def logs(log_metric):
        log_metric("depth", value)
        return [1.0]

    with pytest.raises(ValueError, match="'logs' raised ValueError: log_metric.'depth', .*must be a finite number"):
        scores(logs, [reply()])


@hypothesis.given(st.lists(st.none() | st.floats() | st.integers(-9, 9) | st.booleans() | st.text(max_size=3)))
def test_a_column_logs_its_finite_numbers(values):
    trainer = rewards.Trainer()
    trainer.log_extra("column", values)
    numbers = [float(x) for x in values if isinstance(x, (bool, int, float)) and -np.inf < x < np.inf]
    assert trainer.logged == ({"column": numbers} if numbers else {})


# ---- several, None and asynchronous ones

def test_a_function_is_called_where_it_is_asked_and_may_set_an_alarm():
    """As verifiers do; only the main thread can."""
    def patient(completions):
        def late(*_):
            raise TimeoutError("too long")

        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            time.sleep(10)
        except TimeoutError:
            return [0.5]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    assert scores(patient, [reply()]).total.tolist() == [0.5]


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


@pytest.mark.parametrize("bad", [1.0, "ab", {"a": 1, "b": 2}, {1.0, 2.0}, None, np.array(1.0)],
                         ids=lambda bad: type(bad).__name__)
def test_what_is_no_list_is_refused(bad):
    with pytest.raises(ValueError, match="'lambda' returned .*no list, tuple or array"):
        scores(lambda completions: bad, [reply(), reply()])


def generator(completions):
    for text in completions:
        yield float(len(text))


async def asynchronous(completions):
    return generator(completions)


@pytest.mark.parametrize("function", [generator, asynchronous, lambda completions: map(len, completions),
                                      lambda completions: iter([len(text) for text in completions])])
def test_a_generator_is_listed(function):
    assert scores(function, [reply("a"), reply("bcd")]).total.tolist() == [1, 3]


@pytest.mark.parametrize(("made", "message"), [
    (lambda: itertools.repeat(1.0), "'lambda' returned 3 rewards for 2"), (lambda: iter([1.0]), "1 rewards for 2"),
    (lambda: (1 / 0 for _ in range(2)), "'lambda' raised ZeroDivisionError")])
def test_a_generator_with_another_number_of_rewards_or_that_raises_names_the_function(made, message):
    with pytest.raises(ValueError, match=message):
        scores(lambda completions: made(), [reply(), reply()])


@pytest.mark.parametrize("nan", [float("nan"), np.float32("nan"), jnp.array(jnp.nan), torch.tensor(float("nan"))])
def test_nan_means_none_where_it_is_said(nan):
    reward, replies = rewards.of(lambda completions: [1.0, nan, None], nan="skip"), [reply(), reply("x"), reply()]
    out = rewards.score(reward, replies)
    assert out.total.tolist() == [1, 0, 0] and out.judged.tolist() == [True, False, False]
    with pytest.raises(ValueError, match="returned .*nan.* for the completion 'x'.*NaN with reward.nan='skip'"):
        scores(lambda completions: [1.0, nan, None], replies)
    with pytest.raises(ValueError, match="returned inf"):
        rewards.score(reward._replace(functions=(lambda completions: [float("inf")] * 3,)), replies)
    with pytest.raises(ValueError, match="reward.nan='ignore': choose of 'refuse', 'skip'"):
        rewards.of(generator, nan="ignore")


def test_what_no_function_could_judge_is_known():
    """A number of one of them is enough; what is not scored is not asked about."""
    replies = [reply("a"), reply("b"), reply("c"), reply("d", scored=False)]
    out = scores([lambda completions: [None, 0.0, None], lambda completions: [None, None, 2.0]], replies)
    assert out.asked.tolist() == [True, True, True, False] and out.judged.tolist() == [False, True, True, False]


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


def test_an_empty_reply_may_have_a_worth_of_its_own():
    """Its functions are not asked; it is judged, and a reply of spaces is empty, too."""
    asked = []

    def length(completions):
        asked.extend(completions)
        return [len(text) for text in completions]

    replies = [reply(""), reply("four"), reply("  "), reply("", scored=False)]
    own = rewards.score(rewards.of(length)._replace(empty=0.25), replies)
    assert asked == ["four"] and own.total.tolist() == [0.25, 4.0, 0.25, 0.0]
    assert own.judged.tolist() == own.asked.tolist() == [True, True, True, False]
    assert rewards.digest(rewards.of(length)) != rewards.digest(rewards.of(length)._replace(empty=0.0))
    assert rewards.score(rewards.of(length), replies).total.tolist() == [0.0, 4.0, 2.0, 0.0]
