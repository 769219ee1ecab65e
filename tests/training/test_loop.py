import contextlib
import io
import json
import re
import signal
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kl_reg
from kl_reg import config as configs
from kl_reg.runs import log as run_log
from kl_reg.training import loop


def reward(prompts, completions, completion_ids):
    """Longer replies are better. It sets an alarm, as verifiers do, which only the main thread can."""
    before = signal.alarm(600)
    try:
        return [len(ids) / 10 for ids in completion_ids]
    finally:
        signal.alarm(before)


@pytest.fixture(scope="module")
def config(tiny_folder):
    config = configs.default()
    config.model.path = str(tiny_folder)
    config.env.opening, config.env.length, config.env.turns = "<|start|>A: hi\n", 24, 2
    config.rl.iterations, config.rl.episodes, config.evaluation.episodes = 4, 4, 10
    config.policy.hidden, config.checkpoint.every, config.log.tensorboard = 8, 2, True
    config.optim.learning_rate = 1e-2
    config.sweep = [{"kl.coef": (0.0, 0.3), "seed": (0,)}, {"kl.budget": (0.0, 2.0), "seed": (1,)},
                    {"kl.coef": (0.1,), "kl.controller": ("pi",), "reference.name": ("ema",), "seed": (0,)}]
    return config


def trained(config, reward, workdir):
    """The result, and what was printed meanwhile."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        return kl_reg.train(config, reward, workdir), said.getvalue().splitlines()


@pytest.fixture(scope="module")
def whole_and_said(config, tmp_path_factory):
    return trained(config, reward, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def whole(whole_and_said):
    return whole_and_said[0]


@pytest.fixture(scope="module")
def alone_and_said(config, tmp_path_factory):
    """Member 1 by itself; its reward compiles something in every iteration."""
    config, sizes = config.copy_and_resolve_references(), []
    config.sweep, config.kl.coef = [], 0.3

    def compiles(prompts, completions, completion_ids):
        sizes.append(jnp.ones(1000 + len(sizes)).shape)
        return reward(prompts, completions, completion_ids)

    return trained(config, compiles, tmp_path_factory.mktemp("alone") / "run")


def lines(result, member):
    rows = [json.loads(line) for line in (result.workdir / f"members/{member}/metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")} for row in rows]


def test_the_summary_has_the_base_and_every_member(whole, config):
    summary = json.loads((whole.workdir / "summary.json").read_text())
    assert [row["member"] for row in summary] == ["base", 0, 1, 2, 3, 4]
    assert summary[0]["hyper"] == {} and summary[3]["hyper"] == {
        "kl.coef": 0.0, "kl.budget": 0.0, "seed": 1, "kl.controller": "fixed", "reference.name": "base"}
    for row in summary:
        assert row["final"]["episodes"] == (20 if row["member"] == "base" else 10)       # the base on both seeds' keys
        assert {"return", "kl/nats_per_episode", "teacher/silent_rate", "student/silent_rate"} <= set(row["final"])
    assert whole.report.is_file()


def test_the_base_and_a_budget_of_zero_are_the_same_policy(whole):
    summary = json.loads((whole.workdir / "summary.json").read_text())
    base, zero = summary[0]["by_seed"]["1"], summary[3]["final"]
    assert base["kl/nats_per_episode"] < 1e-6 and zero["kl/nats_per_episode"] < 1e-6
    assert base["return"] == zero["return"]


def test_a_budget_binds_the_trained_member_in_every_episode(whole):
    with np.load(whole.workdir / "members/3/evaluation.npz") as arrays:
        assert (arrays["kl"].sum(1) <= 2.0 * (1 + 1e-5)).all() and arrays["kl"].sum() > 0


def test_evaluation_counts_returns_as_the_reward_function_gives_them(whole, tiny_tokenizer):
    with np.load(whole.workdir / "members/0/evaluation.npz") as arrays:
        end = tiny_tokenizer.encode("\n").ids[0]
        expected = []
        for tokens, roles, turns in zip(arrays["tokens"], arrays["roles"], arrays["turns"], strict=True):
            replies = [tokens[(turns == turn) & (roles == 4)] for turn in range(1, turns.max() + 1, 2)]
            expected.append(sum((len(ids) - 1) / 10 for ids in replies if len(ids) and ids[-1] == end))
        np.testing.assert_allclose(arrays["returns"], expected, rtol=1e-6)


def test_a_killed_run_resumes_bit_equal(whole, config, tmp_path, monkeypatch):
    write, written = run_log.MemberLog.write, []

    def dies_in_the_third_iteration(log, row):
        written.append(row["iteration"])
        if len(written) > 2 * 5 + 3:
            raise KeyboardInterrupt
        write(log, row)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_log.MemberLog, "write", dies_in_the_third_iteration)
        kl_reg.train(config, reward, tmp_path / "run")
    assert written[-1] == 2
    resumed = kl_reg.train(config, reward, tmp_path / "run")
    chex.assert_trees_all_equal(resumed.params, whole.params)
    for member in range(5):
        assert lines(resumed, member) == lines(whole, member)
        assert [event.step for event in scalars(resumed, member)] == [0, 1, 2, 3]      # none twice


def test_a_finished_run_is_reported_again_without_training(whole, config):
    again = kl_reg.train(config, reward, whole.workdir)
    chex.assert_trees_all_equal(again.params, whole.params)
    assert again.summary == whole.summary


def test_a_member_of_the_sweep_equals_its_solo_run(whole, alone_and_said):
    alone, _ = alone_and_said
    for ours, theirs in zip(lines(alone, 0), lines(whole, 1), strict=True):
        for key in ("return", "kl/nats_per_episode", "loss/policy_avg"):
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-3, atol=1e-5)
    chex.assert_trees_all_close(alone.params[0], whole.params[1], rtol=1e-3, atol=1e-5)


def test_nothing_compiles_behind_the_second_iteration(whole_and_said):
    """Four iterations of three programs, whose episodes are longer in some than in others."""
    result, said = whole_and_said
    assert all(len({row["tokens"] for row in lines(result, member)}) > 1 for member in range(5))
    assert said[0].startswith("first update after ") and not [line for line in said if "compilations" in line]


def test_what_compiles_late_is_said_once(alone_and_said):
    (line,) = [line for line in alone_and_said[1] if "compil" in line]
    assert re.fullmatch(r"iteration [23]: 1 compilations, among them jit\(broadcast_in_dim\); behind the second "
                        r"iteration nothing should compile \(docs/performance.md\)", line)


def test_compilations_are_counted_and_calls_are_not():
    double = jax.jit(lambda x: 2 * x)
    inputs = np.ones(3), np.ones(4), np.ones(4)
    with run_log.compilations() as names:
        for x in inputs:
            double(x)
    double(np.ones(5))
    assert names == ["jit(<lambda>)"] * 2


def test_training_moves_the_policy_towards_more_reward(whole):
    moved = [float(np.abs(x).max()) for x in jax.tree.leaves(whole.params[0]["actor"]["change"])]
    assert max(moved) > 1e-3


def test_another_experiment_in_the_directory_is_refused(whole, config):
    other = config.copy_and_resolve_references()
    other.rl.epochs = 1
    with pytest.raises(FileExistsError, match="holds another experiment: rl.epochs [0-9]+ -> 1;"):
        kl_reg.train(other, reward, whole.workdir)


def test_more_iterations_alone_go_on(config, tmp_path, capsys):
    """The parameters and the log of the first ones stay; fewer are refused."""
    lines = lambda: (tmp_path / "run/members/0/metrics.jsonl").read_text().splitlines()  # noqa: E731
    config = config.copy_and_resolve_references()
    config.sweep, config.rl.iterations, config.evaluation.episodes = [], 1, 2
    kl_reg.train(config, reward, tmp_path / "run")
    first = lines()
    config.rl.iterations = 2
    kl_reg.train(config, reward, tmp_path / "run")
    assert lines()[:1] == first and [json.loads(line)["iteration"] for line in lines()] == [0, 1]
    assert "rl.iterations 1 -> 2; the run goes on" in capsys.readouterr().out
    config.rl.iterations = 1
    with pytest.raises(FileExistsError, match="another experiment: rl.iterations 2 -> 1"):
        kl_reg.train(config, reward, tmp_path / "run")


def test_a_foreign_directory_is_refused_and_left_alone(config, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"not empty and holds no config\.json"):
        kl_reg.train(config, reward, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_bad_setting_writes_nothing(config, tmp_path):
    bad = config.copy_and_resolve_references()
    bad.env.length = 60                                         # with its opening longer than the context of 64
    with pytest.raises(ValueError, match="context is 64"):
        kl_reg.train(bad, reward, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_reward_that_is_no_number_stops_before_the_update(config, tmp_path):
    def broken(prompts, completions, completion_ids):
        return [float("nan")] * len(completions)

    with pytest.raises(ValueError, match="reward function 'broken' returned nan"):
        kl_reg.train(config, broken, tmp_path / "run")


def test_a_run_in_which_nothing_can_be_judged_moves_nothing_and_says_so(config, tmp_path):
    """NaN, which means None here, for every completion; and what the functions see of the trainer and log."""
    silent = config.copy_and_resolve_references()
    silent.update({"env": {"name": "completion", "turns": 0, "length": 8}, "kl": {"coef": 0.3}, "sweep": [],
                   "reward": {"nan": "skip"}, "rl": {"iterations": 2}, "evaluation": {"episodes": 4}})
    steps = []

    def helpless(completions, trainer_state, log_metric):
        steps.append((trainer_state.global_step, trainer_state.max_steps))
        log_metric("count", len(completions))
        return [float("nan")] * len(completions)

    result, said = trained(silent, helpless, tmp_path / "run")
    assert steps == [(0, 2), (1, 2), (2, 2), (2, 2)]
    assert any("no reward function gave a number for any reply of member 0" in line for line in said)
    for row in lines(result, 0):
        assert row["reward/unjudged_rate"] == 1 and row["return"] is None and row["objective/rlhf_reward"] is None
        assert row["reward/extra/count"] == 4 and row["optim/grad_norm"] == 0 and row["kl/nats_per_episode"] < 1e-6
    assert not any(np.any(x) for x in jax.tree.leaves(result.params[0]["actor"]["change"]))
    assert [row["final"]["return"] for row in result.summary] == [None, None]
    with np.load(result.workdir / "members/0/evaluation.npz") as arrays:
        assert np.isnan(arrays["returns"]).all()
    assert result.report.is_file()


def test_a_group_is_sampled_while_the_reward_functions_are_asked_about_the_one_before(monkeypatch):
    """What the device does is dispatched first, and nobody waits for it."""
    said, fake = [], SimpleNamespace(fetch=None)
    monkeypatch.setattr(loop, "_sample", lambda group, state: said.append(f"sample {group}") or group)
    monkeypatch.setattr(loop, "_update", lambda group, state, batch, judges: said.append(f"judge {batch}") or (
        f"new {state}", {group: {}}))
    states = ["a", "b", "c"]
    assert loop._iteration([0, 1, 2], states, fake) == {0: {}, 1: {}, 2: {}} and states == ["new a", "new b", "new c"]
    assert said == ["sample 0", "sample 1", "judge 0", "sample 2", "judge 1", "judge 2"]


def scalars(result, member):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(result.workdir / f"members/{member}/tensorboard")).Reload().Scalars("return")


def test_tensorboard_has_the_scalars(whole):
    assert [round(event.value, 5) for event in scalars(whole, 1)] == [round(row["return"], 5)
                                                                      for row in lines(whole, 1)]


def test_a_controller_moves_the_coefficient(whole):
    """Far below its target of 10 nats: one step down at first by gain and rate, then by the rate alone."""
    coef = [row["kl/coef"] for row in lines(whole, 4)]
    np.testing.assert_allclose(np.log(coef[0]), np.log(0.1), atol=1e-6)
    np.testing.assert_allclose(np.diff(np.log(coef)), [-0.2 * (0.5 + 0.05), -0.01, -0.01], atol=1e-5)


def test_the_established_names_mean_what_they_say(whole):
    """objective/kl and its kin, from the log's own parts."""
    for member, row in ((1, lines(whole, 1)[-1]), (4, lines(whole, 4)[-1])):
        np.testing.assert_allclose(row["objective/kl"], row["kl/sampled/nats_per_episode"])
        penalty = -row["kl/coef"] * row["kl/nats_per_episode"]        # exact in full: the estimate is the KL itself
        np.testing.assert_allclose(row["objective/non_score_reward"], penalty, rtol=1e-5, err_msg=str(member))
        np.testing.assert_allclose(row["objective/rlhf_reward"], row["return"] + penalty, rtol=1e-5)


def test_an_overflow_names_the_member_the_metric_and_the_token(config, tmp_path):
    wild = config.copy_and_resolve_references()
    wild.sweep, wild.kl.coef, wild.kl.estimator, wild.kl.placement = [], 0.1, "k3", "loss"
    wild.optim.learning_rate, wild.optim.warmup = 1e6, 1
    with pytest.raises(ValueError, match=r"member 0: .*loss/kl.* not finite.* token is \d+, in slot \d+ of episode "
                                         r"\d+, with log pi - log ref = -?(\d{3,}|\d\.\d+e)"):
        kl_reg.train(wild, reward, tmp_path / "run")
    assert not (tmp_path / "run/summary.json").exists()


def test_a_member_of_a_run_is_a_reference(whole, config, tmp_path):
    """An untrained policy is the base; its KL to member 1 is what `compare` would say: positive, and to member 0 other.
    """
    follow = config.copy_and_resolve_references()
    members = (f"{whole.workdir}:1@4",), (f"{whole.workdir}:0@4",)
    follow.sweep = [{"reference.name": ("checkpoint",), "reference.paths": members}]
    follow.rl.iterations, follow.kl.coef = 1, 0.1
    result = kl_reg.train(follow, reward, tmp_path / "run")
    first = [lines(result, k)[0]["kl/nats_per_episode"] for k in (0, 1)]
    assert min(first) > 1e-6 and first[0] != first[1]
    digests = json.loads((result.workdir / "config.json").read_text())["references"]
    assert len(digests["0"]) == len(digests["1"]) == 1 and digests["0"] != digests["1"]


@pytest.mark.parametrize("address, says", [(":1", "member and an iteration"), (":9@4", "5 members"),
                                           (":1@3", "iterations 2, 4"), (":3@4", "hard budget")])
def test_a_member_that_is_no_reference_says_why(whole, config, tmp_path, address, says):
    follow = config.copy_and_resolve_references()
    follow.sweep, follow.reference.name, follow.reference.paths = [], "checkpoint", (f"{whole.workdir}{address}",)
    with pytest.raises(ValueError, match=says):
        kl_reg.train(follow, reward, tmp_path / "run")
    assert not (tmp_path / "run").exists()
