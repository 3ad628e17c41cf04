"""What the tests of the networks share: float64 references in plain numpy, and random parameters.

The references are written from the formulas (loops over heads, complex numbers for the rotation)
and never call the package, so that they can disagree with it. They work on one row at a time and
take the parameters of an unrolled model.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from nextstep_jax.models.attention import Segments
from nextstep_jax.models.config import DecoderConfig
from nextstep_jax.models.decoder import Decoder, unstack_layers


def _float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def _silu(x):
    return x / (1 + np.exp(-x))


def _rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def _layer_norm(x, eps, scale=1.0, bias=0.0):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def _dense(params, x):
    return x @ params["kernel"] + params.get("bias", 0.0)


def _rope(x, positions, theta):
    """x (length, heads, head_dim): pairs (i, i + half) as complex numbers, turned by the angle."""
    half = x.shape[-1] // 2
    frequency = np.array([theta ** (-2 * i / x.shape[-1]) for i in range(half)])
    turn = np.exp(1j * np.asarray(positions, np.float64)[:, None, None] * frequency)
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([z.real, z.imag], axis=-1)


def _attention(q, k, v, sees):
    """q (T, heads, d), k and v (S, kv_heads, d); sees(i, j) says whether query i reads key j."""
    out = np.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        for i in range(q.shape[0]):
            keys = [j for j in range(k.shape[0]) if sees(i, j)]
            scores = np.array([q[i, head] @ k[j, head // group] for j in keys])
            weights = np.exp((scores - scores.max()) / np.sqrt(q.shape[-1]))
            weights /= weights.sum()
            out[i, head] = sum(w * v[j, head // group] for w, j in zip(weights, keys, strict=True))
    return out


def _decoder(params, config, x, positions=None, segment_ids=None):
    """One row (length, embed) through all blocks and the final norm."""
    params, x = _float64(params), np.asarray(x, np.float64)
    length = x.shape[0]
    positions = np.arange(length) if positions is None else positions
    segment_ids = np.ones(length) if segment_ids is None else segment_ids

    def sees(i, j):
        return j <= i and segment_ids[i] == segment_ids[j]

    for layer in range(config.num_layers):
        p = params[f"layers_{layer}"]
        h = _rms_norm(x, p["input_norm"]["scale"], config.rms_norm_eps)
        q, k, v = (
            _dense(p["attn"][name], h).reshape(length, -1, config.head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = (_rope(y, positions, config.rope_theta) for y in (q, k))
        x = x + _dense(p["attn"]["o_proj"], _attention(q, k, v, sees).reshape(length, -1))
        h = _rms_norm(x, p["post_attention_norm"]["scale"], config.rms_norm_eps)
        mlp = p["mlp"]
        h = _silu(_dense(mlp["gate_proj"], h)) * _dense(mlp["up_proj"], h)
        x = x + _dense(mlp["down_proj"], h)
    return _rms_norm(x, params["final_norm"]["scale"], config.rms_norm_eps)


def _flow_head(params, config, x, time, condition):
    """Velocity of noisy tokens x (rows, token) at times (rows,) under conditions (rows, cond)."""
    params = _float64(params)
    x, time, condition = (np.asarray(a, np.float64) for a in (x, time, condition))
    half = config.frequency_dim // 2
    frequency = np.array([config.max_period ** (-i / half) for i in range(half)])
    angle = time[:, None] * frequency
    sinusoid = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    time_embedding = _dense(params["time_out"], _silu(_dense(params["time_in"], sinusoid)))
    y = _silu(time_embedding + _dense(params["cond_embed"], condition))
    h = _dense(params["input_proj"], x)
    for i in range(config.num_layers):
        p = params[f"blocks_{i}"]
        shift, scale, gate = np.split(_dense(p["modulation"], y), 3, axis=-1)
        normed = _layer_norm(h, config.norm_eps, p["norm"]["scale"], p["norm"]["bias"])
        inner = _dense(p["mlp_in"], normed * (1 + scale) + shift)
        h = h + gate * _dense(p["mlp_out"], _silu(inner))
    shift, scale = np.split(_dense(params["final_modulation"], y), 2, axis=-1)
    return _dense(params["final_proj"], _layer_norm(h, config.norm_eps) * (1 + scale) + shift)


@pytest.fixture(scope="session")
def reference():
    """The float64 references by name."""
    return types.SimpleNamespace(
        silu=_silu,
        rms_norm=_rms_norm,
        layer_norm=_layer_norm,
        rope=_rope,
        attention=_attention,
        decoder=_decoder,
        flow_head=_flow_head,
    )


@pytest.fixture(scope="session")
def relative_error():
    """max|a - b| / max|b|, of two arrays or of two trees leaf by leaf (the largest)."""

    def error(actual, expected):
        def of_leaf(a, b):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert a.shape == b.shape
            return float(np.abs(a - b).max() / np.abs(b).max())

        return max(jax.tree.leaves(jax.tree.map(of_leaf, actual, expected)))

    return error


@pytest.fixture(scope="session")
def randomise():
    """Replaces parameters (or their shapes) by unboxed random ones of order one in effect.

    The published initialisation has zeros and ones, with which many errors would not show.
    """

    def fill(tree, seed):
        flat, treedef = jax.tree_util.tree_flatten_with_path(nn.unbox(tree))
        leaves = []
        for number, (path, leaf) in enumerate(flat):
            noise = np.random.default_rng([seed, number]).standard_normal(leaf.shape)
            name = path[-1].key
            if name == "kernel":
                noise /= np.sqrt(leaf.shape[-2])
            elif name in ("scale", "bias"):
                noise = 0.2 * noise + (name == "scale")
            leaves.append(jnp.asarray(noise, jnp.float32))
        return jax.tree_util.tree_unflatten(treedef, leaves)

    return fill


@pytest.fixture(scope="session")
def decoders(randomise):
    """Makes and keeps decoders: (config) -> config, modules, parameters and jitted forwards.

    Both forwards are (params, x, positions, segment_ids) -> hidden states.
    """
    made = {}

    def forward(module):
        def run(params, x, positions, segment_ids):
            segments = Segments.of_row(segment_ids)
            return module.apply({"params": params}, x, positions, segments)[0]

        return run

    def make(config: DecoderConfig):
        if config in made:
            return made[config]
        scanned, unrolled = Decoder(config), Decoder(config, scan_layers=False)
        x = jax.ShapeDtypeStruct((1, 2, config.embed_dim), np.float32)
        ids = jax.ShapeDtypeStruct((1, 2), np.int32)
        shapes = jax.eval_shape(
            lambda x, ids: scanned.init(jax.random.key(0), x, ids, Segments.of_row(ids)), x, ids
        )
        stacked = randomise(shapes["params"], seed=1)
        made[config] = types.SimpleNamespace(
            config=config,
            scanned=scanned,
            unrolled=unrolled,
            stacked_params=stacked,
            layer_params=unstack_layers(stacked),
            scanned_forward=jax.jit(forward(scanned)),
            unrolled_forward=jax.jit(forward(unrolled)),
        )
        return made[config]

    return make


@pytest.fixture(scope="session")
def tiny_decoder_config():
    """A decoder whose widths are all different, and head_dim is not embed_dim / num_heads."""
    return DecoderConfig(
        vocab_size=23,
        embed_dim=20,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        mlp_dim=28,
        rope_theta=100.0,
    )
