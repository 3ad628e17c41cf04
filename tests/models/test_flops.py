import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from nextstep_jax.models.attention import KVCache
from nextstep_jax.models.config import nextstep_config
from nextstep_jax.models.flops import peak_flops, sampling_flops, training_flops
from nextstep_jax.models.nextstep import NextStep, init_params
from nextstep_jax.sampling.generate import SamplerConfig, SamplerState, embed_times, sample_step
from nextstep_jax.training.pretrain import nextstep_losses

ROWS, LENGTH = 2, 128


def wide_config(tie_embeddings=False):
    """Two real layers: wide enough for the element-wise work not to count."""
    config = nextstep_config("1.5b")
    decoder = dataclasses.replace(
        config.decoder, num_layers=2, vocab_size=4096, tie_embeddings=tie_embeddings
    )
    head = dataclasses.replace(config.flow_head, num_layers=2, draws_per_token=3)
    ids = {"bos_id": 0, "eos_id": 0, "pad_id": 1, "image_area_id": 2, "boi_id": 3, "eoi_id": 4}
    ids["image_placeholder_id"] = 5
    return dataclasses.replace(config, decoder=decoder, flow_head=head, **ids)


@functools.cache
def counted_by_xla(image_positions, backward):
    """XLA's FLOPs of the losses, unrolled and in one chunk, so that nothing is a loop."""
    config = wide_config()
    model = NextStep(config, scan_layers=False)
    params = nn.unbox(jax.eval_shape(functools.partial(init_params, model), jax.random.key(0)))

    def loss(params, batch, times, noise):
        return sum(nextstep_losses(model, params, batch, times, noise, LENGTH))

    ints = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    floats = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.float32)
    batch = {
        "token_ids": ints,
        "positions": ints,
        "segment_ids": ints,
        "text_weights": floats,
        "image_weights": floats,
        "latents": jax.ShapeDtypeStruct((ROWS, LENGTH, config.token_dim), jnp.float32),
    }
    shape = (config.flow_head.draws_per_token, ROWS, image_positions)
    times = jax.ShapeDtypeStruct(shape, jnp.float32)
    noise = jax.ShapeDtypeStruct((*shape, config.token_dim), jnp.float32)
    function = jax.value_and_grad(loss) if backward else loss
    return jax.jit(function).lower(params, batch, times, noise).cost_analysis()["flops"]


def ours(image_positions):
    """Of whole rows, with so many image positions in each."""
    sizes = {"rows": ROWS, "length": LENGTH, "image_positions": ROWS * image_positions}
    return training_flops(wide_config(), **sizes)


def unseen(flops):
    """XLA multiplies all n^2 pairs of positions, we count the n (n + 1) / 2 that are seen."""
    return flops.attention * (LENGTH - 1) / (LENGTH + 1)


def test_forward_is_what_xla_counts():
    flops = ours(LENGTH)
    assert counted_by_xla(LENGTH, False) == pytest.approx(
        (flops.total + unseen(flops)) / 3, rel=0.02
    )


def test_forward_and_backward_are_what_xla_counts():
    flops = ours(LENGTH)
    # The logits are computed again in the backward pass; nothing is done for the inputs'
    # gradients: those of latents and of noisy tokens, a matrix of 64 rows each.
    expected = flops.total + unseen(flops) + flops.lm_head / 3
    assert counted_by_xla(LENGTH, True) == pytest.approx(expected, rel=0.02)


def test_image_positions_cost_what_xla_says():
    more = counted_by_xla(LENGTH, True) - counted_by_xla(LENGTH // 4, True)
    assert ours(LENGTH).total - ours(LENGTH // 4).total == pytest.approx(more, rel=0.03)


def test_a_sampled_token_is_what_xla_counts():
    model, context, rows = NextStep(wide_config(), scan_layers=False), 64, 2
    # One evaluation of the head: the solver's steps are a loop.
    config = SamplerConfig(solver="ode", num_steps=1)

    def start(key):
        params = nn.unbox(init_params(model, key))
        cache = KVCache.empty(
            model.config.decoder, rows, context, jnp.zeros(rows, jnp.int32), jnp.float32
        )
        state = SamplerState(
            cache=cache,
            hidden=jnp.zeros((rows, model.config.decoder.embed_dim)),
            tokens=jnp.zeros((1, 8, model.config.token_dim)),
            index=jnp.zeros((), jnp.int32),
            keys=jax.random.split(key, 1),
        )
        return params, state, embed_times(model, params, config)

    args = jax.eval_shape(start, jax.random.key(0))
    step = functools.partial(sample_step, model, guidance=jnp.ones(2), config=config)
    counted = jax.jit(step).lower(*args).cost_analysis()["flops"]
    expected = sampling_flops(model.config, rows=rows, context=context, steps=1)
    assert counted == pytest.approx(expected, rel=0.02)
    # A step more reads the head's MLPs and modulations again: 2 FLOPs a value and row.
    more = sampling_flops(model.config, rows=rows, context=context, steps=2) - expected
    width = model.config.flow_head.width
    per_step = 2 * (2 + 3) * width**2 + 2 * width**2 + 2 * 64 * width
    assert more == 2 * rows * per_step


def test_published_model_by_hand():
    # 48 layers of 5120 x (2 x 40 + 2 x 8) x 128 + 3 x 5120 x 13824, V = 152064, T = 4096.
    layers = 48 * (5120 * 96 * 128 + 3 * 5120 * 13_824)
    assert layers == 13_212_057_600
    # A position sees (T + 1) / 2 on average: two products of 128 values a head.
    per_token = 6 * (layers + 5120 * 152_064) + 6 * 48 * 40 * 128 * 4097
    assert per_token == pytest.approx(9.0e10, rel=0.005)
    flops = training_flops(nextstep_config("14b"), rows=64, length=4096, image_positions=0)
    assert flops.total == per_token * 64 * 4096
    assert flops.flow_head == flops.projectors == 0


def test_flow_head_of_the_published_model():
    sizes = {"rows": 1, "length": 4096, "text_positions": 0}
    flops = training_flops(nextstep_config("14b"), image_positions=1, **sizes)
    assert flops.projectors == 6 * (64 * 5120 + 5120 * 5120)
    assert flops.lm_head == 0
    # 157.2 M parameters, biases and norms apart.
    once = training_flops(nextstep_config("14b"), image_positions=1, draws=1, **sizes)
    assert once.flow_head == pytest.approx(6 * 157_228_096, rel=2e-3)
    # Of four draws the embedding of the condition is shared.
    assert flops.flow_head == 4 * once.flow_head - 3 * 6 * 5120 * 1536


def test_a_batch_costs_what_it_holds():
    """Documents of 5 and 3 positions in a row of 10, one of 4 in the next."""
    config = nextstep_config("tiny")  # 4 layers of 6 heads of 32 values, D = 192
    sizes = {"rows": 2, "length": 10}
    flops = training_flops(
        config,
        positions=12,
        attention_pairs=15 + 6 + 10,
        text_positions=4,
        image_positions=3,
        **sizes,
    )
    assert flops.decoder == 6 * 12 * 4 * (192 * 16 * 32 + 3 * 192 * 512)
    assert flops.attention == 6 * 2 * 31 * 4 * 6 * 32
    assert flops.lm_head == 6 * 4 * 192 * config.decoder.vocab_size
    assert flops.projectors == 6 * 3 * (config.token_dim + 192) * 192
    most = training_flops(config, image_positions=20, **sizes)
    assert most.decoder == flops.decoder * 20 / 12
    assert most.attention == flops.attention * 2 * 55 / 31
    assert most.lm_head == flops.lm_head * 20 / 4
    assert most.flow_head == pytest.approx(flops.flow_head * 20 / 3)


def test_sizes_that_no_row_has():
    sizes = {"rows": 1, "length": 8}
    with pytest.raises(ValueError, match=r"image_positions=9 must lie in \[0, 8\] for 1 rows"):
        training_flops(nextstep_config("tiny"), image_positions=9, **sizes)
    with pytest.raises(ValueError, match="text_positions=-1"):
        training_flops(nextstep_config("tiny"), image_positions=0, text_positions=-1, **sizes)
    with pytest.raises(ValueError, match=r"attention_pairs=37 must lie in \[0, 36\]"):
        training_flops(nextstep_config("tiny"), image_positions=0, attention_pairs=37, **sizes)
    with pytest.raises(ValueError, match="rows=0 must be at least 1"):
        training_flops(nextstep_config("tiny"), rows=0, length=8, image_positions=0)


@pytest.mark.parametrize(
    ("kind", "dtype", "tera"),
    [
        ("TPU v4", "bfloat16", 275.0),
        ("TPU v5 lite", "bfloat16", 197.0),
        ("TPU v5", "bfloat16", 459.0),
        ("TPU v5p", "bfloat16", 459.0),
        ("TPU v6 lite", "bfloat16", 918.0),
        ("TPU7x", "bfloat16", 2307.0 / 2),
        ("NVIDIA A100-SXM4-80GB", "tensorfloat32", 156.0),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.0),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA H200", "float32", 67.0),
        ("NVIDIA B200", "bfloat16", 2250.0),
    ],
)
def test_peaks_by_the_names_devices_have(kind, dtype, tera):
    assert peak_flops(kind, dtype) == tera * 1e12


def test_unknown_peaks():
    assert peak_flops("cpu", "bfloat16") is None
    assert peak_flops("TPU v5p", "float32") is None
    with pytest.raises(ValueError, match="dtype='int8' is unknown; choose from"):
        peak_flops("TPU v5p", "int8")
