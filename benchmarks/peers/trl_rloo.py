"""The peer of `benchmarks.optimality`: TRL's RLOO on an exported model, one policy for each KL coefficient.

    python -m benchmarks.peers.trl_rloo SETTINGS.json

SETTINGS.json: {"model", "prompt", "end", "length", "episodes", "group", "epochs", "iterations", "rate", "coefficients",
"seed", "out"}. Each policy is saved to OUT/<coefficient>, with the number of tokens that it sampled; one that is there
already is kept. Runs in the environment of `trl.txt`.
"""
from __future__ import annotations

import json
import pathlib
import sys

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


def sentiment(analyzer: SentimentIntensityAnalyzer, text: str) -> float:
    """kl_reg's reward "vader": (compound + 1) / 2."""
    return (analyzer.polarity_scores(text)["compound"] + 1) / 2


def train(settings: dict, coefficient: float, out: pathlib.Path) -> None:
    """One policy; its reward is the sentiment of the completion before the end marker."""
    # Here, so that the reward can be tested where TRL is not installed.
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import RLOOConfig, RLOOTrainer

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    (end,) = tokenizer.encode(settings["end"], add_special_tokens=False)
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    analyzer, sampled = SentimentIntensityAnalyzer(), []

    def reward(completions, completion_ids, **kwargs):
        sampled.append(sum(map(len, completion_ids)))
        return [sentiment(analyzer, text.partition(settings["end"])[0]) for text in completions]

    epochs = settings["epochs"]
    config = RLOOConfig(
        output_dir=str(out / "trainer"), seed=settings["seed"], beta=coefficient, learning_rate=settings["rate"],
        lr_scheduler_type="linear", warmup_steps=2 * epochs, max_grad_norm=1.0,
        per_device_train_batch_size=settings["episodes"], num_generations=settings["group"],
        max_completion_length=settings["length"], max_steps=settings["iterations"] * epochs, num_iterations=epochs,
        temperature=1.0, top_p=1.0, top_k=0, use_cpu=True, bf16=False, save_strategy="no", report_to=[],
        logging_steps=20, disable_tqdm=True, normalize_advantages=False)
    data = Dataset.from_dict({"prompt": [settings["prompt"]] * settings["episodes"]})
    trainer = RLOOTrainer(model, reward, config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    sampled = {"tokens": sum(sampled), "settings": policy_of(settings)}
    (out / "sampled.json").write_text(json.dumps(sampled), encoding="utf-8")


def policy_of(settings: dict) -> dict:
    """What a policy depends on, beside its coefficient."""
    return {key: value for key, value in settings.items() if key not in ("coefficients", "out")}


def finished(settings: dict, out: pathlib.Path) -> bool:
    """Whether this policy is there."""
    file = out / "sampled.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["settings"] == policy_of(settings)


if __name__ == "__main__":
    settings = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
    for coefficient in settings["coefficients"]:
        out = pathlib.Path(settings["out"]) / str(coefficient)
        if not finished(settings, out):
            train(settings, coefficient, out)
