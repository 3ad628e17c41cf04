"""The whole way on real photographs: folder -> tokenizer -> model -> pictures, at toy size."""

import importlib
import json
import logging
import pathlib
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from nextstep_jax import runs
from nextstep_jax.models.config import VAEConfig
from nextstep_jax.sampling.pipeline import NextStepPipeline
from nextstep_jax.training import experiment
from nextstep_jax.training.checkpoint import stored_params
from nextstep_jax.training.metrics import read_metrics
from nextstep_jax.training.tokenizer import TokenizerConfig

skimage_data = pytest.importorskip("skimage.data")

_CAPTIONS = {
    "astronaut": "a woman in an orange suit in front of a flag",
    "coffee": "a cup of coffee with a spoon on a wooden table",
    "chelsea": "a cat that looks at the camera",
    "rocket": "a rocket on its pad at night",
}


def load_config(name, argument):
    return importlib.import_module(f"configs.{name}").get_config(argument)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name, caption in _CAPTIONS.items():
        Image.fromarray(getattr(skimage_data, name)()).resize((96, 80)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption + "\n")
    return folder


@pytest.fixture(scope="module")
def workdirs(photos, tmp_path_factory):
    """A tokenizer and a model, trained for a handful of steps."""
    root = tmp_path_factory.mktemp("runs")
    config = load_config("folder_tokenizer", str(photos))
    config.vae.update(channels=4, channel_multipliers=(1, 2), num_res_blocks=0, num_groups=2)
    config.tokenizer.update(image_size=16, batch_size=8)
    config.optimizer.update(learning_rate=1e-2, warmup_steps=3)
    config.loop.update(num_steps=12, log_every=2, checkpoint_every=6, hook_every=12)
    runs.train_tokenizer(config, root / "tokenizer")

    config = load_config("folder", str(photos))
    config.image_size = 16
    with config.model.unlocked():
        config.model.downsampling = 2
        config.model.patch_size = 2
        config.model.latent_channels = 16
    config.model.decoder.update(
        embed_dim=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64
    )
    config.model.decoder.vocab_size = 512
    config.model.flow_head.update(width=32, num_layers=1)
    config.data.update(row_length=96, rows_per_batch=8, max_image_tokens=32)
    config.loss.update(image_positions=32)
    config.optimizer.update(learning_rate=1e-2, warmup_steps=3)
    config.loop.update(num_steps=12, log_every=2, checkpoint_every=6)
    runs.train_model(config, root / "model", root / "tokenizer")
    (root / "config.json").write_text(config.to_json())
    return root


@pytest.mark.parametrize("name", ["tokenizer", "model"])
def test_loss_falls(workdirs, name):
    lines = read_metrics(workdirs / name)
    assert [line["step"] for line in lines] == [0, 1, 3, 5, 7, 9, 11]
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]
    # Of batches of tokens it is known what they need; of a CPU nobody publishes a peak.
    assert all(("tflops_per_device" in line) == (name == "model") for line in lines)
    assert not any("mfu" in line for line in lines)


def test_workdir_is_whole(workdirs):
    for name in ("config.json", "model.json", "tokenizer.json", "metrics.jsonl"):
        assert (workdirs / "model" / name).is_file(), name
    assert (workdirs / "tokenizer" / "samples" / "step-0000012.png").is_file()
    assert any((workdirs / "model" / "tensorboard").iterdir())
    config = json.loads((workdirs / "model" / "config.json").read_text())
    assert config["sources"]["photos"]["type"] == "folder"


def test_pipeline_samples_from_the_workdir(workdirs):
    pipe = NextStepPipeline.from_pretrained(workdirs / "model")
    result = pipe("a cat", num_images_per_prompt=2, num_inference_steps=4, seed=3)
    assert [image.size for image in result.images] == [(16, 16)] * 2
    assert [one["seed"] for one in result.settings] == [3, 4]
    assert np.abs(result.tokens[0] - result.tokens[1]).max() > 0.1


def test_a_stage_begins_with_the_one_before(workdirs, photos, caplog, tmp_path):
    """Its parameters, its tokenizers; nothing else. Begun, it needs the one before no more."""
    before = tmp_path / "before"
    shutil.copytree(workdirs / "model", before)
    config = ConfigDict(json.loads((workdirs / "config.json").read_text()))
    config.init_from = str(before)
    config.loop.update(num_steps=1)
    config.optimizer.update(warmup_steps=1000)
    # Small enough a step that the parameters it leaves are those it found.
    config.optimizer.learning_rate = 1e-9
    with caplog.at_level(logging.INFO):
        runs.train_model(config, tmp_path / "next")
    (line,) = [m for m in caplog.messages if m.startswith("beginning with")]
    rest = "optimizer, schedule and data are new"
    assert line == f"beginning with the parameters of {before} at step 12; {rest}"
    last = stored_params(workdirs / "model" / "checkpoints", ema=False).load()
    average = stored_params(workdirs / "model" / "checkpoints", ema=True).load()
    found = stored_params(tmp_path / "next" / "checkpoints", ema=False).load()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), found, last)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), last, average)
    assert max(jax.tree.leaves(moved)) > 1e-4
    (metrics,) = read_metrics(tmp_path / "next")
    assert (metrics["step"], metrics["learning_rate"]) == (0, pytest.approx(1e-12))
    tokenizers = [(root / "tokenizer.json").read_bytes() for root in (before, tmp_path / "next")]
    assert tokenizers[0] == tokenizers[1]

    shutil.rmtree(before)
    config.loop.num_steps = 2
    runs.train_model(config, tmp_path / "next")
    assert [line["step"] for line in read_metrics(tmp_path / "next")] == [0, 1]
    with pytest.raises(FileNotFoundError, match="before"):
        runs.train_model(config, tmp_path / "other")
    config.init_from = ""
    with pytest.raises(ValueError, match="image tokenizer is missing: give --tokenizer"):
        runs.train_model(config, tmp_path / "other")
    config.init_from = str(workdirs / "model")
    config.model.decoder.mlp_dim = 80
    with pytest.raises(ValueError, match=r"init_from=.*: decoder.mlp_dim=80, there 64$"):
        runs.train_model(config, tmp_path / "other")
    config.model.decoder.mlp_dim = 64
    other = shutil.copytree(workdirs / "tokenizer", tmp_path / "tokenizer")
    config_of_vae = json.loads((other / "vae.json").read_text())
    (other / "vae.json").write_text(json.dumps({**config_of_vae, "scaling_factor": 2.0}))
    with pytest.raises(ValueError, match="another image tokenizer than the one given"):
        runs.train_model(config, tmp_path / "other", other)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *(("shapes", "easy"), ("shapes", "full"), ("folder", "x"), ("records", "x")),
        *(("folder", "x,tiny"), ("records", "x,tiny")),
    ],
)
def test_model_configs_have_no_unknown_keys(name, argument):
    config = experiment.plain(load_config(name, argument))
    model = experiment.build_model_config(config["model"])
    loop = experiment.build_loop(config)
    assert loop.optimizer.num_steps == loop.num_steps
    assert model.token_dim == 64


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("shapes_tokenizer", "full"),
        ("folder_tokenizer", "x"),
        ("tokenizer_tiny", None),
        ("tokenizer_study", "plain-0.1"),
        ("tokenizer_f8c16", "images:x"),
    ],
)
def test_tokenizer_configs_have_no_unknown_keys(name, argument):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config() if argument is None else module.get_config(argument)
    config = experiment.plain(config)
    experiment.check_sections(config, experiment.TOKENIZER_SECTIONS)
    vae = experiment.build(VAEConfig, config["vae"], "vae")
    if config["tokenizer"]["perceptual"] == "vgg":
        with pytest.raises(ValueError, match="needs perceptual_backbone"):
            experiment.build(TokenizerConfig, config["tokenizer"], "tokenizer")
        config["tokenizer"]["perceptual_backbone"] = "vgg16.pth"
    train = experiment.build(TokenizerConfig, config["tokenizer"], "tokenizer")
    assert train.image_size % (2 * vae.downsampling) == 0
    loop = experiment.build_loop(config)
    assert loop.optimizer.num_steps == loop.num_steps


def test_the_published_recipe():
    """Paper, section on the image tokenizer: every value that is published."""
    config = experiment.plain(load_config("tokenizer_f8c16", "images:x"))
    optimizer = experiment.build_loop(config).optimizer
    assert (optimizer.name, optimizer.learning_rate) == ("adamw", 1e-5)
    assert (optimizer.schedule, optimizer.warmup_steps) == ("constant", 1000)
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.95, 1e-8)
    assert config["loop"]["num_steps"] == 50_000
    train = config["tokenizer"]
    assert (train["batch_size"], train["noise_gamma"], train["kl_weight"]) == (512, 0.5, 0.0)
    assert train["perceptual"] == "vgg"
    assert train["random_crop"] and train["random_flip"]
    vae = VAEConfig(**{**config["vae"], "channel_multipliers": (1, 2, 4, 4)})
    assert (vae.channels, vae.latent_channels, vae.downsampling) == (128, 16, 8)
    assert (vae.norm_patch_size, vae.norm_over, vae.deterministic) == (2, "token", True)
    assert config["vae"]["channel_multipliers"] == [1, 2, 4, 4]


def test_unknown_key_is_an_error_that_lists_the_known(photos):
    config = load_config("folder_tokenizer", str(photos))
    with config.unlocked():
        config.tokenizer.batch_sise = 3
    with pytest.raises(ValueError, match=r"batch_sise.*batch_size"):
        experiment.build_tokenizer_task(experiment.plain(config))


def test_every_program_has_help_with_an_example():
    launch = pathlib.Path(__file__).parent.parent / "launch"
    programs = sorted(path for path in launch.glob("*.py"))
    assert len(programs) >= 5
    for path in programs:
        head = path.read_text().split('"""')[1]
        assert f"launch/{path.name}" in head, path


def test_a_tiny_model_of_a_folder_is_tiny():
    sizes = [
        experiment.build_model_config(
            experiment.plain(load_config("folder", argument))["model"]
        ).decoder.embed_dim
        for argument in ("x", "x,tiny")
    ]
    assert sizes == [768, 192]
    with pytest.raises(ValueError, match="'x,large' must be FOLDER or FOLDER,tiny"):
        load_config("folder", "x,large")


def test_held_out_pictures_pass_over_bad_files(tmp_path):
    """The first image by name is no image; the good ones come in turn."""
    (tmp_path / "a.png").write_bytes(b"nothing")
    for name, value in (("b", 50), ("c", 200)):
        Image.new("RGB", (32, 32), (value,) * 3).save(tmp_path / f"{name}.png")
    sources = {"images": {"type": "images", "root": str(tmp_path)}}
    pixels = runs._held_out_pixels({"sources": sources}, 32)
    assert pixels.shape == (16, 32, 32, 3)
    assert pixels[:, 0, 0, 0].tolist() == [50, 200] * 8
    for name in "bc":
        (tmp_path / f"{name}.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of the sources has an image that can be used"):
        runs._held_out_pixels({"sources": sources}, 32)
