"""The training loop, shared by every trainer of the project.

A task says what is trained (`Task`); the loop owns the rest, in a fixed order: mesh -> data ->
abstract state -> shardings -> init or restore -> compile and memory report -> steps. Inside a
step: next batch, update, save, hooks; state and iterator are saved when they belong together, so
that a restart continues bit for bit.
"""

import contextlib
import dataclasses
import json
import logging
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from nextstep_jax.parallel import mesh as meshes
from nextstep_jax.parallel import sharding
from nextstep_jax.training.checkpoint import Checkpoint, CheckpointStore, Clock
from nextstep_jax.training.metrics import MetricsWriter, check_wandb
from nextstep_jax.training.optimizer import OptimizerConfig
from nextstep_jax.training.profiling import Profiler
from nextstep_jax.training.reporting import DataWatch, RunReport, Yardstick
from nextstep_jax.training.state import Metrics, TrainState, init_state, make_train_step
from nextstep_jax.training.stopping import StopRequest


@runtime_checkable
class Task(Protocol):
    """What is trained.

    Attributes:
        name: Stands in front of the progress line.
        config: The experiment as plain values, for the checkpoint.
        fingerprint: What the order of the data depends on.
    """

    name: str
    config: dict[str, Any]
    fingerprint: dict[str, Any]

    def init_params(self, key: Key[Array, ""]) -> Any:
        """Initial parameters, boxed with their logical axes."""

    def loss(
        self, params: Any, batch: Any, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """The scalar to minimise and what to log; see `state.LossFn`.

        A task whose batches may be cut into parts also has a `draw`; see `state.DrawFn`.
        """

    def dataset(self, process_index: int, process_count: int) -> Any:
        """A Grain IterDataset of dicts of arrays, the local part of the batch."""

    def place(self, mesh: jax.sharding.Mesh, local: Any) -> Any:
        """The pipeline's arrays -> what `loss` reads, on the mesh; frozen networks go here."""

    def num_samples(self, batch: Mapping[str, Any]) -> int:
        """Samples in a batch of the pipeline, for the clock.

        A task whose batches are rows of tokens also has a `num_tokens`: rows times length; and
        one that knows what a step on a batch needs a `num_flops`. Both are of the global batch.
        """


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long, how often, on what.

    Attributes:
        num_steps: Steps of the run.
        seed: Of parameters and of the draws in the loss.
        optimizer: See `OptimizerConfig`.
        mesh: Axis name -> size; empty puts all devices on fsdp.
        across_slices: Axis name -> ways over the slow network; see `mesh.make_mesh`.
        accumulate: Parts of a batch that go through the devices one after another.
        offload_optimizer: The optimizer's state stays in the memory of the host between updates,
            on platforms that have such memory within reach of a device.
        checkpoint_every: Steps between checkpoints; the last step is always saved.
        keep_checkpoints: How many stay on disk.
        log_every: Steps between lines of metrics.
        hook_every: Steps between calls of the hooks; the last step always calls them. 0 is never.
        profile_from: The first update, counted from 1, of a profiler trace; 0 is none. SIGUSR1
            asks for one at any time.
        profile_steps: Updates in a trace.
        wandb_project: A project at Weights & Biases to which metrics also go; empty is none.
    """

    num_steps: int = 1000
    seed: int = 0
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: tuple[tuple[str, int], ...] = ()
    across_slices: tuple[tuple[str, int], ...] = ()
    accumulate: int = 1
    offload_optimizer: bool = False
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    hook_every: int = 0
    profile_from: int = 0
    profile_steps: int = 3
    wandb_project: str = ""

    def __post_init__(self):
        """Checks the ranges."""
        least = dict.fromkeys(("num_steps", "checkpoint_every", "keep_checkpoints", "log_every"), 1)
        least |= {"accumulate": 1, "profile_steps": 1, "profile_from": 0, "hook_every": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {smallest}")

    def is_logged(self, step: int) -> bool:
        """Whether a line of metrics is written after so many steps."""
        return step % self.log_every == 0 or step in (1, self.num_steps)


# (step, state, writer): sample grids, evaluations; called between steps.
Hook = Callable[[int, TrainState, MetricsWriter], None]


@dataclasses.dataclass
class Setup:
    """A task placed on a mesh: everything but the data.

    Attributes:
        mesh: The devices.
        abstract: The state's shapes, dtypes and shardings.
        shardings: The state's shardings.
        init: () -> state, jitted onto the shardings.
        step: (state, batch) -> (state, metrics), jitted, the state donated.
    """

    mesh: jax.sharding.Mesh
    abstract: TrainState
    shardings: TrainState
    init: Callable[[], TrainState]
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def set_up(task: Any, config: LoopConfig, devices: Sequence | None = None) -> Setup:
    """Mesh, abstract state, shardings and the two jitted functions of a run.

    Args:
        task: A task, or of one only `init_params`, `loss` and, if it has one, `draw`.
        config: How long, how often, on what.
        devices: By default all.
    """
    mesh = meshes.make_mesh(dict(config.mesh) or None, devices, dict(config.across_slices))

    def make_state(key):
        params_key, run_key = jax.random.split(key)
        return init_state(task.init_params(params_key), config.optimizer, run_key)

    with jax.set_mesh(mesh):
        # The key is made inside: devices that are only compiled for cannot make one.
        boxed = jax.eval_shape(lambda: make_state(jax.random.key(config.seed)))
        on_device = sharding.tree_shardings(boxed, mesh)
        shardings = _offloaded(on_device) if config.offload_optimizer else on_device
        abstract = sharding.abstract_with_shardings(boxed, shardings)
    _report_replicated(abstract, mesh)

    update = make_train_step(
        task.loss,
        config.optimizer,
        draw_fn=getattr(task, "draw", None),
        accumulate=config.accumulate,
        placed=lambda grads: jax.lax.with_sharding_constraint(grads, on_device.params),
    )

    def train_step(state, batch):
        if config.offload_optimizer:
            fetched = jax.device_put(state.opt_state, on_device.opt_state)
            state = state.replace(opt_state=fetched)
        with sharding.rules():
            state, metrics = update(state, batch)
        return jax.device_put(state, shardings) if config.offload_optimizer else state, metrics

    # Initialisers are much code for a CPU's compiler and run once: same numbers, less time.
    quick = {"xla_backend_optimization_level": 0}
    options = quick if mesh.devices.flat[0].platform == "cpu" else None
    init = jax.jit(
        lambda key: nn.unbox(make_state(key)), out_shardings=shardings, compiler_options=options
    )
    out_shardings = (shardings, sharding.replicated(mesh))
    step = jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)
    return Setup(mesh, abstract, shardings, lambda: init(jax.random.key(config.seed)), step)


def _offloaded(shardings: TrainState) -> TrainState:
    """The same with the optimizer's arrays in the host's memory; what no axis cuts is small."""

    def move(placed):
        return placed.with_memory_kind("pinned_host") if any(placed.spec) else placed

    return shardings.replace(opt_state=jax.tree.map(move, shardings.opt_state))


def _report_replicated(abstract: TrainState, mesh: jax.sharding.Mesh) -> None:
    """Says which large parameters the rules leave whole on every device."""
    found = sharding.large_replicated(abstract.params, mesh)
    if found:
        listed = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in found)
        logging.warning("on mesh %s every device holds whole: %s", dict(mesh.shape), listed)


def memory_report(compiled: Any) -> str:
    """Bytes a device needs for one step, as the compiler planned it."""
    stats = compiled.memory_analysis()
    if stats is None:
        return "no memory analysis on this platform"
    sizes = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "donated": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
    }
    return ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items())


def run(
    task: Task,
    config: LoopConfig,
    workdir: pathlib.Path,
    hooks: Sequence[Hook] = (),
    on_start: Callable[[], None] = lambda: None,
    initial_params: Callable[[Any], Any] | None = None,
    yardstick: Yardstick | None = None,
) -> TrainState:
    """Trains until `num_steps`, continuing whatever the workdir holds.

    A workdir holds `config.json`, `checkpoints/`, `metrics.jsonl`, `tensorboard/` and, where one
    was asked for, `profile/`. SIGTERM and a first Ctrl-C save and return after the step in flight;
    SIGUSR1 asks for a profiler trace.

    Args:
        task: What is trained.
        config: How long, how often, on what.
        workdir: Made if it is not there.
        hooks: Called between steps, after the save that falls on the same step.
        on_start: Called before the first step, once it is clear that the run may go on in this
            workdir: the place to write what describes it. Every process calls it.
        initial_params: Abstract parameters with their shardings -> the parameters to start from,
            in place of the task's own; not called where the workdir has a checkpoint.
        yardstick: The devices' peak, for the lines of metrics.

    Raises:
        NonFiniteError: Loss, gradient or parameters are NaN or infinite; earlier checkpoints stay
            as they are.
        SaveError: The last checkpoint could not be written; an earlier failure is only logged.
        ValueError: The checkpoint does not continue under this configuration, or the rows of a
            batch do not divide over the mesh.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        args = (hooks, on_start, initial_params, yardstick, stop, stack)
        return _run(task, config, pathlib.Path(workdir), *args)


def _run(
    task, config, workdir, hooks, on_start, initial_params, yardstick, stop, stack
) -> TrainState:
    """`run`; what has to be closed, in whatever way the run ends, goes on the stack."""

    def open_until_end(resource):
        return stack.enter_context(contextlib.closing(resource))

    # ----- Mesh, data, abstract state, shardings -----
    check_wandb(config.wandb_project)
    workdir.mkdir(parents=True, exist_ok=True)
    setup = set_up(task, config)
    # Created late: restoring or reading starts its prefetch threads.
    iterator = open_until_end(iter(task.dataset(jax.process_index(), jax.process_count())))

    # ----- Restore this run, or start -----
    store = open_until_end(CheckpointStore(workdir / "checkpoints", config.keep_checkpoints))
    # With every default of the loop and the optimizer, not only what the experiment set.
    run_config = {**task.config, "loop": dataclasses.asdict(config)}
    checkpoint = Checkpoint(setup.abstract, iterator, Clock(), run_config, task.fingerprint)
    restored = store.restore(checkpoint)
    if restored is not None:
        checkpoint = restored
        logging.info("continuing at step %d", int(checkpoint.state.step))
    else:
        with jax.set_mesh(setup.mesh):
            checkpoint.state = setup.init()
            if initial_params is not None:
                checkpoint.state = start_from(
                    checkpoint.state, initial_params(setup.abstract.params)
                )
    if jax.process_index() == 0:
        (workdir / "config.json").write_text(json.dumps(run_config, indent=2) + "\n")
    on_start()

    # ----- Steps -----
    start = int(checkpoint.state.step)
    args = (start, config.num_steps, task.name, config.wandb_project, run_config)
    writer = open_until_end(MetricsWriter(workdir, *args))
    report = RunReport(config.is_logged, writer, config.num_steps, yardstick)
    args = (workdir / "profile", config.profile_from, config.profile_steps)
    profiler = stack.enter_context(Profiler(*args))
    _steps(task, config, setup, checkpoint, store, writer, report, profiler, hooks, stop)
    return checkpoint.state


def start_from(state: TrainState, params: Any) -> TrainState:
    """A fresh state around given parameters, laid out as the state's own.

    Raises:
        ValueError: Other names or shapes than the state's; lists them.
    """

    def shapes(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}

    given, wanted = shapes(params), shapes(state.params)
    if given != wanted:
        differing = [
            f"{name}: {given.get(name)} instead of {wanted.get(name)}"
            for name in sorted({*given, *wanted})
            if given.get(name) != wanted.get(name)
        ]
        raise ValueError("the parameters to start from do not fit: " + "; ".join(differing))
    params = jax.tree.map(
        lambda new, old: jax.device_put(new.astype(old.dtype), old.sharding), params, state.params
    )
    # A copy: the step gives both away, and may not give one buffer away twice.
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, ema=ema)


def _steps(task, config, setup, checkpoint, store, writer, report, profiler, hooks, stop) -> None:
    """Next, update, save, hooks; `checkpoint` holds the current state throughout."""
    num_tokens = getattr(task, "num_tokens", lambda _: 0)
    num_flops = getattr(task, "num_flops", lambda _: 0.0)
    step_fn = None
    saved = step = int(checkpoint.state.step)
    began, seconds = time.monotonic(), checkpoint.clock.seconds
    watch = DataWatch(checkpoint.dataset)
    while step < config.num_steps and not stop.reached(step):
        if profiler.due(step + 1):
            with report.pause():
                profiler.turn(step + 1)
        local = watch.next()
        with jax.transfer_guard("disallow"):
            batch = task.place(setup.mesh, local)
        # The mesh is in scope for the step alone: frozen networks and hooks have their own.
        with jax.set_mesh(setup.mesh), jax.transfer_guard("disallow"):
            if step_fn is None:
                _check_parts(batch, setup.mesh, config.accumulate)
                step_fn, compiling = _compile(setup, checkpoint.state, batch)
                report.begin(step, checkpoint.clock.samples, **compiling)
            with jax.profiler.StepTraceAnnotation(task.name, step_num=step + 1):
                checkpoint.state, metrics = step_fn(checkpoint.state, batch)
        step += 1
        checkpoint.clock.samples += task.num_samples(local)
        checkpoint.clock.seconds = seconds + time.monotonic() - began
        extra = dataclasses.asdict(checkpoint.clock)
        if config.is_logged(step):
            extra |= watch.report()
            if store.num_failed:
                extra["failed_saves"] = store.num_failed
        report.push(step, metrics, extra, num_tokens(local), num_flops(local))
        # NOTE: save before hooks, which may fail, and before the next batch is taken.
        if step % config.checkpoint_every == 0 or step == config.num_steps:
            report.save(store, step, checkpoint)
            saved = step
        if config.hook_every and (step % config.hook_every == 0 or step == config.num_steps):
            with report.pause():
                for hook in hooks:
                    hook(step, checkpoint.state, writer)
    report.flush()
    if step > saved:
        report.save(store, step, checkpoint)
    store.finish()
    if stop.requested and step < config.num_steps:
        logging.warning("stopped at step %d; a new start continues there", step)


def _compile(setup: Setup, state: TrainState, batch: Any) -> tuple[Any, dict[str, float]]:
    """The compiled step, and what the first line of metrics says of it."""
    began = time.monotonic()
    compiled = setup.step.lower(state, batch).compile()
    seconds = time.monotonic() - began
    logging.info("compiled the step in %.1f s; %s", seconds, memory_report(compiled))
    needed, donated = bytes_per_device(setup.abstract), donated_bytes(compiled)
    if donated is not None and donated < needed:
        # Not an error: the numbers are right, and a platform may be unable to alias.
        logging.warning("only %d of %d bytes of the state are donated", donated, needed)
    facts = {"compile_seconds": seconds}
    if (planned := planned_bytes(compiled)) is not None:
        facts["planned_memory_gib"] = planned / 2**30
    return compiled, facts


def _check_parts(batch: Any, mesh: jax.sharding.Mesh, accumulate: int) -> None:
    """Refuses parts of a batch whose rows do not divide over the mesh."""
    ways = math.prod(mesh.shape[name] for name in sharding.BATCH_AXES)
    rows = {len(leaf) for leaf in jax.tree.leaves(batch)} if accumulate > 1 else set()
    if any(number % (ways * accumulate) for number in rows):
        raise ValueError(
            f"a batch of {sorted(rows)} rows does not divide into loop.accumulate={accumulate}"
            f" parts on mesh {dict(mesh.shape)}: it must be a multiple of {ways * accumulate}"
        )


def bytes_per_device(abstract: Any) -> int:
    """Bytes of an abstract tree with shardings on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract)
    )


def planned_bytes(compiled: Any) -> int | None:
    """Bytes of a device that the compiler plans for a step, or None where nobody knows."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    return held - stats.alias_size_in_bytes


def donated_bytes(compiled: Any) -> int | None:
    """Bytes of the arguments that the results take over, or None where nobody knows."""
    stats = compiled.memory_analysis()
    return None if stats is None else stats.alias_size_in_bytes


def to_device(mesh: jax.sharding.Mesh, local: Any, *, has_length: bool = False) -> Any:
    """Local numpy arrays -> global arrays, the leading axis over the batch axes of the mesh.

    Args:
        mesh: Where they go.
        local: A tree of arrays with this process's rows.
        has_length: The second axis of all of them is the length of a row, for the context axis.

    Raises:
        ValueError: The rows of the global batch, or their length, do not divide over those axes.
    """
    ways = math.prod(mesh.shape[name] for name in sharding.BATCH_AXES)
    num_rows = len(jax.tree.leaves(local)[0]) * jax.process_count()
    if num_rows % ways:
        raise ValueError(
            f"a batch of {num_rows} rows does not divide over mesh {dict(mesh.shape)}: it must be a"
            f" multiple of {' x '.join(sharding.BATCH_AXES)} = {ways}"
        )

    def place(x):
        return sharding.global_rows(mesh, lambda _, part: x[part], x.shape, has_length=has_length)

    return jax.tree.map(place, local)
