import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image as PILImage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from nextstep_jax.data.schema import Document, Image, Text
from nextstep_jax.data.shapes import ShapesSource
from nextstep_jax.evaluation import tokenizer_quality
from nextstep_jax.evaluation.image_metrics import (
    FeatureStatistics,
    bicubic_baseline,
    frechet_distance,
)
from nextstep_jax.evaluation.scoring import score
from nextstep_jax.evaluation.tokenizer_quality import evaluate_tokenizer, plot_robustness, table
from nextstep_jax.models.config import VAEConfig
from nextstep_jax.models.perceptual import Lpips
from nextstep_jax.models.vae import VAE, from_uint8
from nextstep_jax.parallel.mesh import make_mesh
from tests import tiny_model

SIZE = 32
# With shift and scale, so that the noise's units show; blocks would only be more to compile.
CONFIG = VAEConfig(
    **dict(channels=8, channel_multipliers=(1, 2), num_res_blocks=0, num_groups=4),
    **dict(latent_channels=4, scaling_factor=0.5, shift_factor=0.25),
)
SOURCE = ShapesSource(kind="pair", level="easy", split="heldout", image_size=SIZE, num_documents=13)
LEVELS = (0.0, 0.4)


class Distance(nn.Module):
    """Stands for LPIPS: a weighted mean absolute difference."""

    @nn.compact
    def __call__(self, images, others):
        weight = self.param("weight", nn.initializers.ones, (3,))
        return jnp.mean(jnp.abs(images - others) * weight, axis=(1, 2, 3))


class Features(nn.Module):
    """Stands for Inception: means of the quarters of the image."""

    @nn.compact
    def __call__(self, images):
        scale = self.param("scale", nn.initializers.ones, ())
        quarters = images.reshape(len(images), 2, SIZE // 2, 2, SIZE // 2, 3)
        return scale * quarters.mean(axis=(2, 4)).reshape(len(images), 12)


LPIPS = (Distance(), {"weight": jnp.array([1.0, 2.0, 3.0])})
INCEPTION = (Features(), {"scale": jnp.array(10.0)})


@functools.cache
def params():
    shapes = jax.eval_shape(VAE(CONFIG).init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    return tiny_model.random_tree(shapes["params"], 5)


def evaluate(source=SOURCE, **settings):
    defaults = dict(image_size=SIZE, batch_size=8, noise_levels=LEVELS)
    defaults |= dict(lpips=LPIPS, inception=INCEPTION)
    return evaluate_tokenizer(VAE(CONFIG), params(), source, **defaults | settings)


@pytest.fixture(scope="module")
def on_eight():
    """The results on all devices, with what the hook saw."""
    seen = []
    results = evaluate(on_batch=lambda *args: seen.append(args))
    return types.SimpleNamespace(results=results, seen=seen)


def numbers(results):
    """All figures that are no timings, by their paths."""
    found = {}

    def walk(path, value):
        if isinstance(value, dict):
            for key, one in value.items():
                walk((*path, key), one)
        elif isinstance(value, list):
            for i, one in enumerate(value):
                walk((*path, i), one)
        elif "images_per_second" not in path[-1] if path and isinstance(path[-1], str) else True:
            found[path] = value

    walk((), results)
    return found


@pytest.mark.parametrize(
    ("num_devices", "batch_size", "axes"),
    [(1, 8, None), (1, 5, None), (8, 13, None), (8, 3, {"data": 2, "fsdp": 2, "tensor": 2})],
)
def test_devices_and_batches_change_nothing(on_eight, devices, num_devices, batch_size, axes):
    mesh = make_mesh(axes or {"data": -1}, devices[:num_devices])
    results = numbers(evaluate(mesh=mesh, batch_size=batch_size))
    expected = numbers(on_eight.results)
    assert results.keys() == expected.keys()
    for path, value in expected.items():
        assert results[path] == pytest.approx(value, rel=1e-5, abs=1e-5), path


def by_hand(std):
    """Originals and what one image after the other becomes, by the definition."""
    vae, variables = VAE(CONFIG), {"params": params()}
    encode = jax.jit(lambda x: vae.apply(variables, x, method="encode"))
    decode = jax.jit(lambda z: vae.apply(variables, z, method="decode"))
    originals, decoded = [], []
    for i in range(len(SOURCE)):
        pixels = SOURCE[i].images[0].pixels
        latents = (encode(from_uint8(pixels[None])) - 0.25) * 0.5
        key = jax.random.fold_in(jax.random.key(0), i)
        latents += std * jax.random.normal(key, latents.shape[1:])
        image = np.asarray(decode(latents / 0.5 + 0.25))[0].astype(np.float64)
        originals.append(pixels)
        decoded.append(np.clip((image + 1) * 127.5, 0, 255))
    return np.stack(originals), np.stack(decoded)


@pytest.mark.parametrize("level", [0, 1])
def test_figures_are_those_of_the_definitions(on_eight, level):
    originals, decoded = by_hand(LEVELS[level])
    seen = [call[1:] for call in on_eight.seen if call[0] == LEVELS[level]]
    # Batches of 8 and of what is left, without the padding.
    assert [len(pixels) for pixels, _ in seen] == [8, 5]
    pixels, rounded = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    np.testing.assert_array_equal(pixels, originals)
    assert rounded.dtype == np.uint8
    assert np.abs(rounded - decoded).max() < 0.51
    found = on_eight.results["levels"][level]
    assert found["noise_std"] == LEVELS[level]
    assert found["num_images"] == len(SOURCE)
    pairs = list(zip(originals, rounded, strict=True))
    expected = np.mean([peak_signal_noise_ratio(*pair, data_range=255) for pair in pairs])
    assert found["psnr"] == pytest.approx(expected, rel=1e-5)
    settings = dict(channel_axis=-1, gaussian_weights=True, use_sample_covariance=False)
    expected = np.mean([structural_similarity(*pair, data_range=255, **settings) for pair in pairs])
    assert found["ssim"] == pytest.approx(expected, abs=1e-5)
    difference = np.abs(originals / 127.5 - rounded / 127.5)
    assert found["lpips"] == pytest.approx((difference * [1, 2, 3]).mean(), rel=1e-5)
    features = [
        FeatureStatistics.of(
            10 * (x / 127.5 - 1).reshape(-1, 2, 16, 2, 16, 3).mean(axis=(2, 4)).reshape(-1, 12)
        )
        for x in (originals, rounded)
    ]
    assert found["rfid"] == pytest.approx(frechet_distance(*features), rel=1e-4)
    claims = [SOURCE[i].metadata["claims"][0] for i in range(len(SOURCE))]
    assert found["scenes"] == score(list(rounded), claims).as_dict()
    assert found["images_per_second"] > 0


def test_originals_and_baseline(on_eight):
    results = on_eight.results
    assert (results["num_images"], results["image_size"], results["seed"]) == (13, SIZE, 0)
    assert results["latent"] == {"shape": [16, 16, 4], "num_values": 1024}
    assert results["originals"]["scenes"]["accuracy"] == 1.0
    originals = np.stack([SOURCE[i].images[0].pixels for i in range(len(SOURCE))])
    small = bicubic_baseline(originals, 1024)
    expected = np.mean(
        [
            peak_signal_noise_ratio(*pair, data_range=255)
            for pair in zip(originals, small, strict=True)
        ]
    )
    baseline = results["bicubic"]
    assert baseline["psnr"] == pytest.approx(expected, rel=1e-5)
    assert (baseline["size"], baseline["num_values"]) == ([19, 19], 1083)
    assert 0.5 < baseline["ssim"] < 1


def test_latents_are_in_the_units_of_the_model(on_eight):
    latents = on_eight.results["latents"]
    assert latents["num_images"] == 13
    # Normalised to mean 0 and variance 1 a token, then shifted and scaled.
    assert latents["tokens"]["mean"]["mean"] == pytest.approx(-0.125, abs=1e-4)
    assert latents["tokens"]["variance"]["mean"] == pytest.approx(0.25, rel=1e-3)


def test_results_are_plain(on_eight):
    assert json.loads(json.dumps(on_eight.results, allow_nan=False)) == on_eight.results


def lowered(function):
    """How many programs jax lowered while `function` ran."""
    events = []

    def listen(event, *_, **__):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        function()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return events.count("/jax/core/compile/jaxpr_to_mlir_module_duration")


def test_a_second_tokenizer_of_the_same_config_compiles_nothing():
    """Another seed, other weights, a network built anew: only another config is a new program."""
    settings = dict(image_size=SIZE, batch_size=8, num_images=4, noise_levels=LEVELS, seed=3)
    # No other test has it; its parameters have the same shapes.
    config = dataclasses.replace(CONFIG, norm_eps=2e-6)

    def judge(config, weights, inception=None):
        networks = dict(lpips=(Distance(), LPIPS[1]), inception=inception)
        return evaluate_tokenizer(VAE(config), weights, SOURCE, **settings, **networks)

    assert lowered(lambda: judge(config, params(), INCEPTION)) >= 2
    twice = jax.tree.map(lambda x: 2 * x, params())
    again, networks = dataclasses.replace(config), (Features(), INCEPTION[1])
    settings["seed"] = 4
    assert lowered(lambda: judge(again, twice, networks)) == 0
    # Encoder and decoder; the distances are as they were.
    plain = dataclasses.replace(config, norm_patch_size=None)
    assert lowered(lambda: judge(plain, params())) == 2


def test_float32_is_computed_as_float32():
    """Whatever the surroundings allow; on GPUs the default would be TF32."""
    seen = []

    class Spy(nn.Module):
        def __call__(self, images, others):
            seen.append(jax.config.jax_default_matmul_precision)
            return jnp.mean(jnp.abs(images - others), axis=(1, 2, 3))

    settings = dict(num_images=4, noise_levels=[0.3], lpips=(Spy(), {}), inception=None)
    with jax.default_matmul_precision("default"):
        evaluate(**settings)
    assert seen == ["highest"]


def test_a_prefix_of_documents_without_claims():
    rng = np.random.default_rng([6])
    documents = [
        Document(
            (Text("x"), Image(pixels=rng.integers(0, 256, (40, 48, 3), np.uint8))),
            str(i),
            "s",
            "pair",
        )
        for i in range(6)
    ]
    results = evaluate(documents, num_images=4, noise_levels=[0.2], lpips=None, inception=None)
    assert results["num_images"] == 4
    assert "originals" not in results
    (level,) = results["levels"]
    assert set(level) == {"noise_std", "psnr", "ssim", "num_images", "images_per_second"}
    assert evaluate(documents, num_images=9, noise_levels=[0.2], inception=None)["num_images"] == 6


def test_a_document_without_an_image_is_named():
    documents = [Document((Text("words"),), "17", "texts", "text")]
    with pytest.raises(ValueError, match="17 of texts has no image"):
        evaluate(documents, inception=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 30}, "image_size=30 must be a multiple of 4"),
        ({"image_size": 8}, "at least 11"),
        ({"patch_size": 3}, "multiple of 12"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_images": 0, "inception": None}, "num_images=0 must be at least 1"),
        ({"num_images": 1}, "num_images=1 must be at least 2"),
        ({"noise_levels": []}, "noise_levels"),
        ({"noise_levels": [0.1, -0.1]}, "noise_levels"),
        ({"noise_levels": [0.1, 0.1]}, "noise_levels"),
        ({"noise_levels": [float("nan")]}, "noise_levels"),
        ({"seed": -1}, r"seed=-1 must lie in \[0, 4294967296\)"),
        ({"seed": 2**32}, "seed=4294967296 must lie in"),
        ({"image_size": 28, "lpips": (Lpips("alex"), {})}, "at least 31 for LPIPS over alex"),
        ({"image_size": 12, "lpips": (Lpips("vgg"), {})}, "at least 16 for LPIPS over vgg"),
    ],
)
def test_bad_arguments_are_refused(settings, message, monkeypatch):
    # Before any device work.
    monkeypatch.setattr(tokenizer_quality, "_Programs", None)
    with pytest.raises(ValueError, match=message):
        evaluate(**settings)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_tokenizer_that_gives_nan_is_refused(part):
    """As pixels, NaN would be black."""
    broken = jax.tree.map(lambda x: x * jnp.nan, params()[part]["conv_out"])
    weights = {**params(), part: {**params()[part], "conv_out": broken}}
    settings = dict(image_size=SIZE, batch_size=8, num_images=3, noise_levels=LEVELS)
    with pytest.raises(ValueError, match=f"^{part}: .* of image 0 are not finite"):
        evaluate_tokenizer(VAE(CONFIG), weights, SOURCE, **settings)


def test_an_image_that_is_not_finite_is_named():
    numbers = np.array([8, 9, 10])
    tokenizer_quality._refuse_rows(np.array([True] * 3), numbers, "x")
    with pytest.raises(ValueError, match=r"^x of image 9 are not finite"):
        tokenizer_quality._refuse_rows(np.array([True, False, False]), numbers, "x")


@pytest.mark.parametrize(("num_images", "inception"), [(4999, True), (5000, True), (10, False)])
def test_rfid_of_few_images_is_warned_of(num_images, inception, monkeypatch, caplog):
    monkeypatch.setattr(tokenizer_quality, "_Programs", None)
    source = dataclasses.replace(SOURCE, num_documents=6000)
    with pytest.raises(TypeError, match="NoneType"):
        evaluate(source, num_images=num_images, inception=INCEPTION if inception else None)
    text = "rFID of 4999 images is strongly biased upwards"
    assert (text in caplog.text) == (num_images == 4999)
    assert len(caplog.records) == (num_images == 4999)


RESULTS = {
    "levels": [
        {"noise_std": 0.0, "psnr": 31.234, "ssim": 0.91, "rfid": 1.5, "images_per_second": 20.04},
        {"noise_std": 0.5, "psnr": 24.0, "ssim": 0.8, "rfid": 9.0, "images_per_second": 20.0},
    ],
    "bicubic": {"psnr": 27.5, "ssim": 0.85, "size": [19, 19]},
    "originals": {"scenes": {"accuracy": 1.0}},
}


def test_table():
    assert table(RESULTS).splitlines() == [
        "                      PSNR      SSIM      rFID  scenes %  images/s",
        "noise 0              31.23    0.9100     1.500                20.0",
        "noise 0.5            24.00    0.8000     9.000                20.0",
        "bicubic 19x19        27.50    0.8500",
        "originals                                          100.0",
    ]


def test_plot(tmp_path):
    more = {"psnr": 20, "ssim": 0.5, "rfid": 20, "scenes": {"accuracy": 0.5}}
    levels = [{**one, **more} for one in RESULTS["levels"][::-1]]
    other = {**RESULTS, "levels": levels}
    plot_robustness({"one": RESULTS, "two": other}, tmp_path / "plot.png")
    with PILImage.open(tmp_path / "plot.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    # Four panels (no LPIPS); scenes in the levels of one result only, so one colour in the last.
    assert pixels.shape == (432, 1920, 3)
    for i, panel in enumerate(np.split(pixels, 4, axis=1)):
        for color, panels in (((31, 119, 180), 3), ((255, 127, 14), 4)):
            count = (np.abs(panel - color).max(axis=2) < 8).sum()
            assert count > 50 if i < panels else count == 0
