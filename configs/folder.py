"""NextStep on your own photographs: a folder of images with .txt captions beside them.

    python launch/train.py --config=configs/folder.py:photos --tokenizer=runs/tok --workdir=runs/me

The argument is the folder. The size is that of a workstation GPU; "configs/folder.py:photos,tiny"
is for a CPU: a small model on images of 64 pixels.
"""

from ml_collections import ConfigDict

from nextstep_jax.training.experiment import (
    WORKSTATION,
    data_defaults,
    defaults,
    folder_and_size,
    layout_defaults,
    loop_defaults,
    optimizer_defaults,
)
from nextstep_jax.training.pretrain import LossConfig


def get_config(argument: str = "photos") -> ConfigDict:
    """The experiment."""
    folder, tiny = folder_and_size(argument)
    return ConfigDict(
        {
            "image_size": 64 if tiny else 256,
            # The text tokenizer is trained on the captions; its special tokens come first.
            "model": {"size": "tiny"} if tiny else WORKSTATION,
            "sources": {"photos": {"type": "folder", "root": folder, "weight": 1.0}},
            "data": data_defaults(
                row_length=512 if tiny else 4096,
                rows_per_batch=4,
                num_threads=2,
            ),
            # Every image goes to the nearest of 17 shapes unless square_only says otherwise; each
            # shape is a program to compile.
            "layout": layout_defaults(square_only=tiny),
            "loss": defaults(LossConfig),
            "optimizer": optimizer_defaults(
                learning_rate=3e-4,
                schedule="cosine",
                warmup_steps=1000,
                ema_decay=0.999,
            ),
            "loop": loop_defaults(
                num_steps=50_000,
                checkpoint_every=1000,
                log_every=20,
                hook_every=2000,
            ),
            "sampling": {"preset": "plain", "guidance_scale": 3.0},
            # Captions drawn every `loop.hook_every` steps; none: the first of the folder.
            "score": {"prompts": (), "guidance_scales": (3.0,)},
            "dtype": "float32",
            "attention": "xla",
            "remat": "none",
        }
    )
