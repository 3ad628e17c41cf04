"""Device meshes.

Three axes: `data` replicates the parameters, `fsdp` shards parameters and batch alike, `tensor`
splits heads and hidden widths. All are Auto axes: the compiler chooses what the constraints of
`sharding.py` leave open.
"""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


def mesh_shape(axes: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
    """Sizes in the order of `AXES`; absent axes are 1, and one axis may be -1: what is left.

    Raises:
        ValueError: An unknown axis, more than one -1, or sizes that do not multiply to
            `num_devices`.
    """
    unknown = set(axes) - set(AXES)
    if unknown:
        raise ValueError(f"mesh axes {sorted(unknown)} are unknown; the axes are {list(AXES)}")
    sizes = [int(axes.get(name, 1)) for name in AXES]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {dict(axes)}: sizes are positive, and at most one may be -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = num_devices // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != num_devices or 0 in sizes:
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} does not fit the"
            f" {num_devices} devices given"
        )
    return tuple(sizes)


def make_mesh(axes: Mapping[str, int] | None = None, devices: Sequence | None = None) -> Mesh:
    """A mesh over `devices` (default: all); by default everything lies on `fsdp`."""
    devices = list(devices if devices is not None else jax.devices())
    shape = mesh_shape({"fsdp": -1} if axes is None else axes, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
