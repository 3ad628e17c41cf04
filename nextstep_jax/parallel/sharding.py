"""How logical axes lie on the mesh: one table, and what is derived from it.

Weights and activations have names of their own, so that a rule for one never moves the other.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

# Logical axis -> mesh axes. A mesh axis is used once per array, in the order of this table.
RULES: tuple[tuple[str, Any], ...] = (
    # Activations.
    ("act_batch", ("data", "fsdp")),
    ("act_len", None),
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


def rules() -> Any:
    """The context in which `constrain` in the models knows the table."""
    return nn.logical_axis_rules(RULES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def global_rows(
    mesh: Mesh, rows_on: Callable[[jax.Device, slice], Any], shape: tuple[int, ...]
) -> Shaped[Array, "rows ..."]:
    """The array whose rows, over the batch axes of a mesh, are those of all processes in order.

    Transfers are explicit, so that a guard against others lets them pass.

    Args:
        mesh: Where the result lies.
        rows_on: (device, slice) -> some of this process's rows, on the host or on that device.
        shape: Of this process's rows.

    Raises:
        ValueError: The devices of this process do not hold as many rows as it has.
    """
    target = batch_sharding(mesh)
    whole = (shape[0] * jax.process_count(), *shape[1:])
    places = {
        device: index[0].indices(whole[0])[:2]
        for device, index in target.addressable_devices_indices_map(whole).items()
    }
    first = min(start for start, _ in places.values())
    last = max(stop for _, stop in places.values())
    if last - first != shape[0]:
        raise ValueError(
            f"a process has {shape[0]} rows, but its devices hold {last - first} of"
            f" {whole[0]} on mesh {dict(mesh.shape)}: give every process whole rows"
        )
    parts = [
        jax.device_put(rows_on(device, slice(start - first, stop - first)), device)
        for device, (start, stop) in places.items()
    ]
    return jax.make_array_from_single_device_arrays(whole, target, parts)


def tree_shardings(abstract: Any, mesh: Mesh) -> Any:
    """Shardings of an abstract tree whose leaves carry logical names.

    Args:
        abstract: What `jax.eval_shape` says of an init function that keeps Flax's boxes: leaves
            with names are placed by the table, leaves without are replicated.
        mesh: The mesh.

    Returns:
        A tree of NamedSharding in the structure of the unboxed tree.

    Raises:
        ValueError: A logical name that the table does not know.
    """
    known = [name for name, _ in RULES]

    def place(leaf):
        if not isinstance(leaf, nn.Partitioned):
            return replicated(mesh)
        unknown = [name for name in leaf.names if name is not None and name not in known]
        if unknown:
            raise ValueError(f"logical axes {unknown} are not in the sharding table {known}")
        spec = nn.logical_to_mesh_axes(leaf.names, RULES)
        return NamedSharding(mesh, _divisible(spec, leaf.value.shape, mesh))

    return jax.tree.map(place, abstract, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def _divisible(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Leaves a dimension whole that its mesh axes do not divide, and says so."""
    entries = []
    for size, entry in zip(shape, tuple(spec), strict=True):
        names = (entry,) if isinstance(entry, str) else (entry or ())
        ways = math.prod(mesh.shape[name] for name in names)
        if size % ways:
            logging.warning("dimension %d of %s is not sharded %d ways", size, shape, ways)
            entry = None
        entries.append(entry)
    return PartitionSpec(*entries)


def abstract_with_shardings(abstract: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs that carry shardings, for restoring and for ahead-of-time lowering."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(abstract),
        shardings,
    )
