"""At a small shape: the command times both kinds and stores what the weights take."""
import json

from benchmarks import quantized_decode


def test_the_command_prints_and_stores_the_comparison(tiny_folder, tmp_path, capsys):
    sizes = ["--rows", "2", "--prompt", "3", "--tokens", "2", "--repeats", "2"]
    quantized_decode.main(["--model", str(tiny_folder), *sizes, "--json", str(tmp_path / "numbers.json")])
    printed = capsys.readouterr().out
    assert "2 rows, prompts of 3 tokens, 2 decoded" in printed and "decode, tokens per second" in printed
    result = json.loads((tmp_path / "numbers.json").read_text())
    assert all(result[key][kind] > 0 for kind in quantized_decode.KINDS
               for key in ("decode_tokens_per_second", "prefill_tokens_per_second", "decode_temp_bytes"))
    assert result["weights_bytes"]["int8"] < 0.6 * result["weights_bytes"]["float"]
    assert result["kl"]["to_float"] > 1e-6
