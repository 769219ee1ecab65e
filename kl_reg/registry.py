"""Names in a configuration -> objects. A dotted path ("my_package.my_module.my_loss") works like a built-in name."""
from __future__ import annotations

import importlib


class Registry:
    """Named objects of one kind; `kind` is the configuration key that an error names."""

    def __init__(self, kind: str):
        self.kind = kind
        self._objects = {}

    def register(self, name: str, item):
        """Adds `item`; a name is given once."""
        if name in self._objects:
            raise ValueError(f"{self.kind}={name!r} is registered twice")
        self._objects[name] = item
        return item

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
                return getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError) as error:
                raise ValueError(f"{self.kind}={name!r} cannot be imported: {error}") from None
        raise ValueError(f"{self.kind}={name!r} is unknown; choose one of {', '.join(self.names())}, or a dotted path")
