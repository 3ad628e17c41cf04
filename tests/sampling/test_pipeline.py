import functools

import jax
import numpy as np
import pytest
from PIL import Image

from nextstep_jax.data.layout import prompt_prefix
from nextstep_jax.flow.guidance import SCHEDULES
from nextstep_jax.flow.solvers import SOLVERS
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
TOKEN_DIM, NUM_TOKENS = tiny_model.CONFIG.token_dim, 16
# Deterministic, so that with velocity 0 the tokens are the noise that they start from.
ODE = dict(solver="ode", num_inference_steps=2)
# Guidance magnifies rounding from token to token: over 16 tokens a batch of five differs from one
# image by 2e-4 at a scale of 2.5, by 3e-5 here, by 3e-6 without guidance.
GUIDED = dict(**ODE, guidance_scale=1.5)


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
        "guidance_scale": 1.5,
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
    output = tiny_model.pipeline()(PROMPT, seed=SEED, **GUIDED)
    return np.asarray(output.images[0]), output.tokens[0]


def same_image(image, tokens, alone):
    difference = np.abs(np.asarray(image).astype(int) - alone[0].astype(int)).max()
    assert difference <= 1
    np.testing.assert_allclose(tokens, alone[1], atol=1e-4)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_an_image_depends_on_prompt_and_seed_alone(num_devices, alone, devices):
    mesh = data_parallel_mesh() if num_devices == 8 else None
    if mesh is not None:
        assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "context": 1, "tensor": 1}
    pipe = tiny_model.pipeline(mesh=mesh)
    output = pipe(BATCH_PROMPTS, seed=BATCH_SEEDS, **GUIDED)
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
    noise = pipe(BATCH_PROMPTS, seed=BATCH_SEEDS, **GUIDED).tokens
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
        chunk_tokens=8,
        callback=lambda done, total: calls.append((done, total)),
        **GUIDED,
    )
    assert calls == [(8, 32), (16, 32), (24, 32), (32, 32)]
    assert [one["seed"] for one in output.settings] == [6, 7, 8, 6, 7, 8]
    assert [one["prompt"] for one in output.settings] == [PROMPT] * 3 + ["green"] * 3
    assert output.settings[0]["solver"] == "ode" and output.settings[0]["num_steps"] == 2
    assert [image.size for image in output.images] == [(32, 8)] * 6
    same_image(output.images[1], output.tokens[1], alone)


def encoded(source):
    """Tokens of an image that has its size already."""
    vae = VAE(tiny_model.VAE_CONFIG)
    encode = jax.jit(functools.partial(vae.apply, patch_size=2, method="encode_tokens"))
    return np.asarray(encode({"params": tiny_model.vae_params()}, from_uint8(source[None])))[0]


# Unequal grids: 2 x 8 and 4 x 4 tokens, both of the base of 16 pixels.
SOURCES = [
    np.random.default_rng([5, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for height, width in ((8, 32), (16, 16))
]
EDIT = "recolour <image> like <image>"


@pytest.mark.parametrize("image_scale", [1.0, 1.8])
def test_the_branches_of_an_edit_are_the_published_ones(image_scale):
    """Two: everything; the negative prompt alone. Three: between them the inputs with it."""
    pipe = tiny_model.pipeline()
    config = SamplerConfig("ode", num_steps=2)
    scales = dict(guidance_scale=3.0, image_guidance_scale=image_scale)
    images = [Image.fromarray(source) for source in SOURCES]
    output = pipe(EDIT, image=images, seed=3, **scales, **ODE)
    assert output.images[0].size == (32, 8)  # The shape of the first input.

    grid, tokenizer, grids = tiny_model.GRID, tiny_model.tokenizer(), [(2, 8), (4, 4)]
    tokens = np.concatenate([encoded(source) for source in SOURCES])
    rows = [prompt_prefix(EDIT, grid, tokenizer, grids)]
    inputs = [tokens]
    if image_scale != 1.0:
        rows.append(prompt_prefix("<image><image>blurry", grid, tokenizer, grids))
        inputs.append(tokens)
    rows.append(prompt_prefix("blurry", grid, tokenizer))
    inputs.append(None)
    placeholder = tiny_model.CONFIG.image_placeholder_id
    assert [row.count(placeholder) for row in rows] == [32] * (len(rows) - 1) + [0]
    prompts = pad_prompts(rows, 1, TOKEN_DIM, None, inputs, placeholder)
    guidance = np.array([3.0, image_scale], np.float32)
    args = (pipe.model, pipe.params, prompts, jax.random.key(3)[None], guidance)
    expected = generate(*args, config, NUM_TOKENS)
    np.testing.assert_allclose(output.tokens, expected, atol=1e-4)

    # The order and the content of the inputs matter.
    for others in (images[::-1], [images[0], 255 - SOURCES[1]]):
        other = pipe(EDIT, image=others, seed=3, height=8, width=32, **scales, **ODE)
        assert np.abs(other.tokens - output.tokens).max() > 1e-2


def test_shared_noise_is_one_noise_for_all_captions():
    """With a head that leaves the noise as it is: captions share it, images do not."""
    pipe = tiny_model.pipeline(params=silent_params())
    arguments = dict(seed=[5, 9], num_images_per_prompt=2, **ODE)
    output = pipe([PROMPT, "green"], shared_noise=True, **arguments)
    assert [one["seed"] for one in output.settings] == [5, 6, 5, 6]
    assert all(one["shared_noise"] for one in output.settings)
    np.testing.assert_array_equal(output.tokens[:2], output.tokens[2:])
    draw = jax.jit(draw_noise, static_argnums=(2, 3))
    for seed, tokens in zip([5, 6], output.tokens, strict=False):
        key = jax.random.key(np.uint32(seed))[None]
        drawn = [draw(key, np.int32(n), 1, TOKEN_DIM)[0, 0] for n in range(NUM_TOKENS)]
        np.testing.assert_array_equal(tokens, np.stack(drawn))
    apart = pipe([PROMPT, "green"], **arguments)
    assert [one["seed"] for one in apart.settings] == [5, 6, 9, 10]
    assert not any(one["shared_noise"] for one in apart.settings)
    np.testing.assert_array_equal(apart.tokens[:2], output.tokens[:2])
    assert np.abs(apart.tokens[2:] - output.tokens[2:]).max() > 1


@pytest.fixture
def planned(monkeypatch):
    """A pipeline that samples nothing and notes what it was to sample."""
    seen = {}

    def run(requests, input_tokens, scales, config, grid, *_):
        seen.update(requests=requests, scales=scales, config=config, grid=grid)
        return np.zeros((len(requests), grid[0] * grid[1], TOKEN_DIM), np.float32)

    pipe = tiny_model.pipeline()
    pipe._run, pipe._encode = run, lambda inputs: seen.update(inputs=inputs)
    pipe.decode = lambda tokens, grid, _: np.zeros((len(tokens), 1, 1, 3), np.uint8)
    return lambda *args, **settings: (pipe(*args, **settings), seen)


def test_positive_prompt_is_appended_after_one_space(planned):
    output, seen = planned(PROMPT, positive_prompt="best quality")
    expected = prompt_prefix("a red circle best quality", (2, 8), tiny_model.tokenizer())
    assert list(seen["requests"][0].branches[0]) == expected
    assert output.settings[0]["prompt"] == PROMPT
    assert output.settings[0]["positive_prompt"] == "best quality"


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_setting_reaches_the_sampler(solver, schedule, planned):
    settings = dict(shift=3.2, noise_level=0.6, interval=(0.1, 0.9), renorm=True, token_norm=True)
    output, seen = planned(
        PROMPT,
        solver=solver,
        schedule=schedule,
        num_inference_steps=7,
        guidance_scale=5.5,
        image_guidance_scale=1.5,
        **settings,
    )
    expected = dict(solver=solver, schedule=schedule, num_steps=7, **settings)
    assert seen["config"] == SamplerConfig(**expected)
    assert expected.items() <= output.settings[0].items()
    np.testing.assert_array_equal(seen["scales"], np.array([5.5, 1.5], np.float32))


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ({}, (4, 4)),  # The first input's shape at the base of 16 pixels.
        (dict(height=32, width=32), (8, 8)),
        (dict(height=16, width=64), (4, 16)),
        (dict(height=8), (2, 8)),  # The other side is the default.
        (dict(width=8), (2, 2)),
    ],
)
def test_inputs_are_fitted_to_the_base_of_the_output(size, grid, planned):
    output, seen = planned(EDIT, image=[SOURCES[1], SOURCES[0]], **size)
    assert seen["grid"] == grid
    assert (output.settings[0]["height"], output.settings[0]["width"]) == (4 * grid[0], 4 * grid[1])
    side = int((grid[0] * grid[1]) ** 0.5) * 4
    assert [one.shape for one in seen["inputs"]] == [(side, side, 3), (side // 2, side * 2, 3)]
    branches = seen["requests"][0].branches
    placeholder, tokens = tiny_model.CONFIG.image_placeholder_id, grid[0] * grid[1]
    assert [ids.count(placeholder) for ids in branches] == [2 * tokens, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(height=13),
            r"^image size 13x32 \(height x width\) is off the 17 aspect grids with 4 pixels a"
            " token; the nearest sizes are 8x32, 12x48, 16x16, 20x20$",
        ),
        (dict(height=16), "image size 16x32 .* the nearest sizes are 8x32, 16x16, 20x20, 24x24$"),
        (
            dict(prompt="red " * 600),
            rf"^the prompt '{'red ' * 15}\.\.\.' has \d+ text tokens with its size string;"
            " the limit is 512",
        ),
        (dict(negative_prompt="x" * 513), f"^the negative prompt '{'x' * 60}...' has 5.. text"),
        (dict(guidance_scale=float("nan")), "^guidance_scale=nan must be a finite number"),
        (dict(image_guidance_scale=float("inf")), "^image_guidance_scale=inf must be a finite"),
        (dict(image=np.zeros((8, 8))), "image must be a PIL image or uint8 .* got float64"),
        (dict(image=Image.new("F", (8, 8))), "floating-point pixels have no known range"),
        (dict(prompt="<image> a"), "the prompt has 1 <image> tags for 0 input images"),
        (dict(negative_prompt="<image> a"), "the negative prompt has 1 <image> tags; only a"),
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
