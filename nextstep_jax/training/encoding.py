"""Encoding a data set ahead of time: documents with pixels in, records with latents out.

NextStep-1 (arXiv 2508.10711) trains on the tokens of a frozen image tokenizer, so that each image
needs to be encoded once. Every image is fitted to its bucket by the function that the training
pipeline uses, and encoded to the mean of its tokens; all else of a document stays as it is. The
result is a folder of records (`data/records.py`) whose bytes depend on its settings alone, which
are written there first. They do not depend on how many processes share the work, on how often
they are killed, nor on how many devices a process has:

- The documents are cut into a fixed number of shards. Each is made by one process, from its
  beginning, and gets its name when it is whole.
- Inside a shard, images of one size gather, in the order of the documents, in groups of
  `batch_size`. A group that has waited for `window` documents is closed as it is.
- A group is the batch of one device, padded with black images. Which other groups the other
  devices work on at the time has no effect on it: every device runs the same program.

What a group's program computes does depend on `batch_size`, the kind of device and the version of
jax, which are therefore settings. Where a compiler chooses kernels by timing them (GPUs), the
bits of a restarted run are only the same with the same choice: keep the compilation cache.

Words: an image token covers pixels_per_token x pixels_per_token pixels; rows are the images of a
batch, padding included.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from nextstep_jax.data.layout import LayoutConfig
from nextstep_jax.data.record_writer import (
    ShardWriter,
    claim_folder,
    shard_name,
    shard_range,
    write_index,
)
from nextstep_jax.data.records import LATENT_DTYPES
from nextstep_jax.data.sources import DocumentSource, source_fingerprint
from nextstep_jax.data.tolerance import Tally
from nextstep_jax.models.config import VAEConfig, to_dict
from nextstep_jax.models.vae import VAE
from nextstep_jax.training.encoding_shard import Encoder, ShardEncoding, Totals, prepare, read_ahead
from nextstep_jax.training.pretrain import tree_digest

SETTINGS = "encoding.json"
"""The settings of the folder; written before anything else."""

_FORMAT = 1
# Documents read ahead for each thread.
_READ_AHEAD_PER_THREAD = 8


@dataclasses.dataclass(frozen=True)
class EncodingConfig:
    """How a data set is encoded. All values are ours.

    Attributes:
        num_documents: The first so many of the source; None for all.
        image_bases: Sides of the square bucket in pixels; see `LayoutConfig`.
        square_only: Crop every image to the square instead of the nearest aspect bucket.
        patch_size: Latent pixels along one side of a token.
        dtype: What the latents are stored as, one of `LATENT_DTYPES`.
        num_shards: Files of the result. A process makes whole shards, and a killed one loses at
            most the one it was at.
        batch_size: Images of one device at a time.
        window: Documents that an image waits for others of its size, before its batch is padded.
            More gives less padding and holds more in memory.
        num_threads: Threads that read, decode and resize; they change the speed alone.
        max_bad_fraction: The share of documents that may be bad (`data/faults.py`) and are left
            out, of those that a process has read since it started, before it stops; whole shards
            are not undone by it.
    """

    num_documents: int | None = None
    image_bases: tuple[int, ...] = (256,)
    square_only: bool = False
    patch_size: int = 2
    dtype: str = "bfloat16"
    num_shards: int = 8
    batch_size: int = 32
    window: int = 4096
    num_threads: int = 2
    max_bad_fraction: float = 0.01

    def __post_init__(self):
        """Checks the ranges."""
        object.__setattr__(self, "image_bases", tuple(self.image_bases))
        if self.dtype not in LATENT_DTYPES:
            raise ValueError(f"dtype={self.dtype!r}; choose from {list(LATENT_DTYPES)}")
        for name in ("num_documents", "patch_size", "num_shards", "batch_size", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.num_threads < 1:
            raise ValueError(f"num_threads={self.num_threads} must be at least 1")


@dataclasses.dataclass
class EncodingReport(Totals):
    """What one process has done, in the shards that it has made.

    Attributes:
        shards: How many.
        kept: Its shards that were there already.
        seconds: The time it took, without compiling.
        complete: Whether the whole folder is ready, with its index.
    """

    shards: int = 0
    kept: int = 0
    seconds: float = 0.0
    complete: bool = False

    @property
    def images_per_second(self) -> float:
        """Images over `seconds`."""
        return self.images / max(self.seconds, 1e-9)


def image_tokenizer_digest(config: VAEConfig, params: Any) -> str:
    """A digest of all that the latents of a tokenizer depend on.

    Tokenizers that differ in their decoders alone, as those do whose encoder was frozen, have
    the same latents and the same digest. Of the configuration those fields count that are not at
    their defaults, so that a field which a later version adds changes nothing. Parameters count
    as float32: published bfloat16 ones and their conversion to float32 have the same digest.
    """
    defaults = to_dict(VAEConfig())
    changed = {k: v for k, v in to_dict(config).items() if v != defaults[k]}
    # How a sample is drawn; the mean is taken here.
    changed.pop("deterministic", None)
    encoder = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params["encoder"])
    return tree_digest([np.frombuffer(json.dumps(changed).encode(), np.uint8), encoder])


def encode_source(
    vae: VAE,
    vae_params: Any,
    source: DocumentSource,
    config: EncodingConfig,
    out: pathlib.Path,
    *,
    process_index: int = 0,
    process_count: int = 1,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = False,
) -> EncodingReport:
    """Writes a process's share of the records of a source, or what is missing of it.

    Shard k belongs to process k % process_count. The processes do not talk to each other: the one
    that finds all shards there writes the index.

    Args:
        vae: The image tokenizer; its dtype is that of the computation.
        vae_params: Its parameters.
        source: The documents.
        config: The settings.
        out: The folder of records, new or begun with the same settings.
        process_index: This process.
        process_count: All processes that share the work.
        devices: Devices of this process; by default all local ones.
        progress: Show a progress bar.

    Raises:
        ValueError: Settings that do not fit, or differ from those that `out` was begun with (all
            are listed); more bad documents than `max_bad_fraction` allows, as the few are skipped
            and logged; or latents that are not finite.
    """
    out = pathlib.Path(out)
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must lie in [0, {process_count})")
    num_documents = _num_documents(source, config)
    layout = LayoutConfig(
        image_bases=config.image_bases,
        square_only=config.square_only,
        pixels_per_token=vae.config.downsampling * config.patch_size,
    )
    devices = list(devices if devices is not None else jax.local_devices())
    settings = _settings(vae, vae_params, source, config, num_documents, devices[0])
    claim_folder(out, SETTINGS, settings)

    report, began = EncodingReport(), time.monotonic()
    tally = Tally("encode", config.max_bad_fraction)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(config.num_threads))
        own = range(process_index, config.num_shards, process_count)
        ranges = {k: shard_range(k, config.num_shards, num_documents) for k in own}
        bar = tqdm(
            total=sum(map(len, ranges.values())), unit="doc", desc="encode", disable=not progress
        )
        stack.enter_context(contextlib.closing(bar))

        def show(num_documents: int) -> None:
            seconds = time.monotonic() - began - encoder.compile_seconds
            bar.set_postfix_str(f"{report.images / max(seconds, 1e-9):.1f} images/s", refresh=False)
            bar.update(num_documents)

        encoder = Encoder(
            vae,
            vae_params,
            patch_size=config.patch_size,
            group_size=config.batch_size,
            dtype=LATENT_DTYPES[config.dtype],
            devices=devices,
        )
        for shard, indices in ranges.items():
            path = out / shard_name(shard, config.num_shards)
            if path.is_file():
                report.kept += 1
                bar.update(len(indices))
                continue
            read = functools.partial(prepare, source, layout)
            ahead = config.num_threads * _READ_AHEAD_PER_THREAD
            with ShardWriter(path) as writer:
                run = ShardEncoding(encoder, writer, config.window, report, tally, show)
                run.encode(read_ahead(pool, read, indices, ahead))
            report.shards += 1
    report.seconds = time.monotonic() - began - encoder.compile_seconds
    report.complete = write_index(out, config.num_shards, settings) is not None
    return report


def _num_documents(source: DocumentSource, config: EncodingConfig) -> int:
    """How many documents there are to encode."""
    number = len(source) if config.num_documents is None else config.num_documents
    if number > len(source):
        raise ValueError(f"num_documents={number}, but the source has {len(source)}")
    if config.num_shards > number:
        raise ValueError(f"num_shards={config.num_shards} is more than the {number} documents")
    return number


def _settings(vae, vae_params, source, config, num_documents, device) -> dict[str, Any]:
    """What the bytes of the result depend on, as JSON."""
    fields = dataclasses.asdict(config)
    for name in ("num_threads", "max_bad_fraction"):
        del fields[name]
    return {
        "format": _FORMAT,
        "program": "encode_latents",
        "source": source_fingerprint(source),
        "image_tokenizer": image_tokenizer_digest(vae.config, vae_params),
        **fields,
        "image_bases": list(config.image_bases),
        "num_documents": num_documents,
        "compute_dtype": np.dtype(vae.dtype).name,
        "device": device.device_kind,
        "jax": jax.__version__,
    }
