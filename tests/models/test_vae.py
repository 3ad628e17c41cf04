"""The image autoencoder against explicit loops and a float64 numpy implementation of the layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextstep_jax.models import vae
from nextstep_jax.models.config import VAEConfig

# Two widths and one level without a change of width, so that both kinds of shortcut occur.
TINY = VAEConfig(
    channels=8,
    channel_multipliers=(1, 2, 2),
    num_res_blocks=1,
    latent_channels=4,
    num_groups=4,
    norm_patch_size=None,
)


def _draw(*seed_and_shape):
    """Standard normal float32 values; the last argument is the shape."""
    *seed, shape = seed_and_shape
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _random_params(config, seed):
    """Parameters in which no scale is one and no bias zero, so that each of them is seen."""
    rng = np.random.default_rng(seed)
    images = jax.ShapeDtypeStruct((1, 16, 16, config.in_channels), jnp.float32)
    shapes = jax.eval_shape(vae.VAE(config).init, jax.random.key(0), images)["params"]

    def fill(path, leaf):
        values = rng.standard_normal(leaf.shape)
        kind = path[-1].key
        if kind == "kernel":
            values /= np.sqrt(np.prod(leaf.shape[:-1]))
        elif kind == "scale":
            values = 1 + 0.3 * values
        else:
            values *= 0.3
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def _apply(config, params, method, *args, dtype=jnp.float32, **kwargs):
    module = vae.VAE(config, dtype)
    run = jax.jit(lambda params, *arrays: module.apply(params, *arrays, method=method, **kwargs))
    return run({"params": params}, *args)


def _relative_error(value, reference):
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert value.shape == reference.shape
    return np.abs(value - reference).max() / np.abs(reference).max()


# An independent implementation in float64; sums over explicit windows.


def _np_conv(x, p, stride=1, pad=None):
    """Convolution with `pad` = (top, bottom, left, right)."""
    kernel, bias = np.asarray(p["kernel"], np.float64), np.asarray(p["bias"], np.float64)
    size = kernel.shape[0]
    top, bottom, left, right = pad or (size // 2,) * 4
    batch, height, width, _ = x.shape
    padded = np.zeros((batch, height + top + bottom, width + left + right, x.shape[-1]))
    padded[:, top : top + height, left : left + width] = x
    out_height = (padded.shape[1] - size) // stride + 1
    out_width = (padded.shape[2] - size) // stride + 1
    out = np.empty((batch, out_height, out_width, kernel.shape[-1]))
    for i in range(out_height):
        for j in range(out_width):
            window = padded[:, i * stride : i * stride + size, j * stride : j * stride + size]
            out[:, i, j] = np.tensordot(window, kernel, axes=3) + bias
    return out


def _np_group_norm(x, p, num_groups, eps=1e-6):
    out = np.empty(x.shape)
    per_group = x.shape[-1] // num_groups
    for row in range(x.shape[0]):
        for group in range(num_groups):
            span = slice(group * per_group, (group + 1) * per_group)
            values = x[row, :, :, span].astype(np.float64)
            out[row, :, :, span] = (values - values.mean()) / np.sqrt(values.var() + eps)
    return out * np.asarray(p["scale"], np.float64) + np.asarray(p["bias"], np.float64)


def _np_silu(x):
    return x / (1 + np.exp(-x))


def _np_residual(x, p, groups):
    hidden = _np_conv(_np_silu(_np_group_norm(x, p["norm1"], groups)), p["conv1"])
    hidden = _np_conv(_np_silu(_np_group_norm(hidden, p["norm2"], groups)), p["conv2"])
    return hidden + (_np_conv(x, p["nin_shortcut"]) if "nin_shortcut" in p else x)


def _np_attention(x, p, groups):
    batch, height, width, channels = x.shape
    normed = _np_group_norm(x, p["norm"], groups).reshape(batch, height * width, channels)
    project = {
        name: np.asarray(p[name]["kernel"], np.float64)[0, 0]
        for name in ("q", "k", "v", "proj_out")
    }
    q, k, v = (normed @ project[n] + np.asarray(p[n]["bias"]) for n in "qkv")
    out = np.empty(q.shape)
    for row in range(batch):
        logits = q[row] @ k[row].T / np.sqrt(channels)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[row] = weights / weights.sum(axis=1, keepdims=True) @ v[row]
    out = out @ project["proj_out"] + np.asarray(p["proj_out"]["bias"])
    return x + out.reshape(x.shape)


def _np_middle(x, p, groups):
    x = _np_residual(x, p["mid_block_1"], groups)
    return _np_residual(_np_attention(x, p["mid_attn_1"], groups), p["mid_block_2"], groups)


def _np_encoder(images, p, config):
    groups, levels = config.num_groups, len(config.channel_multipliers)
    x = _np_conv(images, p["conv_in"])
    for level in range(levels):
        for block in range(config.num_res_blocks):
            x = _np_residual(x, p[f"down_{level}_block_{block}"], groups)
        if level + 1 < levels:
            x = _np_conv(x, p[f"down_{level}_downsample"]["conv"], 2, (0, 1, 0, 1))
    x = _np_middle(x, p, groups)
    return _np_conv(_np_silu(_np_group_norm(x, p["norm_out"], groups)), p["conv_out"])


def _np_decoder(latents, p, config):
    groups = config.num_groups
    x = _np_middle(_np_conv(latents, p["conv_in"]), p, groups)
    for level in reversed(range(len(config.channel_multipliers))):
        for block in range(config.num_res_blocks + 1):
            x = _np_residual(x, p[f"up_{level}_block_{block}"], groups)
        if level:
            x = np.kron(x, np.ones((1, 2, 2, 1)))
            x = _np_conv(x, p[f"up_{level}_upsample"]["conv"])
    return _np_conv(_np_silu(_np_group_norm(x, p["norm_out"], groups)), p["conv_out"])


# Pixels.


def test_pixels_roundtrip_and_rounding():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    images = vae.from_uint8(pixels)
    assert images.dtype == jnp.float32
    np.testing.assert_allclose(images.min(), -1.0, atol=1e-7)
    np.testing.assert_allclose(images.max(), 1.0, atol=1e-7)
    np.testing.assert_array_equal(vae.to_uint8(images), pixels)
    values = jnp.asarray([-3.0, -1.0, -0.001, 0.001, 0.2, 1.0, 7.0]).reshape(1, 7, 1)
    # x / 2 + 0.5, clamped, times 255, rounded.
    expected = np.array([0, 0, 127, 128, 153, 255, 255], np.uint8).reshape(1, 7, 1)
    np.testing.assert_array_equal(vae.to_uint8(values), expected)


# Layers.


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_group_norm(mean):
    features = _draw(5, (2, 5, 3, 12)) + np.float32(mean)
    parameters = {"scale": _draw(6, (12,)), "bias": _draw(7, (12,))}
    expected = _np_group_norm(features, parameters, 4, 1e-3)
    args = (jnp.asarray(features), *map(jnp.asarray, parameters.values()))
    # A mean of 100 is known to some 8e-6 in float32; a one-pass variance would be off by 1e-3.
    assert _relative_error(vae.group_norm(*args, 4, 1e-3), expected) < (3e-5 if mean else 1e-6)
    with pytest.raises(ValueError, match=r"channels=12 .* num_groups=5"):
        vae.group_norm(*args, 5, 1e-3)


def test_downsample_pads_right_and_below_only():
    params = {"conv": {"kernel": _draw(8, (3, 3, 5, 5)), "bias": _draw(9, (5,))}}
    features = _draw(10, (2, 6, 8, 5))
    expected = np.empty((2, 3, 4, 5))
    for i in range(3):
        for j in range(4):
            total = np.tile(params["conv"]["bias"].astype(np.float64), (2, 1))
            for p in range(3):
                for q in range(3):
                    if 2 * i + p < 6 and 2 * j + q < 8:
                        total += features[:, 2 * i + p, 2 * j + q] @ params["conv"]["kernel"][p, q]
            expected[:, i, j] = total
    result = vae.Downsample().apply({"params": params}, jnp.asarray(features))
    assert _relative_error(result, expected) < 1e-6


def test_upsample_nearest():
    features = _draw(11, (2, 3, 5, 4))
    result = np.asarray(vae.upsample_nearest(jnp.asarray(features)))
    assert result.shape == (2, 6, 10, 4)
    for y in range(6):
        for x in range(10):
            np.testing.assert_array_equal(result[:, y, x], features[:, y // 2, x // 2])


def test_attention_block():
    config = dataclasses.replace(TINY, channels=16)
    block = vae.AttentionBlock(config)
    features = _draw(12, (2, 3, 5, 16))
    shapes = jax.eval_shape(block.init, jax.random.key(0), jnp.asarray(features))["params"]
    rng = np.random.default_rng(13)
    params = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), shapes)
    result = block.apply({"params": params}, jnp.asarray(features))
    assert _relative_error(result, _np_attention(features, params, 4)) < 1e-5


@pytest.mark.parametrize("channels", [8, 12])
def test_residual_block(channels):
    block = vae.ResidualBlock(TINY, channels)
    features = _draw(14, (2, 5, 4, 8))
    shapes = jax.eval_shape(block.init, jax.random.key(0), jnp.asarray(features))["params"]
    assert ("nin_shortcut" in shapes) == (channels == 12)
    rng = np.random.default_rng(15)
    params = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), shapes)
    result = block.apply({"params": params}, jnp.asarray(features))
    assert _relative_error(result, _np_residual(features, params, 4)) < 1e-5


# The whole.


def test_encoder_and_decoder_against_numpy():
    params = _random_params(TINY, 16)
    images = _draw(17, (2, 8, 16, 3))
    moments = _apply(TINY, params, "encode_moments", jnp.asarray(images))
    assert moments.shape == (2, 2, 4, 8)
    assert _relative_error(moments, _np_encoder(images, params["encoder"], TINY)) < 1e-5
    latents = _draw(18, (2, 2, 4, 4))
    decoded = _apply(TINY, params, "decode", jnp.asarray(latents))
    assert _relative_error(decoded, _np_decoder(latents, params["decoder"], TINY)) < 1e-5


def _published_count():
    """Parameters of the two halves by hand: (encoder, decoder)."""

    def conv(inputs, outputs, size=3):
        return inputs * outputs * size**2 + outputs

    def block(inputs, outputs):
        shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
        return 2 * inputs + conv(inputs, outputs) + 2 * outputs + conv(outputs, outputs) + shortcut

    middle = 2 * block(512, 512) + 2 * 512 + 4 * conv(512, 512, 1)
    encoder = (
        conv(3, 128)
        + (2 * block(128, 128) + conv(128, 128))
        + (block(128, 256) + block(256, 256) + conv(256, 256))
        + (block(256, 512) + block(512, 512) + conv(512, 512))
        + 2 * block(512, 512)
        + middle
        + (2 * 512 + conv(512, 32))
    )
    decoder = (
        conv(16, 512)
        + middle
        + 2 * (3 * block(512, 512) + conv(512, 512))
        + (block(512, 256) + 2 * block(256, 256) + conv(256, 256))
        + (block(256, 128) + 2 * block(128, 128))
        + (2 * 128 + conv(128, 3))
    )
    return encoder, decoder


def test_parameter_count_of_the_published_shape():
    images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    module = vae.VAE(VAEConfig())
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    counts = [sum(x.size for x in jax.tree.leaves(params[half])) for half in ("encoder", "decoder")]
    assert counts == list(_published_count())
    assert sum(counts) == 83_819_683  # the Flux autoencoder
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    tokens = jax.eval_shape(
        lambda p, x: module.apply({"params": p}, x, method="encode_tokens"), params, images
    )
    assert (tokens.shape, tokens.dtype) == ((1, 256, 64), jnp.float32)


def test_initial_kernels_are_uniform_by_fan_in():
    params = vae.Downsample().init(jax.random.key(1), jnp.zeros((1, 4, 4, 16)))["params"]
    kernel, bound = np.asarray(params["conv"]["kernel"]), 1 / np.sqrt(9 * 16)
    assert 0.98 * bound < np.abs(kernel).max() <= bound
    np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.05)
    np.testing.assert_array_equal(params["conv"]["bias"], 0)


def test_encode_normalises_the_mean_and_samples():
    params = _random_params(TINY, 19)
    images = jnp.asarray(_draw(20, (2, 16, 8, 3)))
    mean, log_variance = np.split(_np_encoder(images, params["encoder"], TINY), 2, axis=-1)
    raw = _apply(TINY, params, "encode", images)
    assert _relative_error(raw, mean) < 1e-5

    normed = dataclasses.replace(TINY, norm_patch_size=2)
    latents = np.asarray(_apply(normed, params, "encode", images))
    patches = latents.reshape(2, 2, 2, 1, 2, 4)
    np.testing.assert_allclose(patches.mean(axis=(2, 4, 5)), 0, atol=1e-6)
    np.testing.assert_allclose(patches.var(axis=(2, 4, 5)), 1, atol=1e-4)

    # The noise is scaled by the encoder's own deviation, around the normalised mean.
    noise = jnp.asarray(_draw(21, latents.shape))
    drawn = dataclasses.replace(normed, deterministic=False)
    sample = _apply(drawn, params, "encode", images, noise)
    assert _relative_error(sample - latents, np.exp(log_variance / 2) * np.asarray(noise)) < 1e-5
    np.testing.assert_array_equal(_apply(drawn, params, "encode", images), latents)
    np.testing.assert_array_equal(_apply(normed, params, "encode", images, noise), latents)


def test_tokens_are_shifted_and_scaled_and_the_way_back_undoes_it():
    config = dataclasses.replace(TINY, scaling_factor=0.3611, shift_factor=0.1159)
    params = _random_params(config, 22)
    images = jnp.asarray(_draw(23, (2, 16, 24, 3)))
    latents = _apply(config, params, "encode", images)
    tokens = _apply(config, params, "encode_tokens", images)
    assert tokens.shape == (2, 6, 16)
    expected = (np.asarray(latents, np.float64) - 0.1159) * 0.3611
    # Token 4 stands in row 1, column 1.
    np.testing.assert_allclose(
        np.asarray(tokens[:, 4]).reshape(2, 4, 2, 2),
        expected[:, 2:4, 2:4].transpose(0, 3, 1, 2),
        rtol=1e-5,
        atol=1e-6,
    )
    decoded = _apply(config, params, "decode_tokens", tokens, grid=(2, 3))
    assert decoded.shape == images.shape
    assert _relative_error(decoded, _apply(config, params, "decode", latents)) < 1e-5
    reconstruction = _apply(config, params, None, images)
    assert _relative_error(decoded, reconstruction) < 1e-5


def test_bfloat16_compute_keeps_float32_results():
    params = _random_params(TINY, 24)
    images = jnp.asarray(_draw(25, (1, 16, 16, 3)))
    exact = _apply(TINY, params, "encode_moments", images)
    rounded = _apply(TINY, params, "encode_moments", images, dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    # Some twenty roundings of 2^-9 in a row; and it must really have been bfloat16.
    assert 1e-4 < _relative_error(rounded, exact) < 0.05


def test_bad_shapes_are_named():
    params = _random_params(TINY, 26)
    with pytest.raises(ValueError, match=r"multiples of 4 .*, not 16x10"):
        _apply(TINY, params, "encode", jnp.zeros((1, 16, 10, 3)))
    with pytest.raises(ValueError, match=r"multiples of 8 .*patch_size=2\), not 12x16"):
        _apply(TINY, params, "encode_tokens", jnp.zeros((1, 12, 16, 3)))
    normed = dataclasses.replace(TINY, norm_patch_size=2)
    with pytest.raises(ValueError, match=r"multiples of 8 .*patch_size=2\), not 12x16"):
        _apply(normed, params, "encode", jnp.zeros((1, 12, 16, 3)))
    with pytest.raises(ValueError, match="images have 4 channels, in_channels=3"):
        _apply(TINY, params, "encode", jnp.zeros((1, 16, 16, 4)))
    with pytest.raises(ValueError, match="latents have 5 channels, latent_channels=4"):
        _apply(TINY, params, "decode", jnp.zeros((1, 4, 4, 5)))
    with pytest.raises(ValueError, match="3 tokens do not fill grid=2x2"):
        _apply(TINY, params, "decode_tokens", jnp.zeros((1, 3, 16)), grid=(2, 2))
