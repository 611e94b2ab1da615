"""Other functions in place of those that the modules of one model call by name; the rest of the process is unchanged.

mlx-lm's models call functions like `swiglu` as globals of their files. The methods that do are copied for the modules
of one model, and in the copies a name refers to something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import mlx.nn as nn

Function = Callable[..., Any]
Replacements = Mapping[str, Callable[[Function], "Function | None"]]
"""Name of a global function -> what takes the place of the function that has the name there; None: nothing does."""


def rebind(model: nn.Module, replacements: Replacements) -> None:
    """Replace functions in the modules of `model`, by giving each a subclass of its class."""
    subclasses: dict[type, type] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in subclasses:
            subclasses[kind] = _subclass(kind, replacements)
        if subclasses[kind] is not kind:
            module.__class__ = subclasses[kind]


def _subclass(kind: type, replacements: Replacements) -> type:
    """A subclass of `kind` whose methods call the replacements; `kind` itself if none calls what is replaced."""
    rebound: dict[str, FunctionType] = {}
    for base_class in reversed(kind.__mro__):
        for name, method in vars(base_class).items():
            if isinstance(method, FunctionType):
                found = _found(method, replacements)
                if found:
                    rebound[name] = _with_globals(method, found)
                else:
                    rebound.pop(name, None)  # overridden by a method that calls none of them
    return type(kind.__name__, (kind,), rebound) if rebound else kind


def _found(method: FunctionType, replacements: Replacements) -> dict[str, Function]:
    names = [name for name in replacements if name in method.__code__.co_names and name in method.__globals__]
    made = {name: replacements[name](method.__globals__[name]) for name in names}
    return {name: function for name, function in made.items() if function is not None}


def _with_globals(method: FunctionType, changed: dict[str, Any]) -> FunctionType:
    copy = FunctionType(
        method.__code__,
        {**method.__globals__, **changed},
        method.__name__,
        method.__defaults__,
        method.__closure__,
    )
    copy.__kwdefaults__ = method.__kwdefaults__
    return copy
