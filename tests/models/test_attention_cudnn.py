"""cuDNN's kernel without a GPU: what it is told, what is refused, what is lowered; and with one."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from nextstep_jax.models import attention_cudnn
from nextstep_jax.models.attention import Segments, attend
from nextstep_jax.models.attention_cudnn import TOKENS_PER_SEGMENT, segment_runs
from nextstep_jax.parallel.mesh import make_mesh
from nextstep_jax.parallel.sharding import rules

LENGTH = 4 * TOKENS_PER_SEGMENT  # rows of at most four runs
ROOT = pathlib.Path(__file__).resolve().parents[2]


def row(*runs):
    """(id, length), ... and padding up to LENGTH."""
    ids = np.concatenate([np.full(length, i) for i, length in runs])
    return np.pad(ids, (0, LENGTH - len(ids))).astype(np.int32)


ROWS = np.stack([row((1, 100), (2, 31), (3, 90)), row((0, 7), (1, LENGTH - 7))])


def arrays(batch=2, length=LENGTH, heads=(4, 2, 2), head_dim=16, dtype=jnp.bfloat16):
    rng = np.random.default_rng([6])
    return [jnp.asarray(rng.standard_normal((batch, length, n, head_dim)), dtype) for n in heads]


def run_cudnn(q, k, v, ids=ROWS):
    return attend(q, k, v, Segments.of_row(jnp.asarray(ids)), "cudnn")


# --- what the kernel is told ---


def numpy_runs(ids):
    edges = [0, *(np.flatnonzero(np.diff(ids)) + 1), len(ids)]
    return edges[:-1], np.diff(edges)


def test_runs_are_those_of_numpy():
    rng = np.random.default_rng([6, 1])
    ids = np.stack([np.sort(rng.integers(0, 6, 40)) for _ in range(20)]).astype(np.int32)
    ids[:, 30:] = np.roll(ids[:, 30:], 3, axis=1) * 10 + 7  # not sorted
    starts, lengths, whole = segment_runs(jnp.asarray(ids), 16)
    assert starts.shape == (20, 17)
    for i in range(20):
        expected_starts, expected_lengths = numpy_runs(ids[i])
        n = len(expected_starts)
        np.testing.assert_array_equal(starts[i], [*expected_starts, *[-1] * (17 - n)])
        np.testing.assert_array_equal(lengths[i], [*expected_lengths, *[-1] * (16 - n)])
        ids_of_runs = ids[i, expected_starts]
        ids_of_runs = ids_of_runs[ids_of_runs != 0]
        assert bool(whole[i]) == (len(set(ids_of_runs)) == len(ids_of_runs))
    assert 0 < whole.sum() < 20


@pytest.mark.parametrize(
    ("ids", "whole"),
    [
        ([1, 1, 2, 2, 3, 0], False),  # four runs, and room for three
        ([1, 1, 2, 2, 0, 0], True),
        ([0, 1, 1, 1, 0, 0], True),  # nothing reads padding
        ([1, 2, 2, 1, 1, 1], False),  # one segment in two runs
    ],
)
def test_rows_that_runs_cannot_describe_are_found(ids, whole):
    assert segment_runs(jnp.asarray([ids], jnp.int32), 3)[2].tolist() == [whole]


# --- the result, with a stand-in for the kernel ---


def stand_in(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type, qkv_layout):
    """Attention inside the ranges that offsets and lengths say, and garbage outside."""
    assert (mask_type.name, qkv_layout) == ("PADDING_CAUSAL", "BTNH")
    assert {a.dtype for a in (q_seqlen, kv_seqlen, q_offsets, kv_offsets)} == {jnp.dtype("int32")}
    np.testing.assert_array_equal(kv_offsets, q_offsets)
    np.testing.assert_array_equal(kv_seqlen, q_seqlen)
    out = np.full(q.shape, 777.0)
    for b in range(q.shape[0]):
        for start, length in zip(q_offsets[b], q_seqlen[b], strict=False):
            here = slice(int(start), int(start) + int(length))
            if start < 0:
                continue
            for head in range(q.shape[2]):
                kv_head = head // (q.shape[2] // k.shape[2])
                score = scale * np.float64(q[b, here, head]) @ np.float64(k[b, here, kv_head]).T
                score = np.where(np.tri(len(score), dtype=bool), score, -np.inf)
                weight = np.exp(score - score.max(-1, keepdims=True))
                weight /= weight.sum(-1, keepdims=True)
                out[b, here, head] = weight @ np.float64(v[b, here, kv_head])
    return jnp.asarray(out, q.dtype)


@pytest.fixture
def gpu_with_stand_in(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", stand_in)
    monkeypatch.setattr(attention_cudnn, "target_platform", lambda: "gpu")


def test_the_kernel_is_told_the_packing(gpu_with_stand_in, relative_error):
    q, k, v = arrays()
    actual = run_cudnn(q, k, v)
    assert actual.dtype == jnp.bfloat16
    exact = [a.astype(jnp.float32) for a in (q, k, v)]
    expected = attend(*exact, Segments.of_row(jnp.asarray(ROWS)))
    assert relative_error(actual, expected) < 2**-8  # the result is rounded once


def test_rows_that_cannot_be_told_become_nan(gpu_with_stand_in):
    rows = [
        ROWS[0],
        row((1, 50), (2, 50), (3, 50), (4, 50)),  # five runs with the padding
        row((1, 50), (2, 50), (1, 100)),
        ROWS[1],
    ]
    out = np.asarray(run_cudnn(*arrays(batch=4), np.stack(rows)), np.float32)
    assert np.isnan(out).all((1, 2, 3)).tolist() == [False, True, True, False]
    assert np.isfinite(out[[0, 3]]).all()
    segments = Segments(jnp.asarray(ROWS), jnp.asarray(ROWS).at[0, 3].set(9), jnp.int32(0))
    out = np.asarray(attend(*arrays(), segments, "cudnn"), np.float32)
    assert np.isnan(out).all((1, 2, 3)).tolist() == [True, False]


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": jnp.float32}, "needs bfloat16 or float16, not float32"),
        ({"head_dim": 12}, "a head_dim that is a multiple of 8 up to 256, not 12"),
        ({"head_dim": 264}, "a head_dim that is a multiple of 8 up to 256, not 264"),
        ({}, "runs on NVIDIA GPUs, not on cpu"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=f"attention implementation 'cudnn' .*{message}"):
        jax.eval_shape(run_cudnn, *arrays(**options))


def test_refuses_a_jax_without_packed_rows(monkeypatch):
    def without_offsets(query, key, value, q_seqlen=None, kv_seqlen=None, *, scale, mask_type):
        raise AssertionError("never called")

    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", without_offsets)
    with pytest.raises(ValueError, match=r"takes no segments: \['kv_offsets', 'q_offsets'\]"):
        jax.eval_shape(run_cudnn, *arrays())


def test_refuses_where_cudnn_does(monkeypatch):
    """jax's own refusals, of old GPUs for one, come out as a ValueError too."""

    def old(*args, **options):
        raise NotImplementedError("Packed layout requires a GPU with at least Hopper architecture.")

    monkeypatch.setattr(attention_cudnn, "target_platform", lambda: "gpu")
    monkeypatch.setattr(
        fused_attention_stablehlo,
        "dot_product_attention",
        functools.wraps(fused_attention_stablehlo.dot_product_attention)(old),
    )
    with pytest.raises(ValueError, match="does not run here: Packed layout requires"):
        jax.eval_shape(run_cudnn, *arrays())


def test_refuses_a_cut_length(monkeypatch, devices):
    monkeypatch.setattr(attention_cudnn, "target_platform", lambda: "gpu")
    mesh = make_mesh({"fsdp": 2, "context": 4}, devices)
    with jax.set_mesh(mesh), rules(), pytest.raises(ValueError, match=r"over mesh axes \['cont"):
        jax.eval_shape(run_cudnn, *arrays())


# --- lowered for a GPU ---


@pytest.mark.parametrize(
    ("axes", "num_devices", "rows", "heads"),
    [({"fsdp": 1}, 1, 2, 4), ({"fsdp": 2, "tensor": 2}, 4, 1, 2)],
    ids=str,
)
def test_lowered_calls(axes, num_devices, rows, heads, monkeypatch, devices):
    """One call of cuDNN forward and one backward, packed, each on a device's rows and heads."""
    monkeypatch.setattr(attention_cudnn, "target_platform", lambda: "gpu")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    # It asks the GPU of this machine for its generation.
    monkeypatch.setattr(fused_attention_stablehlo, "check_is_flash_attention", lambda *a, **k: None)
    q, k, v = arrays()
    mesh = make_mesh(axes, devices[:num_devices])
    gradients = jax.grad(lambda *a: run_cudnn(*a).astype(jnp.float32).sum(), (0, 1, 2))
    with jax.set_mesh(mesh), rules():
        text = jax.jit(gradients).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    text = text.replace("\\22", '"')
    assert sorted(re.findall(r"@__cudnn\$(\w+)", text)) == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    assert re.findall(r'"mask_type": "(\w+)"', text) == ["PADDING_CAUSAL"] * 2
    assert re.findall(r'"max_seg_per_batch": (\d+)', text) == ["4"] * 2
    assert re.findall(r'"fmha_scale": ([\d.]+)', text) == ["0.25"] * 2
    shapes = re.findall(r'"element_type": "BF16", "dimensions": \[([^]]*)\]', text)
    assert shapes == [f'"{rows}", "{heads}", "{LENGTH}", "{LENGTH}"'] * 2


# --- on a GPU ---

# In a process of its own: jax's checks of the GPU want it to be the default platform.
_ON_A_GPU = """
import json
import jax, jax.numpy as jnp, numpy as np
from nextstep_jax.models.attention import Segments, attend
if tuple(map(int, jax.devices()[0].compute_capability.split("."))) < (9, 0):
    print(json.dumps(None)); raise SystemExit
rng = np.random.default_rng([6])
shapes = [(2, 1024, heads, 128) for heads in (8, 2, 2, 8)]
q, k, v, weights = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in shapes)
ids = np.sort(rng.integers(1, 6, (2, 1024)), axis=1)
ids[:, 900:] = 0
ids[1, :100] = 0
segments = Segments.of_row(jnp.asarray(ids, jnp.int32))

def run(name, *arrays):
    def loss(q, k, v):
        out = attend(q, k, v, segments, name).astype(jnp.float32)
        return jnp.sum(out * weights.astype(jnp.float32)), out
    gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)
    return [np.asarray(a, np.float64) for a in (out, *gradients)]

with jax.default_matmul_precision("highest"):
    exact = run("xla", *(a.astype(jnp.float32) for a in (q, k, v)))
errors = [float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))
          for a, b in zip(run("cudnn", q, k, v), exact)]
print(json.dumps(errors))
"""


@pytest.mark.gpu
def test_cudnn_is_xla_on_packed_rows():
    env = {**os.environ, "JAX_PLATFORMS": "cuda", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _ON_A_GPU], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    if errors is None:
        pytest.skip("packed rows need a Hopper GPU or later")
    # The bound of bfloat16 in test_attention_kernels.py; a segment ignored gives 0.1 and more.
    assert max(errors) < 2**-7, errors
