r"""Builds records from your own files: shards that training reads fast, in any order, on any disk.

Examples:
    python launch/build_dataset.py --source=folder:photos --out=photos.rec
    python launch/build_dataset.py --source=tars:shards --out=stories.rec --num_workers=16
    python launch/build_dataset.py --source='tars:data/part-*.tar' --kind=edit --out=edits.rec
    python launch/build_dataset.py --source=parquet:laion --image_column=jpg --out=laion.rec \
        --caption_column=caption --wording_columns=short_caption,alt_text
    python launch/build_dataset.py --source=jsonl:books --out=books.rec --text_tokenizer=tok.json
    python launch/build_dataset.py --source=shapes:full --kind=edit --num_documents=10000 \
        --out=shapes.rec
    python launch/train.py --config=configs/records.py:photos.rec --tokenizer=runs/tok --workdir=run

What the sources are:
    folder:PATH    images with captions beside them: cat.jpg and cat.txt or cat.json
    images:PATH    images alone
    tars:PATH      key.json with a text, <image_1>, <image_2>, ... in it, and key-1.jpg, key-2.png;
                   or key.jpg and key.txt. PATH is a .tar, a folder of them or a pattern
    parquet:PATH   a column of image bytes and one of captions; without images: --image_column=
    jsonl:PATH     one JSON object with a text a line
    records:PATH   records, to be cut into other shards
    shapes:LEVEL   the built-in world

Image files stay as they are, bit for bit. Each is decoded once, to see that it can be
(--noverify goes without). What cannot be used is skipped, counted in the report and listed in
OUT/skipped.jsonl; above --max_bad_fraction the program stops. Killed at any time and started
again, it goes on, and the result is the same, bit for bit, with any --num_workers.
"""

import logging
import os

from absl import flags

from nextstep_jax.data.building import BuildConfig, build_records
from nextstep_jax.data.source_types import DRAWN_SOURCES, build_source, source_values
from nextstep_jax.data.sources import DocumentSource

# Worker processes import this file anew: what needs jax is imported at its end, where they do not
# come.

_SOURCE = flags.DEFINE_string("source", None, "TYPE:PATH, see above.")
_OUT = flags.DEFINE_string("out", None, "Folder of records to make, or to go on with.")
_WORKERS = flags.DEFINE_integer("num_workers", None, "Processes; by default one a core.")
_DOCUMENTS = flags.DEFINE_integer("num_documents", None, "The first so many; by default all.")
_SHARDS = flags.DEFINE_integer("num_shards", None, "Files; by default as --shard_megabytes says.")
_MEGABYTES = flags.DEFINE_float("shard_megabytes", 256.0, "About so large; better 100 to 1000.")
_BAD = flags.DEFINE_float(
    "max_bad_fraction", 0.01, "The largest share of documents that may be skipped."
)
_VERIFY = flags.DEFINE_bool("verify", True, "Decode every image once.")
_KIND = flags.DEFINE_enum(
    "kind",
    None,
    ["text", "pair", "edit", "interleaved"],
    "tars: of documents that do not say it themselves; shapes: what is drawn.",
)
_CAPTION_KEY = flags.DEFINE_string(
    "caption_key", None, "folder, tars: the caption's key in .json files; by default 'caption'."
)
_IMAGE_COLUMN = flags.DEFINE_string("image_column", None, "parquet: by default 'image'.")
_CAPTION_COLUMN = flags.DEFINE_string("caption_column", None, "parquet: by default 'caption'.")
_WORDING_COLUMNS = flags.DEFINE_list(
    "wording_columns", None, "parquet: columns with other captions of the same image."
)
_TEXT_KEY = flags.DEFINE_string("text_key", None, "jsonl: by default 'text'.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "shapes: the side of its pictures.")
_TOKENIZER = flags.DEFINE_string(
    "text_tokenizer", None, "A tokenizer.json; the report then counts text tokens."
)
_BASES = flags.DEFINE_list(
    "image_bases", [], "Such as 256,512: the report then counts the tokens of images so fitted."
)
_STRIDE = flags.DEFINE_integer("pixels_per_token", 16, "For that count.")

# Flag -> the types of sources that have such an argument.
_SOURCE_FLAGS = {
    "kind": ("tars", "shapes"),
    "caption_key": ("folder", "tars"),
    "image_column": ("parquet",),
    "caption_column": ("parquet",),
    "wording_columns": ("parquet",),
    "text_key": ("jsonl",),
    "image_size": DRAWN_SOURCES,
}
_DEFAULT_IMAGE_SIZE = 64


def read_source(text: str, arguments: dict[str, object]) -> DocumentSource:
    """The source of --source and of those flags that are given.

    Raises:
        ValueError: A flag that is not for this type of source; or see `build_source`.
    """
    values = source_values(text)
    for name, value in arguments.items():
        types = _SOURCE_FLAGS[name]
        if values["type"] not in types:
            raise ValueError(f"--{name} is for {' and '.join(types)}, not for --source={text}")
        # An empty column is none.
        values[name] = None if name == "image_column" and not value else value
    return build_source(values, _DEFAULT_IMAGE_SIZE)


def read_bases(texts: list[str]) -> tuple[int, ...]:
    """The numbers of --image_bases.

    Raises:
        ValueError: One of them is no number.
    """
    if not all(text.strip().isdigit() for text in texts):
        raise ValueError(f"--image_bases={','.join(texts)} must be numbers such as 256,512")
    return tuple(int(text) for text in texts)


def main(argv: list[str]) -> None:
    """Builds what the flags say."""
    del argv
    config = BuildConfig(
        num_documents=_DOCUMENTS.value,
        num_shards=_SHARDS.value,
        shard_megabytes=_MEGABYTES.value,
        verify=_VERIFY.value,
        text_tokenizer=_TOKENIZER.value,
        image_bases=read_bases(_BASES.value),
        pixels_per_token=_STRIDE.value,
    )
    given = {name: flags.FLAGS[name].value for name in _SOURCE_FLAGS}
    source = read_source(
        _SOURCE.value, {name: value for name, value in given.items() if value is not None}
    )
    logging.info("%s: %d documents", _SOURCE.value, len(source))
    report = build_records(
        source,
        config,
        _OUT.value,
        num_workers=_WORKERS.value or len(os.sched_getaffinity(0)),
        max_bad_fraction=_BAD.value,
        progress=True,
    )
    print(report.as_text())
    print(f"written to {_OUT.value}")


if __name__ == "__main__":
    from nextstep_jax.training.logs import run_program

    flags.mark_flags_as_required(["source", "out"])
    run_program(main)
