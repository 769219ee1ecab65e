"""Episodes in a terminal, each agent token on the red that the report gives it. All text is model-written: control
characters are shown, never sent."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.text import Text

from kl_reg.analysis.report.transcripts import LEGEND, printable, shade
from kl_reg.types import AGENT, FORCED, OPENING, PAD, STUDENT

_FREE, _DEAREST = np.array([48, 48, 48]), np.array([226, 38, 30])      # white is readable on both, and on all between
_STYLES = {OPENING: Style(dim=True), FORCED: Style(dim=True), STUDENT: Style(color="cyan")}
NOTE = Style(dim=True, italic=True)


def style(role: int, nats: float, ceiling: float) -> Style:
    """Of a token: the agent's on a grey that turns red with its nats, full red from `ceiling` on."""
    if role != AGENT:
        return _STYLES[role]
    red, green, blue = np.rint(_FREE + shade(nats, ceiling) * (_DEAREST - _FREE)).astype(int)
    return Style.parse(f"#ffffff on rgb({red},{green},{blue})")


def visible(piece: str, role: int) -> str:
    """What is shown of a token: characters that do not print as their code; of the agent's also line breaks (⏎) and
    where it gives only part of a character (◌)."""
    shown = printable(piece)
    return (shown.replace("\n", "⏎\n") or "◌") if role == AGENT else shown


def amount(nats: float) -> str:
    """Nats as every line has them."""
    return f"{nats:.2f} nats"


class Writer:
    """Puts tokens one after the other onto `text`, or, where there is a console, onto it as they come.

    The line break at the end of a token is held back until something follows: a note about the turn stands behind it.
    """

    def __init__(self, ceiling: float, console: Console | None = None):
        self.text, self._ceiling, self._console, self._break = Text(), ceiling, console, ""

    def token(self, piece: str, role: int, nats: float = 0.0) -> None:
        """The text that a token adds; `nats` of the agent's decide its colour."""
        shown = visible(piece, role)
        line = shown.removesuffix("\n")
        self._put(self._break, "")
        self._put(line, style(role, nats, self._ceiling))
        self._break = shown[len(line):]

    def note(self, text: str) -> None:
        """A remark at the end of the line."""
        self._put(f"  {text}", NOTE)
        self._break = "\n"

    def end(self) -> None:
        """Ends the last line, once."""
        self._put(self._break, "")
        self._break = ""

    def _put(self, text, style):
        if self._console is None:
            self.text.append(text, style)
        elif text:
            self._console.print(Text(text, style), end="", soft_wrap=True, highlight=False)


def episode(pieces: Sequence[str], roles: np.ndarray, turns: np.ndarray, nats: np.ndarray, ceiling: float) -> Text:
    """One episode, with the nats of each turn of the agent behind it; the last line break is left out.

    Args:
        pieces: text of each slot that is not padding, in order.
        roles, turns, nats: [s]; nats of each agent token.
        ceiling: nats per token shown in full red.
    """
    writer, slots = Writer(ceiling), np.flatnonzero(roles != PAD)
    ends = set({turns[slot]: slot for slot in slots if roles[slot] == AGENT}.values())
    for slot, piece in zip(slots, pieces, strict=True):
        writer.token(piece, int(roles[slot]), float(nats[slot]))
        if slot in ends:
            writer.note(amount(nats[(turns == turns[slot]) & (roles == AGENT)].sum(dtype=np.float64)))
    return writer.text


def legend(console: Console, ceiling: float, what: str, more: bool = False) -> Text:
    """What the colours mean, in nats per token; without colours, what is counted.

    Args:
        what: is shown.
        more: whether tokens may have more nats than the ceiling.
    """
    signs = " · ⏎ line break · ◌ part of a character"
    if console.color_system is None or console.no_color:
        return Text(f"Agent tokens, {what}, nats{signs}")
    steps = [0.0, *(value for value in LEGEND if value < 0.8 * ceiling), ceiling]
    swatches = [(f" {value:.3g}{'+' * (more and value == ceiling)} ", style(AGENT, value, ceiling)) for value in steps]
    return Text.assemble(f"Agent tokens, {what}, nats: ", *swatches, " · ", ("student", _STYLES[STUDENT]), " · ",
                         ("opening and speaker prefixes", _STYLES[OPENING]), signs)
