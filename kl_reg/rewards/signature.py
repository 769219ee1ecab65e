"""By which arguments a reward function is called."""
from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence

from kl_reg.runs.fingerprint import Wrapper

_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def wanted(called: str, function: Callable, given: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Those names that a function takes: all of them, with **kwargs; but not what a partial has bound.

    A decorated function is called with what its wrapper takes, not with what the function inside does; a wrapper that
    names no parameter, as `wrapper(*args, **kwargs)`, hands them on, so it takes what the function inside takes.

    Args:
        called: what the function is called in a message.
        given: names of all that it may be given; `columns` are the prompts' own among them.

    Raises:
        ValueError: the function has no signature, or requires what is not given.
    """
    speaker = speaking(function)
    try:
        parameters = inspect.signature(speaker, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{called} has no signature: {error}") from None
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in _ANY]
    missing = [parameter for parameter in required if parameter not in given or parameter not in named]
    if missing:
        whose = f", whose wrapper is {_defined(speaker)}," if isinstance(speaker, Wrapper) else ""
        always = ", ".join(name for name in given if name not in columns)
        raise ValueError(f"{called}{whose} requires {', '.join(map(repr, missing))}; given by name are {always} and "
                         f"the columns of the prompts (here: {', '.join(columns) or 'none'})")
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    bound = function.keywords if isinstance(function, functools.partial) else {}
    return [name for name in given if (anything or name in named) and name not in bound]


def speaking(function: Callable) -> Callable:
    """The function whose parameters count: the outermost that names any."""
    if _names_parameters(function):
        return function
    if isinstance(function, functools.partial):
        return functools.partial(speaking(function.func), *function.args, **function.keywords)
    if isinstance(function, types.MethodType):
        inner = function.__func__
        return speaking(types.MethodType(inner.__wrapped__, function.__self__)) if isinstance(inner, Wrapper) else (
            function)
    if isinstance(function, Wrapper):
        return speaking(function.__wrapped__)
    call = type(function).__call__
    return speaking(types.MethodType(call, function)) if isinstance(call, types.FunctionType) else function


def _names_parameters(function):
    try:
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):     # what is written in C, as functools.cache, says nothing of its parameters
        return False
    return any(parameter.kind not in _ANY for parameter in parameters)


def _defined(function):
    """Where a function's code is, under the name that it was defined by; functools.wraps changes the other ones."""
    code = inspect.unwrap(function, stop=lambda own: isinstance(own, types.FunctionType | types.MethodType)).__code__
    return f"{code.co_qualname} ({code.co_filename}, line {code.co_firstlineno})"
