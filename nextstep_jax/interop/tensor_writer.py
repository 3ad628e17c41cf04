"""Writes safetensors one tensor at a time, in any order, over as many shards as needed.

The names and the index are those under which NextStep-1 (arXiv 2508.10711) is published. The
library's `save_file` wants a whole shard in memory. Our parameters are stacked over layers, so one
of them reaches into many shards; here the layout of every file is fixed first, from names, shapes
and dtypes alone, and each tensor then goes to its place.

A safetensors file is: the length of the header (8 bytes, little-endian), the header (JSON, padded
with spaces to a multiple of 8 bytes), the data. Words: offsets count from the beginning of the
data, sizes are in bytes.
"""

import decimal
import json
import math
import pathlib
import re
import types
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from nextstep_jax.interop.tensor_files import INDEX_SUFFIX, SAFETENSORS_DTYPES
from nextstep_jax.interop.tensors import TensorInfo

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_METADATA_KEY = "__metadata__"
# What torch's loaders look for before they touch a file.
_FROM_TORCH: Mapping[str, str] = types.MappingProxyType({"format": "pt"})

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000 ** (i + 1) for i, prefix in enumerate("KMGT")},
    **{f"{prefix}IB": 1024 ** (i + 1) for i, prefix in enumerate("KMGT")},
}


class _Place(NamedTuple):
    """Where a tensor goes: the file, and the position in it."""

    path: pathlib.Path
    position: int


class SafetensorsWriter:
    """One model as safetensors: a single file, or shards and their index.

    Tensors fill shards greedily in the order given. A shard's header is written when the writer
    is closed, so files of an interrupted run cannot be read by mistake.

    Used as a context manager it is closed on leaving, but not after an error.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        infos: Mapping[str, TensorInfo],
        stem: str = "model",
        max_shard_size: int = 5 * 10**9,
        metadata: Mapping[str, str] | None = _FROM_TORCH,
    ):
        """Lays the files out and makes them at their full size.

        Args:
            directory: Folder of the files; made if need be.
            infos: Shape and dtype of every tensor, in order.
            stem: What the file names begin with.
            max_shard_size: Most bytes of data in a file; a larger tensor has a file to itself.
            metadata: What the headers carry besides, strings only.

        Raises:
            FileExistsError: The directory already holds safetensors of this stem.
            ValueError: There is nothing to write, or an argument has a wrong value.
        """
        _check(infos, stem, max_shard_size, metadata)
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # An index left over would be found before a new single file.
        left = sorted(p.name for p in directory.iterdir() if _is_output(p.name, stem))
        if left:
            raise FileExistsError(f"{directory} already holds {left}")
        self._infos = dict(infos)
        self._written: set[str] = set()
        self._closed = False
        self._places: dict[str, _Place] = {}
        self._headers: dict[pathlib.Path, bytes] = {}
        self._index_path = directory / f"{stem}{INDEX_SUFFIX}"
        shards = _split(infos, max_shard_size)
        for i, names in enumerate(shards):
            part = f"-{i + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            path = directory / f"{stem}{part}.safetensors"
            header, offsets = _lay_out({name: infos[name] for name in names}, metadata)
            self._headers[path] = header
            for name, offset in offsets.items():
                self._places[name] = _Place(path, len(header) + offset)
            with path.open("xb") as file:
                file.truncate(len(header) + sum(_num_bytes(infos[name]) for name in names))

    def write(self, name: str, array: Shaped[np.ndarray, "..."]) -> None:
        """Writes one tensor to its place.

        Raises:
            ValueError: The name is unknown or was written before, the shape or dtype is not what
                was announced, or the writer is closed.
        """
        if self._closed:
            raise ValueError(f"{name}: the writer is closed")
        if name not in self._infos:
            raise ValueError(f"{name}: was not among the {len(self._infos)} tensors announced")
        if name in self._written:
            raise ValueError(f"{name}: was written before")
        info = self._infos[name]
        if array.shape != info.shape or array.dtype != info.dtype:
            raise ValueError(
                f"{name}: expected {info.dtype} {info.shape}, got {array.dtype} {array.shape}"
            )
        place = self._places[name]
        with place.path.open("r+b") as file:
            file.seek(place.position)
            # As bytes: bfloat16 is no dtype of the buffer protocol.
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        self._written.add(name)

    def close(self) -> None:
        """Writes headers and index.

        Raises:
            ValueError: Tensors were never written; they are listed.
        """
        if self._closed:
            return
        missing = [name for name in self._infos if name not in self._written]
        if missing:
            raise ValueError(
                f"{self._index_path.parent}: {len(missing)} of {len(self._infos)} tensors were "
                f"never written: {', '.join(missing)}"
            )
        for path, header in self._headers.items():
            with path.open("r+b") as file:
                file.write(header)
        if len(self._headers) > 1:
            index = {
                "metadata": {"total_size": sum(map(_num_bytes, self._infos.values()))},
                "weight_map": {name: place.path.name for name, place in self._places.items()},
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            self._index_path.write_text(text, encoding="utf-8")
        self._closed = True

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # After an error the list of what is missing would only hide it.
        if error is None:
            self.close()


def parse_size(text: str) -> int:
    """Bytes of a size in words: "5GB" is 5 * 10**9, "1GiB" is 2**30, "123" is 123.

    Raises:
        ValueError: The text is no such size, or not a positive whole number of bytes.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    size = decimal.Decimal(found[1]) * unit if found and unit else decimal.Decimal(0)
    if size <= 0 or size != int(size):
        raise ValueError(
            f"size {text!r}: expected a number of bytes such as 5GB, 200MB, 1GiB or 123"
        )
    return int(size)


def _check(
    infos: Mapping[str, TensorInfo],
    stem: str,
    max_shard_size: int,
    metadata: Mapping[str, str] | None,
) -> None:
    """Refuses what could not be written, before a file exists."""
    if not infos:
        raise ValueError("infos: there is no tensor to write")
    if _METADATA_KEY in infos:
        raise ValueError(f"infos: {_METADATA_KEY!r} cannot be the name of a tensor")
    unknown = [f"{name} ({i.dtype})" for name, i in infos.items() if i.dtype not in _DTYPE_NAMES]
    if unknown:
        known = [str(dtype) for dtype in _DTYPE_NAMES]
        raise ValueError(f"infos: no safetensors dtype for {', '.join(unknown)}; known are {known}")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", stem):
        raise ValueError(f"stem={stem!r} must be a plain file name")
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size={max_shard_size} must be positive")
    if not all(isinstance(s, str) for item in (metadata or {}).items() for s in item):
        raise ValueError(f"metadata={dict(metadata or {})} must map strings to strings")


def _is_output(name: str, stem: str) -> bool:
    """Whether a writer of this stem could have made a file of this name."""
    shard = r"(-[0-9]{5,}-of-[0-9]{5,})?\.safetensors"
    return re.fullmatch(rf"{re.escape(stem)}({shard}|{re.escape(INDEX_SUFFIX)})", name) is not None


def _num_bytes(info: TensorInfo) -> int:
    """Bytes of a tensor's data."""
    return math.prod(info.shape) * info.dtype.itemsize


def _split(infos: Mapping[str, TensorInfo], max_shard_size: int) -> list[list[str]]:
    """Names by shard: in order, a new shard where the next tensor would not fit."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + _num_bytes(info) > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _num_bytes(info)
    return shards


def _lay_out(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int]]:
    """The header of one file, its length in front, and the offset of each tensor."""
    header: dict[str, object] = {_METADATA_KEY: dict(metadata)} if metadata else {}
    offsets = {}
    end = 0
    # Wide dtypes first, so that every tensor lies at a multiple of its item size: loaders that
    # view the mapped file in place refuse anything else.
    for name, info in sorted(infos.items(), key=lambda item: -item[1].dtype.itemsize):
        offsets[name] = end
        end += _num_bytes(info)
        header[name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets
