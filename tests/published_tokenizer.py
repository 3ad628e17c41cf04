"""A small tokenizer laid out like the published one.

    python tests/published_tokenizer.py OUT.json

Qwen2.5's kind of byte-level BPE, trained on a text of ours: NFC, the pre-tokenizer that keeps
letters, single digits and punctuation apart, the ordinary vocabulary first and the added tokens
after it in the published order. Everything is written out here, so that what the package believes
about the layout can be held against it.
"""

import json
import pathlib
import sys

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

# The pattern of Qwen2's public tokenizer files: contractions; a word with at most one sign before
# it; one digit; signs with what ends their line; line ends; other white space.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Those of Qwen2.5, 151643 to 151664 in its own file.
QWEN_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>"),
    *("</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
# Its file marks the first fourteen special and the others not.
_NUM_SPECIAL = 14

# 151665 and on in the published file.
IMAGE_TOKENS = (
    *("[PAD]", "<|image_area|>", "<|begin_of_image|>", "<|end_of_image|>"),
    "<|image_placeholder|>",
)
THOUGHT_TOKENS = (
    *("<|begin_of_prompt_refinement|>", "<|end_of_prompt_refinement|>"),
    *("<|begin_of_thinking|>", "<|end_of_thinking|>"),
)
# Of later releases.
LATER_TOKENS = ("<|beginoftext|>", "<|image_end_of_line|>")
ALL_TOKENS = (*QWEN_TOKENS, *IMAGE_TOKENS, *THOUGHT_TOKENS, *LATER_TOKENS)

TEXT = """\
A red circle stands above a blue square, and two green stars are left of them. It's the painter's
third picture of the harbour: 12 boats, 40 gulls and 1 lighthouse, drawn on a 32*32 grid.
Recolour the square to yellow; don't move the stars! Make the sky darker and the water brighter.
A large white triangle in front of the grey wall, photographed at night from 3 metres away.
Der grüne Kreis liegt rechts neben dem Würfel. Une étoile bleue brille sous la lune à l'été.
lowres, blurry, cropped, best quality, film grained, worst quality, watermark, signature.
"""


def build(
    vocab_size: int = 400,
    added: tuple[str, ...] = ALL_TOKENS,
    *,
    image_tokens_special: bool = True,
) -> str:
    """The text of a `tokenizer.json`.

    Args:
        vocab_size: Ordinary tokens: 256 bytes and merges. The added ones follow.
        added: What is added, in this order.
        image_tokens_special: Whether the file marks what follows Qwen's own tokens special.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines() * 3, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"vocab_size={vocab_size}: the text has too few merges")
    for name in added:
        special = QWEN_TOKENS.index(name) < _NUM_SPECIAL if name in QWEN_TOKENS else True
        token = tokenizers.AddedToken(name, special=special, normalized=False)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    fields = json.loads(tokenizer.to_str())
    for token in fields["added_tokens"]:
        if token["content"] not in QWEN_TOKENS:
            token["special"] = image_tokens_special
    return json.dumps(fields, ensure_ascii=False)


if __name__ == "__main__":
    pathlib.Path(sys.argv[1]).write_text(build(), encoding="utf-8")
