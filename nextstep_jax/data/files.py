"""Files of documents where users keep them: finding them, scanning them once, reading pieces.

Sources that read tars, tables and lines in place (`webdataset.py`, `tables.py`) need to know where
in a file a document lies. Finding out takes a pass over the file, whose result, a few numbers for
each document, is kept in the user's cache folder until the file changes.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import threading
import uuid
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped
from tqdm import tqdm

from nextstep_jax.data.faults import DocumentError

Scan = dict[str, Shaped[np.ndarray, "..."]]
"""What a pass over a file found: arrays by name."""

# Of smaller files the scan takes no longer than looking it up.
_SMALLEST_CACHED = 2**20
_NUM_SCANNERS = 16
# Files held open by a source; a process may open 1024 on many systems.
_MAX_OPEN = 128
# Seconds of scanning after which a progress bar appears.
_PATIENCE = 3.0


@dataclasses.dataclass(frozen=True)
class FileList:
    """Files below a folder, in the order of their names.

    Attributes:
        root: The folder.
        names: Their paths from there, with "/".
        sizes: In bytes.
    """

    root: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def path(self, number: int) -> str:
        """Where a file is."""
        return os.path.join(self.root, self.names[number])

    def fingerprint(self, *settings: Any) -> str:
        """Tells other files apart by names and sizes, wherever they lie, and other settings."""
        content = json.dumps([self.names, self.sizes, settings])
        return hashlib.blake2b(
            content.encode("utf-8", "surrogateescape"), digest_size=8
        ).hexdigest()


def list_folder(root: str | os.PathLike[str]) -> list[str]:
    """The files below a folder as sorted paths with "/"; hidden files and folders are left out.

    Hidden are names with a leading dot, among them the `._name` that macOS leaves on foreign
    disks. The order does not depend on the file system.
    """
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(folder, root)
        prefix = "" if below == "." else pathlib.Path(below).as_posix() + "/"
        found += [prefix + name for name in names if not name.startswith(".")]
    return sorted(found, key=lambda name: name.split("/"))


def printable(name: str) -> str:
    """A file name as text that can be written anywhere, what is not UTF-8 in it escaped."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def find_files(root: str | os.PathLike[str], suffix: str) -> FileList:
    """The files of one suffix: a single file, those below a folder, or those of a pattern.

    Args:
        root: A file, a folder (its sub-folders are searched too) or a pattern with `*`, `?`, `[`
            or `**`.
        suffix: Such as ".tar", small or capital letters.

    Raises:
        ValueError: There is none.
    """
    root = os.fspath(root)
    if os.path.isfile(root):
        folder, name = os.path.split(root)
        return _file_list(folder or ".", [name])
    if os.path.isdir(root):
        folder, names = root, list_folder(root)
    elif glob.has_magic(root):
        plain = root[: min(root.find(c) for c in "*?[" if c in root)]
        folder = os.path.dirname(plain) or "."
        paths = sorted(filter(os.path.isfile, glob.glob(root, recursive=True)))
        names = [pathlib.Path(os.path.relpath(path, folder)).as_posix() for path in paths]
    else:
        raise ValueError(f"{root} is neither a file nor a folder")
    names = [name for name in names if name.lower().endswith(suffix)]
    if not names:
        raise ValueError(f"{root} holds no file of the kind *{suffix}")
    return _file_list(folder, names)


def size_of_file(path: str) -> int:
    """The size of a file; -1 where there is none, as at the end of a link that leads nowhere."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _file_list(root: str, names: Sequence[str]) -> FileList:
    sizes = tuple(size_of_file(os.path.join(root, name)) for name in names)
    return FileList(root, tuple(names), sizes)


# Scanning


def cache_folder() -> pathlib.Path:
    """Where scans are kept: `$XDG_CACHE_HOME/nextstep_jax`, by default in `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(base) / "nextstep_jax" / "scans"


def scan_files(files: FileList, scan: Callable[[str], Scan], form: str) -> list[Scan]:
    """Scans every file, or looks up what an earlier scan of the same file found.

    A file is the same if its absolute path, size and time of change are.

    Args:
        files: The files.
        scan: Takes a path.
        form: Names what the scan finds; to be changed whenever that changes.
    """
    paths = [files.path(number) for number in range(len(files.names))]
    with concurrent.futures.ThreadPoolExecutor(_NUM_SCANNERS) as pool:
        found = pool.map(lambda path: _cached(path, scan, form), paths)
        # `disable=None`: no bar where nobody looks.
        bar = tqdm(found, "scan", len(paths), delay=_PATIENCE, disable=None, unit="file")
        return list(bar)


def _cached(path: str, scan: Callable[[str], Scan], form: str) -> Scan:
    status = os.stat(path)
    if status.st_size < _SMALLEST_CACHED:
        return scan(path)
    key = repr((os.path.abspath(path), status.st_size, status.st_mtime_ns, form))
    kept = cache_folder() / (hashlib.blake2b(os.fsencode(key), digest_size=16).hexdigest() + ".npz")
    try:
        with np.load(kept) as arrays:
            return dict(arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        arrays = scan(path)
    fresh = kept.with_name(f"{kept.stem}.{uuid.uuid4().hex}.tmp")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            np.savez(file, **arrays)
        fresh.rename(kept)
    except OSError:
        # A cache that cannot be written, or is full, costs the next start a scan.
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
    return arrays


# Reading


class _Handle:
    """An open file, closed when nobody holds it."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class FileReader:
    """Reads pieces of many files, by several threads at once; those not used for longest close.

    It can be pickled for another process, which opens the files anew.
    """

    def __init__(self, files: FileList):
        """Opens nothing yet."""
        self._files = files
        self._handles: collections.OrderedDict[int, _Handle] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        """Pickles without the open files."""
        return type(self), (self._files,)

    def read(self, number: int, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of a file.

        Raises:
            DocumentError: The file is not there, is shorter, or cannot be read.
        """
        name = printable(self._files.names[number])
        try:
            handle = self._handle(number)
            data = os.pread(handle.descriptor, stop - start, start)
            while len(data) < stop - start:
                # Linux reads at most 2 GiB at once, and some network disks less.
                more = os.pread(handle.descriptor, stop - start - len(data), start + len(data))
                if not more:
                    end = start + len(data)
                    raise DocumentError("unreadable", f"{name}: ends at byte {end}, before {stop}")
                data += more
        except OSError as error:
            raise DocumentError("unreadable", f"{name}: {error.strerror or error}") from error
        return data

    def _handle(self, number: int) -> _Handle:
        with self._lock:
            if number not in self._handles:
                self._handles[number] = _Handle(self._files.path(number))
            self._handles.move_to_end(number)
            if len(self._handles) > _MAX_OPEN:
                # Not closed here: another thread may be reading.
                self._handles.popitem(last=False)
            return self._handles[number]
