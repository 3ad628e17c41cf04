"""Sources of documents: anything with a length and random access, and a folder of images.

A source answers `len(source)` and `source[i]`, the i-th document, the same one every time; order,
repetition and mixing are the pipeline's business (`data/pipeline.py`). A list of documents is a
source, and so is the built-in world (`data/shapes.py`).
"""

import hashlib
import os
import pathlib
from typing import Protocol, runtime_checkable

from nextstep_jax.data import images
from nextstep_jax.data.schema import Document, Image, Text

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

# Long lists in an error message help nobody.
_MAX_LISTED = 10


@runtime_checkable
class DocumentSource(Protocol):
    """Random access to documents."""

    def __len__(self) -> int:
        """The number of documents."""
        ...

    def __getitem__(self, index: int) -> Document:
        """The document of an index in [0, len)."""
        ...


class ImageFolderSource:
    """A folder of images with their captions in text files beside them: cat.jpg and cat.txt.

    Sub-folders are searched too; hidden files and folders (`.name`, among them the `._name` that
    macOS leaves on foreign disks) are passed over. Documents are in the order of their paths, so
    that the index of a document does not depend on the file system. Captions are read at once,
    images when a document is asked for.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_size: int | tuple[int, int] | None = None,
        name: str = "folder",
        captions: bool = True,
    ):
        """Lists the folder and checks that every image has a caption, unless none are asked for.

        Args:
            root: The folder.
            image_size: Fits every image to this (height, width), or to a square of this side, by
                a covering resize and a centre crop. None leaves that to the layout, which knows
                the aspect buckets.
            name: The `source` of the documents.
            captions: False leaves text files alone: documents are images without words, as
                training or judging an image tokenizer needs.

        Raises:
            ValueError: If there is no such folder, no image in it, an image without a caption, a
                caption that is empty or not UTF-8, or `image_size` is below 1.
        """
        self._root = pathlib.Path(root)
        if not self._root.is_dir():
            raise ValueError(f"image folder {self._root} is not a folder")
        self._size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if self._size is not None and (len(self._size) != 2 or min(self._size) < 1):
            raise ValueError(f"image_size={image_size} must be a side or a (height, width), from 1")
        self._name = name
        files = sorted(path for path in self._root.rglob("*") if self._is_shown(path))
        self._paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        if not self._paths:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            raise ValueError(f"image folder {self._root} holds no image ({suffixes})")
        self._captions = self._find_captions(files) if captions else None

    def _find_captions(self, files: list[pathlib.Path]) -> list[str]:
        """The caption of every image."""
        # Sorted, so that of cat.TXT and cat.txt the second counts.
        texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
        missing = [path for path in self._paths if path.with_suffix("") not in texts]
        self._refuse(missing, "no caption (a .txt file of the same name) beside", "images")
        caption_paths = [texts[path.with_suffix("")] for path in self._paths]
        return self._read_captions(caption_paths)

    def _is_shown(self, path: pathlib.Path) -> bool:
        """Whether it is a file, and neither it nor a folder on the way to it is hidden."""
        parts = path.relative_to(self._root).parts
        return not any(part.startswith(".") for part in parts) and path.is_file()

    def _read_captions(self, paths: list[pathlib.Path]) -> list[str]:
        """The texts without the white space around them, all checked."""
        captions, undecodable = [], []
        for path in paths:
            try:
                # Some editors begin a file with a byte order mark, which is no part of the text.
                captions.append(path.read_text(encoding="utf-8-sig").strip())
            except UnicodeDecodeError:
                undecodable.append(path)
        self._refuse(undecodable, "not UTF-8:", "captions")
        empty = [path for path, caption in zip(paths, captions, strict=True) if not caption]
        self._refuse(empty, "empty:", "captions")
        return captions

    def _refuse(self, paths: list[pathlib.Path], fault: str, things: str) -> None:
        """Raises an error that lists the paths, if there are any."""
        if not paths:
            return
        listed = ", ".join(path.relative_to(self._root).as_posix() for path in paths[:_MAX_LISTED])
        more = f" and {len(paths) - _MAX_LISTED} more" if len(paths) > _MAX_LISTED else ""
        raise ValueError(
            f"image folder {self._root}: {fault} "
            f"{len(paths)} of {len(self._paths)} {things}: {listed}{more}"
        )

    @property
    def fingerprint(self) -> str:
        """Tells another folder, or a changed one, without reading the images.

        Relative paths, sizes of the files and captions count, neither the folder's own place nor
        times of change.
        """
        digest = hashlib.blake2b(digest_size=8)
        for i, path in enumerate(self._paths):
            caption = "" if self._captions is None else self._captions[i]
            entry = (path.relative_to(self._root).as_posix(), path.stat().st_size, caption)
            digest.update(repr(entry).encode())
        return f"{self._name} {self._size} {digest.hexdigest()}"

    def __len__(self) -> int:
        """The number of images."""
        return len(self._paths)

    def __getitem__(self, index: int) -> Document:
        """The pair of an image and its caption, or the image alone.

        Raises:
            ValueError: If `image_size` is set and the image cannot be decoded; names the file.
        """
        path = self._paths[index]
        image = Image(encoded=path.read_bytes())
        if self._size is not None:
            try:
                pixels = images.resize_cover(images.pixels_of(image), *self._size)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            image = Image(pixels=pixels)
        text = () if self._captions is None else (Text(self._captions[index]),)
        return Document(
            parts=(*text, image),
            id=path.relative_to(self._root).as_posix(),
            source=self._name,
            kind="pair",
        )
