"""Names in a configuration -> objects, with the facts that others have to know of them.

A dotted path ("my_package.my_module.my_loss") works like a built-in name. What it names has the facts of a piece that
states none, unless its module registers it under that path, `register(f"{__name__}.my_loss", my_loss, per_token=True)`.
"""
from __future__ import annotations

import difflib
import importlib


class Registry:
    """Named objects of one kind. `kind` is the configuration key that an error names; `of` the type that an object at a
    dotted path must have (None: it must be a function); `facts` are what a piece of this kind can state at its
    registration, each with the value for those that do not."""

    def __init__(self, kind: str, of: type | None = None, **facts):
        self.kind = kind
        self._of = of
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
        return self.stated(name)

    def stated(self, name: str) -> dict:
        """What `facts` says, of what is registered already: nothing is imported, and any name is accepted."""
        return self._unstated | self._facts.get(name, {})

    def names(self) -> list[str]:
        """All built-in names."""
        return sorted(self._objects)

    def __getitem__(self, name: str):
        """The object of that name, or at that dotted path.

        Raises:
            ValueError: neither exists, and the choices are listed; or what the path names is no function, or not of the
                registry's type.
        """
        if name in self._objects:
            return self._objects[name]
        module, _, attribute = name.rpartition(".")
        if module and not name.startswith("."):
            found = self._imported(name, module, attribute)         # its module may register it under this path
            return self._checked(name, self._objects.get(name, found))
        near = difflib.get_close_matches(name, self.names(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{self.kind}={name!r} is unknown; choose one of {', '.join(self.names())}, or a dotted path"
                         f"{hint}")

    def _imported(self, name, module, attribute):
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{self.kind}={name!r} cannot be imported: {error}") from None
        except Exception as error:      # whatever the module's author did
            raise ValueError(f"{self.kind}={name!r} cannot be imported: {type(error).__name__}: {error}") from error

    def _checked(self, name, item):
        if self._of is None and not callable(item):
            raise ValueError(f"{self.kind}={name!r} is {item!r}, no function; choose one of {', '.join(self.names())}, "
                             "or the dotted path of a function")
        if self._of is not None and not isinstance(item, self._of):
            raise ValueError(f"{self.kind}={name!r} is {item!r}, no {self._of.__module__}.{self._of.__name__}; choose "
                             f"one of {', '.join(self.names())}, or the dotted path of one")
        return item
