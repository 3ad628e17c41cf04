"""Documents read back from a packed batch, for the preview (`data/preview.py`).

Where each document stands, its text and images in reading order, and every token with its kind
and the weight of predicting it (the layouts of NextStep-1, arXiv 2508.10711; `data/layout.py`).
Only the batch is believed: what a document was before it was laid out is not asked.

Words: a document is a segment of a row; a run is the image tokens of one image; a chip is what
the page shows of one token, or of a whole run; a size is (height, width) in pixels, a grid (rows,
columns) in image tokens.
"""

import base64
import collections
import dataclasses
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Bool, Float, UInt8

from nextstep_jax.data import buckets, text_tokenizer
from nextstep_jax.data.schema import KINDS, Batch
from nextstep_jax.data.text_tokenizer import TextTokenizer

# A picture that is larger as PNG is shown as JPEG, no larger than this side. Ours: about 5 MB a
# page of photographs.
_MAX_PNG_BYTES = 64 * 1024
_MAX_JPEG_SIDE = 512
_JPEG_QUALITY = 90

# No character is cut over more tokens than it has bytes; then the bytes are none of a character.
_MAX_PENDING = 4
# Dark to light, evenly bright: the norm of an image token as a colour.
_COLOURS = np.array([[43, 24, 84], [62, 74, 137], [38, 130, 142], [80, 190, 105], [250, 230, 60]])


@dataclasses.dataclass(frozen=True)
class Span:
    """A document in a batch.

    Attributes:
        row: Of the batch.
        segment: Which document of the row, from 1.
        start: First column.
        stop: One past the last column.
        kind: One of `KINDS`, or "unknown".
        runs: (start, stop) of the columns of each image.
    """

    row: int
    segment: int
    start: int
    stop: int
    kind: str
    runs: tuple[tuple[int, int], ...]


def image_url(pixels: UInt8[np.ndarray, "height width 3"]) -> tuple[str, bool]:
    """An image as a data URL, and whether it is exact.

    Small ones are PNG and exact; others become JPEG, with no side above 512 pixels, so that the
    page stays small.
    """
    image = PIL.Image.fromarray(pixels)
    png = io.BytesIO()
    image.save(png, "PNG")
    if len(png.getvalue()) <= _MAX_PNG_BYTES:
        return _data_url("image/png", png), True
    jpeg = io.BytesIO()
    image.thumbnail((_MAX_JPEG_SIDE, _MAX_JPEG_SIDE), PIL.Image.Resampling.LANCZOS)
    image.save(jpeg, "JPEG", quality=_JPEG_QUALITY)
    return _data_url("image/jpeg", jpeg), False


def norm_picture(
    tokens: Float[np.ndarray, "n token_dim"], grid: buckets.Grid
) -> UInt8[np.ndarray, "rows columns 3"]:
    """The norm of every image token as a colour, dark for the smallest and light for the largest.

    Tokens that are not finite are red, which no norm is.
    """
    norms = np.linalg.norm(tokens.astype(np.float64), axis=-1).reshape(grid)
    finite = np.isfinite(norms)
    low, high = (norms[finite].min(), norms[finite].max()) if finite.any() else (0.0, 1.0)
    share = np.where(finite, norms - low, 0) / (high - low or 1.0)
    stops = np.linspace(0, 1, len(_COLOURS))
    picture = np.stack([np.interp(share, stops, channel) for channel in _COLOURS.T], axis=-1)
    picture[~finite] = (220, 40, 40)
    return np.rint(picture).astype(np.uint8)


def find_spans(batch: Batch, tokenizer: TextTokenizer, *, split_at_eos: bool = False) -> list[Span]:
    """The documents of a batch, row by row, in the order in which they stand."""
    spans = []
    for row, segment_ids in enumerate(batch["segment_ids"]):
        token_ids = batch["token_ids"][row]
        is_new = np.diff(segment_ids) != 0
        if split_at_eos:
            is_new |= token_ids[:-1] == tokenizer.eos_id
        bounds = [0, *(np.flatnonzero(is_new) + 1).tolist(), len(segment_ids)]
        segment = 0
        for start, stop in itertools.pairwise(bounds):
            if not segment_ids[start]:
                continue
            segment += 1
            runs = _runs(token_ids[start:stop] == tokenizer.image_placeholder_id)
            kind = int(batch["kinds"][row, start])
            spans.append(
                Span(
                    *(row, segment, start, stop),
                    KINDS[kind - 1] if 1 <= kind <= len(KINDS) else "unknown",
                    tuple((start + a, start + b) for a, b in runs),
                )
            )
    return spans


def _runs(marked: Bool[np.ndarray, " length"]) -> list[tuple[int, int]]:
    """(start, stop) of every run of marked positions."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], marked.astype(np.int8), [0]))))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def placed_images(batch: Batch) -> dict[int, tuple[str, int]]:
    """row * L + column of the first token of every image -> (its size's key, its number)."""
    return {
        int(slots[0]): (key, number)
        for key, all_slots in batch.get("image_slots", {}).items()
        for number, slots in enumerate(all_slots)
    }


def describe(
    batch: Batch,
    span: Span,
    placed: Mapping[int, tuple[str, int]],
    tokenizer: TextTokenizer,
    first_row: int,
) -> dict[str, Any]:
    """A document in full; under "problems" what does not fit together in it."""
    images = [_describe_image(batch, span, run, placed, tokenizer) for run in span.runs]
    chips = _chips(batch, span, tokenizer)
    problems = collections.Counter(
        "size strings that do not give the grid of their image"
        for image in images
        if image["grid"] and image["stated_grid"] != image["grid"]
    )
    bad = sum(image.get("not_finite", 0) for image in images)
    if bad:
        problems["numbers in image tokens that are not finite"] += bad
    return {
        "row": first_row + span.row,
        "segment": span.segment,
        "start": span.start,
        "length": span.stop - span.start,
        "kind": span.kind,
        "id": _document_id(batch, span),
        "ends": bool(batch["token_ids"][span.row, span.stop - 1] == tokenizer.eos_id),
        "parts": _parts(chips, batch, span, tokenizer),
        "images": images,
        "chips": chips,
        "problems": problems,
    }


def _document_id(batch: Batch, span: Span) -> str | None:
    """The document's name, where a pipeline says it beside the arrays that the step reads."""
    names = batch.get("document_ids")
    return None if names is None else str(names[span.row][span.segment - 1])


def _describe_image(
    batch: Batch,
    span: Span,
    run: tuple[int, int],
    placed: Mapping[int, tuple[str, int]],
    tokenizer: TextTokenizer,
) -> dict[str, Any]:
    start, stop = run
    row_length = batch["token_ids"].shape[1]
    stated = stated_grid(batch, span, start, tokenizer)
    image: dict[str, Any] = {
        "tokens": stop - start,
        "loss": bool(batch["image_weights"][span.row, start:stop].any()),
        "stated_grid": list(stated) if stated else None,
        "grid": None,
        "url": None,
    }
    if "latents" in batch:
        tokens = np.asarray(batch["latents"][span.row, start:stop], np.float32)
        grid = stated if stated and math.prod(stated) == len(tokens) else (1, len(tokens))
        finite = tokens[np.isfinite(tokens)]
        numbers = finite if finite.size else np.zeros(1, np.float32)
        names = ("mean", "std", "min", "max")
        image |= {name: float(getattr(numbers, name)()) for name in names}
        image["not_finite"] = int(tokens.size - finite.size)
        image["grid"] = list(grid)
        image["url"], image["exact"] = image_url(norm_picture(tokens, grid))
    elif span.row * row_length + start in placed:
        key, number = placed[span.row * row_length + start]
        pixels = batch["images"][key][number]
        image["size"] = [height, width] = list(pixels.shape[:2])
        # Tokens are square, so their number and the size give the grid.
        side = math.sqrt(height * width / batch["image_slots"][key].shape[1])
        image["grid"] = [round(height / side), round(width / side)]
        image["url"], image["exact"] = image_url(pixels)
    return image


def stated_grid(
    batch: Batch, span: Span, start: int, tokenizer: TextTokenizer
) -> buckets.Grid | None:
    """The grid that the size string in front of a run says, or None if there is none."""
    before = batch["token_ids"][span.row, span.start : start - 1]
    areas = np.flatnonzero(before == tokenizer.image_area_id)
    if not len(areas):
        return None
    rows, _, columns = tokenizer.decode(before[areas[-1] + 1 :]).partition("*")
    return (int(rows), int(columns)) if rows.isdecimal() and columns.isdecimal() else None


def _chips(batch: Batch, span: Span, tokenizer: TextTokenizer) -> list[dict[str, Any]]:
    """A chip for every token; neighbouring tokens of an image with the same weights share one."""
    special = {
        getattr(tokenizer, field): (field.removesuffix("_id").removeprefix("image_"), spelling)
        for field, spelling in text_tokenizer.CONFIG_FIELDS.items()
    }
    chips: list[dict[str, Any]] = []
    in_size = False
    columns = slice(span.start, span.stop)
    names = ("text_weight", "image_weight")
    ids = batch["token_ids"][span.row, columns].tolist()
    weights = [batch[f"{name}s"][span.row, columns].tolist() for name in names]
    texts = _token_texts(ids, tokenizer, set(special))
    for at, (token, *both) in enumerate(zip(ids, *weights, strict=True)):
        chip = {"id": token, "at": span.start + at, "count": 1}
        chip |= dict(zip(names, both, strict=True))
        if token == tokenizer.image_placeholder_id:
            last = chips[-1] if chips else {}
            if last.get("kind") == "image" and [last[name] for name in names] == both:
                last["count"] += 1
                continue
            chip |= {"kind": "image", "text": "image", "spelling": special[token][1]}
        elif token in special:
            in_size = token == tokenizer.image_area_id
            chip |= {"kind": "special", "text": special[token][0], "spelling": special[token][1]}
        else:
            chip |= {"kind": "size" if in_size else "text", "text": texts[at]}
        chips.append(chip)
    return chips


def _token_texts(ids: Sequence[int], tokenizer: TextTokenizer, special: set[int]) -> list[str]:
    """The text of each token. One that ends inside a character has none; the last has it all."""
    texts, pending = [], []
    for token in ids:
        if token in special:
            pending = []
            texts.append("")
            continue
        pending.append(token)
        text = tokenizer.decode(pending)
        # The decoder writes U+FFFD for bytes that are no character, or not yet.
        if text.endswith("\ufffd") and len(pending) < _MAX_PENDING:
            texts.append("")
        else:
            texts.append(text)
            pending = []
    return texts


def _parts(
    chips: Sequence[Mapping[str, Any]], batch: Batch, span: Span, tokenizer: TextTokenizer
) -> list[dict[str, Any]]:
    """Text and images in reading order, without what the layout adds."""
    parts: list[dict[str, Any]] = []
    starts = {a: number for number, (a, _) in enumerate(span.runs)}
    is_text = np.zeros(span.stop - span.start, bool)
    for chip in chips:
        is_text[chip["at"] - span.start] = chip["kind"] == "text"
    texts = {a: b for a, b in _runs(is_text)}
    for at in range(span.start, span.stop):
        if at in starts:
            parts.append({"image": starts[at]})
        elif at - span.start in texts:
            columns = slice(at, span.start + texts[at - span.start])
            loss = bool(batch["text_weights"][span.row, columns].any())
            text = tokenizer.decode(batch["token_ids"][span.row, columns])
            parts.append({"text": text, "loss": loss})
    return parts


def _data_url(media_type: str, file: io.BytesIO) -> str:
    return f"data:{media_type};base64,{base64.b64encode(file.getvalue()).decode()}"
