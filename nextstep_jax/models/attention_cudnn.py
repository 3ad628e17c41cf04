"""Causal attention over segments on NVIDIA GPUs: cuDNN's fused attention on packed rows.

The public `jax.nn.dot_product_attention(implementation="cudnn")` has no argument for segments: a
mask would become an array of queries times keys. jax's private function below it takes the start
and the length of each segment, and this module is the one place that calls it (jax PR 25812).

Axes: batch, length, heads, kv_heads, head_dim, runs.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nextstep_jax.models.attention_mesh import layout_in_scope, on_each_device, target_platform

# Ours: rows may hold length / 64 segments, padding included. The kernel's statistics have this
# many copies, so the bound is not simply the length.
TOKENS_PER_SEGMENT = 64
# Before it, jax multiplied the starts of the keys' segments by the number of query heads, so
# that grouped queries read the wrong keys (jax PR 39521).
_GROUPS_MENDED = (0, 12)
_DTYPES = (jnp.bfloat16, jnp.float16)
_MAX_HEAD_DIM = 256


def segment_runs(
    segment_ids: Int[Array, "batch length"], max_runs: int
) -> tuple[Int[Array, "batch starts"], Int[Array, "batch runs"], Bool[Array, " batch"]]:
    """Starts and lengths of the runs of equal ids in each row, and whether they tell all.

    A run of padding (0) is a run like any other, so that every position lies in one.

    Args:
        segment_ids: The segment of each position.
        max_runs: Size of the results' second axis.

    Returns:
        starts: int32 (batch, max_runs + 1), -1 behind the last run.
        lengths: int32 (batch, max_runs), -1 behind the last run.
        whole: bool (batch,), False for a row of more than `max_runs` runs, or with a segment
            other than padding in two runs: runs cannot say that these belong together.
    """
    batch, length = segment_ids.shape
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    is_start = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    run = jnp.cumsum(is_start, axis=1, dtype=jnp.int32) - 1
    rows = jnp.broadcast_to(jnp.arange(batch)[:, None], run.shape)
    # What lies behind the last column is dropped.
    column = jnp.where(is_start, run, length)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), run.shape)
    empty = jnp.full((batch, max_runs), -1, jnp.int32)
    starts = empty.at[rows, column].set(positions, mode="drop")
    ids = jnp.zeros_like(empty).at[rows, column].set(segment_ids, mode="drop")
    lengths = jnp.zeros_like(empty).at[rows, run].add(1, mode="drop")
    lengths = jnp.where(lengths == 0, -1, lengths)
    same = (ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, :, None]
    repeated = jnp.any(same & ~jnp.eye(max_runs, dtype=bool), axis=(1, 2))
    whole = (run[:, -1] < max_runs) & ~repeated
    return jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1), lengths, whole


def cudnn_attention(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    q_segments: Int[Array, "batch length"],
    kv_segments: Int[Array, "batch length"],
) -> Float[Array, "batch length heads head_dim"]:
    """Softmax attention with scale 1/sqrt(head_dim) of rows whose positions are all there.

    A row whose segments the kernel cannot be told (`segment_runs`: too many, or one in several
    runs; or other ids for keys than for queries) becomes NaN, which stops a run, rather than
    attend wrongly. Padding on both sides of a row is two segments here; nothing reads either.

    Raises:
        ValueError: Not a GPU, a dtype other than bfloat16 and float16, a head_dim that is no
            multiple of 8 up to 256, a length over several devices, sizes that the mesh does not
            divide, a jax or cuDNN without packed rows, or a GPU before Hopper.
    """
    attention = _packed_attention()
    if q.dtype not in _DTYPES:
        _refuse(f"needs bfloat16 or float16, not {q.dtype}: set the dtype of the computation")
    if q.shape[-1] % 8 or q.shape[-1] > _MAX_HEAD_DIM:
        _refuse(f"needs a head_dim that is a multiple of 8 up to 256, not {q.shape[-1]}")
    if target_platform() not in ("gpu", "cuda"):
        _refuse(f"runs on NVIDIA GPUs, not on {target_platform()}")
    layout = layout_in_scope("cudnn")
    if layout is None:
        return _run(attention, q, k, v, q_segments, kv_segments)
    if layout.length_ways > 1:
        _refuse(f"cannot cut the length over mesh axes {list(layout.length)}: choose 'chunked'")
    if layout.undivided(q, k):
        _refuse(layout.undivided(q, k))
    run = functools.partial(_run, attention)
    return on_each_device(run, layout, q, k, v, q_segments, kv_segments)


def _refuse(why: str):
    raise ValueError(f"attention implementation 'cudnn' {why}")


def _packed_attention():
    """jax's private function, if it is there and takes the starts of segments."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as cudnn
    except ImportError:
        _refuse(f"is not where jax {jax.__version__} should have it")
    known = inspect.signature(cudnn.dot_product_attention).parameters
    needed = {"q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "mask_type", "scale"}
    if needed - set(known):
        _refuse(f"of jax {jax.__version__} takes no segments: {sorted(needed - set(known))}")
    return functools.partial(
        cudnn.dot_product_attention, mask_type=cudnn.MaskType.PADDING_CAUSAL, qkv_layout="BTNH"
    )


def _run(attention, q, k, v, q_segments, kv_segments, first=0, state=()):
    length, heads = q.shape[1:3]
    # jax takes a single run for a row that is not packed.
    max_runs = max(2, length // TOKENS_PER_SEGMENT)
    starts, lengths, whole = segment_runs(q_segments, max_runs)
    whole &= jnp.all(q_segments == kv_segments, axis=1)
    if jax.__version_info__ < _GROUPS_MENDED:
        k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    try:
        out = attention(
            *(q, k, v),
            q_seqlen=lengths,
            kv_seqlen=lengths,
            q_offsets=starts,
            kv_offsets=starts,
            scale=q.shape[-1] ** -0.5,
        )
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"attention implementation 'cudnn' does not run here: {error}") from error
    return jnp.where(whole[:, None, None, None], out, jnp.nan)
