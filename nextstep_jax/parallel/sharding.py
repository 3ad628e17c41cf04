"""How logical axes lie on the mesh: one table, and what is derived from it.

Weights and activations have names of their own, so that a rule for one never moves the other.
"""

import itertools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

# Logical axis -> mesh axes. A mesh axis is used once per array, in the order of this table.
RULES: tuple[tuple[str, Any], ...] = (
    # Activations.
    ("act_batch", ("data", "fsdp")),
    ("act_len", "context"),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
    # Weights of the decoder.
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
    ("layers", None),
    ("norm", None),
    # Weights of the flow head.
    ("flow_mlp", "tensor"),
    ("flow", "fsdp"),
    ("token", None),
)
BATCH_AXES = ("data", "fsdp")
LENGTH_AXIS = "context"
# A parameter that every device holds whole is reported from this size on. Ours: the norms and
# biases of a 14B model, stacked, stay below it.
_LARGE_BYTES = 8 * 2**20
# Long lists in a message help nobody.
_MAX_LISTED = 4


def rules() -> Any:
    """The context in which `constrain` in the models knows the table."""
    return nn.logical_axis_rules(RULES)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh | AbstractMesh, *, has_length: bool = False) -> NamedSharding:
    """The leading axis over the data and fsdp axes, and the length, if any, over context."""
    axes = (BATCH_AXES, LENGTH_AXIS) if has_length else (BATCH_AXES,)
    return NamedSharding(mesh, PartitionSpec(*axes))


def global_rows(
    mesh: Mesh,
    part_on: Callable[[jax.Device, tuple[slice, ...]], Any],
    shape: tuple[int, ...],
    *,
    has_length: bool = False,
) -> Shaped[Array, "rows ..."]:
    """The array whose rows, over the batch axes of a mesh, are those of all processes.

    They stand in the order of the processes where the devices of each are neighbours on the mesh.
    Transfers are explicit, so that a guard against others lets them pass.

    Args:
        mesh: Where the result lies.
        part_on: (device, slices) -> a part of this process's rows, on the host or on that device.
        shape: Of this process's rows.
        has_length: The second axis is the length of a row, and is laid over context.

    Raises:
        ValueError: The devices of this process do not hold as many rows as it has, or the mesh
            does not divide the length.
    """
    target = batch_sharding(mesh, has_length=has_length)
    ways = mesh.shape[LENGTH_AXIS]
    if has_length and shape[1] % ways:
        raise ValueError(
            f"rows of length {shape[1]} do not divide over mesh axis {LENGTH_AXIS!r} of {ways}"
        )
    whole = (shape[0] * jax.process_count(), *shape[1:])
    places = {
        device: tuple(slice(*part.indices(n)[:2]) for part, n in zip(index, whole, strict=True))
        for device, index in target.addressable_devices_indices_map(whole).items()
    }
    # The devices of a process need not be neighbours on the mesh: on a torus they often are not.
    blocks = sorted({(rows.start, rows.stop) for rows, *_ in places.values()})
    starts = dict(
        zip(blocks, itertools.accumulate((b - a for a, b in blocks), initial=0), strict=False)
    )
    held = sum(b - a for a, b in blocks)
    if held != shape[0]:
        raise ValueError(
            f"a process has {shape[0]} rows, but its devices hold {held} of"
            f" {whole[0]} on mesh {dict(mesh.shape)}: give every process whole rows"
        )

    def local(rows, *rest):
        start = starts[rows.start, rows.stop]
        return (slice(start, start + rows.stop - rows.start), *rest)

    parts = [
        jax.device_put(part_on(device, local(*place)), device) for device, place in places.items()
    ]
    return jax.make_array_from_single_device_arrays(whole, target, parts)


def tree_shardings(abstract: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings of an abstract tree whose leaves carry logical names.

    Args:
        abstract: What `jax.eval_shape` says of an init function that keeps Flax's boxes: leaves
            with names are placed by the table, leaves without are replicated, boxes around
            something without a shape lose the box.
        mesh: The mesh.

    Returns:
        A tree of NamedSharding in the structure of the unboxed tree.

    Raises:
        ValueError: A logical name that the table does not know.
    """
    known = [name for name, _ in RULES]

    def place(path, leaf):
        if not isinstance(leaf, nn.Partitioned):
            return replicated(mesh)
        if not hasattr(leaf.value, "shape"):  # optax's mark of a parameter it leaves alone
            return leaf.value
        name = _path_name(path)
        unknown = [axis for axis in leaf.names if axis is not None and axis not in known]
        if unknown:
            raise ValueError(
                f"{name}: logical axes {unknown} are not in the sharding table {known}"
            )
        spec = nn.logical_to_mesh_axes(leaf.names, RULES)
        fitting = _divisible(spec, leaf.value.shape, mesh)
        if fitting != spec:
            whole.append(f"{name} {leaf.value.shape}")
        return NamedSharding(mesh, fitting)

    whole: list[str] = []
    shardings = jax.tree_util.tree_map_with_path(
        place, abstract, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )
    if whole:
        more = f" and {len(whole) - _MAX_LISTED} more" if len(whole) > _MAX_LISTED else ""
        listed = "; ".join(whole[:_MAX_LISTED]) + more
        logging.warning("mesh %s does not divide %s: not sharded", dict(mesh.shape), listed)
    return shardings


def _path_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _divisible(spec: PartitionSpec, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """The spec without the mesh axes that do not divide their dimension."""
    entries = []
    for size, entry in zip(shape, tuple(spec), strict=True):
        names = (entry,) if isinstance(entry, str) else (entry or ())
        ways = math.prod(mesh.shape[name] for name in names)
        entries.append(None if size % ways else entry)
    return PartitionSpec(*entries)


def large_replicated(
    abstract: Any, mesh: Mesh | AbstractMesh, least_bytes: int = _LARGE_BYTES
) -> list[tuple[str, int]]:
    """Paths and bytes of the large leaves that every device of a mesh with shards would hold whole.

    Args:
        abstract: ShapeDtypeStructs with shardings.
        mesh: The mesh they lie on.
        least_bytes: What counts as large.

    Returns:
        The largest first; nothing on a mesh that only replicates.
    """
    if math.prod(size for name, size in mesh.shape.items() if name != "data") == 1:
        return []
    found = [
        (_path_name(path), math.prod(leaf.shape) * leaf.dtype.itemsize)
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
        if leaf.sharding.is_fully_replicated
    ]
    return sorted((one for one in found if one[1] >= least_bytes), key=lambda one: -one[1])


def abstract_with_shardings(abstract: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs that carry shardings, for restoring and for ahead-of-time lowering."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(abstract),
        shardings,
    )
