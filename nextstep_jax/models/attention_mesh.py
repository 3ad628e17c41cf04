"""Where attention runs: the mesh and the sharding rules in scope, and kernels on each device.

A kernel that the compiler cannot partition runs under `jax.shard_map`: rows over the axes of
`act_batch`, queries over those of `act_len`, heads and kv heads over those of `act_heads`. Every
device holds all keys of its rows and heads, so that no kernel has to communicate.

Axes: batch, T query positions, S key positions, heads, kv_heads, head_dim.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class AttentionLayout:
    """Mesh axes of attention's dimensions, and into how many parts they cut them."""

    batch: tuple[str, ...]
    length: tuple[str, ...]
    heads: tuple[str, ...]
    batch_ways: int
    length_ways: int
    heads_ways: int

    def undivided(
        self,
        q: Float[Array, "batch T heads head_dim"],
        k: Float[Array, "batch S kv_heads head_dim"],
    ) -> str:
        """What the mesh does not divide, in words; empty where it divides all."""
        batch, length, heads, _ = q.shape
        sizes = (
            ("batch", batch, self.batch, self.batch_ways),
            ("length", length, self.length, self.length_ways),
            ("heads", heads, self.heads, self.heads_ways),
            ("kv_heads", k.shape[2], self.heads, self.heads_ways),
        )
        faults = [
            f"{name}={size} is not a multiple of the {ways} parts of mesh axes {list(axes)}"
            for name, size, axes, ways in sizes
            if size % ways
        ]
        return "; ".join(faults)


def target_platform() -> str:
    """The platform that is compiled for: that of the mesh in scope, or else of the first device.

    When compiling ahead of time for a topology the first device is not the target; the mesh is.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def layout_in_scope(needed_by: str | None = None) -> AttentionLayout | None:
    """How attention lies on the mesh in scope, by the sharding rules in scope.

    Args:
        needed_by: Name of a kernel that the compiler cannot cut by itself.

    Returns:
        None where there is nothing to cut: no mesh, one device, already one device's part, or no
        rules.

    Raises:
        ValueError: A mesh of several devices, and no rules for a kernel that needs them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return None
    if not nn.get_logical_axis_rules():
        if needed_by is None:
            return None
        raise ValueError(
            f"attention implementation {needed_by!r} on a mesh of {mesh.size} devices needs"
            " sharding rules in scope: nn.logical_axis_rules with act_batch, act_len, act_heads"
        )
    spec = nn.logical_to_mesh_axes(("act_batch", "act_len", "act_heads"))
    axes = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    ways = [math.prod(mesh.shape[name] for name in names) for names in axes]
    return AttentionLayout(*axes, *ways)


def on_each_device(
    kernel: Callable[..., Any],
    layout: AttentionLayout,
    q: Float[Array, "batch T heads head_dim"],
    k: Float[Array, "batch S kv_heads head_dim"],
    v: Float[Array, "batch S kv_heads head_dim"],
    q_segments: Int[Array, "batch T"],
    kv_segments: Int[Array, "batch S"],
    state: Any = (),
    state_spec: Any = (),
) -> Float[Array, "batch T heads head_dim"]:
    """Runs a kernel on each device's rows, queries and heads, and on all their keys.

    Args:
        kernel: (q, k, v, q_segments, kv_segments, index of the first query, state) -> result.
        layout: Of the mesh in scope; it must divide the arrays.
        q: Queries.
        k: Keys.
        v: Values.
        q_segments: The segment of each query.
        kv_segments: The segment of each key.
        state: A tree that the kernel needs besides.
        state_spec: Partition specs of that tree.
    """

    def run(q, k, v, q_segments, kv_segments, state):
        part = lax.axis_index(layout.length) if layout.length_ways > 1 else 0
        return kernel(q, k, v, q_segments, kv_segments, part * q.shape[1], state)

    batch, length, heads = (axes or None for axes in (layout.batch, layout.length, layout.heads))
    queries, keys = PartitionSpec(batch, length, heads), PartitionSpec(batch, None, heads)
    specs = (queries, keys, keys, PartitionSpec(batch, length), PartitionSpec(batch), state_spec)
    # Kernels do not say over which axes their results vary, hence no check of it.
    sharded = jax.shard_map(run, in_specs=specs, out_specs=queries, check_vma=False)
    return sharded(q, k, v, q_segments, kv_segments, state)
