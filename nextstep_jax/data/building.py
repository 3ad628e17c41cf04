"""Building records: documents in any format in, a folder of shards that training reads fast out.

Every document is read, its images are decoded once to see that they can be, and it is written as
it is, image files unchanged (`data/records.py` says how). The bytes of the result depend on the
source and the settings alone, which are written there first: not on how many processes share the
work, nor on how often they are killed.

    build.json       the settings
    shard-...        the documents, cut into contiguous pieces (`data/record_writer.py`)
    skipped.jsonl    the documents that could not be used: index, reason and message of each
    index.json       what the shards hold; written when all are there
    report.json      the same for people, with the time that it took; report.txt, too

A document that cannot be used is skipped and counted by its reason. When there are more of them
than `max_bad_fraction` allows, the build stops at once and without an index, as far as it has come.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm

from nextstep_jax.data import building_workers
from nextstep_jax.data.building_workers import BuildJob, InspectConfig, skipped_path
from nextstep_jax.data.faults import DocumentError, Reason
from nextstep_jax.data.record_writer import (
    ShardWriter,
    claim_folder,
    contents_path,
    shard_range,
    write_index,
    write_json,
    write_text,
)
from nextstep_jax.data.sources import DocumentSource, source_fingerprint
from nextstep_jax.data.text_tokenizer import TextTokenizer

SETTINGS = "build.json"
SKIPPED = "skipped.jsonl"
REPORT = "report.json"
REPORT_TEXT = "report.txt"

_FORMAT = 1
# The sample from which the size of shards is estimated: so many pieces of so many documents.
_NUM_SAMPLED_PIECES = 16
_NUM_SAMPLED_DOCUMENTS = 16
_MEGABYTE = 10**6
# Seconds between two looks at what the processes have done.
_POLL_SECONDS = 0.1
_MAX_LISTED = 3
_NUM_LISTED_SIZES = 10


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """What the bytes of a build depend on, besides the source. All values are ours.

    Attributes:
        num_documents: The first so many of the source; None for all.
        num_shards: Files of the result; None for as many as `shard_megabytes` asks for.
        shard_megabytes: The size of a shard, as estimated from a sample of the documents.
        verify: Decode every image and skip the documents where that fails.
        text_tokenizer: A `tokenizer.json` whose tokens are counted; None counts none.
        image_bases: Sides of square images for which image tokens are counted; () counts none.
        pixels_per_token: Pixels along one side of an image token, for that.
    """

    num_documents: int | None = None
    num_shards: int | None = None
    shard_megabytes: float = 256.0
    verify: bool = True
    text_tokenizer: str | None = None
    image_bases: tuple[int, ...] = ()
    pixels_per_token: int = 16

    def __post_init__(self):
        """Checks the ranges."""
        object.__setattr__(self, "image_bases", tuple(self.image_bases))
        for name in ("num_documents", "num_shards", "pixels_per_token"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not self.shard_megabytes > 0:
            raise ValueError(f"shard_megabytes={self.shard_megabytes} must be positive")
        for base in self.image_bases:
            if base < 1 or base % self.pixels_per_token:
                stride = self.pixels_per_token
                raise ValueError(f"image_bases: {base} is no positive multiple of {stride}")


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """What a build has made.

    Attributes:
        index: The content of `index.json`.
        num_documents: Documents that were read, in all shards.
        num_made: Shards that this call made; the others were there.
        num_read: Documents that it read for that.
        seconds: The time that it took.
    """

    index: Mapping[str, Any]
    num_documents: int
    num_made: int
    num_read: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        index, form_sizes = self.index, self.index["images"].values()
        sizes: dict[str, int] = {}
        for counts in form_sizes:
            for size, count in counts.items():
                sizes[size] = sizes.get(size, 0) + count
        top = sorted(sizes, key=lambda size: (-sizes[size], size))[:_NUM_LISTED_SIZES]
        return {
            "documents_read": self.num_documents,
            "documents_written": index["documents"],
            "skipped": index["skipped"],
            "kinds": index["kinds"],
            "images": sum(sizes.values()),
            "image_sizes": {size: sizes[size] for size in top},
            "other_image_sizes": len(sizes) - len(top),
            "text_characters": index["text_characters"],
            "tokens": index["tokens"],
            "bytes": index["bytes"],
            "shards": len(index["shards"]),
            "shards_made_now": self.num_made,
            "seconds": round(self.seconds, 3),
            "documents_per_second": round(self.num_read / max(self.seconds, 1e-9), 1),
        }

    def as_text(self) -> str:
        """The report in lines."""
        values = self.as_dict()
        dropped = sum(values["skipped"].values())
        share = dropped / max(self.num_documents, 1)
        lines = [
            f"read       {self.num_documents} documents",
            f"written    {values['documents_written']}{_listed(values['kinds'])}",
            f"skipped    {dropped} ({share:.2%}){_listed(values['skipped'])}",
            f"images     {values['images']}{_listed(values['image_sizes'])}",
            f"text       {values['text_characters']} characters",
            f"shards     {values['shards']}, {values['bytes'] / _MEGABYTE:.1f} MB",
            f"this run   {values['shards_made_now']} shards in {self.seconds:.1f} s:"
            f" {values['documents_per_second']} documents/s",
        ]
        if values["other_image_sizes"]:
            lines[3] += f" and {values['other_image_sizes']} other sizes"
        known = {name: n for name, n in values["tokens"].items() if n is not None}
        if known:
            counted = ", ".join(f"{number} of {name}" for name, number in known.items())
            lines.insert(5, f"tokens     {counted}")
        return "\n".join(lines)


def _listed(counts: Mapping[str, int]) -> str:
    """A colon and the counts in words; nothing for no counts."""
    words = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f": {words}" if words else ""


def build_records(
    source: DocumentSource,
    config: BuildConfig,
    out: str | os.PathLike[str],
    *,
    num_workers: int = 1,
    max_bad_fraction: float = 0.01,
    progress: bool = False,
) -> BuildReport:
    """Writes the records of a source, or what is missing of them.

    Args:
        source: The documents; it has to be picklable for more than one worker.
        config: The settings.
        out: The folder, new or begun with the same settings.
        num_workers: Processes, each of which makes whole shards; 1 is this process.
        max_bad_fraction: The largest share of documents that may be skipped.
        progress: Show a progress bar.

    Raises:
        ValueError: Settings that do not fit, or differ from those that `out` was begun with; or
            too many documents cannot be used, or all. The shards that are whole stay.
        OSError: A process was killed, or the disk is full.
    """
    out = pathlib.Path(out)
    if num_workers < 1:
        raise ValueError(f"num_workers={num_workers} must be at least 1")
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction={max_bad_fraction} must lie in [0, 1]")
    num_documents = len(source) if config.num_documents is None else config.num_documents
    if not 1 <= num_documents <= len(source):
        raise ValueError(f"num_documents={num_documents}, but the source has {len(source)}")
    tokenizer = config.text_tokenizer and TextTokenizer.from_file(config.text_tokenizer)
    inspect = InspectConfig(config.verify, tokenizer, config.image_bases, config.pixels_per_token)
    settings = _settings(source, config, num_documents, tokenizer, _read_settings(out))
    claim_folder(out, SETTINGS, settings)
    began = time.monotonic()
    job = BuildJob(source, out, settings["num_shards"], num_documents, inspect)
    missing = [k for k in range(job.num_shards) if not job.shard_path(k).is_file()]
    with _Progress(job, missing, max_bad_fraction, progress) as counts:
        if missing:
            _make_shards(job, missing, min(num_workers, len(missing)), counts)
    if not any(_contents(job, shard)["documents"] for shard in range(job.num_shards)):
        raise ValueError(f"none of {num_documents} documents can be used: {counts.describe()}")
    _merge_skipped(job)
    index = write_index(out, job.num_shards, settings)
    num_read = sum(len(job.indices(shard)) for shard in missing)
    report = BuildReport(index, num_documents, len(missing), num_read, time.monotonic() - began)
    if missing or not (out / REPORT).is_file():
        # Else the times of the run that did the work are worth more.
        write_json(out / REPORT, report.as_dict())
        write_text(out / REPORT_TEXT, report.as_text() + "\n")
    for shard in range(job.num_shards):
        skipped_path(job.shard_path(shard)).unlink(missing_ok=True)
    return report


def _read_settings(out: pathlib.Path) -> dict[str, Any]:
    """The settings of a folder that was begun, as far as they can be read."""
    try:
        return dict(json.loads((out / SETTINGS).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return {}


def _settings(
    source: DocumentSource,
    config: BuildConfig,
    num_documents: int,
    tokenizer: TextTokenizer | None,
    begun: Mapping[str, Any],
) -> dict[str, Any]:
    """What the bytes of the result depend on, as JSON."""
    settings = {
        "format": _FORMAT,
        "program": "build_dataset",
        "source": source_fingerprint(source),
        "num_documents": num_documents,
        "num_shards": config.num_shards,
        "shard_megabytes": None if config.num_shards else config.shard_megabytes,
        "verify": config.verify,
        "text_tokenizer": None if tokenizer is None else tokenizer.fingerprint,
        "image_bases": list(config.image_bases),
        "pixels_per_token": config.pixels_per_token,
    }
    if config.num_shards is None:
        # Estimated once: the same settings, the same number.
        same = all(begun.get(k) == v for k, v in settings.items() if k != "num_shards")
        number = begun.get("num_shards") if same else None
        settings["num_shards"] = number or estimate_num_shards(
            source, num_documents, config.shard_megabytes
        )
    if settings["num_shards"] > num_documents:
        number = settings["num_shards"]
        raise ValueError(f"num_shards={number} is more than the {num_documents} documents")
    return settings


def estimate_num_shards(source: DocumentSource, num_documents: int, shard_megabytes: float) -> int:
    """How many shards of about that size the first documents of a source fill.

    A sample of them is written to a temporary file, as some forms of image are compressed there
    and others are not.
    """
    pieces = min(_NUM_SAMPLED_PIECES, -(-num_documents // _NUM_SAMPLED_DOCUMENTS))
    indices = [
        index
        for piece in range(pieces)
        for index in shard_range(piece, pieces, num_documents)[:_NUM_SAMPLED_DOCUMENTS]
    ]
    with tempfile.TemporaryDirectory() as folder:
        # What a file needs with nothing in it is no part of a document.
        with ShardWriter(pathlib.Path(folder) / "empty") as writer:
            pass
        overhead = writer.path.stat().st_size
        with ShardWriter(pathlib.Path(folder) / "sample") as writer:
            for index in indices:
                with contextlib.suppress(DocumentError):
                    writer.write(source[index])
        size = max(0, writer.path.stat().st_size - overhead) / len(indices)
    return max(1, min(num_documents, round(size * num_documents / (shard_megabytes * _MEGABYTE))))


# Counting


class _Progress:
    """Counts documents and those that cannot be used, shows them, and knows when it is enough."""

    def __init__(self, job: BuildJob, missing: list[int], max_bad_fraction: float, show: bool):
        self._job, self._limit = job, max_bad_fraction * job.num_documents
        self._fraction = max_bad_fraction
        kept = sorted(set(range(job.num_shards)) - set(missing))
        self._done = sum(len(job.indices(shard)) for shard in kept)
        self._bad = sum(sum(_contents(job, shard)["skipped"].values()) for shard in kept)
        self._bar = tqdm(
            total=job.num_documents,
            initial=self._done,
            unit="doc",
            desc="build",
            disable=not show,
            mininterval=0.5,
        )

    def __enter__(self) -> "_Progress":
        self.add(0, 0)
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def add(self, done: int, bad: int) -> None:
        """Counts further ones.

        Raises:
            ValueError: There are too many bad ones.
        """
        self._bad += bad
        self._bar.set_postfix_str(f"{self._bad} skipped", refresh=False)
        self._bar.update(done)
        if self._bad > self._limit:
            raise ValueError(
                f"{self._bad} of {self._job.num_documents} documents cannot be used, more than"
                f" max_bad_fraction={self._fraction} allows: {self.describe()}. All that were found"
                f" are in {self._job.out}/*{SKIPPED}; started again with a larger fraction, the"
                " program goes on with the shards that are there"
            )

    def describe(self) -> str:
        """The reasons, and the first documents."""
        entries = list(_read_skipped(self._job).values())
        reasons: dict[Reason, int] = {}
        for entry in entries:
            reasons[entry["reason"]] = reasons.get(entry["reason"], 0) + 1
        first = "; ".join(entry["message"] for entry in entries[:_MAX_LISTED])
        words = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        return f"{words} ({first}{'; ...' if len(entries) > _MAX_LISTED else ''})"


def _contents(job: BuildJob, shard: int) -> dict[str, Any]:
    return json.loads(contents_path(job.shard_path(shard)).read_text(encoding="utf-8"))


def _read_skipped(job: BuildJob) -> dict[int, dict[str, Any]]:
    """The entries of documents that were skipped, by their indices, in ascending order.

    The file of a shard counts more than the merged one, which an earlier build may have left.
    """
    paths = [skipped_path(job.shard_path(shard)) for shard in range(job.num_shards)]
    own = [shard for shard, path in enumerate(paths) if path.is_file()]
    found = {
        entry["index"]: entry
        for entry in _read_lines(job.out / SKIPPED)
        if not any(entry["index"] in job.indices(shard) for shard in own)
    }
    for shard in own:
        found |= {entry["index"]: entry for entry in _read_lines(paths[shard])}
    return dict(sorted(found.items()))


def _read_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            for line in file:
                # The last line of a shard that is being made, or was when it was killed.
                if line.endswith("\n"):
                    yield json.loads(line)


def _merge_skipped(job: BuildJob) -> None:
    entries = _read_skipped(job).values()
    write_text(job.out / SKIPPED, "".join(json.dumps(entry) + "\n" for entry in entries))


# Processes


def _make_shards(job: BuildJob, shards: list[int], num_workers: int, counts: _Progress) -> None:
    """Makes shards, in this process or in others."""
    if num_workers == 1:
        for shard in shards:
            building_workers.make_shard(job, shard, lambda bad: counts.add(1, int(bad)))
        return
    context = multiprocessing.get_context("spawn")
    shared = building_workers.Shared(context, job.num_shards)
    with concurrent.futures.ProcessPoolExecutor(
        num_workers, context, building_workers.start_worker, (job, shared)
    ) as pool:
        pending = {pool.submit(building_workers.make_shard_here, shard) for shard in shards}
        try:
            while pending:
                done, pending = concurrent.futures.wait(pending, _POLL_SECONDS)
                counts.add(*shared.take())
                for future in done:
                    future.result()
            counts.add(*shared.take())
        except concurrent.futures.BrokenExecutor as error:
            raise OSError(
                "a worker process ended before its shard was whole: it was killed, perhaps for"
                " want of memory (try a smaller num_workers); the shards made stay"
            ) from error
        finally:
            # Those that run stop at their next document, should anything have gone wrong.
            shared.stop()
            pool.shutdown(wait=True, cancel_futures=True)
