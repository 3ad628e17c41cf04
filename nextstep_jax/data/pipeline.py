"""The data pipeline: sources of documents in, packed batches out, resumable at any batch.

    source -> shuffle -> repeat -> lay out       of every source, by position
    -> mix by weight -> pack into rows           of every virtual stream (`data/streams.py`)
    -> batch of the process's streams -> ready ahead

NextStep-1 (arXiv 2508.10711) mixes text, captioned images, image-to-image and interleaved
documents by the weights of its Table 1. The global batch of step s is a function of the seed and
s: rows come from `num_streams` virtual streams, a fixed number of each, in the order of the
streams. A process owns neighbouring streams and with them neighbouring rows; how many processes
there are, and how many threads read, has no effect. State is kept by stream, so that a run
stopped on four processes goes on with two. It only fits the pipeline that made it, so that
`pipeline_fingerprint` is stored beside it and compared by `check_fingerprint` before it is used.
"""

import concurrent.futures
import dataclasses
import functools
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grain

from nextstep_jax.data.arrangement import LayoutConfig
from nextstep_jax.data.collate import CollateConfig, collate
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.mixture import check_weights
from nextstep_jax.data.packing import PackingConfig
from nextstep_jax.data.schema import Batch
from nextstep_jax.data.sources import DocumentSource, source_fingerprint
from nextstep_jax.data.statistics import JUDGED, JUDGED_BAD, Counts, add_counts, no_counts
from nextstep_jax.data.streams import Reader, Stream
from nextstep_jax.data.text_tokenizer import TextTokenizer
from nextstep_jax.data.tolerance import check_share
from nextstep_jax.models.config import NextStepConfig

# Counts up when the same config would give other batches than before.
_FORMAT = 2

# Fields of DataConfig that change how fast batches come or when a run stops, but not its batches.
_SPEED_FIELDS = ("num_threads", "prefetch", "max_bad_fraction")

# Documents read ahead for each thread: enough to hide one slow file, few enough to hold in memory.
_READ_AHEAD_PER_THREAD = 16


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run's batches look like. Values that the paper does not give are ours.

    Attributes:
        row_length: Tokens of a row.
        rows_per_batch: Rows of the global batch, over all processes.
        num_streams: Virtual streams that the data are cut into; each gives as many rows of a
            batch. The number of processes must divide it, and it must divide `rows_per_batch`.
            None: one for every row, so that any number of processes that divides the rows will
            do.
        max_image_tokens: Most image tokens of a row; see `PackingConfig`.
        latents: Documents carry image tokens instead of pixels.
        layout: How documents become sequences.
        attend_across_documents: The released trainer's rows, without document boundaries.
        shuffle: Shuffle each source anew every epoch.
        seed: Of shuffling and layout choices.
        num_open_rows: Rows that a stream fills at the same time; see `PackingConfig`.
        least_text_piece: See `PackingConfig`.
        max_bad_fraction: The share of a source's documents that may be bad (`data/faults.py`)
            before the run stops.
        num_threads: Threads of a process that read and lay out documents; 0 does it while the
            step waits.
        prefetch: Batches that are kept ready ahead.
    """

    row_length: int
    rows_per_batch: int
    num_streams: int | None = None
    max_image_tokens: int | None = None
    latents: bool = False
    layout: LayoutConfig = dataclasses.field(default_factory=LayoutConfig)
    attend_across_documents: bool = False
    shuffle: bool = True
    seed: int = 0
    num_open_rows: int = 16
    least_text_piece: int = 64
    max_bad_fraction: float = 0.01
    num_threads: int = 2
    prefetch: int = 2

    def __post_init__(self):
        """Checks the ranges that no later stage checks."""
        least = {"rows_per_batch": 1, "num_streams": 1, "num_threads": 0, "prefetch": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name}={value} must be at least {smallest}")
        _ = self.packing
        if self.rows_per_batch % self.streams:
            raise ValueError(
                f"num_streams={self.num_streams} must divide rows_per_batch={self.rows_per_batch}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must lie in [0, 2**32)")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction} must lie in [0, 1]")

    @property
    def streams(self) -> int:
        """How many virtual streams there are."""
        return self.num_streams or self.rows_per_batch

    @property
    def packing(self) -> PackingConfig:
        """The shape of a row."""
        return PackingConfig(
            row_length=self.row_length,
            max_image_tokens=self.max_image_tokens,
            num_open_rows=self.num_open_rows,
            least_text_piece=self.least_text_piece,
        )


Sources = Mapping[str, tuple[DocumentSource, float]]


def layout_of(config: DataConfig, model_config: NextStepConfig) -> LayoutConfig:
    """The run's layout, with what follows from its rows and from the model.

    Raises:
        ValueError: A row is too short for the largest image.
    """
    layout = dataclasses.replace(config.layout, pixels_per_token=model_config.pixels_per_token)
    largest = largest_image_tokens(layout)
    around = 4  # Area token, at least one token of size string, begin and end of image.
    if largest + around > config.row_length:
        raise ValueError(
            f"row_length={config.row_length} is too short for an image of {largest} tokens"
            f" and {around} around them (image_bases={layout.image_bases})"
        )
    if config.max_image_tokens is not None and config.max_image_tokens < largest:
        raise ValueError(
            f"max_image_tokens={config.max_image_tokens} is less than the {largest} tokens of one"
            f" image (image_bases={layout.image_bases})"
        )
    if layout.max_interleaved_images is None:
        # The released trainer's rule.
        most = max(1, config.row_length // (2 * largest))
        layout = dataclasses.replace(layout, max_interleaved_images=most)
    return layout


def largest_image_tokens(layout: LayoutConfig) -> int:
    """Tokens of the largest image that a layout makes."""
    return max(height * width for height, width in layout.image_sizes) // layout.pixels_per_token**2


def make_pipeline(
    sources: Sources,
    tokenizer: TextTokenizer,
    model_config: NextStepConfig,
    config: DataConfig,
    process_index: int = 0,
    process_count: int = 1,
) -> "Pipeline":
    """The endless stream of a process's batches.

    Its elements are `schema.Batch` dicts of numpy arrays with rows_per_batch / process_count rows.
    `iter()` of it gives a `PipelineIterator`.

    Args:
        sources: Name -> (source, weight). Weights are relative numbers of documents; 0 draws
            none. The names seed the sources and are part of the fingerprint.
        tokenizer: Must agree with the model config.
        model_config: Gives the ids and the size of an image token.
        config: The shape of the batches.
        process_index: This process.
        process_count: All processes.

    Raises:
        ValueError: If sources, weights, batch size or ids do not fit; before anything is read.
    """
    _check_sources(sources)
    tokenizer.check(model_config)
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must lie in [0, {process_count})")
    if config.streams % process_count:
        raise ValueError(
            f"data.num_streams={config.streams} must be a multiple of the {process_count} processes"
        )
    layout = layout_of(config, model_config)
    readers = {
        name: Reader(name, source, tokenizer, layout, config.packing, config.seed, config.shuffle)
        for name, (source, _) in sources.items()
    }
    weights = {name: weight for name, (_, weight) in sources.items()}
    collate_config = CollateConfig(
        row_length=config.row_length,
        pad_id=tokenizer.pad_id,
        latent_dim=model_config.token_dim if config.latents else None,
        attend_across_documents=config.attend_across_documents,
    )
    each = config.streams // process_count
    own = range(process_index * each, (process_index + 1) * each)
    args = (own, readers, weights, config, collate_config)
    return Pipeline(functools.partial(PipelineIterator, *args))


class Pipeline:
    """A process's part of a run's batches; see `make_pipeline`."""

    def __init__(self, start: Callable[[], "PipelineIterator"]):
        """Holds what makes an iterator."""
        self._start = start

    def __iter__(self) -> "PipelineIterator":
        """An iterator that begins at the first batch."""
        return self._start()


class _Batches(grain.DatasetIterator):
    """Batches made in the caller's thread, as an iterator that Grain's prefetching takes."""

    def __init__(self, streams: Mapping[int, Stream], config: DataConfig, form: CollateConfig):
        super().__init__()
        self._streams, self._form = streams, form
        self._rows_each = config.rows_per_batch // config.streams

    def __next__(self) -> Batch:
        rows = [
            stream.next_row() for stream in self._streams.values() for _ in range(self._rows_each)
        ]
        return collate(rows, self._form)

    def get_state(self) -> dict[str, Any]:
        return {str(index): stream.get_state() for index, stream in self._streams.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        for index, stream in self._streams.items():
            stream.set_state(state[str(index)])


class _BatchesDataset(grain.IterDataset):
    """The dataset whose iterator is the one given."""

    def __init__(self, iterator: _Batches):
        super().__init__()
        self._iterator = iterator

    def __iter__(self) -> _Batches:
        return self._iterator


class PipelineIterator:
    """Batches, with a state that orbax saves and restores by stream.

    Attributes:
        max_bad_fraction: The share of a source's documents that may be bad.
    """

    def __init__(
        self,
        own: range,
        readers: Mapping[str, Reader],
        weights: Mapping[str, float],
        config: DataConfig,
        collate_config: CollateConfig,
    ):
        """Begins at the first batch; nothing is read until it is asked for.

        Args:
            own: The streams of this process.
            readers: Of every source, by name.
            weights: Of every source, by name.
            config: The run's.
            collate_config: The form of a batch.
        """
        self._own, self._num_streams = own, config.streams
        self._source_names = tuple(readers)
        self._pool = None
        if config.num_threads:
            self._pool = concurrent.futures.ThreadPoolExecutor(config.num_threads, "read")
        ahead = max(2, _READ_AHEAD_PER_THREAD * config.num_threads // len(own))
        self.max_bad_fraction = config.max_bad_fraction
        args = (config.streams, readers, weights, config.packing, self._judge, self._pool, ahead)
        self._streams = {index: Stream(index, *args) for index in own}
        dataset: Any = _BatchesDataset(_Batches(self._streams, config, collate_config))
        if config.prefetch:
            # A thread packs and stacks, so that the step finds its batch ready.
            dataset = grain.experimental.ThreadPrefetchIterDataset(
                dataset, prefetch_buffer_size=config.prefetch
            )
        self._iterator = iter(dataset)

    def _judge(self, source: str, error: DocumentError) -> None:
        """Stops at once where this process reads everything; else `statistics.DataReport` does."""
        if len(self._own) < self._num_streams:
            return
        counts = add_counts([stream.counts for stream in self._streams.values()])
        read, bad = counts[JUDGED][source], counts[JUDGED_BAD][source]
        check_share(source, read, bad, self.max_bad_fraction, f"({error.reason}): {error}")

    def __iter__(self) -> "PipelineIterator":
        """Itself."""
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            ValueError: Too many documents are bad, or a document does not fit the run.
        """
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The states of the process's streams after the last batch taken, as values for JSON."""
        return self._iterator.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `get_state` stood; the streams may come from several processes' states."""
        self._iterator.set_state(dict(state))

    def counts(self) -> Counts:
        """What the process's streams have read and given up to the last batch taken."""
        counts = [state["counts"] for state in self.get_state().values()]
        return add_counts([no_counts(self._source_names), *counts])

    async def save(self, directory: Any) -> Awaitable[None]:
        """Writes a file for each stream of this process; called by orbax."""
        states = self.get_state()

        async def write() -> None:
            path = await directory.await_creation()
            for index, state in states.items():
                (path / _file_name(int(index), self._num_streams)).write_text(json.dumps(state))

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        """Reads the files of this process's streams, whichever process wrote them."""

        async def read() -> None:
            paths = {i: directory / _file_name(i, self._num_streams) for i in self._own}
            self.set_state({str(i): json.loads(path.read_text()) for i, path in paths.items()})

        return read()

    def close(self) -> None:
        """Stops the threads; nothing can be asked any more."""
        self._iterator.close()
        # Else Grain closes it again while the interpreter ends, and complains.
        self._iterator = None
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _file_name(stream: int, num_streams: int) -> str:
    return f"stream-{stream:05d}-of-{num_streams:05d}.json"


def pipeline_fingerprint(
    config: DataConfig,
    sources: Sources,
    tokenizer: TextTokenizer,
    model_config: NextStepConfig,
) -> dict[str, Any]:
    """What an iterator's state depends on, as values that JSON keeps.

    Stored in a checkpoint's metadata, as a state says nothing of the pipeline that it is of.
    """
    fields = dataclasses.asdict(dataclasses.replace(config, layout=layout_of(config, model_config)))
    for name in _SPEED_FIELDS:
        del fields[name]
    fields["num_streams"] = config.streams
    return {
        "format": _FORMAT,
        **fields,
        "token_dim": model_config.token_dim,
        "tokenizer": tokenizer.fingerprint,
        _DOCUMENTS: {
            name: [source_fingerprint(source), len(source)] for name, (source, _) in sources.items()
        },
        # In order, as turns between equals depend on it.
        _WEIGHTS: {name: weight for name, (_, weight) in sources.items()},
    }


_DOCUMENTS, _WEIGHTS = "documents", "weights"


def check_fingerprint(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Checks that a saved iterator state belongs to this pipeline.

    The weights of the mixture may have changed and sources may have been added; that is logged.

    Raises:
        ValueError: Listing every field that differs.
    """
    saved, current = dict(saved), dict(current)
    before, now = saved.pop(_WEIGHTS, None), current.pop(_WEIGHTS, None)
    if _DOCUMENTS in saved and _DOCUMENTS in current:
        added = set(current[_DOCUMENTS]) - set(saved[_DOCUMENTS])
        current[_DOCUMENTS] = {k: v for k, v in current[_DOCUMENTS].items() if k not in added}
    differing = [
        f"{name}: saved {saved.get(name)!r}, now {current.get(name)!r}"
        for name in sorted({*saved, *current})
        if saved.get(name) != current.get(name)
    ]
    if differing:
        raise ValueError(
            "the checkpoint belongs to a run with other data or settings: " + "; ".join(differing)
        )
    if before != now:
        logging.warning("the weights of the sources change from %s to %s", before, now)


def _check_sources(sources: Sources) -> None:
    if not sources:
        raise ValueError("sources must name at least one source")
    for name, (source, _) in sources.items():
        if len(source) == 0:
            raise ValueError(f"source {name!r} is empty")
    check_weights({name: weight for name, (_, weight) in sources.items()})
