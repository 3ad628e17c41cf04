import dataclasses
import json

import grain
import jax
import numpy as np
import pytest

from nextstep_jax.interop.model_directory import (
    open_params,
    read_configs,
    read_model_directory,
    read_vae,
    write_model_directory,
    write_vae_config,
    write_vae_directory,
)
from nextstep_jax.models.config import to_dict
from nextstep_jax.parallel.mesh import make_mesh
from nextstep_jax.sampling.pipeline import NextStepPipeline
from nextstep_jax.training.checkpoint import Checkpoint, CheckpointStore, Clock
from tests import tiny_model

SAMPLING = {"preset": "nextstep-1", "guidance_scale": 4.0, "image_size": [12, 16]}


def write(path, params=None, sampling=SAMPLING):
    write_model_directory(
        path,
        tiny_model.CONFIG,
        tiny_model.VAE_CONFIG,
        tiny_model.vae_params(),
        tiny_model.tokenizer(),
        sampling,
        params,
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A whole model directory."""
    path = tmp_path_factory.mktemp("model") / "deep" / "folder"
    write(path, tiny_model.params())
    return path


def save(store, step, state):
    data = iter(grain.MapDataset.range(9).to_iter_dataset())
    store.save(step, Checkpoint(state, data, Clock(), {}, {}))


def _same_tree(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_round_trip(directory):
    read = read_model_directory(directory)
    assert read.config == tiny_model.CONFIG
    assert read.vae_config == tiny_model.VAE_CONFIG
    assert hash(read.vae_config) == hash(tiny_model.VAE_CONFIG)
    _same_tree(read.params, tiny_model.params())
    _same_tree(read.vae_params, tiny_model.vae_params())
    assert read.tokenizer.fingerprint == tiny_model.tokenizer().fingerprint
    assert read.sampling == SAMPLING
    assert read.step is None
    assert {path.name for path in directory.iterdir()} == {
        *("model.json", "tokenizer.json", "vae", "params")
    }


def test_written_again_it_is_replaced(tmp_path):
    write(tmp_path, tiny_model.params())
    doubled = jax.tree.map(lambda leaf: 2 * leaf, tiny_model.params())
    write(tmp_path, doubled, {"preset": "plain"})
    read = read_model_directory(tmp_path)
    _same_tree(read.params, doubled)
    assert read.sampling == {"preset": "plain"}


def test_what_is_not_a_model_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a model directory: it has no model\.json"):
        read_model_directory(tmp_path)
    write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no finished checkpoint in .*checkpoints"):
        read_model_directory(tmp_path)
    values = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**values, "format": 2}))
    with pytest.raises(ValueError, match=r"model\.json: format 2, expected 1"):
        read_model_directory(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: [values], "expected a mapping, got list"),
        (lambda values: values | {"model": 3}, "'model' must be a mapping, got 3"),
        (lambda values: values | {"model": values["model"] | {"depth": 3}}, "'model' .*'depth'"),
        (lambda values: values | {"vae": values["vae"] | {"depth": 3}}, "'vae' is not .*'depth'"),
        (lambda values: values | {"vae": {}}, "'vae' lacks 'channel_multipliers'"),
        (lambda values: {k: v for k, v in values.items() if k != "sampling"}, "'sampling' must"),
    ],
)
def test_what_model_json_must_hold(change, message, tmp_path):
    path = tmp_path / "model.json"
    write(tmp_path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=rf"model\.json: {message}"):
        read_model_directory(tmp_path)


def test_broken_json_is_named(tmp_path):
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.json is not JSON"):
        read_model_directory(tmp_path)


def test_tokenizer_and_config_must_agree(tmp_path):
    write(tmp_path)
    config = dataclasses.replace(tiny_model.CONFIG, boi_id=6)
    values = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**values, "model": to_dict(config)}))
    with pytest.raises(ValueError, match="boi_id: the tokenizer has 3"):
        read_model_directory(tmp_path)


@pytest.mark.parametrize("ema", [True, False])
def test_newest_checkpoint_of_a_run(tmp_path, ema):
    write(tmp_path)
    small = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (5, 9):
        params = jax.tree.map(lambda leaf, step=step: jax.numpy.asarray(leaf + step), small)
        moving = jax.tree.map(lambda leaf: leaf + 100, params) if ema else None
        state = {"params": params, "ema": moving, "opt_state": {"m": params}}
        save(store, step, state)
    store.close()
    read = read_model_directory(tmp_path)
    assert read.step == 9
    _same_tree(read.params, {"a": small["a"] + 9 + 100 * ema})


@pytest.mark.parametrize("stacked", [True, False])
def test_in_a_dtype_and_on_a_mesh(tmp_path, devices, stacked):
    params = tiny_model.params() if stacked else tiny_model.unrolled_params()
    write(tmp_path, params)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, devices)
    read = read_model_directory(tmp_path, dtype=jax.numpy.bfloat16, mesh=mesh)
    _same_tree(read.params, jax.tree.map(lambda x: x.astype("bfloat16"), params))
    assert {leaf.dtype for leaf in jax.tree.leaves(read.params)} == {np.dtype("bfloat16")}
    layers = read.params["decoder"]["layers" if stacked else "layers_1"]
    kernel = layers["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.mesh == mesh
    assert kernel.addressable_shards[0].data.shape[-2:] == (16, 24)
    # The image tokenizer is small, and stays as it is.
    assert read.vae_params["encoder"]["conv_in"]["kernel"].dtype == np.float32


def test_only_a_converted_one_may_lack_its_text_tokenizer(tmp_path):
    arguments = (tiny_model.CONFIG, tiny_model.VAE_CONFIG, tiny_model.vae_params())
    write_model_directory(tmp_path, *arguments, None, SAMPLING, tiny_model.params())
    with pytest.raises(ValueError, match=r"cannot read the tokenizer .*tokenizer.json"):
        read_model_directory(tmp_path)
    (tmp_path / "published").mkdir()
    assert read_model_directory(tmp_path).tokenizer is None


def test_the_parts_that_need_no_weights(tmp_path, directory):
    write(tmp_path)
    expected = (tiny_model.CONFIG, tiny_model.VAE_CONFIG, SAMPLING)
    assert read_configs(tmp_path) == read_configs(directory) == expected
    with pytest.raises(FileNotFoundError, match="no finished checkpoint in"):
        open_params(tmp_path)
    shapes = jax.tree.map(lambda x: x.shape, tiny_model.params())
    assert jax.tree.map(lambda x: x.shape, open_params(directory).abstract) == shapes
    with pytest.raises(FileNotFoundError, match=r"is not a model directory: .* no model.json"):
        read_configs(tmp_path / "none")


def test_vae_alone(tmp_path, directory):
    config, params = read_vae(directory)
    assert config == tiny_model.VAE_CONFIG
    _same_tree(params, tiny_model.vae_params())
    write_vae_directory(tmp_path / "alone", config, params)
    alone = read_vae(tmp_path / "alone")
    assert alone[0] == config
    _same_tree(alone[1], params)

    with pytest.raises(FileNotFoundError, match=r"holds no image tokenizer: no vae\.json"):
        read_vae(tmp_path)
    write_vae_config(tmp_path / "run", config)
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        read_vae(tmp_path / "run")
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    params = {"a": jax.numpy.arange(3.0)}
    save(store, 1, {"params": params, "ema": None})
    store.close()
    read_config, read_params = read_vae(tmp_path / "run")
    assert read_config == config
    _same_tree(read_params, params)


def test_the_pipeline_takes_the_settings(directory, tmp_path):
    pipe = NextStepPipeline.from_pretrained(directory, dtype=jax.numpy.bfloat16)
    assert pipe.preset.guidance_scale == 4.0
    assert pipe.preset.sampler.solver == "euler_maruyama"
    assert pipe.image_size == (12, 16)
    assert {leaf.dtype for leaf in jax.tree.leaves(pipe.params)} == {np.dtype("bfloat16")}
    assert pipe.model.dtype == jax.numpy.bfloat16

    write(tmp_path, {"decoder": {}}, {"guidance": 2.0})
    with pytest.raises(ValueError, match=r"\['guidance'\] are unknown; known are"):
        NextStepPipeline.from_pretrained(tmp_path)
