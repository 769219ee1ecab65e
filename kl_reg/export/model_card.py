"""The model card of an exported member: what it is, how it was trained, what it cost, how to load it."""
from __future__ import annotations

import pathlib
from typing import NamedTuple

from huggingface_hub import ModelCardData

from kl_reg import config as configs
from kl_reg import storage
from kl_reg.export import huggingface as files
from kl_reg.pretrained import folders, tokenizer
from kl_reg.runs import directory as run_directory
from kl_reg.types import Sampling

_OF_THE_RUN = ("sweep", "checkpoint", "log", "evaluation")      # settings that say nothing of a member


class Facts(NamedTuple):
    """`kind` is what is exported: model, adapter or head; `proposal`, whether a hard budget is left out; `digest` and
    `folder` are the base's; `beside` says why a copy of it is exported, too ("": it is not)."""

    address: run_directory.Address
    member: run_directory.Member
    fingerprint: str
    digest: str
    kind: str
    proposal: bool
    folder: pathlib.Path
    beside: str


_START = {
    "model": '''\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
''',
    "adapter": '''\
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=DTYPE)
tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
''',
    "adapter with base": '''\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(f"{folder}/base")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype="auto"), folder)
''',
    "head": '''\
import sys

from transformers import AutoTokenizer

sys.path.insert(0, folder)
import head_policy

tokenizer = AutoTokenizer.from_pretrained(folder)
policy = head_policy.load(folder)
'''}

_WRITE = '''\
prompt = torch.tensor([{ids}])       # {text!r}
said = model.generate(prompt, max_new_tokens={length}, stop_strings=[{end!r}], tokenizer=tokenizer{drawing})[0]
print(tokenizer.decode(said))
'''
_WRITE_HEAD = '''\
prompt = {ids}      # {text!r}
said = policy.generate(prompt, opening=len(prompt), stop=lambda said: {end!r} in tokenizer.decode(said))
print(tokenizer.decode(prompt + said))
'''


def snippet(facts: Facts, folder: str) -> str:
    """Python that loads the export in `folder` and lets the agent write its first turn."""
    config = facts.member.config
    env, words = config.env, tokenizer.load(facts.folder)
    ids = tokenizer.opening(words, env.opening + env.teacher)       # other libraries may tokenise the text otherwise
    drawing = files.drawing(Sampling(**config.sampling)) if facts.kind == "adapter" else {}
    write = _WRITE_HEAD if facts.kind == "head" else _WRITE
    start = _START["adapter with base" if facts.kind == "adapter" and facts.beside else facts.kind]
    return f"folder = {folder!r}\n" + start.replace("DTYPE", repr(config.model.dtype)) + write.format(
        ids=ids, text=tokenizer.decode(words, ids), length=env.length,
        end=env.end + env.student if env.markers == "written" else env.end,
        drawing="".join(f", {key}={value!r}" for key, value in drawing.items()))


def text(facts: Facts) -> str:
    """README.md: a header that the Hugging Face hub reads, and the card; it names no absolute path."""
    address, member, run = facts.address, facts.member, facts.address.workdir.resolve().name
    what = {"model": "all weights, as transformers loads them",
            "adapter": "a LoRA adapter, as PEFT loads it",
            "head": "a head on a frozen model, with its loader, head_policy.py"}[facts.kind]
    rows = {"run": run, "member": address.member, "iteration": member.iteration,
            "fingerprint of the run": facts.fingerprint, "base model": _public(member.config.model.path),
            "digest of the base": facts.digest, "digest of the member's parameters": member.digest}
    return "\n".join([
        "---", _header(facts).strip(), "---", "",
        f"# {run}, member {address.member}, iteration {member.iteration}", "",
        f"A language model finetuned with kl_reg by RL under KL regularisation: {what}.", "",
        *_table(("", ""), rows), "", "## What it cost, what it got", "", *_results(facts), "", "## Loading", "",
        "`folder` is the folder of this file.", "", "```python", snippet(facts, ".").rstrip(), "```", "",
        *_remarks(facts), "", "## Settings", "", "Those of this member that are not kl_reg's defaults.", "",
        *_table(("setting", "value"), _changed(member.config)), ""])


def _header(facts):
    """The YAML of the card's header."""
    path, known = facts.member.config.model.path, {}
    if folders.is_hub(path) and not pathlib.Path(path).is_dir():
        known = {"base_model": path.partition("@")[0],
                 "base_model_relation": "adapter" if facts.kind == "adapter" else "finetune"}
    library = {"model": "transformers", "adapter": "peft", "head": "pytorch"}[facts.kind]
    return ModelCardData(library_name=library, pipeline_tag="text-generation",
                         tags=["kl_reg", "reinforcement-learning", "kl-regularization"], **known).to_yaml()


def _public(value):
    """A setting without the folders that a path of this machine goes through."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_public, value))
    return pathlib.PurePath(value).name if isinstance(value, str) and pathlib.PurePath(value).is_absolute() else value


def _table(head, rows):
    cell = lambda value: str(value).replace("|", "\\|").replace("\n", "\\n")  # noqa: E731
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {key} | `{cell(value)}` |" for key, value in rows.items())]


def _changed(config):
    default = configs.flat(configs.default())
    return {key: repr(_public(value)) for key, value in configs.flat(config).items()
            if value != default[key] and key.split(".")[0] not in _OF_THE_RUN}


def _results(facts):
    """KL and return, where they are of what is exported."""
    address, config = facts.address, facts.member.config
    file = address.workdir / "summary.json"
    if facts.proposal:
        return ["The run's figures are those of the policy inside its budget, not of this proposal."]
    if facts.member.iteration != config.rl.iterations or not file.is_file():
        return ["Not evaluated: the run's evaluation is of its last iteration."]
    summary = storage.read_json(file)
    final = next(row["final"] for row in summary if row["member"] == address.member)
    error = lambda name: final[f"{name}_se"]  # noqa: E731 - None of one episode
    number = lambda name: ("not known" if final[name] is None else f"{final[name]:.3g}") + (  # noqa: E731
        f" ± {error(name):.2g}" if error(name) is not None else "")
    return [f"- KL to the reference (`{config.reference.name}`): {number('kl/nats_per_episode')} nats per episode",
            f"- return: {number('return')} (reward `{config.reward.name}`)", "",
            f"Means over {final['episodes']} episodes of the evaluation, ± one standard error."]


def _remarks(facts):
    """What the exported files are not."""
    config, remarks = facts.member.config, []
    sampling = Sampling(**config.sampling)
    if facts.proposal:
        remarks.append("**This is a proposal, not the policy that was trained.** The member has a hard KL budget: in "
                       "training each token was drawn from the reference, tilted towards this proposal as far as "
                       "the budget allowed. Nothing holds the KL of what is exported here."
                       + " The head sees a budget of which nothing has been spent." * (facts.kind == "head"))
    remarks.append(f"The policy was trained and evaluated drawing at temperature {sampling.temperature:g}, which "
                   + {"model": "generation_config.json sets.", "adapter": "the code above sets.",
                      "head": "`generate` uses."}[facts.kind])
    if sampling.truncates:
        remarks.append(f"It drew from a part of the vocabulary (top_k={sampling.top_k}, top_p={sampling.top_p:g}, "
                       f"min_p={sampling.min_p:g}) that the reference's probabilities decide, not its own. The files "
                       "here cannot say that; drawn from the whole vocabulary it is another policy.")
    if facts.beside:
        remarks.append(f"`base` holds the base model in floats: {facts.beside}.")
    if facts.kind == "head":
        remarks.append(f"An episode has {config.env.length} tokens behind its opening, and the head sees which part of "
                       "it is over; head_policy.py says how it is told.")
    return "\n\n".join(remarks).split("\n")
