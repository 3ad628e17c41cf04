import io

import numpy as np
import PIL.Image
import pytest
import skimage.data

from nextstep_jax.data import images
from nextstep_jax.data.schema import Image

# Left half dark, right half bright, and a bright top left corner: every orientation differs.
GREY = np.full((4, 6), 40, np.uint8)
GREY[:, 3:] = 200
GREY[0, 0] = 250


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def rgb(grey):
    return np.repeat(np.asarray(grey, np.uint8)[..., None], 3, axis=-1)


# What a viewer does for each orientation tag (EXIF 2.3, tag 0x0112), as numpy operations.
EXIF = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", EXIF)
def test_exif_orientation(orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    decoded = images.decode(encoded(PIL.Image.fromarray(GREY), exif=exif.tobytes()))
    np.testing.assert_array_equal(decoded, EXIF[orientation](rgb(GREY)))


def test_alpha_is_laid_on_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = (0, 51, 255)  # A fifth of red over white: 0.2 * 200 + 0.8 * 255 = 244.
    decoded = images.decode(encoded(PIL.Image.fromarray(rgba)))
    expected = [[255, 255, 255], [244, 204, 204], [200, 0, 0]]
    np.testing.assert_allclose(decoded[0].astype(int), expected, atol=1)


def test_grey_with_alpha():
    la = np.array([[[100, 255], [100, 0]]], np.uint8)
    decoded = images.decode(encoded(PIL.Image.fromarray(la, "LA")))
    np.testing.assert_array_equal(decoded, [[[100] * 3, [255] * 3]])


def test_palette_with_and_without_a_transparent_entry():
    image = PIL.Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image = image.convert("P")
    image.putdata([0, 1, 2])
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    np.testing.assert_array_equal(
        images.decode(encoded(image)), [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    )
    np.testing.assert_array_equal(
        images.decode(encoded(image, transparency=1)),
        [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]],
    )


def test_sixteen_bit_grey_keeps_its_range():
    grey = np.array([[0, 257 * 100, 65535, 300]], np.uint16)
    decoded = images.decode(encoded(PIL.Image.fromarray(grey)))
    np.testing.assert_array_equal(decoded, rgb([[0, 100, 255, 1]]))


def test_one_bit():
    image = PIL.Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    np.testing.assert_array_equal(images.decode(encoded(image)), rgb([[0, 255]]))


def test_cmyk_jpeg():
    cmyk = np.zeros((16, 16, 4), np.uint8)
    cmyk[..., 0] = 255  # Full cyan takes away the red.
    decoded = images.decode(encoded(PIL.Image.fromarray(cmyk, "CMYK"), "JPEG", quality=95))
    assert decoded.shape == (16, 16, 3)
    np.testing.assert_allclose(decoded.mean((0, 1)), [0, 255, 255], atol=3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_first_frame_of_an_animation(kind):
    frames = [PIL.Image.fromarray(rgb(np.full((8, 8), v))) for v in (0, 255)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(images.decode(data), np.zeros((8, 8, 3)))


def test_damaged_files_are_refused(monkeypatch):
    data = encoded(PIL.Image.fromarray(skimage.data.astronaut()), "JPEG")
    for broken in (b"", b"not an image", data[: len(data) // 2]):
        with pytest.raises(ValueError, match="cannot decode the image"):
            images.decode(broken)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)  # Astronaut has 262144.
    with pytest.raises(ValueError, match="decompression bomb"):
        images.decode(data)
    with pytest.raises(ValueError, match="no known range"):
        images.decode(encoded(PIL.Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))


def test_rgb_of_an_open_image():
    exif = PIL.Image.Exif()
    exif[0x0112] = 8
    grey = PIL.Image.fromarray(GREY)
    opened = PIL.Image.open(io.BytesIO(encoded(grey, exif=exif.tobytes())))
    np.testing.assert_array_equal(images.rgb_of(opened), EXIF[8](rgb(GREY)))
    np.testing.assert_array_equal(images.rgb_of(grey), rgb(GREY))
    with pytest.raises(ValueError, match="floating-point pixels have no known range"):
        images.rgb_of(PIL.Image.new("F", (2, 2)))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    cut = encoded(PIL.Image.fromarray(noise))[:4000]
    with pytest.raises(ValueError, match=r"cannot decode the image: .*truncated"):
        images.rgb_of(PIL.Image.open(io.BytesIO(cut)))


def test_resize_cover_crops_the_middle():
    tall = np.arange(16, dtype=np.uint8).repeat(8 * 3).reshape(16, 8, 3)
    np.testing.assert_array_equal(images.resize_cover(tall, 8, 8), tall[4:12])
    wide = tall.swapaxes(0, 1)
    np.testing.assert_array_equal(images.resize_cover(wide, 8, 8), wide[:, 4:12])
    assert images.resize_cover(tall, 16, 8) is tall


# Where the covering size is whole, both ways are the same to the last bit; chelsea's is not, and
# the reference rounds it.
@pytest.mark.parametrize(("name", "tolerance"), [("astronaut", 0), ("coffee", 0), ("chelsea", 1)])
def test_resize_cover_equals_resize_then_crop(name, tolerance):
    pixels = getattr(skimage.data, name)()
    height, width = 128, 96
    source_height, source_width = pixels.shape[:2]
    scale = max(height / source_height, width / source_width)
    whole = PIL.Image.fromarray(pixels).resize(
        (round(source_width * scale), round(source_height * scale)), PIL.Image.Resampling.LANCZOS
    )
    whole = np.asarray(whole).astype(float)
    top, left = (whole.shape[0] - height) // 2, (whole.shape[1] - width) // 2
    reference = whole[top : top + height, left : left + width]
    result = images.resize_cover(pixels, height, width)
    assert result.shape == (height, width, 3) and result.dtype == np.uint8
    assert np.abs(result - reference).mean() <= tolerance
    assert np.abs(result - reference[::-1]).mean() > 30.0


def test_random_crops_are_squares_of_the_source():
    """Where sides match, nothing is resized: the crop is a window, and every window occurs."""
    column = np.arange(12, dtype=np.uint8)
    pixels = np.ascontiguousarray(np.broadcast_to(column[None, :, None], (8, 12, 3)))
    rng = np.random.default_rng(0)
    lefts = set()
    for _ in range(60):
        crop = images.random_crop(pixels, 8, rng)
        left = int(crop[0, 0, 0])
        np.testing.assert_array_equal(crop, pixels[:, left : left + 8])
        lefts.add(left)
    assert lefts == {0, 1, 2, 3, 4}
    # Smaller squares are enlarged: a ramp of slope 1 becomes one of slope box / side.
    ramp = np.ascontiguousarray(np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None], (64, 64)))
    ramp = np.repeat(ramp[..., None], 3, axis=2)
    slopes = []
    for _ in range(200):
        crop = images.random_crop(ramp, 64, rng, smallest=0.5).astype(float)
        slopes.append((crop[48, 5, 1] - crop[16, 5, 1]) / 32)
    assert min(slopes) == pytest.approx(0.5, abs=0.06)
    assert max(slopes) == pytest.approx(1.0, abs=0.06)
    assert np.mean(slopes) == pytest.approx(0.75, abs=0.05)


def test_pixels_of_checks_the_array():
    with pytest.raises(ValueError, match=r"must be uint8 .* got float64 \(4, 4, 3\)"):
        images.pixels_of(Image(pixels=np.zeros((4, 4, 3))))
    with pytest.raises(ValueError, match="given as latents"):
        images.pixels_of(Image(latents=np.zeros((1, 64)), grid=(1, 1)))
