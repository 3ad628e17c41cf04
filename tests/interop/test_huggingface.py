import dataclasses
import json
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from nextstep_jax.interop import huggingface
from nextstep_jax.interop.huggingface import GEN_POS_EMBED, check_pair, open_model, open_vae
from nextstep_jax.interop.published_config import model_from_published
from nextstep_jax.interop.tensor_map import tree_of
from nextstep_jax.models.config import VAEConfig
from tests import published_files, published_tokenizer
from tests.published_files import BFLOAT16, DIFFUSERS_VAE, MODEL, VAE, write

OLDER_NAMES = {
    **{"latent_size": "image_size", "latent_patch_size": "patch_size"},
    **{"latent_channels": "num_channels", "fm_head_dim": "genloss_width"},
    **{"fm_head_layers": "genloss_depth", "fm_head_batch_mul": "genloss_batch_mul"},
    **{"im_loss_weight": "image_loss_weight"},
}


@pytest.fixture(scope="module")
def tensors():
    return published_files.random_tensors(published_files.model_shapes())


def values_of(model):
    """Every tensor of an opened model through the map: name -> (bytes, dtype) of its slice."""
    leaves = {path: leaf for group in model.stream() for path, leaf in group.items()}
    found = {}
    for slot in model.slots():
        part = np.asarray(leaves[slot.path])
        part = part if slot.layer is None else part[slot.layer]
        found[slot.name] = np.ascontiguousarray(part.T if slot.layout == "linear" else part)
    return found


def without(values, *names):
    return {name: value for name, value in values.items() if name not in names}


def test_a_model_opened(tmp_path, tensors, caplog):
    published_files.write_model(tmp_path, tokenizer=True)
    with caplog.at_level("INFO"):
        model = open_model(tmp_path, downsampling=2)
    config = model.config
    assert (config.decoder.num_layers, config.decoder.mlp_dim) == (3, 48)
    assert (config.latent_channels, config.patch_size, config.downsampling) == (4, 2, 2)
    assert (config.eos_id, config.pad_id, config.image_area_id) == (400, 422, 423)
    assert (config.boi_id, config.eoi_id, config.image_placeholder_id) == (424, 425, 426)
    assert (model.generation, model.loss_weights) == ("nextstep-1", (0.01, 1.0))
    assert model.values == MODEL
    assert model.tokenizer.boi_id == 424
    assert model.ignored == ()
    published_files.assert_same(values_of(model), tensors)
    assert not caplog.records
    # What a file leaves out is said.
    write(tmp_path, without(MODEL, "rope_scaling", "mlp_bias"), tensors)
    with caplog.at_level("INFO"):
        open_model(tmp_path, downsampling=2)
    assert any("config.json: mlp_bias: not given, taken as False" in m for m in caplog.messages)


def test_older_names(tmp_path, tensors):
    older = {OLDER_NAMES.get(name, name): value for name, value in MODEL.items()}
    older |= {"genloss_net_arch": "mlp", "genloss_type": "transport"}
    model = open_model(write(tmp_path, older, tensors))
    assert model.generation == "nextstep-1.1"
    assert model.config == model_from_published(MODEL).config
    assert model.values == older
    published_files.assert_same(values_of(model), tensors)


def test_shards_with_an_index(tmp_path, tensors):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    names, shards = sorted(tensors), {}
    for i in range(3):
        part = {name: tensors[name] for name in names[i::3]}
        path = tmp_path / f"model-{i + 1:05d}-of-00003.safetensors"
        safetensors.numpy.save_file(part, path)
        shards |= dict.fromkeys(part, path.name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    model = open_model(tmp_path)
    published_files.assert_same(values_of(model), tensors)
    assert model.files.where(names[1]).name == "model-00002-of-00003.safetensors"
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00003.safetensors: no such file"):
        open_model(tmp_path)


def test_names_with_a_prefix(tmp_path, tensors):
    prefixed = {n if n == "lm_head.weight" else f"model.{n}": t for n, t in tensors.items()}
    model = open_model(write(tmp_path, MODEL, prefixed))
    published_files.assert_same(values_of(model), tensors)


def test_a_tied_model(tmp_path, tensors):
    """With the head in the file, without it, and with another one."""
    tied = {**MODEL, "tie_word_embeddings": True}
    headless = without(tensors, "lm_head.weight")
    model = open_model(write(tmp_path / "without", tied, headless))
    assert model.ignored == ()
    published_files.assert_same(values_of(model), headless)
    copied = {**headless, "lm_head.weight": headless["embed_tokens.weight"].copy()}
    model = open_model(write(tmp_path / "with", tied, copied))
    assert model.ignored == ("lm_head.weight",)
    published_files.assert_same(values_of(model), headless)
    copied["lm_head.weight"][7, 3] += 1
    message = r"model.safetensors: tie_word_embeddings is true, but lm_head.weight differs from emb"
    with pytest.raises(ValueError, match=message):
        open_model(write(tmp_path / "other", tied, copied))
    # Without the embedding that is what is missing.
    message = r"1 missing: embed_tokens.weight; 1 unexpected: lm_head.weight"
    with pytest.raises(ValueError, match=message):
        open_model(write(tmp_path / "no", tied, without(copied, "embed_tokens.weight")))


@pytest.mark.parametrize("shape", [(1, 16, 32), (1, 15, 32), (3,), (1, 4, 4)], ids=str)
def test_positions_that_are_not_used_are_ignored(tmp_path, tensors, shape):
    buffers = {
        GEN_POS_EMBED: np.full(shape, 7, np.float32),
        "layers.0.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    model = open_model(write(tmp_path, MODEL, {**tensors, **buffers}))
    assert set(model.ignored) == set(buffers)
    published_files.assert_same(values_of(model), tensors)


def test_positions_that_are_used_are_checked(tmp_path, tensors):
    used = {**MODEL, "use_gen_pos_embed": True}
    table = published_files.position_table(4, 32)
    for dtype in (np.float32, BFLOAT16):
        with_table = {**tensors, GEN_POS_EMBED: table.astype(dtype)}
        model = open_model(write(tmp_path, used, with_table))
        assert model.config.use_gen_pos_embed
        assert model.ignored == (GEN_POS_EMBED,)
    # The weights decide about the size of the grid; without them the config does.
    larger = {**tensors, GEN_POS_EMBED: published_files.position_table(6, 32)}
    assert open_model(write(tmp_path, used, larger)).config.base_image_grid_size == 6
    assert open_model(write(tmp_path, used, tensors)).config.base_image_grid_size == 4
    moved, swapped = table.copy(), np.concatenate([table[..., 16:], table[..., :16]], axis=-1)
    moved[0, 5, 9] += 1e-4
    for wrong in (moved, swapped, table[:, :15], table[0], table[:, :, :16]):
        message = r"gen_pos_embed is not the 2D sincos of 16 positions and width 32 that the model"
        with pytest.raises(ValueError, match=message):
            open_model(write(tmp_path, used, {**tensors, GEN_POS_EMBED: wrong}))


def test_the_recorded_positions():
    """The buffer of the original code, which that model does not use."""
    model = open_model(published_files.CASE / "model")
    assert model.ignored == (GEN_POS_EMBED,)
    recorded = model.files.read(GEN_POS_EMBED)
    np.testing.assert_allclose(recorded, published_files.position_table(32, 64), atol=1e-6)


@pytest.fixture(scope="module")
def vae_tensors():
    return published_files.random_tensors(published_files.vae_shapes(), seed=1)


def test_an_image_tokenizer_under_both_sets_of_names(tmp_path, vae_tensors):
    original = open_vae(write(tmp_path / "original", VAE, vae_tensors))
    # Both lists are made in one order.
    renamed = published_files.vae_shapes(diffusers=True)
    renamed = {
        name: tensor.reshape(shape)
        for (name, shape), tensor in zip(renamed.items(), vae_tensors.values(), strict=True)
    }
    folder = tmp_path / "diffusers"
    stem = "diffusion_pytorch_model"
    diffusers = open_vae(write(folder, DIFFUSERS_VAE, renamed, stem=stem))
    # A plain AutoencoderKL neither normalises nor leaves its noise out.
    plain = dataclasses.replace(original.config, deterministic=False, norm_patch_size=None)
    assert diffusers.config == plain
    assert (plain.scaling_factor, plain.shift_factor, plain.channels) == (1.5, 0.25, 32)
    one, other = original.load(), diffusers.load()
    one, other = (huggingface.streaming.leaves_of(tree) for tree in (one, other))
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[path])
    assert one["decoder", "up_0_block_1", "conv1", "kernel"].shape == (3, 3, 32, 32)


def test_where_the_image_tokenizer_is_looked_for(tmp_path):
    model = published_files.write_model(tmp_path / "model")
    assert huggingface.find_vae(model, MODEL) == model / "vae"
    (model / "vae").rename(tmp_path / "elsewhere")
    named = {"vae_name_or_path": str(tmp_path / "elsewhere")}
    assert huggingface.find_vae(model, named) == tmp_path / "elsewhere"
    assert huggingface.find_vae(model, {"vae_name_or_path": "../elsewhere"}).samefile(
        tmp_path / "elsewhere"
    )
    for values in ({}, {"vae_name_or_path": None}, {"vae_name_or_path": 3}):
        with pytest.raises(FileNotFoundError, match=r"no image tokenizer .* in .*model/vae$"):
            huggingface.find_vae(model, values)
    with pytest.raises(FileNotFoundError, match=r"in .*model/vae, .*model/missing, missing$"):
        huggingface.find_vae(model, {"vae_name_or_path": "missing"})


def test_missing_and_unexpected_tensors(tmp_path, tensors):
    wrong = without(tensors, "layers.1.self_attn.q_proj.bias", "image_head.net.cond_embed.weight")
    wrong["layers.1.self_attn.q_norm.weight"] = np.ones(8, np.float32)
    wrong["norm.weight"] = np.ones(31, np.float32)
    write(tmp_path, MODEL, wrong)
    message = (
        f"{tmp_path}: the tensors are not those of the config; "
        "2 missing: layers.1.self_attn.q_proj.bias, image_head.net.cond_embed.weight; "
        "1 unexpected: layers.1.self_attn.q_norm.weight; "
        "1 of another shape: norm.weight is [31], expected [32]"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        open_model(tmp_path)


def test_missing_files(tmp_path, tensors):
    with pytest.raises(FileNotFoundError, match=r"none/config.json is not there"):
        open_model(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"none/config.json is not there"):
        open_vae(tmp_path / "none")
    write(tmp_path, MODEL, tensors)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint: none of \['model.safet"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json: expected a mapping, got list"):
        open_model(tmp_path)
    with pytest.raises(ValueError, match=r"cannot read the tokenizer .*typo.json"):
        open_model(published_files.write_model(tmp_path), tokenizer=tmp_path / "typo.json")


def test_configs_that_are_refused_name_the_file(tmp_path, tensors, vae_tensors):
    write(tmp_path, {**MODEL, "hidden_act": "gelu"}, tensors)
    with pytest.raises(ValueError, match=r"^.*/config.json: .*hidden_act='gelu' is not supported"):
        open_model(tmp_path)
    write(tmp_path, {**VAE, "double_z": False}, vae_tensors)
    with pytest.raises(ValueError, match=r"^.*/config.json: .*double_z=False is not supported"):
        open_vae(tmp_path)


def test_ids_of_the_tokenizer(tmp_path, tensors):
    """All that differ are named; also the one that published configs do not state."""
    write(tmp_path, {**MODEL, "boi": 430, "pad_token_id_added": 431}, tensors)
    (tmp_path / "tokenizer.json").write_text(published_tokenizer.build())
    message = (
        r"pad_id: the tokenizer has 422 \(\[PAD\]\), the model config 431; "
        r"boi_id: the tokenizer has 424 \(<\|begin_of_image\|>\), the model config 430$"
    )
    with pytest.raises(ValueError, match=message):
        open_model(tmp_path)
    write(tmp_path, {**MODEL, "image_area_id": 430}, tensors)
    with pytest.raises(ValueError, match=r"image_area_id: the tokenizer has 423 .* config 430$"):
        open_model(tmp_path)
    # Elsewhere than before boi, which only the tokenizer knows.
    added = list(published_tokenizer.ALL_TOKENS)
    area, other = added.index("<|image_area|>"), added.index("<|beginoftext|>")
    added[area], added[other] = added[other], added[area]
    moved = tmp_path / "moved.json"
    moved.write_text(published_tokenizer.build(added=tuple(added)))
    write(tmp_path, MODEL, tensors)
    assert open_model(tmp_path, tokenizer=moved).config.image_area_id == 400 + other
    short = tmp_path / "short.json"
    short.write_text(published_tokenizer.build(350, published_tokenizer.QWEN_TOKENS))
    with pytest.raises(ValueError, match=r"short.json: the tokenizer lacks the special tokens \[P"):
        open_model(tmp_path, tokenizer=short)


def test_truncated_safetensors(tmp_path, tensors):
    path = write(tmp_path, MODEL, tensors) / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1000)
    message = (
        rf"model.safetensors is cut off or damaged: expected {size} bytes, found {size - 1000}"
    )
    with pytest.raises(ValueError, match=message):
        open_model(tmp_path)
    # And between opening and reading.
    write(tmp_path, MODEL, tensors)
    model = open_model(tmp_path)
    os.truncate(path, size - 1000)
    with pytest.raises(ValueError, match=message):
        list(model.stream())


def test_truncated_checkpoint(tmp_path):
    vae = published_files.CASE / "vae"
    (tmp_path / "config.json").write_bytes((vae / "config.json").read_bytes())
    whole = (vae / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole)
    assert len(open_vae(tmp_path).files.infos) == len(open_vae(vae).slots)
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"checkpoint.pt is cut off or no torch zip checkpoint"):
        open_vae(tmp_path)


def test_foreign_globals_are_refused(tmp_path):
    class Command:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    (tmp_path / "config.json").write_text(json.dumps(VAE))
    with zipfile.ZipFile(tmp_path / "checkpoint.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"encoder": Command()}, protocol=2))
        archive.writestr("archive/version", "3\n")
    message = r"checkpoint.pt: refused the global 'posix.system': only tensors are read"
    with pytest.raises(ValueError, match=message):
        open_vae(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_model_and_an_image_tokenizer_that_do_not_fit():
    config = model_from_published(MODEL, downsampling=2).config
    fitting = VAEConfig(channel_multipliers=(1, 2), latent_channels=4)
    check_pair(config, fitting)
    with pytest.raises(
        ValueError, match="latent_channels: the model has 4, its image tokenizer 16"
    ):
        check_pair(config, VAEConfig(channel_multipliers=(1, 2)))
    with pytest.raises(ValueError, match="downsampling: the model has 2, its image tokenizer 8"):
        check_pair(config, VAEConfig(latent_channels=4))


def test_unrolled_layers_and_a_dtype(tmp_path, tensors):
    model = open_model(write(tmp_path, MODEL, tensors))
    groups = list(model.stream(scan_layers=False, dtype=np.dtype(BFLOAT16)))
    params = tree_of({path: leaf for group in groups for path, leaf in group.items()})
    kernel = params["decoder"]["layers_2"]["mlp"]["down_proj"]["kernel"]
    expected = tensors["layers.2.mlp.down_proj.weight"].T.astype(BFLOAT16)
    assert kernel.dtype == BFLOAT16
    np.testing.assert_array_equal(kernel, expected)
    assert len(model.slots(scan_layers=False)) == len(tensors)
    assert {slot.layer for slot in model.slots(scan_layers=False)} == {None}
