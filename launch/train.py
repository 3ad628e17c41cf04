"""Trains NextStep on a mixture of documents.

Example:
    python launch/train.py --config=configs/shapes.py:easy --tokenizer=runs/tok --workdir=runs/easy

`--tokenizer` is the workdir of an image tokenizer; a stage that begins with another model
(--config.init_from=DIR) takes that model's, and needs none. Any value of the config can be changed:
--config.optimizer.learning_rate=1e-3. Started again with the same workdir, the run goes on where
it stopped. The workdir is a model directory: sample from it with launch/sample.py.

On a cluster the same command is started once per process: see launch/slurm.sbatch,
launch/gke_jobset.yaml and launch/tpu_vm.sh. By hand, on any machines:
    NEXTSTEP_COORDINATOR=node0:9876 NEXTSTEP_NUM_PROCESSES=2 NEXTSTEP_PROCESS_ID=0 python ...
SIGTERM to any of them saves and ends all with status 0; a process that dies ends all.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from nextstep_jax import runs
from nextstep_jax.parallel import distributed
from nextstep_jax.training.logs import run_program

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Workdir of the image tokenizer.")

# In the checkout, shared with the quickstart.
_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax"


def main(argv: list[str]) -> None:
    """Trains what the flags say."""
    del argv
    distributed.initialize()
    runs.use_compilation_cache(_CACHE)
    tokenizer = pathlib.Path(_TOKENIZER.value) if _TOKENIZER.value else None
    runs.train_model(_CONFIG.value, pathlib.Path(_WORKDIR.value), tokenizer)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    run_program(main)
