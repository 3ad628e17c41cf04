"""NextStep on the built-in world, small enough for a laptop.

    python launch/train.py --config=configs/shapes.py:easy --tokenizer=runs/tok --workdir=runs/easy

The argument is the level of the world: easy (one object, captions only), pairs or full (all four
kinds of documents); and, after a dash, the side of the images if not the default: full-32.
"""

from ml_collections import ConfigDict

from nextstep_jax.data.shapes import level_and_size
from nextstep_jax.training.experiment import (
    data_defaults,
    defaults,
    layout_defaults,
    loop_defaults,
    optimizer_defaults,
)
from nextstep_jax.training.pretrain import LossConfig

# Paper, Table 1, with fewer texts and more pairs; ours.
_MIXTURE = {"text": 0.1, "pair": 0.7, "edit": 0.1, "interleaved": 0.1}
_PIXELS_PER_TOKEN = 16
# Text around an image, at the least; a row holds no more images than this lets in.
_TEXT_PER_IMAGE = 12


def get_config(argument: str = "easy") -> ConfigDict:
    """The experiment."""
    level, image_size = level_and_size(argument)
    mixture = {"pair": 1.0} if level == "easy" else _MIXTURE
    row_length = 256 if level == "easy" else 512
    num_tokens = (image_size // _PIXELS_PER_TOKEN) ** 2
    max_images = row_length // (num_tokens + _TEXT_PER_IMAGE)
    return ConfigDict(
        {
            "image_size": image_size,
            "model": {"size": "tiny"},
            "sources": {
                kind: {"type": "shapes", "kind": kind, "level": level, "weight": weight}
                for kind, weight in mixture.items()
            },
            "data": data_defaults(
                row_length=row_length,
                rows_per_batch=2,
                max_image_tokens=max_images * num_tokens,
                num_threads=1,
            ),
            # The world writes as it shall be asked, so that captions stay as they are.
            "layout": layout_defaults(square_only=True, capitalize_prob=0.0),
            "loss": defaults(LossConfig, text_chunk=row_length),
            "optimizer": optimizer_defaults(
                learning_rate=2e-3, schedule="cosine", warmup_steps=200, ema_decay=0.998
            ),
            "loop": loop_defaults(
                num_steps=6000, checkpoint_every=1000, log_every=20, hook_every=1000
            ),
            # What the pipeline samples with by default.
            "sampling": {"preset": "plain", "guidance_scale": 2.0},
            # Held-out captions drawn and read back every `loop.hook_every` steps.
            "score": {"level": level, "num_scored": 120, "guidance_scales": (1.0, 2.0)},
            "dtype": "float32",
            "attention": "xla",
            "remat": "none",
        }
    )
