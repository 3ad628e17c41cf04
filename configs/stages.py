"""The four stages of training, with the data ratios of the paper, on the built-in world.

    python launch/train.py --config=configs/stages.py:stage1 --tokenizer=runs/tok --workdir=runs/s1

The argument is the stage: stage1, stage2, annealing or sft. Kinds of documents are mixed by Table
1 of the paper (arXiv 2508.10711), images are treated as each stage treats them, and rate, schedule
and warm-up are the published ones. Size and length are those of a laptop, the images a quarter of
the published sides: 64 for 256 and 128 for 512.

Your own data take the place of the world's, one or more sources of each kind:

    "sources": {
        "web": {"type": "records", "root": "web.rec", "weight": 0.4},
        "photos": {"type": "tars", "root": "photos/*.tar", "weight": 0.2},
        "books": {"type": "jsonl", "root": "books.jsonl", "weight": 0.2}, ...

A run may go on in its workdir with other weights and with more sources: each keeps its place, and
the change is logged. A source that is no longer wanted stays with weight 0.
"""

from ml_collections import ConfigDict

from nextstep_jax.data.mixture import STAGE_RATIOS
from nextstep_jax.training.experiment import (
    data_defaults,
    defaults,
    layout_defaults,
    loop_defaults,
    optimizer_defaults,
)
from nextstep_jax.training.pretrain import LossConfig

# (rate, schedule, warm-up, steps) of Table 1.
_RATES = {
    "stage1": (1e-4, "constant", 5000, 200_000),
    "stage2": (1e-5, "constant", 5000, 100_000),
    "annealing": (1e-5, "cosine", 0, 20_000),
    "sft": (1e-5, "cosine", 500, 10_000),
}
_SIDE = 64


def get_config(stage: str = "stage1") -> ConfigDict:
    """The experiment.

    Raises:
        ValueError: There is no such stage.
    """
    if stage not in STAGE_RATIOS:
        raise ValueError(f"stage {stage!r} is none of {list(STAGE_RATIOS)}")
    rate, schedule, warmup, steps = _RATES[stage]
    # Stage 1 crops to squares at random places; then come all aspect ratios, on two bases.
    sides = (_SIDE,) if stage == "stage1" else (_SIDE, 2 * _SIDE)
    first = stage == "stage1"
    return ConfigDict(
        {
            "image_size": _SIDE,
            "model": {"size": "tiny"},
            "sources": {
                f"{kind}-{side}": {
                    "type": "shapes",
                    "kind": kind,
                    "level": "full",
                    "image_size": side,
                    "weight": ratio / len(sides),
                }
                for kind, ratio in STAGE_RATIOS[stage].items()
                for side in sides
            },
            "data": data_defaults(row_length=2048, rows_per_batch=2, num_threads=1),
            "layout": layout_defaults(image_bases=sides, square_only=first, random_crop=first),
            "loss": defaults(LossConfig),
            "optimizer": optimizer_defaults(
                learning_rate=rate, schedule=schedule, warmup_steps=warmup
            ),
            "loop": loop_defaults(num_steps=steps, checkpoint_every=1000, log_every=20),
            "sampling": {"preset": "plain", "guidance_scale": 2.0},
            "score": {"level": "full", "guidance_scales": (2.0,)},
            "dtype": "float32",
            "attention": "xla",
            "remat": "none",
        }
    )
