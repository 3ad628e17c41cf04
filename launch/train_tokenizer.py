"""Trains an image tokenizer.

Example:
    python launch/train_tokenizer.py --config=configs/shapes_tokenizer.py:easy --workdir=runs/tok

Any value of the config can be changed: --config.loop.num_steps=500. Started again with the same
workdir, the run goes on where it stopped. Several processes are started as in launch/train.py.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from nextstep_jax import runs
from nextstep_jax.parallel import distributed
from nextstep_jax.training.logs import run_program

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go.")

# In the checkout, shared with the quickstart.
_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax"


def main(argv: list[str]) -> None:
    """Trains what the flags say."""
    del argv
    distributed.initialize()
    runs.use_compilation_cache(_CACHE)
    runs.train_tokenizer(_CONFIG.value, pathlib.Path(_WORKDIR.value))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    run_program(main)
