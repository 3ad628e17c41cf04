"""The sources that a config or a command line can name, by their types.

"shapes" is the built-in world, "photographs" are crops of those that scikit-image ships, "folder"
holds images and captions, "images" images alone, "tars", "parquet" and "jsonl" hold documents in
the formats that `data/webdataset.py` and `data/tables.py` describe, and "records" what
`launch/build_dataset.py` and `launch/encode_latents.py` write.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from nextstep_jax.data.photographs import PhotographSource
from nextstep_jax.data.records import RecordSource
from nextstep_jax.data.shapes import ShapesSource
from nextstep_jax.data.sources import DocumentSource, ImageFolderSource
from nextstep_jax.data.tables import JsonlSource, ParquetSource
from nextstep_jax.data.webdataset import WebDatasetSource

SOURCE_TYPES: dict[str, Callable[..., DocumentSource]] = {
    "shapes": functools.partial(ShapesSource, kind="pair"),
    "photographs": PhotographSource,
    "folder": ImageFolderSource,
    "images": functools.partial(ImageFolderSource, captions=False, name="images"),
    "tars": WebDatasetSource,
    "parquet": ParquetSource,
    "jsonl": JsonlSource,
    "records": RecordSource,
}

DRAWN_SOURCES = ("shapes", "photographs")
"""Sources that draw images of the size that is asked for, and have a held-out split."""


def build_source(values: Mapping[str, Any] | ConfigDict, image_size: int) -> DocumentSource:
    """A source of documents, by its "type"; the other values are arguments of the source.

    Raises:
        ValueError: An unknown type, or arguments that the source refuses.
    """
    values = dict(values)
    values.pop("weight", None)
    kind = values.pop("type")
    if kind not in SOURCE_TYPES:
        raise ValueError(f"source type {kind!r} is unknown; choose from {list(SOURCE_TYPES)}")
    if kind in DRAWN_SOURCES:
        values = {"image_size": image_size, **values}
    try:
        return SOURCE_TYPES[kind](**values)
    except TypeError as error:
        raise ValueError(f"source of type {kind!r}: {error}") from error


def source_values(text: str) -> dict[str, Any]:
    """The config of a source named on a command line: its type and, after a colon, what it needs.

    "shapes:LEVEL", "photographs", or one of "folder", "images", "tars", "parquet", "jsonl" and
    "records" with ":PATH".
    """
    kind, _, argument = text.partition(":")
    key = "level" if kind == "shapes" else "root"
    return {"type": kind, **({key: argument} if argument else {})}


def source_from_text(text: str, image_size: int, split: str = "train") -> DocumentSource:
    """The source of `source_values`.

    Args:
        text: As there.
        image_size: Side of the images that "shapes" and "photographs" draw.
        split: Of these two, "train" or "heldout".

    Raises:
        ValueError: See `build_source`.
    """
    values = source_values(text)
    if values["type"] in DRAWN_SOURCES:
        values["split"] = split
    return build_source(values, image_size)
