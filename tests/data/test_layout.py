import dataclasses
import io

import numpy as np
import PIL.Image
import pytest

from nextstep_jax.data import layout, text_tokenizer
from nextstep_jax.data.schema import Document, Image, Text

# The fixture's ids, written by hand: specials 0 to 5, then the sorted byte alphabet from "!" on.
EOS, PAD, AREA, BOI, EOI, X = 0, 1, 2, 3, 4, 5
A, B, C = 74, 75, 76  # 10 + ord("a") - 33 ...
ONE, TWO, FOUR, STAR = 26, 27, 29, 19
SPACE = 230

SMALL = layout.LayoutConfig(image_bases=(32,), square_only=True)  # 2 x 2 tokens.
BLOCK = [AREA, TWO, STAR, TWO, BOI, X, X, X, X, EOI]
BLOCK_TEXT = [1, 1, 1, 1, 0, 0, 0, 0, 0, 1]
BLOCK_IMAGE = [0, 0, 0, 0, 0, 1, 1, 1, 1, 0]


def picture(value=0, size=(32, 32), loss=True):
    return Image(pixels=np.full((*size, 3), value, np.uint8), loss=loss)


def document(kind, *parts):
    return Document(parts=parts, id="7", source="toy", kind=kind)


# Nothing is left to chance.
FIXED = {
    **dict.fromkeys(("capitalize_prob", "edit_images_last_prob", "drop_text_prob"), 0.0),
    **dict.fromkeys(("edit_drop_two_prob", "edit_drop_three_prob"), 0.0),
}


def lay_out(doc, tokenizer, config=SMALL, image_first=False, seed=0):
    prob = {True: 1.0, False: 0.0}[image_first]
    config = dataclasses.replace(config, image_first_prob=prob, **FIXED)
    return layout.lay_out(doc, tokenizer, config, np.random.default_rng(seed))


def assert_is(sequence, ids, text_weights, image_weights):
    assert sequence.token_ids.tolist() == ids
    assert sequence.text_weights.tolist() == text_weights
    assert sequence.image_weights.tolist() == image_weights
    expected_ref, count = [], 0
    for i in ids:
        expected_ref.append(count if i == X else -1)
        count += i == X
    assert sequence.image_ref.tolist() == expected_ref


def test_pair(tokenizer):
    sequence = lay_out(document("pair", Text("ab c"), picture(9)), tokenizer)
    assert_is(
        sequence,
        [A, B, SPACE, C, *BLOCK, EOS],
        [1, 1, 1, 1, *BLOCK_TEXT, 0],
        [0, 0, 0, 0, *BLOCK_IMAGE, 0],
    )
    assert sequence.grids == ((2, 2),) and sequence.document_id == "toy/7"
    np.testing.assert_array_equal(sequence.images[0], np.full((32, 32, 3), 9))


@pytest.mark.parametrize("listed_first", ["text", "image"])
def test_pair_with_the_image_first(tokenizer, listed_first):
    parts = [Text("ab"), picture()]
    doc = document("pair", *(parts if listed_first == "text" else parts[::-1]))
    assert_is(
        lay_out(doc, tokenizer, image_first=True),
        [*BLOCK, A, B, EOS],
        [*BLOCK_TEXT, 1, 1, 1],
        [*BLOCK_IMAGE, 0, 0, 0],
    )


def test_text(tokenizer):
    sequence = lay_out(document("text", Text("ab"), Text("c")), tokenizer)
    assert_is(sequence, [A, B, C, EOS], [1, 1, 1, 1], [0, 0, 0, 0])
    silent = lay_out(document("text", Text("ab", loss=False), Text("c")), tokenizer)
    assert silent.text_weights.tolist() == [0, 0, 1, 1]


def test_edit(tokenizer):
    doc = document("edit", picture(1, loss=False), Text("ca"), picture(2))
    sequence = lay_out(doc, tokenizer)
    assert_is(
        sequence,
        [*BLOCK, C, A, *BLOCK, EOS],
        [*BLOCK_TEXT, 1, 1, *BLOCK_TEXT, 0],
        [*[0] * 10, 0, 0, *BLOCK_IMAGE, 0],
    )
    assert [image[0, 0, 0] for image in sequence.images] == [1, 2]


def test_interleaved(tokenizer):
    doc = document("interleaved", Text("a"), picture(1), Text("b"), picture(2), Text("c"))
    assert_is(
        lay_out(doc, tokenizer),
        [A, *BLOCK, B, *BLOCK, C, EOS],
        [1, *BLOCK_TEXT, 1, *BLOCK_TEXT, 1, 1],
        [0, *BLOCK_IMAGE, 0, *BLOCK_IMAGE, 0, 0],
    )


def test_an_empty_caption_leaves_eos_after_the_image_untrained(tokenizer):
    sequence = lay_out(document("interleaved", picture(), Text("")), tokenizer)
    assert_is(sequence, [*BLOCK, EOS], [*BLOCK_TEXT, 0], [*BLOCK_IMAGE, 0])


def test_the_area_string_is_rows_times_columns(tokenizer):
    config = layout.LayoutConfig(image_bases=(64,))
    sequence = lay_out(document("pair", Text("a"), picture(size=(40, 150))), tokenizer, config)
    assert sequence.token_ids[1:6].tolist() == [AREA, TWO, STAR, 10 + 56 - 33, BOI]  # "2*8"
    assert sequence.grids == ((2, 8),) and sequence.images[0].shape == (32, 128, 3)
    assert (sequence.token_ids == X).sum() == 16


def test_the_area_string_does_not_merge_with_the_caption():
    tokenizer = text_tokenizer.train_bpe(["4*4", "14", "a 4"] * 9, 290)
    config = layout.LayoutConfig(image_bases=(64,), square_only=True)
    sequence = lay_out(document("pair", Text("1"), picture(size=(64, 64))), tokenizer, config)
    (one,), (four,), (star,) = (tokenizer.encode(c) for c in "14*")
    assert len(tokenizer.encode("14")) == 1
    start = [one, tokenizer.image_area_id, four, star, four, tokenizer.boi_id]
    assert sequence.token_ids[: len(start)].tolist() == start


def test_encoded_images_and_latents(tokenizer):
    stream = io.BytesIO()
    PIL.Image.fromarray(np.full((50, 40, 3), 77, np.uint8)).save(stream, "PNG")
    sequence = lay_out(document("pair", Text("a"), Image(encoded=stream.getvalue())), tokenizer)
    np.testing.assert_array_equal(sequence.images[0], np.full((32, 32, 3), 77))

    latents = np.arange(2 * 64, dtype=np.float32).reshape(2, 64)
    doc = document("pair", Text("a"), Image(latents=latents, grid=(1, 2)))
    sequence = lay_out(doc, tokenizer)
    assert sequence.token_ids.tolist() == [A, AREA, ONE, STAR, TWO, BOI, X, X, EOI, EOS]
    assert sequence.images[0] is latents


def test_prompts_begin_like_the_training_layout(tokenizer):
    pair = lay_out(document("pair", Text("ab c"), picture()), tokenizer)
    prefix = layout.prompt_prefix("ab c", (2, 2), tokenizer)
    assert prefix == [A, B, SPACE, C, AREA, TWO, STAR, TWO, BOI]
    assert pair.token_ids[: len(prefix)].tolist() == prefix

    edit = lay_out(document("edit", picture(), Text("ca"), picture()), tokenizer)
    prefix = [*BLOCK, C, A, AREA, TWO, STAR, TWO, BOI]
    assert edit.token_ids[: len(prefix)].tolist() == prefix
    assert layout.prompt_prefix("<image>ca", (2, 2), tokenizer, [(2, 2)]) == prefix
    assert layout.prompt_prefix("ca", (2, 2), tokenizer, [(2, 2)]) == prefix

    parts = Text("a"), picture(), Text("b"), picture(), picture()
    story = lay_out(document("interleaved", *parts), tokenizer)
    prefix = layout.prompt_prefix("a<image>b<image>", (2, 2), tokenizer, [(2, 2)] * 2)
    assert story.token_ids[: len(prefix)].tolist() == prefix

    # Images of unequal grids, in the order of the tags.
    prefix = layout.prompt_prefix("a<image><image>b", (2, 2), tokenizer, [(1, 2), (2, 1)])
    images = [[AREA, ONE, STAR, TWO, BOI, X, X, EOI], [AREA, TWO, STAR, ONE, BOI, X, X, EOI]]
    assert prefix == [A, *images[0], *images[1], B, AREA, TWO, STAR, TWO, BOI]

    with pytest.raises(ValueError, match="1 <image> tags for 0 input images"):
        layout.prompt_prefix("<image>", (2, 2), tokenizer)
    with pytest.raises(ValueError, match="2 <image> tags for 1 input images"):
        layout.prompt_prefix("<image> <image>", (2, 2), tokenizer, [(2, 2)])


@pytest.mark.parametrize(
    ("kind", "parts", "message"),
    [
        ("text", (picture(),), "kind 'text' has texts and no images; found 0 texts and 1 images"),
        ("pair", (Text("a"),), "kind 'pair' has one text and one image; found 1 texts and 0"),
        ("edit", (Text("a"), picture()), "kind 'edit' has an instruction and two or more images"),
        ("interleaved", (), "at least one part"),
        ("pair", (Text(" \n"), picture()), "the text is blank"),
        ("pair", (Text("a"), picture(size=(15, 32))), "an image of 15x32 pixels"),
        ("pair", (Text("a"), picture(size=(16, 97))), "an image of 16x97 pixels"),
        ("pair", (Text("a"), Image(encoded=b"?")), "cannot decode the image"),
        (
            "pair",
            (Text("a"), Image(latents=np.zeros((3, 64), np.float32), grid=(2, 2))),
            r"grid 2x2, got shape \(3, 64\)",
        ),
    ],
)
def test_bad_documents_are_named(tokenizer, kind, parts, message):
    with pytest.raises(ValueError, match=f"document toy/7: .*{message}"):
        lay_out(document(kind, *parts), tokenizer)


def test_an_unknown_kind_is_refused(tokenizer):
    doc = document("text", Text("a"))
    object.__setattr__(doc, "kind", "poem")  # The tests' type checks would refuse it earlier.
    with pytest.raises(ValueError, match="document toy/7: kind 'poem' is none of 'text', 'pair'"):
        lay_out(doc, tokenizer)


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match=r"image_first_prob=1\.5 must lie in \[0, 1\]"):
        layout.LayoutConfig(image_first_prob=1.5)
    with pytest.raises(ValueError, match="base=100 must be a positive multiple"):
        layout.LayoutConfig(image_bases=(256, 100))
    with pytest.raises(ValueError, match="image_bases must name"):
        layout.LayoutConfig(image_bases=())
    with pytest.raises(ValueError, match=r"edit_drop_text_share=-0\.1 must lie in \[0, 1\]"):
        layout.LayoutConfig(edit_drop_text_share=-0.1)
    with pytest.raises(ValueError, match=r"max_aspect_ratio=0\.5 must be at least 1"):
        layout.LayoutConfig(max_aspect_ratio=0.5)
    with pytest.raises(ValueError, match=r"caption_ratios=.* must be finite and not negative"):
        layout.LayoutConfig(caption_ratios={"long": -1.0})


def test_a_random_crop_is_a_cut_of_the_covering_image(tokenizer):
    wide = np.random.default_rng(0).integers(0, 256, (32, 96, 3), np.uint8)
    doc = document("pair", Text("a"), Image(pixels=wide))
    config = dataclasses.replace(SMALL, random_crop=True)
    starts = set()
    for seed in range(30):
        (cut,) = lay_out(doc, tokenizer, config, seed=seed).images
        # Along the side that sticks out the box lies between pixels: find the nearest whole one.
        errors = [np.abs(wide[:, x : x + 32].astype(int) - cut).mean() for x in range(65)]
        starts.add(int(np.argmin(errors)))
    assert len(starts) > 20 and min(starts) < 16 and max(starts) > 48
    (centre,) = lay_out(doc, tokenizer).images
    np.testing.assert_array_equal(centre, wide[:, 32:64])
