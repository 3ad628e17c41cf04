"""Device meshes.

Four axes: `data` replicates the parameters, `fsdp` shards parameters and batch alike, `context`
splits the length of a row, `tensor` splits heads and hidden widths. The later an axis stands, the
nearer its devices lie. All are Auto axes: the compiler chooses what the constraints of
`sharding.py` leave open.
"""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "context", "tensor")


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


def parse_axes(text: str) -> dict[str, int]:
    """The axes of "fsdp:16,tensor:4", as programs take them on the command line.

    Raises:
        ValueError: Something else is written.
    """
    axes = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.strip().partition(":")
        if name in axes or not size.removeprefix("-").isdecimal():
            raise ValueError(f"mesh {text!r} must read like fsdp:16,tensor:4")
        axes[name] = int(size)
    return axes


def make_mesh(
    axes: Mapping[str, int] | None = None,
    devices: Sequence | None = None,
    across_slices: Mapping[str, int] | None = None,
) -> Mesh:
    """A mesh over devices.

    Args:
        axes: Axis -> size over all devices; by default everything lies on `fsdp`.
        devices: By default all there are.
        across_slices: Axis -> how many ways it is cut over the slow network, between TPU slices
            or, where devices know no slices, between processes (the nodes of a cluster). The rest
            of an axis lies inside a slice. By default the devices are taken as one slice.

    Raises:
        ValueError: See `mesh_shape`; or the cuts do not divide their axes, or do not multiply to
            the number of slices there are.
    """
    devices = list(devices if devices is not None else jax.devices())
    shape = mesh_shape({"fsdp": -1} if axes is None else axes, len(devices))
    types = (AxisType.Auto,) * len(AXES)
    across_slices = dict(across_slices or {})
    if any(size < 1 for size in across_slices.values()):
        raise ValueError(f"across_slices {across_slices}: sizes are positive")
    outer = tuple(across_slices.get(name, 1) for name in AXES)
    if math.prod(outer) == 1 and set(across_slices) <= set(AXES):
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)

    by_process = getattr(devices[0], "slice_index", None) is None
    groups = {d.process_index if by_process else d.slice_index for d in devices}
    if set(across_slices) - set(AXES) or math.prod(outer) != len(groups):
        raise ValueError(
            f"across_slices {across_slices} must name axes of {list(AXES)} and multiply to the"
            f" {len(groups)} {'processes' if by_process else 'slices'} there are"
        )
    uneven = [name for name, n, k in zip(AXES, shape, outer, strict=True) if n % k]
    if uneven:
        raise ValueError(
            f"across_slices {across_slices} does not divide {uneven} of mesh"
            f" {dict(zip(AXES, shape, strict=True))}"
        )
    grid = mesh_utils.create_hybrid_device_mesh(
        tuple(n // k for n, k in zip(shape, outer, strict=True)),
        outer,
        devices,
        process_is_granule=by_process,
    )
    return Mesh(grid, AXES, axis_types=types)
