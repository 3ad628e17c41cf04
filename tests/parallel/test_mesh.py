import pytest
from jax.sharding import AxisType

from nextstep_jax.parallel.mesh import AXES, make_mesh, mesh_shape


@pytest.mark.parametrize(
    ("axes", "num_devices", "shape"),
    [
        ({}, 1, (1, 1, 1)),
        ({"data": 8}, 8, (8, 1, 1)),
        ({"fsdp": -1}, 8, (1, 8, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, 8, (2, 2, 2)),
        ({"tensor": 4, "fsdp": 2}, 8, (1, 2, 4)),
        ({"data": -1}, 1, (1, 1, 1)),
    ],
)
def test_mesh_shape(axes, num_devices, shape):
    assert mesh_shape(axes, num_devices) == shape


@pytest.mark.parametrize(
    ("axes", "match"),
    [
        ({"model": 2}, r"\['model'\] are unknown; the axes are \['data', 'fsdp', 'tensor'\]"),
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
    assert mesh.axis_names == AXES == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == (1, 4, 2)
    # Logical constraints are asserts on Explicit axes, which are jax's default.
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert set(mesh.devices.flat) == set(devices)


def test_everything_lies_on_fsdp_by_default(devices):
    assert make_mesh().devices.shape == (1, 8, 1)
    assert make_mesh(devices=devices[:2]).devices.shape == (1, 2, 1)
    assert make_mesh({"data": 1}, devices[3:4]).devices.flat[0] == devices[3]
