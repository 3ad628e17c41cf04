"""Published tensors to sharded parameters and back, a parameter at a time.

A 14B checkpoint is larger than the memory of many hosts, so that no more of it is held than one
parameter (all layers of, say, a gate projection) and the tensor that is being read: each tensor is
cut into the shards of this host's devices as it comes, in the dtype that they get.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

from nextstep_jax.interop.tensor_map import Path, Slot, leaves_of, to_ours, to_published, tree_of
from nextstep_jax.interop.tensor_writer import SafetensorsWriter
from nextstep_jax.interop.tensors import TensorFiles, TensorInfo

# Parameters are handed on in groups of at least this size: writing one has a cost of its own, and
# the flow head has a hundred small ones. Ours.
_GROUP_BYTES = 2**26
# Bytes that the arrays of a CPU device are aligned to.
_ALIGNMENT = 64


def check_tensors(
    files: TensorFiles, slots: Sequence[Slot], ignored: Iterable[str] = (), what: str = "checkpoint"
) -> None:
    """Compares the names and shapes in a checkpoint with those that a model needs.

    Args:
        files: The checkpoint.
        slots: What the model needs.
        ignored: Names that may be there and are not needed.
        what: The checkpoint's name in the error.

    Raises:
        ValueError: Listing all missing, unexpected and mis-shaped tensors, and those that hold no
            floating point numbers.
    """
    wanted, ignored = {slot.name: slot for slot in slots}, set(ignored)
    missing = [name for name in wanted if name not in files.infos]
    unexpected = [name for name in files.infos if name not in wanted and name not in ignored]
    misshapen = [
        f"{name} is {list(files.infos[name].shape)}, expected {list(slot.shape)}"
        for name, slot in wanted.items()
        if name in files.infos and tuple(files.infos[name].shape) != slot.shape
    ]
    # Such as the packed weights of a quantised model under their old names.
    unusable = [
        f"{name} ({files.infos[name].dtype})"
        for name in wanted
        if name in files.infos and not jnp.issubdtype(files.infos[name].dtype, jnp.floating)
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
            ("not of floating point", unusable),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{what}: the tensors are not those of the config; " + "; ".join(problems))


def stream_params(
    files: TensorFiles,
    slots: Sequence[Slot],
    abstract: Any,
    shardings: Any = None,
    dtype: DTypeLike | None = None,
) -> Iterator[dict[Path, jax.Array]]:
    """Reads parameters onto their devices, in groups.

    Args:
        files: The checkpoint, checked by `check_tensors`.
        slots: Where its tensors go.
        abstract: The parameters' shapes, as a tree.
        shardings: A tree of their shardings; by default the first device.
        dtype: Of the parameters; by default that of their tensors, the widest where a stack has
            several.

    Yields:
        Parameters by their paths. What was yielded is not kept.
    """
    by_path: dict[Path, list[Slot]] = {}
    for slot in slots:
        by_path.setdefault(slot.path, []).append(slot)
    shapes = {path: leaf.shape for path, leaf in leaves_of(abstract).items()}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = leaves_of(shardings) if shardings is not None else dict.fromkeys(shapes, here)
    group: dict[Path, jax.Array] = {}
    for path in by_path:
        group[path] = _read(files, by_path[path], shapes[path], places[path], dtype)
        if sum(array.nbytes for array in group.values()) >= _GROUP_BYTES:
            yield group
            group = {}
    if group:
        yield group


def in_groups(leaves: Mapping[Path, Any]) -> Iterator[dict[Path, Any]]:
    """Splits leaves with shapes and dtypes into groups of the size of those of `stream_params`."""
    group: dict[Path, Any] = {}
    for path, leaf in leaves.items():
        group[path] = leaf
        if sum(one.size * one.dtype.itemsize for one in group.values()) >= _GROUP_BYTES:
            yield group
            group = {}
    if group:
        yield group


def load_params(
    files: TensorFiles,
    slots: Sequence[Slot],
    abstract: Any,
    shardings: Any = None,
    dtype: DTypeLike | None = None,
) -> dict[str, Any]:
    """`stream_params`, all of it, as a tree."""
    return tree_of_groups(stream_params(files, slots, abstract, shardings, dtype))


def tree_of_groups(groups: Iterable[dict[Path, jax.Array]]) -> dict[str, Any]:
    """What `stream_params` yields, as one tree."""
    return tree_of({path: leaf for group in groups for path, leaf in group.items()})


def dtype_of(files: TensorFiles, slots: Sequence[Slot]) -> np.dtype:
    """The dtype that holds all of these tensors: float32 for bfloat16 beside another."""
    dtypes = {files.infos[slot.name].dtype for slot in slots}
    # By jax's rules: numpy's know nothing of bfloat16 beside float16.
    return np.dtype(functools.reduce(jnp.promote_types, dtypes))


def _read(
    files: TensorFiles,
    slots: Sequence[Slot],
    shape: tuple[int, ...],
    sharding: Sharding,
    dtype: DTypeLike | None,
) -> jax.Array:
    """One parameter from its tensors."""
    dtype = np.dtype(dtype) if dtype is not None else dtype_of(files, slots)
    places = {
        device: tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    # Devices that hold the same part share a buffer.
    buffers = {
        place: _aligned([stop - start for start, stop in place], dtype)
        for place in set(places.values())
    }
    for slot in slots:
        tensor = to_ours(files.read(slot.name), slot.layout)
        for place, buffer in buffers.items():
            inside = tuple(slice(*bounds) for bounds in place)
            if slot.layer is None:
                buffer[...] = tensor[inside]
            elif place[0][0] <= slot.layer < place[0][1]:
                buffer[slot.layer - place[0][0]] = tensor[inside[1:]]
        del tensor
    arrays = [jax.device_put(buffers[place], device) for device, place in places.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that a CPU device takes over as it is, where it would copy any other."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def write_params(
    groups: Iterable[Mapping[Path, Any]],
    slots: Sequence[Slot],
    writer: SafetensorsWriter,
    infos: Mapping[str, TensorInfo],
) -> None:
    """Writes parameters under their published names.

    Args:
        groups: Parameters by path, in any grouping and order; each is fetched to the host whole.
        slots: Where their tensors go.
        writer: Takes them.
        infos: The dtype of each tensor in the file.
    """
    by_path: dict[Path, list[Slot]] = {}
    for slot in slots:
        by_path.setdefault(slot.path, []).append(slot)
    for group in groups:
        for path in group:
            array = np.asarray(group[path])
            for slot in by_path[path]:
                part = array if slot.layer is None else array[slot.layer]
                tensor = to_published(part, slot.layout).astype(infos[slot.name].dtype)
                writer.write(slot.name, np.ascontiguousarray(tensor))
        del group, array, part, tensor  # Else they would stay until the next group is there.
