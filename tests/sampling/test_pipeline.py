import functools

import jax
import numpy as np
import pytest
from PIL import Image

from nextstep_jax.data.layout import prompt_prefix
from nextstep_jax.interop.model_directory import write_model_directory
from nextstep_jax.models.vae import VAE, from_uint8
from nextstep_jax.sampling import pipeline as module
from nextstep_jax.sampling.generate import SamplerConfig, draw_noise, generate, pad_prompts
from nextstep_jax.sampling.pipeline import NextStepPipeline, data_parallel_mesh
from tests import tiny_model

PROMPT, SEED = tiny_model.PROMPTS[0], 7
# The same image among others: prompts of other lengths, in the middle of the batch.
BATCH_PROMPTS = [*tiny_model.PROMPTS[1:4], PROMPT, tiny_model.PROMPTS[4]]
BATCH_SEEDS = [7, 1, 2, SEED, 2**32 - 1]
TOKEN_DIM, NUM_TOKENS = tiny_model.CONFIG.token_dim, 12
# Deterministic, so that with velocity 0 the tokens are the noise that they start from.
ODE = dict(solver="ode", num_inference_steps=2)


@functools.cache
def silent_params():
    """The head's last layer at zero, as at the start of a training: velocity 0 everywhere."""
    params = dict(tiny_model.unrolled_params())
    final = jax.tree.map(np.zeros_like, params["flow_head"]["final_proj"])
    return {**params, "flow_head": {**params["flow_head"], "final_proj": final}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model directory of the tiny model."""
    path = tmp_path_factory.mktemp("model")
    sampling = {
        "preset": "plain",
        "guidance_scale": 2.5,
        "negative_prompt": "blurry",
        "image_size": list(tiny_model.IMAGE_SIZE),
        "sampler": {"solver": "ode", "num_steps": 2},
    }
    write_model_directory(
        path,
        tiny_model.CONFIG,
        tiny_model.VAE_CONFIG,
        tiny_model.vae_params(),
        tiny_model.tokenizer(),
        sampling,
        tiny_model.params(),
    )
    return path


@pytest.fixture(scope="module")
def alone():
    """The image of PROMPT and SEED, made by itself: pixels and tokens."""
    output = tiny_model.pipeline()(PROMPT, seed=SEED, **ODE)
    return np.asarray(output.images[0]), output.tokens[0]


def same_image(image, tokens, alone):
    difference = np.abs(np.asarray(image).astype(int) - alone[0].astype(int)).max()
    assert difference <= 1
    np.testing.assert_allclose(tokens, alone[1], atol=1e-4)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_an_image_depends_on_prompt_and_seed_alone(num_devices, alone, devices):
    mesh = data_parallel_mesh() if num_devices == 8 else None
    if mesh is not None:
        assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    pipe = tiny_model.pipeline(mesh=mesh)
    output = pipe(BATCH_PROMPTS, seed=BATCH_SEEDS, **ODE)
    same_image(output.images[3], output.tokens[3], alone)
    assert alone[0].std() > 10  # A picture, not a flat colour on which anything agrees.
    # The same seed with another prompt gives another image.
    assert np.abs(output.tokens[0] - alone[1]).max() > 0.1

    # The very programs that made those images, with a head that leaves the noise as it is.
    pipe.params = (
        silent_params()
        if mesh is None
        else jax.device_put(silent_params(), module.sharding.replicated(mesh))
    )
    noise = pipe(BATCH_PROMPTS, seed=BATCH_SEEDS, **ODE).tokens
    draw = jax.jit(draw_noise, static_argnums=(2, 3))
    for seed, tokens in zip(BATCH_SEEDS, noise, strict=True):
        key = jax.random.key(np.uint32(seed))[None]
        drawn = [draw(key, np.int32(n), 1, TOKEN_DIM)[0, 0] for n in range(NUM_TOKENS)]
        np.testing.assert_array_equal(tokens, np.stack(drawn))


def test_an_image_survives_a_restart(directory, alone):
    pipe = NextStepPipeline.from_pretrained(directory)
    assert pipe.image_size == tiny_model.IMAGE_SIZE
    assert pipe.preset.sampler == SamplerConfig("ode", num_steps=2)
    output = pipe(PROMPT, seed=SEED)
    np.testing.assert_array_equal(np.asarray(output.images[0]), alone[0])
    np.testing.assert_array_equal(output.tokens[0], alone[1])


def test_batches_seeds_and_progress(alone):
    pipe = tiny_model.pipeline()
    calls = []
    output = pipe(
        [PROMPT, "green"],
        seed=SEED - 1,
        num_images_per_prompt=3,
        batch_size=5,
        chunk_tokens=6,
        callback=lambda done, total: calls.append((done, total)),
        **ODE,
    )
    assert calls == [(6, 24), (12, 24), (18, 24), (24, 24)]
    assert [one["seed"] for one in output.settings] == [6, 7, 8, 6, 7, 8]
    assert [one["prompt"] for one in output.settings] == [PROMPT] * 3 + ["green"] * 3
    assert output.settings[0]["solver"] == "ode" and output.settings[0]["num_steps"] == 2
    assert [image.size for image in output.images] == [(16, 12)] * 6
    same_image(output.images[1], output.tokens[1], alone)


def test_the_branches_are_the_published_ones():
    """An edit: full condition; inputs with the negative prompt; the negative prompt alone."""
    pipe = tiny_model.pipeline()
    source = np.random.default_rng([5]).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    config = SamplerConfig("ode", num_steps=2)
    scales = dict(guidance_scale=3.0, image_guidance_scale=1.8)
    output = pipe(
        "recolour <image> to blue", image=Image.fromarray(source), seed=3, **scales, **ODE
    )

    grid, tokenizer = tiny_model.GRID, tiny_model.tokenizer()
    rows = [
        prompt_prefix("recolour <image> to blue", grid, tokenizer, [grid]),
        prompt_prefix("blurry", grid, tokenizer, [grid]),
        prompt_prefix("blurry", grid, tokenizer),
    ]
    placeholder = tiny_model.CONFIG.image_placeholder_id
    assert [row.count(placeholder) for row in rows] == [12, 12, 0]
    vae = VAE(tiny_model.VAE_CONFIG)
    encode = jax.jit(functools.partial(vae.apply, patch_size=2, method="encode_tokens"))
    tokens = encode({"params": tiny_model.vae_params()}, from_uint8(source[None]))
    inputs = [np.asarray(tokens[0])] * 2 + [None]
    prompts = pad_prompts(rows, 1, TOKEN_DIM, None, inputs, placeholder)
    expected = generate(
        pipe.model,
        pipe.params,
        prompts,
        jax.random.key(3)[None],
        np.array([3.0, 1.8], np.float32),
        config,
        NUM_TOKENS,
    )
    np.testing.assert_allclose(output.tokens, expected, atol=1e-4)
    other = pipe("recolour <image> to blue", image=255 - source, seed=3, **scales, **ODE)
    assert np.abs(other.tokens - output.tokens).max() > 1e-2


@pytest.mark.parametrize(
    ("scale", "image_scale", "num_inputs", "sees"),
    [
        (1.0, 1.0, 0, (False,)),
        (3.0, 2.0, 0, (False, False)),
        (1.0, 1.0, 1, (True,)),
        (3.0, 1.0, 1, (True, True)),
        (1.0, 2.0, 1, (True, True, False)),
        (3.0, 2.0, 2, (True, True, False)),
    ],
)
def test_branches_that_cancel_are_left_out(scale, image_scale, num_inputs, sees):
    pipe = tiny_model.pipeline()
    args = ("a", "b", tiny_model.GRID, num_inputs, scale, image_scale)
    branches, sees_inputs = pipe._branches(*args)
    assert sees_inputs == sees
    count = [ids.count(tiny_model.CONFIG.image_placeholder_id) for ids in branches]
    assert count == [12 * num_inputs * one for one in sees]


def test_the_tokens_of_input_images_are_no_length_of_the_prompt():
    pipe = tiny_model.pipeline(max_prompt_length=16)
    grid = (32, 32)
    (full, *_), sees_inputs = pipe._branches("a", "", grid, 1, 2.0, 1.5)
    assert full.count(tiny_model.CONFIG.image_placeholder_id) == 1024
    assert sees_inputs == (True, True, False)
    # Area token, five characters of the size, and begin and end of the images, twice; "a".
    pipe.max_prompt_length = len(full) - 1024 - 1
    assert pipe.max_prompt_length < 16
    with pytest.raises(ValueError, match=r"^the prompt 'a' has 1. text tokens"):
        pipe._branches("a", "", grid, 1, 2.0, 1.5)


def test_positive_prompt_is_appended_after_one_space():
    seen = []
    pipe = tiny_model.pipeline()
    pipe._branches = lambda prompt, *rest: seen.append(prompt) or (((2, 3),), (False,))
    pipe._run = lambda *args: np.zeros((1, NUM_TOKENS, TOKEN_DIM), np.float32)
    output = pipe(PROMPT, positive_prompt="best quality")
    assert seen == ["a red circle best quality"]
    assert output.settings[0]["prompt"] == PROMPT
    assert output.settings[0]["positive_prompt"] == "best quality"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(height=13), "image size 13x16 .* is off the grid of 4 pixels"),
        (
            dict(prompt="red " * 600),
            rf"^the prompt '{'red ' * 15}\.\.\.' has \d+ text tokens with its size string;"
            " the limit is 512",
        ),
        (dict(negative_prompt="x" * 513), f"^the negative prompt '{'x' * 60}...' has 5.. text"),
        (dict(guidance_scale=float("nan")), "^guidance_scale=nan must be a finite number"),
        (dict(image_guidance_scale=float("inf")), "^image_guidance_scale=inf must be a finite"),
        (dict(image=np.zeros((8, 8))), "image must be a PIL image or uint8 .* got float64"),
        (dict(prompt="<image> <image>", image=Image.new("RGB", (8, 8))), "2 <image> tags for 1"),
        (dict(num_step=3), r"settings \['num_step'\] are unknown; known are \['interval'"),
        (dict(solver="rk4"), "unknown solver 'rk4'"),
        (dict(num_inference_steps=0), "num_steps must be at least 1"),
        (dict(seed=[1, 2]), "seed: 2 seeds for 1 prompts"),
        (dict(seed=-1), r"seeds of images must lie in \[0, 4294967296\), got -1"),
        (dict(seed=2**32 - 1, num_images_per_prompt=2), "seeds of images must lie in"),
        (dict(prompt=[]), "prompts=0 must be at least 1"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt=0 must be at least 1"),
        (dict(batch_size=0), "batch_size=0 must be at least 1"),
    ],
)
def test_bad_input_is_refused_before_device_work(arguments, message, monkeypatch):
    def busy(*_, **__):
        raise AssertionError("device work before the input was checked")

    for name in ("prefill_jit", "sample_chunk", "_encode", "_decode"):
        monkeypatch.setattr(module, name, busy)
    with pytest.raises(ValueError, match=message):
        tiny_model.pipeline()(**{"prompt": PROMPT, **arguments})


def test_stacked_parameters_are_unrolled_once():
    pipe = tiny_model.pipeline(params=tiny_model.params())
    assert set(pipe.params["decoder"]) == {"layers_0", "layers_1", "final_norm"}
    jax.tree.map(np.testing.assert_array_equal, pipe.params, dict(tiny_model.unrolled_params()))
