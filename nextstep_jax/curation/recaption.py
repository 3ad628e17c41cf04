"""New captions for images from a vision-language model, asked once and remembered.

NextStep-1 recaptioned its images (arXiv 2508.10711, section 3.2). Here the model is behind any
OpenAI-compatible endpoint; its caption is kept beside the original one, under a key of
`Text.wordings`, and the layout draws among them.

An answer is written to a folder under the digest of all that it is an answer to, so that a run
that is started again, or another run over some of the same images, asks only for what is new.
"""

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import pathlib
import threading
import time
from collections.abc import Callable, Sequence

import PIL.Image

from nextstep_jax.curation.config import Recaption
from nextstep_jax.curation.endpoint import Endpoint, NoAnswerError
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.images import open_image, pixels_of
from nextstep_jax.data.record_writer import write_json
from nextstep_jax.data.schema import Document, Image, Text

_MEDIA_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
_JPEG_QUALITY = 92


class CaptionCache:
    """Answers on disk, one small file each; processes and runs may share the folder."""

    def __init__(self, folder: pathlib.Path):
        """Makes the folder if need be."""
        self._folder = pathlib.Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> str | None:
        """The answer under a key, if there is one, and it is text that can be written."""
        try:
            caption = json.loads(self._path(key).read_text(encoding="utf-8"))["caption"]
            caption.encode()
        except (FileNotFoundError, UnicodeEncodeError):
            return None
        return caption

    def put(self, key: str, caption: str) -> None:
        """Keeps an answer; it is whole or not there."""
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"caption": caption})

    def _path(self, key: str) -> pathlib.Path:
        # Folders with millions of files are slow.
        return self._folder / key[:2] / f"{key}.json"


class Recaptioner:
    """Gives pairs of image and text another wording.

    Attributes:
        endpoint: Whom it asks.
    """

    def __init__(
        self,
        options: Recaption,
        cache: CaptionCache,
        sleep: Callable[[float], None] = time.sleep,
    ):
        """Connects nowhere yet.

        Raises:
            ValueError: See `Endpoint`.
        """
        self._options, self._cache = options, cache
        self.endpoint = Endpoint(options, sleep)
        # The same image twice among what is asked for at the same time is asked for once.
        self._asked: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def recaption(self, documents: Sequence[Document]) -> tuple[list[Document], int]:
        """The documents with a new wording each, and how many pairs remain without.

        Documents other than pairs stay as they are. A pair without text gets the new one.

        Raises:
            ValueError: The endpoint refuses everything.
            OSError: More pairs remain without than may.
        """
        with concurrent.futures.ThreadPoolExecutor(self._options.concurrency) as pool:
            results = list(pool.map(self._one, documents))
        self._asked.clear()
        faults = [fault for _, fault in results if fault]
        if len(faults) > self._options.max_failed_fraction * len(documents):
            raise OSError(
                f"recaption: {len(faults)} of {len(documents)} documents got no caption, more than"
                f" max_failed_fraction={self._options.max_failed_fraction}; for example:"
                f" {faults[0]}. Start again: what is answered is kept"
            )
        return [document for document, _ in results], len(faults)

    def _one(self, document: Document) -> tuple[Document, str | None]:
        """The document as it shall be, and why it has no new caption if it should have one."""
        if document.kind != "pair" or not document.images:
            return document, None
        try:
            caption = self._caption(document)
        except (NoAnswerError, DocumentError) as error:
            return document, f"document {document.source}/{document.id}: {error}"
        return with_wording(document, self._options.wording, caption), None

    def _caption(self, document: Document) -> str:
        image, media_type = file_of(document.images[-1], self._options.max_side)
        original = next((part.text for part in document.parts if isinstance(part, Text)), "")
        prompt = self._options.prompt.replace("{caption}", original)
        key = cache_key(self._options, prompt, image)
        with self._lock:
            asked = self._asked.setdefault(key, threading.Lock())
        with asked:
            caption = self._cache.get(key)
            if caption is None:
                caption = self.endpoint.ask(prompt, image, media_type)
                self._cache.put(key, caption)
        return caption


def cache_key(options: Recaption, prompt: str, image: bytes) -> str:
    """The digest of all that an answer depends on: image, prompt, model and sampling."""
    question = [options.model, prompt, options.max_tokens, options.temperature]
    digest = hashlib.blake2b(json.dumps(question).encode(), digest_size=20)
    digest.update(b"\0" + image)
    return digest.hexdigest()


def file_of(image: Image, max_side: int | None) -> tuple[bytes, str]:
    """An image as the bytes of a file and their media type.

    A JPEG, PNG, WebP or GIF within `max_side` goes as it is. Pixels and other files become PNG,
    what must shrink becomes JPEG.

    Raises:
        DocumentError: It cannot be decoded.
    """
    if image.encoded is not None:
        with open_image(image.encoded) as opened:
            small = max_side is None or max(opened.size) <= max_side
            if small and opened.format in _MEDIA_TYPES:
                return image.encoded, _MEDIA_TYPES[opened.format]
    picture = PIL.Image.fromarray(pixels_of(image))
    kind, quality = "PNG", {}
    if max_side is not None and max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side), PIL.Image.Resampling.LANCZOS)
        kind, quality = "JPEG", {"quality": _JPEG_QUALITY}
    file = io.BytesIO()
    picture.save(file, kind, **quality)
    return file.getvalue(), _MEDIA_TYPES[kind]


def with_wording(document: Document, key: str, caption: str) -> Document:
    """The document whose first text can also be said as `caption`."""
    parts = list(document.parts)
    for i, part in enumerate(parts):
        if isinstance(part, Text):
            parts[i] = dataclasses.replace(part, wordings={**part.wordings, key: caption})
            break
    else:
        parts.insert(0, Text(caption, wordings={key: caption}))
    return dataclasses.replace(document, parts=tuple(parts))
