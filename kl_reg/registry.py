"""Names in a configuration -> objects, with the facts that others have to know of them.

A dotted path ("my_package.my_module.my_loss") works like a built-in name. What it names has the facts of a piece that
states none, unless its module registers it under that path, `register(f"{__name__}.my_loss", my_loss, per_token=True)`.
"""
from __future__ import annotations

import importlib


class Registry:
    """Named objects of one kind. `kind` is the configuration key that an error names; `facts` are what a piece of this
    kind can state at its registration, each with the value for those that do not."""

    def __init__(self, kind: str, **facts):
        self.kind = kind
        self._objects = {}
        self._facts, self._unstated = {}, facts

    def register(self, name: str, item, **facts):
        """Adds `item` and returns it.

        Raises:
            ValueError: the name is taken, or pieces of this kind have no such fact.
        """
        if name in self._objects:
            raise ValueError(f"{self.kind}={name!r} is registered twice")
        if unknown := sorted(set(facts) - set(self._unstated)):
            raise ValueError(f"{self.kind}={name!r} states {', '.join(unknown)}; a {self.kind} can state "
                             f"{', '.join(sorted(self._unstated)) or 'nothing'}")
        self._objects[name], self._facts[name] = item, facts
        return item

    def facts(self, name: str) -> dict:
        """What the piece of that name states, and the values for what it does not; raises as `[name]` does."""
        self[name]  # noqa: B018 - imports a dotted path's module, which may register it
        return self._unstated | self._facts.get(name, {})

    def names(self) -> list[str]:
        """All built-in names."""
        return sorted(self._objects)

    def __getitem__(self, name: str):
        """The object of that name, or at that dotted path.

        Raises:
            ValueError: neither exists; the choices are listed.
        """
        if name in self._objects:
            return self._objects[name]
        module, _, attribute = name.rpartition(".")
        if module and not name.startswith("."):
            try:
                found = getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError) as error:
                raise ValueError(f"{self.kind}={name!r} cannot be imported: {error}") from None
            return self._objects.get(name, found)
        raise ValueError(f"{self.kind}={name!r} is unknown; choose one of {', '.join(self.names())}, or a dotted path")
