"""NextStep on records: of images, or of latents that launch/encode_latents.py has made of them.

    python launch/train.py --config=configs/records.py:photos.rec --tokenizer=runs/tok --workdir=run

The argument is the folder of records; with latents the tokenizer must be the one that made them,
and the sizes those that they were made with: --config.image_size=64 and
"--config.layout.image_bases=(64,)" for --image_bases=64. The model is that of configs/folder.py,
and "configs/records.py:photos.rec,tiny" is that of a CPU, on images of 64 pixels.
"""

import pathlib

from ml_collections import ConfigDict

from nextstep_jax.data.records import INDEX, read_index
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


def get_config(argument: str = "records") -> ConfigDict:
    """The experiment."""
    folder, tiny = folder_and_size(argument)
    return ConfigDict(
        {
            # Of the pictures that are sampled.
            "image_size": 64 if tiny else 256,
            # The text tokenizer is trained on the captions; its special tokens come first.
            "model": {"size": "tiny"} if tiny else WORKSTATION,
            "sources": {"records": {"type": "records", "root": folder, "weight": 1.0}},
            "data": data_defaults(
                row_length=512 if tiny else 4096,
                rows_per_batch=4 if tiny else 16,
                latents=_holds_latents(folder),
                num_threads=2,
            ),
            # The grids are those of the records: what launch/encode_latents.py was given.
            "layout": layout_defaults(image_bases=(64,) if tiny else (256,)),
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
            # Captions drawn every `loop.hook_every` steps; none: the first of the records.
            "score": {"prompts": (), "guidance_scales": (3.0,)},
            "dtype": "float32",
            "attention": "xla",
            "remat": "none",
        }
    )


def _holds_latents(folder: str) -> bool:
    """Whether records hold latents or images; what is not there yet is said when it is opened."""
    index = pathlib.Path(folder) / INDEX
    return not index.is_file() or read_index(folder)["latents"] is not None
