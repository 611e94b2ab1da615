"""The pickle inside a PyTorch file, interpreted without running anything: tensors, containers and constants only.

A pickle is a program for a stack machine. Unpickling runs it, and with it whatever it asks to be imported and called.
Here the few opcodes that `torch.save` writes for a dictionary of tensors are carried out on plain data, and everything
else is refused by name. No value is copied more often than the size of the pickle allows, and keys are text or small
numbers, so that a short file cannot keep the reader busy or fill the memory.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, Protocol

from .torch_tensor import STORAGES, Name, Storage, rebuilt_tensor

_MAX_KEY = (1 << 31) - 1
_MAX_BITS = 128  # of an integer; the magic number of old files has 77
_COPIES_PER_BYTE = 8  # values that may be copied per byte of the pickle; a real file stays below 1


class UnsafeFile(ValueError):
    """The pickle asks for something that is not data."""


def _checked_key(key: Any) -> str | int:
    """A key that is hashed in one step: text, or a number too small to be made to collide."""
    if type(key) is str or (type(key) is int and 0 <= key <= _MAX_KEY):
        return key
    raise ValueError(f"keys must be text or numbers from 0 to {_MAX_KEY}, not a {type(key).__name__}")


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    if not isinstance(pairs, list | tuple):
        raise ValueError("an OrderedDict must be made of pairs")
    return {_checked_key(key): value for key, value in pairs}


# The only calls a file may ask for, and what is done instead.
_REBUILD: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": rebuilt_tensor,
    "torch._utils._rebuild_tensor_v2": rebuilt_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "collections.OrderedDict": _ordered,
}
_CONSTANTS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip
_FIXED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip
_MARK = object()


def _name(module: str, name: str) -> Name:
    path = f"{module}.{name}"
    if path not in _REBUILD and path not in STORAGES:
        raise UnsafeFile(
            f"asks for {path[:120]}, which is not a tensor: only weights are read, no code is run. "
            "Save the model's state_dict() with torch.save, or as safetensors"
        )
    return Name(path)


class Readable(Protocol):
    """What a pickle is read from: `read` must not reserve more memory than there are bytes."""

    def read(self, size: int = -1, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


class Machine:
    """Interprets one pickle of tensors, containers and constants.

    Args:
        load: makes a storage of a persistent id, which is a tuple of the file's own making.
        size: bytes of the pickle, or of the file it lies in; bounds how many values are copied.
    """

    def __init__(self, load: Callable[[tuple[Any, ...]], Storage], size: int) -> None:
        self.load = load
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copies_left = _COPIES_PER_BYTE * size + 1000

    def run(self, data: Readable) -> Any:
        """The value of the pickle at `data`'s position, which ends up behind it."""
        for opcode, argument, _ in pickletools.genops(data):  # type: ignore[arg-type]
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise ValueError("the pickle has no end")

    def step(self, op: str, argument: Any) -> None:
        """Carry out one opcode."""
        stack = self.stack
        if op in _CONSTANTS:
            if isinstance(argument, int) and argument.bit_length() > _MAX_BITS:
                raise ValueError(f"an integer has {argument.bit_length()} bits, more than {_MAX_BITS}")
            stack.append(argument)
        elif op in _FIXED:
            stack.append(_FIXED[op]())
        elif op in ("BINPUT", "LONG_BINPUT", "MEMOIZE", "PUT"):
            self.memo[len(self.memo) if argument is None else int(argument)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[int(argument)])
        elif op == "MARK":
            stack.append(_MARK)
        elif op not in ("PROTO", "FRAME") and not self.call(op, argument):
            self.collect(op)

    def call(self, op: str, argument: Any) -> bool:
        """Opcodes by which a pickle would name and call things; False for any other."""
        stack = self.stack
        if op == "GLOBAL":
            stack.append(_name(*argument.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            if not isinstance(name, str) or not isinstance(module, str):
                raise ValueError("a name must be text")
            stack.append(_name(module, name))
        elif op == "BINPERSID":
            stack.append(self.load(self.copied(stack.pop(), tuple)))
        elif op == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            if not isinstance(function, Name) or function.path not in _REBUILD:
                raise UnsafeFile("calls something that does not rebuild a tensor")
            for argument in self.copied(arguments, tuple):
                if function.path == "torch.Size" or isinstance(argument, list):
                    self.copied(argument, list | tuple)
            stack.append(_REBUILD[function.path](*arguments))
        else:
            return False
        return True

    def copied(self, values: Any, kind: Any) -> Any:
        """Values that are about to be copied.

        Raises:
            ValueError: not of that kind, or more has been copied than the pickle's size allows.
        """
        if not isinstance(values, kind):
            raise ValueError(f"a {type(values).__name__} stands where the pickle needs several values")
        self.copies_left -= len(values)
        if self.copies_left < 0:
            raise ValueError("it copies more values than its size allows")
        return values

    def collect(self, op: str) -> None:
        """Opcodes that fill containers."""
        stack = self.stack
        if op == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(op[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif op in ("SETITEMS", "SETITEM"):
            items = self.since_mark() if op == "SETITEMS" else [stack.pop(-2), stack.pop()]
            filled = self.top(dict)
            for key, value in zip(items[::2], items[1::2], strict=True):
                filled[_checked_key(key)] = value
        elif op in ("APPENDS", "APPEND"):
            items = self.since_mark() if op == "APPENDS" else [stack.pop()]
            self.top(list).extend(items)
        elif op == "BUILD":  # the attribute _metadata of a state dict: versions of modules
            stack.pop()
            self.top(dict)
        else:
            raise UnsafeFile(f"uses the pickle opcode {op}, which no file of weights needs")

    def since_mark(self) -> list[Any]:
        """What was pushed since the last mark, taken off the stack."""
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def top(self, kind: type) -> Any:
        """The container that is filled, left on the stack."""
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"the pickle fills a {type(self.stack[-1]).__name__} as a {kind.__name__}")
        return self.stack[-1]
