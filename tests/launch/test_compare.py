"""`python -m launch.compare` on a small run, whose own evaluation says what the numbers have to be."""
import json

import jax
import numpy as np
import pytest

from kl_reg.models import decoder
from kl_reg.models.layers import Rope
from kl_reg.pretrained import families, weights
from kl_reg.types import AGENT
from launch import compare

EPISODES = 40       # more than one batch


@pytest.fixture
def call(capsys):
    """The command: its exit status, what it printed and what it wrote."""
    def call(*arguments):
        capsys.readouterr()
        try:
            compare.main(list(map(str, arguments)))
            status = 0
        except SystemExit as error:
            status = error.code
        printed = capsys.readouterr()
        lines = [line.split() for line in printed.out.splitlines()]
        paths = dict(line for line in lines if len(line) == 2 and line[0] in ("numbers", "figure"))
        report = None
        if paths:
            with open(paths["figure"], "rb") as file:
                assert file.read(4) == b"\x89PNG"
            with open(paths["numbers"]) as file:
                report = json.load(file)
        return status, printed, report, paths

    return call


def evaluated(run, member):
    """Nats and roles behind the opening, as the run's evaluation recorded them."""
    with np.load(run / f"members/{member}/evaluation.npz") as arrays:
        return arrays["kl"][:, -16:], arrays["roles"][:, -16:]


def test_on_the_runs_evaluation_it_says_what_the_evaluation_says(run, call):
    status, printed, report, paths = call("base", run, "--openings", "run", "--episodes", EPISODES)
    assert status == 0 and paths["numbers"] == str(run / "compare/base_all_on_B-run/compare.json")
    assert report["a"]["kind"] == "base" and report["b"] == {"name": str(run), "kind": "run",
                                                             "model": report["a"]["model"]}
    assert [row["b"]["member"] for row in report["rows"]] == [0, 1, 2]
    assert {row["b"]["iteration"] for row in report["rows"]} == {2}
    for row in report["rows"]:
        kl, roles = evaluated(run, row["b"]["member"])
        agent = roles == AGENT
        assert row["per_episode"]["kl_ba"]["mean"] == pytest.approx(kl.sum(1).mean(), rel=1e-4, abs=1e-6)
        assert row["per_token"]["kl_ba"]["mean"] == pytest.approx(kl[agent].mean(), rel=1e-4, abs=1e-6)
        at = [kl[agent[:, t], t].mean() if agent[:, t].any() else None for t in range(16)]
        for got, expected in zip(row["by_position"]["kl_ba"]["mean"], at, strict=True):
            assert got == (None if expected is None else pytest.approx(expected, rel=1e-3, abs=1e-6))
        assert row["agent_tokens_per_episode"] == pytest.approx(agent.sum(1).mean())
        assert sum(row["by_turn"]["kl_ba"]["mean"]) == pytest.approx(row["per_episode"]["kl_ba"]["mean"])
    final = {row["member"]: row["final"] for row in json.loads((run / "summary.json").read_text())}
    assert final[1]["kl/nats_per_episode"] == pytest.approx(report["rows"][1]["per_episode"]["kl_ba"]["mean"], rel=1e-4)
    spent = [row["per_episode"]["kl_ba"]["mean"] for row in report["rows"]]
    assert spent[1] > 0.5 > spent[2] > 0.05
    for word in ("D(A‖B), nats", "D(B‖A), nats *", "total variation", "1@2", "2@2", "the KL of whole episodes, D(B‖A)"):
        assert word in printed.out
    assert not report["quantities"]["kl_ab"]["whole_episodes"] and report["quantities"]["kl_ba"]["whole_episodes"]
    assert "upper bound" in report["quantities"]["kl_ba"]["per_episode"]      # member 2 draws what it spends


def test_a_member_that_never_learned_is_the_base(run, call):
    _, _, report, _ = call("base", f"{run}:0", "--episodes", 4)
    row, = report["rows"]
    for key in ("kl_ab", "kl_ba", "jensen_shannon", "total_variation"):
        assert row["per_episode"][key]["mean"] == pytest.approx(0.0, abs=1e-9)


def test_other_episodes_agree_within_their_errors(run, call):
    """Held-out openings aside, the seed is all that differs from the evaluation."""
    _, _, report, _ = call(f"{run}:1", "base", "--openings", "run", "--episodes", 64, "--seed", 5)
    table = report["rows"][0]["per_episode"]["kl_ab"]
    assert report["on"] == "A" and report["quantities"]["kl_ab"]["whole_episodes"]
    final = json.loads((run / "summary.json").read_text())[2]["final"]
    error = np.hypot((table["high"] - table["low"]) / 4, final["kl/nats_per_episode_se"])
    assert 0 < abs(table["mean"] - final["kl/nats_per_episode"]) < 4 * error


def test_along_the_checkpoints(run, call, tmp_path):
    status, printed, report, _ = call("base", run, "--steps", "--on", "held_out", "--episodes", 4, "--out",
                                      tmp_path / "here")
    assert status == 0 and (tmp_path / "here/compare.json").is_file()
    assert [(row["b"]["member"], row["b"]["iteration"]) for row in report["rows"]] == [
        (member, iteration) for iteration in (1, 2) for member in (0, 1, 2)]
    first, last = (report["rows"][i]["per_episode"]["kl_ba"]["mean"] for i in (1, 4))
    assert first != last and "1@1" in printed.out
    assert not any(q["whole_episodes"] for q in report["quantities"].values())
    assert "No sum here is the KL of whole episodes" in printed.out


def test_two_checkpoints_of_one_member(run, call):
    _, _, there, _ = call(f"{run}:1@1", f"{run}:1", "--on", "held_out", "--episodes", 4)
    _, _, back, _ = call(f"{run}:1", f"{run}:1@1", "--on", "held_out", "--episodes", 4)
    there, back = there["rows"][0]["per_episode"], back["rows"][0]["per_episode"]
    assert there["kl_ab"] == back["kl_ba"] and there["kl_ba"] == back["kl_ab"] and there["kl_ab"]["mean"] > 1e-3


def test_a_folder_plays_the_agent_beside_the_runs_base(run, call, tiny_folder, tmp_path):
    """The base's own folder is the base; another model's agent faces the same student."""
    _, _, report, _ = call(tiny_folder, f"{run}:0", "--on", "A", "--openings", "run", "--episodes", 4)
    assert report["rows"][0]["per_episode"]["total_variation"]["mean"] == pytest.approx(0.0, abs=1e-4)
    shapes = decoder.DecoderConfig(vocab=300, width=24, layers=1, heads=2, kv_heads=1, head_width=8, mlp_width=16,
                                   max_position=64, rope=Rope(10000.0, 8))
    weights.save(tmp_path / "other", families.llama_settings(shapes), decoder.init(shapes, jax.random.key(1)))
    (tmp_path / "other/tokenizer.json").write_bytes((tiny_folder / "tokenizer.json").read_bytes())
    _, _, report, _ = call(tmp_path / "other", f"{run}:0", "--on", "A", "--episodes", 4)
    assert report["rows"][0]["per_token"]["kl_ab"]["mean"] > 0.05


@pytest.mark.parametrize("arguments, says", [
    (("nowhere", "base"), "'nowhere' is neither 'base', nor a run"), (("base", "{run}:7"), "members 0 to 2"),
    (("base", "{run}@9"), "there are 1, 2"), (("base", "{run}", "--on", "C"), "invalid choice: 'C'"),
    (("base", "{run}", "--episodes", "1"), "--episodes 1"), (("base", "{run}:0@1", "--steps"), "leave @1 out"),
    (("base", "base", "--steps"), "neither side is one"), (("base", "base", "--openings", "run"), "neither side"),
    (("base", "base", "--episodes", "999"), "held-out conversations"), (("base",), "required: B"),
    (("{tiny}", "base"), "300 tokens, 300 logits) and base"), (("{run}/members", "base"), "nor a model: "),
    (("{broken}", "base"), "{broken}: model.path=")])
def test_a_wrong_call_is_one_line(run, call, tiny_folder, tmp_path, arguments, says):
    (tmp_path / "pytorch_model.bin").touch()
    known = {"run": run, "tiny": tiny_folder, "broken": tmp_path}
    status, printed, _, _ = call(*(text.format(**known) for text in arguments))
    assert status == 2 and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert says.format(**known) in printed.err
