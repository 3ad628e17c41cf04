"""Statistics of sampled tokens against numpy loops and distributions with known moments."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image as PILImage

from nextstep_jax.data.schema import Document, Image, Text
from nextstep_jax.evaluation import token_drift
from nextstep_jax.models.vae import VAE
from tests import tiny_model


def test_statistics_are_those_of_each_token():
    tokens = np.random.default_rng(0).normal(2.0, 3.0, (5, 4, 8))
    statistics = token_drift.token_statistics(tokens)
    for place in range(4):
        one = [tokens[i, place] for i in range(5)]
        assert statistics["mean"][place] == pytest.approx(sum(t.sum() / 8 for t in one) / 5)
        expected = sum(((t - t.sum() / 8) ** 2).sum() / 8 for t in one) / 5
        assert statistics["variance"][place] == pytest.approx(expected)
    squares = [tokens[i, j].mean() ** 2 for i in range(5) for j in range(4)]
    assert statistics["rms_mean"] == pytest.approx(np.sqrt(sum(squares) / 20))


def test_bad_tokens_are_refused():
    with pytest.raises(ValueError, match="one value"):
        token_drift.token_statistics(np.zeros((2, 3, 1)))
    with pytest.raises(ValueError, match="NaN"):
        token_drift.token_statistics(np.full((2, 3, 4), np.nan))
    good = np.random.default_rng([4]).normal(size=(2, 3, 4))
    sampled = types.SimpleNamespace(tokens=np.full((2, 3, 4), np.inf))
    with pytest.raises(ValueError, match=r"guidance 1\.5: the tokens hold NaN or infinite values"):
        token_drift.measure_drift(lambda *_, **__: sampled, ["a", "b"], good)
    with pytest.raises(ValueError, match="the data: the tokens hold NaN"):
        token_drift.measure_drift(lambda *_, **__: sampled, ["a", "b"], sampled.tokens)
    constant = token_drift.token_statistics(np.ones((2, 3, 4)))
    for pair in ((constant, token_drift.token_statistics(good)), (constant, constant)):
        with pytest.raises(ValueError, match="first or last tokens are constant"):
            token_drift.drift(*pair)


def test_an_encoder_that_gives_nan_is_named():
    pipe = tiny_model.pipeline(image_size=(16, 16))
    pipe.vae_params = with_nan(pipe.vae_params, "encoder")
    with pytest.raises(
        ValueError, match=r"^encoder: the latents of the image tokenizer are not fi"
    ):
        token_drift.image_tokens(
            pipe, documents([Image(pixels=np.zeros((16, 16, 3), np.uint8))]), 1
        )


def with_nan(params, part):
    out = jax.tree.map(lambda x: x * jnp.nan, params[part]["conv_out"])
    return {**params, part: {**params[part], "conv_out": out}}


def documents(images):
    return [Document((Text("x"), image), str(i), "s", "pair") for i, image in enumerate(images)]


@functools.cache
def pipeline():
    """Samples 16x16 in 4x4 tokens of 16 values."""
    return tiny_model.pipeline(image_size=(16, 16))


def test_tokens_of_pixels_and_of_records_are_the_same():
    pixels = np.random.default_rng([2]).integers(0, 256, (5, 16, 16, 3), np.uint8)
    variables = {"params": tiny_model.vae_params()}
    images = jnp.asarray(pixels) / 127.5 - 1
    encode = functools.partial(VAE(tiny_model.VAE_CONFIG).apply, method="encode_tokens")
    expected = jax.jit(encode)(variables, images)
    source = documents([Image(pixels=one) for one in pixels])
    # A batch and what is left.
    found = token_drift.image_tokens(pipeline(), source, 9, batch_size=3)
    assert found.shape == (5, 16, 16)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    stored = np.asarray(expected).astype(jnp.bfloat16)
    source = documents([Image(latents=one, grid=(4, 4)) for one in stored])
    from_records = token_drift.image_tokens(pipeline(), source, 4, batch_size=3)
    assert from_records.dtype == np.float32
    np.testing.assert_array_equal(from_records, stored[:4].astype(np.float32))


@pytest.mark.parametrize(
    ("images", "changes", "message"),
    [
        ([Image(latents=np.zeros((8, 16)), grid=(2, 4))], {}, r"grid \(2, 4\).*\(4, 4\) and 16"),
        ([Image(latents=np.zeros((16, 64)), grid=(4, 4))], {}, "width 64"),
        ([], {}, "num_images=0"),
        ([Image(pixels=np.zeros((9, 9, 3), np.uint8))], {"image_size": (8, 32)}, "8x32"),
    ],
)
def test_images_that_do_not_fit_are_refused(images, changes, message):
    pipe = tiny_model.pipeline(**{"image_size": (16, 16), **changes})
    with pytest.raises(ValueError, match=message):
        token_drift.image_tokens(pipe, documents(images), 1)


RESULT = {
    "data": {"mean": [0.0, 0.1], "variance": [1.0, 2.0], "rms_mean": 0.125},
    "guidance": {
        "7": {
            **{"mean": [0.2, 0.3], "variance": [3.0, 4.0], "rms_mean": 0.25},
            **{"variance_ratio": 7 / 3, "last_over_first": 2 / 3},
        }
    },
    "num_images": 2,
}


def test_table():
    assert token_drift.table(RESULT).splitlines() == [
        "guidance     variance_ratio  last_over_first         rms_mean",
        "7                     2.333            0.667            0.250",
        "data                  1.000            1.000            0.125",
    ]


def test_plot_has_a_column_for_each_model(tmp_path):
    shapes = []
    for names in (["one"], ["one", "two"]):
        token_drift.plot_drift(dict.fromkeys(names, RESULT), tmp_path / "drift.png")
        with PILImage.open(tmp_path / "drift.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        shapes.append(pixels.shape)
        for column in np.split(pixels, len(names), axis=1):
            for panel in np.split(column, 2):
                # A line for the guidance scale, and one for the data.
                assert (np.abs(panel - (31, 119, 180)).max(axis=2) < 8).sum() > 50
                assert (np.abs(panel).max(axis=2) < 8).sum() > 50
    assert shapes == [(672, 504, 3), (672, 1008, 3)]


def test_drift_of_a_known_runaway():
    """A sampler whose token p has standard deviation 1 + scale * p drifts by just that."""
    rng = np.random.default_rng(1)
    calls = []

    def pipe(prompts, seed, guidance_scale, **settings):
        calls.append((len(prompts), seed, guidance_scale, settings))
        spread = 1 + guidance_scale * np.arange(3)
        noise = rng.standard_normal((len(prompts), 3, 64))
        return types.SimpleNamespace(tokens=noise * spread[:, None])

    data = rng.standard_normal((400, 3, 64))
    result = token_drift.measure_drift(pipe, ["a"] * 400, data, (0.0, 0.5), batch_size=7)
    assert calls == [(400, list(range(400)), s, {"batch_size": 7}) for s in (0.0, 0.5)]
    still, runaway = result["guidance"]["0"], result["guidance"]["0.5"]
    assert still["variance_ratio"] == pytest.approx(1, abs=0.02)
    assert still["last_over_first"] == pytest.approx(1, abs=0.04)
    assert runaway["variance_ratio"] == pytest.approx((1 + 1.5**2 + 4) / 3, rel=0.02)
    assert runaway["last_over_first"] == pytest.approx(4, rel=0.04)
    # The mean of 64 values of standard deviation s has standard deviation s / 8.
    assert still["rms_mean"] == pytest.approx(1 / 8, rel=0.05)
