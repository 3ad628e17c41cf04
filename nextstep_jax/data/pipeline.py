"""The data pipeline: sources of documents in, packed batches out, resumable at any batch.

    source -> shuffle -> repeat -> lay out -> every n-th for this process     (per source)
    -> mix by weight -> read ahead in threads -> pack into rows -> batch -> ready ahead

built on Grain. NextStep-1 (arXiv 2508.10711) mixes text, captioned images, image-to-image and
interleaved documents by the weights of its Table 1. The choices for a document are a function of
(seed, epoch, source name, document id), never of a thread or a process. The iterator's state is a
few integers; Grain's iterators can be saved and restored by orbax as they are. That state only
fits the pipeline that made it, so `pipeline_fingerprint` is stored beside it and compared by
`check_fingerprint` before it is used.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from nextstep_jax.data import packing
from nextstep_jax.data.layout import LayoutConfig, lay_out
from nextstep_jax.data.schema import Document, Sequence
from nextstep_jax.data.sources import DocumentSource
from nextstep_jax.data.text_tokenizer import TextTokenizer
from nextstep_jax.models.config import NextStepConfig

# Counts up when the same config would give other batches than before.
_FORMAT = 1

# Fields of DataConfig that change how fast batches come, but not which.
_SPEED_FIELDS = ("num_threads", "prefetch")

# Documents read ahead for each thread: enough to hide one slow file, few enough to hold in memory.
_READ_AHEAD_PER_THREAD = 16


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run's batches look like. Values that the paper does not give are ours.

    Attributes:
        row_length: Tokens of a row.
        rows_per_batch: Rows of the global batch, over all processes.
        max_images_per_row: Most slots for images of one size in a row; None for as many as fit
            by length. See `PackingConfig`.
        image_bases: Sides of the square bucket in pixels; see `LayoutConfig`.
        square_only: Crop every image to the square instead of the nearest aspect bucket. Every
            bucket costs slots in every row, so a set of square images should say so.
        latents: Documents carry image tokens instead of pixels.
        image_first_prob: Probability that the image of a pair stands before its caption.
        attend_across_documents: The released trainer's rows, without document boundaries.
        shuffle: Shuffle each source anew every epoch.
        seed: Of shuffling, layout choices and packing.
        num_packing_bins: Rows that are open at the same time.
        num_threads: Threads that read and lay out documents; 0 does it while the step waits.
        prefetch: Batches that are kept ready ahead.
    """

    row_length: int
    rows_per_batch: int
    max_images_per_row: int | None = None
    image_bases: tuple[int, ...] = (256,)
    square_only: bool = False
    latents: bool = False
    image_first_prob: float = 0.3
    attend_across_documents: bool = False
    shuffle: bool = True
    seed: int = 0
    num_packing_bins: int = 32
    num_threads: int = 2
    prefetch: int = 2

    def __post_init__(self):
        """Checks the ranges that no later stage checks."""
        object.__setattr__(self, "image_bases", tuple(self.image_bases))
        for name, least in (("rows_per_batch", 1), ("num_threads", 0), ("prefetch", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must lie in [0, 2**32)")


Sources = Mapping[str, tuple[DocumentSource, float]]


class _LayOut(grain.experimental.MapWithIndexTransform):
    """`lay_out` with a generator that is a function of seed, epoch, source and document."""

    def __init__(
        self,
        name: str,
        num_documents: int,
        tokenizer: TextTokenizer,
        config: LayoutConfig,
        seed: int,
    ):
        self._name = name
        self._num_documents = num_documents
        self._tokenizer = tokenizer
        self._config = config
        self._seed = seed

    def map_with_index(self, index: int, element: Document) -> Sequence:
        epoch = index // self._num_documents
        key = [self._seed, epoch, _digest(self._name), _digest(element.id)]
        return lay_out(element, self._tokenizer, self._config, np.random.default_rng(key))


def make_pipeline(
    sources: Sources,
    tokenizer: TextTokenizer,
    model_config: NextStepConfig,
    config: DataConfig,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """The endless stream of a process's batches.

    Its elements are `schema.Batch` dicts of numpy arrays with rows_per_batch / process_count rows.
    `iter()` of it gives an iterator with `get_state` and `set_state`, which orbax also saves and
    restores. Each source is split over the processes before the mixture, so every process sees
    the same proportions.

    Args:
        sources: Name -> (source, weight). Weights are relative numbers of documents. The names
            seed the sources and are part of the fingerprint.
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
    if config.rows_per_batch % process_count:
        raise ValueError(
            f"rows_per_batch={config.rows_per_batch} must be a multiple of the "
            f"{process_count} processes"
        )
    layout_config, packing_config = stage_configs(config, tokenizer, model_config)
    components = []
    for name, (source, _) in sources.items():
        dataset = grain.MapDataset.source(source)
        if config.shuffle:
            dataset = dataset.shuffle(seed=_digest(f"{config.seed}/{name}"))
        dataset = dataset.repeat()
        layout = _LayOut(name, len(source), tokenizer, layout_config, config.seed)
        dataset = dataset.map_with_index(layout)
        components.append(dataset[process_index::process_count])
    weights = [weight for _, weight in sources.values()]
    mixed = grain.MapDataset.mix(components, weights)
    options = grain.ReadOptions(
        num_threads=config.num_threads,
        prefetch_buffer_size=config.num_threads * _READ_AHEAD_PER_THREAD,
    )
    rows = packing.pack(mixed.to_iter_dataset(options), packing_config)
    batches = rows.batch(config.rows_per_batch // process_count, drop_remainder=True)
    if config.prefetch:
        # One more thread packs and stacks, so that the step finds its batch ready.
        batches = grain.experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=config.prefetch
        )
    return batches


def stage_configs(
    config: DataConfig, tokenizer: TextTokenizer, model_config: NextStepConfig
) -> tuple[LayoutConfig, packing.PackingConfig]:
    """The configs of the stages, from the run's and the model's."""
    layout_config = LayoutConfig(
        image_first_prob=config.image_first_prob,
        image_bases=config.image_bases,
        square_only=config.square_only,
        pixels_per_token=model_config.pixels_per_token,
    )
    packing_config = packing.PackingConfig(
        row_length=config.row_length,
        pad_id=tokenizer.pad_id,
        image_sizes=() if config.latents else layout_config.image_sizes,
        max_images_per_row=config.max_images_per_row,
        pixels_per_token=model_config.pixels_per_token,
        latent_dim=model_config.token_dim if config.latents else None,
        num_packing_bins=config.num_packing_bins,
        seed=config.seed,
        attend_across_documents=config.attend_across_documents,
    )
    return layout_config, packing_config


def pipeline_fingerprint(
    config: DataConfig,
    sources: Sources,
    tokenizer: TextTokenizer,
    model_config: NextStepConfig,
    process_count: int = 1,
) -> dict[str, Any]:
    """What an iterator's state depends on, as values that JSON keeps.

    Stored in a checkpoint's metadata. Grain itself does not notice when a state is restored into
    another pipeline; it goes on with other data.
    """
    fields = dataclasses.asdict(config)
    for name in _SPEED_FIELDS:
        del fields[name]
    fields["image_bases"] = list(config.image_bases)
    return {
        "format": _FORMAT,
        **fields,
        "pixels_per_token": model_config.pixels_per_token,
        "token_dim": model_config.token_dim,
        "tokenizer": tokenizer.fingerprint,
        "process_count": process_count,
        # In order, as the mixture's order of turns depends on it.
        "sources": [
            [name, source_fingerprint(source), len(source), weight]
            for name, (source, weight) in sources.items()
        ],
    }


def source_fingerprint(source: DocumentSource) -> str:
    """What a source says it is, the same in every process.

    A dataclass is its fields; another object may have an attribute `fingerprint`. The repr of a
    plain object is no use: it holds its address.
    """
    if dataclasses.is_dataclass(source):
        return repr(source)
    return f"{type(source).__name__} {getattr(source, 'fingerprint', '')}".strip()


def check_fingerprint(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Checks that a saved iterator state belongs to this pipeline.

    Raises:
        ValueError: Listing every field that differs.
    """
    differing = [
        f"{name}: saved {saved.get(name)!r}, now {current.get(name)!r}"
        for name in sorted({*saved, *current})
        if saved.get(name) != current.get(name)
    ]
    if differing:
        raise ValueError(
            "the checkpoint belongs to a run with other data or settings: " + "; ".join(differing)
        )


def _check_sources(sources: Sources) -> None:
    if not sources:
        raise ValueError("sources must name at least one source")
    for name, (source, weight) in sources.items():
        if len(source) == 0:
            raise ValueError(f"source {name!r} is empty")
        if not 0 < weight < float("inf"):
            raise ValueError(f"source {name!r}: weight={weight} must be positive and finite")


def _digest(text: str) -> int:
    """32 bits of a text; unlike `hash`, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
