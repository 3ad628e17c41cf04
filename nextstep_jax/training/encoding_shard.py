"""The encoding of one shard of documents: threads that read, devices that encode, order kept.

See `training/encoding.py` for what the result is a function of. Memory is bounded: by the images
of one open group for each size and of one closed group for each size and device, by the batches
in flight, and by the encoded documents of twice the window.

Words: rows are the images of a batch, padding included.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped, UInt8

from nextstep_jax.data.buckets import Grid, Size, image_key
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.layout import LayoutConfig, fit_image
from nextstep_jax.data.record_writer import ShardWriter
from nextstep_jax.data.schema import Document, Image
from nextstep_jax.data.sources import DocumentSource
from nextstep_jax.data.tolerance import Tally
from nextstep_jax.models.vae import VAE, from_uint8
from nextstep_jax.parallel import sharding
from nextstep_jax.parallel.mesh import make_mesh

# Batches sent to the devices before the oldest is waited for: one runs, one is ready.
_IN_FLIGHT = 2


@dataclasses.dataclass
class Totals:
    """What has been done.

    Attributes:
        documents: Documents written.
        images: Images encoded.
        rows: Rows that the devices have encoded for them.
        skipped: Documents that cannot be used, by reason.
    """

    documents: int = 0
    images: int = 0
    rows: int = 0
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def padding(self) -> float:
        """The share of rows that hold no image."""
        return 1 - self.images / self.rows if self.rows else 0.0


# Reading, in threads


@dataclasses.dataclass
class Entry:
    """A document on its way: its images fitted, then their tokens one after the other.

    Attributes:
        document: As the source gives it.
        pixels: Its images, fitted; None for those that are with the devices.
        grids: The token grid of each.
        tokens: The tokens of those that are done, by the number of the image.
    """

    document: Document
    pixels: list[np.ndarray | None]
    grids: list[Grid]
    tokens: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def is_ready(self) -> bool:
        """Whether the tokens of all images are there."""
        return len(self.tokens) == len(self.pixels)

    def encoded(self) -> Document:
        """The document with latents for images."""
        slots = iter(range(len(self.grids)))
        parts = []
        for part in self.document.parts:
            if isinstance(part, Image):
                slot = next(slots)
                latents = {"latents": self.tokens[slot], "grid": self.grids[slot]}
                part = dataclasses.replace(part, pixels=None, encoded=None, **latents)
            parts.append(part)
        return dataclasses.replace(self.document, parts=tuple(parts))


def prepare(source: DocumentSource, layout: LayoutConfig, index: int) -> Entry | DocumentError:
    """Reads a document and fits its images; or says what is wrong with it.

    Raises:
        ValueError: It has latents already; names the document.
    """
    try:
        document = source[index]
    except DocumentError as error:
        return error.within(f"document {index}")
    name = f"document {document.source}/{document.id}"
    if any(image.latents is not None for image in document.images):
        raise ValueError(f"{name}: it has latents already")
    try:
        fitted = [fit_image(image, layout) for image in document.images]
    except DocumentError as error:
        return error.within(name)
    return Entry(document, [pixels for pixels, _ in fitted], [grid for _, grid in fitted])


def read_ahead(
    pool: concurrent.futures.Executor,
    prepare: Callable[[int], Entry | DocumentError],
    indices: range,
    ahead: int,
) -> Iterator[Entry | DocumentError]:
    """Entries in order, so many of them prepared before they are asked for."""
    futures: collections.deque[concurrent.futures.Future] = collections.deque()
    try:
        for index in indices:
            futures.append(pool.submit(prepare, index))
            if len(futures) > ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()


# Encoding, on the devices


class Encoder:
    """Batches of uint8 images of one size -> their tokens in the dtype of storage.

    Attributes:
        group_size: Images of one device.
        num_groups: Groups of a batch, one a device.
        mesh: The devices.
        compile_seconds: What has gone into compiling.
    """

    def __init__(
        self,
        vae: VAE,
        vae_params: Any,
        *,
        patch_size: int,
        group_size: int,
        dtype: DTypeLike,
        devices: Sequence[jax.Device],
    ):
        """Puts the parameters on the devices; a program is compiled when its size comes up."""
        self.group_size, self.num_groups = group_size, len(devices)
        self.compile_seconds = 0.0
        self.mesh = mesh = make_mesh({"data": -1}, devices)
        self._rows = sharding.batch_sharding(mesh)
        # The decoder is not needed.
        params = {"encoder": vae_params["encoder"]}
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self._programs: dict[Size, Callable] = {}

        def encode(
            params: Any, pixels: UInt8[Array, "rows height width 3"]
        ) -> Float[Array, "rows tokens token"]:
            images = from_uint8(pixels)
            tokens = vae.apply({"params": params}, images, patch_size, method="encode_tokens")
            return tokens.astype(dtype)

        # Not left to the partitioner: each device runs the program of `group_size` images, the
        # same one whatever the number of devices.
        rows = PartitionSpec(sharding.BATCH_AXES)
        specs = {"in_specs": (PartitionSpec(), rows), "out_specs": rows}
        self._encode = jax.jit(jax.shard_map(encode, mesh=mesh, **specs))

    def __call__(
        self, pixels: UInt8[np.ndarray, "rows height width 3"]
    ) -> Shaped[Array, "rows tokens token"]:
        """Sends a batch off; the result is not waited for."""
        size = (pixels.shape[1], pixels.shape[2])
        if size not in self._programs:
            began = time.monotonic()
            form = jax.ShapeDtypeStruct(pixels.shape, pixels.dtype, sharding=self._rows)
            self._programs[size] = self._encode.lower(self._params, form).compile()
            seconds = time.monotonic() - began
            self.compile_seconds += seconds
            logging.info("compiled the encoder of %s in %.1f s", image_key(size), seconds)
        return self._programs[size](self._params, jax.device_put(pixels, self._rows))


@dataclasses.dataclass
class _Group:
    """Images of one size that one device encodes at once: (entry, its image's number)."""

    first: int
    images: list[tuple[Entry, int]] = dataclasses.field(default_factory=list)


class ShardEncoding:
    """The encoding of one shard.

    Images wait in the open group of their size; closed groups wait for one group a device; sent
    batches wait for their results; documents wait for those before them. Only the first of these
    decides about bits, and it knows nothing but the order of the documents.
    """

    def __init__(
        self,
        encoder: Encoder,
        writer: ShardWriter,
        window: int,
        totals: Totals,
        tally: Tally,
        on_write: Callable[[int], None],
    ):
        """Begins a shard.

        Args:
            encoder: The devices.
            writer: The shard.
            window: See `EncodingConfig`.
            totals: Counted up.
            tally: Judges the share of bad documents, over all shards.
            on_write: Called with the number of documents that have just been written or skipped.
        """
        self._encoder, self._writer, self._window = encoder, writer, window
        self._totals, self._tally, self._on_write = totals, tally, on_write
        self._open: dict[Size, _Group] = {}
        self._closed: dict[Size, list[_Group]] = collections.defaultdict(list)
        self._sent: collections.deque[tuple[jax.Array, list[_Group]]] = collections.deque()
        self._entries: collections.deque[Entry] = collections.deque()

    def encode(self, entries: Iterator[Entry | DocumentError]) -> None:
        """Encodes and writes all documents of the shard but the bad ones.

        Raises:
            ValueError: Too many documents are bad, or latents are not finite.
        """
        for number, entry in enumerate(entries):
            self._close_old(number)
            if isinstance(entry, DocumentError):
                self._skip(entry)
                continue
            self._tally.read()
            self._entries.append(entry)
            for slot, pixels in enumerate(entry.pixels):
                size = (pixels.shape[0], pixels.shape[1])
                group = self._open.setdefault(size, _Group(number))
                group.images.append((entry, slot))
                if len(group.images) == self._encoder.group_size:
                    self._close(size)
            self._write_ready()
        for size in list(self._open):
            self._close(size)
        for size in list(self._closed):
            self._send(size)
        while self._sent:
            self._receive()

    def _skip(self, error: DocumentError) -> None:
        self._tally.read(error)
        self._writer.skip(error.reason)
        self._totals.skipped[error.reason] += 1
        self._on_write(1)

    def _close_old(self, number: int) -> None:
        """Lets no group wait for ever, neither for images nor for other groups."""
        for size, group in list(self._open.items()):
            if number - group.first >= self._window:
                self._close(size)
        for size, groups in list(self._closed.items()):
            # Twice, as the group may have been closed by its age.
            if number - groups[0].first >= 2 * self._window:
                self._send(size)

    def _close(self, size: Size) -> None:
        self._closed[size].append(self._open.pop(size))
        if len(self._closed[size]) == self._encoder.num_groups:
            self._send(size)

    def _send(self, size: Size) -> None:
        """Sends the closed groups of a size, one to a device; devices that get none see black."""
        groups = self._closed.pop(size)
        group_size = self._encoder.group_size
        pixels = np.zeros((self._encoder.num_groups * group_size, *size, 3), np.uint8)
        for place, group in enumerate(groups):
            for row, (entry, slot) in enumerate(group.images):
                pixels[place * group_size + row] = entry.pixels[slot]
                entry.pixels[slot] = None
        self._sent.append((self._encoder(pixels), groups))
        self._totals.rows += len(pixels)
        if len(self._sent) > _IN_FLIGHT:
            self._receive()

    def _receive(self) -> None:
        """Waits for the oldest batch and gives its tokens to their documents."""
        result, groups = self._sent.popleft()
        tokens = np.asarray(result)
        for place, group in enumerate(groups):
            for row, (entry, slot) in enumerate(group.images):
                # A copy: the rest of the batch would live as long as the document.
                one = tokens[place * self._encoder.group_size + row].copy()
                if not np.isfinite(one).all():
                    document = f"{entry.document.source}/{entry.document.id}"
                    raise ValueError(
                        f"document {document}: image {slot} has latents that are not finite as"
                        f" {one.dtype}"
                    )
                entry.tokens[slot] = one
        self._totals.images += sum(len(group.images) for group in groups)
        self._write_ready()

    def _write_ready(self) -> None:
        """Writes documents in order, as far as they are ready."""
        done = 0
        while self._entries and self._entries[0].is_ready:
            try:
                self._writer.write(self._entries.popleft().encoded())
            except DocumentError as error:
                self._skip(error)
                continue
            done += 1
        if done:
            self._totals.documents += done
            self._on_write(done)
