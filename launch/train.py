"""Trains NextStep on a mixture of documents.

Example:
    python launch/train.py --config=configs/shapes.py:easy --tokenizer=runs/tok --workdir=runs/easy

`--tokenizer` is the workdir of an image tokenizer. Any value of the config can be changed:
--config.optimizer.learning_rate=1e-3. Started again with the same workdir, the run goes on where
it stopped. The workdir is a model directory: sample from it with launch/sample.py.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from nextstep_jax import runs
from nextstep_jax.training.logs import run_program

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Workdir of the image tokenizer.")

# In the checkout, shared with the quickstart.
_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax"


def main(argv: list[str]) -> None:
    """Trains what the flags say."""
    del argv
    runs.use_compilation_cache(_CACHE)
    runs.train_model(_CONFIG.value, pathlib.Path(_WORKDIR.value), pathlib.Path(_TOKENIZER.value))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir", "tokenizer"])
    run_program(main)
