"""Documents in tar files, read where they lie: the format of NextStep-1 and plain WebDataset.

NextStep-1 (arXiv 2508.10711) keeps a document as `key.json`, with a text in which `<image_1>`,
`<image_2>`, ... mark the places of `key-1.jpg`, `key-2.png`, ...; tags and files may count from 0
as well. A plain pair is `key.jpg` and `key.txt` (or `key.json`), without a tag. Files of a document
need not stand side by side, but one that does is read at once.

Words: a block is 512 bytes, the unit of a tar; a member is a file in it with the blocks of its
header; a run is a piece of the tar that holds members of one document and nothing else.
"""

import functools
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from nextstep_jax.data.captions import KIND_KEYS, image_tags, place_images, read_caption
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.files import FileReader, Scan, find_files, printable, scan_files
from nextstep_jax.data.schema import KINDS, Document, Image, Kind, Part, Text
from nextstep_jax.data.sources import IMAGE_SUFFIXES

# Changes whenever the arrays of `scan_tar` mean something else.
_SCAN_FORM = "tar 1"
_BLOCK = 512
_MAGIC = slice(257, 262)
_NUMBERED = re.compile(r"(.+)-([0-9]{1,9})")
_TEXT_SUFFIXES = (".json", ".txt")


class Member(NamedTuple):
    """A file in a tar.

    Attributes:
        name: Its path, or None where the blocks are no header or the tar ends inside one.
        start: The first block of its header.
        data: Where its content begins.
        size: Bytes of its content.
        stop: The end of its last block.
    """

    name: str | None
    start: int
    data: int
    size: int
    stop: int


def walk_tar(read: Callable[[int, int], bytes], size: int) -> Iterator[Member]:
    """The files of a tar, found by stepping from header to header.

    Python's `tarfile` reads the headers but does not do the walking: it passes over damage, and
    the end of a file that was cut, in silence. Here they are members without a name, and the walk
    goes on at the next block that is a header.

    Args:
        read: (start, stop) -> so many bytes, fewer at the end.
        size: Bytes of the tar.

    Yields:
        Regular files and damage. The last one may reach beyond the end.
    """
    position = start = 0
    # What extension headers (GNU, PAX) say of the file that follows them.
    extended: dict[str, str] = {}
    damaged = False
    while position < size:
        block = read(position, min(position + _BLOCK, size))
        if len(block) == _BLOCK and block.count(0) == _BLOCK:
            # The end of this tar; another one may have been appended.
            position = start = position + _BLOCK
            extended, damaged = {}, False
            continue
        header = _parse_header(block, damaged)
        if header is None:
            if not damaged:
                yield Member(None, start, position, 0, min(position + _BLOCK, size))
            position = start = position + _BLOCK
            extended, damaged = {}, True
            continue
        damaged = False
        data = position + _BLOCK
        length = int(extended.get("size", header.size))
        if header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE):
            length = 0
        position = data + -(-length // _BLOCK) * _BLOCK
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            extended |= _read_extension(header.type, read(data, min(data + length, size)))
            continue
        if header.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            continue
        if header.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
            yield Member(extended.get("path", header.name), start, data, length, position)
        start, extended = position, {}
    if start < position and extended:
        # The tar ends between an extension header and its file.
        yield Member(None, start, position, 0, size)


def _parse_header(block: bytes, resuming: bool) -> tarfile.TarInfo | None:
    """The header in a block, or None; after damage it must have the magic number, too."""
    if resuming and block[_MAGIC] != b"ustar":
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return header if header.size >= 0 else None


def _read_extension(kind: bytes, data: bytes) -> dict[str, str]:
    """Path and size as extension headers give them."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    found = {}
    while data:
        # "27 path=some/file.jpg\n", the number counting itself and the line's end.
        length, _, _ = data.partition(b" ")
        if not re.fullmatch(b"[0-9]{1,9}", length) or not 0 < int(length) <= len(data):
            break
        line, data = data[len(length) + 1 : int(length) - 1], data[int(length) :]
        key, _, value = line.decode("utf-8", "surrogateescape").partition("=")
        # A number of more digits is no size of a file.
        if key == "path" or (key == "size" and re.fullmatch("[0-9]{1,18}", value)):
            found[key] = value
    return found


class _File(NamedTuple):
    """A file name taken apart: folder and name without suffix, and the suffix."""

    stem: str
    suffix: str


def _take_apart(name: str | None) -> _File | None:
    """The file of a member, if it is a text or an image and not hidden."""
    if name is None:
        return None
    name = os.path.normpath(name).lstrip("/")
    stem, suffix = os.path.splitext(name)
    suffix = suffix.lower()
    if suffix not in (*_TEXT_SUFFIXES, *IMAGE_SUFFIXES):
        return None
    if any(part.startswith((".", "__MACOSX")) for part in name.split("/")):
        return None
    return _File(stem, suffix)


def _key_of(file: _File, keys: Mapping[str, Any]) -> str:
    """The key of the document that a file belongs to, given those of all texts."""
    if file.stem in keys:
        return file.stem
    numbered = _NUMBERED.fullmatch(file.stem)
    if numbered and numbered[1] in keys:
        return numbered[1]
    # WebDataset's own rule: the key ends at the first dot of the name, as in key.mask.png.
    folder, slash, name = file.stem.rpartition("/")
    short = folder + slash + name.partition(".")[0]
    return short if short in keys else file.stem


def scan_tar(path: str) -> Scan:
    """Where the documents of a tar lie.

    A document is a text with the images of its key, an image without a text, or damage.

    Returns:
        "start" and "stop": int64, the runs, ordered by document. "first": int64, the first run of
        each document in the order of their first members, and the number of runs. "whole": int64
        (), how many documents are not just damage.
    """
    size = os.stat(path).st_size
    with open(path, "rb", buffering=0) as file:

        def read(start: int, stop: int) -> bytes:
            return os.pread(file.fileno(), stop - start, start)

        members = [(member, _take_apart(member.name)) for member in walk_tar(read, size)]
    keys = {entry.stem: None for _, entry in members if entry and entry.suffix in _TEXT_SUFFIXES}
    documents: dict[str | int, list[list[int]]] = {}
    for member, entry in members:
        if entry is None and member.name is not None:
            continue
        # Damage is a document of its own, under a key that no file has.
        key = member.start if entry is None else _key_of(entry, keys)
        if entry is None and member.stop >= size and documents:
            # A header that the end has cut: the file of an image that lacks its text, or another.
            last = next(reversed(documents))
            key = key if last in keys else last
        runs = documents.setdefault(key, [])
        if runs and runs[-1][1] == member.start:
            runs[-1][1] = member.stop
        else:
            runs.append([member.start, member.stop])
    runs = np.array([run for found in documents.values() for run in found], np.int64).reshape(-1, 2)
    first = np.cumsum([0, *map(len, documents.values())], dtype=np.int64)
    whole = np.array(sum(isinstance(key, str) for key in documents))
    return {"start": runs[:, 0], "stop": runs[:, 1], "first": first, "whole": whole}


class WebDatasetSource:
    """Random access to the documents of tar files.

    The headers are scanned once (see `files.scan_files`); then a document is one read, or a few if
    its files are scattered. A tar that was cut, or is damaged inside, gives all documents that are
    whole; the one at the damage raises.

    `captions.read_caption` says what a .json or .txt file gives: the text, other wordings of it,
    metadata. The text's tags are replaced by the images; without a tag, a lone image stands after
    the text. Images that no tag names are left out, and counted as `unused_images` in the
    metadata. The kind of a document is that of the key "kind" or "type" of its JSON, if it is one
    of `KINDS`, else the one that was asked for, else "text" without an image, "pair" with one
    text and one image, and "interleaved" otherwise. Of an edit the last image alone has a loss.

    Attributes:
        fingerprint: Says which documents these are, by the names and sizes of the tars.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        kind: str | None = None,
        caption_key: str | None = None,
        name: str = "tars",
    ):
        """Finds and scans the tars.

        Args:
            root: A .tar file, a folder of them (sub-folders are searched too), or a pattern.
            kind: Of documents that do not say it themselves; None tells it from what they hold.
            caption_key: The key of .json files whose string is the text; by default "caption", or
                else the .txt file, or else the first string.
            name: The `source` of the documents.

        Raises:
            ValueError: There is no tar, no text or image in any, or an unknown kind.
        """
        if kind is not None and kind not in KINDS:
            raise ValueError(f"kind={kind!r}; choose from {list(KINDS)}")
        self._files = find_files(root, ".tar")
        self._kind, self._caption_key, self._name = kind, caption_key, name
        scans = scan_files(self._files, scan_tar, _SCAN_FORM)
        self._starts = np.concatenate([scan["start"] for scan in scans])
        self._stops = np.concatenate([scan["stop"] for scan in scans])
        num_runs = np.cumsum([0, *(len(scan["start"]) for scan in scans)])
        firsts = [scan["first"][:-1] + num for scan, num in zip(scans, num_runs[:-1], strict=True)]
        self._firsts = np.concatenate([*firsts, num_runs[-1:]])
        # Documents of the first n files.
        self._ends = np.cumsum([len(first) for first in firsts])
        if not sum(scan["whole"] for scan in scans):
            raise ValueError(f"{root}: no .json or .txt text and no image in any of the tars")
        self.fingerprint = f"{name} {self._files.fingerprint(kind, caption_key)}"
        self._reader = FileReader(self._files)

    def __len__(self) -> int:
        """The number of documents."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Document:
        """The document of an index in [0, len).

        Raises:
            IndexError: There is no such document.
            DocumentError: It is damaged, has no text, lacks an image that its text names, or does
                not fit its kind; names tar and key.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a source of {len(self)} documents")
        number = int(np.searchsorted(self._ends, index, side="right"))
        runs = range(int(self._firsts[index]), int(self._firsts[index + 1]))
        tar = self._files.names[number]
        found: dict[_File, bytes] = {}
        fault = None
        for run in runs:
            start, stop = int(self._starts[run]), int(self._stops[run])
            # Never more than there is: what is there of a cut document names it.
            stop = min(stop, self._files.sizes[number])
            data = self._reader.read(number, start, stop)
            for member in walk_tar(functools.partial(_slice, data), len(data)):
                entry = _take_apart(member.name)
                if entry is not None:
                    found[entry] = data[member.data : member.data + member.size]
                if entry is None or member.data + member.size > len(data):
                    fault = f"the tar is damaged or ends at byte {start + member.start}"
        key = _document_key(found)
        place = printable(f"{tar}/{key}" if key else tar)
        if fault is not None:
            raise DocumentError("unreadable", f"{place}: {fault}")
        try:
            return self._document(place, key, found)
        except DocumentError as error:
            raise error.within(place) from error

    def _document(self, place: str, key: str, found: Mapping[_File, bytes]) -> Document:
        """The document of the files of a key."""
        texts = (found.get(_File(key, suffix)) for suffix in _TEXT_SUFFIXES)
        caption = read_caption(*texts, self._caption_key)
        metadata = dict(caption.metadata)
        said = [metadata[name] for name in KIND_KEYS if metadata.get(name) in KINDS]
        kind = said[0] if said else self._kind
        numbered, plain, lone = _images(key, found)
        tags = image_tags(caption.text)
        if len(tags) == len(plain) == 1 and not numbered:
            # One tag and key.jpg: whatever its number, it can mean nothing else.
            numbered = {tags[0]: plain[0]}
        parts = place_images(caption, numbered)
        if not tags and lone is not None and kind != "text":
            parts = (*parts, lone)
        num_images = sum(isinstance(part, Image) for part in parts)
        num_files = sum(file.suffix in IMAGE_SUFFIXES for file in found)
        num_used = len({id(part) for part in parts if isinstance(part, Image)})
        if num_used < num_files:
            metadata["unused_images"] = num_files - num_used
        num_texts = len(parts) - num_images
        if kind is None and num_files and not num_images:
            raise DocumentError(
                "bad_document", f"no tag of the text names any of {num_files} images"
            )
        if kind is None:
            alone = "pair" if (num_texts, num_images) == (1, 1) else "interleaved"
            kind = alone if num_images else "text"
        _check_kind(kind, num_texts, num_images)
        if kind == "edit":
            parts = _loss_on_last(parts)
        return Document(parts, place, self._name, kind, metadata)


def _slice(data: bytes, start: int, stop: int) -> bytes:
    return data[start:stop]


def _document_key(found: Mapping[_File, bytes]) -> str:
    """The key of the files of a document: that of the text, or the lone image's name."""
    texts = [file.stem for file in found if file.suffix in _TEXT_SUFFIXES]
    return next(iter(texts or [file.stem for file in found]), "")


def _images(
    key: str, found: Mapping[_File, bytes]
) -> tuple[dict[int, Image], list[Image], Image | None]:
    """The numbered images of a document, those without a number, and the one that stands alone."""
    numbered, plain, every = {}, [], []
    for file, data in found.items():
        if file.suffix not in IMAGE_SUFFIXES:
            continue
        image = Image(encoded=data)
        every.append(image)
        match = _NUMBERED.fullmatch(file.stem)
        if file.stem == key:
            plain.append(image)
        elif match and match[1] == key:
            numbered.setdefault(int(match[2]), image)
    alone = plain if len(plain) == 1 else every if len(every) == 1 else []
    return numbered, plain, alone[0] if alone else None


def _check_kind(kind: Kind, num_texts: int, num_images: int) -> None:
    """Refuses parts that do not fit a kind."""
    if kind in ("pair", "edit") and not num_images:
        raise DocumentError("missing_image", f"kind {kind!r} without an image")
    if kind != "interleaved" and not num_texts:
        raise DocumentError("empty_text", f"kind {kind!r} without a text")
    fits = {
        "text": num_images == 0,
        "pair": (num_texts, num_images) == (1, 1),
        "edit": num_images >= 2,
        "interleaved": num_images >= 1,
    }
    if not fits[kind]:
        found = f"{num_texts} texts and {num_images} images"
        raise DocumentError("bad_document", f"kind {kind!r} does not fit {found}")


def _loss_on_last(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """The parts with a loss on the last image and no other."""
    last = max(i for i, part in enumerate(parts) if isinstance(part, Image))
    return tuple(
        Image(encoded=part.encoded, loss=i == last) if not isinstance(part, Text) else part
        for i, part in enumerate(parts)
    )
