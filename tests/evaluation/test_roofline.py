import functools
import math

import jax
import pytest
from flax import linen as nn

from nextstep_jax.evaluation import roofline
from nextstep_jax.models.config import nextstep_config
from nextstep_jax.models.nextstep import NextStep, init_params

# How often a part of the head is read, by the name of the module.
PER_STEP = ("norm", "mlp_in", "mlp_out", "input_proj", "final_proj")
PER_TOKEN = ("modulation", "final_modulation", "cond_embed")
PER_CALL = ("time_in", "time_out")


@pytest.mark.parametrize("size", ["tiny", "0.5b", "14b"])
def test_counts_are_those_of_the_model(size):
    config = nextstep_config(size)
    init = functools.partial(init_params, NextStep(config, scan_layers=False))
    params = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
    leaves = [
        ([entry.key for entry in path], math.prod(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]

    def count(*parts):
        return sum(n for path, n in leaves if path[0] in parts)

    def count_head(names):
        return sum(n for path, n in leaves if path[0] == "flow_head" and path[-2] in names)

    counts = roofline.count_parameters(config)
    assert counts.decoder == count("decoder")
    assert counts.projectors == count("image_in_proj", "image_out_proj")
    assert counts.head_per_step == count_head(PER_STEP)
    assert counts.head_per_token == count_head(PER_TOKEN)
    assert counts.head_per_call == count_head(PER_CALL)
    parts = (counts.head_per_step, counts.head_per_token, counts.head_per_call)
    assert sum(parts) == count("flow_head")


def test_published_shape_by_hand():
    """14B on an H100 in bfloat16, 28 steps, 2 rows: D, L, K d, F = 5120, 48, 1024, 13824."""
    needed = roofline.token_bytes(nextstep_config("14b"), rows=2, context=512, steps=28, itemsize=2)
    weights = 48 * (2 * 5120**2 + 2 * 5120 * 1024 + 3 * 5120 * 13_824)
    cache = 2 * 48 * 2 * 1024 * 512
    assert needed.decoder == pytest.approx(2 * (weights + cache), rel=1e-3)
    width = 1536
    per_step = 12 * 2 * width**2 + 2 * 64 * width
    per_token = 12 * 3 * width**2 + 2 * width**2 + 5120 * width + 5120**2
    assert needed.head == pytest.approx(2 * (28 * per_step + per_token), rel=3e-3)
    assert needed.total == needed.decoder + needed.head
    # About 9 ms a token at 3.35 TB/s, of which the decoder takes 7.9.
    assert needed.decoder / 3.35e12 == pytest.approx(7.95e-3, rel=0.01)
    assert needed.head / 3.35e12 == pytest.approx(1.03e-3, rel=0.03)


def test_every_input_of_the_byte_model_counts():
    config = nextstep_config("tiny")
    base = dict(rows=2, context=100.0, steps=10, itemsize=4)
    needed = roofline.token_bytes(config, **base)
    twice = roofline.token_bytes(config, **{**base, "itemsize": 8})
    assert (twice.decoder, twice.head) == (2 * needed.decoder, 2 * needed.head)
    step = roofline.token_bytes(config, **{**base, "steps": 11})
    assert step.head - needed.head == 4 * roofline.count_parameters(config).head_per_step
    # Two kv heads of 32, keys and values, 4 layers.
    row = roofline.token_bytes(config, **{**base, "rows": 3})
    assert row.decoder - needed.decoder == 4 * 100 * 2 * 2 * 32 * 4


@pytest.mark.parametrize(
    ("kind", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2000),
        ("NVIDIA H200", 4800),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA A100-SXM4-40GB", 1555),
        ("TPU v4", 1228),
        ("TPU v5 lite", 819),
        ("TPU v5", 2765),
        ("TPU v5p", 2765),
        ("TPU v6 lite", 1638),
        ("cpu", None),
    ],
)
def test_known_bandwidths(kind, bandwidth):
    assert roofline.known_bandwidth(kind) == bandwidth


def test_measured_bandwidth_is_that_of_a_memory(monkeypatch):
    # Small enough for a test; a cache may hold it, so the upper bound is generous.
    monkeypatch.setattr(roofline, "_TRIAD_BYTES", 2**24)
    assert 0.5 < roofline.measured_bandwidth() < 2000
