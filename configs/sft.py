"""The supervised fine-tuning of the published recipe: 5B tokens, rows of 8K.

    python launch/train.py --config=configs/sft.py:tiny --tokenizer=runs/tok \
        --workdir=runs/sft \
        --config.init_from=runs/annealed

The argument is the size of the model (tiny, 0.5b ... 14b) and, after a comma, a folder with your
own records; see `training/recipe.py`, which has the numbers of Table 1 (arXiv 2508.10711), and
docs/scale.md for clusters. `init_from` is the stage before, of which the parameters are taken.
"""

from ml_collections import ConfigDict

from nextstep_jax.training.recipe import stage_config


def get_config(argument: str = "14b") -> ConfigDict:
    """The experiment."""
    return stage_config("sft", argument)
