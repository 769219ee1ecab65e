"""`python -m launch.price` on a tiny model."""
import json

import pytest
import torch
from matplotlib.text import Text
from transformers import LlamaForCausalLM

from kl_reg.analysis.behaviour import script_price as pricing
from kl_reg.analysis.behaviour import script_price_figure
from kl_reg.pretrained import tokenizer
from launch import price

SMALL = ("--turns=2", "--episodes=3", "--max-reply=2", "--teacher=A:", "--student=B:", "--opening=A: hi\\nB: hello\\n")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def call(capsys, tmp_path):
    """The command: its exit status, what it printed and what it wrote."""
    def call(*arguments):
        capsys.readouterr()
        try:
            price.main([*arguments, f"--out={tmp_path / 'out'}"])
            status = 0
        except SystemExit as error:
            status = error.code
        written = tmp_path / "out/price.json"
        return status, capsys.readouterr(), json.loads(written.read_text()) if written.exists() else None

    return call


def test_it_prints_a_table_and_writes_numbers_and_figure(call, tiny_folder, tiny_tokenizer, tmp_path):
    status, printed, report = call(f"--model={tiny_folder}", *SMALL, "--script=", "--script=hi")
    assert status == 0 and (tmp_path / "out/price.png").read_bytes()[:4] == b"\x89PNG"
    assert [row["script"] for row in report["scripts"]] == ["", "hi"] and report["end"] == "\n"
    ids = tokenizer.encode(tiny_tokenizer, "A: hi\nB: hello\nA:\n")
    with torch.no_grad():
        loaded = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
        silence = -float(loaded(torch.tensor([ids])).logits[0, -2].log_softmax(-1)[ids[-1]])
    assert report["scripts"][0]["per_turn"]["mean"][0] == pytest.approx(silence, rel=1e-4)
    lines = [line.split() for line in printed.out.splitlines()]
    for i, key, name in ((0, "per_turn", "1"), (1, "per_turn", "2"), (1, "cumulative", "all")):
        cells = [f"{row[key][part][i]:.2f}" for row in report["scripts"] for part in ("mean", "error")]
        assert [name, cells[0], "±", cells[1], cells[2], "±", cells[3]] in lines
    assert ["numbers", str(tmp_path / "out/price.json")] in lines


def test_what_it_prices_by_default(call, tiny_folder, tmp_path, monkeypatch):
    """A figure that cannot be drawn takes neither the table nor the numbers with it."""
    monkeypatch.setattr(script_price_figure, "draw", lambda *_: (tmp_path / "none/a.png").write_bytes(b""))
    (tmp_path / "opening.txt").write_text("A: hi\nB: hello\n")
    status, printed, report = call(f"--model={tiny_folder}", *SMALL[:5], f"--opening-file={tmp_path / 'opening.txt'}")
    *named, letters = (row["script"] for row in report["scripts"])
    assert status == 2 and "Nats per turn" in printed.out and named == ["", "Good.", "..."]
    assert len(letters) == 5 and letters.isalpha()
    assert report["scripts"][1]["transcript"].startswith("A: hi\nB: hello\nA: Good.\nB:")


def test_nothing_is_sampled_where_nothing_can_be_written(call, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pricing, "price_of_script", lambda *_: pytest.fail("sampled"))
    (tmp_path / "out").write_text("a file")
    status, printed, _ = call(f"--model={tiny_folder}", *SMALL)
    assert status == 2 and str(tmp_path / "out") in printed.err and printed.err.count("\n") == 1


def test_dollars_in_a_script_are_no_formula(tmp_path, monkeypatch):
    """One that matplotlib would refuse, and one that it would set."""
    curve = {"mean": [1.0], "low": [0.5], "high": [2.0]}
    scripts = [{"script": text, "per_turn": curve, "cumulative": curve} for text in (r"$\no$", "$5 or $6")]
    shown = []
    monkeypatch.setattr(Text, "draw", lambda self, renderer, draw=Text.draw: shown.append(
        self._preprocess_math(self.get_text())) or draw(self, renderer))
    script_price_figure.draw(scripts, "$a$", tmp_path / "a.png")
    assert {(r"“$\no$”", False), ("“$5 or $6”", False), ("$a$", False)} <= set(shown)


@pytest.mark.parametrize("nats", [0.5, 300.0])
def test_the_budgets_are_inside_the_figure(tmp_path, monkeypatch, nats):
    """A label outside would shrink the panels to make room."""
    curve = {"mean": [nats], "low": [nats], "high": [nats]}
    drawn = []
    monkeypatch.setattr(script_price_figure, "save", lambda figure, path: drawn.append(figure) or path)
    script_price_figure.draw([{"script": "", "per_turn": curve, "cumulative": curve}], "one", tmp_path / "a.png")
    low, high = drawn[0].axes[1].get_ylim()
    assert low == 0 and high > max(*script_price_figure.BUDGETS, nats)


@pytest.mark.parametrize("arguments, says", [
    (("--model={tiny}", "--seed=-1"), "--seed -1 must"), (("--model={tiny}", f"--seed={2**31}"), "--seed 2147483648"),
    ((), "required: --model"), (("--model=nowhere",), "nowhere"), (("--model={tiny}", "--turns=x"), "--turns"),
    (("--model={tiny}", "--opening=A: hi"), "is to end with the end of a turn"),
    (("--model={tiny}", "--opening-file=none.txt"), "none.txt"),
    (("--model={tiny}",), "do not fit the model's context of 64")])
def test_a_wrong_call_is_one_line(call, tiny_folder, arguments, says):
    status, printed, report = call(*(text.format(tiny=tiny_folder) for text in arguments))
    assert status == 2 and report is None and says in printed.err
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
