import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from nextstep_jax.interop import convert
from nextstep_jax.interop.huggingface import GEN_POS_EMBED, open_model, open_vae
from nextstep_jax.interop.model_directory import (
    read_model_directory,
    read_vae,
    write_model_directory,
)
from nextstep_jax.interop.tensor_files import open_tensors
from nextstep_jax.interop.tensor_writer import SafetensorsWriter
from nextstep_jax.models.config import VAEConfig
from nextstep_jax.parallel.mesh import make_mesh
from nextstep_jax.sampling.pipeline import NextStepPipeline
from nextstep_jax.training.checkpoint import Checkpoint, CheckpointStore, Clock
from tests import published_files, tiny_model
from tests.interop.test_huggingface import DIFFUSERS_VAE, OLDER_NAMES
from tests.published_files import BFLOAT16, CASE, MODEL, VAE, assert_same, read, write
from tests.published_tokenizer import ALL_TOKENS, build

ROOT = pathlib.Path(__file__).resolve().parents[2]


def import_folder(folder, out, vae=None, **options):
    """The whole way in; the image tokenizer is in `vae/` if not given."""
    vae = open_vae(vae or folder / "vae")
    model = open_model(folder, downsampling=vae.config.downsampling)
    convert.import_model(model, vae, out, source=folder, **{"image_size": 64} | options)
    return out


def round_trip(folder, out, vae=None, **options):
    """In, and out again."""
    import_folder(folder, out / "ours", vae, **options)
    convert.export_checkpoint(out / "ours", out / "theirs")
    return out / "theirs"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small model with image tokenizer and text tokenizer."""
    return published_files.write_model(tmp_path_factory.mktemp("published"), tokenizer=True)


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    return import_folder(published, tmp_path_factory.mktemp("converted") / "model")


@pytest.fixture(scope="module")
def exported(converted, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "model"
    convert.export_checkpoint(converted, out)
    return out


def test_the_recorded_model_comes_back_bit_for_bit(tmp_path):
    out = round_trip(CASE / "model", tmp_path, CASE / "vae")
    assert_same(read(out), read(CASE / "model"))
    assert len(read(out)) == 80
    assert config_of(out) == config_of(CASE / "model")
    checkpoint = open_tensors(CASE / "vae" / "checkpoint.pt")
    original = {name: checkpoint.read(name) for name in checkpoint.infos}
    assert_same(read(out / "vae"), original)
    assert config_of(out / "vae") == config_of(CASE / "vae")
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "vae"}
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "theirs"}


def test_a_small_model_comes_back(published, exported):
    assert_same(read(exported), read(published))
    assert_same(read(exported / "vae"), read(published / "vae"))
    assert config_of(exported) == MODEL
    assert config_of(exported / "vae") == VAE
    tokenizer = (exported / "tokenizer.json").read_bytes()
    assert tokenizer == (published / "tokenizer.json").read_bytes()


def test_in_another_dtype(published, converted, tmp_path):
    out = round_trip(published, tmp_path, dtype=jnp.bfloat16)
    expected = {name: tensor.astype(BFLOAT16) for name, tensor in read(published).items()}
    assert_same(read(out), expected)
    assert config_of(out) == {**MODEL, "torch_dtype": "bfloat16"}
    # The image tokenizer stays as it is.
    assert_same(read(out / "vae"), read(published / "vae"))
    assert config_of(out / "vae") == VAE
    params = read_model_directory(tmp_path / "ours").params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {BFLOAT16}


def test_the_name_of_the_dtype_in_newer_configs(tmp_path):
    values = {**MODEL, "dtype": "float32"}
    del values["torch_dtype"]
    out = round_trip(
        published_files.write_model(tmp_path / "in", values), tmp_path, dtype="float16"
    )
    assert config_of(out) == {**values, "dtype": "float16"}


def test_through_sharded_devices(published, converted, tmp_path, devices):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, devices)
    out = round_trip(published, tmp_path, mesh=mesh)
    assert_same(read(out), read(published))


def test_export_in_shards(published, converted, tmp_path):
    out = tmp_path / "out"
    convert.export_checkpoint(converted, out, max_shard_size=60_000)
    paths = sorted(out.glob("*.safetensors"))
    sizes = [sum(t.nbytes for t in safetensors.numpy.load_file(p).values()) for p in paths]
    assert len(paths) == 6
    assert max(sizes) <= 60_000
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert (
        index["metadata"]["total_size"] == sum(sizes) == sum(map(np.size, read(out).values())) * 4
    )
    for path in paths:
        for name in safetensors.numpy.load_file(path):
            assert index["weight_map"][name] == path.name
    assert_same(read(out), read(published))
    # And in again, without the old index or a second one in the way.
    again = round_trip(out, tmp_path / "again")
    assert_same(read(again), read(published))
    assert not list(again.glob("*.index.json"))
    # The image tokenizer is one file, as the original wants it.
    assert [path.name for path in (out / "vae").glob("*.safetensors")] == ["model.safetensors"]


def test_torch_reads_the_checkpoint(published, exported):
    torch = pytest.importorskip("torch")
    path = exported / "vae" / "checkpoint.pt"
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    assert_same({n: t.numpy() for n, t in loaded.items()}, read(published / "vae"))
    # So does our own reader.
    files = open_tensors(path)
    assert_same({n: files.read(n) for n in files.infos}, read(published / "vae"))


def test_without_torch_there_is_no_checkpoint(converted, tmp_path, monkeypatch, caplog):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "torch" else found(n))
    with caplog.at_level("INFO"):
        convert.export_checkpoint(converted, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out" / "vae").iterdir()}
    assert names == {"config.json", "model.safetensors"}
    assert "no checkpoint.pt, since torch is not installed" in caplog.text


def test_dtypes_that_differ_from_tensor_to_tensor(tmp_path):
    tensors = published_files.random_tensors(published_files.model_shapes())
    tensors[GEN_POS_EMBED] = published_files.position_table(4, 32).astype(BFLOAT16)
    narrow = ["norm.weight", "layers.1.input_layernorm.weight", "layers.0.mlp.up_proj.weight"]
    narrow += [f"layers.{i}.post_attention_layernorm.weight" for i in range(3)]
    for name in narrow:
        tensors[name] = tensors[name].astype(BFLOAT16)
    half = "layers.2.mlp.up_proj.weight"
    tensors[half] = tensors[half].astype(np.float16)
    folder = published_files.write_model(tmp_path / "in", tensors=tensors)
    out = round_trip(folder, tmp_path)
    assert_same(read(out), tensors)
    layers = read_model_directory(tmp_path / "ours").params["decoder"]["layers"]
    assert layers["input_norm"]["scale"].dtype == np.float32
    assert layers["post_attention_norm"]["scale"].dtype == BFLOAT16


@pytest.mark.parametrize("has_head", [True, False])
def test_a_tied_model_comes_back_as_it_was(tmp_path, has_head):
    values = {**MODEL, "tie_word_embeddings": True}
    tensors = published_files.random_tensors(published_files.model_shapes(values))
    tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"].astype(BFLOAT16)
    if has_head:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"].copy()
    folder = published_files.write_model(tmp_path / "in", values, tensors)
    assert_same(read(round_trip(folder, tmp_path)), tensors)
    assert "lm_head" not in read_model_directory(tmp_path / "ours").params


def test_names_of_the_training_code_come_back(tmp_path):
    """Also positions that are used, and small files beside the weights."""
    older = {OLDER_NAMES.get(name, name): value for name, value in MODEL.items()}
    older |= {"use_gen_pos_embed": True, "create_kwargs": {"snr_type": "lognorm"}}
    tensors = published_files.random_tensors(published_files.model_shapes())
    tensors[GEN_POS_EMBED] = published_files.position_table(4, 32)
    folder = published_files.write_model(tmp_path / "in", older, tensors)
    beside = {
        "generation_config.json": "{}",
        "merges.txt": "a b\n",
        "modeling_nextstep.py": "x = 1\n",
    }
    left = {"model.safetensors.index.json.bak": "?", "README.md": "words", "weights.pkl": "?"}
    for name, text in (beside | left).items():
        (folder / name).write_text(text)
    (folder / "assets").mkdir()
    out = round_trip(folder, tmp_path)
    assert_same(read(out), tensors)
    assert config_of(out) == older
    expected = {"config.json", "model.safetensors", "vae", *beside}
    assert {path.name for path in out.iterdir()} == expected
    assert all((out / name).read_text() == text for name, text in beside.items())
    read_back = read_model_directory(tmp_path / "ours")
    assert read_back.sampling == {"preset": "nextstep-1.1", "image_size": [64, 64]}
    assert read_back.config.use_gen_pos_embed
    assert read_back.tokenizer is None


def test_an_image_tokenizer_of_diffusers_becomes_an_original_one(tmp_path, published):
    original = read(published / "vae")
    shapes = published_files.vae_shapes(diffusers=True)
    order = published_files.vae_shapes()
    renamed = {
        new: original[old].reshape(shape)
        for (new, shape), old in zip(shapes.items(), order, strict=True)
    }
    write(tmp_path / "in", DIFFUSERS_VAE, renamed, stem="diffusion_pytorch_model")
    convert.import_vae(open_vae(tmp_path / "in"), tmp_path / "ours")
    convert.export_checkpoint(tmp_path / "ours", tmp_path / "out")
    assert_same(read(tmp_path / "out"), original)
    values = {**VAE, "resolution": 512, "deterministic": False, "encoder_norm": False, "psz": None}
    assert config_of(tmp_path / "out") == values
    # With a model it goes the same way.
    out = round_trip(published, tmp_path / "both", tmp_path / "in")
    assert_same(read(out / "vae"), original)
    assert config_of(out / "vae") == values


def test_an_image_tokenizer_alone_comes_back(tmp_path, published):
    convert.import_vae(open_vae(published / "vae"), tmp_path / "ours")
    config, params = read_vae(tmp_path / "ours")
    assert config == open_vae(published / "vae").config
    conv_in = read(published / "vae")["encoder.conv_in.weight"]
    np.testing.assert_array_equal(
        params["encoder"]["conv_in"]["kernel"], conv_in.transpose(2, 3, 1, 0)
    )
    convert.export_checkpoint(tmp_path / "ours", tmp_path / "out")
    assert_same(read(tmp_path / "out"), read(published / "vae"))
    assert config_of(tmp_path / "out") == VAE


def test_the_result_is_a_model_directory(published, converted, devices):
    whole = read_model_directory(converted)
    assert whole.config == open_model(published, downsampling=2).config
    assert whole.vae_config == VAEConfig(
        **dict(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=4),
        **dict(scaling_factor=1.5, shift_factor=0.25),
    )
    assert whole.sampling == {"preset": "nextstep-1", "image_size": [64, 64]}
    assert whole.tokenizer.image_area_id == whole.config.image_area_id == 423
    tensors = read(published)
    kernel = whole.params["decoder"]["layers"]["mlp"]["gate_proj"]["kernel"]
    np.testing.assert_array_equal(kernel[1], tensors["layers.1.mlp.gate_proj.weight"].T)

    mesh = make_mesh({"fsdp": 4, "tensor": 2}, devices)
    placed = read_model_directory(converted, dtype=jnp.bfloat16, mesh=mesh)
    other = placed.params["decoder"]["layers"]["mlp"]["gate_proj"]["kernel"]
    assert other.dtype == BFLOAT16
    assert other.addressable_shards[0].data.shape == (3, 8, 24)
    np.testing.assert_array_equal(other, np.asarray(kernel).astype(BFLOAT16))


def test_the_pipeline_samples_from_it(converted):
    pipe = NextStepPipeline.from_pretrained(converted)
    assert pipe.preset.sampler.solver == "euler_maruyama"
    settings = dict(height=16, width=16, num_inference_steps=2, seed=3)
    one = pipe("a red circle", guidance_scale=1.0, **settings)
    assert one.images[0].size == (16, 16)
    # Token norm is among the published settings.
    np.testing.assert_allclose(one.tokens.std(axis=-1), 1, atol=1e-3)
    other = pipe("a star", guidance_scale=1.0, **settings)
    assert np.abs(other.tokens - one.tokens).max() > 0.1


def workdir(folder, vae_config=None, **more):
    """A model directory of a run of ours: nothing published in it."""
    arguments = (tiny_model.CONFIG, vae_config or tiny_model.VAE_CONFIG, tiny_model.vae_params())
    write_model_directory(folder, *arguments, tiny_model.tokenizer(), {}, **more)
    return folder


def test_a_training_run(published, converted, tmp_path):
    """The average of the newest checkpoint, under a config that the original understands."""
    start = read_model_directory(converted)
    run = tmp_path / "run"
    fields = (start.config, start.vae_config, start.vae_params, start.tokenizer, {})
    write_model_directory(run, *fields)
    store = CheckpointStore(run / "checkpoints")
    for step in (5, 9):
        params = jax.tree.map(lambda leaf, step=step: leaf + step, start.params)
        state = {"params": params, "ema": jax.tree.map(lambda leaf: leaf * 2, params)}
        data = iter(grain.MapDataset.range(9).to_iter_dataset())
        store.save(step, Checkpoint(state, data, Clock(), {}, {}))
    store.close()
    convert.export_checkpoint(run, tmp_path / "out")
    expected = {name: (tensor + 9) * 2 for name, tensor in read(published).items()}
    expected[GEN_POS_EMBED] = published_files.position_table(4, 32)
    found = read(tmp_path / "out")
    np.testing.assert_allclose(found.pop(GEN_POS_EMBED), expected.pop(GEN_POS_EMBED), atol=1e-6)
    assert_same(found, expected)
    values = config_of(tmp_path / "out")
    # Every key of the recorded config that is the model's own, and the same values.
    recorded = config_of(CASE / "model")
    keys = set(MODEL) - {"base_image_grid_size", "architectures"}
    assert keys <= set(recorded) & set(values)
    assert {key: values[key] for key in keys - {"latent_size"}} == {
        key: MODEL[key] for key in keys - {"latent_size"}
    }
    image = {
        key for key in recorded if key.startswith(("fm_", "latent_", "boi", "eoi", "im", "lm"))
    }
    assert len(image) == 11
    assert image <= set(values)
    assert all(type(values[key]) is type(recorded[key]) for key in image)
    # It is read again as what it was.
    again = open_model(tmp_path / "out", downsampling=2)
    assert again.config == start.config
    assert again.tokenizer.fingerprint == start.tokenizer.fingerprint
    assert open_vae(tmp_path / "out" / "vae").config == start.vae_config


def test_what_the_published_format_cannot_say_is_refused_first(tmp_path):
    workdir(tmp_path / "run", params=tiny_model.params())
    with pytest.raises(ValueError, match="original VAE has no key for it: num_groups=4 must be 32"):
        convert.export_checkpoint(tmp_path / "run", tmp_path / "out")
    vae = VAEConfig(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=4)
    workdir(tmp_path / "other", vae, params=tiny_model.params())
    with pytest.raises(ValueError, match=r"flow_head.frequency_dim=16 must be 256"):
        convert.export_checkpoint(tmp_path / "other", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_config_that_no_longer_holds_is_written_anew(converted, tmp_path):
    """Someone changed the model after its conversion; what came along is not believed."""
    changed = shutil.copytree(converted, tmp_path / "changed")
    path = changed / "model.json"
    values = json.loads(path.read_text())
    values["model"]["decoder"]["rope_theta"] = 500.0
    values["vae"]["shift_factor"] = 0.5
    path.write_text(json.dumps(values))
    convert.export_checkpoint(changed, tmp_path / "out")
    assert config_of(tmp_path / "out")["rope_theta"] == 500.0
    assert config_of(tmp_path / "out" / "vae")["shift_factor"] == 0.5
    again = open_model(tmp_path / "out", downsampling=2).config
    assert again.decoder.rope_theta == 500.0


def test_another_text_tokenizer(published, tmp_path):
    """The one that was asked for is the one that comes out."""
    other = tmp_path / "other.json"
    other.write_text(build(added=(*ALL_TOKENS[:-2], "<|extra|>", *ALL_TOKENS[-1:])))
    model = open_model(published, tokenizer=other, downsampling=2)
    vae = open_vae(published / "vae")
    convert.import_model(model, vae, tmp_path / "ours", source=published, image_size=64)
    convert.export_checkpoint(tmp_path / "ours", tmp_path / "out")
    assert "<|extra|>" in (tmp_path / "out" / "tokenizer.json").read_text()


def test_refused_before_anything_is_written(published, converted, tmp_path):
    model, vae = open_model(published, downsampling=2), open_vae(published / "vae")
    with pytest.raises(ValueError, match="downsampling: the model has 8, its image tokenizer 2"):
        convert.import_model(open_model(published), vae, tmp_path / "out")
    with pytest.raises(ValueError, match=r"image size 30x30 .* the nearest sizes are 28x28, 32x32"):
        convert.import_model(model, vae, tmp_path / "out", image_size=30)
    with pytest.raises(FileNotFoundError, match="none is no folder"):
        convert.export_checkpoint(tmp_path / "none", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"holds no image tokenizer: no vae.json"):
        convert.export_checkpoint(tmp_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(published, converted, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    model, vae = open_model(published, downsampling=2), open_vae(published / "vae")
    for name in ("file", "folder", "link"):
        for call in (
            lambda out: convert.import_model(model, vae, out, image_size=64),
            lambda out: convert.import_vae(vae, out),
            lambda out: convert.export_checkpoint(converted, out),
        ):
            with pytest.raises(FileExistsError, match=f"{name} is there already; give another"):
                call(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]
    # An empty folder is as good as none.
    (tmp_path / "empty").mkdir()
    convert.import_vae(vae, tmp_path / "empty")
    assert read_vae(tmp_path / "empty")[0] == vae.config


def test_a_failure_leaves_nothing(published, converted, tmp_path, monkeypatch):
    """In the middle of the tensors, on both ways; then it goes through."""
    out, write_tensor, calls = tmp_path / "out", SafetensorsWriter.write, []

    def failing(self, name, array):
        calls.append(name)
        if len(calls) == 40:
            raise OSError(28, "No space left on device")
        write_tensor(self, name, array)

    monkeypatch.setattr(SafetensorsWriter, "write", failing)
    with pytest.raises(OSError, match="No space left"):
        convert.export_checkpoint(converted, out)
    assert len(calls) == 40
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    convert.export_checkpoint(converted, out)
    assert_same(read(out), read(published))

    folder = shutil.copytree(published, tmp_path / "damaged")
    vae = open_vae(folder / "vae")
    model = open_model(folder, downsampling=2)
    os.truncate(folder / "model.safetensors", 100_000)
    with pytest.raises(ValueError, match="cut off or damaged"):
        convert.import_model(model, vae, tmp_path / "ours", image_size=64)
    assert not list(tmp_path.glob("ours*"))


_KILLED = """
import os, pathlib, signal, sys
from nextstep_jax.interop import convert, huggingface
def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
convert.write_model_directory = die
folder, out = map(pathlib.Path, sys.argv[1:])
vae = huggingface.open_vae(folder / "vae")
model = huggingface.open_model(folder, downsampling=2)
convert.import_model(model, vae, out, image_size=64)
"""


def test_killed_with_the_weights_written(published, tmp_path, caplog):
    out = tmp_path / "out"
    command = [sys.executable, "-c", _KILLED, str(published), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = tmp_path.iterdir()
    assert re.fullmatch(r"out\.[0-9a-f]{8}\.unfinished", left.name)
    assert (left / "params").is_dir()
    with pytest.raises(FileNotFoundError, match="is not a model directory"):
        read_model_directory(left)
    import_folder(published, out)
    # It may be of a run that still goes on: it is named, not removed.
    assert {path.name for path in tmp_path.iterdir()} == {"out", left.name}
    assert f"{left} is of a run that was killed" in caplog.text
    kernel = read_model_directory(out).params["lm_head"]["kernel"]
    np.testing.assert_array_equal(kernel, read(published)["lm_head.weight"].T)


def test_a_prefix_comes_back(published, tmp_path):
    source, tensors = tmp_path / "source", read(published)
    shutil.copytree(published, source)
    for path in source.glob("model*"):
        path.unlink()
    named = {n if n == "lm_head.weight" else f"model.{n}": t for n, t in tensors.items()}
    safetensors.numpy.save_file(named, source / "model.safetensors")
    import_folder(source, tmp_path / "ours")
    convert.export_checkpoint(tmp_path / "ours", tmp_path / "back")
    back = read(tmp_path / "back")
    assert back.keys() == named.keys()
    assert all(back[name].tobytes() == named[name].tobytes() for name in named)


def test_what_a_tokenizers_config_leaves_out_is_written(published, tmp_path):
    """The class that reads it has other defaults than those that we took."""
    source = tmp_path / "vae"
    shutil.copytree(published / "vae", source)
    whole = json.loads((source / "config.json").read_text())
    short = {name: value for name, value in whole.items() if name != "shift_factor"}
    (source / "config.json").write_text(json.dumps(short))
    convert.import_vae(open_vae(source), tmp_path / "ours")
    convert.export_checkpoint(tmp_path / "ours", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == {
        **short, "shift_factor": 0.0,
    }  # fmt: skip
