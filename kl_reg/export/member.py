"""A member of a run as a folder that other libraries load, with its model card."""
from __future__ import annotations

import pathlib
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kl_reg import config as configs
from kl_reg import storage
from kl_reg.export import huggingface as files
from kl_reg.export import model_card
from kl_reg.kl import budget
from kl_reg.policies import lora
from kl_reg.policies.actor import Situation
from kl_reg.pretrained import folders, quantize, weights
from kl_reg.runs import directory as run_directory
from kl_reg.training import member_groups, scoring
from kl_reg.types import Sampling


class Exported(NamedTuple):
    """What was written: "model", "adapter" or "head", where, and Python that loads it and lets it write. `base` says
    why a copy of the base lies in `folder`/base, "" where there is none."""

    kind: str
    folder: pathlib.Path
    snippet: str
    base: str


def export(name: str, out: pathlib.Path, iteration: int | None = None, *, adapter: bool = False,
           with_base: bool = False, proposal: bool = False, dtype: str | None = None) -> Exported:
    """Writes `out`, which appears whole or not at all.

    Beside an adapter or a head lies a copy of the base, in floats, where other libraries could not load the base from
    where the run had it: a GGUF file, an int8 base, the embedded model, a Gemma 3 with images.

    Args:
        name: RUN[:MEMBER][@ITERATION]; the member may be left out where there is one, the iteration for the last.
        iteration: the same as in `name`.
        adapter: of a lora, a PEFT adapter in place of merged weights.
        with_base: of an adapter or a head, a copy of the base in any case.
        proposal: of a member with a hard budget, the untilted proposal, which no budget holds.
        dtype: of what is written (of a head: of the base), "float32" or "bfloat16"; None: the run's.

    Raises:
        FileExistsError: `out` is there.
        FileNotFoundError: the checkpoint or the base is not.
        ValueError: `name` names no member, or a choice makes no sense for it; it cannot be a folder: its proposal is
            tilted by a hard budget, its head changes another model than the base, its matrices have no adapter.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already; choose another --out, or remove it")
    address, config = _chosen(name, iteration)
    kind = _kind(f"{address.workdir}:{address.member}", config, adapter, with_base, proposal)
    dtype = config.model.dtype if dtype is None else dtype
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype={dtype}: choose float32 or bfloat16")
    member = run_directory.load(address.workdir, address.iteration)[address.member]
    base = folders.find(config.model.path)
    digest = run_directory.check_base(address.workdir, base)
    beside = "" if kind == "model" else "as asked for" if with_base else _beside(config, base)
    if kind == "adapter":
        files.adapted(base, member.params["adapter"])       # raises before anything is written
    fingerprint = storage.read_json(address.workdir / "config.json")["fingerprint"]
    facts = model_card.Facts(address, member, fingerprint, digest, kind, proposal, base, beside)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = pathlib.Path(scratch) / out.name
        folder.mkdir()
        if beside:
            files.model(folder / "base", base, _frozen(config), dtype, None)
        if kind == "head":
            _write_head(folder, member, base, dtype, beside, digest)
        elif kind == "adapter":
            place = files.Origin(str(out.resolve() / "base"), None) if beside else files.origin(config.model.path, base)
            files.adapter(folder, base, place, member.params["adapter"], config.policy.rank, config.policy.alpha, dtype)
        else:
            _write_model(folder, member, base, dtype)
        (folder / "README.md").write_text(model_card.text(facts), encoding="utf-8")
        folder.rename(out)
    return Exported(kind, out, model_card.snippet(facts, str(out)), beside)


def _chosen(name, iteration):
    """The address, with its member, and that member's settings."""
    address = run_directory.parse(name)
    if address is None:
        raise ValueError(f"{name!r} is no run as RUN[:MEMBER][@ITERATION]: there is no config.json of a run")
    if None not in (iteration, address.iteration) and iteration != address.iteration:
        raise ValueError(f"{name} with --step={iteration}: they name two checkpoints; give one of them")
    config = run_directory.config_of(address.workdir)
    rows = member_groups.hyper_of(config)
    number = 0 if address.member is None and len(rows) == 1 else address.member
    if number is None or number >= len(rows):
        known = "; ".join(f":{i} {', '.join(f'{key}={value}' for key, value in row.items() if value is not None)}"
                          for i, row in enumerate(rows))
        raise ValueError(f"{name}: name one of the run's members, as {address.workdir}:0; there are {known}")
    address = address._replace(member=number, iteration=address.iteration if iteration is None else iteration)
    return address, configs.override(config, configs.members(config)[number])


def _kind(name, config, adapter, with_base, proposal) -> str:
    """What becomes of this member; raises where it cannot be what was asked for."""
    constrained = configs.split(config)[0].constrained
    if config.policy.kind not in ("head", "lora", "full"):
        raise ValueError(f"{name}: policy.kind={config.policy.kind!r} has no export; head, lora and full have")
    if constrained and not proposal:
        raise ValueError(f"{name} has a hard budget: each token is drawn from its proposal tilted towards the "
                         "reference, as far as what its episode has spent demands, so no network alone is this policy; "
                         "--proposal exports the untilted proposal, which no budget holds")
    for option, given, sensible, what in (
            ("--proposal", proposal, constrained, "a hard budget"),
            ("--adapter", adapter, config.policy.kind == "lora", "policy.kind='lora'"),
            ("--with-base", with_base, config.policy.kind == "head" or adapter, "policy.kind='head', or --adapter")):
        if given and not sensible:
            raise ValueError(f"{name}: {option} is for a member with {what}")
    if config.policy.kind != "head":
        return "adapter" if adapter else "model"
    own = [path for path in config.reference.paths if not run_directory.parse(path)]
    if own:
        raise ValueError(f"{name} is a head on reference.name={config.reference.name!r}: its logits are a change of "
                         f"those of {', '.join(own)}; only a change of the base's can be exported")
    return "head"


def _beside(config, base):
    """Why the base has to lie beside an adapter or a head; "" where its folder does."""
    if config.model.quantize:
        return f"the run's base has model.quantize={config.model.quantize!r}, not the numbers of model.path"
    if config.model.path == "embedded":
        return "the embedded model is a part of the package"
    return files.unloadable(base)


def _write_model(folder, member, base, dtype):
    config, params = member.config, member.params
    if config.policy.kind == "lora":
        wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, dtype)), _frozen(config))
        merged = lora.merged(wide, params["adapter"], config.policy.alpha / config.policy.rank)
    else:
        merged = params["trunk"]
    files.model(folder, base, merged, dtype, Sampling(**config.sampling))


def _write_head(folder, member, base, dtype, beside, digest):
    """`digest` is of the base where it lies; `beside`: a copy of it is in the folder, and is read instead."""
    config = member.config
    if config.policy.actor == "linear":
        raise ValueError("policy.actor='linear' cannot be exported: head_policy.py changes hidden states, not logits")
    place = files.Origin("base", None) if beside else files.origin(config.model.path, base)
    digest = folders.digest(folder / "base") if beside else digest
    files.head(folder, base, member.params["actor"], {
        "base": {"path": place.path, "revision": place.revision, "digest": digest}, "dtype": dtype,
        "layers": config.policy.layers, "length": config.env.length, "temperature": config.sampling.temperature,
        "budget": _untouched(config)})


def _frozen(config):
    """The base's parameters as the run has read them; int8 matrices as the numbers that they stand for."""
    params = weights.load(config.model.path, config.model.dtype).params
    return files.as_floats(quantize.quantize(params)) if config.model.quantize else params


def _untouched(config):
    """What a head sees of its budget at the first token, before anything is spent; zeros without one."""
    caps = scoring.caps_of(configs.split(config)[1])
    ledger = budget.enter(budget.open_ledger(()), jnp.int32(0))
    left = budget.left(caps, ledger, config.kl.carry)
    return Situation(left, budget.part_left(caps, ledger, left), jnp.float32(0)).inputs()[:2].tolist()
