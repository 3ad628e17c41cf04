"""Analytic FLOPs of a training step, and the peaks of devices that MFU is measured against.

Model FLOPs: the multiplications and additions of the matrix products that the mathematics of
NextStep-1 (arXiv 2508.10711, section 2 and Table 6) needs, whatever the program does. A product of
n rows with a weight of P values takes 2 n P; the backward pass takes twice the forward pass, so a
step is 3 x forward (6 P a token). What rematerialisation computes again is not counted, nor are
norms, softmax, rotations and other element-wise work. Attention is counted by the pairs of
positions of which one may see the other, logits and the flow head where a loss is taken.

Frozen parameters are not taken off, although nobody needs their gradients; nor are the gradients
of what the network reads, three matrices of below 0.1%.

The compiler's own count (`cost_analysis`) cannot stand in for this: it counts the body of a loop
once, and the layers, the chunks of the cross-entropy and accumulation are loops.
"""

import dataclasses

from nextstep_jax.models.config import NextStepConfig

_FORWARD_AND_BACKWARD = 3


@dataclasses.dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of one step by part, forward and backward, of all devices together.

    Attributes:
        decoder: Projections and MLPs of the blocks.
        attention: Scores and weighted values of the pairs that see each other.
        lm_head: Logits of the text.
        flow_head: All draws of all image positions; the condition is embedded once a position.
        projectors: Image tokens in, conditions out.
    """

    decoder: float
    attention: float
    lm_head: float
    flow_head: float
    projectors: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))


def decoder_weights(config: NextStepConfig) -> int:
    """Values of the matrices of all blocks: 2 D H d + 2 D K d + 3 D F in each."""
    d = config.decoder
    attention = 2 * d.embed_dim * d.head_dim * (d.num_heads + d.num_kv_heads)
    return d.num_layers * (attention + 3 * d.embed_dim * d.mlp_dim)


def flow_head_weights(config: NextStepConfig) -> int:
    """Values of the flow head's matrices, the condition's embedding included."""
    f = config.flow_head
    block = 2 * f.width * int(f.width * f.mlp_ratio) + 3 * f.width**2
    time = (f.frequency_dim + f.width) * f.width
    ends = 2 * config.token_dim * f.width + 2 * f.width**2
    return f.num_layers * block + time + ends + config.decoder.embed_dim * f.width


def training_flops(
    config: NextStepConfig,
    *,
    rows: int,
    length: int,
    image_positions: int,
    text_positions: int | None = None,
    positions: int | None = None,
    attention_pairs: int | None = None,
    draws: int | None = None,
) -> TrainingFlops:
    """FLOPs of one training step on packed rows.

    What is counted is what the batch needs, however much of it the program pads. All counts are of
    the whole batch, its micro-batches together. The defaults are upper bounds, for use before there
    is a batch: rows full of one document, with a loss on every text position.

    Args:
        config: The model.
        rows: Rows of the batch.
        length: Positions of a row.
        image_positions: Positions that the flow loss is taken at.
        text_positions: Positions that a weighted cross-entropy is taken at; by default all.
        positions: Positions that are not padding; by default all.
        attention_pairs: Pairs of positions of which one sees the other, or itself: n (n + 1) / 2
            for each document of n positions. By default every row is one document.
        draws: Times and noises of an image position; by default the config's `draws_per_token`.

    Returns:
        The FLOPs by part.

    Raises:
        ValueError: Counts that no such batch can have.
    """
    draws = config.flow_head.draws_per_token if draws is None else draws
    for name, value in (("rows", rows), ("length", length), ("draws", draws)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    everywhere, all_pairs = rows * length, rows * length * (length + 1) // 2
    text_positions = everywhere if text_positions is None else text_positions
    positions = everywhere if positions is None else positions
    attention_pairs = all_pairs if attention_pairs is None else attention_pairs
    for name, value, most in (
        ("image_positions", image_positions, everywhere),
        ("text_positions", text_positions, everywhere),
        ("positions", positions, everywhere),
        ("attention_pairs", attention_pairs, all_pairs),
    ):
        if not 0 <= value <= most:
            raise ValueError(
                f"{name}={value} must lie in [0, {most}] for {rows} rows of length={length}"
            )
    d = config.decoder
    projectors = (config.token_dim + d.embed_dim) * d.embed_dim
    condition = d.embed_dim * config.flow_head.width
    head = condition + draws * (flow_head_weights(config) - condition)

    def step(multiplications: int) -> float:
        return float(_FORWARD_AND_BACKWARD * 2 * multiplications)

    return TrainingFlops(
        decoder=step(positions * decoder_weights(config)),
        # Two products of head_dim values a pair and head.
        attention=step(2 * d.num_layers * d.num_heads * d.head_dim * attention_pairs),
        lm_head=step(text_positions * d.embed_dim * d.vocab_size),
        flow_head=step(image_positions * head),
        projectors=step(image_positions * projectors),
    )


def sampling_flops(config: NextStepConfig, *, rows: int, context: float | int, steps: int) -> float:
    """FLOPs of one image token of every image; no logits, and the time's embedding not counted.

    Args:
        config: The model.
        rows: Images times guidance branches.
        context: Positions in the cache, on average over the image.
        steps: Evaluations of the flow head for a token.
    """
    d, f = config.decoder, config.flow_head
    projectors = (config.token_dim + d.embed_dim) * d.embed_dim
    attention = 2 * d.num_layers * d.num_heads * d.head_dim * context
    # The condition is embedded once a token, everything else of the head once a step.
    condition, time = d.embed_dim * f.width, (f.frequency_dim + f.width) * f.width
    head = condition + steps * (flow_head_weights(config) - condition - time)
    return 2.0 * rows * (decoder_weights(config) + attention + projectors + head)


# (part of what a device calls itself in lower case, dtype -> dense peak in TFLOP/s); the first
# match counts. A device is what JAX calls one: a chip, but half a chip of TPU7x. From Google's
# pages of the Cloud TPU versions and NVIDIA's data sheets, without structured sparsity; for TPUs
# no peak of float32 products is published.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    ("tpu v4", {"bfloat16": 275.0}),
    ("tpu v5 lite", {"bfloat16": 197.0}),
    ("tpu v5e", {"bfloat16": 197.0}),
    ("tpu v5", {"bfloat16": 459.0}),
    ("tpu v6", {"bfloat16": 918.0}),
    ("tpu7x", {"bfloat16": 1153.5}),
    ("tpu v7x", {"bfloat16": 1153.5}),
    ("a100", {"bfloat16": 312.0, "tensorfloat32": 156.0, "float32": 19.5}),
    ("h100 pcie", {"bfloat16": 756.0, "tensorfloat32": 378.0, "float32": 51.0}),
    ("h100", {"bfloat16": 989.0, "tensorfloat32": 494.5, "float32": 67.0}),
    ("h200", {"bfloat16": 989.0, "tensorfloat32": 494.5, "float32": 67.0}),
    ("b200", {"bfloat16": 2250.0, "tensorfloat32": 1125.0, "float32": 75.0}),
)
DTYPES = ("bfloat16", "tensorfloat32", "float32")


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Dense peak of a device in FLOP/s, or None where nobody has published one.

    Args:
        device_kind: `jax.Device.device_kind`.
        dtype: One of `DTYPES`. JAX multiplies float32 on NVIDIA GPUs as "tensorfloat32" unless a
            higher precision is asked for.

    Raises:
        ValueError: Another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose from {list(DTYPES)}")
    kind = device_kind.lower()
    peaks = next((peaks for name, peaks in _PEAKS if name in kind), {})
    return 1e12 * peaks[dtype] if dtype in peaks else None
