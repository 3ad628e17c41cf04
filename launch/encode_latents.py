r"""Encodes the images of a data set once, so that training reads tokens instead of pixels.

Examples:
    python launch/encode_latents.py --source=folder:photos --tokenizer=runs/tok --out=photos.rec
    python launch/encode_latents.py --source=shapes:full --num_documents=100000 \
        --image_bases=64 --square_only --tokenizer=runs/tok --out=shapes.rec
    python launch/train.py --config=configs/records.py:photos.rec --tokenizer=runs/tok --workdir=run

A document that cannot be used is skipped, counted by reason and logged with its name; above
--max_bad_fraction of all, the program stops.

Started again, it goes on where it was killed, and the result is the same, bit for bit. Several
processes share the work if each is given the same flags and its own number: under SLURM
--process_index=$SLURM_PROCID --process_count=$SLURM_NTASKS, with a common --out. Each uses all
devices that it sees.
"""

import logging
import pathlib

import jax.numpy as jnp
from absl import flags

from nextstep_jax import runs
from nextstep_jax.data.records import LATENT_DTYPES
from nextstep_jax.data.source_types import SOURCE_TYPES, source_from_text, source_values
from nextstep_jax.data.sources import DocumentSource
from nextstep_jax.interop.pretrained import open_image_tokenizer
from nextstep_jax.models.vae import VAE
from nextstep_jax.training.encoding import EncodingConfig, encode_source
from nextstep_jax.training.logs import run_program

_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "shapes:LEVEL, photographs, folder:PATH (with captions), images:PATH (without: documents are"
    " images alone) or records:PATH (with pixels).",
)
_SPLIT = flags.DEFINE_enum(
    "split", "train", ["train", "heldout"], "Of shapes and photographs; the others have none."
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Image tokenizer: its workdir, a model directory, or a published folder."
)
_OUT = flags.DEFINE_string("out", None, "Folder of records to make, or to go on with.")
_BASES = flags.DEFINE_list("image_bases", ["256"], "Sides of the square images in pixels.")
_SQUARE = flags.DEFINE_bool("square_only", False, "Crop to squares, not to 17 aspect ratios.")
_DOCUMENTS = flags.DEFINE_integer("num_documents", None, "The first so many; by default all.")
_SHARDS = flags.DEFINE_integer("num_shards", 8, "Files of the result.")
_BATCH = flags.DEFINE_integer("batch_size", 32, "Images of one device at a time.")
_WINDOW = flags.DEFINE_integer(
    "window", 4096, "Documents that an image waits for others of its size before padding."
)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", list(LATENT_DTYPES), "Of the stored latents.")
_COMPUTE = flags.DEFINE_enum(
    "compute_dtype", "float32", ["float32", "bfloat16"], "Of the encoder's convolutions."
)
_PATCH = flags.DEFINE_integer("patch_size", 2, "Latent pixels along one side of a token.")
_THREADS = flags.DEFINE_integer("num_threads", 4, "Threads that read, decode and resize.")
_BAD = flags.DEFINE_float("max_bad_fraction", 0.01, "Share of documents that may be bad.")
_INDEX = flags.DEFINE_integer("process_index", 0, "Which of the processes this is, from 0.")
_COUNT = flags.DEFINE_integer("process_count", 1, "Processes that share the work.")

_SOURCES_WITH_SPLITS = ("shapes", "photographs")

# In the checkout, shared with the other programs.
_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax"


def read_bases(texts: list[str]) -> tuple[int, ...]:
    """The numbers of --image_bases.

    Raises:
        ValueError: One of them is no number.
    """
    if not texts or not all(text.strip().isdigit() for text in texts):
        raise ValueError(f"--image_bases={','.join(texts)} must be numbers such as 256,512")
    return tuple(int(text) for text in texts)


def read_source(text: str, image_size: int, split: str) -> DocumentSource:
    """The source of --source and --split.

    Raises:
        ValueError: The source has no splits and another than "train" is asked for; or see
            `source_from_text`.
    """
    kind = source_values(text)["type"]
    if split != "train" and kind in SOURCE_TYPES and kind not in _SOURCES_WITH_SPLITS:
        known = " and ".join(_SOURCES_WITH_SPLITS)
        raise ValueError(f"--split={split}: only {known} have splits, not --source={text}")
    return source_from_text(text, image_size, split)


def main(argv: list[str]) -> None:
    """Encodes what the flags say."""
    del argv
    runs.use_compilation_cache(_CACHE)
    config = EncodingConfig(
        num_documents=_DOCUMENTS.value,
        image_bases=read_bases(_BASES.value),
        square_only=_SQUARE.value,
        patch_size=_PATCH.value,
        dtype=_DTYPE.value,
        num_shards=_SHARDS.value,
        batch_size=_BATCH.value,
        window=_WINDOW.value,
        num_threads=_THREADS.value,
        max_bad_fraction=_BAD.value,
    )
    source = read_source(_SOURCE.value, max(config.image_bases), _SPLIT.value)
    vae_config, load = open_image_tokenizer(pathlib.Path(_TOKENIZER.value))
    vae, params = VAE(vae_config, dtype=jnp.dtype(_COMPUTE.value)), load()
    report = encode_source(
        vae,
        params,
        source,
        config,
        pathlib.Path(_OUT.value),
        process_index=_INDEX.value,
        process_count=_COUNT.value,
        progress=True,
    )
    logging.info(
        "%d shards made, %d kept: %d documents with %d images at %.1f images/s, padding %.1f%%",
        *(report.shards, report.kept, report.documents, report.images),
        *(report.images_per_second, 100 * report.padding),
    )
    if report.skipped:
        logging.warning("skipped %d documents: %s", report.skipped.total(), dict(report.skipped))
    done = "written to" if report.complete else "other processes have shards to make for"
    print(f"{done} {_OUT.value}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["source", "tokenizer", "out"])
    run_program(main)
