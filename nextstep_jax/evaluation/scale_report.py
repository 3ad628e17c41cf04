"""What a training step or the sampler needs on a machine that is not there.

The function that the trainer runs is compiled for a named topology, optimizer, donation and
shardings included, and the compiler's plan is put beside the arithmetic: memory of a device against
what it has, collectives, model FLOPs. No time in here is measured; times are FLOPs or bytes over a
nominal rate, and say so.

Words: report = plain values, as they go into JSON.
"""

import dataclasses
import functools
import logging
import math
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from nextstep_jax.evaluation import roofline
from nextstep_jax.models import flops
from nextstep_jax.models.config import NextStepConfig
from nextstep_jax.models.nextstep import NextStep, init_params
from nextstep_jax.parallel import compiled as programs
from nextstep_jax.parallel import mesh as meshes
from nextstep_jax.parallel import sharding
from nextstep_jax.parallel.topologies import Topology
from nextstep_jax.sampling.generate import Prompts, SamplerConfig, prefill_jit, sample_chunk
from nextstep_jax.training import experiment, loop

TRAIN_LEVERS = (
    "loop.mesh: more devices on fsdp, or a larger topology",
    "remat=nothing_saveable keeps least of the forward pass",
    "data.rows_per_batch: fewer rows on each device",
    "loop.accumulate: the rows in parts, one after another",
    "loop.mesh: a context axis splits the length of a row, a tensor axis heads and widths",
    "loss.text_chunk: fewer logits at one time",
    "loss.draws_one_by_one=True: the flow head's draws one after another",
    "optimizer.first_moment_dtype=bfloat16",
    "loop.offload_optimizer=True, remat=offload:block_input: to the host's memory",
)
SAMPLE_LEVERS = (
    "--mesh: more devices on tensor, or a larger topology",
    "--batch: fewer images at once",
)


@dataclasses.dataclass(frozen=True)
class SampleSetting:
    """What is sampled.

    Attributes:
        batch: Images at once.
        branches: Guidance branches, 1 to 3.
        num_tokens: Tokens of an image.
        prompt_length: Tokens of a prompt.
        num_steps: Steps of the solver.
    """

    batch: int = 1
    branches: int = 2
    num_tokens: int = 256
    prompt_length: int = 128
    num_steps: int = 28


def train_report(
    config: Any, topology: Topology, mfu: float, compiler_options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Compiles the training step of an experiment.

    Args:
        config: The experiment; its data section gives rows and length, its loop section the mesh.
        topology: What to compile for.
        mfu: Share of the devices' peak that the arithmetic on times supposes.
        compiler_options: Of XLA, by name.

    Raises:
        ValueError: The config is wrong, or its rows do not divide over the mesh.
    """
    objective, loop_config = experiment.build_objective(config)
    model = objective.model
    setup = loop.set_up(objective, loop_config, topology.devices)
    data = experiment.build_data(config)
    rows, length = data.rows_per_batch, data.row_length
    ways = math.prod(setup.mesh.shape[name] for name in sharding.BATCH_AXES)
    ways *= loop_config.accumulate
    if rows % ways:
        raise ValueError(
            f"data.rows_per_batch={rows} does not divide over mesh {dict(setup.mesh.shape)} and"
            f" loop.accumulate={loop_config.accumulate}: it must be a multiple of {ways}"
        )
    report = {
        **_head("train", topology, setup.mesh),
        "parameters": _count(setup.abstract.params),
        "rows": rows,
        "length": length,
        "flops": _train_flops(model, topology, rows, length, objective.num_positions, mfu),
    }
    batch = objective.abstract_batch(setup.mesh, rows, length)
    return report | _compile(
        setup.mesh,
        topology,
        {"step": (lambda: setup.step.lower(setup.abstract, batch))},
        TRAIN_LEVERS,
        compiler_options,
    )


def sample_report(
    config: NextStepConfig,
    topology: Topology,
    axes: dict[str, int],
    setting: SampleSetting,
    compiler_options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Compiles the sampler in bfloat16: the prompts, then all tokens of the images in one scan.

    Args:
        config: The model.
        topology: What to compile for.
        axes: Of the mesh; `tensor` splits heads and widths.
        setting: What is sampled.
        compiler_options: Of XLA, by name.

    Raises:
        ValueError: The images do not divide over the mesh.
    """
    mesh = meshes.make_mesh(axes, topology.devices)
    ways = math.prod(mesh.shape[name] for name in sharding.BATCH_AXES)
    if setting.batch % ways:
        raise ValueError(f"{setting.batch} images do not divide over mesh {dict(mesh.shape)}")
    model = NextStep(config, dtype=jnp.bfloat16, scan_layers=False)
    params = _sampler_params(model, mesh)
    rows = setting.batch * setting.branches
    shape = (rows, setting.prompt_length)
    prompts = Prompts(
        token_ids=jax.ShapeDtypeStruct(shape, jnp.int32),
        latents=jax.ShapeDtypeStruct((*shape, config.token_dim), jnp.float32),
        starts=jax.ShapeDtypeStruct(shape[:1], jnp.int32),
    )
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), setting.batch))
    prompts, keys = (_placed(tree, sharding.batch_sharding(mesh)) for tree in (prompts, keys))
    guidance = _placed(jax.ShapeDtypeStruct((2,), jnp.float32), sharding.replicated(mesh))
    sampler = SamplerConfig(num_steps=setting.num_steps)
    states: list[Any] = []

    def prefill():
        lowered = prefill_jit.lower(model, params, prompts, keys, setting.num_tokens)
        states.append(lowered.out_info)
        return lowered

    def tokens():
        # The state as the first program leaves it.
        state = jax.tree.map(
            lambda leaf, put: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=put),
            states[0],
            states[1],
        )
        return sample_chunk.lower(model, params, state, guidance, sampler, setting.num_tokens)

    report = {
        **_head("sample", topology, mesh),
        "parameters": _count(params),
        "setting": dataclasses.asdict(setting),
        "token": _token_figures(config, topology, setting, ways, mesh.shape["tensor"]),
    }
    programs_of = {"prefill": prefill, "tokens": tokens}
    return report | _compile(
        mesh, topology, programs_of, SAMPLE_LEVERS, compiler_options, kept=states
    )


def _head(what: str, topology: Topology, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    return {
        "what": what,
        "topology": topology.name,
        "device_kind": topology.device_kind,
        "num_devices": len(topology.devices),
        "mesh": dict(mesh.shape),
        "device_memory_bytes": topology.memory_bytes,
        "device_memory_source": topology.memory_source,
        "jax": jax.__version__,
        # Below 0 the compiler takes less time and plans a little otherwise.
        "compiler_effort": jax.config.jax_exec_time_optimization_effort,
    }


def _compile(
    mesh: jax.sharding.Mesh,
    topology: Topology,
    lower: dict[str, Any],
    levers: tuple[str, ...],
    options: dict[str, Any] | None,
    kept: list[Any] | None = None,
) -> dict[str, Any]:
    """Compiles programs in turn; what each needs, or why the first that does not fit does not.

    Args:
        mesh: In scope while tracing.
        topology: For the limit.
        lower: Name -> a function that lowers.
        levers: What to try where it does not fit.
        options: Of XLA.
        kept: Takes the shardings of what the programs return.
    """
    found: dict[str, Any] = {"fits": True, "programs": {}}
    for name, make in lower.items():
        began = time.monotonic()
        with jax.set_mesh(mesh), sharding.rules():
            lowered = make()
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            sizes = programs.out_of_memory(error)
            if sizes is None:
                raise
            return found | _refusal(name, sizes[0], sizes[1] or topology.memory_bytes, levers)
        seconds = time.monotonic() - began
        if kept is not None:
            kept.append(compiled.output_shardings)
        memory = programs.memory_of(compiled)
        found["programs"][name] = {
            "compile_s": seconds,
            "memory": None if memory is None else dataclasses.asdict(memory),
            "collectives": _collectives(compiled),
        }
        limit = topology.memory_bytes
        # Not every compiler refuses by itself.
        if memory is not None and limit is not None and memory.reserved > limit:
            return found | _refusal(name, memory.reserved, limit, levers)
    # Kilobytes on Linux.
    found["host_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found


def _collectives(compiled: Any) -> dict[str, Any] | None:
    """Of a compiled program, or None where jaxlib cannot print what another libtpu compiled."""
    try:
        return dataclasses.asdict(programs.collectives_of(compiled.as_text()))
    except jax.errors.JaxRuntimeError as error:
        logging.warning("no collectives: %s", str(error).splitlines()[0])
        return None


def _refusal(name: str, needed: int | None, there: int | None, levers) -> dict[str, Any]:
    return {
        "fits": False,
        "refused": {
            "program": name,
            "needed_bytes": needed,
            "available_bytes": there,
            "levers": list(levers),
        },
    }


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _train_flops(
    model: NextStep, topology: Topology, rows: int, length: int, positions: int, mfu: float
) -> dict[str, Any]:
    """An upper bound: no padding, and every row one document, all text besides its images.

    Args:
        model: The model.
        topology: For the peak.
        rows: Rows of the batch.
        length: Positions of a row.
        positions: Image tokens that a row may hold.
        mfu: Share of the peak that is supposed.
    """
    sizes = {"rows": rows, "length": length, "image_positions": rows * positions}
    parts = flops.training_flops(model.config, **sizes)
    found: dict[str, Any] = {**dataclasses.asdict(parts), "total": parts.total}
    peak = flops.peak_flops(topology.device_kind, jnp.dtype(model.dtype).name)
    if peak is not None:
        whole = peak * len(topology.devices)
        found |= {
            "peak_of_a_device": peak,
            "step_s_at_peak": parts.total / whole,
            "supposed_mfu": mfu,
            "step_s_at_supposed_mfu": parts.total / whole / mfu,
            "tokens_per_s_at_supposed_mfu": rows * length * whole * mfu / parts.total,
        }
    return found


def _token_figures(
    config: NextStepConfig, topology: Topology, setting: SampleSetting, batch_ways: int, ways: int
) -> dict[str, Any]:
    """Arithmetic for one token of every image, on each of the `ways` that share the heads."""
    context = setting.prompt_length + setting.num_tokens / 2
    rows = setting.batch // batch_ways * setting.branches
    sizes = {"rows": rows, "context": context, "steps": setting.num_steps}
    read = roofline.token_bytes(config, **sizes, itemsize=2).total / ways
    found: dict[str, Any] = {
        "flops": flops.sampling_flops(config, **sizes) / ways,
        "bytes_read": read,
    }
    bandwidth = roofline.known_bandwidth(topology.device_kind)
    if bandwidth is not None:
        found["ms_at_nominal_bandwidth"] = 1e3 * read / (1e9 * bandwidth)
    return found


def _sampler_params(model: NextStep, mesh: jax.sharding.Mesh) -> Any:
    """Abstract bfloat16 parameters on a mesh, without the LM head, which images do not need."""
    boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    boxed = {name: part for name, part in boxed.items() if name != "lm_head"}
    placed = sharding.tree_shardings(boxed, mesh)
    abstract = sharding.abstract_with_shardings(boxed, placed)
    cast = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    return jax.tree.map(lambda leaf: cast(leaf.shape, sharding=leaf.sharding), nn.unbox(abstract))


def _placed(tree: Any, put: jax.sharding.Sharding) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=put), tree
    )


def describe(report: dict[str, Any]) -> str:
    """A report for people."""
    mesh = " ".join(f"{name}:{size}" for name, size in report["mesh"].items() if size > 1)
    lines = [
        f"{report['what']} on {report['topology']}: {report['num_devices']} x"
        f" {report['device_kind']}, mesh {mesh or 'of one device'}",
        f"{report['parameters'] / 1e9:.3f} B parameters",
    ]
    if "rows" in report:
        lines[-1] += f"; {report['rows']} rows of {report['length']}"
    for name, program in report["programs"].items():
        lines += _describe_program(name, program, report)
    if not report["fits"]:
        lines += _describe_refusal(report)
    else:
        lines.append(f"host memory: {report['host_bytes'] / 1e9:.1f} GB")
    if "flops" in report:
        lines += _describe_flops(report["flops"])
    if "token" in report:
        token = report["token"]
        line = (
            f"a token of every image, arithmetic and each device: {token['flops']:.3g} FLOP,"
            f" {token['bytes_read'] / 1e9:.2f} GB read"
        )
        if "ms_at_nominal_bandwidth" in token:
            line += f", {token['ms_at_nominal_bandwidth']:.2f} ms at nominal bandwidth"
        lines.append(line + " (not measured)")
    return "\n".join(lines)


def _describe_program(name: str, program: dict[str, Any], report: dict[str, Any]) -> list[str]:
    lines = [f"{name}: compiled in {program['compile_s']:.0f} s"]
    if program["memory"] is not None:
        sizes = ", ".join(f"{key} {size / 1e9:.2f}" for key, size in program["memory"].items())
        limit = report["device_memory_bytes"]
        of = "" if limit is None else f" of {limit / 1e9:.1f} ({report['device_memory_source']})"
        lines.append(f"  GB on each device: {sizes}{of}")
    sent = program["collectives"] or {"counts": {}, "unknown_loops": 0}
    for kind, count in sent["counts"].items():
        lines.append(f"  {count} {kind}, {sent['bytes'][kind] / 1e9:.2f} GB on each device")
    if sent["unknown_loops"]:
        lines.append(f"  {sent['unknown_loops']} loops of unknown length counted once")
    return lines


def _describe_refusal(report: dict[str, Any]) -> list[str]:
    refused = report["refused"]

    def size(key):
        value = refused[key]
        return "an unknown size" if value is None else f"{value / 2**30:.2f} GiB"

    return [
        f"{refused['program']} does not fit: {size('needed_bytes')} needed on each device,"
        f" {size('available_bytes')} available. Try",
        *(f"  {lever}" for lever in refused["levers"]),
    ]


def _describe_flops(found: dict[str, Any]) -> list[str]:
    parts = ("decoder", "attention", "lm_head", "flow_head", "projectors")
    shares = ", ".join(f"{name} {found[name] / found['total']:.1%}" for name in parts)
    lines = [
        f"model FLOPs of a step: at most {found['total']:.4g} ({shares}), for rows of one document"
        " each, with a loss on all positions as text and on as many image tokens as a row may hold"
    ]
    if "step_s_at_peak" in found:
        lines.append(
            f"arithmetic, not measured: such a step takes {found['step_s_at_peak']:.3f} s at the"
            f" peak of {found['peak_of_a_device'] / 1e12:.0f} TFLOP/s a device; at a supposed MFU"
            f" of {found['supposed_mfu']:.0%} {found['step_s_at_supposed_mfu']:.3f} s,"
            f" {found['tokens_per_s_at_supposed_mfu']:,.0f} tokens/s"
        )
    return lines


def read_options(entries: list[str]) -> dict[str, str]:
    """Name -> value of entries like "xla_tpu_scoped_vmem_limit_kib=98304".

    Raises:
        ValueError: An entry of another form.
    """
    pairs = [entry.split("=", 1) for entry in entries]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"compiler_options={','.join(entries)!r} must be NAME=VALUE,...")
    return dict(pairs)
