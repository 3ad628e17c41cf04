"""The published training recipe, stage by stage (arXiv 2508.10711, Table 1).

One table, and the experiment that a stage is at a size of the model. What Table 1 leaves open is
that of the released trainer where it has it (AdamW's betas, clipping, the interval of
checkpoints), and otherwise ours, as the comments say.
"""

import dataclasses
import pathlib

from ml_collections import ConfigDict

from nextstep_jax.data.mixture import STAGE_RATIOS
from nextstep_jax.data.records import INDEX, read_index
from nextstep_jax.models.config import DECODERS
from nextstep_jax.training.experiment import (
    data_defaults,
    defaults,
    layout_defaults,
    loop_defaults,
    optimizer_defaults,
)
from nextstep_jax.training.pretrain import LossConfig


@dataclasses.dataclass(frozen=True)
class Stage:
    """A column of Table 1.

    Attributes:
        learning_rate: The largest.
        schedule: After the warm-up; the cosine goes to 0.
        warmup_steps: Steps of the linear warm-up.
        num_steps: Training steps.
        row_length: Sequence length per rank; "16K" and "8K" are read as powers of two.
        rows_per_batch: Ours, the batch not being published: steps times rows times length are the
            published training tokens within 2%.
        training_tokens: As published.
        side_factors: Bases of the images' areas, over 256.
    """

    learning_rate: float
    schedule: str
    warmup_steps: int
    num_steps: int
    row_length: int
    rows_per_batch: int
    training_tokens: float
    side_factors: tuple[int, ...]


STAGES: dict[str, Stage] = {
    "stage1": Stage(1e-4, "constant", 5000, 200_000, 16_384, 376, 1.23e12, (1,)),
    "stage2": Stage(1e-5, "constant", 5000, 100_000, 16_384, 376, 0.61e12, (1, 2)),
    "annealing": Stage(1e-5, "cosine", 0, 20_000, 16_384, 120, 40e9, (1, 2)),
    "sft": Stage(1e-5, "cosine", 500, 10_000, 8192, 60, 5e9, (1, 2)),
}

# For laptops, of the built-in world; ours.
_TINY = {"row_length": 2048, "rows_per_batch": 2}
_TINY_SIDE, _SIDE = 64, 256
# Sizes without sample grids unless asked for: each process would gather a copy of the parameters,
# 28 GB in bfloat16 for 14b, beside the training.
_NO_GRIDS = ("tiny", "7b", "14b")
# Drawn every `loop.hook_every` steps; ours.
_PROMPTS = (
    "a red fox in the snow",
    "two wooden boats on a green lake at sunrise",
    "a street sign that says NEXT",
    "a bowl of fruit on a blue table, oil painting",
)


def stage_config(name: str, argument: str) -> ConfigDict:
    """The experiment of a stage.

    Args:
        name: A key of `STAGES`.
        argument: The size of the model, a key of `models.config.DECODERS`; and, after a comma, a
            folder with the records of each kind of document (`text`, `pair`, `edit`,
            `interleaved`) in a folder of that name. Without it, the built-in world.

    Raises:
        ValueError: There is no such size.
    """
    size, _, root = argument.partition(",")
    if size not in DECODERS:
        raise ValueError(f"model size {size!r} is unknown; choose from {list(DECODERS)}")
    stage, tiny = STAGES[name], size == "tiny"
    side = _TINY_SIDE if tiny else _SIDE
    sides = tuple(side * factor for factor in stage.side_factors)
    shape = _TINY if tiny else dataclasses.asdict(stage)
    # What is not there yet is said when it is opened.
    pairs = pathlib.Path(root, "pair")
    latents = bool(root) and (pairs / INDEX).is_file() and read_index(pairs)["latents"] is not None
    return ConfigDict(
        {
            "image_size": side,
            "model": {"size": size},
            # The workdir of the stage before, or a model directory; "" begins with noise.
            "init_from": "",
            "sources": _records(name, root) if root else _world(name, sides),
            "data": data_defaults(
                row_length=shape["row_length"],
                rows_per_batch=shape["rows_per_batch"],
                latents=latents,
                num_threads=1 if tiny else 8,
            ),
            # Stage 1 crops to squares at random places; then come all aspect ratios.
            "layout": layout_defaults(
                image_bases=sides,
                square_only=len(sides) == 1,
                random_crop=len(sides) == 1,
            ),
            # Every chunk sums the gradient of the LM head over all devices: few and large ones.
            "loss": defaults(
                LossConfig, draws_one_by_one=not tiny, text_chunk=512 if tiny else 2048
            ),
            "optimizer": optimizer_defaults(
                learning_rate=stage.learning_rate,
                schedule=stage.schedule,
                warmup_steps=stage.warmup_steps,
            ),
            # The released trainer saves every 2500 steps.
            "loop": loop_defaults(
                num_steps=stage.num_steps,
                checkpoint_every=1000 if tiny else 2500,
                log_every=20 if tiny else 10,
                hook_every=0 if size in _NO_GRIDS else 2500,
            ),
            "sampling": {"preset": "plain", "guidance_scale": 2.0 if tiny else 7.5},
            "score": (
                {"level": "full", "guidance_scales": (2.0,)}
                if tiny
                else {"prompts": _PROMPTS, "num_pictures": 4, "guidance_scales": (7.5,)}
            ),
            "dtype": "float32" if tiny else "bfloat16",
            "attention": "auto",
            "remat": "none" if tiny else "nothing_saveable",
        }
    )


def _world(name: str, sides: tuple[int, ...]) -> dict[str, dict]:
    """The built-in world: every kind, half of its documents on each base."""
    return {
        f"{kind}-{side}": {
            "type": "shapes",
            "kind": kind,
            "level": "full",
            "image_size": side,
            "weight": ratio / len(sides),
        }
        for kind, ratio in STAGE_RATIOS[name].items()
        for side in sides
    }


def _records(name: str, root: str) -> dict[str, dict]:
    """Records of one's own, a folder for each kind that the stage has."""
    return {
        kind: {"type": "records", "root": str(pathlib.Path(root, kind)), "weight": ratio}
        for kind, ratio in STAGE_RATIOS[name].items()
        if ratio
    }
