import json
import math
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from nextstep_jax.interop import clip_weights
from nextstep_jax.interop.clip_weights import (
    open_aesthetic_head,
    open_clip,
    read_aesthetic_head,
    read_clip,
    read_clip_config,
)
from nextstep_jax.interop.tensor_map import leaves_of
from nextstep_jax.models.clip import ClipConfig, TowerConfig
from tests import tiny_clip
from tests.interop import test_torch_pickle as zipped
from tests.recorded import record_clip
from tests.recorded.record_perceptual import digest_of

RECORD = json.loads(record_clip.PATH.read_text())


@pytest.fixture
def folder(tmp_path):
    return tiny_clip.write_folder(tmp_path / "clip", "later")


def write_config(folder, **changes):
    """config.json with some keys changed; "text__x" is x of the text config, None removes."""
    values = tiny_clip.config_of("later")
    for key, value in changes.items():
        section, _, field = key.rpartition("__")
        place = values[f"{section}_config"] if section else values
        place[field] = value
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("variant", RECORD["towers"])
def test_names_and_shapes_are_the_originals(variant):
    shapes = tiny_clip.shapes_of(tiny_clip.config_of(variant))
    assert digest_of(shapes) == RECORD["towers"][variant]["digest"]


def test_published_size(tmp_path, name="L/14"):
    """The others are compared with live ones in tests/parity; tracing takes its time."""
    values = record_clip.published_config(name)
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_clip_config(tmp_path)
    vision, text, embed_dim, patch_size = record_clip.PUBLISHED[name]
    assert config == ClipConfig(
        *(TowerConfig(*tower, "quick_gelu", 1e-5) for tower in (vision, text)),
        embed_dim,
        *(224, patch_size, 49408, 77, 49407),
    )
    slots = clip_weights.clip_slots(clip_weights._abstract(config))
    shapes = {slot.name: slot.shape for slot in slots}
    assert digest_of(shapes) == RECORD["published"][name]
    assert sum(map(math.prod, shapes.values())) == 427_616_512


@pytest.mark.parametrize("variant", RECORD["towers"])
def test_every_tensor_arrives(tmp_path, variant):
    config, params = read_clip(tiny_clip.write_folder(tmp_path, variant))
    assert config.end_id == (None if variant == "first" else tiny_clip.END_ID)
    tensors = tiny_clip.tensors_of(variant)
    leaves = leaves_of(params)
    assert len(leaves) == len(tensors)
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(np.float32)}
    layer = params["text"]["layers_1"]
    published = "text_model.encoder.layers.1"
    for ours, theirs in (
        (layer["k_proj"]["kernel"].T, f"{published}.self_attn.k_proj.weight"),
        (layer["out_proj"]["bias"], f"{published}.self_attn.out_proj.bias"),
        (layer["norm_2"]["scale"], f"{published}.layer_norm2.weight"),
        (layer["mlp_in"]["kernel"].T, f"{published}.mlp.fc1.weight"),
        (params["vision"]["class_embed"], "vision_model.embeddings.class_embedding"),
        (params["vision"]["pre_norm"]["bias"], "vision_model.pre_layrnorm.bias"),
        (params["text"]["token_embed"], "text_model.embeddings.token_embedding.weight"),
        (params["vision_proj"]["kernel"].T, "visual_projection.weight"),
    ):
        np.testing.assert_array_equal(ours, tensors[theirs])
    kernel = params["vision"]["patch_embed"]["kernel"]
    theirs = tensors["vision_model.embeddings.patch_embedding.weight"]
    np.testing.assert_array_equal(kernel, theirs.transpose(2, 3, 1, 0))


def pickle_of(tensors):
    """A torch checkpoint of whole tensors."""
    body = {}
    for key, (name, array) in enumerate(tensors.items()):
        strides = [stride // array.itemsize for stride in array.strides]
        source = zipped.storage("Float", str(key), array.size)
        body[name] = zipped.tensor(source, array.shape, strides)
    raw = {str(key): array.tobytes() for key, array in enumerate(tensors.values())}
    return zipped.mapping(zipped.ORDERED, **body), raw


def test_other_files(tmp_path, folder):
    """Half precision, the buffers of old exports, and pytorch_model.bin."""
    tensors = tiny_clip.tensors_of("later")
    half = {name: values.astype(ml_dtypes.bfloat16) for name, values in tensors.items()}
    half["vision_model.embeddings.position_ids"] = np.arange(17)[None]
    _, params = read_clip(tiny_clip.write_folder(tmp_path / "half", "later", half))
    norm = params["text"]["final_norm"]["scale"]
    assert norm.dtype == np.float32
    expected = half["text_model.final_layer_norm.weight"].astype(np.float32)
    np.testing.assert_array_equal(norm, expected)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="clip holds no checkpoint"):
        read_clip(folder)
    body, raw = pickle_of(tensors)
    zipped.write_zip(folder / "pytorch_model.bin", body, raw)
    _, from_pickle = read_clip(folder)
    _, whole = read_clip(tiny_clip.write_folder(tmp_path / "whole", "later"))
    jax.tree.map(np.testing.assert_array_equal, from_pickle, whole)


def test_faults_of_tensors_are_all_listed(tmp_path):
    tensors = tiny_clip.tensors_of("later")
    del tensors["text_model.encoder.layers.1.mlp.fc2.bias"]
    tensors["visual_projection.weight"] = np.zeros((16, 33), np.float32)
    tensors["vision_model.head.weight"] = np.zeros((1,), np.float32)
    folder = tiny_clip.write_folder(tmp_path, "later", tensors)
    with pytest.raises(ValueError) as caught:
        open_clip(folder)
    for words in (
        str(folder),
        "1 missing: text_model.encoder.layers.1.mlp.fc2.bias",
        "1 unexpected: vision_model.head.weight",
        "visual_projection.weight is [16, 33], expected [16, 32]",
    ):
        assert words in str(caught.value)


def test_faults_of_configs_are_all_listed(tmp_path):
    write_config(
        tmp_path,
        model_type="siglip",
        text__hidden_act="gelu_new",
        text__eos_token_id=[1, 2],
        vision__num_channels=4,
        vision__num_hidden_layers=0,
    )
    with pytest.raises(ValueError) as caught:
        read_clip_config(tmp_path)
    for words in (
        str(tmp_path / "config.json"),
        "model_type='siglip' is not supported, only 'clip'",
        "text_config.hidden_act='gelu_new' is not supported, only 'quick_gelu' or 'gelu'",
        "text_config.eos_token_id=[1, 2] must be an integer",
        "vision_config.num_channels=4 is not supported, only 3",
        "vision_config.num_hidden_layers=0 must be an integer of at least 1",
    ):
        assert words in str(caught.value)
    write_config(tmp_path, vision__num_attention_heads=5)
    with pytest.raises(ValueError, match=r"config.json: num_heads=5 must divide width=32"):
        read_clip_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none/config.json is not there"):
        read_clip_config(tmp_path / "none")


def test_second_copies_in_old_configs(tmp_path):
    """Published files of L/14 say in `text_config_dict` again what differs from B/32."""
    copy = {"hidden_size": 24, "num_attention_heads": 2}
    write_config(tmp_path, text_config_dict=copy)
    assert read_clip_config(tmp_path).text.width == 24
    write_config(tmp_path, text_config_dict={"hidden_size": 512}, vision_config_dict=None)
    words = "text_config.hidden_size=24 but text_config_dict.hidden_size=512"
    with pytest.raises(ValueError, match=words):
        read_clip_config(tmp_path)


# The published heads, written out a second time.
MLP = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


def head_tensors(form):
    shapes = {"": (1, 768)} if form == "linear" else {f"layers.{k}.": v for k, v in MLP.items()}
    tensors = {}
    for prefix, shape in shapes.items():
        for kind, size in (("weight", shape), ("bias", shape[:1])):
            tensors[f"{prefix}{kind}"] = tiny_clip.tensor_of(f"{prefix}{kind}", size)
    return tensors


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("form", ["linear", "mlp"])
def test_heads(tmp_path, form, suffix):
    tensors, path = head_tensors(form), tmp_path / f"head{suffix}"
    if suffix == ".pth":
        zipped.write_zip(path, *pickle_of(tensors))
    else:
        save_file(tensors, path)
    head, params = read_aesthetic_head(path, 768)
    assert head.form == form
    x = np.random.default_rng([3]).standard_normal((2, 768))
    expected = x / np.linalg.norm(x, axis=1, keepdims=True)
    for prefix in [""] if form == "linear" else [f"layers.{k}." for k in MLP]:
        expected = expected @ tensors[f"{prefix}weight"].T + tensors[f"{prefix}bias"]
    scores = jax.jit(head.apply)({"params": params}, np.float32(x))
    np.testing.assert_allclose(scores, expected[:, 0], rtol=1e-5)


def test_faults_of_heads(tmp_path):
    path = tmp_path / "head.safetensors"
    save_file(head_tensors("linear"), path)
    words = r"head.safetensors, a head of form 'linear': .* weight is \[1, 768\], expected \[1, 512"
    with pytest.raises(ValueError, match=words):
        open_aesthetic_head(path, 512)
    tensors = head_tensors("mlp")
    tensors["layers.5.weight"] = tensors.pop("layers.6.weight")
    save_file(tensors, path)
    words = "form 'mlp': .*1 missing: layers.6.weight; 1 unexpected: layers.5.weight"
    with pytest.raises(ValueError, match=words):
        open_aesthetic_head(path, 768)
    with pytest.raises(FileNotFoundError, match=r"none.pth: no such file"):
        open_aesthetic_head(pathlib.Path(tmp_path / "none.pth"), 768)


def test_pickles_that_do_more_are_refused(tmp_path):
    path = tmp_path / "head.pth"
    mark = tmp_path / "mark"
    command = zipped.name_of("os", "system") + b"(" + zipped.text(f"touch {mark}") + b"tR"
    zipped.write_zip(path, zipped.mapping(zipped.ORDERED, weight=command))
    with pytest.raises(ValueError, match=r"head.pth.*os.system"):
        open_aesthetic_head(path, 768)
    assert not mark.exists()
