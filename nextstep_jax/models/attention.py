"""Causal grouped-query attention over segments, and the value that holds keys and values.

One rule serves training on packed rows, left-padded prompts and cached decoding: query i sees key
j if j is not later than i and both belong to the same segment. Segment 0 is padding; it sees only
padding, so its rows stay finite and nothing else reads them. `attend` is the one function that the
models call; the kernels behind it have a module each.

Axes: batch, T query positions, S key positions, heads, kv_heads, head_dim.
"""

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nextstep_jax.models.attention_chunked import ATTENTION_NAME, QUERY_BLOCK, chunked_attention
from nextstep_jax.models.attention_cudnn import cudnn_attention
from nextstep_jax.models.attention_mesh import layout_in_scope, on_each_device, target_platform
from nextstep_jax.models.attention_splash import splash_attention
from nextstep_jax.models.config import DecoderConfig

# Positions from which the scores of a row are too much to hold; ours.
_LONG = 2048
_TILE = 128

LayerCache = tuple[jax.Array, jax.Array]


@flax.struct.dataclass
class Segments:
    """Who may attend to whom.

    Attributes:
        q: int32 (batch, T), the segment of each query; 0 is padding.
        kv: int32 (batch, S), the segment of each key.
        q_offset: int32 (), the index of the first query among the keys.
    """

    q: Any
    kv: Any
    q_offset: Any

    @classmethod
    def of_row(cls, segment_ids: Int[Array, "batch length"]) -> "Segments":
        """Every position of a packed row is both query and key."""
        return cls(q=segment_ids, kv=segment_ids, q_offset=jnp.zeros((), jnp.int32))


@flax.struct.dataclass
class KVCache:
    """Keys and values of the positions seen so far; passed in, returned, donated.

    One array a layer, not one stacked array: a loop over stacked weights or caches copies the
    slice of every layer at every token on GPUs.

    Attributes:
        k: For each layer (batch, S, kv_heads, head_dim), rotated keys.
        v: For each layer (batch, S, kv_heads, head_dim).
        index: int32 (), how many positions are filled; an array, so that it does not recompile.
        starts: int32 (batch,), the first position of each row that is not left padding.
    """

    k: tuple[Any, ...]
    v: tuple[Any, ...]
    index: Any
    starts: Any

    @classmethod
    def empty(
        cls, config: DecoderConfig, batch: int, length: int, starts: Any, dtype: Any
    ) -> "KVCache":
        """A cache of zeros for `length` positions."""
        shape = (batch, length, config.num_kv_heads, config.head_dim)
        make = functools.partial(jnp.zeros, shape, dtype)
        k = tuple(make() for _ in range(config.num_layers))
        v = tuple(make() for _ in range(config.num_layers))
        return cls(k=k, v=v, index=jnp.zeros((), jnp.int32), starts=starts)

    def positions(self, length: int) -> Int[Array, "batch length"]:
        """Rotary positions of the next `length` tokens: the padding is not counted."""
        index = self.index + jnp.arange(length, dtype=jnp.int32)
        return jnp.maximum(index[None] - self.starts[:, None], 0)

    def segments(self, length: int) -> Segments:
        """The next `length` tokens as queries over the whole cache."""
        slots = jnp.arange(self.k[0].shape[1], dtype=jnp.int32)
        kv = (slots[None] >= self.starts[:, None]).astype(jnp.int32)
        index = self.index + jnp.arange(length, dtype=jnp.int32)
        q = (index[None] >= self.starts[:, None]).astype(jnp.int32)
        return Segments(q=q, kv=kv, q_offset=self.index)


def extend(
    layer: LayerCache,
    k: Float[Array, "batch T kv_heads head_dim"],
    v: Float[Array, "batch T kv_heads head_dim"],
    index: Int[Array, ""],
) -> LayerCache:
    """Writes T new keys and values at `index`; in place when the cache is donated."""
    at = (0, index, 0, 0)
    old_k, old_v = layer
    k = lax.dynamic_update_slice(old_k, k.astype(old_k.dtype), at)
    return k, lax.dynamic_update_slice(old_v, v.astype(old_v.dtype), at)


def attention_mask(segments: Segments) -> Bool[Array, "batch T S"]:
    """True where query i may see key j: j <= i + q_offset, and the same segment.

    With q = kv = [1, 1, 2, 0] and offset 0 the rows are 1000, 1100, 0010, 0001.
    """
    num_q, num_kv = segments.q.shape[-1], segments.kv.shape[-1]
    causal = jnp.arange(num_kv)[None] <= jnp.arange(num_q)[:, None] + segments.q_offset
    return causal[None] & (segments.q[:, :, None] == segments.kv[:, None, :])


def attend(
    q: Float[Array, "batch T heads head_dim"],
    k: Float[Array, "batch S kv_heads head_dim"],
    v: Float[Array, "batch S kv_heads head_dim"],
    segments: Segments,
    implementation: str = "xla",
) -> Float[Array, "batch T heads head_dim"]:
    """Softmax attention with scale 1/sqrt(head_dim); query head h reads kv head h // group.

    The softmax is taken in float32, and every kernel honours the segments. As many queries as
    keys are a whole row, whose `q_offset` can only be 0. Fewer are cached decoding, which is
    "xla" under every name, except that "chunked" serves more queries than one of its blocks (a
    long prompt) itself: a model that was trained with one kernel decodes without being told.

    What a policy needs to keep the backward pass from running attention again is named
    "attention": the result, and for "chunked" and "splash" the softmax's denominator.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        segments: Who may attend to whom.
        implementation: "xla", the reference, which holds scores of T times S; "chunked", the same
            on every platform in memory linear in the length; "splash", for TPUs; "cudnn", for
            GPUs; "auto", which of these suits platform and arrays, see `chosen_kernel`.

    Raises:
        ValueError: An implementation that is not one of `ATTENTION_KERNELS`, or one that cannot
            run on these arrays, this platform or this mesh.
    """
    if implementation == "auto":
        layout = layout_in_scope()
        ways = 1 if layout is None else layout.length_ways
        fits = layout is None or not layout.undivided(q, k)
        args = (q.dtype, q.shape[1], q.shape[3], ways, fits)
        implementation = chosen_kernel(target_platform(), *args)
    if implementation not in ATTENTION_KERNELS:
        raise ValueError(
            f"attention implementation {implementation!r} is unknown;"
            f" choose from {[*ATTENTION_KERNELS, 'auto']}"
        )
    num_q, num_kv = q.shape[1], k.shape[1]
    long_prompt = implementation == "chunked" and num_q > QUERY_BLOCK
    kernel = ATTENTION_KERNELS["xla" if num_q != num_kv and not long_prompt else implementation]
    return kernel(q, k.astype(q.dtype), v.astype(q.dtype), segments)


def chosen_kernel(
    platform: str,
    dtype: DTypeLike,
    length: int,
    head_dim: int,
    length_ways: int = 1,
    mesh_fits: bool = True,
) -> str:
    """What "auto" stands for.

    On TPUs "splash" where heads and each device's part of a row come in whole tiles of 128; on
    GPUs from Hopper on "cudnn" for 16-bit numbers and uncut rows; otherwise, or where the mesh
    does not divide the arrays, "chunked" from `_LONG` positions on, and "xla" below.
    """
    tiles = length % (_TILE * length_ways) == 0 and head_dim % _TILE == 0
    if platform == "tpu" and tiles and mesh_fits:
        return "splash"
    is_gpu = platform in ("gpu", "cuda")
    if (
        is_gpu
        and jnp.dtype(dtype).itemsize == 2
        and length_ways == 1
        and mesh_fits
        and _is_hopper()
    ):
        return "cudnn"
    return "chunked" if length >= _LONG else "xla"


def _is_hopper() -> bool:
    """Whether this machine's GPU is Hopper or later; packed rows need that."""
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return float(capability) >= 9


def _xla(q, k, v, segments):
    mask = attention_mask(segments)[:, None]
    return checkpoint_name(jax.nn.dot_product_attention(q, k, v, mask=mask), ATTENTION_NAME)


def _chunked(q, k, v, segments):
    if q.shape[1] != k.shape[1]:
        return chunked_attention(q, k, v, segments.q, segments.kv, segments.q_offset)
    layout = layout_in_scope()
    # Where the mesh does not divide the row the compiler may cut it as it likes.
    if layout is None or layout.undivided(q, k):
        return chunked_attention(q, k, v, segments.q, segments.kv)
    return on_each_device(_chunked_part, layout, q, k, v, segments.q, segments.kv)


def _chunked_part(q, k, v, q_segments, kv_segments, first, state):
    return chunked_attention(q, k, v, q_segments, kv_segments, first)


def _splash(q, k, v, segments):
    return splash_attention(q, k, v, segments.q, segments.kv)


def _cudnn(q, k, v, segments):
    out = cudnn_attention(q, k, v, segments.q, segments.kv)
    return checkpoint_name(out, ATTENTION_NAME)


ATTENTION_KERNELS = {"xla": _xla, "chunked": _chunked, "splash": _splash, "cudnn": _cudnn}
