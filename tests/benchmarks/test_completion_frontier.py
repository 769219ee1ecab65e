"""What the benchmark says of two trainers at equal KL, by hand."""
from rich.console import Console

from benchmarks import completion_frontier


def member(number, kl, reward):
    return {"member": number, "title": f"at {kl}", "kl": kl, "kl_se": 0.1, "reward": reward, "reward_se": 0.01,
            "efficiency": None}


REPORT = {"base_reward": 0.0, "frontier": [{"kl": kl, "reward": kl**0.5, "ess": 1000 - 100 * kl}
                                           for kl in (0.0, 0.25, 1.0, 2.25, 4.0, 6.25)],
          "members": [member(0, 4.0, 1.0), member(1, 8.0, 2.0), member(None, 5.0, 0.5)]}


def test_a_reward_between_two_policies_and_the_kl_that_it_needs():
    """Halfway from (4, 1) to (8, 2) is (6, 1.5), which the best policy has for 1.5^2 = 2.25 nats."""
    row = completion_frontier._at(REPORT, 6.0, True)
    assert row["reward"] == 1.5 and abs(row["efficiency"] - 2.25 / 6) < 1e-6 and row["ess"] == 1000 - 225


def test_beyond_the_farthest_policy_there_is_no_number():
    row = completion_frontier._at(REPORT, 6.0, False)
    assert row["reward"] is None and row["efficiency"] is None
    result = {"holds": False, "tokens": {"kl_reg": [5, 7], "TRL RLOO": [6]}, "report": REPORT, "rows": [row]}
    console = Console(width=120)
    with console.capture() as capture:
        console.print(completion_frontier.report(result))
    assert "kl_reg is not ahead at each KL." in capture.get() and "at 8.0" in capture.get()
    assert "kl_reg 5, 7; TRL RLOO 6." in capture.get()
