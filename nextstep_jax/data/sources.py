"""Sources of documents: anything with a length and random access, and a folder of images.

A source answers `len(source)` and `source[i]`, the i-th document, the same one every time; order,
repetition and mixing are the pipeline's business (`data/pipeline.py`). A list of documents is a
source, and so is the built-in world (`data/shapes.py`).
"""

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

    Sub-folders are searched too. Documents are in the order of their paths, so that the index of
    a document does not depend on the file system. Files are read when a document is asked for.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_size: int | tuple[int, int] | None = None,
        name: str = "folder",
    ):
        """Lists the folder and checks that every image has a caption.

        Args:
            root: The folder.
            image_size: Fits every image to this (height, width), or to a square of this side, by
                a covering resize and a centre crop. None leaves that to the layout, which knows
                the aspect buckets.
            name: The `source` of the documents.

        Raises:
            ValueError: If there is no such folder, no image in it, or an image without a caption.
        """
        self._root = pathlib.Path(root)
        if not self._root.is_dir():
            raise ValueError(f"image folder {self._root} is not a folder")
        self._size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self._name = name
        self._paths = sorted(
            path
            for path in self._root.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        )
        if not self._paths:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            raise ValueError(f"image folder {self._root} holds no image ({suffixes})")
        missing = [path for path in self._paths if not path.with_suffix(".txt").is_file()]
        if missing:
            listed = ", ".join(str(path.relative_to(self._root)) for path in missing[:_MAX_LISTED])
            more = f" and {len(missing) - _MAX_LISTED} more" if len(missing) > _MAX_LISTED else ""
            raise ValueError(
                f"image folder {self._root}: no caption (a .txt file of the same name) beside "
                f"{len(missing)} of {len(self._paths)} images: {listed}{more}"
            )

    def __len__(self) -> int:
        """The number of images."""
        return len(self._paths)

    def __getitem__(self, index: int) -> Document:
        """The pair of an image and its caption.

        Raises:
            ValueError: If the caption is empty or not UTF-8, or `image_size` is set and the image
                cannot be decoded; names the file.
        """
        path = self._paths[index]
        caption_path = path.with_suffix(".txt")
        try:
            caption = caption_path.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"caption {caption_path} is not UTF-8: {error}") from error
        if not caption:
            raise ValueError(f"caption {caption_path} is empty")
        image = Image(encoded=path.read_bytes())
        if self._size is not None:
            try:
                pixels = images.resize_cover(images.pixels_of(image), *self._size)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            image = Image(pixels=pixels)
        return Document(
            parts=(Text(caption), image),
            id=path.relative_to(self._root).as_posix(),
            source=self._name,
            kind="pair",
        )
