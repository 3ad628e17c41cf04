"""Causal attention over segments on TPUs: jax's splash attention, a Pallas kernel.

The kernel knows causal masks, segment ids and grouped queries, skips the blocks that nothing sees,
and holds no array of queries times keys. On CPUs it runs in Pallas's interpreter: for tests.

Axes: batch, length, heads, kv_heads, head_dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from nextstep_jax.models.attention_chunked import ATTENTION_NAME
from nextstep_jax.models.attention_mesh import layout_in_scope, on_each_device, target_platform

# Sides of a block, the largest that divides a device's queries. Ours; 2048 does not fit the VMEM
# that the compiler gives a kernel on v5p.
BLOCK_SIZES = (1024, 512, 256, 128)
_FLOAT32_PRECISIONS = ("high", "highest", "float32", "tensorfloat32")


def splash_attention(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    q_segments: Int[Array, "batch length"],
    kv_segments: Int[Array, "batch length"],
) -> Float[Array, "batch length heads head_dim"]:
    """Softmax attention with scale 1/sqrt(head_dim) of rows whose positions are all there.

    On a mesh of several devices the queries of a row may lie over several of them, with all keys
    on each. The first part of a row then has less to do than the last.

    Raises:
        ValueError: A platform without the kernel, bfloat16 to be multiplied in float32, a length
            that is not a multiple of 128 on each device, or sizes that the mesh does not divide.
    """
    # The import takes a second, which only users of the kernel shall pay.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    platform = target_platform()
    if platform not in ("tpu", "cpu"):
        raise ValueError(
            f"attention implementation 'splash' runs on tpu (and, interpreted, on cpu), not on"
            f" {platform}; choose 'cudnn' or 'chunked'"
        )
    precision = jax.config.jax_default_matmul_precision
    if platform == "tpu" and q.dtype == jnp.bfloat16 and precision in _FLOAT32_PRECISIONS:
        # Mosaic would fail with "Bad lhs type", and only when compiling.
        raise ValueError(
            f"attention implementation 'splash' multiplies bfloat16 as it is: unset"
            f" jax_default_matmul_precision={precision!r} (JAX_DEFAULT_MATMUL_PRECISION)"
        )
    layout = layout_in_scope("splash")
    if layout is not None and layout.undivided(q, k):
        raise ValueError(f"attention implementation 'splash': {layout.undivided(q, k)}")
    length_ways, heads_ways = (1, 1) if layout is None else (layout.length_ways, layout.heads_ways)
    length, heads = q.shape[1:3]
    sizes = [size for size in BLOCK_SIZES if length // length_ways % size == 0]
    if not sizes:
        raise ValueError(
            f"attention implementation 'splash' needs a length that is a multiple of"
            f" {BLOCK_SIZES[-1] * length_ways} on this mesh, not {length}; pad the rows, or"
            " choose 'chunked'"
        )
    size = sizes[0]
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((length, length)) for _ in range(heads)]),
        block_sizes=splash.BlockSizes(
            **{name: size for name in ("block_q", "block_kv", "block_kv_compute")},
            **{f"{name}_dkv": size for name in ("block_q", "block_kv")},
            **{f"{name}_dq": size for name in ("block_q", "block_kv")},
        ),
        head_shards=heads_ways,
        q_seq_shards=length_ways,
        residual_checkpoint_name=ATTENTION_NAME,
        interpret=platform == "cpu",
    )
    run = functools.partial(_run, splash.SegmentIds)
    if layout is None:
        return run(q, k, v, q_segments, kv_segments, 0, kernel)
    mesh = jax.sharding.get_abstract_mesh()
    blocks = NamedSharding(mesh, PartitionSpec(layout.heads or None, layout.length or None))
    spec = kernel.manual_sharding_spec(blocks)
    return on_each_device(run, layout, q, k, v, q_segments, kv_segments, kernel, spec)


def _run(ids, q, k, v, q_segments, kv_segments, first, kernel):
    """The kernel on heads first and one row at a time; its mask holds the index of the query."""
    # The kernel does not scale. Scaled in float32 and rounded once: the reference scales the
    # float32 scores, from which this differs by half a unit in the last place of each query.
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out = jax.vmap(kernel)(q, k, v, ids(q_segments, kv_segments))
    return jnp.swapaxes(out, 1, 2)
