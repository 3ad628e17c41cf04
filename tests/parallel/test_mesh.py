import pytest
from jax.sharding import AxisType

from nextstep_jax.parallel.mesh import AXES, make_mesh, mesh_shape, parse_axes


@pytest.mark.parametrize(
    ("axes", "num_devices", "shape"),
    [
        ({}, 1, (1, 1, 1, 1)),
        ({"data": 8}, 8, (8, 1, 1, 1)),
        ({"fsdp": -1}, 8, (1, 8, 1, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, 8, (2, 2, 1, 2)),
        ({"context": 4, "data": -1}, 8, (2, 1, 4, 1)),
        ({"tensor": 4, "fsdp": 2}, 8, (1, 2, 1, 4)),
        ({"data": -1}, 1, (1, 1, 1, 1)),
    ],
)
def test_mesh_shape(axes, num_devices, shape):
    assert mesh_shape(axes, num_devices) == shape


@pytest.mark.parametrize(
    ("axes", "match"),
    [
        (
            {"model": 2},
            r"\['model'\] are unknown; the axes are \['data', 'fsdp', 'context', 'tensor'\]",
        ),
        ({"data": -1, "fsdp": -1}, "at most one may be -1"),
        ({"data": 0}, "sizes are positive"),
        ({"data": -2}, "sizes are positive"),
        ({"data": 4}, "8 devices"),
        ({"data": 16}, "8 devices"),
        ({"data": 3, "fsdp": -1}, "8 devices"),
        ({"data": 16, "fsdp": -1}, "8 devices"),
    ],
)
def test_mesh_shape_refuses(axes, match):
    with pytest.raises(ValueError, match=match):
        mesh_shape(axes, 8)


def test_make_mesh(devices):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    assert mesh.axis_names == AXES == ("data", "fsdp", "context", "tensor")
    assert mesh.devices.shape == (1, 4, 1, 2)
    # Logical constraints are asserts on Explicit axes, which are jax's default.
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert set(mesh.devices.flat) == set(devices)


def test_everything_lies_on_fsdp_by_default(devices):
    assert make_mesh().devices.shape == (1, 8, 1, 1)
    assert make_mesh(devices=devices[:2]).devices.shape == (1, 2, 1, 1)
    assert make_mesh({"data": 1}, devices[3:4]).devices.flat[0] == devices[3]


def test_parse_axes():
    assert parse_axes("fsdp:16,tensor:4") == {"fsdp": 16, "tensor": 4}
    assert parse_axes("fsdp:-1") == {"fsdp": -1}
    assert parse_axes("") == {}
    for wrong in ("fsdp", "fsdp:", "fsdp=4", "fsdp:2,fsdp:4", "fsdp:x", "fsdp:²"):
        with pytest.raises(ValueError, match="must read like"):
            parse_axes(wrong)


class Chip:
    """What a hybrid mesh asks of a device."""

    platform, device_kind = "cpu", "chip"

    def __init__(self, number, by_slice):
        self.id, self.process_index = number, 0 if by_slice else number // 4
        if by_slice:
            self.slice_index = number // 4


@pytest.mark.parametrize("by_slice", [True, False])
def test_an_axis_across_slices_is_the_outer_part(by_slice):
    """Two slices, or processes, of four: what lies inside one stays next to each other."""
    chips = [Chip(number, by_slice) for number in (4, 0, 5, 1, 6, 2, 7, 3)]

    def numbers(axes, across):
        mesh = make_mesh(axes, chips, across)
        assert mesh.axis_names == AXES
        return [
            [c.id for c in row.flat] for row in mesh.devices.reshape(-1, mesh.devices.shape[-1])
        ]

    assert numbers({"data": 2, "tensor": 4}, {"data": 2}) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    inside = numbers({"fsdp": 4, "tensor": 2}, {"fsdp": 2})
    assert [{n // 4 for n in row} for row in inside] == [{0}, {0}, {1}, {1}]


@pytest.mark.parametrize(
    ("axes", "across", "match"),
    [
        ({"fsdp": 8}, {"data": 2}, r"does not divide \['data'\] of mesh"),
        ({"fsdp": 8}, {"fsdp": 4}, "multiply to the 2 slices there are"),
        ({"data": -1, "fsdp": 4}, {"data": -1, "fsdp": -1}, "sizes are positive"),
        ({"fsdp": 8}, {"pods": 2}, "must name axes of"),
        ({"fsdp": 8}, {"pods": 1}, "must name axes of"),
    ],
)
def test_slices_that_do_not_fit_are_refused(axes, across, match):
    with pytest.raises(ValueError, match=match):
        make_mesh(axes, [Chip(number, True) for number in range(8)], across)
