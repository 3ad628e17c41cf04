"""Documents on disk: shards of records, and an index of what they hold.

    index.json                          what the folder holds, and who made it; written last
    shard-00000-of-00008.arrayrecord    documents, one a record
    shard-00000-of-00008.json           what the shard holds, from which the index is made

A record is a document (`data/schema.py`) as a msgpack map: format, id, source, kind, metadata and
the parts in order. Text is {text, loss}, and {wordings} if there are any; an image is {pixels,
shape, loss} with raw uint8, {encoded, loss} with the bytes of an image file, or {latents, dtype,
shape, grid, loss} with raw little-endian numbers. Nothing is lost on the way but the difference
between tuple and list in the metadata. Shards are ArrayRecord files with one record a chunk, for
random access; they are written by `data/record_writer.py`.

Words: a grid is (rows, columns) in image tokens; a size is (height, width) in pixels.
"""

import collections
import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import threading
from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from nextstep_jax.data.buckets import Grid, image_key
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.schema import KINDS, Document, Image, Part, Text

FORMAT = 1
"""Counts up when a reader of the older format could not read the newer."""

INDEX = "index.json"
LATENT_DTYPES: dict[str, np.dtype] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}

_SHARD = re.compile(r"shard-\d{5,}-of-\d{5,}\.arrayrecord")
# No read-ahead: documents are asked for in random order.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
# Shards held open by a source; a process may open 1024 files on many systems.
_MAX_OPEN = 128
_NUM_CHECKERS = 16
_MAX_LISTED = 10


# Documents and bytes


def encode_document(document: Document) -> bytes:
    """The record of a document.

    Raises:
        DocumentError: If the kind is none of `KINDS`, the metadata hold what JSON cannot say,
            pixels are not uint8 (height, width, 3), or latents are none of `LATENT_DTYPES` or do
            not fill their grid; names the document.
    """
    try:
        if document.kind not in KINDS:
            raise ValueError(f"kind {document.kind!r} is none of {', '.join(KINDS)}")
        record = {
            "format": FORMAT,
            "id": document.id,
            "source": document.source,
            "kind": document.kind,
            "metadata": _plain(document.metadata, "metadata"),
            "parts": [_pack_part(part) for part in document.parts],
        }
        return msgpack.packb(record)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        where = f"document {document.source}/{document.id}"
        raise DocumentError("bad_document", f"{where}: {error}") from error


def decode_document(record: bytes) -> Document:
    """The document of a record. Arrays are views of the record and cannot be written to.

    Raises:
        ValueError: If the bytes are no record of this format.
    """
    try:
        values = msgpack.unpackb(record)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise ValueError(f"not a record: {error or type(error).__name__}") from error
    if not isinstance(values, dict) or "format" not in values:
        raise ValueError("not a record: no map with a format")
    if values["format"] != FORMAT:
        raise ValueError(f"record of format {values['format']!r}, this version reads {FORMAT}")
    kind = _field(values, "kind", str)
    if kind not in KINDS:
        raise ValueError(f"record with kind {kind!r}, which is none of {', '.join(KINDS)}")
    return Document(
        parts=tuple(_unpack_part(part) for part in _field(values, "parts", list)),
        id=_field(values, "id", str),
        source=_field(values, "source", str),
        kind=kind,
        metadata=_field(values, "metadata", dict),
    )


def _plain(value: Any, where: str) -> Any:
    """Mappings as dicts and tuples as lists; what JSON cannot say is refused by its place."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; keys must be strings")
        return {key: _plain(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"{where} is a {type(value).__name__}, which JSON cannot say")


def _pack_part(part: Part) -> dict[str, Any]:
    if isinstance(part, Text):
        wordings = {"wordings": dict(part.wordings)} if part.wordings else {}
        return {"text": part.text, "loss": part.loss, **wordings}
    if part.encoded is not None:
        return {"encoded": part.encoded, "loss": part.loss}
    if part.pixels is not None:
        pixels = part.pixels
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise ValueError(
                f"pixels must be uint8 (height, width, 3), got {pixels.dtype} {pixels.shape}"
            )
        return {"pixels": pixels.tobytes(), "shape": list(pixels.shape), "loss": part.loss}
    latents, (rows, columns) = part.latents, part.grid
    if latents.dtype.name not in LATENT_DTYPES:
        raise ValueError(f"latents are {latents.dtype}, not one of {', '.join(LATENT_DTYPES)}")
    if latents.ndim != 2 or len(latents) != rows * columns:
        raise ValueError(f"latents of shape {latents.shape} do not fill grid {rows}x{columns}")
    return {
        "latents": latents.tobytes(),
        "dtype": latents.dtype.name,
        "shape": list(latents.shape),
        "grid": [rows, columns],
        "loss": part.loss,
    }


def _unpack_part(values: Any) -> Part:
    if not isinstance(values, dict):
        raise ValueError("record with a part that is no map")
    loss = _field(values, "loss", bool)
    if "text" in values:
        wordings = _field({"wordings": {}, **values}, "wordings", dict)
        if not all(isinstance(text, str) for text in wordings.values()):
            raise ValueError("record with a wording that is no text")
        return Text(_field(values, "text", str), loss, wordings)
    if "encoded" in values:
        return Image(encoded=_field(values, "encoded", bytes), loss=loss)
    if "pixels" in values:
        return Image(pixels=_array(values, "pixels", np.dtype(np.uint8), 3), loss=loss)
    name = _field(values, "dtype", str)
    if name not in LATENT_DTYPES:
        raise ValueError(f"record with latents of dtype {name!r}")
    latents = _array(values, "latents", LATENT_DTYPES[name], 2)
    rows, columns = _counts(values, "grid", 2)
    if rows * columns != len(latents):
        raise ValueError(f"record with {len(latents)} tokens for grid {rows}x{columns}")
    return Image(latents=latents, grid=(rows, columns), loss=loss)


def _field(values: Mapping[str, Any], name: str, kind: type) -> Any:
    """An entry of a record, of the type that it must have."""
    if not isinstance(values.get(name), kind):
        raise ValueError(f"record whose {name!r} is no {kind.__name__}")
    return values[name]


def _counts(values: Mapping[str, Any], name: str, length: int) -> list[int]:
    """An entry that is a list of so many positive numbers."""
    counts = _field(values, name, list)
    if len(counts) != length or not all(type(n) is int and n > 0 for n in counts):
        raise ValueError(f"record whose {name!r} is {counts}")
    return counts


def _array(values: Mapping[str, Any], name: str, dtype: np.dtype, ndim: int) -> np.ndarray:
    """An entry that holds the numbers of an array, in the shape that the part names."""
    data, shape = _field(values, name, bytes), _counts(values, "shape", ndim)
    # Not `np.prod`, which overflows on absurd shapes of damaged records.
    needed = dtype.itemsize
    for length in shape:
        needed *= length
    if len(data) != needed:
        raise ValueError(f"record whose {name!r} are {len(data)} bytes for {dtype} {shape}")
    return np.frombuffer(data, dtype).reshape(shape)


# Reading


def read_index(root: str | os.PathLike[str]) -> dict[str, Any]:
    """The index of a records folder; the shards are not looked at.

    Raises:
        ValueError: The folder has none, as it is unfinished or something else, or the index is of
            another format.
    """
    path = pathlib.Path(root) / INDEX
    if not path.is_file():
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        shards = [name for name in names if _SHARD.fullmatch(name)]
        if shards or any(name.endswith(".unfinished") for name in names):
            raise ValueError(
                f"records folder {root} is unfinished: {len(shards)} whole shards, no {INDEX};"
                " start the program that makes it again, and it goes on"
            )
        raise ValueError(f"{root} is no records folder: it has no {INDEX}")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"it is of format {index['format']!r}, this version reads {FORMAT}")
        for shard in index["shards"]:
            _ = shard["name"], shard["digest"], int(shard["documents"]), int(shard["bytes"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the index of a records folder: {error!r}") from error
    return index


class RecordSource:
    """Random access to the documents of a records folder, in the order they were written.

    It can be read by several threads at once and pickled for another process.

    Attributes:
        index: The content of `index.json`.
        fingerprint: Says which documents these are, wherever the folder lies.
    """

    def __init__(self, root: str | os.PathLike[str]):
        """Opens the folder and checks that every shard is there and whole.

        Raises:
            ValueError: It is unfinished, no records folder, or shards are not as the index says.
        """
        self._root = pathlib.Path(root)
        self.index = read_index(self._root)
        shards = self.index["shards"]
        with concurrent.futures.ThreadPoolExecutor(_NUM_CHECKERS) as pool:
            faults = [fault for fault in pool.map(self._fault, shards) if fault]
        if faults:
            more = f" and {len(faults) - _MAX_LISTED} more" if len(faults) > _MAX_LISTED else ""
            raise ValueError(
                f"records folder {self._root} is not what its {INDEX} says: "
                + "; ".join(faults[:_MAX_LISTED])
                + more
            )
        self._names = [shard["name"] for shard in shards]
        self._ends = np.cumsum([shard["documents"] for shard in shards])
        identity = [[shard["documents"], shard["digest"]] for shard in shards]
        digest = hashlib.blake2b(json.dumps([FORMAT, identity]).encode(), digest_size=16)
        self.fingerprint = digest.hexdigest()
        self._open_readers()

    def _open_readers(self) -> None:
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def _fault(self, shard: Mapping[str, Any]) -> str | None:
        path = self._root / shard["name"]
        if not path.is_file():
            return f"{shard['name']} is missing"
        if path.stat().st_size != shard["bytes"]:
            return f"{shard['name']} has {path.stat().st_size} bytes instead of {shard['bytes']}"
        found = num_records(path)
        if found != shard["documents"]:
            return f"{shard['name']} has {found} documents instead of {shard['documents']}"
        return None

    def __len__(self) -> int:
        """The number of documents."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Document:
        """The document of an index in [0, len).

        Raises:
            IndexError: There is no such document.
            DocumentError: Its record is damaged; names shard and record.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a source of {len(self)} documents")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        position = int(index - (self._ends[shard - 1] if shard else 0))
        try:
            return decode_document(self._reader(shard).read([position])[0])
        except (ValueError, RuntimeError, IndexError) as error:
            where = f"{self._root / self._names[shard]}, record {position}"
            raise DocumentError("unreadable", f"{where}: {error}") from error

    def _reader(self, shard: int) -> Any:
        """The reader of a shard; those not used for longest are let go."""
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = _open_reader(self._root / self._names[shard])
            self._readers.move_to_end(shard)
            if len(self._readers) > _MAX_OPEN:
                # Not closed: another thread may be reading. It closes when nobody holds it.
                self._readers.popitem(last=False)
            return self._readers[shard]

    def __getstate__(self) -> dict[str, Any]:
        """All but the open files."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Opens the files anew when they are needed."""
        self.__dict__.update(state)
        self._open_readers()


def check_records(
    source: RecordSource,
    name: str,
    *,
    latents: bool,
    token_dim: int,
    grids: Collection[Grid],
    image_tokenizer: str | None,
) -> None:
    """Checks that a model can be trained on records.

    Args:
        source: The records.
        name: Their name in the config, for the message.
        latents: Whether the run takes latents or pixels.
        token_dim: Values of the model's image tokens.
        grids: The grids of the run's image sizes.
        image_tokenizer: The digest of the run's image tokenizer (`training.encoding`), or None to
            take any.

    Raises:
        ValueError: Listing all that does not fit.
    """
    index = source.index
    form, images = index["latents"], index["images"]
    faults = []
    if form is None and latents and any(images.values()):
        faults.append("they hold pixels, data.latents=True takes latents")
    if form is not None:
        if not latents:
            faults.append("they hold latents, which data.latents=True takes")
        if form["token_dim"] != token_dim:
            faults.append(f"token_dim={form['token_dim']}, the model has {token_dim}")
        known = {image_key(grid) for grid in grids}
        foreign = sorted(set(images["latents"]) - known)
        if foreign:
            faults.append(f"grids {foreign} are none of the run's {sorted(known)}")
        made_with = index["made_by"].get("image_tokenizer")
        if image_tokenizer is not None and made_with != image_tokenizer:
            faults.append(f"made by image tokenizer {made_with}, the run's is {image_tokenizer}")
    if faults:
        raise ValueError(f"source {name!r}: these records do not fit: " + "; ".join(faults))


def _open_reader(path: pathlib.Path) -> Any:
    return ArrayRecordReader(str(path), _READER_OPTIONS, file_reader_buffer_size=2**15)


def num_records(path: pathlib.Path) -> int:
    """Records of a shard; 0 of a file that is none, is cut off or has no readable end."""
    try:
        reader = _open_reader(path)
        number = reader.num_records()
        reader.close()  # Here it says what was wrong with the file.
    except RuntimeError:
        return 0
    return number
