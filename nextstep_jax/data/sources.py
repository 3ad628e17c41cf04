"""Sources of documents: anything with a length and random access, and a folder of images.

A source answers `len(source)` and `source[i]`, the i-th document, the same one every time; order,
repetition and mixing are the pipeline's business (`data/pipeline.py`). A list of documents is a
source, and so are the built-in world (`data/shapes.py`), records (`data/records.py`), tars
(`data/webdataset.py`) and tables (`data/tables.py`). A document that is damaged raises a
`DocumentError` when it is asked for; a source that holds nothing raises a ValueError when it is
made.
"""

import dataclasses
import os
import pathlib
from typing import Protocol, runtime_checkable

from nextstep_jax.data import images
from nextstep_jax.data.captions import Caption, read_caption
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.files import FileList, list_folder, printable, size_of_file
from nextstep_jax.data.schema import Document, Image, Text

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp"),
    *(".bmp", ".tif", ".tiff", ".gif", ".avif"),
)
"""What is taken for an image. One that Pillow cannot read is a bad image, not another file."""


@runtime_checkable
class DocumentSource(Protocol):
    """Random access to documents."""

    def __len__(self) -> int:
        """The number of documents."""
        ...

    def __getitem__(self, index: int) -> Document:
        """The document of an index in [0, len)."""
        ...


def source_fingerprint(source: DocumentSource) -> str:
    """What a source says it is, the same in every process.

    A dataclass is its fields; another object may have an attribute `fingerprint`. The repr of a
    plain object is no use: it holds its address.
    """
    if dataclasses.is_dataclass(source):
        return repr(source)
    return f"{type(source).__name__} {getattr(source, 'fingerprint', '')}".strip()


class ImageFolderSource:
    """A folder of images with their captions beside them: cat.jpg and cat.txt or cat.json.

    Sub-folders are searched too; hidden files and folders (`.name`, among them the `._name` that
    macOS leaves on foreign disks) are passed over. Documents are in the order of their paths, so
    that the index of a document does not depend on the file system. Nothing is read before a
    document is asked for; `captions.read_caption` says what a .json file holds.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_size: int | tuple[int, int] | None = None,
        name: str = "folder",
        captions: bool = True,
        caption_key: str | None = None,
    ):
        """Lists the folder.

        Args:
            root: The folder.
            image_size: Fits every image to this (height, width), or to a square of this side, by
                a covering resize and a centre crop. None leaves that to the layout, which knows
                the aspect buckets.
            name: The `source` of the documents.
            captions: False leaves text files alone: documents are images without words, as
                training or judging an image tokenizer needs.
            caption_key: The key of .json files whose string is the caption; by default "caption",
                or else the first.

        Raises:
            ValueError: If there is no such folder, no image in it, no caption beside any of them,
                or `image_size` is below 1.
        """
        self._root = os.fspath(root)
        if not os.path.isdir(self._root):
            raise ValueError(f"image folder {self._root} is not a folder")
        self._size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if self._size is not None and (len(self._size) != 2 or min(self._size) < 1):
            raise ValueError(f"image_size={image_size} must be a side or a (height, width), from 1")
        self._name, self._caption_key = name, caption_key
        names = list_folder(self._root)
        self._names = [name for name in names if _suffix(name) in IMAGE_SUFFIXES]
        if not self._names:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            raise ValueError(f"image folder {self._root} holds no image ({suffixes})")
        self._captions = self._find_captions(names) if captions else None

    def _find_captions(self, names: list[str]) -> list[tuple[str | None, str | None]]:
        """The .json and the .txt file of every image."""
        # Sorted, so that of cat.TXT and cat.txt the second counts.
        found = {
            suffix: {_stem(name): name for name in names if _suffix(name) == suffix}
            for suffix in (".json", ".txt")
        }
        stems = [_stem(name) for name in self._names]
        captions = [(found[".json"].get(stem), found[".txt"].get(stem)) for stem in stems]
        if not any(a or b for a, b in captions):
            raise ValueError(
                f"image folder {self._root}: none of {len(captions)} images has a caption, a .txt"
                f" or .json file of the same name beside it; the first image is {self._names[0]}"
            )
        return captions

    @property
    def fingerprint(self) -> str:
        """Tells another folder, or a changed one, without reading the files.

        Relative paths and sizes of images and captions count, neither the folder's own place nor
        times of change: a caption that is changed for one of the same length is not noticed.
        """
        captions = [name for pair in self._captions or () for name in pair if name]
        names = (*self._names, *captions)
        sizes = tuple(size_of_file(os.path.join(self._root, name)) for name in names)
        files = FileList(self._root, names, sizes)
        settings = (self._size, self._captions is not None, self._caption_key)
        return f"{self._name} {files.fingerprint(*settings)}"

    def __len__(self) -> int:
        """The number of images."""
        return len(self._names)

    def __getitem__(self, index: int) -> Document:
        """The pair of an image and its caption, or the image alone.

        Raises:
            IndexError: There is no such document.
            DocumentError: The caption is missing, blank, not UTF-8 or not JSON; a file cannot be
                read; or `image_size` is set and the image cannot be decoded. Names the image.
        """
        if not 0 <= index < len(self._names):
            raise IndexError(f"index {index} of a source of {len(self._names)} documents")
        name = self._names[index]
        try:
            caption = self._caption(index) if self._captions is not None else None
            image = Image(encoded=self._read(name))
            if self._size is not None:
                pixels = images.resize_cover(images.pixels_of(image), *self._size)
                image = Image(pixels=pixels)
        except DocumentError as error:
            raise error.within(printable(name)) from error
        text = () if caption is None else (Text(caption.text, wordings=caption.wordings),)
        return Document(
            parts=(*text, image),
            id=printable(name),
            source=self._name,
            kind="pair",
            metadata={} if caption is None else caption.metadata,
        )

    def _caption(self, index: int) -> Caption:
        data = (None if name is None else self._read(name) for name in self._captions[index])
        return read_caption(*data, self._caption_key)

    def _read(self, name: str) -> bytes:
        try:
            return pathlib.Path(self._root, name).read_bytes()
        except OSError as error:
            what = error.strerror or error
            raise DocumentError("unreadable", f"{what} ({printable(name)})") from error


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
