"""Text tokens: a byte-level BPE tokenizer with the special tokens of NextStep-1.

The released model (arXiv 2508.10711) uses the Qwen2.5 tokenizer and a handful of added tokens for
images; `TextTokenizer.from_file` reads its `tokenizer.json`. `extend_for_images` adds those tokens
to a plain Qwen2.5 file; small models train their own with `train_bpe`. Special tokens are placed by
the layout alone (`data/layout.py`): their spelling inside a user's text is ordinary text, so that a
caption cannot open an image.
"""

import collections
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Integer
from tokenizers import decoders, models, pre_tokenizers, trainers

from nextstep_jax.models.config import NextStepConfig

EOS = "<|endoftext|>"
PAD = "[PAD]"
IMAGE_AREA = "<|image_area|>"
BEGIN_OF_IMAGE = "<|begin_of_image|>"
END_OF_IMAGE = "<|end_of_image|>"
IMAGE_PLACEHOLDER = "<|image_placeholder|>"

# The field of the model config that holds the id of each token.
CONFIG_FIELDS: dict[str, str] = {
    "eos_id": EOS,
    "pad_id": PAD,
    "image_area_id": IMAGE_AREA,
    "boi_id": BEGIN_OF_IMAGE,
    "eoi_id": END_OF_IMAGE,
    "image_placeholder_id": IMAGE_PLACEHOLDER,
}

# The released vocabulary goes on with these four, in an order that is inferred; their spelling
# here is ours. Nothing in training needs them, so a tokenizer without them is accepted.
OPTIONAL_TOKENS: tuple[str, ...] = (
    "<|begin_of_prompt_refinement|>",
    "<|end_of_prompt_refinement|>",
    "<|begin_of_thinking|>",
    "<|end_of_thinking|>",
)

SPECIAL_TOKENS: tuple[str, ...] = (*CONFIG_FIELDS.values(), *OPTIONAL_TOKENS)

# Some releases have these as well. Nothing here places them.
RESERVED_TOKENS: tuple[str, ...] = ("<|beginoftext|>", "<|image_end_of_line|>")

_NEVER_IN_TEXT = frozenset((*SPECIAL_TOKENS, *RESERVED_TOKENS))

Ids = Sequence[int] | Integer[np.ndarray, " length"]


class TextTokenizer:
    """Strings to ids and back.

    Attributes:
        eos_id: End of text.
        pad_id: Padding.
        image_area_id: Opens the size string in front of an image.
        boi_id: Begin of image.
        eoi_id: End of image.
        image_placeholder_id: Stands where an image token is.
    """

    def __init__(self, definition: str):
        """Builds the tokenizer from the text of a `tokenizer.json`.

        Raises:
            ValueError: If the definition cannot be read, lacks a special token (all missing ones
                are listed) or gives two tokens one id.
        """
        try:
            fields = json.loads(definition)
            added = fields["added_tokens"]
            # Only a token marked special can be told to stay out of ordinary text, and some
            # published files mark none of the added ones.
            for token in added:
                if token["content"] in _NEVER_IN_TEXT:
                    token["special"] = True
            self._definition = json.dumps(fields, ensure_ascii=False)
            self._tokenizer = _load(self._definition, fields)
        except Exception as error:  # The library raises bare Exception for a bad definition.
            raise ValueError(f"not the content of a tokenizer.json: {error!r}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        special = {token["content"]: token["id"] for token in added}
        missing = [name for name in CONFIG_FIELDS.values() if name not in special]
        if missing:
            raise ValueError(f"the tokenizer lacks the special tokens {', '.join(missing)}")
        self.eos_id = special[EOS]
        self.pad_id = special[PAD]
        self.image_area_id = special[IMAGE_AREA]
        self.boi_id = special[BEGIN_OF_IMAGE]
        self.eoi_id = special[END_OF_IMAGE]
        self.image_placeholder_id = special[IMAGE_PLACEHOLDER]

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "TextTokenizer":
        """Reads a `tokenizer.json`.

        Raises:
            ValueError: If there is no such file or it cannot be used; names the file.
        """
        try:
            with open(path, encoding="utf-8") as file:
                return cls(file.read())
        except OSError as error:
            raise ValueError(f"cannot read the tokenizer {os.fspath(path)}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `tokenizer.json` that `from_file` reads."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(self._definition)

    def __reduce__(self):
        """Pickles as the definition (worker processes), as the library drops settings of ours."""
        return TextTokenizer, (self._definition,)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """A short digest of the definition: equal digests, equal ids for every string."""
        return hashlib.sha256(self._definition.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """The ids of a text. No special token is added, and none is recognised inside it."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(
        self,
        ids: Ids,
        *,
        skip_special_tokens: bool = False,
    ) -> str:
        """The text of some ids; special tokens are written out unless skipped."""
        return self._tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special_tokens
        )

    def check(self, config: NextStepConfig) -> None:
        """Checks that tokenizer and model mean the same ids.

        Raises:
            ValueError: Listing every id that differs, and a vocabulary that is too large.
        """
        problems = [
            f"{field}: the tokenizer has {getattr(self, field)} ({name}), "
            f"the model config {getattr(config, field)}"
            for field, name in CONFIG_FIELDS.items()
            if getattr(self, field) != getattr(config, field)
        ]
        if self.vocab_size > config.decoder.vocab_size:
            problems.append(
                f"vocab_size: the tokenizer has {self.vocab_size}, "
                f"the model config only {config.decoder.vocab_size}"
            )
        if problems:
            raise ValueError("tokenizer and model config differ: " + "; ".join(problems))


def _load(definition: str, fields: dict[str, Any]) -> tokenizers.Tokenizer:
    """The library's tokenizer, with added tokens at the ids that the file states.

    The library counts them on from the vocabulary instead, which is the same unless the ids have
    gaps. Tokens of the vocabulary itself stay where they are, and a merge never makes these.
    """
    tokenizer = tokenizers.Tokenizer.from_str(definition)
    stated = {token["content"]: token["id"] for token in fields["added_tokens"]}
    moved = {name: i for name, i in stated.items() if tokenizer.token_to_id(name) != i}
    if not moved:
        return tokenizer
    vocabulary = {**fields["model"]["vocab"], **stated}
    taken = collections.Counter(vocabulary.values())
    double = sorted(name for name, i in moved.items() if taken[i] > 1)
    if double:
        raise ValueError(f"the ids of {', '.join(double)} belong to other tokens as well")
    model = {**fields["model"], "vocab": vocabulary}
    return tokenizers.Tokenizer.from_str(json.dumps({**fields, "model": model}))


def extend_for_images(definition: str) -> tuple[str, dict[str, int]]:
    """Adds the special tokens of NextStep-1 to the tokenizer of a plain language model.

    New tokens take the ids after the largest one, in the published order; those of Qwen2.5 thus
    become the published ones, 151665 for the padding and so on. What exists already keeps its id.
    The model needs an embedding row for each new id.

    Args:
        definition: The text of a `tokenizer.json`, such as Qwen2.5's.

    Returns:
        The text of the extended `tokenizer.json`, and the id of every field of `NextStepConfig`
        that holds one: those of `CONFIG_FIELDS`.

    Raises:
        ValueError: If the definition cannot be read, or has no end of text token.
    """
    try:
        fields = json.loads(definition)
        added, vocabulary = fields["added_tokens"], fields["model"]["vocab"]
        ids = {**vocabulary, **{token["content"]: token["id"] for token in added}}
        largest = max(ids.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the content of a tokenizer.json: {error!r}") from error
    known = {token["content"] for token in added}
    if EOS not in known:
        raise ValueError(f"the tokenizer has no {EOS}, which ends a text and is no image token")
    # Matched as spelled, wherever it stands; nothing around it is swallowed.
    plain = {name: False for name in ("single_word", "lstrip", "rstrip", "normalized")}
    for name in SPECIAL_TOKENS:
        if name not in known:
            largest += 1
            added.append({"id": largest, "content": name, **plain, "special": True})
    extended = json.dumps(fields, ensure_ascii=False)
    tokenizer = TextTokenizer(extended)
    return extended, {field: getattr(tokenizer, field) for field in CONFIG_FIELDS}


def train_bpe(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Trains a byte-level BPE tokenizer.

    The special tokens get the first ids, in the order of `SPECIAL_TOKENS`; then come the 256
    bytes, so that every string has ids; then the merges, most frequent first. The result depends
    on the texts alone, and not on their order.

    Args:
        texts: What the merges are counted on.
        vocab_size: The size aimed at, special tokens included; with few texts there are fewer
            merges to learn and the result is smaller.

    Raises:
        ValueError: If `vocab_size` has no room for special tokens and bytes.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} must be at least {smallest}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return TextTokenizer(tokenizer.to_str())
