"""A run so small that its step compiles in seconds, and what it is made of."""

import copy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextstep_jax.data import text_tokenizer
from nextstep_jax.models.config import VAEConfig
from nextstep_jax.models.vae import VAE
from nextstep_jax.training import experiment

TINY = {
    "image_size": 32,
    "model": {
        "size": "tiny",
        "decoder": {
            "vocab_size": 272,
            "embed_dim": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "mlp_dim": 64,
        },
        "flow_head": {"width": 32, "num_layers": 1, "frequency_dim": 32, "draws_per_token": 2},
    },
    "sources": {"pair": {"type": "shapes", "kind": "pair", "level": "easy"}},
    "data": {
        "row_length": 96,
        "rows_per_batch": 8,
        "max_image_tokens": 16,
        "num_open_rows": 8,
        "num_threads": 1,
    },
    "layout": {"square_only": True, "capitalize_prob": 0.0},
    "loss": {"text_chunk": 40, "images_per_encode": 1},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 4, "ema_decay": 0.9},
    "loop": {"num_steps": 8, "checkpoint_every": 4, "log_every": 1},
}
TINY_VAE = {
    "channels": 4,
    "channel_multipliers": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "num_groups": 2,
}


@pytest.fixture(scope="session")
def make_config():
    """(section={changes}, ...) -> the tiny experiment with changes, as plain values."""

    def make(**changes):
        config = copy.deepcopy(TINY)
        for section, values in changes.items():
            config.setdefault(section, {}).update(values)
        return config

    return make


@pytest.fixture(scope="session")
def tokenizer():
    """Bytes only."""
    return text_tokenizer.train_bpe([], len(text_tokenizer.SPECIAL_TOKENS) + 256)


@pytest.fixture(scope="session")
def vae(make_vae):
    """An untrained image tokenizer and its parameters, which lie on the first device."""
    return make_vae()


@pytest.fixture(scope="session")
def make_vae():
    """(field=value, ...) -> the untrained image tokenizer with changes."""
    return _make_vae


def _make_vae(**changes):
    module = VAE(experiment.build(VAEConfig, {**TINY_VAE, **changes}, "vae"))
    shapes = jax.eval_shape(module.init, jax.random.key(7), jnp.zeros((1, 32, 32, 3)))["params"]
    params = _fill(shapes)
    return types.SimpleNamespace(
        module=module, params=jax.device_put(params, jax.devices("cpu")[0])
    )


def _fill(shapes):
    """Random parameters; compiling `init` would take longer than all that is done with it."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    filled = []
    for number, (path, leaf) in enumerate(leaves):
        noise = np.random.default_rng([7, number]).standard_normal(leaf.shape)
        if path[-1].key == "kernel":
            # The last axis but one, or for a convolution all before the last, is summed over.
            noise /= np.sqrt(np.prod(leaf.shape[:-1]) if len(leaf.shape) == 4 else leaf.shape[-2])
        else:
            noise = 0.2 * noise + (path[-1].key == "scale")
        filled.append(np.float32(noise))
    return jax.tree_util.tree_unflatten(treedef, filled)


@pytest.fixture(scope="session")
def fill():
    """Shapes -> random parameters of order one in effect; zeros and ones hide errors."""
    return _fill


@pytest.fixture(scope="session")
def make_task(make_config, tokenizer, vae):
    """(section={changes}, ...) -> task and loop config of the tiny experiment."""

    def make(**changes):
        config = make_config(**changes)
        return experiment.build_nextstep_task(config, vae.module, vae.params, tokenizer)

    return make


@pytest.fixture(scope="session")
def relative_error():
    """The largest max|a - b| / max|b| over the leaves of two trees; zeros must be zeros."""

    def error(actual, expected):
        def of_leaf(a, b):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert a.shape == b.shape
            difference, scale = np.abs(a - b).max(), np.abs(b).max()
            return float(difference / scale if scale else difference)

        return max(jax.tree.leaves(jax.tree.map(of_leaf, actual, expected)))

    return error
