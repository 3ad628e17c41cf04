"""Writing documents to disk: shards that are whole or not there, and the index that ends it.

The files are those of `data/records.py`. The same documents give the same bytes, and a process
that is killed leaves no half shard under a final name: the work of several processes, started as
often as need be, ends in the same folder.
"""

import collections
import fcntl
import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from nextstep_jax.data.buckets import image_key
from nextstep_jax.data.faults import DocumentError, Reason
from nextstep_jax.data.images import encoded_size
from nextstep_jax.data.records import FORMAT, INDEX, encode_document, num_records
from nextstep_jax.data.schema import Document, Text

# The compression level is ours: latents shrink by a fifth, drawn pictures to almost nothing.
_WRITER_OPTIONS = "group_size:1,zstd:3"

# What tokens are counted of, where they are.
TOKEN_KINDS = ("text", "image")


class _Contents:
    """Counts what a shard holds."""

    def __init__(self):
        self._kinds, self._sums = collections.Counter(), collections.Counter()
        self._images = {form: collections.Counter() for form in ("pixels", "encoded", "latents")}
        self._latents: dict[str, Any] | None = None
        self._tokens: dict[str, int | None] = dict.fromkeys(TOKEN_KINDS)
        self._skipped = collections.Counter()
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, document: Document, record: bytes) -> None:
        """Counts a document, or raises and counts nothing."""
        self._check_latents(document)
        self._digest.update(len(record).to_bytes(8, "little") + record)
        self._kinds[document.kind] += 1
        self._sums["documents"] += 1
        for part in document.parts:
            if isinstance(part, Text):
                self._sums["text_characters"] += len(part.text)
            elif part.latents is not None:
                self._images["latents"][image_key(part.grid)] += 1
                self._sums["image_tokens"] += len(part.latents)
            elif part.pixels is not None:
                self._images["pixels"][image_key(part.pixels.shape[:2])] += 1
            else:
                self._images["encoded"][_encoded_size(part.encoded)] += 1

    def _check_latents(self, document: Document) -> None:
        found = self._latents
        for image in document.images:
            if image.latents is not None:
                form = {"dtype": image.latents.dtype.name, "token_dim": image.latents.shape[1]}
                if found not in (None, form):
                    place = f"document {document.source}/{document.id}"
                    raise ValueError(f"{place}: latents {form} among {found}")
                found = form
        self._latents = found

    def skip(self, reason: Reason) -> None:
        self._skipped[reason] += 1

    def add_tokens(self, text: int | None, image: int | None) -> None:
        for name, number in (("text", text), ("image", image)):
            if number is not None:
                self._tokens[name] = (self._tokens[name] or 0) + number

    def as_dict(self) -> dict[str, Any]:
        return {
            **{name: self._sums[name] for name in ("documents", "image_tokens", "text_characters")},
            "kinds": dict(sorted(self._kinds.items())),
            "images": {form: dict(sorted(sizes.items())) for form, sizes in self._images.items()},
            "latents": self._latents,
            "tokens": self._tokens,
            "skipped": dict(sorted(self._skipped.items())),
            "digest": self._digest.hexdigest(),
        }


def _encoded_size(encoded: bytes) -> str:
    """The size that the header of an image file names, or "unknown"."""
    try:
        return image_key(encoded_size(encoded))
    except DocumentError:
        return "unknown"


class ShardWriter:
    """Writes one shard, under its name with `.unfinished` behind it until it is whole.

    As a context manager it finishes the shard, or leaves it unfinished after an exception.
    """

    def __init__(self, path: pathlib.Path):
        """Begins anew, whatever an earlier writer has left unfinished.

        Raises:
            ValueError: Another process is writing this shard.
        """
        self.path = pathlib.Path(path)
        self._unfinished = self.path.with_name(self.path.name + ".unfinished")
        self._lock = os.open(self._unfinished, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ValueError(f"{self.path} is being written by another process") from error
        self._writer = ArrayRecordWriter(str(self._unfinished), _WRITER_OPTIONS)
        self._contents = _Contents()

    def write(self, document: Document) -> None:
        """Adds a document.

        Raises:
            ValueError: See `encode_document`; or its latents have another form than those before
                it. Nothing is added then.
        """
        record = encode_document(document)
        self._contents.add(document, record)
        self._writer.write(record)

    def skip(self, reason: Reason) -> None:
        """Counts a document that cannot be written."""
        self._contents.skip(reason)

    def add_tokens(self, text: int | None, image: int | None) -> None:
        """Counts the tokens that a document will have in training; None where nobody knows.

        Not to be mixed up with the `image_tokens` of the index, the latents that are stored.
        """
        self._contents.add_tokens(text, image)

    def finish(self) -> dict[str, Any]:
        """Brings the shard to the disk and gives it its name; returns what it holds.

        Raises:
            OSError: The file does not hold what was written: the disk may be full.
        """
        try:
            return self._finish()
        finally:
            os.close(self._lock)

    def _finish(self) -> dict[str, Any]:
        self._writer.close()
        contents = self._contents.as_dict()
        found = num_records(self._unfinished)
        if found != contents["documents"]:
            raise OSError(f"{self.path}: wrote {contents['documents']} documents, found {found}")
        os.fsync(self._lock)
        contents = {"bytes": self._unfinished.stat().st_size, **contents}
        # Before the shard has its name, so that a shard is never without it.
        write_json(contents_path(self.path), contents)
        self._unfinished.rename(self.path)
        _sync_folder(self.path.parent)
        return contents

    def abandon(self) -> None:
        """Closes the files and leaves the shard unfinished."""
        self._writer.close()
        os.close(self._lock)

    def __enter__(self) -> "ShardWriter":
        """The writer itself."""
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """Finishes or abandons."""
        if kind is None:
            self.finish()
        else:
            self.abandon()


def shard_name(index: int, num_shards: int) -> str:
    """The file name of a shard."""
    return f"shard-{index:05d}-of-{num_shards:05d}.arrayrecord"


def shard_range(shard: int, num_shards: int, num_documents: int) -> range:
    """The documents of a shard: a contiguous piece, of equal lengths up to one."""
    return range(shard * num_documents // num_shards, (shard + 1) * num_documents // num_shards)


def contents_path(shard: pathlib.Path) -> pathlib.Path:
    """The file that says what a shard holds."""
    return shard.with_suffix(".json")


def write_index(
    root: pathlib.Path, num_shards: int, made_by: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Writes the index, if all shards are there; several processes may do so at once.

    Args:
        root: The folder.
        num_shards: Shards that it is to have.
        made_by: What made the records, as JSON.

    Returns:
        The index, or None if a shard is missing.
    """
    paths = [pathlib.Path(root) / shard_name(i, num_shards) for i in range(num_shards)]
    if not all(path.is_file() for path in paths):
        return None
    shards = [{"name": path.name, **json.loads(contents_path(path).read_text())} for path in paths]
    forms = [shard["latents"] for shard in shards if shard["latents"] is not None]
    if any(form != forms[0] for form in forms):
        raise ValueError(f"the shards of {root} hold latents of different forms")
    index = {
        "format": FORMAT,
        **{
            name: sum(shard[name] for shard in shards)
            for name in ("documents", "image_tokens", "text_characters", "bytes")
        },
        "kinds": _sum_counts([shard["kinds"] for shard in shards]),
        "images": {
            form: _sum_counts([shard["images"][form] for shard in shards])
            for form in shards[0]["images"]
        },
        "latents": forms[0] if forms else None,
        # Shards of an older version lack these two.
        "tokens": {
            name: _sum_known([shard.get("tokens", {}).get(name) for shard in shards])
            for name in TOKEN_KINDS
        },
        "skipped": _sum_counts([shard.get("skipped", {}) for shard in shards]),
        "made_by": dict(made_by),
        "shards": [
            {k: shard[k] for k in ("name", "documents", "bytes", "digest")} for shard in shards
        ],
    }
    write_json(pathlib.Path(root) / INDEX, index)
    return index


def _sum_counts(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total = collections.Counter()
    for one in counts:
        total.update(one)
    return dict(sorted(total.items()))


def _sum_known(numbers: Sequence[int | None]) -> int | None:
    """The sum of those that are known, of which None is none."""
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes a file that is either whole or not there, also after a power cut."""
    write_text(path, _as_text(values))


def write_text(path: pathlib.Path, text: str) -> None:
    """As `write_json`, for any text."""
    _write_fresh(path, text).rename(path)
    _sync_folder(path.parent)


def _as_text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def create_json(path: pathlib.Path, values: Mapping[str, Any]) -> bool:
    """As `write_json`, but a file that is there stays: of several processes one creates it.

    Returns:
        Whether it was this call that did.
    """
    fresh = _write_fresh(path, _as_text(values))
    try:
        # A hard link is made at once and, unlike a rename, replaces nothing.
        os.link(fresh, path)
    except FileExistsError:
        return False
    finally:
        fresh.unlink()
    _sync_folder(path.parent)
    return True


def claim_folder(out: pathlib.Path, name: str, settings: Mapping[str, Any]) -> None:
    """Writes the settings into a new folder, or compares those that are there.

    Args:
        out: The folder.
        name: Of the file of settings, which is written before anything else.
        settings: What the bytes of the result depend on, as JSON.

    Raises:
        ValueError: The folder holds something else, or was begun with other settings.
    """
    path = out / name
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is not a folder")
    if not path.is_file():
        found = [p.name for p in out.iterdir() if p.suffix != ".tmp"] if out.is_dir() else []
        # Another process may have begun the folder in between.
        if found and not path.is_file():
            raise ValueError(f"{out} holds other things ({found[0]}, ...) and no {name}")
        out.mkdir(parents=True, exist_ok=True)
        # Of processes that are started at once, one creates the file; all compare with it.
        create_json(path, settings)
    try:
        saved = dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold settings: {error}") from error
    differing = [
        f"{key}: {saved.get(key)!r} there, {settings.get(key)!r} now"
        for key in sorted({*saved, *settings})
        if saved.get(key) != settings.get(key)
    ]
    if differing:
        raise ValueError(f"{out} was begun with other settings: " + "; ".join(differing))


def _write_fresh(path: pathlib.Path, text: str) -> pathlib.Path:
    """Writes a whole file beside `path`, on the disk and under a name that is nobody else's."""
    # Two processes, of two machines even, may write the same file; neither may rename the other's
    # half.
    fresh = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return fresh


def _sync_folder(path: pathlib.Path) -> None:
    """Makes renames in a folder lasting."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
