"""Every attention kernel beside "xla", which test_attention.py compares with a loop in numpy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from nextstep_jax.models import attention
from nextstep_jax.models.attention import ATTENTION_KERNELS, Segments, attend
from nextstep_jax.models.attention_chunked import chunked_attention
from nextstep_jax.models.decoder import Decoder
from nextstep_jax.parallel.mesh import AXES, make_mesh
from nextstep_jax.parallel.sharding import rules
from nextstep_jax.parallel.topologies import get_topology

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def packed(length, batch=2, dtype=jnp.float32):
    """q, k, v, weights of the results, and segments: padding behind, and in row 1 before too."""
    rng = np.random.default_rng([6, length])
    shapes = [(batch, length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    ids = np.sort(rng.integers(1, 6, (batch, length)), axis=1)
    ids[:, length - length // 7 :] = 0
    ids[1, : length // 5] = 0
    return *arrays, jnp.asarray(ids, jnp.int32)


def forward_and_gradients(run, q, k, v, weights):
    """The result, and the gradients of its weighted sum; all finite, padding included."""

    def loss(q, k, v):
        out = run(q, k, v)
        return jnp.sum(out.astype(jnp.float32) * weights.astype(jnp.float32)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    for array in (out, *gradients):
        assert np.isfinite(np.asarray(array, np.float32)).all()
    return out, *gradients


def by_name(implementation, ids):
    return lambda q, k, v: attend(q, k, v, Segments.of_row(ids), implementation)


def assert_rounds_as_xla_does(run, length):
    """bfloat16 beside float32 of the same values, in root mean squares.

    A rounding is at most 2^-9 of a value. Results, weights and their gradients are rounded, and
    "xla" has 1.9 to 2.3e-3, the others 1.5 to 3.5e-3.
    """
    *arrays, ids = packed(length, dtype=jnp.bfloat16)
    exact = [a.astype(jnp.float32) for a in arrays]
    expected = forward_and_gradients(by_name("xla", ids), *exact)
    actual = forward_and_gradients(run(ids), *arrays)
    for ours, truth in zip(actual, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        error = np.asarray(ours, np.float32) - truth
        assert np.sqrt(np.mean(np.square(error)) / np.mean(np.square(truth))) < 2**-8


def equations(jaxpr, name):
    """Equations of a primitive, those of inner jaxprs included."""
    found = []
    for equation in jaxpr.eqns:
        found += [equation] if equation.primitive.name == name else []
        for value in jax.tree.leaves(tuple(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            found += equations(inner, name) if hasattr(inner, "eqns") else []
    return found


# --- chunked ---


@pytest.mark.parametrize("blocks", [(8, 16), (16, 8), (64, 64)])
def test_chunked_is_xla_on_packed_rows(blocks, relative_error):
    *arrays, ids = packed(37)  # a multiple of no block
    expected = forward_and_gradients(by_name("xla", ids), *arrays)
    actual = forward_and_gradients(
        lambda q, k, v: chunked_attention(q, k, v, ids, ids, 0, *blocks), *arrays
    )
    assert relative_error(actual, expected) < 1e-6


def test_chunked_in_bfloat16():
    def run(ids):
        return lambda q, k, v: chunked_attention(q, k, v, ids, ids, 0, 8, 16)

    assert_rounds_as_xla_does(run, 37)
    assert_rounds_as_xla_does(lambda ids: by_name("xla", ids), 37)


def test_chunked_with_queries_in_the_middle_of_the_keys(relative_error):
    q, k, v, weights, ids = packed(37)
    for offset in (0, 7, 27):
        here = slice(offset, offset + 10)
        segments = Segments(ids[:, here], ids, jnp.int32(offset))

        def chunked(q, k, v, segments=segments):
            return chunked_attention(q, k, v, segments.q, segments.kv, segments.q_offset, 4, 8)

        arrays = (q[:, here], k, v, weights[:, here])
        expected = forward_and_gradients(
            lambda q, k, v, segments=segments: attend(q, k, v, segments), *arrays
        )
        assert relative_error(forward_and_gradients(chunked, *arrays), expected) < 1e-6


def test_chunked_does_not_visit_later_blocks():
    # A weight of 0 times NaN is NaN: finite results mean that the block was never read.
    q, k, v, _, ids = packed(32)
    out = chunked_attention(q, k, v.at[:, 16:].set(jnp.nan), ids, ids, 0, 8, 8)
    assert np.isfinite(out[:, :16]).all()
    assert np.isnan(out[:, 16:]).all()


def test_chunked_survives_scores_that_overflow_an_exponential():
    q, k, v, weights, ids = packed(37)
    arrays = (100 * q, 100 * k, v, weights)  # scores of thousands, hidden ones too
    forward_and_gradients(lambda q, k, v: chunked_attention(q, k, v, ids, ids, 0, 8, 8), *arrays)


def test_query_that_sees_nothing_gets_zeros():
    q, k, v, weights, ids = packed(16)
    run = lambda q, k, v: chunked_attention(q, k, v, ids + 9, ids, 0, 8, 8)  # noqa: E731
    for array in forward_and_gradients(run, q, k, v, weights):
        np.testing.assert_array_equal(array, 0)


def test_memory_of_chunked_is_linear_in_the_length():
    """Temporaries of forward and backward at 1024 and 2048; measured: 1.41 and 3.99 times."""

    def temporaries(run, length):
        heads = (HEADS, KV_HEADS, KV_HEADS)
        arrays = [jax.ShapeDtypeStruct((1, length, n, HEAD_DIM), jnp.float32) for n in heads]
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(q, k, v, ids):
            return run(q, k, v, ids).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def chunked(q, k, v, ids):
        return chunked_attention(q, k, v, ids, ids, 0, 128, 128)

    def xla(q, k, v, ids):
        return attend(q, k, v, Segments.of_row(ids))

    assert temporaries(chunked, 2048) < 2.05 * temporaries(chunked, 1024)
    assert temporaries(xla, 2048) > 3.8 * temporaries(xla, 1024)
    assert temporaries(xla, 2048) > 50 * temporaries(chunked, 2048)


# --- splash ---


def test_splash_is_xla_on_packed_rows(relative_error):
    *arrays, ids = packed(256)
    expected = forward_and_gradients(by_name("xla", ids), *arrays)
    actual = forward_and_gradients(by_name("splash", ids), *arrays)
    assert relative_error(actual, expected) < 1e-6


def test_splash_in_bfloat16():
    # head_dim 8: 1/sqrt(8) is no power of two, so that the scaled queries are rounded.
    assert_rounds_as_xla_does(lambda ids: by_name("splash", ids), 256)
    assert_rounds_as_xla_does(lambda ids: by_name("xla", ids), 256)


def test_splash_refuses_what_it_cannot_do():
    q, k, v, _, ids = packed(100)
    with pytest.raises(ValueError, match="length that is a multiple of 128 on this mesh, not 100"):
        by_name("splash", ids)(q, k, v)
    gpu = AbstractDevice(device_kind="H100", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("fsdp",), (AxisType.Auto,), abstract_device=gpu)
    with use_abstract_mesh(mesh), pytest.raises(ValueError, match="not on gpu; choose 'cudnn'"):
        jax.eval_shape(by_name("splash", ids), q, k, v)
    tpu = AbstractDevice(device_kind="TPU v5", num_cores=2, platform="tpu")
    mesh = AbstractMesh((1,), ("fsdp",), (AxisType.Auto,), abstract_device=tpu)
    arrays = [jnp.zeros((1, 128, 2, 128), jnp.bfloat16)] * 3
    with (
        use_abstract_mesh(mesh),
        jax.default_matmul_precision("highest"),
        pytest.raises(ValueError, match="jax_default_matmul_precision='highest'"),
    ):
        jax.eval_shape(by_name("splash", jnp.ones((1, 128), jnp.int32)), *arrays)


def splash_gradients(mesh, policy=None):
    """What to lower for a mesh of TPUs: function and abstract arguments."""
    arrays = [
        jax.ShapeDtypeStruct((2, 512, heads, 128), jnp.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    sharding = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "context", "tensor"))
    arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arrays]

    def loss(q, k, v):
        # Made inside: on a mesh of devices that are not there nothing runs.
        ids = jnp.ones((2, 512), jnp.int32)
        run = by_name("splash", ids)
        if policy is not None:
            run = jax.checkpoint(run, policy=policy)
        return run(q, k, v).astype(jnp.float32).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2))), arrays


KERNELS = re.compile(r'kernel_name = "(\w+)"')


FORWARD = "splash_mha_fwd_segmented_residuals"
BACKWARD = ["splash_mha_dkv_segmented_no_residuals", "splash_mha_dq_segmented_no_residuals"]


@pytest.mark.parametrize(
    ("policy", "num_forward"),
    [
        (None, 1),
        (jax.checkpoint_policies.nothing_saveable, 2),
        (jax.checkpoint_policies.save_only_these_names("attention"), 1),
    ],
    ids=["no remat", "nothing saved", "attention saved"],
)
def test_splash_is_lowered_for_the_devices_of_the_mesh(policy, num_forward):
    """The first device is a CPU here, and yet nothing may be interpreted."""
    tpu = AbstractDevice(device_kind="TPU v5", num_cores=2, platform="tpu")
    types = (AxisType.Auto,) * len(AXES)
    mesh = AbstractMesh((1, 2, 2, 2), AXES, types, abstract_device=tpu)
    with use_abstract_mesh(mesh), rules(), jax.default_matmul_precision("default"):
        gradients, arrays = splash_gradients(mesh, policy)
        text = gradients.trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    assert sorted(KERNELS.findall(text)) == BACKWARD + [FORWARD] * num_forward


@pytest.mark.libtpu
def test_splash_compiles_for_a_tpu():
    devices = get_topology("v5p:2x2x1").devices
    mesh = make_mesh({"fsdp": 1, "context": 2, "tensor": 2}, devices)
    with jax.set_mesh(mesh), rules(), jax.default_matmul_precision("default"):
        gradients, arrays = splash_gradients(mesh)
        lowered = gradients.lower(*arrays)
        assert len(KERNELS.findall(lowered.as_text())) == 3
        # Less than one array of queries times keys: 2 rows, 2 heads and 256 queries a device.
        assert lowered.compile().memory_analysis().temp_size_in_bytes < 2 * 2 * 256 * 512 * 4 * 4


# --- on a mesh ---


@pytest.mark.parametrize("implementation", ["chunked", "splash"])
@pytest.mark.parametrize(
    ("axes", "part"),
    [
        ({"fsdp": 2, "context": 2, "tensor": 2}, (1, 256, 2, HEAD_DIM)),
        ({"data": 2, "context": 4}, (1, 128, 4, HEAD_DIM)),
    ],
    ids=str,
)
def test_eight_devices_give_what_one_gives(axes, part, implementation, devices, relative_error):
    *arrays, ids = packed(512)
    expected = forward_and_gradients(by_name("xla", ids), *arrays)
    mesh = make_mesh(axes, devices)
    spec = jax.P(("data", "fsdp"), "context", "tensor")
    arrays = [jax.device_put(a, jax.NamedSharding(mesh, spec)) for a in arrays]
    with jax.set_mesh(mesh), rules():
        actual = forward_and_gradients(by_name(implementation, ids), *arrays)
    assert relative_error(actual, expected) < 1e-6
    out = actual[0]
    assert out.sharding.shard_shape(out.shape) == part


def test_a_mesh_that_does_not_divide_the_row(devices, relative_error):
    *arrays, ids = packed(130, batch=3)
    expected = forward_and_gradients(by_name("xla", ids), *arrays)
    with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": 4}, devices)), rules():
        actual = forward_and_gradients(by_name("chunked", ids), *arrays)
        assert relative_error(actual, expected) < 1e-6
        message = r"batch=3 .* 2 parts of mesh axes \['data', 'fsdp'\]; kv_heads=2 .* 4 parts"
        with pytest.raises(ValueError, match=message):
            by_name("splash", ids)(*arrays[:3])
    with (
        jax.set_mesh(make_mesh({"fsdp": 8}, devices)),
        pytest.raises(ValueError, match="'splash' on a mesh of 8 devices needs sharding rules"),
    ):
        by_name("splash", ids)(*arrays[:3])


# --- attend, and in the decoder ---


@pytest.mark.parametrize("implementation", sorted(ATTENTION_KERNELS))
def test_cached_decoding_is_xla_under_every_name(implementation):
    q, k, v, _, ids = packed(12)
    segments = Segments(ids[:, 4:6], ids, jnp.int32(4))
    actual, expected = (attend(q[:, 4:6], k, v, segments, i) for i in (implementation, "xla"))
    np.testing.assert_array_equal(actual, expected)


def test_long_prompt_into_a_cache_is_chunked(monkeypatch, relative_error):
    q, k, v, _, ids = packed(12)
    segments = Segments(ids[:, 2:9], ids, jnp.int32(2))

    def run(q, k, v):
        return attend(q[:, 2:9], k, v, segments, "chunked")

    assert not equations(jax.make_jaxpr(run)(q, k, v).jaxpr, "while")
    expected = run(q, k, v)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 6)
    assert len(equations(jax.make_jaxpr(lambda *a: run(*a))(q, k, v).jaxpr, "while")) == 1
    assert relative_error(run(q, k, v), expected) < 1e-6


def test_saving_attention_by_name_saves_the_forward_loop():
    """As the lowered kernels of splash show above."""
    q, k, v, _, ids = packed(128)

    def num_loops(policy):
        run = jax.checkpoint(by_name("chunked", ids), policy=policy)
        gradients = jax.grad(lambda *a: jnp.sin(run(*a)).sum(), (0, 1, 2))
        return len(equations(jax.make_jaxpr(gradients)(q, k, v).jaxpr, "while"))

    assert num_loops(jax.checkpoint_policies.save_only_these_names("attention")) == 2
    assert num_loops(jax.checkpoint_policies.nothing_saveable) == 3


def test_decoder_with_another_kernel(tiny_decoder_config, decoders, relative_error):
    """Scanned, with everything recomputed in the backward pass."""
    d = decoders(tiny_decoder_config)
    ids = packed(128)[-1]
    rng = np.random.default_rng([6])
    x = jnp.asarray(rng.standard_normal((2, 128, d.config.embed_dim)), jnp.float32)
    positions = jnp.tile(jnp.arange(128), (2, 1))

    def gradients(implementation):
        module = Decoder(d.config, implementation=implementation, remat="nothing_saveable")

        def loss(params):
            out, _ = module.apply({"params": params}, x, positions, Segments.of_row(ids))
            return jnp.mean(jnp.square(out) * x), out

        return jax.jit(jax.grad(loss, has_aux=True))(d.stacked_params)

    expected = gradients("xla")
    assert relative_error(gradients("chunked"), expected) < 1e-5
    assert relative_error(gradients("splash"), expected) < 1e-5
