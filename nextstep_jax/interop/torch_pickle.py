"""Reads torch's zip checkpoints with numpy alone.

Since version 1.6 `torch.save` writes a zip archive: `NAME/data.pkl` is a pickle that says how each
tensor lies in a storage (offset, shape, strides, in elements), `NAME/data/N` are the bytes of
storage N, `NAME/byteorder` says how to read them. The image tokenizer of NextStep-1 (arXiv
2508.10711) is published so, as `vae/checkpoint.pt`. The pickle is run by `pickle_machine`, which
makes tensors and refuses everything else.
"""

import contextlib
import math
import pathlib
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8

from nextstep_jax.interop.pickle_machine import LazyTensor, PickleMachine, RefusedError, kind_of
from nextstep_jax.interop.tensors import TensorInfo, unknown_tensor

MAX_PICKLE = 64 * 2**20
"""Bytes of pickles that are read; a state dict has some hundred a tensor."""

LEGACY_START = re.compile(rb"\x80[\x00-\x05]")
"""How the files of torch before 1.6 begin, being bare pickles: with their protocol."""

_ZIP_START = b"PK\3\4"
_ENCRYPTED = 1  # A bit in the flags of a zip entry.
# Bytes read at once: what reading needs on top of the tensor itself.
_CHUNK = 4 * 2**20
_WRAPPERS = ("state_dict", "model")


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
            self._tensors = tensors_of(_unpickle(archive, f"{self._folder}/data.pkl"))
            faults = []
            for name, tensor in self._tensors.items():
                try:
                    _check_place(archive, self._folder, tensor)
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
        self.where(name)
        tensor = self._tensors[name]
        with self._open() as archive:
            # Again: the file may have changed since it was opened.
            entry = _check_place(archive, self._folder, tensor)
            if 0 in tensor.shape:
                return np.empty(tensor.shape, tensor.storage.dtype)
            return tensor_in(_read_bytes(archive, entry), tensor, swap=self._swap)

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
            if LEGACY_START.match(start):
                raise ValueError(
                    f"{self._path} is a torch checkpoint of the kind before 1.6, which "
                    "`open_tensors` reads"
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
            except RefusedError as error:
                raise ValueError(f"{self._path}: {error}") from None
            except MemoryError:
                raise
            except Exception as error:
                raise ValueError(
                    f"{self._path} is cut off or damaged ({kind_of(error)}: {error})"
                ) from error


def _folder(archive: zipfile.ZipFile) -> str:
    """The one folder inside the archive; its name is arbitrary."""
    found = [n.removesuffix("/data.pkl") for n in archive.namelist() if n.endswith("/data.pkl")]
    if len(found) != 1:
        raise RefusedError(f"no torch zip checkpoint: expected one data.pkl, found {len(found)}")
    return found[0]


def _byte_order(archive: zipfile.ZipFile, folder: str) -> str:
    """The byte order of the storages, "little" or "big"; older files do not say, and are little."""
    if f"{folder}/byteorder" not in archive.namelist():
        return "little"
    with archive.open(f"{folder}/byteorder") as file:
        order = file.read(16)
    if order not in (b"little", b"big"):
        raise RefusedError(f"byteorder is {order!r}, expected b'little' or b'big'")
    return order.decode()


def _unpickle(archive: zipfile.ZipFile, entry: str) -> Any:
    """What the pickle of an archive describes, with its tensors not yet read."""
    info = _stored(archive, entry)
    if info.file_size > MAX_PICKLE:
        raise RefusedError(f"{entry} has {info.file_size} bytes, more than {MAX_PICKLE}")
    data = _read_bytes(archive, info).tobytes()
    try:
        return PickleMachine().run(data)
    except RefusedError:
        raise
    except Exception as error:
        raise RefusedError(f"{entry} is cut off or damaged ({kind_of(error)}: {error})") from error


def tensors_of(top: Any) -> dict[str, LazyTensor]:
    """The tensors by name, out of what the pickle of a state dict describes.

    Raises:
        RefusedError: It describes something else.
    """
    where = "the top level"
    if isinstance(top, dict) and not any(isinstance(v, LazyTensor) for v in top.values()):
        key = next((key for key in _WRAPPERS if isinstance(top.get(key), dict)), None)
        if key is not None:
            _tensors_among({k: v for k, v in top.items() if k != key}, where)
            top, where = top[key], repr(key)
    if not isinstance(top, dict):
        raise RefusedError(f"{where} is of type {kind_of(top)}, expected tensors by name")
    tensors = _tensors_among(top, where)
    if not tensors:
        raise RefusedError(f"{where} holds no tensor; expected them there or under {_WRAPPERS}")
    return tensors


def _tensors_among(values: dict[str, Any], where: str) -> dict[str, LazyTensor]:
    """The tensors among values, beside which only plain values may stand."""
    plain = (type(None), bool, int, float, str)
    nested = [
        f"{k!r} ({kind_of(v)})" for k, v in values.items() if type(v) not in (LazyTensor, *plain)
    ]
    if nested:
        raise RefusedError(
            f"{where} holds nested values: {', '.join(nested)}; expected tensors by name, there "
            f"or in one dictionary under one of {_WRAPPERS}"
        )
    return {name: value for name, value in values.items() if type(value) is LazyTensor}


def tensor_in(
    values: UInt8[np.ndarray, " bytes"], tensor: LazyTensor, *, swap: bool
) -> Shaped[np.ndarray, "..."]:
    """A tensor out of the bytes of its storage, which are then its own.

    Args:
        values: The bytes of a storage that `check_extent` has let pass.
        tensor: How it lies there.
        swap: Whether the bytes are of the other byte order than this machine's.
    """
    dtype = tensor.storage.dtype
    if swap:
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


def check_extent(tensor: LazyTensor) -> None:
    """Refuses a tensor that reaches out of its storage.

    Raises:
        RefusedError: It does, or its shape is beyond what an array can have.
    """
    end = tensor.offset
    if 0 not in tensor.shape:
        end += 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    num_elements = tensor.storage.num_elements
    if end > num_elements:
        raise RefusedError(f"it reaches to element {end} of a storage of {num_elements}")
    # A stride of 0 repeats elements, so the storage does not bound the shape.
    if math.prod(n for n in tensor.shape if n) * tensor.storage.dtype.itemsize >= 2**63:
        raise RefusedError(f"its shape {tensor.shape} is too large")


def _check_place(archive: zipfile.ZipFile, folder: str, tensor: LazyTensor) -> zipfile.ZipInfo:
    """The entry of a tensor's storage; refuses one that does not hold all of the tensor."""
    storage = tensor.storage
    itemsize = storage.dtype.itemsize
    info = _stored(archive, f"{folder}/data/{storage.key}")
    if info.file_size != storage.num_elements * itemsize:
        raise RefusedError(
            f"{info.filename} has {info.file_size} bytes, but its storage should have "
            f"{storage.num_elements} elements of {itemsize}"
        )
    check_extent(tensor)
    return info


def _stored(archive: zipfile.ZipFile, entry: str) -> zipfile.ZipInfo:
    """An entry that lies in the file as it is."""
    try:
        info = archive.getinfo(entry)
    except KeyError:
        raise RefusedError(f"{entry} is missing from the archive") from None
    as_is = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
    if not as_is or info.flag_bits & _ENCRYPTED:
        raise RefusedError(f"{entry} is compressed or encrypted, which torch never does")
    if info.file_size > pathlib.Path(archive.filename).stat().st_size:
        raise RefusedError(f"{entry} claims {info.file_size} bytes, more than the file has")
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
