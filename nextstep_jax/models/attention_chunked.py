"""Causal attention over segments in pure XLA, with memory linear in the length.

Online softmax over blocks of keys, and a backward pass that computes the scores again, block by
block, from the logarithm of the softmax's denominator (FlashAttention-2, arXiv 2307.08691,
algorithms 1 and 2). It runs on every platform and holds no array of queries times keys.

Axes: i query blocks, j key blocks, batch, kv_heads, group (query heads of one kv head), T queries
and S keys of a block, head_dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

# What a policy that saves by name calls the result of attention and what its backward needs.
ATTENTION_NAME = "attention"
# Ours: 40 heads times 512 x 512 float32 scores are 42 MB, and the products are large enough.
QUERY_BLOCK = 512
KEY_BLOCK = 512
# Below every score, and finite, so that the difference of two of them is 0 and not NaN.
_LOWEST = -1e30
# Segments of the padding up to whole blocks: equal to nothing.
_NO_QUERY, _NO_KEY = -1, -2


def chunked_attention(
    q: Float[Array, "batch T heads head_dim"],
    k: Float[Array, "batch S kv_heads head_dim"],
    v: Float[Array, "batch S kv_heads head_dim"],
    q_segments: Int[Array, "batch T"],
    kv_segments: Int[Array, "batch S"],
    q_offset: Int[Array, ""] | int = 0,
    query_block: int = QUERY_BLOCK,
    key_block: int = KEY_BLOCK,
) -> Float[Array, "batch T heads head_dim"]:
    """Softmax attention with scale 1/sqrt(head_dim); query head h reads kv head h // group.

    Query i sees key j if j <= i + q_offset and their segments are equal; a query that sees no key
    gets zeros. Blocks of keys that are later than every query of a block are not visited. Scores
    and sums are float32; the weights are rounded to the dtype of `v` before they meet it.

    Args:
        q: Queries.
        k: Keys, in the dtype of `q`.
        v: Values, in the dtype of `q`.
        q_segments: The segment of each query.
        kv_segments: The segment of each key.
        q_offset: The index of the first query among the keys.
        query_block: Queries of a block; any length is padded to whole blocks.
        key_block: Keys of a block.
    """
    batch, num_q, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    query_block, key_block = min(query_block, num_q), min(key_block, k.shape[1])
    q = q.reshape(batch, num_q, kv_heads, heads // kv_heads, head_dim)
    out = _attend_blocks(
        jnp.moveaxis(_blocks(q, query_block), 2, 4),
        jnp.moveaxis(_blocks(k, key_block), 2, 3),
        jnp.moveaxis(_blocks(v, key_block), 2, 3),
        _blocks(q_segments, query_block, _NO_QUERY),
        _blocks(kv_segments, key_block, _NO_KEY),
        jnp.asarray(q_offset, jnp.int32),
    )
    # (i, batch, kv_heads, group, T, head_dim) -> (batch, i T, heads, head_dim)
    out = jnp.transpose(out, (1, 0, 4, 2, 3, 5)).reshape(batch, -1, heads, head_dim)
    return out[:, :num_q]


def _blocks(x, size, fill=0):
    """(batch, length, ...) -> (blocks, batch, size, ...), padded with `fill`."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % size)
    x = jnp.pad(x, padding, constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


@jax.custom_vjp
def _attend_blocks(q, k, v, q_segments, kv_segments, q_offset):
    return _forward(q, k, v, q_segments, kv_segments, q_offset)[0]


def _product(subscripts, x, y):
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _scores(q, k, q_segments, kv_segments, first_q, first_k):
    """Scaled scores (batch, kv_heads, group, T, S) of two blocks, and which of them count."""
    scores = _product("bkgth,bksh->bkgts", q, k) * q.shape[-1] ** -0.5
    causal = first_q + jnp.arange(q.shape[-2])[:, None] >= first_k + jnp.arange(k.shape[-2])
    visible = causal & (q_segments[:, :, None] == kv_segments[:, None, :])
    return scores, visible[:, None, None]


def _num_key_blocks(i, q, k, q_offset):
    """How many blocks of keys begin no later than the last query of block i."""
    end = q_offset + (i + 1) * q.shape[-2]
    return jnp.minimum(k.shape[0], (end + k.shape[-2] - 1) // k.shape[-2])


def _forward(q, k, v, q_segments, kv_segments, q_offset):
    """The result and log(sum(exp(scores))) of each query, the latter float32."""
    size, key_size = q.shape[-2], k.shape[-2]

    def one_block(block):
        i, q_i, segments_i = block

        def one_step(j, carry):
            highest, total, out = carry
            scores, visible = _scores(
                q_i, k[j], segments_i, kv_segments[j], q_offset + i * size, j * key_size
            )
            scores = jnp.where(visible, scores, _LOWEST)
            new_highest = jnp.maximum(highest, scores.max(-1))
            # Where nothing is visible yet the exponent is 0 and not -inf: hence the second where.
            weights = jnp.where(visible, jnp.exp(scores - new_highest[..., None]), 0.0)
            keep = jnp.exp(highest - new_highest)
            new_out = _product("bkgts,bksh->bkgth", weights.astype(v.dtype), v[j])
            return new_highest, total * keep + weights.sum(-1), out * keep[..., None] + new_out

        row = jnp.zeros(q_i.shape[:-1], jnp.float32)
        start = (row + _LOWEST, row, jnp.zeros(q_i.shape, jnp.float32))
        highest, total, out = lax.fori_loop(0, _num_key_blocks(i, q, k, q_offset), one_step, start)
        total = jnp.where(total == 0, 1.0, total)
        return (out / total[..., None]).astype(q.dtype), highest + jnp.log(total)

    return lax.map(one_block, (jnp.arange(q.shape[0]), q, q_segments))


def _forward_rule(q, k, v, q_segments, kv_segments, q_offset):
    out, log_total = _forward(q, k, v, q_segments, kv_segments, q_offset)
    name = functools.partial(checkpoint_name, name=ATTENTION_NAME)
    out, log_total = name(out), name(log_total)
    return out, (q, k, v, q_segments, kv_segments, q_offset, out, log_total)


def _backward_rule(residuals, d_out):
    q, k, v, q_segments, kv_segments, q_offset, out, log_total = residuals
    size, key_size = q.shape[-2], k.shape[-2]
    scale = q.shape[-1] ** -0.5
    # sum_s P dP of each query (FlashAttention-2, section 3.1.2).
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def one_block(d_kv, block):
        i, q_i, segments_i, d_out_i, log_total_i, mean_i = block

        def one_step(j, carry):
            d_q, d_k, d_v = carry
            scores, visible = _scores(
                q_i, k[j], segments_i, kv_segments[j], q_offset + i * size, j * key_size
            )
            # A hidden score may be far above the visible ones: its infinity is not taken.
            weights = jnp.where(visible, jnp.exp(scores - log_total_i[..., None]), 0.0)
            d_v_j = _product("bkgts,bkgth->bksh", weights.astype(d_out.dtype), d_out_i)
            d_weights = _product("bkgth,bksh->bkgts", d_out_i, v[j])
            d_scores = (weights * (d_weights - mean_i[..., None]) * scale).astype(q.dtype)
            d_q = d_q + _product("bkgts,bksh->bkgth", d_scores, k[j])
            d_k_j = _product("bkgts,bkgth->bksh", d_scores, q_i)
            return d_q, d_k.at[j].add(d_k_j), d_v.at[j].add(d_v_j)

        start = (jnp.zeros(q_i.shape, jnp.float32), *d_kv)
        num_blocks = _num_key_blocks(i, q, k, q_offset)
        d_q, *d_kv = lax.fori_loop(0, num_blocks, one_step, start)
        return tuple(d_kv), d_q.astype(q.dtype)

    blocks = (jnp.arange(q.shape[0]), q, q_segments, d_out, log_total, mean)
    zeros = jnp.zeros(k.shape, jnp.float32)
    (d_k, d_v), d_q = lax.scan(one_block, (zeros, zeros), blocks)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None, None, None


_attend_blocks.defvjp(_forward_rule, _backward_rule)
