"""Where every parameter of the 14B model lies on named meshes, as once looked at and kept.

    python -m tests.parallel.test_specs        writes specs.json anew, after a change of the rules

A line is a parameter's path, its shape and its spec, the first letter of a mesh axis for each
dimension and a dot for none. The blocks of the flow head are one line.
"""

import json
import math
import pathlib
import re

import jax
import pytest

from nextstep_jax.models.config import nextstep_config
from nextstep_jax.models.nextstep import NextStep, init_params
from nextstep_jax.parallel import sharding
from nextstep_jax.parallel.mesh import AXES, mesh_shape

GOLDEN = pathlib.Path(__file__).parent / "specs.json"
# data x fsdp x context x tensor.
MESHES = ("64x1x1x1", "1x64x1x1", "1x16x1x4", "2x8x2x4", "1x3x1x7")


def shapes():
    model = NextStep(nextstep_config("14b"))
    return jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))


def specs(name, boxed):
    """Path -> shape and spec, on a mesh of devices that nobody has."""
    sizes = [int(size) for size in name.split("x")]
    mesh = jax.sharding.AbstractMesh(
        mesh_shape(dict(zip(AXES, sizes, strict=True)), math.prod(sizes)), AXES
    )
    placed = sharding.tree_shardings(boxed, mesh)
    lines = {}
    leaves = jax.tree_util.tree_leaves_with_path(sharding.abstract_with_shardings(boxed, placed))
    for path, leaf in leaves:
        letters = "".join(entry[0] if entry else "." for entry in leaf.sharding.spec)
        shape = "x".join(map(str, leaf.shape))
        key = re.sub(
            r"blocks_\d+", "blocks_*", jax.tree_util.keystr(path, simple=True, separator="/")
        )
        assert lines.setdefault(key, f"{shape} {letters}") == f"{shape} {letters}", key
    return lines


@pytest.fixture(scope="module")
def boxed():
    return shapes()


@pytest.mark.parametrize("name", MESHES)
def test_specs_are_those_written_down(name, boxed):
    assert specs(name, boxed) == json.loads(GOLDEN.read_text())[name]


def test_large_parameters_are_cut_all_ways(boxed):
    """On 16 x 4 every matrix of the decoder lies on both axes, and no device has 2% of it."""
    golden = json.loads(GOLDEN.read_text())["1x16x1x4"]
    for path, line in golden.items():
        if path.startswith("decoder/") and path.endswith("kernel"):
            assert sorted(line.split()[1].replace(".", "")) == ["f", "t"], path


if __name__ == "__main__":
    tree = shapes()
    GOLDEN.write_text(json.dumps({name: specs(name, tree) for name in MESHES}, indent=1) + "\n")
