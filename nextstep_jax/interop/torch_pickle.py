"""Reads torch's zip checkpoints with numpy alone, and nothing in them but tensors.

Since version 1.6 `torch.save` writes a zip archive: `NAME/data.pkl` is a pickle that says how each
tensor lies in a storage (offset, shape, strides, in elements), `NAME/data/N` are the bytes of
storage N, `NAME/byteorder` says how to read them. The image tokenizer of NextStep-1 (arXiv
2508.10711) is published so, as `vae/checkpoint.pt`.

A pickle is a program for a stack machine that may call any function it can name. The machine here
is our own: it knows the opcodes that tensors need and a few globals, which stand for functions of
ours, and refuses the rest by name. Limiting `pickle.Unpickler` to the same globals would not do:
twelve bytes make it allocate gigabytes (an index of its memo), and a nested tuple as a key
overflows the stack of the process.
"""

import contextlib
import dataclasses
import math
import pathlib
import pickletools
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped, UInt8

from nextstep_jax.interop.tensor_files import TensorInfo, unknown_tensor

_MAX_PICKLE = 64 * 2**20
_MAX_DIMS = 32
_ZIP_START = b"PK\3\4"
_ENCRYPTED = 1  # A bit in the flags of a zip entry.
# Bytes read at once: what reading needs on top of the tensor itself.
_CHUNK = 4 * 2**20
_WRAPPERS = ("state_dict", "model")


class _RefusedError(ValueError):
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
class _Tensor:
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


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> _Tensor:
    """torch._utils._rebuild_tensor, kept lazy."""
    if not (
        isinstance(storage, _Storage)
        and _is_count(offset)
        and _are_counts(shape)
        and _are_counts(strides)
        and len(shape) == len(strides) <= _MAX_DIMS
    ):
        raise _RefusedError(
            f"refused a tensor: expected a storage, an offset, and as many sizes as strides (at "
            f"most {_MAX_DIMS}), none of them negative"
        )
    return _Tensor(storage, offset, shape, strides)


def _rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks, metadata=None):
    """torch._utils._rebuild_tensor_v2; gradients and hooks are nothing to us."""
    if metadata:
        # Lazy conjugation or negation: the bytes are not the values.
        raise _RefusedError("refused a tensor with a conjugate or negative bit")
    return _rebuild_tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor: Any, requires_grad: Any, hooks: Any) -> _Tensor:
    """torch._utils._rebuild_parameter: a parameter is its tensor."""
    if not isinstance(tensor, _Tensor):
        raise _RefusedError("refused a parameter that is no tensor")
    return tensor


def _ordered_dict(*arguments: Any) -> _OrderedDict:
    """collections.OrderedDict, which is made empty and then filled."""
    if arguments:
        raise _RefusedError("refused to make an OrderedDict out of something else")
    return _OrderedDict()


def _kind(value: object) -> str:
    """The type for a message; the value itself may be too large or too deep to show."""
    return type(value).__name__.lstrip("_")


def _set_items(target: Any, items: Sequence[Any]) -> None:
    """target[k] = v over a flat list k, v, k, v ..."""
    if type(target) not in (dict, _OrderedDict):
        raise _RefusedError("refused to set an item of something that is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Also what makes hashing safe: a tuple could be nested without end.
        if type(key) is not str:
            raise _RefusedError(f"refused a key that is no string, but of type {_kind(key)}")
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
        raise _RefusedError("refused a global whose name is no string")
    if (module, name) not in _GLOBALS:
        shown = f"{module}.{name}"[:200]
        raise _RefusedError(f"refused the global {shown!r}: only tensors are read")
    return _GLOBALS[module, name]


class _Machine:
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
                    raise _RefusedError("refused to append to something that is no list")
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._since_mark() if opcode == "SETITEMS" else self._last(2)
                _set_items(stack[-1], items)
            # What could do harm.
            case "GLOBAL" | "STACK_GLOBAL" | "INST":
                names = self._last(2) if opcode == "STACK_GLOBAL" else argument.split(" ", 1)
                found = _find_global(*names)
                if opcode == "INST":
                    raise _RefusedError("refused the opcode INST: no tensor needs it")
                stack.append(found)
            case "REDUCE":
                function, arguments = self._last(2)
                if not isinstance(function, _Function) or type(arguments) is not tuple:
                    raise _RefusedError(f"refused to call something of type {_kind(function)}")
                stack.append(function.call(*arguments))
            case "BUILD":
                target, state = self._last(2)
                # torch hangs the versions of the modules on a state dict, as an attribute.
                versions_only = type(state) is dict and not set(state) - {"_metadata"}
                if type(target) is not _OrderedDict or not versions_only:
                    raise _RefusedError(
                        f"refused to change the attributes of something of type {_kind(target)}"
                    )
                stack.append(target)
            case "BINPERSID":
                stack.append(_find_storage(stack.pop()))
            case _:
                raise _RefusedError(f"refused the opcode {opcode}: no tensor needs it")


def _find_storage(identity: object) -> _Storage:
    """The storage that a persistent id names: ("storage", type, key, device, elements)."""
    match identity:
        case ("storage", _StorageType() as kind, str() as key, str(), int() as num_elements):
            if _is_count(num_elements):
                return _Storage(kind.dtype, key, num_elements)
    raise _RefusedError("refused a persistent id that names no storage")


class TorchPickle:
    """The tensors of a torch zip checkpoint; implements `TensorFiles`.

    The file holds the tensors by name, or a dictionary with them under "state_dict" or "model".
    Plain values beside them (an epoch, a version) are ignored.

    Attributes:
        infos: Shape and dtype of every tensor.
    """

    infos: Mapping[str, TensorInfo]

    def __init__(self, path: pathlib.Path):
        """Reads and checks everything but the values.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is cut off, damaged, of the kind before torch 1.6, or holds
                something else than tensors by name.
        """
        self._path = pathlib.Path(path)
        with self._open() as archive:
            self._folder = _folder(archive)
            self._swap = _byte_order(archive, self._folder) != sys.byteorder
            self._tensors = _state_dict(_unpickle(archive, f"{self._folder}/data.pkl"))
            faults = []
            for name, tensor in self._tensors.items():
                try:
                    _check_place(archive, self._folder, tensor)
                except _RefusedError as error:
                    faults.append(f"{name}: {error}")
            if faults:
                raise _RefusedError("tensors that do not fit:\n  " + "\n  ".join(faults))
        self.infos = {
            name: TensorInfo(tensor.shape, tensor.storage.dtype)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """The tensor as a fresh C-contiguous array; see `TensorFiles`."""
        self.where(name)
        tensor = self._tensors[name]
        dtype = tensor.storage.dtype
        with self._open() as archive:
            # Again: the file may have changed since it was opened.
            entry = _check_place(archive, self._folder, tensor)
            if 0 in tensor.shape:
                return np.empty(tensor.shape, dtype)
            values = _read_bytes(archive, entry)
            if self._swap:
                values.view(f"u{dtype.itemsize}").byteswap(inplace=True)
            view = np.ndarray(
                tensor.shape,
                dtype,
                buffer=values,
                offset=tensor.offset * dtype.itemsize,
                strides=tuple(stride * dtype.itemsize for stride in tensor.strides),
            )
            # A copy would double the memory; a part must not keep its whole storage alive.
            whole = view.flags.c_contiguous and view.nbytes == values.nbytes
            return view if whole else view.copy(order="C")

    def where(self, name: str) -> pathlib.Path:
        """The file that holds the tensor: there is only one."""
        if name not in self._tensors:
            raise unknown_tensor(self._path, name, self.infos)
        return self._path

    @contextlib.contextmanager
    def _open(self) -> Iterator[zipfile.ZipFile]:
        """The archive; whatever a damaged one can raise is a ValueError that names the file."""
        with self._path.open("rb") as file:
            start = file.read(4)
            # A pickle begins with its protocol; before 1.6 torch wrote bare pickles.
            if re.match(rb"\x80[\x00-\x05]", start):
                raise ValueError(
                    f"{self._path} is a torch checkpoint of the kind before 1.6, which is not "
                    "read: load it with torch >= 1.6 and save it again"
                )
            try:
                # Python reads zip files with anything in front; torch does not.
                if start != _ZIP_START:
                    raise zipfile.BadZipFile("it does not begin as a zip file")
                archive = zipfile.ZipFile(file)
            except Exception as error:
                raise ValueError(
                    f"{self._path} is cut off or no torch zip checkpoint ({error})"
                ) from error
            try:
                yield archive
            except _RefusedError as error:
                raise ValueError(f"{self._path}: {error}") from None
            except MemoryError:
                raise
            except Exception as error:
                raise ValueError(
                    f"{self._path} is cut off or damaged ({_kind(error)}: {error})"
                ) from error


def _folder(archive: zipfile.ZipFile) -> str:
    """The one folder inside the archive; its name is arbitrary."""
    found = [n.removesuffix("/data.pkl") for n in archive.namelist() if n.endswith("/data.pkl")]
    if len(found) != 1:
        raise _RefusedError(f"no torch zip checkpoint: expected one data.pkl, found {len(found)}")
    return found[0]


def _byte_order(archive: zipfile.ZipFile, folder: str) -> str:
    """The byte order of the storages, "little" or "big"; older files do not say, and are little."""
    if f"{folder}/byteorder" not in archive.namelist():
        return "little"
    with archive.open(f"{folder}/byteorder") as file:
        order = file.read(16)
    if order not in (b"little", b"big"):
        raise _RefusedError(f"byteorder is {order!r}, expected b'little' or b'big'")
    return order.decode()


def _unpickle(archive: zipfile.ZipFile, entry: str) -> Any:
    """What the pickle of an archive describes, with its tensors not yet read."""
    info = _stored(archive, entry)
    if info.file_size > _MAX_PICKLE:
        raise _RefusedError(f"{entry} has {info.file_size} bytes, more than {_MAX_PICKLE}")
    data = _read_bytes(archive, info).tobytes()
    try:
        return _Machine().run(data)
    except _RefusedError:
        raise
    except Exception as error:
        raise _RefusedError(f"{entry} is cut off or damaged ({_kind(error)}: {error})") from error


def _state_dict(top: Any) -> dict[str, _Tensor]:
    """The tensors by name, out of what the pickle describes."""
    where = "the top level"
    if isinstance(top, dict) and not any(isinstance(v, _Tensor) for v in top.values()):
        key = next((key for key in _WRAPPERS if isinstance(top.get(key), dict)), None)
        if key is not None:
            _tensors_among({k: v for k, v in top.items() if k != key}, where)
            top, where = top[key], repr(key)
    if not isinstance(top, dict):
        raise _RefusedError(f"{where} is of type {_kind(top)}, expected tensors by name")
    tensors = _tensors_among(top, where)
    if not tensors:
        raise _RefusedError(f"{where} holds no tensor; expected them there or under {_WRAPPERS}")
    return tensors


def _tensors_among(values: dict[str, Any], where: str) -> dict[str, _Tensor]:
    """The tensors among values, beside which only plain values may stand."""
    plain = (type(None), bool, int, float, str)
    nested = [f"{k!r} ({_kind(v)})" for k, v in values.items() if type(v) not in (_Tensor, *plain)]
    if nested:
        raise _RefusedError(
            f"{where} holds nested values: {', '.join(nested)}; expected tensors by name, there "
            f"or in one dictionary under one of {_WRAPPERS}"
        )
    return {name: value for name, value in values.items() if type(value) is _Tensor}


def _check_place(archive: zipfile.ZipFile, folder: str, tensor: _Tensor) -> zipfile.ZipInfo:
    """The entry of a tensor's storage; refuses one that does not hold all of the tensor."""
    storage = tensor.storage
    itemsize = storage.dtype.itemsize
    info = _stored(archive, f"{folder}/data/{storage.key}")
    if info.file_size != storage.num_elements * itemsize:
        raise _RefusedError(
            f"{info.filename} has {info.file_size} bytes, but its storage should have "
            f"{storage.num_elements} elements of {itemsize}"
        )
    end = tensor.offset
    if 0 not in tensor.shape:
        end += 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    if end > storage.num_elements:
        raise _RefusedError(f"it reaches to element {end} of a storage of {storage.num_elements}")
    # A stride of 0 repeats elements, so the storage does not bound the shape.
    if math.prod(n for n in tensor.shape if n) * itemsize >= 2**63:
        raise _RefusedError(f"its shape {tensor.shape} is too large")
    return info


def _stored(archive: zipfile.ZipFile, entry: str) -> zipfile.ZipInfo:
    """An entry that lies in the file as it is."""
    try:
        info = archive.getinfo(entry)
    except KeyError:
        raise _RefusedError(f"{entry} is missing from the archive") from None
    as_is = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
    if not as_is or info.flag_bits & _ENCRYPTED:
        raise _RefusedError(f"{entry} is compressed or encrypted, which torch never does")
    if info.file_size > pathlib.Path(archive.filename).stat().st_size:
        raise _RefusedError(f"{entry} claims {info.file_size} bytes, more than the file has")
    return info


def _read_bytes(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> UInt8[np.ndarray, " bytes"]:
    """An entry, read into its array piece by piece; its checksum is checked on the way."""
    values = np.empty(info.file_size, np.uint8)
    with archive.open(info) as file:
        for start in range(0, values.size, _CHUNK):
            piece = values[start : start + _CHUNK]
            data = file.read(piece.size)
            if len(data) != piece.size:
                raise EOFError(f"{info.filename} ends early")
            piece[:] = np.frombuffer(data, np.uint8)
    return values
