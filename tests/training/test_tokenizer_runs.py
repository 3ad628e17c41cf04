"""Trainings of the image tokenizer: killed and continued, from weights, with a frozen half."""

import contextlib
import importlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from nextstep_jax import runs
from nextstep_jax.interop import huggingface
from nextstep_jax.interop.model_directory import read_vae, write_vae_directory
from nextstep_jax.interop.perceptual_weights import lpips_slots, read_lpips
from nextstep_jax.models.perceptual import Lpips
from nextstep_jax.models.vae import VAE
from nextstep_jax.training import experiment
from nextstep_jax.training.checkpoint import load_params
from nextstep_jax.training.metrics import read_metrics
from nextstep_jax.training.tokenizer import PerceptualNetwork
from tests import published_files
from tests.recorded.record_perceptual import random_tensor

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
NUM_STEPS, EVERY = 12, 3
CURVE = ("step", "loss", "l1", "psnr", "perceptual", "grad_norm", "param_norm", "samples")
# Two sources mixed, crops and mirroring, noise, a moving average: all that draws at random. Blocks
# on every level would only be more to compile, three times.
CHANGES = {
    "vae.channels": 4,
    "vae.channel_multipliers": "(1, 2)",
    "vae.num_res_blocks": 0,
    "vae.num_groups": 2,
    "vae.latent_channels": 4,
    "tokenizer.image_size": 32,
    "tokenizer.batch_size": 4,
    "tokenizer.random_crop": True,
    "tokenizer.random_flip": True,
    "tokenizer.num_threads": 2,
    "loop.num_steps": NUM_STEPS,
    "loop.checkpoint_every": EVERY,
    "loop.log_every": 1,
    "loop.hook_every": 0,
}


def start(workdir):
    """The program as a user starts it."""
    arguments = [f"--config={ROOT / 'configs/tokenizer_tiny.py'}", f"--workdir={workdir}"]
    arguments += [f"--config.{name}={value}" for name, value in CHANGES.items()]
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch/train_tokenizer.py"), *arguments],
        env={
            **os.environ,
            "XLA_FLAGS": flags,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    output = process.communicate(timeout=240)[0]
    assert process.returncode == code, output
    return output


def test_killed_and_continued_is_not_interrupted(tmp_path):
    """kill -9 anywhere after the first checkpoint: the curve and the parameters, bit for bit."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(broken)
    lines = EVERY + random.randint(1, NUM_STEPS - 2 * EVERY)
    print(f"kill after {lines} lines")
    while not (broken / "checkpoints" / str(EVERY)).exists() and process.poll() is None:
        time.sleep(0.02)
    while len(read_metrics(broken)) < lines and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    assert "continuing at step" in finish(start(broken))
    finish(start(whole))
    curves = [
        [tuple(line[name] for name in CURVE) for line in read_metrics(workdir)]
        for workdir in (broken, whole)
    ]
    assert len(curves[0]) == NUM_STEPS
    assert curves[0] == curves[1]
    for ema in (True, False):
        first, second = (load_params(w / "checkpoints", ema=ema)[0] for w in (broken, whole))
        jax.tree.map(np.testing.assert_array_equal, first, second)


def tiny_config(vae_config, **tokenizer):
    """The published recipe at toy size, on the built-in world."""
    config = importlib.import_module("configs.tokenizer_f8c16").get_config("shapes:easy")
    with config.unlocked():
        config.vae = {
            name: getattr(vae_config, name)
            for name in ("in_channels", *runs.ARCHITECTURE, "norm_patch_size")
        }
    config.tokenizer.update(image_size=32, batch_size=8, perceptual="gradient", **tokenizer)
    config.optimizer.update(warmup_steps=0)
    config.loop.update(num_steps=1, checkpoint_every=1, log_every=1, hook_every=0)
    config.update(dtype="float32")
    return config


def test_training_starts_from_a_tokenizer_of_ours(make_vae, tmp_path):
    """At a rate of 0 the parameters after a step are those it started from, bit for bit."""
    vae = make_vae(channel_multipliers=(1,), num_res_blocks=0)
    write_vae_directory(tmp_path / "first", vae.module.config, vae.params)
    second = tiny_config(vae.module.config)
    second.optimizer.update(learning_rate=0.0)
    second.init_from = str(tmp_path / "first")
    second.loop.update(seed=5)
    runs.train_tokenizer(second, tmp_path / "second")
    for ema in (True, False):
        found, _ = load_params(tmp_path / "second" / "checkpoints", ema=ema)
        jax.tree.map(np.testing.assert_array_equal, found, vae.params)
    # What it started from is not needed to go on.
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    runs.train_tokenizer(second, tmp_path / "second")
    # Another norm is another tokenizer, though its parameters have the same shapes.
    second.vae.norm_patch_size = None
    with pytest.raises(ValueError, match=r"vae: saved .*'norm_patch_size': "):
        runs.train_tokenizer(second, tmp_path / "second")
    (tmp_path / "elsewhere").rename(tmp_path / "first")
    third = experiment.plain(second)
    third["vae"]["latent_channels"] = 2 * third["vae"]["latent_channels"]
    with pytest.raises(ValueError, match=r"does not fit init_from=.*latent_channels=\d+, there"):
        runs.train_tokenizer(third, tmp_path / "third")
    assert not (tmp_path / "third").exists()
    third["init_from"] = str(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="nothing"):
        runs.train_tokenizer(third, tmp_path / "third")


def test_training_starts_from_published_weights(tmp_path):
    """Flux's VAE becomes a NextStep tokenizer: the norm is new, the decoder alone is trained."""
    # One level: less to compile, and names enough.
    values = {
        **published_files.DIFFUSERS_VAE,
        "block_out_channels": [32],
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
    }
    shapes = published_files.vae_shapes({**published_files.VAE, "ch_mult": [1]}, diffusers=True)
    tensors = published_files.random_tensors(shapes, seed=3)
    folder = published_files.write(
        tmp_path / "flux", values, tensors, stem="diffusion_pytorch_model"
    )
    files = huggingface.open_vae(folder)
    config = tiny_config(files.config)
    config.init_from = str(folder)
    config.vae.norm_patch_size = 2
    config.optimizer.update(learning_rate=1e-3, frozen=("encoder/*",))
    runs.train_tokenizer(config, tmp_path / "tuned")
    vae_config, params = read_vae(tmp_path / "tuned")
    assert vae_config.norm_patch_size == 2
    assert (vae_config.scaling_factor, vae_config.shift_factor) == (1.0, 0.0)
    given = files.load(jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], given["encoder"])
    latest, _ = load_params(tmp_path / "tuned" / "checkpoints", ema=False)
    distance = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), latest, given
    )
    assert max(jax.tree.leaves(distance["encoder"])) == 0.0
    # Adam's first step moves a value by the rate, up or down.
    moves = jax.tree.leaves(distance["decoder"])
    assert 0.9e-3 < max(moves) < 1.1e-3
    # A run with a frozen half continues too.
    config.loop.num_steps = 3
    runs.train_tokenizer(config, tmp_path / "tuned")
    for ema in (True, False):
        latest, step = load_params(tmp_path / "tuned" / "checkpoints", ema=ema)
        assert step == 3
        jax.tree.map(np.testing.assert_array_equal, latest["encoder"], given["encoder"])


@pytest.mark.parametrize("multipliers", [(1, 1, 2), (1, 1, 1, 2), (1, 1, 1, 1, 2)])
@pytest.mark.parametrize("channels", [4, 8, 16])
def test_shapes_by_config(make_vae, multipliers, channels):
    """Downsampling 4, 8, 16 with 4, 8, 16 latent channels: the latent has the shape it says."""
    config = dict(channels=4, num_groups=2, num_res_blocks=0, latent_channels=channels)
    vae = VAE(make_vae(channel_multipliers=multipliers, **config).module.config)
    images = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    shapes = jax.eval_shape(vae.init_with_output, jax.random.key(0), images)[1]["params"]

    def encode(params, images):
        return tuple(
            vae.apply({"params": params}, images, method=name)
            for name in ("encode", "encode_tokens")
        )

    latents, tokens = jax.eval_shape(encode, shapes, images)
    factor = 2 ** (len(multipliers) - 1)
    assert latents.shape == (1, 64 // factor, 96 // factor, channels)
    assert tokens.shape == (1, 64 * 96 // (2 * factor) ** 2, 4 * channels)


def test_computing_blocks_again_changes_nothing(make_vae):
    """Remat: the same parameters, and the same gradients up to rounding."""
    made = make_vae(channel_multipliers=(1,))
    again = made.module.clone(remat=True)
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)), jnp.float32)

    def gradients(module):
        @jax.jit
        def of(params):
            return jax.grad(lambda p: jnp.mean(module.apply({"params": p}, images) ** 2))(params)

        return of(made.params)

    first, second = gradients(made.module), gradients(again)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first, second)


def write_alex(folder):
    """Random weights of LPIPS on AlexNet: the network's file and that of the channel weights."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    abstract = jax.eval_shape(Lpips("alex").init, jax.random.key(0), image, image)["params"]
    tensors = {slot.name: random_tensor(slot.name, slot.shape) for slot in lpips_slots(abstract)}
    paths = folder / "alexnet.safetensors", folder / "lin.safetensors"
    for path, is_linear in zip(paths, (False, True), strict=True):
        part = {name: t for name, t in tensors.items() if name.startswith("lin") == is_linear}
        safetensors.numpy.save_file(part, path)
    return paths


def test_the_perceptual_network_is_read_and_used(make_vae, tmp_path):
    """Without noise and at a rate of 0 the logged distance is that of the reconstructions."""
    backbone, linear = write_alex(tmp_path)
    vae = make_vae(channel_multipliers=(1,), num_res_blocks=0)
    config = tiny_config(vae.module.config, noise_gamma=0.0)
    config.optimizer.update(learning_rate=0.0)
    config.tokenizer.update(
        perceptual="alex", perceptual_backbone=str(backbone), perceptual_linear=str(linear)
    )
    runs.train_tokenizer(config, tmp_path / "run")
    (line,) = read_metrics(tmp_path / "run")
    plain = experiment.plain(config)
    params = read_lpips("alex", backbone, linear)
    task, _ = experiment.build_tokenizer_task(plain, PerceptualNetwork(Lpips("alex"), params))
    with contextlib.closing(iter(task.dataset(0, 1))) as iterator:
        images = next(iterator)["images"] / np.float32(127.5) - 1
    trained = read_vae(tmp_path / "run")[1]

    @jax.jit
    def distance(trained, params, images):
        decoded = task.vae.apply({"params": trained}, images)
        return Lpips("alex").apply({"params": params}, decoded, images)

    expected = np.asarray(distance(trained, params, jnp.asarray(images)))
    assert line["perceptual"] == pytest.approx(float(expected.mean()), rel=1e-4)
    backbone.unlink()
    with pytest.raises(FileNotFoundError, match="alexnet"):
        runs.train_tokenizer(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()
