"""Crops of the photographs that scikit-image ships: real pictures on a machine without any.

Everything is a pure function of (seed, index, split): the photograph, the box inside it and whether
it is mirrored. The two splits draw from different photographs, so that held-out crops show nothing
that training saw. The set is far too small to learn the world from; it is enough to tell whether
an image tokenizer that was trained on it keeps the detail of photographs it has not seen.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import SupportsIndex

import numpy as np
from jaxtyping import UInt8

from nextstep_jax.data.images import resize_cover
from nextstep_jax.data.schema import Document, Image, Text

# Photograph -> what its caption says. Four subjects and textures of their own are held out.
PHOTOGRAPHS: dict[str, dict[str, str]] = {
    "train": {
        "astronaut": "an astronaut in front of a flag",
        "rocket": "a rocket on its launch pad",
        "stereo_left": "a motorcycle in a garage",
        "stereo_right": "a motorcycle in a garage, seen from further right",
        "retina": "the retina of an eye",
        "immunohistochemistry": "stained tissue under a microscope",
        "hubble_deep_field": "galaxies in deep space",
        "coins": "old coins",
        "moon": "the surface of the moon",
        "clock": "a blurred clock",
        "brick": "a brick wall",
        "grass": "grass",
    },
    "heldout": {
        "chelsea": "the face of a cat",
        "coffee": "a cup of coffee on a table",
        "camera": "a man with a camera on a tripod",
        "gravel": "gravel",
    },
}

_NUM_DOCUMENTS = 1_000_000


@dataclasses.dataclass(frozen=True)
class PhotographSource:
    """Random square crops; document i shows photograph i modulo their number.

    The side of the box is log-uniform between `image_size` and `largest_scale` times that, as far
    as the photograph reaches: crops at the photograph's own resolution and reduced ones.

    Attributes:
        image_size: Side of the crops in pixels.
        split: "train" or "heldout", which share no photograph.
        seed: Of boxes and mirroring.
        largest_scale: Side of the largest box over `image_size`.
        num_documents: Length of the source.
    """

    image_size: int = 64
    split: str = "train"
    seed: int = 0
    largest_scale: float = 4.0
    num_documents: int = _NUM_DOCUMENTS

    def __post_init__(self):
        """Checks the arguments and that scikit-image is there.

        Raises:
            ValueError: An argument is out of range, or scikit-image is not installed.
        """
        if self.split not in PHOTOGRAPHS:
            raise ValueError(f"split={self.split!r} is unknown; choose from {list(PHOTOGRAPHS)}")
        if self.image_size < 1 or self.largest_scale < 1 or self.num_documents < 1:
            raise ValueError(
                f"image_size={self.image_size}, largest_scale={self.largest_scale} and"
                f" num_documents={self.num_documents} must be at least 1"
            )
        if importlib.util.find_spec("skimage") is None:
            raise ValueError(
                "the photographs come with scikit-image, which is not installed: "
                "pip install nextstep_jax[photographs]"
            )

    def __len__(self) -> int:
        """The number of documents."""
        return self.num_documents

    def __getitem__(self, index: SupportsIndex) -> Document:
        """The crop of an index in [0, len) and its caption.

        Raises:
            IndexError: The index is out of range.
        """
        index = int(index)
        if not 0 <= index < self.num_documents:
            raise IndexError(f"index {index} is not in [0, {self.num_documents})")
        captions = PHOTOGRAPHS[self.split]
        name = list(captions)[index % len(captions)]
        rng = np.random.default_rng([self.seed, list(PHOTOGRAPHS).index(self.split), index])
        pixels = _random_crop(photograph(name), self.image_size, self.largest_scale, rng)
        return Document(
            parts=(Text(f"a photograph of {captions[name]}"), Image(pixels=pixels)),
            id=f"{self.split}/{index}",
            source="photographs",
            kind="pair",
            metadata={"photograph": name},
        )


@functools.cache
def photograph(name: str) -> UInt8[np.ndarray, "height width 3"]:
    """A photograph as RGB; grey ones have three equal channels.

    Raises:
        ValueError: The name is not among `PHOTOGRAPHS`.
    """
    if not any(name in names for names in PHOTOGRAPHS.values()):
        raise ValueError(f"photograph {name!r} is unknown; see PHOTOGRAPHS")
    from skimage import data  # an extra

    if name.startswith("stereo"):
        pixels = data.stereo_motorcycle()[name == "stereo_right"]
    else:
        load: Callable[[], np.ndarray] = getattr(data, name)
        pixels = load()
    pixels = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    pixels = np.ascontiguousarray(pixels[..., :3], dtype=np.uint8)
    pixels.flags.writeable = False  # shared by every caller
    return pixels


def _random_crop(
    pixels: np.ndarray, side: int, largest_scale: float, rng: np.random.Generator
) -> np.ndarray:
    """A random box of random size, scaled to (side, side) and mirrored every other time."""
    height, width = pixels.shape[:2]
    largest = min(side * largest_scale, height, width)
    smallest = min(side, largest)
    box_side = round(np.exp(rng.uniform(np.log(smallest), np.log(largest))))
    top, left = rng.integers(height - box_side + 1), rng.integers(width - box_side + 1)
    cut = resize_cover(pixels[top : top + box_side, left : left + box_side], side, side)
    return np.ascontiguousarray(cut[:, ::-1] if rng.random() < 0.5 else cut)
