"""The benchmark's arithmetic by hand, kl_reg's steps at a small size, and how it tells made-up peers to step."""
import json
import pathlib
import shutil
import subprocess
import sys
from functools import partial

import pytest

from benchmarks import machine, rl_step
from benchmarks.peers import environment, stepping, work
from benchmarks.peers.stepping import Step
from benchmarks.peers.work import Work
from kl_reg.pretrained import tokenizer

SMALL = Work(sequences=4, prompt=6, generated=3, group=2)
PEER = """
import sys
from benchmarks.peers.stepping import Told
told = Told()
print("a library's greeting", flush=True)
told.ready("numpy")
while told.wait():
    for phase in ("rollout", "reward", "update"):
        told.clock.mark(phase)
    print("a library's complaint", file=sys.stderr, flush=True)
    LAST
    told.done(36, 0.5)
"""


def peer(last="pass"):
    return [sys.executable, "-c", PEER.replace("LAST", last)]


@pytest.fixture
def settings(tiny_folder, tiny_tokenizer, tmp_path):
    return work.settings_of(SMALL, tiny_folder, tmp_path, 300, work.prompts(tiny_tokenizer, SMALL.prompt))


def test_operations_by_hand(tiny_shapes):
    """3 + 2 tokens, so 4 pass 3 layers: matrices 16 x 32, two 16 x 16, 32 x 16, three 16 x 32, 3072 multiply-adds;
    10 pairs of tokens with 2 x 32 multiply-adds. 2 tokens are unembedded, 16 x 300. A head of 2 layers and 8 units: 35
    x 8 and 8 x 16 for each of them."""
    layers, unembed, change = 3 * (4 * 2 * 3072 + 10 * 2 * 64), 2 * 2 * 16 * 300, 2 * 2 * (280 + 128)
    assert (layers, unembed, change) == (77568, 19200, 1632)
    each = Work(sequences=7, prompt=3, generated=2, group=7)
    assert work.flops(tiny_shapes, each, "full") == {"rollout": 7 * 96768, "reference": 7 * 96768, "update": 21 * 96768}
    assert work.flops(tiny_shapes, each, "head", read=2, hidden=8) == {
        "rollout": 7 * (96768 + 1632), "reference": 7 * 19200, "update": 7 * (38400 + 4896)}


def row(rollout, reward, update):
    return {"rollout": rollout, "reward": reward, "update": update}


def test_ratios_and_the_table():
    """Steps of 2, 4 and 9 seconds beside 10, 12 and 50."""
    seconds = {"kl_reg": [row(1, 0, 1), row(1, 1, 2), row(3, 3, 3)], "trl": [row(5, 4, 1), row(6, 4, 2), row(9, 40, 1)]}
    compared = rl_step.compare(seconds, {"kl_reg": 80, "trl": 120}, peak=40.0)
    assert compared["median"] == {"kl_reg": row(1, 1, 2) | {"step": 4}, "trl": row(6, 4, 1) | {"step": 12}}
    assert compared["ratio"] == {"kl_reg": 1, "trl": 3} and compared["of_peak"] == {"kl_reg": 0.5, "trl": 0.25}
    said = rl_step.report({
        "model": "tiny", "policy": "head", "kl": "exact", "work": SMALL._asdict(), "goal": {"trl": 5.0},
        "seconds": seconds, "machine": {"processor": "Abacus", "cores": 2, "device": "cpu"}, "others": 0.25,
        "matmul_flops_per_second": 2e11,
        "versions": {"kl_reg": {"kl_reg": "1", "jax": "2"}, "trl": {"trl": "3"}},
        "flops": {"kl_reg": {"rollout": 10**9, "reference": 0, "update": 5 * 10**8}, "trl": {}}, **compared})
    assert "| kl_reg 1, jax 2 | 4.00 | 1.00 | 1.00 | 2.00 | 50% |  |  |" in said
    assert "| trl 3 | 12.00 | 6.00 | 4.00 | 1.00 | 25% | 3.00 | 5 |" in said
    assert "needs 1.5 GFLOP (rollout 1.0, reference 0.0, update 0.5)" in said and "200 GFLOP/s" in said
    assert "Abacus, 2 cores. Seconds, median of 3 steps." in said and "Other processes took 25%" in said
    assert len({line.count("|") for line in said.splitlines() if "|" in line}) == 1


def test_trainers_take_turns_and_have_to_do_the_work():
    asked = []

    def trainer(name, tokens=36, moved=0.1):
        return lambda: asked.append(name) or Step(row(len(asked), 0, 0), tokens, moved)

    seconds = stepping.take_turns({"kl_reg": trainer("a"), "trl": trainer("b", moved=None)}, SMALL.tokens, 1, 2)
    assert asked == ["a", "b"] * 3 and [made["rollout"] for made in seconds["trl"]] == [4, 6]
    for wrong in ({"tokens": 35}, {"moved": 0.0}, {"moved": float("nan")}):
        with pytest.raises(RuntimeError, match="trl: a step had 3. tokens of 36"):
            stepping.take_turns({"kl_reg": trainer("a"), "trl": trainer("b", **wrong)}, SMALL.tokens, 0, 1)


@pytest.mark.parametrize("policy", ["full", "head"])
def test_a_step_of_ours_does_all_the_work(settings, policy):
    step = rl_step.ours(settings, policy, "exact")
    for _ in range(2):
        done = step()
        assert tuple(done.seconds) == stepping.PHASES and all(value > 0 for value in done.seconds.values())
        assert done.tokens == 4 * (6 + 3) and done.moved == pytest.approx(1e-5, rel=0.2)     # as Adam's steps are


def test_the_command_prints_and_stores_what_it_measured(tiny_folder, tiny_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(work, "write_model", lambda name, folder: shutil.copytree(tiny_folder, folder) and tiny_shapes)
    monkeypatch.setattr(machine, "matmul_peak", partial(machine.matmul_peak, width=32, repeats=1))
    monkeypatch.setattr(rl_step, "ours", lambda settings, *how: lambda: Step(row(0.5, 0.25, 0.25), 36, 1e-5))
    sizes = [f"--{name}={size}" for name, size in SMALL._asdict().items()]
    rl_step.main(["--model=tiny", "--peers=", "--steps=2", *sizes, "--json", str(tmp_path / "numbers.json")])
    result = json.loads((tmp_path / "numbers.json").read_text())
    assert rl_step.report(result) + "\n" == capsys.readouterr().out
    assert result["seconds"] == {"kl_reg": [row(0.5, 0.25, 0.25)] * 2} and result["goal"] == {}
    needed = sum(result["flops"]["kl_reg"].values())
    assert result["of_peak"]["kl_reg"] == pytest.approx(needed / 1.0 / result["matmul_flops_per_second"])
    assert result["versions"]["kl_reg"].keys() == {"kl_reg", "jax", "python"} and result["machine"]["cores"] >= 1


def test_prompts_have_the_wanted_length(tiny_tokenizer):
    said = work.prompts(tiny_tokenizer, 26, 16)
    assert len(set(said)) == 16 and {len(tokenizer.opening(tiny_tokenizer, one)) for one in said} == {26}
    with pytest.raises(ValueError, match=r"--prompt=10000: the text of \d+ tokens has 0 such prompts, not 2"):
        work.prompts(tiny_tokenizer, 10000)


def test_a_peer_is_told_to_step():
    """What else it prints is no answer."""
    with stepping.running("fake", peer()) as trainer:
        assert trainer.versions.keys() == {"numpy"}
        for _ in range(2):
            done = stepping.step(trainer)
            assert done.tokens == 36 and done.moved == 0.5 and tuple(done.seconds) == stepping.PHASES
    assert trainer.process.returncode == 0


def test_a_peer_that_ends_or_babbles_is_one_error_with_what_it_said():
    with pytest.raises(RuntimeError, match=r"(?s)^fake ended with status 3; .*a library's complaint$"), \
            stepping.running("fake", peer("sys.exit(3)")) as trainer:
        stepping.step(trainer)
    with pytest.raises(RuntimeError, match=r"(?s)^fake ended with status 1; .*No module named 'nowhere'$"), \
            stepping.running("fake", [sys.executable, "-c", "import nowhere"]):
        pass
    with pytest.raises(RuntimeError, match=r"^fake answered 'hello\\n'; "), \
            stepping.running("fake", [sys.executable, "-c", "print('hello')"]):
        pass
    silent = [sys.executable, "-c", "print('{\"versions\": {}}')"]
    with pytest.raises(RuntimeError, match="^fake ended with status 0"), stepping.running("fake", silent) as trainer:
        trainer.process.wait()
        stepping.step(trainer)


def test_an_environment_is_made_once_for_its_requirements(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []
    monkeypatch.setattr(environment, "_run", lambda name, command: (
        asked.append(command), "venv" in command and pathlib.Path(command[-1]).mkdir(parents=True, exist_ok=True)))
    python = environment.python("trl")
    assert python == tmp_path / "kl_reg/benchmarks/trl/bin/python" and asked[1][0] == str(python)
    assert environment.python("trl") == python and len(asked) == 2
    (tmp_path / "kl_reg/benchmarks/trl/requirements.txt").write_text("trl==0.1\n")
    environment.python("trl")
    assert len(asked) == 4
    assert environment.python("tunix", "gpu") == tmp_path / "kl_reg/benchmarks/tunix-gpu/bin/python"
    assert "\njax[cuda12]==" in (tmp_path / "kl_reg/benchmarks/tunix-gpu/requirements.txt").read_text()
    with pytest.raises(ValueError, match="no peer 'nobody'; choose of rlax, trl, tunix, verl"):
        environment.python("nobody")


def test_a_package_is_installed_without_what_it_asks_for(tmp_path, monkeypatch):
    """Where its line says so; behind the others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []
    monkeypatch.setattr(environment, "_run", lambda name, command: (
        asked.append(command), "venv" in command and pathlib.Path(command[-1]).mkdir(parents=True, exist_ok=True)))
    environment.python("verl")
    _, others, alone = asked
    assert "--no-deps" not in others and any(package.startswith("torch==") for package in others)
    assert alone[-2] == "--no-deps" and alone[-1].startswith("verl==") and alone[-1] not in others


def test_a_failed_installation_is_one_error_and_no_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked, said = [], "ERROR: Looking\nERROR: No matching distribution\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: asked.append(command) or
                        subprocess.CompletedProcess(command, returncode=len(asked) - 1, stderr=said))
    for _ in range(2):
        asked.clear()
        with pytest.raises(OSError, match="trl: `.* -m pip install .*` failed: ERROR: No matching distribution$"):
            environment.python("trl")
