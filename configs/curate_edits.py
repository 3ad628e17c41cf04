"""Curation of edits: documents of a source image, an instruction and a result.

    python launch/curate.py --config=configs/curate_edits.py:tars:edits --out=edits.scored
    python launch/curate.py --config=configs/curate_edits.py --select=edits.scored --out=edits.rec

As configs/curate_images.py, with a scorer that rates pairs of images: `edit_change` says by how
much the result differs from the source, so that edits that changed nothing, or everything, go.
Scorers of preferences (prompt, better image, worse image) stand in the same place. All numbers
are ours.
"""

from ml_collections import ConfigDict

from nextstep_jax.data.source_types import source_values


def get_config(source: str = "shapes:full") -> ConfigDict:
    """The curation of a source."""
    values = source_values(source)
    if values["type"] == "shapes":
        values["kind"] = "edit"
    return ConfigDict(
        {
            "source": values,
            # Side of the pictures of sources that draw them.
            "image_size": 64,
            "documents_per_shard": 256,
            "stages": {
                "decode": {},
                "resolution": {},
                "aspect": {},
                "clarity": {"side": 256},
                # No near-duplicates: one image has many edits, and a small one looks like none.
                "edit_change": {
                    "type": "scorer",
                    "scorer": {"scorer": "edit_change"},
                    "num_actors": 1,
                },
            },
            "select": {
                "rules": {
                    "min_side": (256.0, None),
                    "aspect": (None, 4.0),
                    # Of white to black 1: less is no edit that one sees, more another picture.
                    "edit_change/change": (0.002, 0.4),
                },
                "drop_duplicates": False,
                "missing": "drop",
                "shard_bytes": 512 * 2**20,
                "num_examples": 8,
            },
        }
    )
