import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from flax import linen as nn

from nextstep_jax.interop import convert, new_model
from nextstep_jax.interop.huggingface import open_vae
from nextstep_jax.interop.model_directory import read_model_directory
from nextstep_jax.interop.new_model import NewModelConfig, open_language_model
from nextstep_jax.interop.tensor_map import leaves_of
from nextstep_jax.models.config import FLOW_HEADS, VAEConfig
from nextstep_jax.models.nextstep import NextStep, init_params
from tests import published_files, published_tokenizer
from tests.published_files import BFLOAT16, QWEN, random_tensors, text_shapes, write

# 400 ordinary tokens and those of Qwen2.5.
FIRST_ADDED = 422
SMALL_VAE = VAEConfig(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=4)
IMAGE_PARTS = ("flow_head", "image_in_proj", "image_out_proj")
TINY = NewModelConfig(flow_head="tiny", seed=5)


@functools.cache
def plain_tokenizer():
    return published_tokenizer.build(added=published_tokenizer.QWEN_TOKENS)


def write_qwen(folder, values=QWEN, tensors=None, *, prefix="model.", dtype=BFLOAT16):
    """A base model as transformers saves it, with other values in every row of the tables."""
    if tensors is None:
        tensors = random_tensors(dict(text_shapes(values)), seed=2, dtype=dtype)
    names = {name: name if name == "lm_head.weight" else prefix + name for name in tensors}
    write(folder, values, {names[name]: tensor for name, tensor in tensors.items()})
    (folder / "tokenizer.json").write_text(plain_tokenizer(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def text_tensors():
    return random_tensors(dict(text_shapes(QWEN)), seed=2, dtype=BFLOAT16)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return write_qwen(tmp_path_factory.mktemp("qwen"))


def params_of(model):
    return {path: np.asarray(leaf) for group in model.stream() for path, leaf in group.items()}


def published_of(model):
    """Name -> tensor, text parts only, in the published order of axes."""
    params, found = params_of(model), {}
    for slot in model.slots():
        if slot.path[0] not in IMAGE_PARTS:
            part = params[slot.path] if slot.layer is None else params[slot.path][slot.layer]
            found[slot.name] = np.ascontiguousarray(part.T if slot.layout == "linear" else part)
    return found


def test_the_config(qwen):
    model = open_language_model(qwen, SMALL_VAE, TINY)
    config = model.config
    # What the file says, and what the architecture fixes.
    decoder = config.decoder
    assert (decoder.embed_dim, decoder.num_layers, decoder.mlp_dim) == (32, 2, 48)
    assert (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim) == (4, 2, 8)
    assert (decoder.rope_theta, decoder.rms_norm_eps) == (10_000.0, 1e-6)
    assert (decoder.qkv_bias, decoder.out_bias, decoder.mlp_bias) == (True, False, False)
    assert config.flow_head == FLOW_HEADS["tiny"]
    assert (config.latent_channels, config.downsampling, config.patch_size) == (4, 2, 2)
    # The new tokens follow the old ones in the published order.
    assert (config.eos_id, config.bos_id) == (400, 400)
    ids = [config.pad_id, config.image_area_id, config.boi_id, config.eoi_id]
    assert [*ids, config.image_placeholder_id] == list(range(FIRST_ADDED, FIRST_ADDED + 5))
    assert model.tokenizer.vocab_size == FIRST_ADDED + 9
    model.tokenizer.check(config)
    assert model.values is None
    assert decoder.vocab_size == 448


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_text_weights_are_those_of_the_file(tmp_path, qwen, text_tensors, prefix):
    folder = qwen if prefix else write_qwen(tmp_path, prefix=prefix)
    found = published_of(open_language_model(folder, SMALL_VAE, TINY))
    tables = ("embed_tokens.weight", "lm_head.weight")
    same = {name: tensor for name, tensor in text_tensors.items() if name not in tables}
    published_files.assert_same({n: t for n, t in found.items() if n not in tables}, same)
    for name in tables:
        assert found[name].dtype == BFLOAT16
        old = text_tensors[name]
        assert found[name].shape == old.shape
        np.testing.assert_array_equal(found[name][:FIRST_ADDED], old[:FIRST_ADDED])
        assert (found[name][FIRST_ADDED:] != old[FIRST_ADDED:]).mean() > 0.95


def test_added_rows(tmp_path):
    """26 rows of 32 values: bounds are four standard errors, or exact."""
    values = {**QWEN, "initializer_range": 0.5}
    tensors = random_tensors(dict(text_shapes(values)), seed=2)
    tensors["embed_tokens.weight"] += np.linspace(-3, 3, 32, dtype=np.float32)
    folder = write_qwen(tmp_path, values, tensors)
    found = {
        mode: published_of(
            open_language_model(folder, SMALL_VAE, dataclasses.replace(TINY, new_rows=mode))
        )
        for mode in new_model.NEW_ROWS
    }
    for name in ("embed_tokens.weight", "lm_head.weight"):
        used = tensors[name][:FIRST_ADDED]
        added = {mode: tables[name][FIRST_ADDED:] for mode, tables in found.items()}
        np.testing.assert_array_equal(added["keep"], tensors[name][FIRST_ADDED:])
        count = added["normal"].size
        assert count == 26 * 32
        assert abs(added["normal"].mean()) < 4 * 0.5 / count**0.5
        assert abs(added["normal"].std() - 0.5) < 4 * 0.5 / (2 * count) ** 0.5
        around = added["mean"] - used.mean(axis=0)
        assert abs(around.mean()) < 4 * 0.05 / count**0.5
        assert abs(around.std() - 0.05) < 4 * 0.05 / (2 * count) ** 0.5
        # Column by column: one mean for all would pass the above for the head alone.
        assert np.abs(around.mean(axis=0)).max() < 5 * 0.05 / 26**0.5
        # Ten times the draw is the one of the other mode.
        np.testing.assert_allclose(10 * around, added["normal"], atol=2e-5)
    normal = found["normal"]
    tables = [normal[name][FIRST_ADDED:] for name in ("embed_tokens.weight", "lm_head.weight")]
    assert abs(np.corrcoef(*(table.ravel() for table in tables))[0, 1]) < 4 / (26 * 32) ** 0.5


def test_image_parts_are_those_of_a_fresh_model(qwen):
    model = open_language_model(qwen, SMALL_VAE, TINY)
    found = params_of(model)
    fresh = jax.jit(lambda key: nn.unbox(init_params(NextStep(model.config), key)))
    fresh = leaves_of(fresh(jax.random.key(5)))
    parts = [path for path in found if path[0] in IMAGE_PARTS]
    assert len(parts) == 4 + 8 + 3 * 8 + 4
    for path in parts:
        np.testing.assert_allclose(found[path], fresh[path], rtol=1e-6, atol=1e-8)
        assert found[path].dtype == np.float32
    # The published initialisers, and not those of another seed.
    assert abs(found["image_out_proj", "kernel"].std() / 0.02 - 1) < 0.1
    assert not found["flow_head", "blocks_0", "modulation", "kernel"].any()
    other = params_of(open_language_model(qwen, SMALL_VAE, dataclasses.replace(TINY, seed=6)))
    path = ("image_in_proj", "kernel")
    assert np.abs(found[path] - other[path]).max() > 0.02


def test_the_seed_decides(qwen):
    one, two, other = (
        params_of(open_language_model(qwen, SMALL_VAE, dataclasses.replace(TINY, seed=seed)))
        for seed in (5, 5, 6)
    )
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[path])
    added = slice(FIRST_ADDED, None)
    assert (one["embed_tokens",][added] != other["embed_tokens",][added]).mean() > 0.9


@pytest.mark.parametrize("has_head", [False, True])
def test_a_tied_model(tmp_path, has_head):
    values = {**QWEN, "tie_word_embeddings": True}
    tensors = random_tensors(dict(text_shapes(values)), dtype=BFLOAT16)
    if has_head:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"].copy()
    model = open_language_model(write_qwen(tmp_path, values, tensors), SMALL_VAE, TINY)
    found = published_of(model)
    assert "lm_head.weight" not in found
    rows = found["embed_tokens.weight"][:FIRST_ADDED]
    np.testing.assert_array_equal(rows, tensors["embed_tokens.weight"][:FIRST_ADDED])
    assert model.config.decoder.tie_embeddings
    if has_head:
        tensors["lm_head.weight"][3, 3] += 1
        with pytest.raises(ValueError, match=r"lm_head.weight differs from embed_tokens.weight"):
            open_language_model(write_qwen(tmp_path, values, tensors), SMALL_VAE, TINY)


@pytest.mark.parametrize("mode", new_model.NEW_ROWS)
@pytest.mark.parametrize("rows", [425, FIRST_ADDED], ids=["some fit", "none fits"])
def test_the_vocabulary_grows(tmp_path, rows, mode):
    values = {**QWEN, "vocab_size": rows}
    tensors = random_tensors(dict(text_shapes(values)), seed=2)
    folder = write_qwen(tmp_path, values, tensors)
    new = dataclasses.replace(TINY, new_rows=mode)
    model = open_language_model(folder, SMALL_VAE, new)
    # 431 ids in multiples of 64.
    assert model.config.decoder.vocab_size == 448
    found = published_of(model)
    kept = rows if mode == "keep" else FIRST_ADDED
    for name in ("embed_tokens.weight", "lm_head.weight"):
        assert found[name].shape == (448, 32)
        np.testing.assert_array_equal(found[name][:kept], tensors[name][:kept])
        assert np.isfinite(found[name]).all()
        assert (np.abs(found[name][kept:]).max(axis=1) > 1e-3).all()


def test_tokens_that_are_there_already(tmp_path, text_tensors):
    """Nothing is added, so nothing is drawn: their rows are the language model's."""
    folder = write_qwen(tmp_path)
    (folder / "tokenizer.json").write_text(published_tokenizer.build(), encoding="utf-8")
    model = open_language_model(folder, SMALL_VAE, TINY)
    assert model.config.boi_id == 424
    published_files.assert_same(published_of(model), text_tensors)


def test_what_is_wrong_is_named(tmp_path, qwen, text_tensors):
    broken = {n: t for n, t in text_tensors.items() if n != "layers.1.mlp.up_proj.weight"}
    broken["lm_head.weight"] = broken["lm_head.weight"][:-1]
    write_qwen(tmp_path, tensors={**broken, "layers.2.mlp.up_proj.weight": np.ones(3)})
    message = (
        r"1 missing: layers.1.mlp.up_proj.weight; 1 unexpected: layers.2.mlp.up_proj.weight; "
        r"1 of another shape: lm_head.weight is \[447, 32\], expected \[448, 32\]$"
    )
    with pytest.raises(ValueError, match=message):
        open_language_model(tmp_path, SMALL_VAE, TINY)
    (tmp_path / "config.json").write_text(json.dumps({**QWEN, "use_sliding_window": True}))
    with pytest.raises(ValueError, match=r"config.json: .*use_sliding_window=True is not support"):
        open_language_model(tmp_path, SMALL_VAE, TINY)
    with pytest.raises(FileNotFoundError, match=r"cannot read the tokenizer .*none.json"):
        open_language_model(qwen, SMALL_VAE, TINY, tokenizer=tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad.json: not the content of a tokenizer.json"):
        open_language_model(qwen, SMALL_VAE, TINY, tokenizer=tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("flow_head", "xl", r"flow_head='xl' is unknown; choose from \['tiny', 's', 'b', 'l'\]"),
        ("new_rows", "zero", r"new_rows='zero' is unknown; choose from \('mean', 'normal', 'keep'"),
        ("seed", -1, r"seed=-1 must be in \[0, 2\*\*32\)"),
    ],
)
def test_settings_are_checked(field, value, message):
    with pytest.raises(ValueError, match=message):
        NewModelConfig(**{field: value})


def test_converted_and_exported(qwen, tmp_path):
    """It becomes a model directory, and a published NextStep."""
    vae = published_files.random_tensors(published_files.vae_shapes(), seed=1)
    opened = open_vae(write(tmp_path / "vae", published_files.VAE, vae))
    model = open_language_model(qwen, opened.config, TINY)
    convert.import_model(model, opened, tmp_path / "ours", source=qwen, image_size=64)
    read = read_model_directory(tmp_path / "ours")
    assert read.config == model.config
    assert read.tokenizer.fingerprint == model.tokenizer.fingerprint
    found, expected = leaves_of(read.params), params_of(model)
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf)
        assert found[path].dtype == leaf.dtype
    convert.export_checkpoint(tmp_path / "ours", tmp_path / "out")
    shapes = published_files.model_shapes(
        {**published_files.MODEL, **QWEN, "fm_head_dim": 256, "fm_head_layers": 3}
    )
    written = published_files.read(tmp_path / "out")
    assert {n: t.shape for n, t in written.items()} == {**shapes, "gen_pos_embed": (1, 1024, 32)}
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["model_type"], values["torch_dtype"]) == ("nextstep", "bfloat16")
    assert (values["boi"], values["pad_token_id_added"]) == (424, 422)


@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    values = {**QWEN, "tie_word_embeddings": tied}
    del values["torch_dtype"], values["architectures"], values["model_type"]
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**values))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    (tmp_path / "tokenizer.json").write_text(plain_tokenizer(), encoding="utf-8")
    found = published_of(open_language_model(tmp_path, SMALL_VAE, TINY))
    state = {n.removeprefix("model."): t.numpy() for n, t in model.state_dict().items()}
    for name, tensor in found.items():
        rows = slice(FIRST_ADDED if name in new_model._TABLES else None)
        np.testing.assert_array_equal(tensor[rows], state[name][rows])
    assert ("lm_head.weight" in found) != tied
