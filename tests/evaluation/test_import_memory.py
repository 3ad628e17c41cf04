import dataclasses

import jax
import pytest
from flax import linen as nn

from nextstep_jax.evaluation.import_memory import measure, random_checkpoint, sized_config
from nextstep_jax.interop.huggingface import abstract_model
from nextstep_jax.models.config import FLOW_HEADS, DecoderConfig, NextStepConfig

# 24 layers, so that no stack is more than a third of the whole.
CONFIG = NextStepConfig(
    decoder=DecoderConfig(
        vocab_size=1024, embed_dim=512, num_layers=24, num_heads=8, num_kv_heads=2, mlp_dim=2048,
        head_dim=64,
    ),
    flow_head=FLOW_HEADS["tiny"],
    **dict(bos_id=0, eos_id=0, pad_id=1, image_area_id=2, boi_id=3, eoi_id=4),
    image_placeholder_id=5,
)  # fmt: skip

# Programs that are loaded on the way, and the groups of small parameters.
_SLACK = 130 * 2**20


def num_bytes(config):
    return sum(4 * leaf.size for leaf in jax.tree.leaves(nn.unbox(abstract_model(config))))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory") / "published"
    largest = random_checkpoint(folder, CONFIG)
    assert largest == 24 * 512 * 2048 * 4
    assert len(list(folder.glob("*.safetensors"))) >= 5
    return folder, largest


@pytest.fixture(scope="module")
def start(checkpoint, tmp_path_factory):
    """What a process needs that imports nothing."""
    return measure("nothing", checkpoint[0], tmp_path_factory.mktemp("out"), 1)["peak_bytes"]


def test_loading_never_holds_the_whole_beside_the_parameters(checkpoint, start, tmp_path):
    folder, largest = checkpoint
    measured = measure("load", folder, tmp_path / "out", 8)
    assert measured["kept_bytes"] == num_bytes(CONFIG)
    extra = measured["peak_bytes"] - start - measured["kept_bytes"]
    assert extra < 2 * largest + _SLACK < num_bytes(CONFIG)


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [1, 8])
def test_converting_never_holds_the_whole(start, tmp_path, num_devices):
    decoder = dataclasses.replace(CONFIG.decoder, num_layers=120)
    config = dataclasses.replace(CONFIG, decoder=decoder)
    largest = random_checkpoint(tmp_path / "published", config)
    measured = measure("convert", tmp_path / "published", tmp_path / "out", num_devices)
    assert measured["kept_bytes"] == 0
    # Orbax holds a copy of what it writes, and frees it late.
    assert measured["peak_bytes"] - start < 3 * largest + _SLACK < num_bytes(config)


def test_sized_config():
    for gigabytes in (3.0, 6.5):
        assert num_bytes(sized_config(gigabytes)) == pytest.approx(gigabytes * 1e9, rel=0.03)


def test_a_failure_shows_its_end(tmp_path):
    with pytest.raises(RuntimeError, match=r"convert failed: [\s\S]*config\.json is not there"):
        measure("convert", tmp_path, tmp_path / "out", 1)
