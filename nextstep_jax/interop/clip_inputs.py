"""What a CLIP is given: fitted and normalised images, and the ids of texts.

As published with CLIP (arXiv 2103.00020): images are resized by Pillow's bicubic so that the
shorter side is that of the model, cropped at the centre and normalised per channel; texts are
lower-cased byte-level BPE between a start and an end token, cut at the context length. Both are
read from the folder of the weights (`interop.clip_weights`).
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import PIL.Image
import tokenizers
from jaxtyping import Array, Float, Int32, UInt8

from nextstep_jax.interop.config_reader import ConfigReader
from nextstep_jax.interop.model_directory import read_json
from nextstep_jax.models.clip import ClipConfig

# Of the images that CLIP was trained on, in [0, 1].
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ClipPreprocessing:
    """How images are fitted to a CLIP.

    Attributes:
        resize: Length of the shorter side after the resize, in pixels.
        crop: Side of the square that is cut out of the centre.
        mean: Subtracted per channel, of images in [0, 1].
        std: Divided by, per channel.

    Raises:
        ValueError: The crop is larger than the resized image, or a deviation is not positive.
    """

    resize: int = 224
    crop: int = 224
    mean: tuple[float, float, float] = _MEAN
    std: tuple[float, float, float] = _STD

    def __post_init__(self):
        """Checks what cannot be computed."""
        if self.crop > self.resize:
            raise ValueError(f"crop={self.crop} must be at most resize={self.resize}")
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std} must be positive")

    def fit(self, pixels: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "side side 3"]:
        """Resizes the shorter side and cuts out the centre, still 8 bits a channel."""
        height, width = pixels.shape[:2]
        # The longer side is rounded down, and so are the margins of the crop.
        short = min(height, width)
        rows, columns = (int(self.resize * side / short) for side in (height, width))
        image = PIL.Image.fromarray(pixels)
        if image.size != (columns, rows):
            image = image.resize((columns, rows), PIL.Image.Resampling.BICUBIC)
        top, left = (rows - self.crop) // 2, (columns - self.crop) // 2
        return np.asarray(image.crop((left, top, left + self.crop, top + self.crop)))

    def normalize(
        self, images: UInt8[Array, "batch side side 3"]
    ) -> Float[Array, "batch side side 3"]:
        """(x / 255 - mean) / std, on the device."""
        scaled = images.astype(jnp.float32) / 255
        return (scaled - jnp.asarray(self.mean)) / jnp.asarray(self.std)


def read_preprocessing(directory: pathlib.Path, config: ClipConfig) -> ClipPreprocessing:
    """How the images of the CLIP in a folder are fitted.

    Where the folder has neither preprocessor_config.json nor processor_config.json, it is the
    published way at the size of the config.

    Raises:
        ValueError: It asks for what we do not compute, or for another size than the config; all
            faults are listed.
    """
    directory = pathlib.Path(directory)
    path, values = directory / "preprocessor_config.json", None
    if path.is_file():
        values = read_json(path)
    elif (directory / "processor_config.json").is_file():
        path = directory / "processor_config.json"
        values = read_json(path).get("image_processor")
    if not isinstance(values, Mapping):
        return ClipPreprocessing(config.image_size, config.image_size)
    reader = ConfigReader(values)
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        reader.accept(name, True)
    reader.accept("resample", int(PIL.Image.Resampling.BICUBIC))
    scale = reader.number("rescale_factor", default=1 / 255)
    if not math.isclose(scale, 1 / 255):
        reader.problems.append(f"rescale_factor={scale!r} is not supported, only 1/255")
    # Older files have plain numbers here.
    resize = reader.integer(*_one_of(reader, "size", "size.shortest_edge"), default=224)
    heights = _one_of(reader, "crop_size", "crop_size.height")
    crop = reader.integer(*heights, default=224)
    if crop != reader.integer(*_one_of(reader, "crop_size", "crop_size.width"), default=224):
        reader.problems.append(f"crop_size={values['crop_size']!r} must be a square")
    if isinstance(values.get("size"), Mapping) and "shortest_edge" not in values["size"]:
        reader.problems.append(f"size={values['size']!r} must be given as shortest_edge")
    if crop and crop != config.image_size:
        reader.problems.append(
            f"crop_size={crop} is not the model's image_size={config.image_size}"
        )
    mean, std = _channels(reader, "image_mean", _MEAN), _channels(reader, "image_std", _STD)
    reader.finish(str(path))
    try:
        return ClipPreprocessing(resize, crop, mean, std)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _one_of(reader: ConfigReader, plain: str, nested: str) -> tuple[str]:
    """The key to read: the nested one where there is a mapping."""
    return (nested if isinstance(reader.get(plain), Mapping) else plain,)


def _channels(reader: ConfigReader, name: str, default: tuple[float, ...]) -> tuple[Any, ...]:
    """A number a channel."""
    value = reader.get(name)
    if value is None:
        return default
    if not isinstance(value, list) or len(value) != 3 or not all(map(_is_number, value)):
        reader.problems.append(f"{name}={value!r} must be three finite numbers")
        return default
    return tuple(float(one) for one in value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


class ClipTokenizer:
    """Texts to the ids that a CLIP reads.

    Attributes:
        start_id: In front of every text.
        end_id: Behind every text, and the padding.
    """

    def __init__(self, path: pathlib.Path, config: ClipConfig):
        """Reads a tokenizer.json and checks it against the config.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It cannot be read, puts something else than one token before and one behind
                a text, or does not fit the config.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # The library raises bare Exception for a bad definition.
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        self._length = config.context_length
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self._length)
        # Their spelling inside a caption is text, so that a caption cannot end itself.
        self._tokenizer.encode_special_tokens = True
        ends = self._tokenizer.encode("").ids
        if len(ends) != 2:
            raise ValueError(f"{path}: an empty text has the ids {ends}, expected start and end")
        self.start_id, self.end_id = ends
        largest = max(self._tokenizer.get_vocab().values())
        if largest >= config.vocab_size:
            fault = f"it has ids up to {largest}, the model a vocabulary of {config.vocab_size}"
        elif config.end_id is None and self.end_id != largest:
            fault = f"its end token {self.end_id} is not its largest id, {largest}"
        elif config.end_id not in (None, self.end_id):
            fault = f"its end token is {self.end_id}, the model's {config.end_id}"
        else:
            return
        raise ValueError(f"{path} does not fit the model: {fault}")

    def encode(self, texts: Sequence[str]) -> Int32[np.ndarray, "texts context"]:
        """The ids of texts, cut off at and padded to the context length."""
        rows = np.full((len(texts), self._length), self.end_id, np.int32)
        for row, encoding in zip(rows, self._tokenizer.encode_batch(list(texts)), strict=True):
            row[: len(encoding.ids)] = encoding.ids
        return rows
