import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextstep_jax.data.text_tokenizer import TextTokenizer
from nextstep_jax.interop.convert import export_checkpoint, import_model
from nextstep_jax.interop.huggingface import open_model, open_vae
from nextstep_jax.interop.model_directory import write_model_directory
from nextstep_jax.interop.pretrained import read_pretrained
from nextstep_jax.models.vae import VAE
from nextstep_jax.parallel.mesh import make_mesh
from nextstep_jax.sampling.pipeline import NextStepPipeline
from nextstep_jax.sampling.presets import PRESETS
from tests import tiny_model

# The original knows no number of groups but 32, and its latent's norm has one epsilon.
VAE_CONFIG = dataclasses.replace(tiny_model.VAE_CONFIG, channels=32, num_groups=32)
SAMPLING = {"preset": "nextstep-1.1", "image_size": [8, 32]}
CALL = dict(num_inference_steps=2, guidance_scale=2.0, height=8, width=32, seed=5)


@functools.cache
def vae_params():
    images = jnp.zeros((1, *tiny_model.IMAGE_SIZE, 3))
    shapes = jax.eval_shape(VAE(VAE_CONFIG).init, jax.random.key(0), images)["params"]
    return tiny_model.random_tree(shapes, 3)


@pytest.fixture(scope="module")
def config():
    """The tiny model in what the published format can say of a flow head."""
    head = dataclasses.replace(tiny_model.CONFIG.flow_head, frequency_dim=256)
    return dataclasses.replace(tiny_model.CONFIG, flow_head=head)


@pytest.fixture(scope="module")
def ours(tmp_path_factory, config):
    """A model directory."""
    folder = tmp_path_factory.mktemp("pretrained") / "ours"
    params = dict(tiny_model.params())
    head = dict(params["flow_head"])
    kernel = np.random.default_rng(0).standard_normal((256, config.flow_head.width)) / 16
    head["time_in"] = {**head["time_in"], "kernel": jnp.asarray(kernel, jnp.float32)}
    params["flow_head"] = head
    args = (config, VAE_CONFIG, vae_params(), tiny_model.tokenizer(), SAMPLING, params)
    write_model_directory(folder, *args)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory, ours):
    """The same model in the published format."""
    folder = tmp_path_factory.mktemp("pretrained") / "published"
    export_checkpoint(ours, folder, max_shard_size=40_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory, published, config):
    """And converted back."""
    folder = tmp_path_factory.mktemp("pretrained") / "converted"
    model = open_model(published, downsampling=config.downsampling)
    import_model(model, open_vae(published / "vae"), folder, source=published)
    return folder


@pytest.fixture(scope="module")
def picture(ours):
    """What the model directory draws."""
    return NextStepPipeline.from_pretrained(ours)("a red circle", **CALL)


@pytest.mark.parametrize("name", ["published", "converted"])
def test_all_forms_of_a_model_draw_the_same(name, request, picture):
    pipe = NextStepPipeline.from_pretrained(request.getfixturevalue(name), preset="nextstep-1.1")
    drawn = pipe("a red circle", **CALL)
    np.testing.assert_array_equal(drawn.tokens, picture.tokens)
    np.testing.assert_array_equal(drawn.images[0], picture.images[0])


def test_the_generation_names_the_preset(published, converted):
    for folder in (published, converted):
        pipe = NextStepPipeline.from_pretrained(folder)
        assert pipe.preset == PRESETS["nextstep-1"]
        assert pipe.image_size == (512, 512)


def test_dtype(published):
    pipe = NextStepPipeline.from_pretrained(published, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(pipe.params)} == {jnp.dtype(jnp.bfloat16)}
    assert pipe.model.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["ours", "published"])
def test_parameters_are_sharded_by_the_rules(name, request, picture):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    folder = request.getfixturevalue(name)
    pipe = NextStepPipeline.from_pretrained(folder, mesh=mesh, preset="nextstep-1.1")
    kernel = pipe.params["decoder"]["layers_1"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.spec == jax.P("fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (16, 24)
    drawn = pipe("a red circle", **CALL)
    np.testing.assert_allclose(drawn.tokens, picture.tokens, atol=1e-4)
    difference = np.asarray(drawn.images[0], int) - np.asarray(picture.images[0])
    assert np.abs(difference).max() <= 1


def test_an_image_tokenizer_elsewhere(published, tmp_path, picture):
    folder = tmp_path / "model"
    shutil.copytree(published, folder)
    (folder / "vae").rename(tmp_path / "tokenizer")
    with pytest.raises(FileNotFoundError, match="no image tokenizer"):
        read_pretrained(folder)
    pipe = NextStepPipeline.from_pretrained(
        folder, vae=tmp_path / "tokenizer", preset="nextstep-1.1"
    )
    np.testing.assert_array_equal(pipe("a red circle", **CALL).tokens, picture.tokens)


def test_what_cannot_be_prompted_is_refused(published, ours, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(published, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        NextStepPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="has an image tokenizer of its own"):
        NextStepPipeline.from_pretrained(ours, vae=published / "vae")
    with pytest.raises(FileNotFoundError, match="not a model directory"):
        NextStepPipeline.from_pretrained(tmp_path / "nowhere")


def test_ids_that_are_not_the_tokenizers(published, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(published, folder)
    text = (folder / "tokenizer.json").read_text().replace("<|end_of_image|>", "<|x|>", 1)
    swapped = text.replace("<|begin_of_image|>", "<|end_of_image|>").replace(
        "<|x|>", "<|begin_of_image|>"
    )
    (folder / "tokenizer.json").write_text(swapped)
    assert TextTokenizer.from_file(folder / "tokenizer.json").boi_id != tiny_model.CONFIG.boi_id
    with pytest.raises(ValueError, match=r"boi_id: the tokenizer has 4.*the model config 3"):
        NextStepPipeline.from_pretrained(folder)
