"""Curation of captioned images: scores, near-duplicates, and rules on them.

    python launch/curate.py --config=configs/curate_images.py:folder:photos --out=photos.scored
    python launch/curate.py --config=configs/curate_images.py --select=photos.scored --out=good.rec

The argument is the source, as launch/encode_latents.py names sources. The first command scores,
the second chooses by `select.rules`, and writes report.html beside the documents; a look at its
histograms tells better rules than these, and choosing again costs little.

All numbers are ours: NextStep-1 (arXiv 2508.10711, section 3) publishes what it filtered by, not
the thresholds. Models of your own are further stages, such as

    "taste": {"type": "scorer", "scorer": {"scorer": "clip_aesthetic", ...}},
    "recaption": {"url": "http://127.0.0.1:8000/v1", "model": "qwen2.5-vl"},

and their scores further rules: "clip_aesthetic/aesthetic": (5.0, None).
"""

from ml_collections import ConfigDict

from nextstep_jax.data.source_types import source_values


def get_config(source: str = "shapes:full") -> ConfigDict:
    """The curation of a source."""
    return ConfigDict(
        {
            "source": source_values(source),
            # Side of the pictures of sources that draw them.
            "image_size": 64,
            "documents_per_shard": 256,
            "stages": {
                "decode": {},
                "resolution": {},
                "aspect": {},
                "clarity": {"side": 256},
                "duplicates": {
                    "hash": "phash",
                    "max_distance": 4,
                    "matching_bands": 1,
                    "keep_best_by": "pixels",
                    "image": -1,
                },
            },
            "select": {
                # (smallest, largest) that is kept.
                "rules": {
                    "min_side": (256.0, None),
                    # The longest of the aspect buckets is 4:1.
                    "aspect": (None, 4.0),
                    "clarity": (50.0, None),
                },
                "drop_duplicates": True,
                "missing": "keep",
                "shard_bytes": 512 * 2**20,
                "num_examples": 8,
            },
        }
    )
