r"""Compiles training or sampling for a machine that is not there, and says what it needs.

Examples:
    python launch/aot_report.py --config=configs/pretrain_stage1.py:14b --topology=v5p:4x4x4 \
        --mesh=fsdp:64 --config.data.row_length=4096 --config.data.rows_per_batch=64
    python launch/aot_report.py --config=configs/pretrain_stage1.py:14b --topology=v6e:16x16 \
        --slices=2 --mesh=data:2,fsdp:256 --config.data.rows_per_batch=512 --json=report.json
    python launch/aot_report.py --config=configs/pretrain_stage1.py:14b --topology=v6e:2x2 \
        --what=sample --mesh=tensor:4

What is compiled is the function that launch/train.py runs. Topologies are v5e:4x4, v6e:16x16,
v5p:4x4x4, tpu7x:2x2x1 (pip install nextstep_jax[aot]), h100:8 (pip install jax[cuda12]) and cpu:8
(fake devices). Exit status 3 says that it does not fit, 1 that something else is wrong.
"""

import json
import pathlib
import sys

import jax
from absl import flags
from ml_collections import config_flags

from nextstep_jax.evaluation import scale_report
from nextstep_jax.parallel.mesh import parse_axes
from nextstep_jax.parallel.topologies import get_topology
from nextstep_jax.training import experiment
from nextstep_jax.training.logs import run_program

DOES_NOT_FIT = 3

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "The machine, such as v5p:4x4x4.")
_SLICES = flags.DEFINE_integer("slices", 1, "TPU slices of that shape; axis data joins them.")
_MESH = flags.DEFINE_list("mesh", None, "AXIS:SIZE,...; by default the config's.")
_WHAT = flags.DEFINE_enum("what", "train", ["train", "sample"], "What is compiled.")
_MFU = flags.DEFINE_float("mfu", 0.5, "Share of the peak that the arithmetic on times supposes.")
_OPTIONS = flags.DEFINE_list("compiler_options", [], "NAME=VALUE,... of XLA.")
_BATCH = flags.DEFINE_integer("batch", 1, "Images sampled at once.")
_BRANCHES = flags.DEFINE_integer("branches", 2, "Guidance branches of an image, 1 to 3.")
_TOKENS = flags.DEFINE_integer("tokens", 256, "Tokens of a sampled image.")
_PROMPT = flags.DEFINE_integer("prompt_length", 128, "Tokens of a prompt.")
_STEPS = flags.DEFINE_integer("steps", 28, "Steps of the sampler.")
_PATIENCE = flags.DEFINE_float("patience", 600.0, "Seconds to wait for another user of libtpu.")
_JSON = flags.DEFINE_string("json", None, "Also write the report to this file.")


def make_report() -> dict:
    """The report that the flags ask for."""
    config = experiment.plain(_CONFIG.value)
    options = scale_report.read_options(_OPTIONS.value)
    axes = None if _MESH.value is None else parse_axes(",".join(_MESH.value))
    topology = get_topology(_TOPOLOGY.value, _SLICES.value, _PATIENCE.value)
    if topology.devices[0].platform == "gpu":
        # There is no GPU to try variants of a kernel on.
        options = {"xla_gpu_autotune_level": "0", **options}
    if _WHAT.value == "sample":
        sizes = (_BATCH.value, _BRANCHES.value, _TOKENS.value, _PROMPT.value, _STEPS.value)
        return scale_report.sample_report(
            experiment.build_model_config(config["model"]),
            topology,
            axes or {"tensor": -1},
            scale_report.SampleSetting(*sizes),
            options,
        )
    if axes is not None:
        config["loop"]["mesh"] = axes
    if _SLICES.value > 1:
        config["loop"]["across_slices"] = {"data": _SLICES.value}
    return scale_report.train_report(config, topology, _MFU.value, options)


def main(argv: list[str]) -> None:
    """Compiles what the flags say, prints and writes the report."""
    del argv
    # Whatever devices this machine has are not used.
    jax.config.update("jax_platforms", "cpu")
    # A program from the cache would say nothing of how long compiling takes.
    jax.config.update("jax_enable_compilation_cache", False)
    report = make_report()
    print(scale_report.describe(report))
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(report, indent=2) + "\n")
    if not report["fits"]:
        sys.exit(DOES_NOT_FIT)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    run_program(main)
