"""Attaching to a loaded model: its modules get subclasses of their classes, its weights and mlx-lm's code stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import mlx.nn as nn

T = TypeVar("T")


def attached(model: nn.Module, name: str, make: Callable[[], T]) -> T:
    """What is attached to `model` under `name`: made once, shared by all targets of the model."""
    found: T | None = vars(model).get(name)
    if found is None:
        found = make()
        object.__setattr__(model, name, found)
    return found


def subclass(module: nn.Module, **methods: Callable[..., Any]) -> None:
    """Give `module` a subclass of its class with these methods, called as method(class before, module, ...)."""
    original = type(module)

    def bound(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(this: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return method(original, this, *args, **kwargs)

        return call

    module.__class__ = type(original.__name__, (original,), {n: bound(m) for n, m in methods.items()})
