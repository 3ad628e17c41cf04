"""Reads the checkpoints that torch wrote before version 1.6, with numpy alone.

LPIPS and many classifiers, with which the image tokenizer of NextStep-1 (arXiv 2508.10711) is
judged, are published so, often written by Python 2. Such a file is one pickle after another: a
magic number, the protocol, facts of the machine, the object itself, the list of its storages'
keys; then for each key the number of elements (8 bytes) and the elements, all little-endian. The
pickles are run by `pickle_machine`, which makes tensors and refuses everything else.
"""

import contextlib
import itertools
import os
import pathlib
import pickletools
import sys
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Shaped

from nextstep_jax.interop.pickle_machine import PickleMachine, RefusedError, kind_of
from nextstep_jax.interop.tensors import TensorInfo, unknown_tensor
from nextstep_jax.interop.torch_pickle import (
    LEGACY_START,
    MAX_PICKLE,
    check_extent,
    tensor_in,
    tensors_of,
)

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_COUNT_BYTES = 8


def is_legacy(path: pathlib.Path) -> bool:
    """Whether a file begins as torch wrote them before 1.6."""
    with path.open("rb") as file:
        return LEGACY_START.match(file.read(2)) is not None


class TorchLegacy:
    """The tensors of a torch checkpoint of the kind before 1.6; implements `TensorFiles`.

    What it may hold is what `TorchPickle` reads: tensors by name, or a dictionary with them under
    "state_dict" or "model", beside plain values.

    Attributes:
        infos: Shape and dtype of every tensor.
    """

    infos: Mapping[str, TensorInfo]

    def __init__(self, path: pathlib.Path):
        """Reads and checks everything but the values.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is cut off, damaged, of another kind, or holds something else than
                tensors by name.
        """
        self._path = pathlib.Path(path)
        with self._open() as file:
            pickles = _Pickles(file)
            if pickles.load()[0] != _MAGIC:
                raise RefusedError("a pickle, but no torch checkpoint: it lacks the magic number")
            protocol = pickles.load()[0]
            if protocol != _PROTOCOL:
                shown = protocol if type(protocol) is int else kind_of(protocol)
                raise RefusedError(f"its protocol is {str(shown)[:20]}, expected {_PROTOCOL}")
            pickles.load()  # The sizes of C's integers where it was written.
            top, storages = pickles.load()
            keys = pickles.load()[0]
            self._tensors = tensors_of(top)
            self._starts = _starts(file, keys, storages)
            faults = []
            for name, tensor in self._tensors.items():
                try:
                    check_extent(tensor)
                except RefusedError as error:
                    faults.append(f"{name}: {error}")
            if faults:
                raise RefusedError("tensors that do not fit:\n  " + "\n  ".join(faults))
        self.infos = {
            name: TensorInfo(tensor.shape, tensor.storage.dtype)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """The tensor as a fresh C-contiguous array; see `TensorFiles`."""
        path, tensor = self.where(name), self._tensors[name]
        storage = tensor.storage
        if 0 in tensor.shape:
            return np.empty(tensor.shape, storage.dtype)
        num_bytes = storage.num_elements * storage.dtype.itemsize
        values = np.fromfile(path, np.uint8, num_bytes, offset=self._starts[storage.key])
        if values.size != num_bytes:  # Since it was opened.
            raise ValueError(f"{path} is cut off: it ends in the storage of {name}")
        return tensor_in(values, tensor, swap=sys.byteorder == "big")

    def where(self, name: str) -> pathlib.Path:
        """The file that holds the tensor: there is only one."""
        if name not in self._tensors:
            raise unknown_tensor(self._path, name, self.infos)
        return self._path

    @contextlib.contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        """The file; whatever a damaged one can raise is a ValueError that names it."""
        with self._path.open("rb") as file:
            try:
                yield file
            except RefusedError as error:
                raise ValueError(f"{self._path}: {error}") from None
            except MemoryError:
                raise
            except Exception as error:
                raise ValueError(
                    f"{self._path} is cut off or damaged ({kind_of(error)}: {error})"
                ) from error


class _LegacyMachine(PickleMachine):
    """The machine, with what older torch and Python 2 wrote differently.

    Attributes:
        storages: Those that the pickle named so far, by key.
    """

    def __init__(self):
        super().__init__()
        self.storages: dict[str, Any] = {}

    def run_from(self, pickles: "_Pickles") -> Any:
        """What the next pickle describes."""
        for opcode, argument, _ in pickletools.genops(pickles):
            if opcode.name == "STOP":
                break
            self._step(opcode.name, argument)
        return self._stack.pop()

    def _step(self, opcode: str, argument: Any) -> None:
        """Does what one opcode says."""
        stack = self._stack
        match opcode:
            case "SHORT_BINSTRING" | "BINSTRING":
                # Python 2's str, which pickletools reads as latin-1; names are ASCII.
                stack.append(argument)
            case "BINPERSID":
                self._find_storage()
            case "REDUCE" if _is_pairs(stack[-1]):
                # Python 2 made an OrderedDict of pairs; every other function refuses to be called
                # without arguments, and only a dictionary is filled.
                (pairs,) = stack[-1]
                stack[-1] = ()
                super()._step("REDUCE", None)
                super()._step("MARK", None)
                stack.extend(itertools.chain.from_iterable(pairs))
                super()._step("SETITEMS", None)
                # Else the memo could hand the list out again and again, at the cost of two bytes.
                pairs.clear()
            case _:
                super()._step(opcode, argument)

    def _find_storage(self) -> None:
        """As in zip files, but for the view of another storage at the end."""
        identity = self._stack[-1]
        if type(identity) is tuple and len(identity) == 6:
            if identity[5] is not None:
                raise RefusedError("refused a storage that is a view of another")
            self._stack[-1] = identity[:5]
        super()._step("BINPERSID", None)
        found = self._stack[-1]
        known = self.storages.setdefault(found.key, found)
        if (known.dtype, known.num_elements) != (found.dtype, found.num_elements):
            raise RefusedError(f"storage {found.key[:40]!r} is said to be of two kinds")


def _is_pairs(arguments: Any) -> bool:
    """Whether the arguments of a call are one list of pairs, each a list."""
    if type(arguments) is not tuple or len(arguments) != 1 or type(arguments[0]) is not list:
        return False
    return all(type(pair) is list and len(pair) == 2 for pair in arguments[0])


class _Pickles:
    """The pickles at the start of a file, one after another, not read beyond."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._left = MAX_PICKLE

    def load(self) -> tuple[Any, Mapping[str, Any]]:
        """What the next pickle describes, and the storages that it names."""
        machine = _LegacyMachine()
        return machine.run_from(self), machine.storages

    # What pickletools asks of a file. A pickle may claim a string of any length, for which a file
    # would take the memory before it finds out.

    def read(self, num_bytes: int) -> bytes:
        """As many bytes, or fewer at the end of the file."""
        self._count(num_bytes)
        return self._file.read(num_bytes)

    def readline(self) -> bytes:
        """A line with its end."""
        line = self._file.readline(self._left + 1)
        self._count(len(line))
        return line

    def _count(self, num_bytes: int) -> None:
        if num_bytes > self._left:
            raise RefusedError(f"its pickles claim more than {MAX_PICKLE} bytes")
        self._left -= num_bytes


def _starts(file: BinaryIO, keys: Any, storages: Mapping[str, Any]) -> dict[str, int]:
    """Where the elements of each storage begin; refuses a file that does not hold them all."""
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise RefusedError("its list of storages is no list of names")
    if len(set(keys)) != len(keys) or set(keys) != set(storages):
        raise RefusedError("its list of storages is not that of its tensors")
    position, size = file.tell(), os.fstat(file.fileno()).st_size
    starts = {}
    for number, key in enumerate(keys):
        storage = storages[key]
        file.seek(position)
        count = file.read(_COUNT_BYTES)
        position += _COUNT_BYTES
        starts[key] = position
        position += storage.num_elements * storage.dtype.itemsize
        if position > size:
            raise RefusedError(
                f"it is cut off: expected {position} bytes up to storage {number + 1} of "
                f"{len(keys)}, found {size}"
            )
        found = int.from_bytes(count, "little")
        if found != storage.num_elements:
            raise RefusedError(
                f"damaged: storage {number + 1} of {len(keys)} has {found} elements, expected "
                f"{storage.num_elements}"
            )
    return starts
