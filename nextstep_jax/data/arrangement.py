"""Which parts of a document the model gets to see, in which wording and which order.

The random choices of the released trainer of NextStep-1 (arXiv 2508.10711), one function for each
kind of document: where the image of a pair stands, which wording of a caption is taken, what an
edit or a story loses now and then. All of them follow from the numbers in `Draws`, which a
pipeline makes a function of (seed, epoch, document).
"""

import dataclasses
import re
from collections.abc import Sequence as ListLike
from typing import Any

import numpy as np

from nextstep_jax.data import buckets
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.schema import KINDS, Document, Image, Part, Text


@dataclasses.dataclass(frozen=True)
class LayoutConfig:
    """How documents become sequences. The defaults are those of the released trainer.

    Attributes:
        image_first_prob: Probability that the image of a pair stands before its caption.
        image_bases: Sides of the square bucket; an image goes to the largest whose area it fills.
        square_only: Crop every image to the square instead of the nearest aspect bucket.
        random_crop: Crop at a random place (paper, stage 1) instead of the centre.
        pixels_per_token: Pixels along one side of an image token.
        caption_ratios: (key, ratio) pairs, or a mapping: how often which of `Text.wordings` is
            taken, among those that a document has. None at all, or none that it has: `Text.text`.
        capitalize_prob: Probability that the first letter of a pair's caption becomes a capital.
        strip_openings_of: Keys of wordings whose openings such as "The image shows" are cut off;
            "" stands for `Text.text`.
        edit_images_last_prob: Probability that all images of an edit stand after its texts.
        edit_drop_two_prob: Probability that an edit of two images loses the first image or its
            texts.
        edit_drop_text_share: Of those, the share that loses the texts. Ours.
        edit_drop_three_prob: Probability that an edit of three images loses the first or second.
        edit_drop_first_share: Of those, the share that loses the first.
        max_interleaved_images: Most images of an interleaved document; of more, a random run of
            neighbours is taken, with the texts around them. None takes all; a pipeline sets it
            to what its rows hold.
        drop_text_prob: Probability that an interleaved document keeps its images alone.
        max_aspect_ratio: A document with an image whose longer side is more than so many times
            the shorter one is refused.
        min_image_side: As is one with an image whose shorter side has fewer pixels; None for
            those of one token. Ours.
    """

    image_first_prob: float = 0.3
    image_bases: tuple[int, ...] = (256,)
    square_only: bool = False
    random_crop: bool = False
    pixels_per_token: int = 16
    caption_ratios: Any = ()
    capitalize_prob: float = 0.5
    strip_openings_of: tuple[str, ...] = ()
    edit_images_last_prob: float = 0.1
    edit_drop_two_prob: float = 0.2
    edit_drop_text_share: float = 0.5
    edit_drop_three_prob: float = 0.3
    edit_drop_first_share: float = 0.3
    max_interleaved_images: int | None = None
    drop_text_prob: float = 0.1
    max_aspect_ratio: float = 6.0
    min_image_side: int | None = None

    def __post_init__(self):
        """Checks the ranges, and that every base has a grid."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith(("_prob", "_share")) and not 0.0 <= value <= 1.0:
                raise ValueError(f"{field.name}={value} must lie in [0, 1]")
        if not self.image_bases:
            raise ValueError("image_bases must name at least one base, such as (256,)")
        for name in ("min_image_side", "max_interleaved_images", "max_aspect_ratio"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        ratios = self.caption_ratios
        ratios = tuple(ratios.items() if hasattr(ratios, "items") else ratios)
        ratios = tuple((str(key), float(ratio)) for key, ratio in ratios)
        if any(not 0 <= ratio < float("inf") for _, ratio in ratios):
            raise ValueError(f"caption_ratios={dict(ratios)} must be finite and not negative")
        object.__setattr__(self, "caption_ratios", ratios)
        object.__setattr__(self, "image_bases", tuple(self.image_bases))
        object.__setattr__(self, "strip_openings_of", tuple(self.strip_openings_of))
        _ = self.image_sizes

    @property
    def smallest_side(self) -> int:
        """The fewest pixels along a side of an image that is not refused."""
        return self.min_image_side or self.pixels_per_token

    @property
    def image_sizes(self) -> tuple[buckets.Size, ...]:
        """Every (height, width) that an image can be fitted to, ascending."""
        return buckets.sizes_of_bases(
            self.image_bases, stride=self.pixels_per_token, square_only=self.square_only
        )


@dataclasses.dataclass(frozen=True)
class Draws:
    """Uniform numbers in [0, 1), one for each choice that any document may need.

    All are drawn for every document, so that changing one probability leaves the outcome of the
    other choices as it was.
    """

    image_first: float
    wording: float
    capitalize: float
    images_last: float
    drop: float
    which: float
    window: float
    drop_text: float

    @classmethod
    def of(cls, rng: np.random.Generator) -> "Draws":
        """Draws all of them."""
        return cls(*rng.random(len(cls.__dataclass_fields__)).tolist())


def arrange_parts(document: Document, config: LayoutConfig, draws: Draws) -> tuple[Part, ...]:
    """The parts of a document in the order of its layout. All choices but crops are made here.

    Raises:
        DocumentError: If the parts do not fit the kind, or a text is blank that must not be.
    """
    texts = tuple(part for part in document.parts if isinstance(part, Text))
    num_texts, num_images = len(texts), len(document.images)
    found = f"found {num_texts} texts and {num_images} images"

    def refuse(rule: str) -> DocumentError:
        return DocumentError("bad_document", f"kind {document.kind!r} has {rule}; {found}")

    match document.kind:
        case "text":
            if not num_texts or num_images:
                raise refuse("texts and no images")
        case "pair":
            if num_texts != 1 or num_images != 1:
                raise refuse("one text and one image")
        case "edit":
            if num_texts < 1 or num_images < 2:
                raise refuse("an instruction and two or more images")
        case "interleaved":
            if not document.parts:
                raise refuse("at least one part")
        case _:
            known = ", ".join(map(repr, KINDS))
            raise DocumentError("bad_document", f"kind {document.kind!r} is none of {known}")
    parts = tuple(
        _word(part, config, draws) if isinstance(part, Text) else part for part in document.parts
    )
    texts = tuple(part for part in parts if isinstance(part, Text))
    # Between the images of a story nothing need be said.
    if document.kind != "interleaved" and not any(text.text.strip() for text in texts):
        raise DocumentError("empty_text", "the text is blank")
    match document.kind:
        case "pair":
            text = texts[0]
            if draws.capitalize < config.capitalize_prob:
                text = dataclasses.replace(text, text=_capitalize(text.text))
            image_first = draws.image_first < config.image_first_prob
            return (*document.images, text) if image_first else (text, *document.images)
        case "edit":
            return _arrange_edit(parts, config, draws)
        case "interleaved":
            return _arrange_story(parts, config, draws)
    return parts


def _word(text: Text, config: LayoutConfig, draws: Draws) -> Text:
    """The text in the wording that was drawn for the document."""
    present = [(key, ratio) for key, ratio in config.caption_ratios if key in text.wordings]
    total = sum(ratio for _, ratio in present)
    key, chosen, below = "", text.text, 0.0
    for name, ratio in present:
        if below <= draws.wording * total < below + ratio:
            key, chosen = name, text.wordings[name]
        below += ratio
    if key in config.strip_openings_of:
        chosen = strip_opening(chosen)
    return Text(chosen, text.loss)


# What captioning models like to begin with; the list is ours.
_OPENING = re.compile(
    r"\s*(?:in\s+)?(?:the|this|an?)\s+(?:\w+\s+)?"
    r"(?:image|picture|photo|photograph|illustration|painting|drawing|scene)\s*,?\s+"
    r"(?:(?:clearly|prominently|vividly)\s+)?"
    r"(?:shows|depicts|displays|features|presents|captures|portrays|illustrates|showcases"
    r"|is\s+of|of|we\s+see|you\s+can\s+see|we\s+can\s+see)\s+",
    re.IGNORECASE,
)


def strip_opening(text: str) -> str:
    """The text without an opening such as "The image shows", with a capital in its place.

    A text that is nothing else stays as it is.
    """
    rest = _OPENING.sub("", text, count=1) if _OPENING.match(text) else ""
    return _capitalize(rest) if rest else text


def _capitalize(text: str) -> str:
    """The text with a capital as its first letter; unlike `str.capitalize` the rest stays."""
    return text[:1].upper() + text[1:]


def _arrange_edit(parts: ListLike[Part], config: LayoutConfig, draws: Draws) -> tuple[Part, ...]:
    """Drops an input, moves the images to the end, and leaves loss on the last image alone."""
    images = [part for part in parts if isinstance(part, Image)]
    dropped: list[Part] = []
    if len(images) == 2 and draws.drop < config.edit_drop_two_prob:
        drop_text = draws.which < config.edit_drop_text_share
        dropped = [p for p in parts if isinstance(p, Text)] if drop_text else images[:1]
    if len(images) == 3 and draws.drop < config.edit_drop_three_prob:
        drop_first = draws.which < config.edit_drop_first_share
        dropped = images[:1] if drop_first else images[1:2]
    # By identity: arrays do not compare as a whole.
    kept = [part for part in parts if not any(part is other for other in dropped)]
    if draws.images_last < config.edit_images_last_prob:
        kept.sort(key=lambda part: isinstance(part, Image))
    return tuple(
        dataclasses.replace(part, loss=part.loss and part is images[-1])
        if isinstance(part, Image)
        else part
        for part in kept
    )


def _arrange_story(parts: tuple[Part, ...], config: LayoutConfig, draws: Draws) -> tuple[Part, ...]:
    """A run of neighbouring images with the texts around them, or the images alone."""
    places = [i for i, part in enumerate(parts) if isinstance(part, Image)]
    most = config.max_interleaved_images
    if most is not None and len(places) > most:
        first = int(draws.window * (len(places) - most + 1))
        # From behind the image before the run to the image after it.
        start = places[first - 1] + 1 if first else 0
        end = first + most
        parts = parts[start : places[end] if end < len(places) else None]
    if places and draws.drop_text < config.drop_text_prob:
        parts = tuple(part for part in parts if isinstance(part, Image))
    return parts
