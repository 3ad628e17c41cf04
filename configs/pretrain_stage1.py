"""Stage 1 of the published recipe: 1.23T tokens, images cropped to 256 x 256.

    python launch/train.py --config=configs/pretrain_stage1.py:tiny --tokenizer=runs/tok \
        --workdir=runs/s1

The argument is the size of the model (tiny, 0.5b ... 14b) and, after a comma, a folder with your
own records; see `training/recipe.py`, which has the numbers of Table 1 (arXiv 2508.10711), and
docs/scale.md for clusters. The paper begins with Qwen2.5-14B: --config.init_from=DIR with what
launch/convert.py makes of it (docs/parity.md).
"""

from ml_collections import ConfigDict

from nextstep_jax.training.recipe import stage_config


def get_config(argument: str = "14b") -> ConfigDict:
    """The experiment."""
    return stage_config("stage1", argument)
