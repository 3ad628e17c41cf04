import ast
import json
import os
import pathlib
import socket
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from nextstep_jax.data.shapes import heldout_prompts
from nextstep_jax.evaluation.hooks import (
    SCORES,
    ReconstructionHook,
    SampleHook,
    sampling_params,
    score_alignment,
)
from nextstep_jax.models.nextstep import NextStep, init_params
from nextstep_jax.models.vae import VAE
from nextstep_jax.parallel import sharding
from nextstep_jax.parallel.mesh import make_mesh
from nextstep_jax.sampling.pipeline import NextStepPipeline
from tests import tiny_model
from tests.evaluation import hook_process

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


class Writer:
    """Keeps what a hook writes."""

    def __init__(self):
        self.images = {}

    def image(self, step, name, pixels):
        self.images[step, name] = pixels


class Pipe(NextStepPipeline):
    """Answers every prompt with a flat picture; remembers how it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, **settings):
        self.calls.append((list(prompts), settings))
        images = [Image.new("RGB", (32, 32), "gray") for _ in prompts]
        return types.SimpleNamespace(images=images)


def test_score_alignment_draws_claim_i_with_seed_i():
    claims = heldout_prompts("easy", 6, seed=0)
    pipe = Pipe()
    report, images = score_alignment(pipe, claims, batch_size=4, guidance_scale=2.0)
    prompts, settings = pipe.calls[0]
    assert prompts == [claim["prompt"] for claim in claims]
    assert settings == {"seed": list(range(6)), "batch_size": 4, "guidance_scale": 2.0}
    assert len(images) == 6
    # There is nothing on a flat picture.
    assert report.as_dict()["overall"] == 0.0


def test_sample_hook_writes_pictures_and_scores(tmp_path):
    seen, pipe, writer = [], Pipe(), Writer()
    hook = SampleHook(
        tmp_path,
        lambda params: seen.append(params) or pipe,
        "easy",
        num_pictures=4,
        num_scored=6,
        guidance_scales=(1.0, 2.5),
    )
    hook(30, types.SimpleNamespace(params="raw", ema=None), writer)
    hook(60, types.SimpleNamespace(params="raw", ema="average"), writer)
    assert seen == ["raw", "average"]
    assert [call[1]["guidance_scale"] for call in pipe.calls] == [1.0, 2.5] * 2
    assert {len(call[0]) for call in pipe.calls} == {6}
    names = {path.name for path in (tmp_path / "samples").iterdir()}
    steps = ("step-0000030", "step-0000060")
    assert names == {f"{step}-guidance-{scale}.png" for step in steps for scale in ("1", "2.5")}
    lines = [json.loads(line) for line in (tmp_path / SCORES).read_text().splitlines()]
    scales = [(line["step"], line["guidance_scale"]) for line in lines]
    assert scales == [(30, 1.0), (30, 2.5), (60, 1.0), (60, 2.5)]
    assert set(writer.images) == {
        (step, f"samples/guidance-{scale}") for step in (30, 60) for scale in ("1", "2.5")
    }


def test_reconstruction_hook_shows_what_the_tokenizer_makes(tmp_path):
    vae = VAE(tiny_model.VAE_CONFIG)
    pixels = np.random.default_rng([4]).integers(0, 256, (2, 12, 16, 3), dtype=np.uint8)
    writer = Writer()
    hook = ReconstructionHook(tmp_path, vae, pixels)
    hook(5, types.SimpleNamespace(params=tiny_model.vae_params(), ema=None), writer)
    picture = np.asarray(Image.open(tmp_path / "samples" / "step-0000005.png"))
    np.testing.assert_array_equal(writer.images[5, "reconstructions"], picture)
    # Pairs are 192 pixels wide, an image 96 of them: 6 times its 16 columns.
    images = jnp.asarray(pixels / 127.5 - 1, jnp.float32)
    decoded = jax.jit(vae.apply)({"params": tiny_model.vae_params()}, images)
    decoded = np.clip(np.round((np.asarray(decoded) / 2 + 0.5) * 255), 0, 255)
    shown = picture[8 : 8 + 72 : 6, 8 : 8 + 192 : 6]
    np.testing.assert_array_equal(shown[:, :16], pixels[0])
    assert np.abs(shown[:, 16:].astype(int) - decoded[0]).max() <= 1
    assert decoded[0].std() > 10


def test_scores_of_repeated_steps_are_not_kept_twice(tmp_path):
    hook = SampleHook(tmp_path, lambda params: Pipe(), "easy", num_pictures=2, num_scored=2)
    state = types.SimpleNamespace(params="raw", ema=None)
    for step in (10, 20, 30, 20):  # killed after 30, continued from 10
        hook(step, state, Writer())
    lines = [json.loads(line) for line in (tmp_path / SCORES).read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]


def on_mesh(model, devices, axes):
    """The tiny model's parameters as training lays them out."""
    boxed = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    shardings = sharding.tree_shardings(boxed, make_mesh(axes, devices))
    return jax.device_put(tiny_model.params(), shardings)


def test_parameters_for_sampling(devices, monkeypatch):
    """From a mesh to the devices of this process, in the model's dtype, split over them."""
    monkeypatch.setattr(jax, "local_devices", lambda: devices[:4])
    model = NextStep(tiny_model.CONFIG, dtype=jnp.bfloat16)
    params = on_mesh(model, devices[:4], {"fsdp": 2, "tensor": 2})
    found, mesh = sampling_params(model, params)
    assert dict(mesh.shape)["fsdp"] == 4 and list(mesh.devices.flat) == list(devices[:4])
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_model.unrolled_params())
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    kernel = found["decoder"]["layers_1"]["mlp"]["gate_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (8, 48)
    # Nothing to do on a single device.
    alone = jax.device_put(tiny_model.params(), devices[0])
    assert sampling_params(model, alone) == (alone, None)


def test_samples_on_the_mesh_are_those_of_one_device(devices, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: devices[:2])
    model = NextStep(tiny_model.CONFIG)
    params, mesh = sampling_params(model, on_mesh(model, devices[:2], {"fsdp": 2}))
    prompts, settings = tiny_model.PROMPTS[:2], {"seed": [5, 6], "num_inference_steps": 2}
    split = tiny_model.pipeline(params=params, mesh=mesh)(prompts, **settings)
    whole = tiny_model.pipeline()(prompts, **settings)
    np.testing.assert_allclose(split.tokens, whole.tokens, atol=2e-4)
    assert np.abs(whole.tokens[0] - whole.tokens[1]).max() > 0.1


def start(count, workdir):
    """The process of a run of `count` of them, four devices in all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={4 // count}"
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    program = [sys.executable, str(ROOT / "tests/evaluation/hook_process.py"), address, str(count)]
    return [
        subprocess.Popen(
            [*program, str(index), str(workdir)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]


def test_two_processes_share_the_prompts_and_one_writes(tmp_path):
    """Parameters over four devices of two processes; see hook_process.py for what it compares."""
    processes = start(2, tmp_path)
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    calls = [ast.literal_eval((tmp_path / f"calls-{index}").read_text()) for index in range(2)]
    # At both scales; five prompts are three each, the last of them twice.
    assert calls == [[[0, 2, 4]] * 2, [[1, 3, 4]] * 2]
    names = {path.name for path in (tmp_path / "samples").iterdir()}
    pictures = [f"step-0000010-guidance-{scale}.png" for scale in (1, 3)]
    assert names == {*pictures, "step-0000010.png"}
    # The pictures of one process that draws all five.
    alone, state = tmp_path / "alone", types.SimpleNamespace(params="raw", ema=None)
    prompts = hook_process.PROMPTS
    hook = SampleHook(
        alone, lambda _: hook_process.Pipe(), prompts=prompts, guidance_scales=(1.0, 3.0)
    )
    hook(10, state, Writer())
    state.params = tiny_model.vae_params()
    ReconstructionHook(alone, VAE(tiny_model.VAE_CONFIG), hook_process.PIXELS)(10, state, Writer())
    for name in names:
        found, expected = (
            np.asarray(Image.open(folder / "samples" / name), int) for folder in (tmp_path, alone)
        )
        assert np.abs(found - expected).max() <= 1, name
        assert found.std() > 10
