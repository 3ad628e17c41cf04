import dataclasses
import functools
import json
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from PIL import Image as PILImage

from nextstep_jax.data.schema import Document, Image, Text
from nextstep_jax.data.shapes import ShapesSource
from nextstep_jax.data.sources import ImageFolderSource
from nextstep_jax.models.config import VAEConfig
from nextstep_jax.models.vae import VAE
from nextstep_jax.parallel.mesh import AXES
from nextstep_jax.parallel.sharding import replicated
from nextstep_jax.training import tokenizer
from nextstep_jax.training.optimizer import OptimizerConfig, frozen_mask
from nextstep_jax.training.state import init_state, make_train_step
from nextstep_jax.training.tokenizer import PerceptualNetwork, TokenizerConfig, TokenizerTask
from nextstep_jax.training.tokenizer_losses import disturb_latents

# Convolutions take long to optimise, and each of these programs runs once.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

WORLD = ShapesSource("pair", image_size=32)
CONFIG = TokenizerConfig(image_size=32, batch_size=4, l2_weight=1.0, num_threads=1)


def make_task(vae, source, train=CONFIG, network=None):
    return TokenizerTask(vae, {"only": (source, 1.0)}, train, {}, network)


@pytest.fixture(scope="module")
def vae(make_vae):
    """One level without blocks of its own compiles in a fraction of the time of four."""
    return make_vae(channel_multipliers=(1,), num_res_blocks=0)


@pytest.fixture(scope="module")
def task(vae):
    return make_task(vae.module, ShapesSource("pair", image_size=32))


def test_loss_is_its_parts(task, vae):
    pixels = np.asarray(small_images(4))
    key = jax.random.key(1)
    batch = {"images": jnp.asarray(pixels)}
    loss, metrics = fast_jit(task.loss)(vae.params, batch, key)
    variables = {"params": vae.params}
    images = pixels / 127.5 - 1.0

    @fast_jit
    def reconstruct(images):
        latents = vae.module.apply(variables, images, method="encode")
        _, noise_key = jax.random.split(key)
        disturbed = disturb_latents(latents, noise_key, 0.5)
        return vae.module.apply(variables, disturbed, method="decode")

    decoded = np.asarray(reconstruct(jnp.float32(images)), np.float64)
    l1, l2 = np.abs(decoded - images).mean(), ((decoded - images) ** 2).mean()
    assert float(metrics["l1"]) == pytest.approx(l1, rel=1e-5)
    assert float(metrics["psnr"]) == pytest.approx(10 * np.log10(4 / l2), rel=1e-5)
    total = l1 + l2 + float(metrics["perceptual"])
    assert float(loss) == pytest.approx(total, rel=1e-5)


def small_images(n):
    """Pictures of the world at half their size: attention over a quarter of the pixels."""
    return jnp.stack([tokenizer.first_image(WORLD[i], 16) for i in range(n)])


def run_steps(task, params, config, num_steps):
    """The states before and after each step on one batch, and the steps' metrics.

    The noise is that of one key, so that the loss is a function of the parameters alone.
    """

    def loss(params, batch, _):
        return task.loss(params, batch, jax.random.key(0))

    step = fast_jit(make_train_step(loss, config))
    state = fast_jit(functools.partial(init_state, config=config))(params, key=jax.random.key(0))
    states, metrics, batch = [state], [], task.prepare({"images": small_images(2)})
    for _ in range(num_steps):
        state, values = step(states[-1], batch)
        states.append(state)
        metrics.append(jax.device_get(values))
    return states, metrics


ADAM = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.0, clip_norm=1e9)


@pytest.fixture(scope="module")
def trained(task, vae):
    """Ten steps with nothing frozen."""
    return run_steps(task, vae.params, ADAM, 10)


def path_of(keys):
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def moved(before, after):
    """Paths of the leaves of which a value differs."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return {path_of(keys) for (keys, a), b in pairs if not np.array_equal(a, b)}


def test_training_lowers_the_loss(trained, vae):
    """Both halves are trained: ten steps on one batch, and every kernel of both moves."""
    states, metrics = trained
    assert metrics[-1]["loss"] < 0.6 * metrics[0]["loss"]
    leaves = jax.tree_util.tree_leaves_with_path(vae.params)
    kernels = {path_of(keys) for keys, leaf in leaves if leaf.ndim > 1}
    assert len(kernels) > 20
    assert kernels - moved(vae.params, states[-1].params) == set()


def numbered(n):
    """Images whose colour is their number."""
    return [
        Document((Text("x"), Image(pixels=np.full((40, 48, 3), i, np.uint8))), str(i), "s", "pair")
        for i in range(n)
    ]


def read(source, num_batches, process=(0, 1), **changes):
    train = dataclasses.replace(CONFIG, **changes)
    with closing(iter(make_task(VAE(VAEConfig()), source, train).dataset(*process))) as iterator:
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
        first, second = (make_task(VAE(VAEConfig()), make_source()) for _ in range(2))
        assert first.fingerprint == second.fingerprint
        assert "0x" not in str(first.fingerprint)
    levels = [
        make_task(VAE(VAEConfig()), ShapesSource("pair", image_size=32, level=name)).fingerprint
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


def test_a_frozen_encoder_stays_and_costs_no_moments(task, trained, vae):
    """The released standalone tokenizer trained its decoder alone."""

    def halves(state):
        return {path.split("/")[0] for path in moved(vae.params, state.params)}

    states, metrics = trained
    assert halves(states[2]) == {"encoder", "decoder"}
    config = dataclasses.replace(ADAM, frozen=("encoder/*",), ema_decay=0.9)
    (_, _, last), (first, second) = run_steps(task, vae.params, config, 2)
    assert halves(last) == {"decoder"}
    encoder_size = sum(leaf.size for leaf in jax.tree.leaves(vae.params["encoder"]))
    all_size = sum(leaf.size for leaf in jax.tree.leaves(vae.params))
    moments = sum(leaf.size for leaf in jax.tree.leaves(last.opt_state) if leaf.ndim)
    assert moments == 2 * (all_size - encoder_size)
    # The gradient's norm is that of the decoder alone; Adam's first moments are a tenth of the
    # gradient after the first step, of all of it where nothing is frozen.
    gradient = jax.tree.map(lambda m: np.asarray(m) / 0.1, optax.tree.get(states[1], "mu"))
    norms = {half: float(optax.tree.norm(gradient[half])) for half in ("encoder", "decoder")}
    assert float(metrics[0]["grad_norm"]) == pytest.approx(np.hypot(*norms.values()), rel=1e-4)
    assert norms["encoder"] > 0.1 * norms["decoder"]
    assert float(first["grad_norm"]) == pytest.approx(norms["decoder"], rel=1e-4)
    assert float(second["update_norm"]) > 0


def test_frozen_patterns_that_fit_nothing_are_refused(vae):
    with pytest.raises(ValueError, match=r"'encodr/\*' matches no parameter.*decoder.*encoder"):
        frozen_mask(vae.params, ("encodr/*",))
    with pytest.raises(ValueError, match="freezes every parameter"):
        frozen_mask(vae.params, ("*",))
    mask = frozen_mask(vae.params, ("*/conv_in/kernel",))
    assert sum(jax.tree.leaves(mask)) == 2


class _Half(nn.Module):
    """A distance with one weight: what a perceptual network is to the task."""

    @nn.compact
    def __call__(self, images, others):
        weight = self.param("weight", nn.initializers.ones, ())
        return weight * jnp.mean(jnp.square(images - others), axis=(1, 2, 3))


@pytest.mark.parametrize("perceptual", ["none", "gradient", "vgg"])
def test_perceptual_terms(vae, perceptual):
    """The network's distance enters with its weight; its own weights are no gradients' business."""
    changes = {"perceptual": perceptual, "perceptual_weight": 3.0, "perceptual_backbone": "x"}
    train = dataclasses.replace(CONFIG, **changes)
    network = PerceptualNetwork(_Half(), {"weight": jnp.float32(0.5)})
    task = make_task(vae.module, WORLD, train, network if perceptual == "vgg" else None)
    images = small_images(2)
    batch = {"images": images}
    if perceptual == "vgg":
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES)
        batch = task.prepare({"images": jax.device_put(images, replicated(mesh))})
        assert float(batch["perceptual"]["weight"]) == 0.5
    loss, metrics = fast_jit(task.loss)(vae.params, batch, jax.random.key(0))
    l2 = 4 / 10 ** (float(metrics["psnr"]) / 10)
    reconstruction = float(metrics["l1"]) + l2
    if perceptual == "none":
        assert "perceptual" not in metrics
        expected = reconstruction
    else:
        expected = reconstruction + 3.0 * float(metrics["perceptual"])
    if perceptual == "vgg":
        assert float(metrics["perceptual"]) == pytest.approx(0.5 * l2, rel=1e-5)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_the_kl_term_and_the_sample(make_vae):
    """With a KL term the decoder sees a sample of the posterior."""
    vae = make_vae(channel_multipliers=(1,), deterministic=False, norm_patch_size=None)
    train = dataclasses.replace(CONFIG, kl_weight=0.1, noise_gamma=0.0, perceptual="none")
    task = make_task(vae.module, WORLD, train)
    pixels = small_images(2)
    key = jax.random.key(3)
    loss, metrics = fast_jit(task.loss)(vae.params, {"images": pixels}, key)

    @fast_jit
    def by_hand(pixels):
        variables, images = {"params": vae.params}, pixels / 127.5 - 1.0
        moments = vae.module.apply(variables, images, method="encode_moments")
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        noise = jax.random.normal(jax.random.split(key)[0], mean.shape)
        sample = mean + jnp.exp(log_variance / 2) * noise
        return moments, vae.module.apply(variables, sample, method="decode") - images

    moments, error = by_hand(pixels)
    mean, log_variance = np.split(np.asarray(moments, np.float64), 2, axis=-1)
    kl = (0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance)).mean()
    assert float(metrics["kl"]) == pytest.approx(kl, rel=1e-5)
    expected = np.abs(error).mean() + np.square(error).mean() + 0.1 * kl
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_a_kl_term_needs_a_latent_that_it_is_of(make_vae):
    train = dataclasses.replace(CONFIG, kl_weight=0.1)
    for changes in ({"deterministic": False}, {"norm_patch_size": None, "deterministic": True}):
        with pytest.raises(ValueError, match=r"kl_weight=0.1 needs a VAE that samples"):
            make_task(make_vae(**changes).module, WORLD, train)


def test_another_norm_or_network_is_another_run(make_vae):
    """Parameters have the same shapes: without this a checkpoint would go on as something else."""
    vae = make_vae(channel_multipliers=(1,)).module
    other = make_vae(channel_multipliers=(1,), norm_over="channel").module
    assert make_task(vae, WORLD).fingerprint != make_task(other, WORLD).fingerprint
    train = dataclasses.replace(CONFIG, perceptual="vgg", perceptual_backbone="x")
    networks = [PerceptualNetwork(_Half(), {"weight": jnp.float32(w)}) for w in (0.5, 0.6)]
    first, second = (make_task(vae, WORLD, train, n).fingerprint for n in networks)
    assert first != second
    assert json.loads(json.dumps(first)) == first


def test_sources_are_mixed_cropped_and_mirrored():
    """By weight; the same for any number of threads; every epoch anew."""
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (40, 64, 3))
    dark = [Document((Image(pixels=np.ascontiguousarray(ramp)),), "d", "s", "pair")] * 3
    white = [Document((Image(pixels=np.full((40, 40, 3), 255, np.uint8)),), "w", "s", "pair")]
    changes = {"random_crop": True, "smallest_crop": 0.8, "random_flip": True}

    def draw(num_threads):
        train = dataclasses.replace(CONFIG, **changes, num_threads=num_threads)
        sources = {"dark": (dark, 3.0), "white": (white, 1.0)}
        task = TokenizerTask(VAE(VAEConfig()), sources, train, {})
        with closing(iter(task.dataset(0, 1))) as iterator:
            return np.concatenate([next(iterator)["images"] for _ in range(24)])

    images = draw(0)
    np.testing.assert_array_equal(images, draw(2))
    is_white = (images == 255).all(axis=(1, 2, 3))
    assert is_white.mean() == pytest.approx(0.25, abs=0.02)
    rows = images[~is_white][:, 16, :, 0].astype(int)
    mirrored = rows[:, 0] > rows[:, -1]
    assert 0.3 < mirrored.mean() < 0.7
    left = np.where(mirrored, rows[:, -1], rows[:, 0])
    # The square is 32 to 40 wide in a picture of 64, so that it starts anywhere in 0 ... 32.
    assert left.min() <= 4
    assert 20 <= left.max() <= 33
    width = np.abs(rows[:, -1] - rows[:, 0])
    assert width.min() >= 29
    assert width.max() <= 40
    assert len(set(left)) > 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"perceptual": "lpips"}, r"perceptual='lpips' is unknown.*gradient"),
        ({"perceptual": "vgg"}, "needs perceptual_backbone"),
        ({"smallest_crop": 0.0}, r"smallest_crop=0.0 must lie in \(0, 1\]"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0 must be finite and not negative"),
        ({"noise_gamma": float("nan")}, "noise_gamma=nan must be finite"),
        ({"gradient_scales": 0}, "gradient_scales=0 must be at least 1"),
        ({"gradient_scales": 6}, "gradient_scales=6 halve image_size=32"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
