import importlib
import json
import pathlib

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict
from PIL import Image

from nextstep_jax.data import pipeline, source_types
from nextstep_jax.data.arrangement import LayoutConfig
from nextstep_jax.data.photographs import PhotographSource
from nextstep_jax.data.schema import KINDS
from nextstep_jax.data.shapes import ShapesSource
from nextstep_jax.data.sources import ImageFolderSource
from nextstep_jax.models.config import nextstep_config
from nextstep_jax.training import experiment
from nextstep_jax.training.loop import LoopConfig
from nextstep_jax.training.optimizer import OptimizerConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def test_unknown_keys_are_errors():
    with pytest.raises(ValueError, match=r"config.optimizer: unknown keys \['lr'\]; known are .*"):
        experiment.build(OptimizerConfig, {"lr": 1.0, "beta1": 0.5}, "optimizer")
    assert experiment.build(OptimizerConfig, {"beta1": 0.5}, "optimizer").beta1 == 0.5


def test_lists_become_tuples():
    assert experiment.build(LayoutConfig, {"image_bases": [16, 32]}, "layout").image_bases == (
        16,
        32,
    )


def test_loop_and_optimizer(make_config):
    config = make_config(loop={"mesh": {"fsdp": -1, "tensor": 2}, "num_steps": 77})
    loop = experiment.build_loop(config)
    assert loop.mesh == (("fsdp", -1), ("tensor", 2))
    assert (loop.num_steps, loop.checkpoint_every, loop.keep_checkpoints) == (77, 4, 2)
    assert loop.optimizer == OptimizerConfig(
        learning_rate=1e-3, warmup_steps=4, ema_decay=0.9, num_steps=77
    )
    config["optimizer"]["num_steps"] = 1000  # the cosine may end elsewhere than the run
    assert experiment.build_loop(config).optimizer.num_steps == 1000


def test_mesh_of_a_config_dict(make_config):
    config = ConfigDict(make_config(loop={"mesh": {"data": 2}}))
    assert experiment.build_loop(config).mesh == (("data", 2),)


@pytest.mark.parametrize(
    "name", ["num_steps", "checkpoint_every", "keep_checkpoints", "log_every", "hook_every"]
)
def test_loop_ranges(name):
    with pytest.raises(ValueError, match=f"{name}=-1 must be at least"):
        LoopConfig(**{name: -1})


def test_model_config_is_changed_in_part():
    base = nextstep_config("tiny")
    config = experiment.build_model_config(
        {"size": "tiny", "decoder": {"num_layers": 7}, "base_image_grid_size": 8}
    )
    assert config.decoder.num_layers == 7
    assert config.decoder.embed_dim == base.decoder.embed_dim
    assert config.base_image_grid_size == 8
    assert config.flow_head == base.flow_head
    assert experiment.build_model_config({"size": "14b", "head": "l"}).flow_head.num_layers == 24
    with pytest.raises(ValueError, match=r"config.decoder: unknown keys \['layers'\]"):
        experiment.build_model_config({"size": "tiny", "decoder": {"layers": 7}})
    with pytest.raises(ValueError, match=r"config.model: unknown keys \['depth'\]"):
        experiment.build_model_config({"size": "tiny", "depth": 7})
    with pytest.raises(ValueError, match="size='huge' is unknown"):
        experiment.build_model_config({"size": "huge"})


def test_sources(tmp_path):
    values = {"type": "shapes", "kind": "text", "level": "easy", "weight": 2, "seed": 3}
    config = {"image_size": 48, "sources": {"a": values, "b": {"type": "shapes", "kind": "pair"}}}
    sources = experiment.build_sources(config)
    assert sources["a"] == (ShapesSource("text", level="easy", seed=3, image_size=48), 2.0)
    assert sources["b"] == (ShapesSource("pair", image_size=48), 1.0)
    with pytest.raises(ValueError, match=r"'web' is unknown; choose from \['shapes', 'photo"):
        source_types.build_source({"type": "web"}, 32)
    with pytest.raises(ValueError, match="is not a folder"):
        source_types.build_source({"type": "folder", "root": str(tmp_path / "none")}, 32)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a caption")
    source = source_types.build_source({"type": "folder", "root": str(tmp_path)}, 32)
    assert isinstance(source, ImageFolderSource)
    assert len(source) == 1
    with pytest.raises(ValueError, match=r"source of type 'folder': .*'size'"):
        source_types.build_source({"type": "folder", "root": str(tmp_path), "size": 3}, 32)
    assert [len(document.parts) for document in (source[0], images_of(tmp_path)[0])] == [2, 1]


def images_of(folder):
    return source_types.source_from_text(f"images:{folder}", 32)


def test_sources_named_on_a_command_line(tmp_path):
    world = source_types.source_from_text("shapes:easy", 32, "heldout")
    assert world == ShapesSource("pair", "easy", "heldout", image_size=32)
    crops = source_types.source_from_text("photographs", 48)
    assert crops == PhotographSource(48, "train")
    with pytest.raises(ValueError, match="is not a folder"):
        images_of(tmp_path / "none")
    with pytest.raises(ValueError, match=r"source of type 'folder': .*root"):
        source_types.source_from_text("folder", 32)
    with pytest.raises(ValueError, match="source type 'web' is unknown"):
        source_types.source_from_text("web:x", 32)


def test_held_out_sources():
    """Only sources that have such a split are asked for it."""
    values = {"a": {"type": "shapes"}, "b": {"type": "photographs"}}
    sources = experiment.build_sources({"sources": values}, 32, held_out=True)
    assert {source.split for source, _ in sources.values()} == {"heldout"}
    sources = experiment.build_sources({"sources": values}, 32)
    assert {source.split for source, _ in sources.values()} == {"train"}


def test_text_tokenizer_is_trained_once(tmp_path):
    """On the sources' text and size strings; afterwards the file is the truth."""
    sources = {"text": (ShapesSource("text", level="easy", num_documents=50), 1.0)}
    path = tmp_path / "tokenizer.json"
    first = experiment.load_or_train_text_tokenizer(path, sources, 300)
    again = experiment.load_or_train_text_tokenizer(path, sources, 300)
    assert first.fingerprint == again.fingerprint
    text = sources["text"][0][0].parts[0].text
    assert first.decode(first.encode(text)) == text
    assert len(first.encode(text)) < 0.8 * len(text)  # it has merged
    first.save(path)
    other = {"text": (ShapesSource("text", level="full", num_documents=50), 1.0)}
    loaded = experiment.load_or_train_text_tokenizer(path, other, 400)
    assert loaded.fingerprint == first.fingerprint


def test_plain_is_json():
    config = ConfigDict({"a": {"b": (1, 2.5), "c": None}, "d": [("x", 1)]})
    plain = experiment.plain(config)
    assert plain == {"a": {"b": [1, 2.5], "c": None}, "d": [["x", 1]]}
    assert json.loads(json.dumps(plain)) == plain


def test_task_has_the_config(make_task, make_config):
    task, loop = make_task(loop={"num_steps": 3})
    assert task.config == make_config(loop={"num_steps": 3})
    assert loop.num_steps == 3
    assert task.model.dtype == jnp.float32


@pytest.mark.parametrize(
    ("section", "changes", "match"),
    [
        ("model", {"latent_channels": 8}, "latent_channels=8 does not match .* 16"),
        ("model", {"downsampling": 16}, "downsampling=16 does not match .* 8"),
        ("loss", {"weight": 1}, r"config.loss: unknown keys \['weight'\]"),
        ("data", {"rows": 1}, r"config.data: unknown keys \['rows'\]"),
        ("loop", {"steps": 1}, r"config.loop: unknown keys \['steps'\]"),
    ],
)
def test_what_does_not_fit_is_refused(make_task, section, changes, match):
    with pytest.raises(ValueError, match=match):
        make_task(**{section: changes})


def test_unknown_dtype(make_config, vae, tokenizer):
    config = {**make_config(), "dtype": "float16"}
    with pytest.raises(ValueError, match=r"dtype='float16'; choose from \['float32', 'bfloat16'\]"):
        experiment.build_nextstep_task(config, vae.module, vae.params, tokenizer)


@pytest.mark.parametrize("level", ["easy", "pairs", "full"])
def test_shapes_configs_build(level, tokenizer):
    """What the programs do with the files in configs/, up to the first batch."""
    config = importlib.import_module("configs.shapes_tokenizer").get_config(level)
    image_task, image_loop = experiment.build_tokenizer_task(config)
    assert image_loop.num_steps == config.loop.num_steps
    config = importlib.import_module("configs.shapes").get_config(level)
    task, loop = experiment.build_nextstep_task(config, image_task.vae, None, tokenizer)
    assert loop.optimizer.num_steps == loop.num_steps == config.loop.num_steps
    iterator = iter(task.dataset(0, 1))
    assert next(iterator)["token_ids"].shape == (
        config.data.rows_per_batch,
        config.data.row_length,
    )
    iterator.close()


# Table 1 of the paper: text only, image-text pairs, image-to-image, interleaved.
@pytest.mark.parametrize(
    ("stage", "ratios"),
    [
        ("pretrain_stage1", (0.2, 0.6, 0.0, 0.2)),
        ("pretrain_stage2", (0.2, 0.6, 0.0, 0.2)),
        ("anneal", (0.2, 0.6, 0.1, 0.1)),
        ("sft", (0.0, 0.9, 0.1, 0.0)),
    ],
)
def test_stages_mix_and_crop_as_published(stage, ratios, tokenizer):
    """Shares of the documents that are read, up to whole ones."""
    config = importlib.import_module(f"configs.{stage}").get_config("tiny")
    config = experiment.plain(config)
    experiment.check_sections(config, experiment.MODEL_SECTIONS)
    config["data"].update(row_length=640, rows_per_batch=1, num_open_rows=3)  # Drawing takes time.
    data = experiment.build_data(config)
    sources = experiment.build_sources(config)
    model = experiment.build_model_config({"size": "tiny", "decoder": {"vocab_size": 272}})
    iterator = iter(pipeline.make_pipeline(sources, tokenizer, model, data))
    sizes = {size for _ in range(4) for size in next(iterator)["images"]}
    counts, read = iterator.counts()["read"], dict.fromkeys(KINDS, 0)
    iterator.close()
    for name, number in counts.items():
        read[name.split("-")[0]] += number
    total = sum(read.values())
    assert total > 20
    for kind, ratio in zip(KINDS, ratios, strict=True):
        assert abs(read[kind] - ratio * total) <= 2 * len(counts)
    assert sizes == ({"64x64"} if stage == "pretrain_stage1" else {"64x64", "128x128"})
    assert data.layout.random_crop == (stage == "pretrain_stage1")
