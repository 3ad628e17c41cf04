r"""Measures parts of the system, compile time apart and competitors side by side.

flow_head: one image token, from noise to data in Euler steps, with the flow head of NextStep-1
(arXiv 2508.10711, Table 6) in two forms: naive (time, condition and modulations anew at every
step) and amortised (the modulations of all steps by one product a block, then the steps).

sampling: image tokens as the pipeline samples them, with random weights: tokens per second, and
milliseconds per token of decoder, flow head and rest, beside the byte model (what has to be read
at the device's memory bandwidth; the share of that limit that is reached).

import_memory: peak host memory of converting and of loading a random published checkpoint, on one
device and sharded over eight fake ones, beside the bound: twice the largest stacked parameter plus
2 GB.

data: documents, images and tokens per second of the whole data pipeline on one core, for each
format of the source and size of the images, beside decoding and resizing alone; then with threads
on all cores.

train: the training step that the trainer runs, on random packed rows: seconds, tokens per second,
FLOPs and MFU; with --against=torch beside the same step in plain PyTorch, from the same weights
and with the same losses.

checkpoint: a train state of a given size to disk and back, on the same mesh and on another: how
long a save blocks training, bytes per second, and plain .npy files beside it.

Examples:
    python launch/benchmark.py flow_head --head=b --steps=28 --rows=2 --json=flow_head.json
    python launch/benchmark.py sampling --size=14b --steps=28 --tokens=256 --dtype=bfloat16
    python launch/benchmark.py import_memory --gigabytes=6.5
    python launch/benchmark.py data --formats=folder,tars,records --sizes=256,512 --threads=1,2
    python launch/benchmark.py train --size=tiny --rows=4 --length=512 --against=torch
    python launch/benchmark.py train --size=1.5b --length=8192 --rows=1 --dtype=bfloat16 \
        --attention=cudnn --remat=nothing_saveable --against=torch
    python launch/benchmark.py checkpoint --gigabytes=3 --mesh=fsdp:8 --other_mesh=fsdp:4,tensor:2
"""

import argparse
import dataclasses
import json
import pathlib
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from absl.flags import argparse_flags
from flax import linen as nn
from jaxtyping import Array, Float

from nextstep_jax.evaluation import (
    checkpoint_speed,
    data_speed,
    roofline,
    sampling_speed,
    timing,
    torch_train,
    train_speed,
)
from nextstep_jax.evaluation import import_memory as memory
from nextstep_jax.flow.solvers import SOLVERS
from nextstep_jax.models.config import DECODERS, FLOW_HEADS, NextStepConfig, nextstep_config
from nextstep_jax.models.flow_head import FlowHead
from nextstep_jax.models.nextstep import NextStep
from nextstep_jax.parallel.mesh import parse_axes
from nextstep_jax.sampling.generate import SamplerConfig
from nextstep_jax.training.experiment import build_model_config
from nextstep_jax.training.logs import set_up_logging


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A subcommand: its help line, its own flags, and what returns its figures."""

    help: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], dict[str, Any]]


def naive_token(
    head: FlowHead,
    x: Float[Array, "rows token"],
    times: Float[Array, " steps"],
    condition: Float[Array, "rows cond"],
) -> Float[Array, "rows token"]:
    """Euler from noise x; every step calls the head in its plain form."""
    step_size = 1.0 / times.shape[0]

    def step(head, x, time):
        return x + step_size * head(x, jnp.full(x.shape[:1], time), condition), None

    return _scan(step, head, x, times)


def amortised_token(
    head: FlowHead,
    x: Float[Array, "rows token"],
    times: Float[Array, " steps"],
    condition: Float[Array, "rows cond"],
) -> Float[Array, "rows token"]:
    """Euler from noise x; modulations of all steps first. The time embedding is timed too."""
    step_size = 1.0 / times.shape[0]
    y = head.embed_time(times)[:, None] + head.embed_condition(condition)[None]

    def step(head, x, modulations):
        return x + step_size * head.velocity(x, modulations), None

    return _scan(step, head, x, head.modulations(y))


def _scan(step, head, x, inputs):
    loop = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
    return loop(head, x, inputs)[0]


def random_params(head: FlowHead, cond_dim: int) -> dict[str, Any]:
    """Normal weights of deviation 0.02: the published zeros would hide differences."""
    arguments = (jnp.zeros((1, head.token_dim)), jnp.zeros(1), jnp.zeros((1, cond_dim)))
    shapes = nn.unbox(jax.eval_shape(head.init, jax.random.key(0), *arguments))
    leaves, treedef = jax.tree.flatten(shapes)
    return treedef.unflatten([0.02 * _normal(i, *leaf.shape) for i, leaf in enumerate(leaves)])


def _normal(seed: int, *shape: int) -> jax.Array:
    # Drawn by numpy: nothing to compile, which would cost more than the draw.
    return jnp.asarray(np.random.default_rng([seed]).standard_normal(shape, np.float32))


def flow_head(args: argparse.Namespace) -> dict[str, Any]:
    """Naive against amortised sampling of one token with the flow head, in float32.

    Raises:
        ValueError: An unknown head or a number that is not positive.
    """
    if args.head not in FLOW_HEADS:
        raise ValueError(f"head={args.head!r} is unknown; choose from {list(FLOW_HEADS)}")
    _check_positive(args, "steps", "rows", "repeats", "cond_dim")
    head = FlowHead(FLOW_HEADS[args.head], NextStepConfig().token_dim)
    variables = random_params(head, args.cond_dim)
    x = _normal(1000, args.rows, head.token_dim)
    condition = _normal(1001, args.rows, args.cond_dim)
    times = jnp.arange(args.steps, dtype=jnp.float32) / args.steps
    arguments = (variables, x, times, condition)

    compiled, compile_s = {}, {}
    for name, method in (("naive", naive_token), ("amortised", amortised_token)):
        compiled[name], compile_s[name] = timing.compile_timed(nn.apply(method, head), *arguments)
    results = {name: function(*arguments) for name, function in compiled.items()}
    difference = jnp.max(jnp.abs(results["naive"] - results["amortised"]))
    calls = {name: lambda f=function: f(*arguments) for name, function in compiled.items()}
    seconds = timing.time_interleaved(calls, args.repeats)
    figures = {
        name: {
            "median_s": statistics.median(seconds[name]),
            "times_s": seconds[name],
            "compile_s": compile_s[name],
        }
        for name in compiled
    }
    return {
        "settings": {
            "head": args.head,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables)),
            "steps": args.steps,
            "rows": args.rows,
            "cond_dim": args.cond_dim,
            "repeats": args.repeats,
            "dtype": "float32",
        },
        **figures,
        "ratio": timing.median_ratio(seconds["naive"], seconds["amortised"]),
        "max_relative_difference": float(difference / jnp.max(jnp.abs(results["naive"]))),
    }


def _flow_head_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head", default="b", help=f"one of {', '.join(FLOW_HEADS)}")
    parser.add_argument("--steps", type=int, default=28, help="Euler steps of a token")
    parser.add_argument("--rows", type=int, default=2, help="rows: images times guidance branches")
    cond_dim = NextStepConfig().decoder.embed_dim
    parser.add_argument("--cond_dim", type=int, default=cond_dim, help="width of the condition")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")


def _check_positive(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)} must be at least 1")


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Sampling of whole images: measured times by part, and the byte model beside them.

    Raises:
        ValueError: An unknown size, head or solver, or a number out of range.
    """
    _check_positive(args, "steps", "batch", "tokens", "prompt_length", "repeats")
    if not 1 <= args.branches <= 3:
        raise ValueError(f"branches={args.branches} must be 1, 2 or 3")
    if args.bandwidth_gbs is not None and not args.bandwidth_gbs > 0:
        raise ValueError(f"bandwidth_gbs={args.bandwidth_gbs} must be positive")
    config = nextstep_config(args.size, args.head)
    sampler = SamplerConfig(args.solver, num_steps=args.steps)
    setting = sampling_speed.Setting(
        args.batch, args.branches, args.tokens, args.prompt_length, sampler
    )
    model = NextStep(config, dtype=jnp.dtype(args.dtype), scan_layers=False)
    params = sampling_speed.random_params(model, model.dtype)
    measured = sampling_speed.measure(model, params, setting, args.repeats)
    summary = sampling_speed.summarise(measured["times_s"], args.batch, args.tokens)

    # A second-order step asks for the velocity at its start and at its predicted end.
    evaluations = args.steps * (2 if SOLVERS[args.solver].second_order else 1)
    # On average half of the image is in the cache.
    context = args.prompt_length + args.tokens / 2
    itemsize = model.dtype.itemsize
    needed = roofline.token_bytes(
        config, rows=setting.rows, context=context, steps=evaluations, itemsize=itemsize
    )
    bandwidth, source = _bandwidth(args.bandwidth_gbs)
    needed_bytes = {"whole": needed.total, "decoder": needed.decoder, "head": needed.head}
    limit_ms = {name: size / bandwidth / 1e6 for name, size in needed_bytes.items()}
    share = {name: limit_ms[name] / summary["ms_per_token"][name] for name in limit_ms}
    names = ("size", "batch", "branches", "tokens", "prompt_length", "solver", "steps", "repeats")
    return {
        "settings": {
            **{name: getattr(args, name) for name in names},
            "head": args.head or "that of the size",
            "dtype": args.dtype,
            "parameters": dataclasses.asdict(roofline.count_parameters(config)),
        },
        **summary,
        "byte_model": {
            "bytes_per_token": needed_bytes,
            "bandwidth_gbs": bandwidth,
            "bandwidth_source": source,
            "limit_ms_per_token": limit_ms,
            "share_reached": share,
        },
        **measured,
    }


def _bandwidth(given: float | None) -> tuple[float, str]:
    """Memory bandwidth in GB/s and where the figure is from."""
    if given is not None:
        return given, "--bandwidth_gbs"
    known = roofline.known_bandwidth(jax.devices()[0].device_kind)
    if known is not None:
        return known, "nominal"
    return roofline.measured_bandwidth(), "measured: x <- a x + y"


def _sampling_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--size", default="tiny", help=f"decoder, one of {', '.join(DECODERS)}")
    add("--head", help=f"one of {', '.join(FLOW_HEADS)}; default: that of the size")
    add("--solver", default="euler_maruyama_full", help=f"one of {', '.join(SOLVERS)}")
    add("--steps", type=int, default=28, help="steps of the solver for a token")
    add("--batch", type=int, default=1, help="images at once")
    add("--branches", type=int, default=2, help="guidance branches, 1 to 3")
    add("--tokens", type=int, default=256, help="tokens of an image")
    add("--prompt_length", type=int, default=128, help="tokens of a prompt")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of all weights")
    add("--repeats", type=int, default=5, help="timed rounds")
    add("--bandwidth_gbs", type=float, help="memory bandwidth; default: known or measured")


def import_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak host memory of every way to import a checkpoint, in fresh processes.

    Raises:
        ValueError: The size is not positive.
    """
    if not args.gigabytes > 0:
        raise ValueError(f"gigabytes={args.gigabytes} must be positive")
    config = memory.sized_config(args.gigabytes)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source, out = pathlib.Path(folder) / "published", pathlib.Path(folder) / "converted"
        largest = memory.random_checkpoint(source, config, args.shards)
        figures = {}
        for num_devices in (1, 8):
            for what in ("nothing", "load", "convert"):
                shutil.rmtree(out, ignore_errors=True)
                measured = memory.measure(what, source, out, num_devices)
                measured["host_bytes"] = measured["peak_bytes"] - measured["kept_bytes"]
                figures[f"{what} on {num_devices}"] = measured
        sizes = [path.stat().st_size for path in source.glob("*.safetensors")]
    bound = 2 * largest + 2 * 10**9
    return {
        "settings": {"gigabytes": args.gigabytes, "shards": len(sizes)},
        "checkpoint_bytes": sum(sizes),
        "largest_stacked_parameter_bytes": largest,
        "bound_bytes": bound,
        "within_bound": all(one["host_bytes"] < bound for one in figures.values()),
        "processes": figures,
    }


def _import_memory_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gigabytes", type=float, default=6.5, help="size of the checkpoint")
    parser.add_argument("--shards", type=int, default=5, help="its files")
    parser.add_argument("--folder", help="where it is made; by default the temporary folder")


def data(args: argparse.Namespace) -> dict[str, Any]:
    """Rates of the data pipeline by format and size, on one core and with threads.

    Raises:
        ValueError: An unknown format, or a number out of range.
    """
    setting = data_speed.Setting(
        formats=tuple(args.formats.split(",")),
        sizes=_numbers("sizes", args.sizes),
        source_size=args.source_size,
        num_images=args.num_images,
        threads=_numbers("threads", args.threads),
        repeats=args.repeats,
    )
    return data_speed.run(setting)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    """The whole numbers of a list with commas."""
    try:
        return tuple(int(number) for number in text.split(",") if number)
    except ValueError as error:
        raise ValueError(f"{name}={text!r} must be whole numbers with commas between") from error


def _data_flags(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, data_speed.Setting()

    def listed(values: Iterable[Any]) -> str:
        return ",".join(map(str, values))

    add("--formats", default=listed(default.formats), help="which of these, with commas")
    add("--sizes", default=listed(default.sizes), help="sides that images are fitted to")
    add("--source_size", type=int, default=default.source_size, help="side of the JPEG files")
    add("--num_images", type=int, default=default.num_images, help="different files")
    add("--threads", default=listed(default.threads), help="threads on all cores; '' for none")
    add("--repeats", type=int, default=default.repeats, help="timed rounds")


def train(args: argparse.Namespace) -> dict[str, Any]:
    """The training step, and PyTorch's beside it.

    Raises:
        ValueError: An unknown name, a number out of range, or PyTorch is asked for and missing.
    """
    parts = {name: _sizes(name, getattr(args, name)) for name in ("decoder", "flow_head")}
    model = build_model_config({"size": args.size, "head": args.head, **parts})
    names = ("rows", "length", "dtype", "attention", "remat", "accumulate", "repeats")
    setting = train_speed.Setting(
        model,
        **{name: getattr(args, name) for name in (*names, "against", "torch_attention", "seed")},
        mesh=tuple(parse_axes(args.mesh).items()),
    )
    return train_speed.run(setting)


def _sizes(name: str, text: str) -> dict[str, int]:
    """The fields of a config written as field:size,field:size."""
    try:
        pairs = [part.split(":") for part in text.split(",") if part]
        return {field: int(size) for field, size in pairs}
    except ValueError as error:
        raise ValueError(f"{name}={text!r} must read like embed_dim:512,num_layers:6") from error


def _train_flags(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, train_speed.Setting(NextStepConfig())
    add("--size", default="tiny", help=f"decoder, one of {', '.join(DECODERS)}")
    add("--head", help=f"one of {', '.join(FLOW_HEADS)}; default: that of the size")
    add("--decoder", default="", help="other sizes, such as embed_dim:512,num_layers:6")
    add("--flow_head", default="", help="the same of the flow head")
    add("--rows", type=int, default=default.rows, help="packed rows of a step, all devices")
    add("--length", type=int, default=default.length, help="positions of a row")
    add("--dtype", default=default.dtype, choices=("float32", "bfloat16"), help="of computation")
    add("--attention", default=default.attention, help="attention kernel")
    add("--remat", default=default.remat, help="what the backward pass keeps")
    add("--accumulate", type=int, default=default.accumulate, help="parts of a step")
    add("--mesh", default="fsdp:1", help="axes and sizes, such as fsdp:4,tensor:2")
    add("--repeats", type=int, default=default.repeats, help="timed rounds")
    add("--against", choices=train_speed.AGAINST, help="what to time beside it")
    kernels = ", ".join(torch_train.TORCH_ATTENTION)
    add("--torch_attention", default=default.torch_attention, help=f"one of {kernels}")
    add("--seed", type=int, default=default.seed, help="of rows, weights and draws")


def checkpoint(args: argparse.Namespace) -> dict[str, Any]:
    """Saving and restoring a train state.

    Raises:
        ValueError: A number out of range, no such folder, or too few devices.
    """
    names = ("mesh", "other_mesh")
    meshes = {name: tuple(parse_axes(getattr(args, name)).items()) for name in names}
    setting = checkpoint_speed.Setting(args.gigabytes, repeats=args.repeats, **meshes)
    return checkpoint_speed.run(dataclasses.replace(setting, directory=args.dir))


def _checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, checkpoint_speed.Setting()
    add("--gigabytes", type=float, default=default.gigabytes, help="size of the state, at least")
    add("--mesh", default="fsdp:8", help="where the state lies")
    add("--other_mesh", default="fsdp:4,tensor:2", help="where it is restored to besides")
    add("--repeats", type=int, default=default.repeats, help="timed rounds")
    add("--dir", help="where the files are made; by default the temporary folder")


# A new benchmark is one function and one row.
BENCHMARKS = {
    "flow_head": Benchmark(
        "the flow head, naive against amortised modulations", _flow_head_flags, flow_head
    ),
    "sampling": Benchmark(
        "image tokens by part, beside the limit of the memory", _sampling_flags, sampling
    ),
    "import_memory": Benchmark(
        "peak host memory of importing a checkpoint", _import_memory_flags, import_memory
    ),
    "data": Benchmark("the data pipeline by format, per core", _data_flags, data),
    "train": Benchmark("the training step, beside PyTorch's", _train_flags, train),
    "checkpoint": Benchmark("saving and restoring a train state", _checkpoint_flags, checkpoint),
}


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Reads the command line: a subcommand and its flags."""
    parser = argparse_flags.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, benchmark in BENCHMARKS.items():
        # The parent has read absl's own flags already.
        command = commands.add_parser(name, help=benchmark.help, inherited_absl_flags=None)
        benchmark.add_flags(command)
        command.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> None:
    """Runs a benchmark, prints its figures and writes them if asked to."""
    try:
        figures = BENCHMARKS[args.benchmark].run(args)
        report = {"benchmark": args.benchmark, "environment": timing.environment(), **figures}
        text = json.dumps(report, indent=2)
        print(text)
        if args.json:
            pathlib.Path(args.json).write_text(text + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"benchmark {args.benchmark}: {error}")


def program(args: argparse.Namespace) -> None:
    """`main`, with warnings alone from the libraries."""
    set_up_logging()
    main(args)


if __name__ == "__main__":
    app.run(program, flags_parser=parse_flags)
