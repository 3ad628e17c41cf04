import dataclasses
import io

import numpy as np
import PIL.Image
import pytest
from PIL import Image

from nextstep_jax.data.layout import prompt_prefix
from nextstep_jax.data.text_tokenizer import TextTokenizer
from nextstep_jax.sampling import requests
from nextstep_jax.sampling.presets import Preset, get_preset
from nextstep_jax.sampling.requests import guidance_branches
from tests import published_tokenizer, tiny_model

PLACEHOLDER, TOKENIZER = tiny_model.CONFIG.image_placeholder_id, tiny_model.tokenizer()
GRID = (32, 32)


def branches_of(prompt, scale=7.5, image_scale=1.0, grids=(), limit=512, **texts):
    preset = Preset(get_preset("plain").sampler, scale, image_scale, **texts)
    return guidance_branches(prompt, preset, GRID, grids, TOKENIZER, limit)


@pytest.mark.parametrize(
    ("scale", "image_scale", "num_inputs", "sees"),
    [
        (1.0, 1.0, 0, (False,)),
        (3.0, 2.0, 0, (False, False)),
        (1.0, 1.0, 1, (True,)),
        (3.0, 1.0, 1, (True, False)),
        (1.0, 2.0, 1, (True, True, False)),
        (3.0, 2.0, 2, (True, True, False)),
        (0.5, 1.0, 1, (True, False)),  # Every scale but 1 needs its branch.
    ],
)
def test_number_of_branches(scale, image_scale, num_inputs, sees):
    grids = [(2, 8), (4, 4)][:num_inputs]
    args = dict(scale=scale, image_scale=image_scale, grids=grids, negative_prompt="b")
    branches, sees_inputs = branches_of("<image>" * num_inputs + "a", **args)
    assert sees_inputs == sees
    assert [ids.count(PLACEHOLDER) for ids in branches] == [16 * num_inputs * one for one in sees]
    assert branches[-1] == tuple(prompt_prefix("b", GRID, TOKENIZER)) or len(sees) == 1


def test_an_edit_with_the_published_vocabulary_layout():
    """Three branches of the published edit preset, spelled out."""
    tokenizer = TextTokenizer(published_tokenizer.build())
    preset = get_preset("nextstep-1-edit")
    # Tags in the middle and at the end, images of unequal grids; size and caption never merge.
    prompt = "Recolour <image>3 like<image>"
    args = (preset, (32, 32), [(2, 3), (1, 2)], tokenizer, 512)
    branches, sees_inputs = guidance_branches(prompt, *args)
    spelled = [tokenizer.decode(ids) for ids in branches]
    first = f"<|image_area|>2*3<|begin_of_image|>{'<|image_placeholder|>' * 6}<|end_of_image|>"
    second = f"<|image_area|>1*2<|begin_of_image|>{'<|image_placeholder|>' * 2}<|end_of_image|>"
    end = "<|image_area|>32*32<|begin_of_image|>"
    assert spelled == [
        f"Recolour {first}3 like{second}{end}",
        f"{first}{second}Copy original image.{end}",
        f"Copy original image.{end}",
    ]
    assert sees_inputs == (True, True, False)
    three, two = tokenizer.encode("3"), tokenizer.encode("2")
    start = branches[0].index(tokenizer.image_area_id) + 1
    assert list(branches[0][start : start + 3]) == [*two, *tokenizer.encode("*"), *three]
    assert branches[0][start + 3] == tokenizer.boi_id == 424

    # At an image scale of 1: the negative prompt alone, without the images.
    two = dataclasses.replace(preset, image_guidance_scale=1.0)
    branches, sees_inputs = guidance_branches(prompt, two, *args[1:])
    assert [tokenizer.decode(ids) for ids in branches] == [spelled[0], spelled[2]]
    assert sees_inputs == (True, False)


def test_texts_of_the_published_preset():
    tokenizer = TextTokenizer(published_tokenizer.build())
    args = (get_preset("nextstep-1"), (32, 32), [], tokenizer, 512)
    (full, negative), _ = guidance_branches("a star", *args)
    end = "<|image_area|>32*32<|begin_of_image|>"
    assert tokenizer.decode(full) == f"a star masterpiece, film grained, best quality{end}"
    assert tokenizer.decode(negative).startswith("lowres, bad anatomy, bad hands, text, error,")
    # The caption with its positive text is one string to the tokenizer; what follows is not.
    text = "a star masterpiece, film grained, best quality"
    assert list(full[: -2 - len(tokenizer.encode("32*32"))]) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("prompt", "grids", "message"),
    [
        ("<image> a", [], "the prompt has 1 <image> tags for 0 input images"),
        ("<image> a", [(1, 1)] * 2, "the prompt has 1 <image> tags for 2 input images"),
        ("<image><image>", [(1, 1)], "the prompt has 2 <image> tags for 1 input images"),
    ],
)
def test_tags_and_images_that_differ_in_number(prompt, grids, message):
    with pytest.raises(ValueError, match=message):
        branches_of(prompt, grids=grids)


def test_tags_in_other_texts():
    # The positive text is part of the prompt.
    branches, _ = branches_of("a", grids=[(1, 1)], positive_prompt="<image>b")
    expected = prompt_prefix("a <image>b", GRID, TOKENIZER, [(1, 1)])
    assert branches[0] == tuple(expected)
    for grids in ([], [(1, 1)]):
        message = "the negative prompt has 2 <image> tags; only a prompt places input images"
        with pytest.raises(ValueError, match=message):
            branches_of("a", grids=grids, negative_prompt="<image><image>b")
    assert len(branches_of("a", scale=1.0, negative_prompt="<image>")[0]) == 1  # Not used.


def test_the_limit_counts_text_and_not_input_images():
    # Area token, five characters of the size, begin of the image, and end of it: 8 and 7; "a".
    branches, _ = branches_of("a", grids=[GRID], limit=16)
    assert len(branches[0]) == 1024 + 16
    message = r"^the prompt 'a' has 16 text tokens with its size string; the limit is 15$"
    with pytest.raises(ValueError, match=message):
        branches_of("a", grids=[GRID], limit=15)
    # The middle branch is longer than the negative prompt alone: 8 + 4 + 7.
    args = dict(grids=[GRID], image_scale=2.0, negative_prompt="!!!!")
    assert [len(ids) for ids in branches_of("a", **args, limit=19)[0]] == [1040, 1043, 11]
    with pytest.raises(ValueError, match=r"^the negative prompt '!!!!' has 19 text tokens"):
        branches_of("a", **args, limit=18)


@pytest.mark.parametrize(
    ("size", "source", "expected"),
    [
        ((None, None), None, (32, 32)),
        ((None, None), (300, 451), (26, 38)),  # 13 x 19 at base 256, twice for 512.
        ((None, None), (451, 300), (38, 26)),
        ((None, None), (10, 900), (16, 64)),
        ((256, 256), (300, 451), (16, 16)),
        ((None, 512), (300, 451), (32, 32)),  # The other side is the default.
        ((256, 1024), None, (16, 64)),
        ((448, 576), None, (28, 36)),
        ((16, 16), None, (1, 1)),
        ((480, 1344), None, None),
        ((256, None), None, None),  # 256 x 512.
        ((500, 500), (300, 451), None),
    ],
)
def test_output_grid(size, source, expected):
    inputs = [np.zeros((*source, 3), np.uint8)] if source else []
    if expected is None:
        with pytest.raises(ValueError, match="off the 17 aspect grids with 16 pixels a token"):
            requests.output_grid(*size, (512, 512), inputs, 16)
    else:
        assert requests.output_grid(*size, (512, 512), inputs, 16) == expected


def test_each_input_goes_to_its_own_grid_at_the_base_of_the_output():
    sources = [np.zeros((*size, 3), np.uint8) for size in ((300, 451), (90, 30), (64, 64))]
    for grid, sizes in {
        (32, 32): [(416, 608), (896, 288), (512, 512)],
        (16, 64): [(416, 608), (896, 288), (512, 512)],
        (9, 28): [(208, 304), (448, 144), (256, 256)],
    }.items():
        fitted = requests.fit_inputs(sources, grid, 16)
        assert [one.shape for one in fitted] == [(*size, 3) for size in sizes]


def test_inputs_are_resized_to_cover_and_cropped_in_the_middle():
    # Bars of 0, 1 ... 9 from left to right; a square keeps the middle of a wide image.
    bars = np.repeat(np.arange(10, dtype=np.uint8) * 20, 32)
    source = np.broadcast_to(bars[None, :, None], (288, 320, 3))
    (fitted,) = requests.fit_inputs([source], (4, 4), 16)  # 15 x 17 is no whole grid here.
    assert fitted.shape == (64, 64, 3)
    # 288 of 320 columns are kept, 16 on each side cut off: column x shows 16 + 4.5 (x + 0.5).
    centres = 16 + 4.5 * (np.arange(64) + 0.5)
    inside = (centres % 32 > 12) & (centres % 32 < 20)  # Away from the edges of the bars.
    np.testing.assert_array_equal(fitted[30, inside, 0], (centres[inside] // 32).astype(int) * 20)
    assert inside.sum() > 10


def test_images_of_all_modes_become_rgb():
    rgba = Image.new("RGBA", (4, 2), (200, 0, 0, 51))
    grey = Image.new("L", (4, 2), 77)
    palette = Image.new("RGB", (4, 2), (10, 200, 30)).quantize(4)
    cmyk = Image.new("CMYK", (4, 2), (0, 255, 255, 0))
    found = requests.input_images([rgba, grey, palette, cmyk, np.full((2, 4, 3), 9, np.uint8)])
    # A fifth of red on white; cyan-free print is red.
    expected = [(244, 204, 204), (77,) * 3, (10, 200, 30), (255, 0, 0), (9,) * 3]
    for pixels, colour in zip(found, expected, strict=True):
        assert pixels.shape == (2, 4, 3) and pixels.dtype == np.uint8
        np.testing.assert_allclose(pixels.astype(int), np.broadcast_to(colour, (2, 4, 3)), atol=1)
    assert requests.input_images(None) == []


def test_orientation_is_applied():
    grey = np.zeros((4, 6), np.uint8)
    grey[0, 0] = 255
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # To be turned clockwise by a quarter: the first row becomes the last column.
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "PNG", exif=exif.tobytes())
    (pixels,) = requests.input_images(Image.open(stream))
    assert pixels.shape == (6, 4, 3)
    np.testing.assert_array_equal(np.argwhere(pixels[..., 0] == 255), [[0, 3]])
    # A file that is cut off shows only when it is read.
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(
        stream, "PNG"
    )
    cut = Image.open(io.BytesIO(stream.getvalue()[:2000]))
    with pytest.raises(ValueError, match="cannot decode the image"):
        requests.input_images(cut)


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((0, 8, 3)), "x"]
)
def test_other_things_are_no_images(image):
    with pytest.raises(ValueError, match="image must be a PIL image or uint8 "):
        requests.input_images(image)


def test_first_seeds():
    assert requests.first_seeds(7, 3, 2) == [7, 7, 7]
    assert requests.first_seeds([1, 5], 2, 2) == [1, 5]
    assert requests.first_seeds(np.int64(4), 1, 1) == [4]
    assert requests.first_seeds([8, 5, 1], 3, 2, shared_noise=True) == [8, 8, 8]
    with pytest.raises(ValueError, match="seed: 2 seeds for 3 prompts"):
        requests.first_seeds([1, 2], 3, 1, shared_noise=True)
    assert requests.first_seeds(2**32 - 2, 1, 2) == [2**32 - 2]
    with pytest.raises(ValueError, match=r"lie in \[0, 4294967296\)"):
        requests.first_seeds(2**32 - 1, 1, 2)
