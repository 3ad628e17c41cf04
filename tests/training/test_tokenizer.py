import dataclasses
import functools
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image as PILImage

from nextstep_jax.data.schema import Document, Image, Text
from nextstep_jax.data.shapes import ShapesSource
from nextstep_jax.data.sources import ImageFolderSource
from nextstep_jax.models.config import VAEConfig
from nextstep_jax.models.vae import VAE
from nextstep_jax.training import tokenizer
from nextstep_jax.training.tokenizer import TokenizerConfig, TokenizerTask

# Convolutions take long to optimise, and each of these programs runs once.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CONFIG = TokenizerConfig(image_size=32, batch_size=4, num_threads=1)


@pytest.fixture(scope="module")
def vae(make_vae):
    """One level compiles in a fraction of the time of four."""
    return make_vae(channel_multipliers=(1,))


@pytest.fixture(scope="module")
def task(vae):
    return TokenizerTask(vae.module, ShapesSource("pair", image_size=32), CONFIG, {})


def test_disturbed_latents():
    """Equation 3: one alpha a sample, uniform in [0, gamma], times standard normal noise."""
    clean = jnp.asarray(np.random.default_rng(0).standard_normal((4000, 4, 4, 8)), jnp.float32)
    noise = np.asarray(tokenizer.disturb_latents(clean, jax.random.key(0), 0.5) - clean)
    alpha = noise.std(axis=(1, 2, 3))
    # 128 values a sample: the estimate of alpha is off by alpha / 16; edges have room for 5 sigma.
    assert alpha.min() >= 0
    assert alpha.max() < 0.5 * (1 + 5 / 16)
    assert alpha.mean() == pytest.approx(0.25, abs=4 * 0.5 / np.sqrt(12 * 4000))
    assert alpha.std() == pytest.approx(0.5 / np.sqrt(12), rel=0.03)
    assert noise.mean() == pytest.approx(0, abs=5 * 0.29 / np.sqrt(noise.size))
    # E[(alpha eps)^4] / E[(alpha eps)^2]^2 = 3 * 9/5: one alpha a sample, not one a value.
    assert (noise**4).mean() / (noise**2).mean() ** 2 == pytest.approx(27 / 5, rel=0.05)
    still = tokenizer.disturb_latents(clean, jax.random.key(0), 0.0)
    np.testing.assert_array_equal(still, clean)


@pytest.mark.parametrize("num_scales", [1, 2, 3])
def test_gradient_error_is_the_formula(num_scales):
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 2, 8, 12, 3))
    expected, x, y = 0.0, a, b
    for _ in range(num_scales):
        for image, other in ((x, y),):
            expected += np.abs(np.diff(image, axis=1) - np.diff(other, axis=1)).mean()
            expected += np.abs(np.diff(image, axis=2) - np.diff(other, axis=2)).mean()
        x, y = (
            (i[:, ::2] + i[:, 1::2])[:, :, ::2] + (i[:, ::2] + i[:, 1::2])[:, :, 1::2]
            for i in (x / 4, y / 4)
        )
    error = tokenizer.gradient_error(jnp.float32(a), jnp.float32(b), num_scales)
    assert float(error) == pytest.approx(expected / num_scales, rel=1e-5)


def test_gradient_error_ignores_brightness():
    images = jnp.asarray(np.random.default_rng(2).standard_normal((1, 9, 7, 3)), jnp.float32)
    assert float(tokenizer.gradient_error(images, images, 2)) == 0.0
    assert float(tokenizer.gradient_error(images, images + 0.5, 2)) < 1e-6


def test_psnr():
    """8-bit noise of one level is 48.13 dB; peak 2."""
    assert float(tokenizer.psnr(jnp.float32((2 / 255) ** 2))) == pytest.approx(48.1308, abs=1e-3)
    assert float(tokenizer.psnr(jnp.float32(4.0))) == 0.0
    assert np.isfinite(float(tokenizer.psnr(jnp.float32(0.0))))


def test_loss_is_its_parts(task, vae):
    pixels = np.stack([tokenizer.first_image(task._source[i], 32) for i in range(4)])
    key = jax.random.key(1)
    batch = {"images": jnp.asarray(pixels)}
    loss, metrics = fast_jit(task.loss)(vae.params, batch, key)
    variables = {"params": vae.params}
    images = pixels / 127.5 - 1.0

    @fast_jit
    def reconstruct(images):
        latents = vae.module.apply(variables, images, method="encode")
        disturbed = tokenizer.disturb_latents(latents, key, 0.5)
        return vae.module.apply(variables, disturbed, method="decode")

    decoded = np.asarray(reconstruct(jnp.float32(images)), np.float64)
    l1, l2 = np.abs(decoded - images).mean(), ((decoded - images) ** 2).mean()
    assert float(metrics["l1"]) == pytest.approx(l1, rel=1e-5)
    assert float(metrics["psnr"]) == pytest.approx(10 * np.log10(4 / l2), rel=1e-5)
    total = l1 + l2 + float(metrics["gradient"])
    assert float(loss) == pytest.approx(total, rel=1e-5)


def test_training_lowers_the_loss(task, vae):
    """Both halves are trained: ten steps on one batch, and every leaf of both moves."""
    batch = {"images": jnp.stack([tokenizer.first_image(task._source[i], 32) for i in range(2)])}
    optimizer = optax.adam(1e-2)

    @fast_jit
    def run(params):
        def step(carry, i):
            params, opt_state = carry
            grad_fn = jax.value_and_grad(task.loss, has_aux=True)
            (loss, _), grads = grad_fn(params, batch, jax.random.key(0))
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(10))
        return params, losses

    params, losses = run(vae.params)
    assert float(losses[-1]) < 0.6 * float(losses[0])
    kernels = [
        jax.tree_util.keystr(path)
        for (path, before), after in zip(
            jax.tree_util.tree_flatten_with_path(vae.params)[0],
            jax.tree.leaves(params),
            strict=True,
        )
        if before.ndim > 1 and bool(jnp.all(before == after))
    ]
    assert kernels == []


def numbered(n):
    """Images whose colour is their number."""
    return [
        Document((Text("x"), Image(pixels=np.full((40, 48, 3), i, np.uint8))), str(i), "s", "pair")
        for i in range(n)
    ]


def read(source, num_batches, process=(0, 1), **changes):
    train = dataclasses.replace(CONFIG, **changes)
    with closing(
        iter(TokenizerTask(VAE(VAEConfig()), source, train, {}).dataset(*process))
    ) as iterator:
        batches = [next(iterator)["images"] for _ in range(num_batches)]
    assert {(b.shape, b.dtype.name) for b in batches} == {
        ((train.batch_size // process[1], 32, 32, 3), "uint8")
    }
    assert all((b == b[:, :1, :1, :1]).all() for b in batches)
    return [int(i) for b in batches for i in b[:, 0, 0, 0]]


def test_batches():
    """Every image once an epoch, the same order with any number of threads."""
    order = read(numbered(12), 6)
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12))
    assert order[:12] != order[12:]
    assert read(numbered(12), 6, num_threads=0) == order
    assert read(numbered(12), 6, seed=1) != order


def test_processes_share_the_images():
    parts = [read(numbered(12), 3, (i, 2)) for i in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(12))


def test_fingerprint_is_the_same_in_every_process(tmp_path):
    """A plain object's repr is its address; with it a run could never be continued."""
    PILImage.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    sources = [lambda: ImageFolderSource(tmp_path), lambda: ShapesSource("pair", image_size=32)]
    for make_source in sources:
        first, second = (
            TokenizerTask(VAE(VAEConfig()), make_source(), CONFIG, {}) for _ in range(2)
        )
        assert first.fingerprint == second.fingerprint
        assert "0x" not in str(first.fingerprint)
    levels = [
        TokenizerTask(
            VAE(VAEConfig()), ShapesSource("pair", image_size=32, level=name), CONFIG, {}
        ).fingerprint
        for name in ("easy", "full")
    ]
    assert levels[0] != levels[1]


def test_samples(task):
    assert task.num_samples({"images": np.zeros((4, 32, 32, 3), np.uint8)}) == 4
    batch = {"images": np.zeros((1, 2, 2, 3), np.uint8)}
    assert task.prepare(batch) is batch


def test_a_damaged_image_is_named():
    document = Document((Image(encoded=b"\xff\xd8\xff"),), "cats/a.jpg", "photos", "interleaved")
    with pytest.raises(ValueError, match=r"document cats/a\.jpg of photos: cannot decode"):
        tokenizer.first_image(document, 32)
