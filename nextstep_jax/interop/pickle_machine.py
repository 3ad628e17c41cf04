"""A stack machine for the pickles of torch checkpoints, and nothing in them but tensors.

A pickle is a program for a stack machine that may call any function it can name. The machine here
is our own: it knows the opcodes that tensors need and a few globals, which stand for functions of
ours, and refuses the rest by name. Limiting `pickle.Unpickler` to the same globals would not do:
twelve bytes make it allocate gigabytes (an index of its memo), and a nested tuple as a key
overflows the stack of the process.
"""

import dataclasses
import pickletools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

_MAX_DIMS = 32


class RefusedError(ValueError):
    """The file asks for something that we do not do; the message lacks its name."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Function:
    """Stands for a global that a pickle may call."""

    call: Callable[..., Any]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _StorageType:
    """Stands for torch.FloatStorage and the like."""

    dtype: np.dtype


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """A run of elements in the archive's entry `data/{key}`."""

    dtype: np.dtype
    key: str
    num_elements: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LazyTensor:
    """How a tensor lies in its storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _OrderedDict(dict):
    """Stands for collections.OrderedDict: the one thing that a BUILD may follow."""

    __slots__ = ()


def _is_count(value: object) -> bool:
    # What a file can count fits an int64; beyond, an int may not even print.
    return type(value) is int and 0 <= value < 2**63


def _are_counts(values: object) -> bool:
    return type(values) is tuple and all(map(_is_count, values))


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> LazyTensor:
    """torch._utils._rebuild_tensor, kept lazy."""
    if not (
        isinstance(storage, _Storage)
        and _is_count(offset)
        and _are_counts(shape)
        and _are_counts(strides)
        and len(shape) == len(strides) <= _MAX_DIMS
    ):
        raise RefusedError(
            f"refused a tensor: expected a storage, an offset, and as many sizes as strides (at "
            f"most {_MAX_DIMS}), none of them negative"
        )
    return LazyTensor(storage, offset, shape, strides)


def _rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks, metadata=None):
    """torch._utils._rebuild_tensor_v2; gradients and hooks are nothing to us."""
    if metadata:
        # Lazy conjugation or negation: the bytes are not the values.
        raise RefusedError("refused a tensor with a conjugate or negative bit")
    return _rebuild_tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor: Any, requires_grad: Any, hooks: Any) -> LazyTensor:
    """torch._utils._rebuild_parameter: a parameter is its tensor."""
    if not isinstance(tensor, LazyTensor):
        raise RefusedError("refused a parameter that is no tensor")
    return tensor


def _ordered_dict(*arguments: Any) -> _OrderedDict:
    """collections.OrderedDict, which is made empty and then filled."""
    if arguments:
        raise RefusedError("refused to make an OrderedDict out of something else")
    return _OrderedDict()


def kind_of(value: object) -> str:
    """The type for a message; the value itself may be too large or too deep to show."""
    return type(value).__name__.lstrip("_")


def _set_items(target: Any, items: Sequence[Any]) -> None:
    """target[k] = v over a flat list k, v, k, v ..."""
    if type(target) not in (dict, _OrderedDict):
        raise RefusedError("refused to set an item of something that is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Also what makes hashing safe: a tuple could be nested without end.
        if type(key) is not str:
            raise RefusedError(f"refused a key that is no string, but of type {kind_of(key)}")
        target[key] = value


_GLOBALS: Mapping[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _Function(_ordered_dict),
    ("torch._utils", "_rebuild_tensor"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor_v2),
    ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
    **{
        ("torch", f"{name}Storage"): _StorageType(np.dtype(dtype))
        for name, dtype in {
            "Double": np.float64,
            "Float": np.float32,
            "Half": np.float16,
            "BFloat16": ml_dtypes.bfloat16,
            "Long": np.int64,
            "Int": np.int32,
            "Short": np.int16,
            "Char": np.int8,
            "Byte": np.uint8,
            "Bool": np.bool_,
        }.items()
    },
}


def _find_global(module: object, name: object) -> object:
    """What we have for a global."""
    if type(module) is not str or type(name) is not str:
        raise RefusedError("refused a global whose name is no string")
    if (module, name) not in _GLOBALS:
        shown = f"{module}.{name}"[:200]
        raise RefusedError(f"refused the global {shown!r}: only tensors are read")
    return _GLOBALS[module, name]


class PickleMachine:
    """The stack machine of pickles, as far as tensors need it."""

    def __init__(self):
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """What the pickle describes."""
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                break
            self._step(opcode.name, argument)
        return self._stack.pop()

    def _since_mark(self) -> list[Any]:
        """Takes what was pushed after the last mark."""
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _last(self, count: int) -> tuple[Any, ...]:
        """Takes the last items, of which there is at least one."""
        if len(self._stack) < count:
            raise IndexError("pop from a stack that is too short")
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        return items

    def _step(self, opcode: str, argument: Any) -> None:
        """Does what one opcode says; those that are not here are refused."""
        stack, memo = self._stack, self._memo
        match opcode:
            case "PROTO" | "FRAME":
                pass
            # Values.
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[opcode])
            # Stack and memo.
            case "MARK":
                self._marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            # Containers.
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(self._last(int(opcode[-1])))
            case "APPEND" | "APPENDS":
                items = self._since_mark() if opcode == "APPENDS" else self._last(1)
                if type(stack[-1]) is not list:
                    raise RefusedError("refused to append to something that is no list")
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._since_mark() if opcode == "SETITEMS" else self._last(2)
                _set_items(stack[-1], items)
            # What could do harm.
            case "GLOBAL" | "STACK_GLOBAL" | "INST":
                names = self._last(2) if opcode == "STACK_GLOBAL" else argument.split(" ", 1)
                found = _find_global(*names)
                if opcode == "INST":
                    raise RefusedError("refused the opcode INST: no tensor needs it")
                stack.append(found)
            case "REDUCE":
                function, arguments = self._last(2)
                if not isinstance(function, _Function) or type(arguments) is not tuple:
                    raise RefusedError(f"refused to call something of type {kind_of(function)}")
                stack.append(function.call(*arguments))
            case "BUILD":
                target, state = self._last(2)
                # torch hangs the versions of the modules on a state dict, as an attribute.
                versions_only = type(state) is dict and not set(state) - {"_metadata"}
                if type(target) is not _OrderedDict or not versions_only:
                    raise RefusedError(
                        f"refused to change the attributes of something of type {kind_of(target)}"
                    )
                stack.append(target)
            case "BINPERSID":
                stack.append(_find_storage(stack.pop()))
            case _:
                raise RefusedError(f"refused the opcode {opcode}: no tensor needs it")


def _find_storage(identity: object) -> _Storage:
    """The storage that a persistent id names: ("storage", type, key, device, elements)."""
    match identity:
        case ("storage", _StorageType() as kind, str() as key, str(), int() as num_elements):
            if _is_count(num_elements):
                return _Storage(kind.dtype, key, num_elements)
    raise RefusedError("refused a persistent id that names no storage")
