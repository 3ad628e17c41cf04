"""NextStep on the built-in world, small enough for a laptop.

    python launch/train.py --config=configs/shapes.py:easy --tokenizer=runs/tok --workdir=runs/easy

The argument is the level of the world: easy (one object, 32x32, captions only), pairs or full
(64x64, all four kinds of documents).
"""

from ml_collections import ConfigDict

# Table 1 of the paper, stage 2 and annealing: text, pairs, image-to-image, interleaved.
_MIXTURE = {"text": 0.1, "pair": 0.7, "edit": 0.1, "interleaved": 0.1}


def get_config(level: str = "easy") -> ConfigDict:
    """The experiment."""
    easy = level == "easy"
    image_size = 32 if easy else 64
    mixture = {"pair": 1.0} if easy else _MIXTURE
    row_length = 256 if easy else 512
    return ConfigDict(
        {
            "image_size": image_size,
            "model": {"size": "tiny"},
            "sources": {
                kind: {"type": "shapes", "kind": kind, "level": level, "weight": weight}
                for kind, weight in mixture.items()
            },
            "data": {
                "row_length": row_length,
                "rows_per_batch": 2,
                "square_only": True,
                "max_images_per_row": 16,
                "num_threads": 1,
            },
            "loss": {"image_positions": row_length // 4, "text_chunk": row_length},
            "optimizer": {
                "learning_rate": 2e-3,
                "schedule": "cosine",
                "warmup_steps": 200,
                "ema_decay": 0.998,
            },
            "loop": {
                "num_steps": 6000,
                "checkpoint_every": 1000,
                "log_every": 20,
                "hook_every": 1000,
            },
            # What the pipeline samples with by default.
            "sampling": {"preset": "plain", "guidance_scale": 2.0},
            # Held-out captions drawn and read back every `loop.hook_every` steps.
            "score": {"level": level, "num_scored": 120, "guidance_scales": (1.0, 2.0)},
            "dtype": "float32",
        }
    )
