"""What can be wrong with a document: the reasons that a pipeline counts, and the error to raise.

Among half a billion documents some are damaged. Whoever notices raises a `DocumentError`; a
pipeline or an importer skips the document, counts the reason and logs the key, and stops when
too many are bad. Every other exception is a mistake in a program or a configuration, and is not
caught.
"""

from typing import Literal, get_args

Reason = Literal[
    "unreadable",
    "bad_image",
    "missing_image",
    "image_size",
    "decompression_bomb",
    "empty_text",
    "bad_document",
    "too_long",
]
REASONS: tuple[Reason, ...] = get_args(Reason)
"""Why a document is skipped.

unreadable          the file, record or row cannot be read, or is not of its format
bad_image           the bytes are no image, are cut off, or of a kind that is not read
missing_image       the document names an image that is not there
image_size          an image is too small, or much too wide or tall
decompression_bomb  an image claims more pixels than anyone should decode
empty_text          a caption or text is missing or blank
bad_document        the parts do not fit the kind
too_long            it does not fit into a row
"""


class DocumentError(ValueError):
    """A document that cannot be used, and why.

    Attributes:
        reason: One of `REASONS`.
    """

    def __init__(self, reason: Reason, message: str):
        """Names the reason for counting and the message for the log.

        Raises:
            KeyError: The reason is none of `REASONS`.
        """
        if reason not in REASONS:
            raise KeyError(f"reason {reason!r} is none of {', '.join(REASONS)}")
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):
        """Pickles with both arguments, as errors cross processes."""
        return type(self), (self.reason, str(self))

    def within(self, place: str) -> "DocumentError":
        """The same error with the place where it was found in front of the message."""
        return type(self)(self.reason, f"{place}: {self}")
