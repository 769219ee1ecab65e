"""Where a function is from, and what it does, as text that is the same in every process."""
from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import numpy as np


@runtime_checkable
class Digested(Protocol):
    """An object that knows best what it depends on, as a model's weights."""

    def digest(self) -> str:
        """Differs where its results may differ."""


@runtime_checkable
class Wrapper(Protocol):
    """What functools.wraps or functools.update_wrapper has marked."""

    __wrapped__: Callable


def name_of(function: Callable) -> str:
    """Where a function is from, a dotted path; of a callable object, its type."""
    function = inspect.unwrap(function)         # of jax.jit, functools.cache, ...
    return name_of(function.func) if isinstance(function, functools.partial) else _place(function)


def digest_of(function: object) -> str:
    """SHA-256 of a function's code with the constants that it was made with, so that an edited one, or another lambda,
    is another; of a decorated one the wrapper's, too; of a tuple, such as an estimator, what its parts say; and of an
    object what its `digest()` says, else the code of its type's __call__. Lists and dictionaries in a closure do not
    count, they may be a cache; nor do globals and an object's attributes."""
    return hashlib.sha256(_identity(function).encode()).hexdigest()


def is_library(function: Callable) -> bool:
    """Whether a function was written in this package; a wrapper made elsewhere was not, whatever it calls itself."""
    function = _bare(function)
    return isinstance(function, types.FunctionType) and function.__globals__.get("__name__", "").startswith("kl_reg.")


def _place(item):
    kind = item if isinstance(item, (types.FunctionType, types.MethodType, type)) else type(item)
    return f"{kind.__module__}.{kind.__qualname__}"


def _identity(item, above=()):
    """What has no text that is the same in every process is told by its type."""
    if item is None or isinstance(item, (bool, int, float, complex, str, bytes)):
        return repr(item)
    if isinstance(item, (np.ndarray, np.generic, jax.Array)):
        array = np.asarray(jax.device_get(item))
        return f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
    item = _bare(item)
    if any(item is other for other in above):       # a function that calls itself
        return "itself"
    each = lambda *items: [_identity(x, (*above, item)) for x in items]  # noqa: E731
    if isinstance(item, tuple):
        return f"({', '.join(each(*item))})"
    if isinstance(item, frozenset):
        return f"{{{', '.join(sorted(each(*item)))}}}"
    if isinstance(item, types.CodeType):
        return f"{item.co_code.hex()} {item.co_names!r} {each(*item.co_consts)}"
    if isinstance(item, types.FunctionType):
        cells = [cell.cell_contents for cell in item.__closure__ or ()]
        defaults = item.__defaults__, tuple((item.__kwdefaults__ or {}).items())
        inner = [own for own in _wrapped(item) if not any(own is cell for cell in cells)]
        return f"{_place(item)} {each(item.__code__, *defaults, *cells, *inner)}"
    if isinstance(item, types.MethodType):
        return f"{each(item.__func__, item.__self__)}"
    if isinstance(item, functools.partial):
        return f"{each(item.func, item.args, tuple(item.keywords.items()))}"
    if isinstance(item, Digested) and not isinstance(item, type):
        return item.digest()
    if not callable(item) or isinstance(item, type):
        return f"{_place(item)} "
    if _wrapped(item) and not isinstance(type(item).__call__, types.FunctionType):
        return each(*_wrapped(item))[0]             # jax.jit, functools.cache, ...: they have no code that was edited
    return f"{_place(item)} {each(type(item).__call__, *_wrapped(item))}"


def _bare(item):
    """Without the checks that jaxtyping has put around it, where they are switched on: they change no result."""
    while (isinstance(item, types.FunctionType) and isinstance(item, Wrapper)
           and item.__globals__.get("__name__", "").startswith("jaxtyping.")):
        item = item.__wrapped__
    return item


def _wrapped(item):
    """What an item wraps, one or none, as functools.wraps and functools.update_wrapper note it."""
    return [item.__wrapped__] if isinstance(item, Wrapper) else []
