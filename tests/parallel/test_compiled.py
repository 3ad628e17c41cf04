import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nextstep_jax.parallel.compiled import collectives_of, memory_of, out_of_memory

LAYERS, ROWS, WIDTH = 5, 32, 64
WEIGHT_BYTES = 4 * WIDTH * WIDTH


def compile_stack(devices, weights_over, unroll=1):
    """x <- tanh(x w) over a stack of weights, on eight devices; rows lie over all of them."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,), devices=devices)

    def function(weights, x):
        def body(x, w):
            x = jax.lax.with_sharding_constraint(jnp.tanh(x @ w), NamedSharding(mesh, P("fsdp")))
            return x, None

        return jax.lax.scan(body, x, weights, unroll=unroll)[0]

    shapes = (LAYERS, WIDTH, WIDTH), (ROWS, WIDTH)
    shardings = NamedSharding(mesh, weights_over), NamedSharding(mesh, P("fsdp"))
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        for shape, sharding in zip(shapes, shardings, strict=True)
    ]
    return jax.jit(function, donate_argnums=1, out_shardings=shardings[1]).lower(*args).compile()


def test_gathers_of_a_loop_count_for_each_layer(devices):
    found = collectives_of(compile_stack(devices, P(None, "fsdp")).as_text())
    assert found.counts == {"all-gather": LAYERS}
    # The whole weight of a layer, on each device and in each turn.
    assert found.bytes == {"all-gather": LAYERS * WEIGHT_BYTES}
    assert found.unknown_loops == 0


def test_unrolled_layers_send_the_same(devices):
    found = collectives_of(compile_stack(devices, P(None, "fsdp"), unroll=LAYERS).as_text())
    assert found.bytes == {"all-gather": LAYERS * WEIGHT_BYTES}


def test_nothing_is_sent_with_replicated_weights(devices):
    found = collectives_of(compile_stack(devices, P()).as_text())
    assert found.counts == found.bytes == {}


def test_memory_of_a_device(devices):
    memory = memory_of(compile_stack(devices, P(None, "fsdp")))
    x = 4 * ROWS * WIDTH // 8
    assert memory.arguments == LAYERS * WEIGHT_BYTES // 8 + x
    assert memory.outputs == memory.donated == x
    # A gathered weight has to be somewhere.
    assert memory.temporaries >= WEIGHT_BYTES
    assert memory.arguments < memory.peak <= memory.arguments + memory.outputs + memory.temporaries
    assert memory.reserved == memory.arguments + memory.temporaries + memory.code


# Written by hand in the form that the TPU compiler prints: no trip counts, tilings in the shapes,
# reductions fused with the choice of a part, collectives in two halves.
TPU_TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%all-reduce-scatter.1 (input: bf16[64,8]) -> bf16[16,8] {
  %input = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, to_apply=%add
  %zero = s32[]{:T(128)} constant(0)
  ROOT %part = bf16[16,8]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %zero, %zero)
}

%body (state: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
  %state = (s32[]{:T(128)}, bf16[64,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = bf16[64,8]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %part.2 = bf16[16,8]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %all-gather-start.1 = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) all-gather-start(%part.2), dimensions={0}
  %all-gather-done.1 = bf16[64,8]{1,0} all-gather-done(%all-gather-start.1)
  ROOT %next = (s32[]{:T(128)}, bf16[64,8]{1,0:T(8,128)(2,1)}) tuple(%i, %all-gather-done.1)
}

%condition (state.1: (s32[], bf16[64,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(7)
  %state.1 = (s32[]{:T(128)}, bf16[64,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

%until (state.2: (s32[], bf16[64,8])) -> pred[] {
  %state.2 = (s32[]{:T(128)}, bf16[64,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  ROOT %odd = pred[]{:T(512)} compare(%i.2, %i.2), direction=NE
}

ENTRY %main (a: f32[10], b: s32[3]) -> f32[10] {
  %a = f32[10]{0:T(128)} parameter(0)
  %b = s32[3]{0:T(128)} parameter(1)
  %both = (f32[10]{0:T(128)}, s32[3]{0:T(128)}) all-reduce(%a, %b), to_apply=%add
  %moved = (f32[10]{0}, f32[10]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a)
  %start = (s32[]{:T(128)}, bf16[64,8]{1,0:T(8,128)(2,1)}) tuple(%b, %a)
  %loop = (s32[], bf16[64,8]{1,0}) while(%start), condition=%condition, body=%body
  %again = (s32[], bf16[64,8]{1,0}) while(%loop), condition=%until, body=%body
  ROOT %out = f32[10]{0:T(128)} get-tuple-element(%both), index=0
}
"""


def test_what_the_tpu_compiler_prints():
    found = collectives_of(TPU_TEXT)
    # Seven turns of the first loop, one of the second: nobody knows its end.
    assert found.counts == {
        "all-reduce": 1,
        "collective-permute": 1,
        "reduce-scatter": 8,
        "all-gather": 8,
    }
    assert found.bytes == {
        "all-reduce": 4 * 10 + 4 * 3,
        # What is sent, and two words that the two halves agree by.
        "collective-permute": 4 * 10 + 8,
        "reduce-scatter": 8 * 2 * 64 * 8,
        "all-gather": 8 * 2 * 64 * 8,
    }
    assert found.unknown_loops == 1


def test_text_without_an_entry():
    with pytest.raises(ValueError, match="has no ENTRY computation"):
        collectives_of("HloModule nothing\n")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
            " temporaries (800.00G) exceeds available HBM (31.25G).",
            (800 * 2**30, 31.25 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom:\nXLA:TPU compile permanent error. Ran"
            " out of memory in memory space hbm. Used 35.95G of 31.24G hbm. Exceeded hbm capacity"
            " by 4.71G.",
            (round(35.95 * 2**30), round(31.24 * 2**30)),
        ),
        ("RESOURCE_EXHAUSTED: Out of memory", (None, None)),
        ("INVALID_ARGUMENT: the program is wrong", None),
    ],
)
def test_refusals_for_memory(message, expected):
    assert out_of_memory(jax.errors.JaxRuntimeError(message)) == expected
