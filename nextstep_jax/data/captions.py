"""Captions as users write them: .txt and .json files, and texts that name their images by tags.

A JSON caption is an object whose strings are wordings of one text, by key; one of them is the text
itself. In the data format of NextStep-1 (arXiv 2508.10711) the tags `<image_1>`, `<image_2>`, ...
inside a text stand where the images do.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.schema import Image, Part, Text

CAPTION_KEY = "caption"
"""The key of the text itself, unless another one is asked for."""

# Strings under these keys say what a document is, not what it is about.
KIND_KEYS = ("kind", "type")

_TAG = re.compile(r"<image_([0-9]{1,9})>")


@dataclasses.dataclass(frozen=True)
class Caption:
    """What is said of a document.

    Attributes:
        text: The text itself, without white space around it; never blank.
        wordings: All wordings by key, `text` among them; empty if there is no other.
        metadata: What else stands beside them.
    """

    text: str
    wordings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def check_text(text: Any, what: str = "the text") -> str:
    """The text, if it is one.

    Raises:
        DocumentError: It is missing or blank, no string, or holds half of a surrogate pair, which
            no tokenizer takes and no file can hold.
    """
    if text is None or (isinstance(text, str) and not text.strip()):
        raise DocumentError("empty_text", f"{what} is {'missing' if text is None else 'blank'}")
    if not isinstance(text, str):
        raise DocumentError("unreadable", f"{what} is no string but a {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DocumentError("unreadable", f"{what} is no valid Unicode: {error}") from error
    return text


def parse_object(data: bytes | str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DocumentError: It is none.
    """
    try:
        values = json.loads(data.removeprefix(b"\xef\xbb\xbf") if isinstance(data, bytes) else data)
    except (ValueError, RecursionError) as error:
        raise DocumentError("unreadable", f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DocumentError("unreadable", f"a JSON {type(values).__name__}, not an object")
    return values


def read_caption(
    json_data: bytes | None, text_data: bytes | None, caption_key: str | None = None
) -> Caption:
    """The caption that a .json file, a .txt file or both of them give.

    Of a JSON object, strings are wordings; numbers, lists, objects and the strings of `KIND_KEYS`
    are metadata. The text itself is that of `caption_key`; if none is asked for it is that of
    `CAPTION_KEY`, else the .txt file, else the object's first string. Without a .json file it is
    the .txt file.

    Raises:
        DocumentError: There is no text, it is blank, not UTF-8, or the JSON is broken.
    """
    values = {} if json_data is None else parse_object(json_data)
    wordings = {
        key: value.strip()
        for key, value in values.items()
        if isinstance(value, str) and value.strip() and key not in KIND_KEYS
    }
    for key, value in wordings.items():
        check_text(value, f"the wording {key!r}")
    metadata = {
        key: value
        for key, value in values.items()
        if value is not None and (not isinstance(value, str) or key in KIND_KEYS)
    }
    key = caption_key or CAPTION_KEY
    text: Any = values.get(key)
    if text is None and text_data is not None and (caption_key is None or json_data is None):
        text = _decode(text_data)
    elif text is None and caption_key is None and wordings:
        key, text = next(iter(wordings.items()))
    text = check_text(text, f"the caption {key!r}" if values else "the caption").strip()
    others = wordings.keys() - {key}
    return Caption(text, {**wordings, key: text} if others else {}, metadata)


def _decode(data: bytes) -> str:
    try:
        # Some editors begin a file with a byte order mark, which is no part of the text.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError("unreadable", f"the caption is not UTF-8: {error}") from error


def image_tags(text: str) -> tuple[int, ...]:
    """The numbers of the tags of a text, in their order."""
    return tuple(int(number) for number in _TAG.findall(text))


def place_images(caption: Caption, images: Mapping[int, Image]) -> tuple[Part, ...]:
    """The texts between the tags, and the images in place of the tags.

    Blank texts are left out. A wording whose tags are other ones than those of the text itself,
    or stand at other ends of it, is left out too.

    Raises:
        DocumentError: A tag names none of the images.
    """
    # Texts at even places, numbers at odd ones.
    pieces = _TAG.split(caption.text)
    wordings = {}
    for key, wording in caption.wordings.items():
        others = _TAG.split(wording)
        same_tags = list(map(int, others[1::2])) == list(map(int, pieces[1::2]))
        same_blanks = [not a.strip() for a in others[::2]] == [not a.strip() for a in pieces[::2]]
        if same_tags and same_blanks:
            wordings[key] = others
    parts: list[Part] = []
    for place, piece in enumerate(pieces):
        if place % 2:
            if int(piece) not in images:
                raise DocumentError("missing_image", f"there is no image for <image_{piece}>")
            parts.append(images[int(piece)])
        elif piece.strip():
            said = {key: others[place] for key, others in wordings.items()}
            parts.append(Text(piece, wordings=said if len(said) > 1 else {}))
    return tuple(parts)
