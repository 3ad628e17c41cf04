"""Tensors of published checkpoints on disk, opened lazily and read one at a time.

NextStep-1 (arXiv 2508.10711) is published as safetensors, in one file or in shards with an index,
and its image tokenizer as a torch checkpoint. `open_tensors` finds and checks what is there;
names, shapes and dtypes are known without reading a value, so a caller can refuse a wrong
checkpoint before any of its gigabytes move.

Words: a shard is one of several files that hold a model together; the index is the JSON file that
says which tensor is in which shard.
"""

import contextlib
import json
import math
import pathlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from nextstep_jax.interop.tensors import TensorFiles, TensorInfo, unknown_tensor
from nextstep_jax.interop.torch_legacy import TorchLegacy, is_legacy
from nextstep_jax.interop.torch_pickle import TorchPickle

SAFETENSORS_DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
"""The dtypes of safetensors that are read and written, by their names in the header."""

INDEX_SUFFIX = ".safetensors.index.json"
"""How the name of an index ends; it begins with the stem of its shards."""

_FOLDER_NAMES = (
    f"model{INDEX_SUFFIX}",
    "model.safetensors",
    f"diffusion_pytorch_model{INDEX_SUFFIX}",
    "diffusion_pytorch_model.safetensors",
    "checkpoint.pt",
)
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
# The safetensors library itself refuses longer headers.
_MAX_HEADER = 100_000_000
_LFS_POINTER = b"version https://git-lfs"


class SafetensorsFiles:
    """Tensors in one or several safetensors files.

    Attributes:
        infos: Shape and dtype of every tensor.
    """

    infos: Mapping[str, TensorInfo]

    def __init__(self, path: pathlib.Path, shards: Mapping[pathlib.Path, Mapping[str, TensorInfo]]):
        """Takes checked headers: `path` is what the user named, `shards` holds infos by file."""
        self._path = path
        self._files = {name: shard for shard, infos in shards.items() for name in infos}
        self.infos = {name: info for infos in shards.values() for name, info in infos.items()}
        self._starts = {shard: _starts_of(shard) for shard in shards}

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """The tensor as a fresh C-contiguous array; see `TensorFiles`."""
        # Not by the library, which checked the header: it maps the file and copies from the map,
        # and the pages of a map count as resident, so that a tensor would be there twice.
        path, info = self.where(name), self.infos[name]
        count = math.prod(info.shape)
        array = np.fromfile(path, info.dtype, count, offset=self._starts[path][name])
        if array.size != count:  # Since it was opened; the library knows by how much.
            _infos_of(path)
        return array.reshape(info.shape)

    def where(self, name: str) -> pathlib.Path:
        """The file that holds the tensor."""
        if name not in self._files:
            raise unknown_tensor(self._path, name, self.infos)
        return self._files[name]


def open_tensors(path: pathlib.Path) -> TensorFiles:
    """Opens the tensors of a checkpoint, having checked everything but the values.

    Args:
        path: A `.safetensors` file, an index of shards (`.safetensors.index.json`), a torch
            checkpoint of any version (`.pt`, `.pth`, `.bin`), or a folder that holds one under a
            published name.

    Raises:
        FileNotFoundError: There is no such file, or the folder holds none of the known names.
        ValueError: The file is of another kind, cut off or damaged; the shards are not what the
            index says; a dtype is unknown; a pickle holds more than tensors.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        found = [path / name for name in _FOLDER_NAMES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds no checkpoint: none of {list(_FOLDER_NAMES)}")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.name.endswith(INDEX_SUFFIX):
        return SafetensorsFiles(path, _shards_of(path))
    if path.suffix == ".safetensors":
        return SafetensorsFiles(path, {path: _infos_of(path)})
    if path.suffix in _TORCH_SUFFIXES:
        _refuse_pointer(path)
        return TorchLegacy(path) if is_legacy(path) else TorchPickle(path)
    accepted = (".safetensors", INDEX_SUFFIX, *_TORCH_SUFFIXES)
    raise ValueError(f"{path} is no checkpoint: expected a name that ends in {list(accepted)}")


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[Any]:
    """The library's handle on a file; what the library finds wrong names the file."""
    try:
        with safe_open(path, "numpy") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} {_diagnosis(path, str(error))}") from error


def _infos_of(path: pathlib.Path) -> dict[str, TensorInfo]:
    """Shapes and dtypes in the header of one safetensors file."""
    _refuse_pointer(path)
    infos = {}
    unknown = []
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118, the handle is no mapping
            view = file.get_slice(name)
            dtype = SAFETENSORS_DTYPES.get(view.get_dtype())
            if dtype is None:
                unknown.append((name, view.get_dtype()))
            else:
                infos[name] = TensorInfo(tuple(view.get_shape()), dtype)
    if unknown:
        raise ValueError(f"{path} {_unknown_dtypes(unknown)}")
    return infos


def _starts_of(path: pathlib.Path) -> dict[str, int]:
    """Where the data of each tensor begins in a file whose header the library has accepted."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}


def _unknown_dtypes(tensors: list[tuple[str, str]]) -> str:
    """The end of a message: these tensors have dtypes that we, or the library, do not know."""
    listed = ", ".join(f"{name} ({dtype})" for name, dtype in tensors)
    return f"has tensors of unknown dtype: {listed}; known are {list(SAFETENSORS_DTYPES)}"


def _diagnosis(path: pathlib.Path, error: str) -> str:
    """What is wrong with a file that the library does not open, as the end of a message.

    The library says that something does not fit; users want to know how much of the file they
    have. Its header is a length in 8 bytes and as much JSON; each entry has the offsets of its
    data behind the header.
    """
    damaged = "is cut off or damaged"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            return f"{damaged}: expected a header of {8 + length} bytes, found {size} ({error})"
        if length > _MAX_HEADER:
            return f"{damaged}: {error}"
        header = file.read(length)
    try:
        tensors = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        unknown = [
            (name, str(tensor["dtype"]))
            for name, tensor in tensors.items()
            if tensor["dtype"] not in SAFETENSORS_DTYPES
        ]
        expected = 8 + length + max((t["data_offsets"][1] for t in tensors.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{damaged}: {error}"
    if unknown:
        return _unknown_dtypes(unknown)
    if expected != size:
        return f"{damaged}: expected {expected} bytes, found {size} ({error})"
    return f"{damaged}: {error}"


def _refuse_pointer(path: pathlib.Path) -> None:
    """Says what to do about the stand-in of a file that git has not fetched."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself: git lfs pull")


def _shards_of(index: pathlib.Path) -> dict[pathlib.Path, dict[str, TensorInfo]]:
    """Infos by shard; whatever index and shards disagree in is listed in one error."""
    weight_map = _weight_map(index)
    problems = []
    opened: dict[str, dict[str, TensorInfo]] = {}
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        if not path.is_file():
            problems.append(f"{shard}: no such file")
            continue
        try:
            opened[shard] = _infos_of(path)
        except ValueError as error:
            problems.append(str(error))

    holders = defaultdict(list)
    for shard, infos in opened.items():
        for name in infos:
            holders[name].append(shard)
    for name, shard in weight_map.items():
        # Of a shard that did not open nothing is known, and it has its own line.
        if shard in opened and name not in opened[shard]:
            elsewhere = f"; it is in {holders[name]}" if name in holders else ""
            problems.append(f"{name}: the index says {shard}, which lacks it{elsewhere}")
    for name, shards in holders.items():
        if len(shards) > 1:
            problems.append(f"{name}: in more than one shard, {shards}")
        if name not in weight_map:
            problems.append(f"{name}: in {shards[0]}, but not in the index")
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"{index}: the shards are not what the index says:\n  {listed}")
    return {index.parent / shard: infos for shard, infos in opened.items()}


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    """Tensor -> shard, as the index says, with names that stay inside its folder."""
    try:
        values = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index} is not JSON: {error}") from error
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise ValueError(f'{index}: expected {{"weight_map": {{tensor: file name}}}}')
    shards = sorted(set(weight_map.values()))
    bad = [s for s in shards if s in ("", ".", "..") or set(s) & set("/\\:\0")]
    if bad:
        raise ValueError(f"{index}: shards must be plain file names beside the index, not {bad}")
    return weight_map
