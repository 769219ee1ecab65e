"""Episodes as HTML, each agent token coloured by what it cost. All text is model-written and is escaped."""
from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from kl_reg.analysis.report.stats import first_slot, number, show
from kl_reg.types import AGENT, FORCED, OPENING, PAD, STUDENT

ROLES = {OPENING: ("o", "opening"), FORCED: ("f", "speaker prefix"), AGENT: ("a", "agent (teacher)"),
         STUDENT: ("s", "student")}
LEGEND = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

CSS = """
.ep{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;
font:13px/1.65 ui-monospace,Menlo,Consolas,monospace}
.ep i,.legend i{font-style:normal;border-radius:2px}
.ep .o,.ep .f{color:var(--dim)}.ep .s{color:var(--student)}.ep i:hover{outline:1px solid currentColor}
.a{background:rgb(226 38 30/var(--k,0))}.nl{opacity:.45}
.legend .a{padding:.1em .5em;margin-right:.25em;border:1px solid var(--line)}.legend .ep{white-space:normal}
"""


def printable(text: str) -> str:
    """`text` with control, direction and zero-width characters as their code; newlines stay."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\u{{{ord(c):x}}}" for c in text)


def visible(text: str) -> str:
    """`printable(text)` escaped for HTML, newlines shown."""
    return html.escape(printable(text), quote=True).replace("\n", '<b class="nl">⏎</b>\n') or "◌"


def shade(nats: float, ceiling: float) -> float:
    """Opacity of the red behind a token: the square root of its share of `ceiling`, so that small costs show."""
    return float(np.clip(nats / ceiling, 0, 1) ** 0.5) if ceiling > 0 else 0.0


def episode(pieces: Sequence[str], roles: np.ndarray, turns: np.ndarray, kl: np.ndarray, start: int,
            ceiling: float) -> str:
    """One episode, every token with its cost, position and writer on hover.

    Args:
        pieces: text of each slot that is not padding, in order.
        roles, turns, kl: [s], the latter in nats per token.
        start: the slot of position 0.
        ceiling: nats per token shown in full red.
    """
    slots = np.flatnonzero(roles != PAD)
    spans = []
    for slot, piece in zip(slots, pieces, strict=True):
        mark, name = ROLES[int(roles[slot])]
        title, style = name, ""
        if slot >= start:
            title = f"position {slot - start} · turn {turns[slot]} · {name}"
        if roles[slot] == AGENT:
            title = f"{kl[slot]:.3f} nats · {title}"
            style = f' style="--k:{shade(float(kl[slot]), ceiling):.2f}"'
        spans.append(f'<i class={mark}{style} title="{title}">{visible(piece)}</i>')
    return f'<div class="ep">{"".join(spans)}</div>'


def episodes(evaluation: dict[str, np.ndarray], pieces_of, indices: Sequence[int], ceiling: float) -> str:
    """The episodes `indices` of an evaluation, each with its return and total KL.

    Args:
        evaluation: tokens, roles, turns, kl [e, s] and returns [e].
        pieces_of: token ids -> text pieces that concatenate to their text.
        indices: which episodes.
        ceiling: nats per token shown in full red.
    """
    start, parts = first_slot(evaluation["roles"]), []
    for e in indices:
        roles, kl = evaluation["roles"][e], evaluation["kl"][e]
        pieces = pieces_of(evaluation["tokens"][e][roles != PAD].tolist())
        parts.append(f'<article><h4>Episode {e} <span>return {show(float(evaluation["returns"][e]), 0.0)} · '
                     f'{kl[roles == AGENT].sum():.2f} nats</span></h4>'
                     f'{episode(pieces, roles, evaluation["turns"][e], kl, start, ceiling)}</article>')
    return f'<div class="episodes">{"".join(parts)}</div>'


def folded(shown: Sequence[tuple[str, dict, dict[str, np.ndarray]]], pieces_of, count: int, opened: int) -> str:
    """The first `count` episodes of each run, a fold a run, with the legend above.

    Args:
        shown: (name, its `final` of the summary, its evaluation) of each run.
        pieces_of: token ids -> text pieces that concatenate to their text.
        count: how many episodes.
        opened: the run, beside the first, whose fold is open.
    """
    indices = range(min(count, *(len(evaluation["returns"]) for _, _, evaluation in shown)))
    ceiling = highest([evaluation for _, _, evaluation in shown], indices)
    parts = [f"<details{' open' * (i in (0, opened))}><summary>{html.escape(name)} <small>"
             f"return {show(number(final['return']), 0.0)}, {final['kl/nats_per_episode']:.2f} nats per episode</small>"
             "</summary>"
             f"{episodes(evaluation, pieces_of, indices, ceiling)}</details>"
             for i, (name, final, evaluation) in enumerate(shown)]
    return legend(ceiling) + "".join(parts)


def highest(evaluations: Sequence[dict[str, np.ndarray]], indices: Sequence[int]) -> float:
    """The largest KL of one agent token in the episodes shown, nats."""
    return max(float(np.where(e["roles"][i] == AGENT, e["kl"][i], 0).max()) for e in evaluations for i in indices)


def legend(ceiling: float) -> str:
    """What the colours mean, in nats per token."""
    steps = [0.0, *(value for value in LEGEND if value < 0.8 * ceiling), ceiling]
    swatches = "".join(f'<i class=a style="--k:{shade(value, ceiling):.2f}">{value:.3g}</i>' for value in steps)
    return (f'<p class="legend">Agent token, nats: {swatches} <span class="ep"><i class=s>student</i> · '
            f'<i class=o>opening and speaker prefixes</i></span> · ⏎ newline · ◌ part of a character</p>')
