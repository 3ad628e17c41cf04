"""Documents in tables, read where they lie: parquet files with images, and lines of JSON.

Parquet is read in row groups, each of which has to be decoded as a whole. So reading in a shuffled
order is slow where row groups are large (as those of many published data sets are, with hundreds
of images each): `launch/build_dataset.py` makes shards that have no such unit. JSON lines are
found by one scan and then read one by one.

Words: a row group is the piece of a parquet file that is compressed on its own.
"""

import collections
import concurrent.futures
import importlib
import itertools
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from nextstep_jax.data.captions import check_text, parse_object
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.files import FileList, FileReader, Scan, find_files, printable, scan_files
from nextstep_jax.data.schema import Document, Image, Text

# Changes whenever the arrays of `scan_lines` mean something else.
_LINES_FORM = "lines 1"
_SCAN_BYTES = 2**24
# Lines of which one must have the text's key; fewer than are worth reading a file for nothing.
_NUM_TRIED = 100
# Decoded row groups held at a time.
_NUM_GROUPS = 4
_NUM_OPENERS = 16


def _import_parquet() -> Any:
    """`pyarrow.parquet`, which only those need who have such files."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        hint = "pip install nextstep_jax[parquet]"
        raise ValueError(f"parquet files need pyarrow: {hint}") from error


def _arrow_errors() -> tuple[type[Exception], ...]:
    """What pyarrow raises for damaged files; some of its errors are Python's own."""
    return OSError, ValueError, importlib.import_module("pyarrow").ArrowException


class _RowGroups:
    """Decoded row groups, those not used for longest forgotten; several threads may ask at once.

    Two threads that ask for the same one decode it once.
    """

    def __init__(self, files: FileList, columns: Sequence[str]):
        self._files, self._columns = files, tuple(columns)
        self._lock = threading.Lock()
        self._groups: collections.OrderedDict[tuple[int, int], concurrent.futures.Future]
        self._groups = collections.OrderedDict()

    def __reduce__(self):
        return type(self), (self._files, self._columns)

    def read(self, number: int, group: int) -> Any:
        """The columns of a row group of a file, as a pyarrow table."""
        with self._lock:
            future = self._groups.get((number, group))
            if future is None:
                mine = self._groups[number, group] = concurrent.futures.Future()
            self._groups.move_to_end((number, group))
            if len(self._groups) > _NUM_GROUPS:
                self._groups.popitem(last=False)
        if future is None:
            try:
                mine.set_result(self._decode(number, group))
            except BaseException as error:
                # For those who wait now; who asks later tries again.
                mine.set_exception(error)
                with self._lock:
                    self._groups.pop((number, group), None)
            future = mine
        return future.result()

    def _decode(self, number: int, group: int) -> Any:
        with _import_parquet().ParquetFile(self._files.path(number)) as file:
            # The source is read by several threads already.
            return file.read_row_group(group, columns=list(self._columns), use_threads=False)


class ParquetSource:
    """Random access to the rows of parquet files: an image and its caption, or a text.

    The image column holds the bytes of image files, or structs {bytes, path} as Hugging Face
    datasets write them. Needs pyarrow (`pip install nextstep_jax[parquet]`). See the head of this
    file for what it costs. A file that is no parquet counts as one unreadable document.

    Attributes:
        fingerprint: Says which documents these are, by the names and sizes of the files.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_column: str | None = "image",
        caption_column: str = "caption",
        wording_columns: Sequence[str] = (),
        name: str = "parquet",
    ):
        """Reads the footers of the files.

        Args:
            root: A .parquet file, a folder of them, or a pattern.
            image_column: Holds the images; None for documents of text alone.
            caption_column: Holds the captions or texts.
            wording_columns: Hold other wordings of the caption, which get their names as keys.
            name: The `source` of the documents.

        Raises:
            ValueError: There is no such file, none that can be read, no such column, a column of
                another type, or pyarrow is missing.
        """
        self._files = find_files(root, ".parquet")
        self._image, self._caption, self._name = image_column, caption_column, name
        self._wordings = tuple(wording_columns)
        with concurrent.futures.ThreadPoolExecutor(_NUM_OPENERS) as pool:
            footers = list(pool.map(self._read_footer, range(len(self._files.names))))
        faults = [footer for footer in footers if isinstance(footer, str)]
        if len(faults) == len(footers):
            raise ValueError(f"{root}: no parquet file can be read: {faults[0]}")
        # Of a file that cannot be read one document remains, in a group that cannot either.
        sizes = [[1] if isinstance(footer, str) else footer for footer in footers]
        self._first_groups = np.cumsum([0, *map(len, sizes)])
        self._ends = np.cumsum(list(itertools.chain.from_iterable(sizes)), dtype=np.int64)
        if not len(self):
            raise ValueError(f"{root}: the parquet files have no rows")
        settings = (image_column, caption_column, self._wordings)
        self.fingerprint = f"{name} {self._files.fingerprint(*settings)}"
        columns = [self._caption, *self._wordings, *([self._image] if self._image else [])]
        self._groups = _RowGroups(self._files, columns)

    def _read_footer(self, number: int) -> list[int] | str:
        """The rows of each row group, or what is wrong with the file."""
        parquet = _import_parquet()
        path = self._files.path(number)
        try:
            with parquet.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
                groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        except _arrow_errors() as error:
            return f"{path}: {error}"
        for column in (self._caption, *self._wordings):
            self._check_column(path, schema, column, _is_text, "strings")
        if self._image is not None:
            kinds = "bytes, or structs with bytes"
            self._check_column(path, schema, self._image, _is_image, kinds)
        return groups

    def _check_column(self, path: str, schema: Any, column: str, fits: Any, kinds: str) -> None:
        if column not in schema.names:
            known = ", ".join(schema.names)
            raise ValueError(f"{path} has no column {column!r}; it has {known}")
        kind = schema.field(column).type
        if not fits(kind):
            raise ValueError(f"{path}: column {column!r} is {kind}; needed are {kinds}")

    def __len__(self) -> int:
        """The number of rows."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Document:
        """The document of an index in [0, len).

        Raises:
            IndexError: There is no such document.
            DocumentError: Its row group cannot be decoded, it has no image, or its caption is
                null or blank; names file and row, counted from 0.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a source of {len(self)} documents")
        group = int(np.searchsorted(self._ends, index, side="right"))
        number = int(np.searchsorted(self._first_groups, group, side="right")) - 1
        first_group = int(self._first_groups[number])
        row = index - (int(self._ends[group - 1]) if group else 0)
        row_of_file = index - (int(self._ends[first_group - 1]) if first_group else 0)
        place = f"{printable(self._files.names[number])}/{row_of_file}"
        try:
            table = self._groups.read(number, group - first_group)
            # Through a slice: only the one cell is looked at.
            values = table.slice(row, 1).to_pylist()[0]
        except (*_arrow_errors(), IndexError) as error:
            raise DocumentError("unreadable", f"{place}: {error}") from error
        try:
            return Document(self._parts(values), place, self._name, self._kind)
        except DocumentError as error:
            raise error.within(place) from error

    @property
    def _kind(self) -> Any:
        return "text" if self._image is None else "pair"

    def _parts(self, values: dict[str, Any]) -> tuple[Any, ...]:
        text = check_text(values[self._caption], f"the column {self._caption!r}")
        wordings = {name: values[name] for name in self._wordings if (values[name] or "").strip()}
        wordings = {self._caption: text, **wordings} if wordings else {}
        for name, wording in wordings.items():
            check_text(wording, f"the column {name!r}")
        if self._image is None:
            return (Text(text, wordings=wordings),)
        image = values[self._image]
        data = image.get("bytes") if isinstance(image, dict) else image
        if not data:
            raise DocumentError("missing_image", f"the column {self._image!r} holds no image")
        return Text(text, wordings=wordings), Image(encoded=data)


def _is_text(kind: Any) -> bool:
    types = importlib.import_module("pyarrow.types")
    kind = kind.value_type if types.is_dictionary(kind) else kind
    # A column without a single value has the type "null".
    tests = types.is_string, types.is_large_string, types.is_string_view, types.is_null
    return any(test(kind) for test in tests)


def _is_image(kind: Any) -> bool:
    types = importlib.import_module("pyarrow.types")
    if types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        return "bytes" in names and _is_image(kind.field("bytes").type)
    tests = types.is_binary, types.is_large_binary, types.is_binary_view, types.is_null
    return any(test(kind) for test in tests)


# Lines of JSON


def scan_lines(path: str) -> Scan:
    """Where the lines of a file lie that are not empty.

    Returns:
        "start" and "stop": int64, bytes of each line without its end. "line": int64, its number in
        the file, from 1.
    """
    ends, position = [], 0
    last = b"\n"
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_SCAN_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position)
            position += len(block)
            last = block[-1:]
        if last != b"\n":
            ends.append(np.array([position]))
        stop = np.concatenate([np.array([], np.int64), *ends])
        start = np.concatenate([[0], stop[:-1] + 1])[: len(stop)].astype(np.int64)
        filled = stop > start
        for line in np.flatnonzero(stop - start == 1):
            # A lone carriage return is the empty line of another system.
            filled[line] = os.pread(file.fileno(), 1, start[line]) != b"\r"
    return {"start": start[filled], "stop": stop[filled], "line": np.flatnonzero(filled) + 1}


class JsonlSource:
    """Random access to the lines of JSON files: one object a line, one text an object.

    Whatever else an object holds is metadata. The lines are found by one scan (see
    `files.scan_files`).

    Attributes:
        fingerprint: Says which documents these are, by the names and sizes of the files.
    """

    def __init__(self, root: str | os.PathLike[str], text_key: str = "text", name: str = "jsonl"):
        """Finds the files and scans them.

        Args:
            root: A .jsonl file, a folder of them, or a pattern.
            text_key: The key of the text.
            name: The `source` of the documents.

        Raises:
            ValueError: There is no such file, no line in any, or the first hundred lines have
                other keys alone.
        """
        self._files = find_files(root, ".jsonl")
        self._key, self._name = text_key, name
        scans = scan_files(self._files, scan_lines, _LINES_FORM)
        self._starts = np.concatenate([scan["start"] for scan in scans])
        self._stops = np.concatenate([scan["stop"] for scan in scans])
        self._lines = np.concatenate([scan["line"] for scan in scans])
        self._ends = np.cumsum([len(scan["start"]) for scan in scans])
        if not len(self):
            raise ValueError(f"{root}: the .jsonl files have no lines")
        self.fingerprint = f"{name} {self._files.fingerprint(text_key)}"
        self._reader = FileReader(self._files)
        self._check_key(os.fspath(root))

    def _check_key(self, root: str) -> None:
        """Refuses a key that no object has."""
        known: set[str] = set()
        for index in range(min(_NUM_TRIED, len(self))):
            try:
                known |= self._values(index)[1].keys()
            except DocumentError:
                continue
        if known and self._key not in known:
            keys = ", ".join(sorted(known))
            raise ValueError(f"{root}: the first lines have no key {self._key!r}; they have {keys}")

    def __len__(self) -> int:
        """The number of lines that are not empty."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Document:
        """The document of an index in [0, len).

        Raises:
            IndexError: There is no such document.
            DocumentError: The line is no JSON object, or its text is missing or blank; names file
                and line, counted from 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a source of {len(self)} documents")
        place, values = self._values(index)
        try:
            text = check_text(values.pop(self._key, None), f"the key {self._key!r}")
        except DocumentError as error:
            raise error.within(place) from error
        return Document((Text(text),), place, self._name, "text", values)

    def _values(self, index: int) -> tuple[str, dict[str, Any]]:
        """The name of a line, and its object."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        place = f"{printable(self._files.names[number])}/{self._lines[index]}"
        start, stop = int(self._starts[index]), int(self._stops[index])
        try:
            return place, parse_object(self._reader.read(number, start, stop))
        except DocumentError as error:
            raise error.within(place) from error
