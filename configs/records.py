"""NextStep on records: of images, or of latents that launch/encode_latents.py has made of them.

    python launch/train.py --config=configs/records.py:photos.rec --tokenizer=runs/tok --workdir=run

The argument is the folder of records; with latents the tokenizer must be the one that made them,
and the sizes those that they were made with: --config.image_size=64 and
"--config.layout.image_bases=(64,)" for --image_bases=64. The model is that of configs/folder.py;
on a CPU make it smaller, for example --config.model.size=tiny --config.data.row_length=256.
"""

import pathlib

from ml_collections import ConfigDict

from nextstep_jax.data.records import INDEX, read_index
from nextstep_jax.training.experiment import (
    data_defaults,
    defaults,
    layout_defaults,
    loop_defaults,
    optimizer_defaults,
)
from nextstep_jax.training.pretrain import LossConfig


def get_config(folder: str = "records") -> ConfigDict:
    """The experiment."""
    return ConfigDict(
        {
            # Of the pictures that are sampled.
            "image_size": 256,
            # The text tokenizer is trained on the captions; its special tokens come first.
            "model": {
                "size": "tiny",
                "decoder": {
                    "embed_dim": 768,
                    "num_layers": 12,
                    "num_heads": 12,
                    "num_kv_heads": 4,
                    "head_dim": 64,
                    "mlp_dim": 2048,
                    "vocab_size": 8192,
                },
                "flow_head": {"width": 1024, "num_layers": 6},
            },
            "sources": {"records": {"type": "records", "root": folder, "weight": 1.0}},
            "data": data_defaults(
                row_length=4096, rows_per_batch=16, latents=_holds_latents(folder), num_threads=2
            ),
            # The grids are those of the records: what launch/encode_latents.py was given.
            "layout": layout_defaults(image_bases=(256,)),
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
