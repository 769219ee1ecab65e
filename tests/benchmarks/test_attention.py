"""The table by hand, and the command on a small model."""
import json

from benchmarks import attention


def test_the_table():
    result = {"model": "/models/small", "dtype": "bfloat16", "rows": 2, "length": 16, "repeats": 3, "others": None,
              "versions": {"jax": "1"}, "machine": {"processor": "Abacus", "cores": 2, "device": "cpu"},
              "seconds": {"own": {"forward": [1.0, 2.0, 9.0], "gradient": [4.0, 4.0, 4.0]},
                          "xla": {"forward": [1.0, 1.0, 1.0], "gradient": [6.0, 6.0, 6.0]}},
              "temp_bytes": {"own": 2e6, "xla": 5e6}, "largest_difference": {"own": [0.01, 0.02], "xla": [0.03, 0.5]}}
    said = attention.report(result)
    assert "| xla | 1.0000 | 6.0000 | 0.50 | 1.50 | 5 | 3.0e-02 | 5.0e-01 |" in said
    assert said.startswith("small in bfloat16: 2 sequences of 16 tokens; jax 1; Abacus, 2 cores.")


def test_cudnn_is_for_a_gpu_and_bfloat16(monkeypatch):
    assert attention.kinds("bfloat16") == ["own", "xla"]
    monkeypatch.setattr(attention.jax, "default_backend", lambda: "gpu")
    assert attention.kinds("bfloat16") == ["own", "xla", "cudnn"] and attention.kinds("float32") == ["own", "xla"]


def test_the_command_compares_values_with_float32(tiny_folder, tmp_path, capsys):
    attention.main([f"--model={tiny_folder}", "--rows=2", "--length=12", "--repeats=1",
                    "--json", str(tmp_path / "numbers.json")])
    result = json.loads((tmp_path / "numbers.json").read_text())
    assert attention.report(result) + "\n" == capsys.readouterr().out
    apart = result["largest_difference"]
    assert apart.keys() == {"own", "xla"} and all(0 < x < 0.1 for kind in apart.values() for x in kind)
