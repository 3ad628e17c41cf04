"""Image files to arrays: decoding every kind of file to RGB, and fitting to a size.

NextStep-1 (arXiv 2508.10711) fits an image to the nearest of its aspect buckets (`buckets.py`) by
a Lanczos resize that covers the bucket, and a centre crop. Arrays are uint8 RGB, height x width x
3; scaling to [-1, 1] happens on the device.
"""

import functools
import io

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from jaxtyping import UInt8

from nextstep_jax.data import schema
from nextstep_jax.data.faults import DocumentError

Pixels = UInt8[np.ndarray, "height width 3"]
Picture = PIL.Image.Image | Pixels
"""An RGB image as Pillow decoded it, or as an array; going from one to the other is a copy."""

# 16-bit grey: 65535 becomes 255. Pillow's own conversion would clip at 255.
_GREY_16_SCALE = 257.0
# Not all that Pillow knows: it would start other programs for some (EPS) and follow references.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")


def decode(encoded: bytes) -> Pixels:
    """Decodes an image file to RGB.

    The orientation in the EXIF data is applied; transparency is laid on white; palettes, grey (8
    and 16 bits) and CMYK are converted; of an animation the first frame is taken.

    Raises:
        DocumentError: If the bytes are no image or are cut off, or it has more pixels than
            Pillow's limit against decompression bombs; nothing of such a one is decoded.
    """
    return np.asarray(_decode(encoded))


def _decode(encoded: bytes) -> PIL.Image.Image:
    with open_image(encoded) as image:
        return _load_rgb(image)


def open_image(encoded: bytes) -> PIL.Image.Image:
    """The image in the bytes of a file, of one of the usual formats; its pixels are not read yet.

    Raises:
        DocumentError: If the bytes are no such image.
    """
    try:
        return PIL.Image.open(io.BytesIO(encoded), formats=_formats())
    except Exception as error:  # Damage comes out of Pillow's plugins as whatever they raise.
        raise _error(error) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of the usual formats that this build of Pillow reads."""
    PIL.Image.init()
    return tuple(name for name in _FORMATS if name in PIL.Image.OPEN)


def encoded_size(encoded: bytes) -> tuple[int, int]:
    """The (height, width) that the header of an image file names; nothing is decoded.

    Raises:
        DocumentError: If the bytes are no image, or claim more pixels than twice Pillow's limit.
    """
    with open_image(encoded) as image:
        return image.height, image.width


def rgb_of(image: PIL.Image.Image) -> Pixels:
    """The pixels of a Pillow image of any kind, by the rules of `decode`.

    Raises:
        DocumentError: If the pixels are floating-point, or their file is cut off or claims an
            absurd size (Pillow reads it only now).
    """
    return np.asarray(_load_rgb(image))


def _load_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """What `rgb_of` says, but as a Pillow image; the given one, loaded, if it is as wanted."""
    limit = PIL.Image.MAX_IMAGE_PIXELS
    # At the limit Pillow only warns; it refuses at twice as many.
    if limit is not None and image.width * image.height > limit:
        size = f"{image.height}x{image.width}"
        raise DocumentError("decompression_bomb", f"the image claims {size} pixels, over {limit}")
    try:
        image.load()
        # Pillow's function copies what stands upright already.
        if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:
            image = PIL.ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except DocumentError:
        raise
    except Exception as error:  # See `open_image`.
        raise _error(error) from error


def _error(error: Exception) -> DocumentError:
    bomb = isinstance(error, PIL.Image.DecompressionBombError)
    reason = "decompression_bomb" if bomb else "bad_image"
    # Pillow would name the file by its address in memory, which is another one every time.
    unknown = isinstance(error, PIL.UnidentifiedImageError)
    message = "the bytes are of no known image format" if unknown else error
    return DocumentError(reason, f"cannot decode the image: {message}")


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I"):  # "I;16" and its byte orders; "I" from older Pillow.
        grey = np.asarray(image).astype(np.float64) / _GREY_16_SCALE
        image = PIL.Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    if image.mode == "F":
        raise DocumentError(
            "bad_image", "cannot decode the image: floating-point pixels have no known range"
        )
    if image.has_transparency_data:  # An alpha channel, or a transparent colour or palette entry.
        rgba = image.convert("RGBA")
        white = PIL.Image.new("RGBA", rgba.size, "white")
        image = PIL.Image.alpha_composite(white, rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def resize_cover(
    picture: PIL.Image.Image | UInt8[np.ndarray, "source_height source_width 3"],
    height: int,
    width: int,
    place: tuple[float, float] = (0.5, 0.5),
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Fits an image to a size: Lanczos resize that covers it, and a crop of what sticks out.

    Cropping the source box first and resizing it once gives the same up to the rounding of the
    crop to whole pixels, and does no work on what is cut away.

    Args:
        picture: The image; a Pillow one must be RGB.
        height: Of the result.
        width: Of the result.
        place: Where the crop lies, vertically and horizontally: 0 is top and left, 1 bottom and
            right, one half the centre.
    """
    source_height, source_width = size_of(picture)
    if (source_height, source_width) == (height, width):
        return np.asarray(picture)
    scale = max(height / source_height, width / source_width)
    box_height, box_width = height / scale, width / scale
    top, left = (source_height - box_height) * place[0], (source_width - box_width) * place[1]
    box = (
        max(left, 0.0),
        max(top, 0.0),
        min(left + box_width, source_width),
        min(top + box_height, source_height),
    )
    if isinstance(picture, np.ndarray):
        picture = PIL.Image.fromarray(picture)
    return np.asarray(picture.resize((width, height), PIL.Image.Resampling.LANCZOS, box=box))


def size_of(picture: Picture) -> tuple[int, int]:
    """The (height, width) of a decoded image."""
    if isinstance(picture, np.ndarray):
        return picture.shape[0], picture.shape[1]
    return picture.height, picture.width


def random_crop(
    pixels: UInt8[np.ndarray, "source_height source_width 3"],
    side: int,
    rng: np.random.Generator,
    smallest: float = 1.0,
) -> UInt8[np.ndarray, "{side} {side} 3"]:
    """A square cut out at a random place and scaled to (side, side) by Lanczos.

    Args:
        pixels: The image.
        side: Of the result, in pixels.
        rng: Draws size and place.
        smallest: Side of the smallest square over the largest that fits; sizes are uniform between
            the two.
    """
    height, width = pixels.shape[:2]
    box_side = max(1, round(min(height, width) * rng.uniform(smallest, 1.0)))
    top, left = rng.integers(height - box_side + 1), rng.integers(width - box_side + 1)
    return resize_cover(pixels[top : top + box_side, left : left + box_side], side, side)


def pixels_of(image: schema.Image) -> Pixels:
    """The pixels of a document's image, decoded if need be.

    Raises:
        DocumentError: If it cannot be decoded, or its array is not uint8 (height, width, 3).
        ValueError: If it is given as latents.
    """
    return np.asarray(picture_of(image))


def picture_of(image: schema.Image) -> Picture:
    """As `pixels_of`, but a decoded file stays with Pillow, for `resize_cover` to go on with."""
    if image.encoded is not None:
        return _decode(image.encoded)
    if image.pixels is None:
        raise ValueError("the image is given as latents; it has no pixels")
    pixels = image.pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise DocumentError(
            "bad_image",
            f"image pixels must be uint8 (height, width, 3), got {pixels.dtype} {pixels.shape}",
        )
    return pixels
