"""The settings of a sweep, members that differ in their seed alone: what each is called, aims at and is measured to."""
from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from kl_reg import config as configs
from kl_reg.config import BUDGETS, HYPER
from kl_reg.kl import estimators
from kl_reg.kl.controllers import CONTROLLERS

SOFT = "the budget is not hard: kl.ledger='log_ratio' charges sampled log-ratios, so the KL of an episode may exceed it"
KINDS = ("coef", "controlled", "budget")
_TERM = ("kl.direction", "kl.estimator", "kl.placement", "kl.reduction")
_START = "from coef"
_CAPS = {key: key.removeprefix("kl.").replace("_", " ") for key in BUDGETS}
_NAMES = {field: key for key, field in HYPER.items()}


class Setting(NamedTuple):
    """One setting and its members by seed.

    `kind`: "budget" with a hard one, "controlled" where the coefficient moves, else "coef". `value`: the budget (nats),
    a controller's target (nats) or the coefficient (reward per nat); `variant` is the rest of the label.
    """

    kind: str
    value: float
    variant: str
    label: str
    penalty: str            # the KL term as "k1 in reward", where one acts
    target: float | None    # reverse KL that it aims at, nats per episode
    reference: str          # what KL is measured to, with the fingerprint where it is known
    counted: str            # temperature and truncation that KL counts at, where they are not the defaults
    warning: str            # what its KL term descends, where it is no divergence that was asked for
    members: list[dict]

    @property
    def measured(self) -> str:
        """What its KL is: settings that differ in this have KLs that cannot be compared."""
        return self.reference + f", {self.counted}" * bool(self.counted)


def varying(members: Sequence[dict]) -> list[str]:
    """The hyper-parameters, seed included, that have more than one value among the members."""
    return [key for key in members[0]["hyper"] if len({repr(m["hyper"][key]) for m in members}) > 1]


def settings(members: Sequence[dict], config: ConfigDict, base: str,
             references: Mapping[int, Sequence[str]]) -> list[Setting]:
    """Members grouped by everything but the seed, by kind, then by value.

    Args:
        members: rows of the summary.
        config: the sweep's; a member's `hyper` overrides it.
        base: digest of the base model, "" where it was not recorded.
        references: digests of each member's own reference, by member.
    """
    owns = [configs.override(config, member["hyper"]) for member in members]
    acting = [_acting(own, member["hyper"]) for own, member in zip(owns, members, strict=True)]
    names = [_reference(own.reference, base, references[member["member"]])
             for own, member in zip(owns, members, strict=True)]
    several = {key for row in acting for key in row
               if len({repr(other[key]) for other in acting if key in other}) > 1}
    groups: dict[str, Setting] = {}
    for member, own, row, name in zip(members, owns, acting, names, strict=True):
        words = {key: value for key, value in row.items() if key in several}
        one = _setting(own, words, name, len(set(names)) > 1)
        groups.setdefault(_identity(member), one).members.append(member)
    rows = [s._replace(members=sorted(s.members, key=lambda m: m["hyper"]["seed"])) for s in groups.values()]
    return sorted(_distinct(rows), key=lambda s: (KINDS.index(s.kind), s.variant, s.value))


def kl_name(rows: Sequence[Setting]) -> str:
    """For an axis: "KL to the base 3f2a9c"."""
    names = {s.reference for s in rows}
    return "KL to " + (names.pop() if len(names) == 1 else "each setting's own reference")


def warnings(rows: Sequence[Setting]) -> list[str]:
    """What every picture of these settings has to say: who descends something else than its KL's name says."""
    texts = dict.fromkeys(s.warning for s in rows if s.warning)
    whose = {text: [s.label for s in rows if s.warning == text] for text in texts}
    return [f"{'all settings' if len(labels) == len(rows) else '; '.join(labels)}: {text}"
            for text, labels in whose.items()]


def _identity(member):
    return repr(sorted((key, repr(value)) for key, value in member["hyper"].items() if key != "seed"))


def _distinct(rows):
    """Settings whose labels are equal, because what differs does not act, also name what differs."""
    out = []
    for s in rows:
        alike = [other for other in rows if other.label == s.label]
        words = [f"{key}={s.members[0]['hyper'][key]!r}" for key in varying([o.members[0] for o in alike])
                 if key != "seed"]
        out.append(s._replace(variant=", ".join([s.variant, *words]).lstrip(", "), label=", ".join([s.label, *words])))
    return out


def _reads(kl):
    """The settings that the controller of the coefficient reads."""
    fields = CONTROLLERS.stated(kl.controller)["reads"] or _NAMES
    return tuple(_NAMES[field] for field in fields if _NAMES[field].startswith("kl.") and _NAMES[field] not in BUDGETS)


def _known(kl):
    """Whether the controller says what it reads."""
    return CONTROLLERS.stated(kl.controller)["reads"] is not None


def _penalised(kl):
    return kl.coef > 0 or not _known(kl) or ("kl.final" in _reads(kl) and kl.final > 0)


def _acting(own, hyper):
    """Those of a member's settings that have an effect on it and that a label may name."""
    kl, flat = own.kl, configs.flat(own)
    budgets = [key for key in BUDGETS if flat[key] is not None]
    keys = [*_TERM, "kl.controller", *_reads(kl)] if _penalised(kl) else [] if budgets else ["kl.coef"]
    keys += [*budgets, "kl.spend", "kl.operation", "kl.ledger", "kl.target_floor", "kl.miss_coef",
             "kl.budget_ramp"] if budgets else []
    keys += ["kl.carry"] if {"kl.turn_budget", "kl.token_budget"} & set(budgets) else []
    keys += [key for key in hyper if key.split(".")[0] not in ("kl", "reference", "seed")]
    acting = {key: flat[key] for key in keys}
    if "kl.target" in acting:                     # there a coefficient is only where the controller starts
        acting[_START] = acting.pop("kl.coef")
    return acting


def _setting(own, words, reference, named):
    kl, penalised = own.kl, _penalised(own.kl)
    caps = {key: value for key in BUDGETS if (value := configs.flat(own)[key]) is not None}
    follows = penalised and _known(kl) and "kl.target" in _reads(kl)
    # Whatever was trained is shown, and what is not sound with a warning.
    contract = estimators.build(dataclasses.replace(configs.kl_config(own), allow_biased=True))
    aims = [kl.target] if follows and kl.direction == "reverse" else []
    aims += [kl.budget] if kl.budget is not None else []
    kind = "budget" if caps else "controlled" if penalised and kl.controller != "fixed" else "coef"
    value = next(iter(caps.values())) if caps else kl.target if follows else kl.coef
    label, variant = (", ".join(filter(None, column)) for column in zip(
        *_words(kl, words, caps, penalised, follows), (f"to {reference}" * named,) * 2, strict=True))
    return Setting(kind, float(value), variant, label, _penalty(contract.config) if penalised else "",
                   float(min(aims)) if aims else None, reference, _counted(own.sampling),
                   "; ".join(filter(None, (contract.label() if penalised and contract.effect.refused else "",
                                           SOFT if caps and kl.ledger != "exact" else ""))), [])


def _words(kl, words, caps, penalised, follows):
    """The parts of a label: each in full, and as the variant has it, without the setting's value."""
    price, name, used = _price(kl, follows) if penalised or not caps else ("", "", ())
    parts = [(f"{_CAPS[key]} {cap:g}", _CAPS[key] if i == 0 else f"{_CAPS[key]} {cap:g}")
             for i, (key, cap) in enumerate(caps.items())]
    parts += [(_term(words),) * 2, (price, price if caps else name)]
    return parts + [(_word(key, value),) * 2 for key, value in words.items()
                    if key not in (*_TERM, *BUDGETS, "kl.controller", *used)]


def _term(words):
    """"k1 in reward": of direction, estimator, placement and reduction, those that vary."""
    placement = words.get("kl.placement", "")
    parts = [words.get("kl.direction"), words.get("kl.estimator"),
             f"in {placement}" if placement in ("reward", "loss") else placement,
             {"sequence": "of the sequence", "token": "of each token", None: ""}[words.get("kl.reduction")]]
    return " ".join(filter(None, parts))


def _penalty(c):
    parts = ["forward" * (c.direction == "forward"), c.estimator, f"in {c.placement}",
             "of the sequence" * (c.reduction == "sequence")]
    return " ".join(filter(None, parts))


def _price(kl, follows):
    """What the KL costs: its words, those without the number, and the settings that they name."""
    name = kl.controller.split(".")[-1]
    if kl.controller == "fixed":
        return f"coef {kl.coef:g}", "", ("kl.coef",)
    if follows:
        nats = "forward nats" if kl.direction == "forward" else "nats"
        return f"{name} to {kl.target:g} {nats}", name, ("kl.target",)
    if _known(kl):
        return f"{name} from coef {kl.coef:g} to {kl.final:g}", f"{name} to {kl.final:g}", ("kl.coef", "kl.final")
    return name, name, ()


def _word(key, value):
    name = key.split(".")[-1]
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def _reference(settings, base, digests):
    """What KL is measured to; every setting of a reference that moves its numbers is part of the name."""
    count, own, start = len(settings.paths), _short(digests), _short([base] if base else [])
    cut = ", cumulative" * (settings.cut == "cumulative")
    if settings.name in ("base", "checkpoint"):
        return f"the {settings.name} {own or start}".rstrip()
    name, digest = {
        "mixture": (f"the mixture of {count}", own),
        "pessimistic": (f"the pessimistic minimum of {count}, alpha {settings.alpha:g}{cut}", own),
        "ema": (f"the policy's average, decay {settings.decay:g}", "from " * bool(start) + start),
        "sync": (f"the policy, synced every {settings.every}", "from " * bool(start) + start)}.get(
            settings.name, (settings.name, own or start))
    return name + f" ({digest})" * bool(digest)


def _short(digests):
    """Six digits of the one digest, or of the SHA-256 of several."""
    if len(digests) > 1:
        digests = [hashlib.sha256("".join(digests).encode()).hexdigest()]
    return digests[0][:6] if digests else ""


def _counted(sampling):
    parts = [f"temperature {sampling.temperature:g}" if sampling.temperature != 1 else "",
             f"top_k {sampling.top_k}" if sampling.top_k > 0 else "",
             f"top_p {sampling.top_p:g}" if sampling.top_p < 1 else "",
             f"min_p {sampling.min_p:g}" if sampling.min_p > 0 else ""]
    return ", ".join(filter(None, parts))
