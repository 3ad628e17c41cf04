import json
import types

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from nextstep_jax.data.shapes import heldout_prompts
from nextstep_jax.evaluation.hooks import SCORES, ReconstructionHook, SampleHook, score_alignment
from nextstep_jax.models.vae import VAE
from nextstep_jax.sampling.pipeline import NextStepPipeline
from tests import tiny_model


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
