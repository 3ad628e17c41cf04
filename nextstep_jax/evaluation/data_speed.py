"""How fast the data pipeline is: documents, images and tokens a second, by format of the source.

NextStep-1 (arXiv 2508.10711) trains on half a billion documents, so what a processor core does for
a picture counts. The whole pipeline (read, decode, resize, tokenise, pack, collate; no device)
runs in one thread on one core, beside decoding and resizing alone: plain Pillow, on the very bytes
that the pipeline has just read. The two take turns; rates and ratios are medians over the rounds.

A core's seconds are those that it spent on this process, so that other work on the machine makes
them longer only by what it takes from the caches. The files lie in memory: this is not a disk's
speed. With threads on all cores, rates are by the clock on the wall.

Formats: "folder", "tars", "parquet" and "records" hold the same JPEG files and captions, "latents"
image tokens in records, "text" lines of JSON without images. All are read in a shuffled order, but
"parquet_in_order", the same file from front to back.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as ListLike
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from nextstep_jax.data import record_writer, text_tokenizer
from nextstep_jax.data.arrangement import LayoutConfig
from nextstep_jax.data.photographs import PhotographSource
from nextstep_jax.data.pipeline import DataConfig, PipelineIterator, make_pipeline
from nextstep_jax.data.records import RecordSource
from nextstep_jax.data.schema import Batch, Document, Image, Text
from nextstep_jax.data.sources import DocumentSource, ImageFolderSource
from nextstep_jax.data.tables import JsonlSource, ParquetSource
from nextstep_jax.data.text_tokenizer import TextTokenizer
from nextstep_jax.data.webdataset import WebDatasetSource
from nextstep_jax.models.config import DECODERS, NextStepConfig

FORMATS = ("folder", "tars", "parquet", "parquet_in_order", "records", "latents", "text")

JPEG_QUALITY = 90
# Rows of a row group of the parquet file; published data sets have about as many.
ROW_GROUP = 64
_CAPTION_CHARACTERS = 300
_TEXT_CHARACTERS = 2000
_VOCAB_SIZE = 4096
# A short source costs more: to shuffle few documents Grain draws numbers until one fits.
_NUM_DOCUMENTS = 1_000_000
_STRIDE = 16


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        formats: Of `FORMATS`.
        sizes: Sides of the square bucket that images are fitted to.
        source_size: Side of the images on disk.
        num_images: Different images; they are read over and over.
        threads: Numbers of reading threads for the rates on all cores; () measures none.
        repeats: Timed rounds.
        row_length: Tokens of a row.
        num_open_rows: See `PackingConfig`.
        documents_per_round: A round takes batches until so many documents were read for it.
    """

    formats: tuple[str, ...] = FORMATS
    sizes: tuple[int, ...] = (256, 512)
    source_size: int = 512
    num_images: int = 256
    threads: tuple[int, ...] = (1, 2)
    repeats: int = 5
    row_length: int = 4096
    num_open_rows: int = 16
    documents_per_round: int = 64

    def __post_init__(self):
        """Checks the ranges."""
        for name in ("source_size", "num_images", "repeats", "documents_per_round"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.formats or not set(self.formats) <= set(FORMATS):
            raise ValueError(f"formats={list(self.formats)}; choose from {list(FORMATS)}")
        if not self.sizes or any(size < 1 or size % _STRIDE for size in self.sizes):
            raise ValueError(f"sizes={list(self.sizes)} must be multiples of {_STRIDE}")
        if any(number < 1 for number in self.threads):
            raise ValueError(f"threads={list(self.threads)} must be at least 1")


# The data


def pictures(setting: Setting) -> tuple[Iterator[UInt8[np.ndarray, "side side 3"]], str]:
    """Images that cost what photographs cost to decode, and what they are."""
    count, side = setting.num_images, setting.source_size
    if importlib.util.find_spec("skimage") is None:
        return (fractal(side, i) for i in range(count)), "fractal noise"
    source = PhotographSource(image_size=side)
    return (source[i].images[0].pixels for i in range(count)), "crops of photographs"


def fractal(side: int, seed: int) -> UInt8[np.ndarray, "{side} {side} 3"]:
    """Noise in octaves, ever weaker; a JPEG file of it is as large as that of a photograph."""
    rng = np.random.default_rng([seed])
    total = np.zeros((side, side, 3))
    grid = 2
    while grid <= side:
        for channel in range(3):
            noise = PIL.Image.fromarray(rng.standard_normal((grid, grid)).astype(np.float32))
            noise = noise.resize((side, side), PIL.Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(noise) / grid**0.5
        grid *= 2
    return np.clip(128 + 70 * total, 0, 255).astype(np.uint8)


def encode_jpeg(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """A JPEG file as cameras and websites write them."""
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def excerpts(count: int, characters: int) -> list[str]:
    """Pieces of English, of so many characters: Python's own manual, from its `help()`."""
    topics = importlib.import_module("pydoc_data.topics").topics
    manual = " ".join(" ".join(text.split()) for _, text in sorted(topics.items()))
    starts = [i * characters % (len(manual) - characters) for i in range(count)]
    return [manual[start : start + characters].strip() for start in starts]


def write_data(folder: pathlib.Path, setting: Setting) -> dict[str, Any]:
    """Writes every format that is asked for, each in a folder of its name; says what it wrote."""
    drawn, what = pictures(setting)
    with_images = set(setting.formats) - {"text", "latents"}
    files = [encode_jpeg(pixels) for pixels in drawn] if with_images else []
    captions = excerpts(setting.num_images, _CAPTION_CHARACTERS)
    texts = excerpts(setting.num_images, _TEXT_CHARACTERS)
    text_tokenizer.train_bpe(texts, _VOCAB_SIZE).save(folder / "tokenizer.json")
    writers = {
        "folder": _write_folder,
        "tars": _write_tar,
        "parquet": _write_parquet,
        "parquet_in_order": _write_parquet,
        "records": _write_records,
    }
    for name in setting.formats:
        if name in writers:
            (folder / name).mkdir()
            writers[name](folder / name, files, captions)
    if "text" in setting.formats:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "text.jsonl").write_text(lines, encoding="utf-8")
    for size in setting.sizes if "latents" in setting.formats else ():
        _write_latents(folder / f"latents{size}", size // _STRIDE, captions)
    bytes_each = statistics.mean(map(len, files)) if files else None
    return {"images": what, "jpeg_quality": JPEG_QUALITY, "mean_file_bytes": bytes_each}


def _write_folder(folder: pathlib.Path, files: list[bytes], captions: list[str]) -> None:
    for i, (data, caption) in enumerate(zip(files, captions, strict=True)):
        (folder / f"{i:06d}.jpg").write_bytes(data)
        (folder / f"{i:06d}.txt").write_text(caption, encoding="utf-8")


def _write_tar(folder: pathlib.Path, files: list[bytes], captions: list[str]) -> None:
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i, (data, caption) in enumerate(zip(files, captions, strict=True)):
            for suffix, content in (("jpg", data), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _write_parquet(folder: pathlib.Path, files: list[bytes], captions: list[str]) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError("format parquet needs pyarrow: pip install nextstep_jax[parquet]")
    pyarrow, parquet = map(importlib.import_module, ("pyarrow", "pyarrow.parquet"))
    table = pyarrow.table({"image": files, "caption": captions})
    parquet.write_table(table, folder / "00000.parquet", row_group_size=ROW_GROUP)


def _write_records(folder: pathlib.Path, files: list[bytes], captions: list[str]) -> None:
    images = (Image(encoded=data) for data in files)
    _write_shard(folder, images, captions)


def _write_latents(folder: pathlib.Path, side: int, captions: list[str]) -> None:
    folder.mkdir()
    rng = np.random.default_rng([0])
    shape = (side * side, NextStepConfig().token_dim)
    drawn = (rng.standard_normal(shape, np.float32).astype(np.float16) for _ in captions)
    _write_shard(folder, (Image(latents=one, grid=(side, side)) for one in drawn), captions)


def _write_shard(folder: pathlib.Path, images: Iterator[Image], captions: list[str]) -> None:
    with record_writer.ShardWriter(folder / record_writer.shard_name(0, 1)) as writer:
        for i, (caption, image) in enumerate(zip(captions, images, strict=True)):
            writer.write(Document((Text(caption), image), f"{i:06d}", "records", "pair"))
    record_writer.write_index(folder, 1, {"program": "benchmark"})


def open_source(folder: pathlib.Path, name: str, size: int | None) -> DocumentSource:
    """The source of a format; of latents, those of a size."""
    match name:
        case "folder":
            return ImageFolderSource(folder / name)
        case "tars":
            return WebDatasetSource(folder / name)
        case "parquet" | "parquet_in_order":
            return ParquetSource(folder / name)
        case "records":
            return RecordSource(folder / name)
        case "latents":
            return RecordSource(folder / f"latents{size}")
    return JsonlSource(folder / "text.jsonl")


class _Endless:
    """A source said to be long: its documents again and again; notes which are read."""

    def __init__(self, source: DocumentSource):
        self._source, self.read = source, []

    def __len__(self) -> int:
        return _NUM_DOCUMENTS

    def __getitem__(self, index: int) -> Document:
        index %= len(self._source)
        self.read.append(index)
        return self._source[index]


# Measuring


@dataclasses.dataclass
class Counted:
    """What some batches hold."""

    documents: int = 0
    images: int = 0
    tokens: int = 0

    def add(self, batch: Batch) -> None:
        """Counts a batch; a text that was cut counts once in every row that has a part of it."""
        self.documents += sum(map(len, batch["document_ids"]))
        self.tokens += int(np.count_nonzero(batch["segment_ids"]))
        self.images += sum(map(len, batch.get("images", {}).values()))


def decode_and_resize(encoded: bytes, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """What has to be done for a square image, by Pillow and nothing else."""
    with PIL.Image.open(io.BytesIO(encoded)) as image:
        image.load()
        if image.size != (size, size):
            image = image.resize((size, size), PIL.Image.Resampling.LANCZOS)
        return np.asarray(image)


def _pipeline(
    source: _Endless,
    name: str,
    size: int | None,
    tokenizer: TextTokenizer,
    setting: Setting,
    **fields,
) -> PipelineIterator:
    ids = {field: getattr(tokenizer, field) for field in text_tokenizer.CONFIG_FIELDS}
    decoder = dataclasses.replace(DECODERS["tiny"], vocab_size=tokenizer.vocab_size)
    model_config = NextStepConfig(decoder=decoder, bos_id=tokenizer.eos_id, **ids)
    config = DataConfig(
        row_length=setting.row_length,
        rows_per_batch=4,
        num_streams=1,
        latents=name == "latents",
        num_open_rows=setting.num_open_rows,
        layout=LayoutConfig(image_bases=(size or _STRIDE,)),
        shuffle=name != "parquet_in_order",
        **fields,
    )
    return iter(make_pipeline({name: (source, 1.0)}, tokenizer, model_config, config))


def _take(batches: PipelineIterator, source: _Endless, setting: Setting) -> Counted:
    """Takes the batches of a round."""
    counted = Counted()
    source.read.clear()
    while len(source.read) < setting.documents_per_round:
        counted.add(next(batches))
    return counted


def _alone(
    folder: pathlib.Path, name: str, size: int | None, tokenizer: TextTokenizer
) -> Callable[[ListLike[int]], None] | None:
    """The part of the work that no pipeline can do without, for documents by their index."""
    source = open_source(folder, name, size)
    if name == "latents":
        return None
    parts = [source[i].parts for i in range(len(source))]
    if name == "text":
        texts = [text.text for (text,) in parts]
        return lambda read: [tokenizer.encode(texts[i]) for i in read] and None
    files = [next(p.encoded for p in each if isinstance(p, Image)) for each in parts]
    return lambda read: [decode_and_resize(files[i], size).shape for i in read] and None


def per_core(folder: pathlib.Path, name: str, size: int | None, setting: Setting) -> dict[str, Any]:
    """Rates of the whole pipeline in this thread, beside what it cannot do without."""
    tokenizer = TextTokenizer.from_file(folder / "tokenizer.json")
    source = _Endless(open_source(folder, name, size))
    batches = _pipeline(source, name, size, tokenizer, setting, num_threads=0, prefetch=0)
    alone = _alone(folder, name, size, tokenizer)
    # The first batch fills all open rows.
    _ = next(batches), _take(batches, source, setting)
    rounds, total = [], Counted()
    for _ in range(setting.repeats):
        wall, start = time.perf_counter(), time.process_time()
        counted = _take(batches, source, setting)
        whole_s, wall_s = time.process_time() - start, time.perf_counter() - wall
        read = tuple(source.read)
        start = time.process_time()
        if alone is not None:
            alone(read)
        alone_s = time.process_time() - start
        rounds.append((counted, len(read), whole_s, wall_s, alone_s))
        for field in dataclasses.fields(Counted):
            added = getattr(total, field.name) + getattr(counted, field.name)
            setattr(total, field.name, added)
    batches.close()

    def median(rate: Callable[[Any, int, float, float, float], float]) -> float:
        return statistics.median(itertools.starmap(rate, rounds))

    figures: dict[str, Any] = {
        # Of the documents read, as that is where the work is: a round gives others than it reads.
        "documents_per_s": median(lambda c, n, whole, *_: n / whole),
        "tokens_per_s": median(lambda c, n, whole, *_: c.tokens / whole),
        "core_share": median(lambda c, n, whole, wall, _: whole / wall),
        "counted": dataclasses.asdict(total),
        "read": sum(n for _, n, *_ in rounds),
    }
    if name not in ("text", "latents"):
        figures["images_per_s"] = figures["documents_per_s"]
    if alone is not None:
        figures["alone_per_s"] = median(lambda c, n, whole, wall, alone: n / alone)
        figures["overhead"] = median(lambda c, n, whole, wall, alone: whole / alone - 1)
        figures["overhead_ms"] = median(lambda c, n, whole, wall, alone: 1e3 * (whole - alone) / n)
    return figures


def with_threads(
    folder: pathlib.Path, name: str, size: int | None, num_threads: int, setting: Setting
) -> dict[str, float]:
    """Rates by the clock on the wall with so many reading threads, and batches ready ahead."""
    tokenizer = TextTokenizer.from_file(folder / "tokenizer.json")
    source = _Endless(open_source(folder, name, size))
    batches = _pipeline(source, name, size, tokenizer, setting, num_threads=num_threads)
    # Behind the first batch, and what was made ahead meanwhile.
    for _ in range(4):
        next(batches)
    rates = []
    for _ in range(setting.repeats):
        counted, start = Counted(), time.perf_counter()
        while counted.documents < setting.documents_per_round:
            counted.add(next(batches))
        seconds = time.perf_counter() - start
        rates.append((counted.documents / seconds, counted.tokens / seconds))
    batches.close()
    documents, tokens = map(statistics.median, zip(*rates, strict=True))
    return {"documents_per_s": documents, "tokens_per_s": tokens}


@contextlib.contextmanager
def pinned() -> Iterator[int | None]:
    """Keeps this process on one core; gives its number, or None where that cannot be done."""
    if not hasattr(os, "sched_setaffinity"):
        yield None
        return
    before = os.sched_getaffinity(0)
    core = max(before)
    os.sched_setaffinity(0, {core})
    try:
        yield core
    finally:
        os.sched_setaffinity(0, before)


def measure(folder: pathlib.Path, setting: Setting) -> dict[str, Any]:
    """All figures, of data that `write_data` wrote."""
    cases = [
        (name, size)
        for name in setting.formats
        for size in (setting.sizes if name != "text" else (None,))
    ]
    figures: dict[str, Any] = {"load_average": {"before": os.getloadavg()}, "per_core": {}}
    with pinned() as core:
        for name, size in cases:
            key = name if size is None else f"{name} {size}"
            figures["per_core"][key] = per_core(folder, name, size, setting)
    figures["load_average"]["between"] = os.getloadavg()
    figures["core"] = core
    figures["all_cores"] = {
        name if size is None else f"{name} {size}": {
            f"{number} threads": with_threads(folder, name, size, number, setting)
            for number in setting.threads
        }
        for name, size in cases
        if setting.threads
    }
    figures["load_average"]["after"] = os.getloadavg()
    return figures


def run(setting: Setting) -> dict[str, Any]:
    """Makes the data in a temporary folder and measures in a fresh process.

    Raises:
        ValueError: A format needs a library that is not installed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        data = write_data(folder, setting)
        # A process of its own: its affinity is its own, and no device's threads run in it.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            figures = pool.submit(measure, folder, setting).result()
    return {"settings": dataclasses.asdict(setting), "data": data, **figures}
