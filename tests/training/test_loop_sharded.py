"""The step of the unified model on meshes of eight devices, against one device."""

import dataclasses
import functools
import logging
import re
import types

import jax
import numpy as np
import pytest

from nextstep_jax.parallel import sharding
from nextstep_jax.parallel.mesh import make_mesh
from nextstep_jax.training import loop
from nextstep_jax.training.checkpoint import Checkpoint, CheckpointStore, Clock
from nextstep_jax.training.state import init_state, make_train_step

DATA, FSDP, ALL = {"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}
# Every step is a compilation of some ten seconds.
MESHES = [DATA, FSDP, ALL, pytest.param({"fsdp": 2, "tensor": 4}, marks=pytest.mark.slow)]
# For the numbers alone.
MORE_MESHES = [
    {"data": 2, "fsdp": 4},
    {"fsdp": 4, "tensor": 2},
    {"fsdp": 2, "context": 4},
    {"data": 2, "context": 2, "tensor": 2},
]


# Half the time to compile, and nobody runs these programs for long.
COMPILER = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def start(make_task, fill):
    """(mesh axes) -> set-up, compiled step and two batches; made once each.

    Parameters and latents are filled in: compiling `init` and the encoder for every mesh would
    take longer than the step.
    """

    @functools.cache
    def make(mesh):
        # With the published eps of 1e-8, Adam's first step makes a whole step of a gradient that is
        # nothing but rounding: one element in thousands is.
        optimizer = {"ema_decay": 0.0, "eps": 1e-6}
        task, config = make_task(loop={"mesh": dict(mesh)}, optimizer=optimizer)
        num_devices = int(np.prod([size for _, size in mesh]))
        setup = loop.set_up(task, config, jax.devices("cpu")[:num_devices])
        iterator = iter(task.dataset(0, 1))
        batches = [with_latents(next(iterator)) for _ in range(2)]
        iterator.close()
        params = fill(setup.abstract.params)

        def fresh():
            state = init_state(params, config.optimizer, jax.random.key(4))
            return jax.device_put(state, setup.shardings)

        with jax.set_mesh(setup.mesh):
            place = functools.partial(loop.to_device, setup.mesh, has_length=True)
            on_device = [place(batch) for batch in batches]
            lowered = setup.step.lower(setup.abstract, on_device[0])
        return types.SimpleNamespace(
            task=task,
            setup=setup,
            fresh=fresh,
            local=batches,
            batches=on_device,
            lowered=lowered.as_text(),
            compiled=lowered.compile(compiler_options=COMPILER),
        )

    return lambda axes: make(tuple(axes.items()))


def with_latents(batch):
    """Random tokens in the places of the images, which are dropped."""
    shape = batch["token_ids"].shape
    tokens = np.random.default_rng(0).standard_normal((*shape, 64))
    is_image = np.zeros(shape, bool)
    for slots in batch["image_slots"].values():
        is_image.reshape(-1)[slots] = True
    rest = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    return {**rest, "latents": np.float32(np.where(is_image[..., None], tokens, 0))}


@pytest.fixture(scope="module")
def single(start):
    """One device: what two steps give."""
    run = start({"data": 1})
    return types.SimpleNamespace(run=run, steps=two_steps(run))


def two_steps(run):
    """[(state without key, metrics)], on the host."""
    state, results = run.fresh(), []
    for batch in run.batches:
        state, metrics = run.compiled(state, batch)
        results.append(jax.device_get((state.replace(key=None), metrics)))
    return results


@pytest.mark.parametrize("axes", [*MESHES, *MORE_MESHES], ids=str)
def test_sharded_is_single_device(start, single, axes, relative_error):
    """Loss, gradients (the first moment) and the updated state."""
    run = start(axes)
    assert run.setup.mesh.size == 8
    for (state, metrics), (expected, expected_metrics) in zip(
        two_steps(run), single.steps, strict=True
    ):
        for name in ("loss", "text_loss", "image_loss", "grad_norm", "param_norm"):
            assert float(metrics[name]) == pytest.approx(float(expected_metrics[name]), rel=1e-5)
        assert relative_error(moments(state), moments(expected)) < 1e-5
        assert relative_error(state.params, expected.params) < 1e-5


def moments(state):
    """(first moment): after one step a tenth of the clipped gradient."""
    (adam,) = (s for s in state.opt_state if hasattr(s, "mu"))
    return adam.mu


def test_gradients_are_not_all_zero(single):
    """What the comparison above rests on: every leaf has a gradient."""
    sizes = [float(np.abs(leaf).max()) for leaf in jax.tree.leaves(moments(single.steps[0][0]))]
    assert min(sizes) > 0


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_every_leaf_keeps_its_declared_sharding(start, axes):
    run = start(axes)
    state, metrics = run.compiled(run.fresh(), run.batches[0])

    def check(leaf, declared):
        assert leaf.sharding.is_equivalent_to(declared, leaf.ndim)

    jax.tree.map(check, state, run.setup.shardings)
    jax.tree.map(lambda leaf: check(leaf, sharding.replicated(run.setup.mesh)), metrics)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    on_one = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.params))
    ways = axes.get("fsdp", 1) * axes.get("tensor", 1)
    # Biases, gains and the few kernels with one axis on the mesh are not split all ways.
    assert weights / on_one > 0.6 * ways
    jax.tree.map(lambda leaf, like: check(leaf, like.sharding), moments(state), state.params)


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_batches_are_split(start, axes):
    run = start(axes)
    rows = 8 // (axes.get("data", 1) * axes.get("fsdp", 1))
    for name in ("token_ids", "latents"):
        shapes = {s.data.shape[0] for s in run.batches[0][name].addressable_shards}
        assert shapes == {rows}, name


def test_rows_and_their_length_are_split(devices):
    """Each device has its own part of both, in the order of the mesh."""
    mesh = make_mesh({"fsdp": 2, "context": 4}, devices)
    ids = np.arange(4 * 12).reshape(4, 12)
    whole = loop.to_device(mesh, {"ids": ids}, has_length=True)["ids"]
    for place, device in np.ndenumerate(mesh.devices[0, :, :, 0]):
        (shard,) = (s for s in whole.addressable_shards if s.device == device)
        rows, columns = slice(2 * place[0], 2 * place[0] + 2), slice(3 * place[1], 3 * place[1] + 3)
        np.testing.assert_array_equal(shard.data, ids[rows, columns])
    with pytest.raises(ValueError, match=r"rows of length 12 .* 'context' of 8"):
        loop.to_device(make_mesh({"context": 8}, devices), {"ids": ids}, has_length=True)


def num_constraints(text):
    """Of activations; jax itself puts one on a key that a step returns."""
    lines = [line for line in text.splitlines() if "sharding_constraint" in line]
    return sum('"data", "fsdp"' in line for line in lines)


def test_constraints_reach_the_compiler(start, single):
    """Counted in the lowered text; without the rules there is none."""
    run = start(ALL)
    # Forward six around the decoder (block in and out, heads, mlp, last hidden, what the flow head
    # is told) and nine in the flow head; backward all but those of times and noise; and those of
    # a chunk of the logits, forward, again and backward.
    assert num_constraints(run.lowered) == 6 + 9 + 13 + 3
    task, config = run.task, loop.LoopConfig()
    step = jax.jit(make_train_step(task.loss, config.optimizer))
    state = run.setup.abstract
    with jax.set_mesh(run.setup.mesh):
        without = step.lower(state, run.batches[0]).as_text()
    assert num_constraints(without) == 0


@pytest.mark.parametrize("axes", [{"data": 1}, *MESHES], ids=str)
def test_the_whole_state_is_donated(start, axes):
    """Its bytes on a device are aliased to the results, and the report says so."""
    run = start(axes)
    needed = loop.bytes_per_device(run.setup.abstract)
    assert loop.donated_bytes(run.compiled) >= needed
    report = loop.memory_report(run.compiled)
    sizes = dict(re.findall(r"(\w+) ([\d.]+) MiB", report))
    assert set(sizes) == {"arguments", "outputs", "donated", "temporaries"}
    assert float(sizes["donated"]) == pytest.approx(needed / 2**20, abs=0.051)
    state = run.fresh()
    run.compiled(state, run.batches[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_a_state_that_is_not_donated_is_noticed(start, caplog):
    run = start({"data": 1})
    kept = jax.jit(lambda state, batch: (state, {}))
    setup = dataclasses.replace(run.setup, step=kept)
    with caplog.at_level(logging.WARNING), jax.set_mesh(setup.mesh):
        loop._compile(setup, run.fresh(), run.batches[0])
    (record,) = caplog.records
    needed = loop.bytes_per_device(run.setup.abstract)
    assert record.getMessage() == f"only 0 of {needed} bytes of the state are donated"


def test_saved_on_one_mesh_continues_on_another(start, single, tmp_path, relative_error):
    """The next loss is that of the run that was not moved."""
    first, second = start(ALL), start(FSDP)
    state, _ = first.compiled(first.fresh(), first.batches[0])
    store = CheckpointStore(tmp_path)
    iterator = iter(first.task.dataset(0, 1))
    next(iterator)
    store.save(1, Checkpoint(state, iterator, Clock(), {}, first.task.fingerprint))
    store.close()
    iterator.close()

    store = CheckpointStore(tmp_path)
    iterator = iter(second.task.dataset(0, 1))
    restored = store.restore(
        Checkpoint(second.setup.abstract, iterator, Clock(), {}, second.task.fingerprint)
    )
    store.close()
    with jax.set_mesh(second.setup.mesh):
        local = with_latents(next(iterator))
        iterator.close()
        batch = loop.to_device(second.setup.mesh, local)
        after, metrics = second.compiled(restored.state, batch)
    jax.tree.map(np.testing.assert_array_equal, local, single.run.local[1])
    expected, expected_metrics = single.steps[1]
    assert float(metrics["loss"]) == pytest.approx(float(expected_metrics["loss"]), rel=1e-5)
    assert relative_error(jax.device_get(after.params), expected.params) < 1e-5


def test_rows_that_do_not_divide_are_refused(start):
    setup = start(FSDP).setup
    local = {"token_ids": np.zeros((6, 4), np.int32)}
    with pytest.raises(ValueError, match=r"batch of 6 rows .*'fsdp': 8.* multiple of .* = 8"):
        loop.to_device(setup.mesh, local)


def test_parts_of_a_batch_add_up_to_it(start, make_task, relative_error):
    """Two parts of four rows on a mesh: loss, metrics and updated state are those of the batch."""
    whole = start({"fsdp": 2, "context": 4})
    changes = {"mesh": {"fsdp": 2, "context": 4}, "accumulate": 2}
    task, config = make_task(loop=changes, optimizer={"ema_decay": 0.0, "eps": 1e-6})
    setup = loop.set_up(task, config, jax.devices("cpu"))
    with jax.set_mesh(setup.mesh):
        lowered = setup.step.lower(setup.abstract, whole.batches[0])
        state, metrics = lowered.compile(compiler_options=COMPILER)(whole.fresh(), whole.batches[0])
    expected, expected_metrics = whole.compiled(whole.fresh(), whole.batches[0])
    assert set(metrics) == set(expected_metrics)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert relative_error(moments(jax.device_get(state)), moments(jax.device_get(expected))) < 1e-5
    # One gradient is held and added to; a second batch of activations is not.
    assert loop.donated_bytes(whole.compiled) >= loop.bytes_per_device(setup.abstract)


def test_an_offloaded_optimizer_changes_nothing(start, make_task, relative_error):
    """Its arrays lie with the host before and after a step; the numbers are the same."""
    whole = start(ALL)
    changes = {"mesh": dict(ALL), "offload_optimizer": True}
    task, config = make_task(loop=changes, optimizer={"ema_decay": 0.0, "eps": 1e-6})
    setup = loop.set_up(task, config, jax.devices("cpu"))
    with jax.set_mesh(setup.mesh):
        compiled = setup.step.lower(setup.abstract, whole.batches[0]).compile(
            compiler_options=COMPILER
        )
        state, _ = compiled(jax.device_put(whole.fresh(), setup.shardings), whole.batches[0])
    expected, _ = whole.compiled(whole.fresh(), whole.batches[0])
    kinds = jax.tree.map(lambda leaf: leaf.sharding.memory_kind, moments(state))
    assert kinds["embed_tokens"] == kinds["decoder"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kinds["embed_tokens"] == "pinned_host"
    assert "pinned_host" not in {x.sharding.memory_kind for x in jax.tree.leaves(state.params)}
    for part in (lambda s: s.params, moments):
        assert relative_error(jax.device_get(part(state)), jax.device_get(part(expected))) < 1e-6


def test_a_frozen_decoder_stays_on_any_mesh(start, make_task, relative_error):
    """Neither moved nor given moments; the rest moves as if the decoder's gradient were dropped."""
    whole = start({"data": 1})
    task, config = make_task(
        loop={"mesh": dict(FSDP)},
        optimizer={"ema_decay": 0.0, "eps": 1e-6, "frozen": ["decoder/*"]},
    )
    setup = loop.set_up(task, config, jax.devices("cpu"))
    params = jax.device_get(whole.fresh().params)
    state = init_state(jax.tree.map(np.array, params), config.optimizer, jax.random.key(4))
    state = jax.device_put(state, setup.shardings)
    batch = loop.to_device(setup.mesh, whole.local[0], has_length=True)
    with jax.set_mesh(setup.mesh):
        compiled = setup.step.lower(setup.abstract, batch).compile(compiler_options=COMPILER)
    after, metrics = compiled(state, batch)
    jax.tree.map(np.testing.assert_array_equal, after.params["decoder"], params["decoder"])
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), after.params["flow_head"], params["flow_head"]
    )
    assert min(jax.tree.leaves(moved)) > 0
    num_kept = sum(leaf.size for leaf in jax.tree.leaves(after.opt_state)) // 2
    num_all = sum(leaf.size for leaf in jax.tree.leaves(params))
    num_frozen = sum(leaf.size for leaf in jax.tree.leaves(params["decoder"]))
    assert num_kept == pytest.approx(num_all - num_frozen, abs=3)
    assert float(metrics["loss"]) == pytest.approx(
        float(whole.compiled(whole.fresh(), whole.batches[0])[1]["loss"]), rel=1e-5
    )


def test_a_batch_that_cannot_be_cut_is_refused(devices):
    mesh = make_mesh({"fsdp": 4}, devices[:4])
    loop._check_parts({"ids": np.zeros((16, 2))}, mesh, 4)
    with pytest.raises(ValueError, match=r"\[8\] rows .* loop.accumulate=4 .* multiple of 16"):
        loop._check_parts({"ids": np.zeros((8, 2))}, mesh, 4)


def test_large_parameters_that_stay_whole_are_reported(make_task, caplog, devices):
    """A width of 36 that eight devices do not divide."""
    model = {"decoder": {"embed_dim": 36, "vocab_size": 512, "num_layers": 2}}
    task, config = make_task(model=model, loop={"mesh": {"fsdp": 8}})
    with caplog.at_level(logging.WARNING):
        setup = loop.set_up(task, config, devices)
    (first,) = [record.getMessage() for record in caplog.records]
    assert re.search(
        r"'fsdp': 8.* does not divide params/decoder/layers/attn/k_proj/kernel "
        r"\(2, 36, 64\); .* and \d+ more: not sharded",
        first,
    )
    table = 4 * 512 * 36
    found = sharding.large_replicated(setup.abstract.params, setup.mesh, table)
    assert [one for one in found if one[1] == table] == [
        ("embed_tokens", table),
        ("lm_head/kernel", table),
    ]
    assert all(size >= table for _, size in found)
    caplog.clear()
    wide = {
        "w": jax.ShapeDtypeStruct((9, 2**20), np.float32, sharding=sharding.replicated(setup.mesh))
    }
    loop._report_replicated(setup.abstract.replace(params=wide), setup.mesh)
    (second,) = [record.getMessage() for record in caplog.records]
    assert second.endswith("every device holds whole: w (36 MiB)")
    # On data alone everything is whole, as it should be.
    alone = make_mesh({"data": 8}, devices)
    assert sharding.large_replicated(setup.abstract.params, alone, 1) == []
