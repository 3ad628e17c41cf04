"""The byte model of sampling: what a token has to read, and how fast that can be.

At small batches sampling is bound by memory bandwidth: for every image token the decoder and the
projectors are read once, the flow head's modulations once (they are computed for all steps
together), its MLPs once a step, and the keys and values of the context once a row. Text embedding
and LM head are not read. The counts follow the shapes of NextStep-1 (arXiv 2508.10711, section 2
and Table 6) through the configuration; activations are left out, so that the limit is a floor.

Words: rows = images x guidance branches; steps = evaluations of the flow head for a token.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp

from nextstep_jax.models.config import NextStepConfig

# Nominal memory bandwidth in GB/s by what the device calls itself, the first match counts.
_BANDWIDTHS: tuple[tuple[str, float], ...] = (
    ("h200", 4800.0),
    ("h100 pcie", 2000.0),
    ("h100", 3350.0),
    ("a100-sxm4-40gb", 1555.0),
    ("a100-pcie-40gb", 1555.0),
    ("a100", 2039.0),
    ("tpu v4", 1228.0),
    ("tpu v5 lite", 819.0),
    ("tpu v5e", 819.0),
    ("tpu v5", 2765.0),
    ("tpu v6", 1638.0),
)
_TRIAD_BYTES = 2**28
_TRIAD_REPEATS = 7


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Parameters by how often sampling reads them.

    Attributes:
        decoder: Blocks and final norm; once a token.
        projectors: Image tokens in, condition out; once a token.
        head_per_step: The head's MLPs, norms, input and output; once a step.
        head_per_token: Its modulations and the embedding of the condition; once a token.
        head_per_call: The embedding of the times; once a call.
    """

    decoder: int
    projectors: int
    head_per_step: int
    head_per_token: int
    head_per_call: int


def count_parameters(config: NextStepConfig) -> ParameterCounts:
    """The counts of a configuration, biases and norms included."""
    d, f, token = config.decoder, config.flow_head, config.token_dim
    width, hidden = f.width, int(f.width * f.mlp_ratio)

    def dense(inputs: int, outputs: int, bias: bool = True) -> int:
        return inputs * outputs + bias * outputs

    queries, keys = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    block = (
        dense(d.embed_dim, queries, d.qkv_bias)
        + 2 * dense(d.embed_dim, keys, d.qkv_bias)
        + dense(queries, d.embed_dim, d.out_bias)
        + 2 * dense(d.embed_dim, d.mlp_dim, d.mlp_bias)
        + dense(d.mlp_dim, d.embed_dim, d.mlp_bias)
        + 2 * d.embed_dim
    )
    head_block = 2 * width + dense(width, hidden) + dense(hidden, width)
    return ParameterCounts(
        decoder=d.num_layers * block + d.embed_dim,
        projectors=dense(token, d.embed_dim) + dense(d.embed_dim, d.embed_dim),
        head_per_step=f.num_layers * head_block + dense(token, width) + dense(width, token),
        head_per_token=f.num_layers * dense(width, 3 * width)
        + dense(width, 2 * width)
        + dense(d.embed_dim, width),
        head_per_call=dense(f.frequency_dim, width) + dense(width, width),
    )


@dataclasses.dataclass(frozen=True)
class TokenBytes:
    """Bytes that one token of every image has to read.

    Attributes:
        decoder: Weights of the decoder and the input projector, and keys and values.
        head: Weights of the flow head and the output projector.
    """

    decoder: float
    head: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.decoder + self.head


def token_bytes(
    config: NextStepConfig, *, rows: int, context: float | int, steps: int, itemsize: int
) -> TokenBytes:
    """The byte model.

    Args:
        config: The model.
        rows: Images times branches.
        context: Positions in the cache, on average over the image.
        steps: Evaluations of the flow head for a token.
        itemsize: Bytes of a weight and of a value in the cache.
    """
    counts, d = count_parameters(config), config.decoder
    projector_in = config.token_dim * d.embed_dim + d.embed_dim
    cache = 2 * d.num_layers * d.num_kv_heads * d.head_dim * context * rows
    head = counts.head_per_token + steps * counts.head_per_step
    return TokenBytes(
        decoder=float(itemsize * (counts.decoder + projector_in + cache)),
        head=float(itemsize * (head + counts.projectors - projector_in)),
    )


def known_bandwidth(device_kind: str) -> float | None:
    """Nominal memory bandwidth in GB/s of a device, by `jax.Device.device_kind`."""
    kind = device_kind.lower()
    return next((gbs for name, gbs in _BANDWIDTHS if name in kind), None)


def measured_bandwidth() -> float:
    """GB/s of x <- a x + y on two large arrays: two reads and a write, best of a few."""
    x, y = jnp.ones((2, _TRIAD_BYTES // 4), jnp.float32)
    triad = jax.jit(lambda x, y: 0.5 * x + y, donate_argnums=0)
    x = triad(x, y).block_until_ready()
    seconds = []
    for _ in range(_TRIAD_REPEATS):
        start = time.perf_counter()
        x = triad(x, y).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 3 * _TRIAD_BYTES / min(seconds) / 1e9
