"""Making one shard of a build, in whatever process: read, inspect, write or skip.

Nothing here needs jax or a device, so that a worker process starts in half a second.
"""

import dataclasses
import functools
import json
import multiprocessing.connection
import os
import pathlib
import signal
import threading
from collections.abc import Callable
from typing import Any

from nextstep_jax.data import buckets, images
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.record_writer import ShardWriter, shard_name, shard_range
from nextstep_jax.data.schema import Document, Image, Text
from nextstep_jax.data.sources import DocumentSource
from nextstep_jax.data.text_tokenizer import TextTokenizer


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """What is looked at in a document before it is written; see `building.BuildConfig`.

    Attributes:
        verify: Decode every image.
        tokenizer: Whose tokens are counted, or None.
        image_bases: Sides of square images for which image tokens are counted, or ().
        pixels_per_token: Pixels along one side of an image token.
    """

    verify: bool = True
    tokenizer: TextTokenizer | None = None
    image_bases: tuple[int, ...] = ()
    pixels_per_token: int = 16


@dataclasses.dataclass(frozen=True)
class BuildJob:
    """A build, as its workers know it.

    Attributes:
        source: The documents.
        out: The folder.
        num_shards: Pieces that the documents are cut into.
        num_documents: The first so many of the source.
        inspect: What is looked at.
    """

    source: DocumentSource
    out: pathlib.Path
    num_shards: int
    num_documents: int
    inspect: InspectConfig

    def shard_path(self, shard: int) -> pathlib.Path:
        """The file of a shard."""
        return self.out / shard_name(shard, self.num_shards)

    def indices(self, shard: int) -> range:
        """The documents of a shard."""
        return shard_range(shard, self.num_shards, self.num_documents)


def skipped_path(shard: pathlib.Path) -> pathlib.Path:
    """The file with the skipped documents of a shard, one JSON object a line."""
    return shard.with_suffix(".skipped.jsonl")


def make_shard(job: BuildJob, shard: int, count: Callable[[bool], None]) -> None:
    """Makes a shard from its beginning.

    Args:
        job: The build.
        shard: Which one.
        count: Called after every document, with whether it was skipped; may raise to stop.

    Raises:
        ValueError: Another process is making this shard.
    """
    path = job.shard_path(shard)
    # The list is closed, and on the disk, before the shard gets its name.
    with ShardWriter(path) as writer, skipped_path(path).open("w", encoding="utf-8") as skipped:
        for index in job.indices(shard):
            try:
                document = job.source[index]
                tokens = inspect_document(document, job.inspect)
                writer.write(document)
            except DocumentError as error:
                writer.skip(error.reason)
                entry = {"index": index, "reason": error.reason, "message": str(error)}
                skipped.write(json.dumps(entry) + "\n")
                skipped.flush()
                count(True)
            else:
                writer.add_tokens(*tokens)
                count(False)
        os.fsync(skipped.fileno())


def inspect_document(document: Document, config: InspectConfig) -> tuple[int | None, int | None]:
    """Looks at a document's images and counts its tokens.

    Returns:
        The number of text tokens, without those that the layout adds, and of image tokens. None
        where they are not to be counted.

    Raises:
        DocumentError: An image cannot be decoded; names the document.
    """
    text_tokens = image_tokens = None
    try:
        if config.tokenizer is not None:
            texts = [part.text for part in document.parts if isinstance(part, Text)]
            text_tokens = sum(len(config.tokenizer.encode(text)) for text in texts)
        if config.verify or config.image_bases:
            sizes = [_image_size(image, config.verify) for image in document.images]
        if config.image_bases:
            stride = config.pixels_per_token
            image_tokens = 0
            for image, size in zip(document.images, sizes, strict=True):
                if image.latents is None:
                    size = buckets.choose_size(*size, config.image_bases, stride=stride)
                    size = (size[0] // stride, size[1] // stride)
                image_tokens += size[0] * size[1]
    except DocumentError as error:
        raise error.within(document.id) from error
    return text_tokens, image_tokens


def _image_size(image: Image, verify: bool) -> tuple[int, int]:
    """Height and width in pixels; of latents, rows and columns.

    Without `verify` the header is believed, which does not know of an EXIF rotation.
    """
    if image.latents is not None:
        return image.grid
    if verify or image.encoded is None:
        height, width, _ = images.pixels_of(image).shape
        return height, width
    return images.encoded_size(image.encoded)


# Inside a worker process


class Stopped(Exception):
    """The build is over, and this shard with it."""


class Shared:
    """What the processes of a build share: how far each shard is, and whether to go on.

    Each number has one writer and there are no locks, which a process that is killed might hold.
    """

    def __init__(self, context: Any, num_shards: int):
        """Takes a context of `multiprocessing`."""
        self._stop = context.RawValue("b", 0)
        self._done, self._bad = (context.RawArray("q", num_shards) for _ in range(2))
        self._taken = (0, 0)

    def stop(self) -> None:
        """Ends every shard at its next document."""
        self._stop.value = 1

    def count(self, shard: int, bad: bool) -> None:
        """Counts a document of a shard.

        Raises:
            Stopped: The build is over.
        """
        self._done[shard] += 1
        self._bad[shard] += bad
        if self._stop.value:
            raise Stopped

    def take(self) -> tuple[int, int]:
        """Documents, and bad ones among them, since it was asked last."""
        before, self._taken = self._taken, (sum(self._done), sum(self._bad))
        return self._taken[0] - before[0], self._taken[1] - before[1]


_JOB: tuple[BuildJob, Shared] | None = None


def start_worker(job: BuildJob, shared: Shared) -> None:
    """Prepares a worker process."""
    global _JOB
    _JOB = job, shared
    # Ctrl-C reaches the parent, which stops the others in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when its parent is gone, which kill -9 leaves no time to say."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def make_shard_here(shard: int) -> None:
    """Makes a shard of the job that this worker was started with."""
    if _JOB is None:
        raise RuntimeError("this is no worker process")
    job, shared = _JOB
    make_shard(job, shard, functools.partial(shared.count, shard))
