"""Annotated shapes are checked in the test run, and only there."""

import importlib
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from nextstep_jax.models import layers

# A state and a function as the package writes them. jax rebuilds a state with whatever a
# transformation puts in place of its arrays (None, shardings, axes of vmap), so states are
# excepted from the check of their constructor; functions of them are not.
_MODULE = """
from typing import no_type_check

import flax.struct
from jaxtyping import Array, Float


@no_type_check
@flax.struct.dataclass
class Excepted:
    x: Float[Array, "batch embed"]


@flax.struct.dataclass
class Checked:
    x: Float[Array, "batch embed"]


def double(state: Excepted, scale: Float[Array, " embed"]) -> Excepted:
    return state.replace(x=2 * state.x * scale)
"""


@pytest.fixture
def states(tmp_path, monkeypatch):
    """The module above, imported with its calls checked."""
    (tmp_path / "states_of_a_test.py").write_text(_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    with jaxtyping.install_import_hook("states_of_a_test", "beartype.beartype"):
        yield importlib.import_module("states_of_a_test")
    del sys.modules["states_of_a_test"]


def test_wrong_shape_fails():
    x = jnp.ones((2, 3))
    assert layers.rms_norm(x, jnp.ones(3), 1e-6).shape == (2, 3)
    # Without the check this would broadcast and pass unseen.
    with pytest.raises(jaxtyping.TypeCheckError, match="scale"):
        layers.rms_norm(x, jnp.ones(1), 1e-6)


def test_wrong_dtype_fails():
    with pytest.raises(jaxtyping.TypeCheckError):
        layers.rms_norm(jnp.ones((2, 3), jnp.int32), jnp.ones(3), 1e-6)


def test_wrong_shape_fails_under_jit():
    with pytest.raises(jaxtyping.TypeCheckError):
        jax.eval_shape(lambda x, s: layers.rms_norm(x, s, 1e-6), jnp.ones((2, 3)), jnp.ones(1))


def test_users_pay_nothing():
    program = """
        import jax.numpy as jnp
        from nextstep_jax.models import layers
        print(layers.rms_norm(jnp.ones((2, 3)), jnp.ones(1), 1e-6).shape)
        assert not hasattr(layers.rms_norm, "__wrapped__")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 3)"


def test_excepted_state_goes_through_transformations(states):
    state = states.Excepted(jnp.ones((2, 3)))
    assert jax.tree.map(lambda x: None, state).x is None
    assert jax.vmap(lambda i: state)(jnp.arange(4)).x.shape == (4, 2, 3)
    assert jax.eval_shape(states.double, state, jnp.ones(3)).x.shape == (2, 3)
    with pytest.raises(jaxtyping.TypeCheckError):
        states.double(state, jnp.ones((3, 1)))


def test_checked_state_would_not(states):
    """The reason for the exception: if this no longer raises, it can go."""
    with pytest.raises(jaxtyping.TypeCheckError):
        jax.tree.map(lambda x: None, states.Checked(jnp.ones((2, 3))))
