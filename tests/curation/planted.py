"""A small source with one defect of every kind, in known places."""

import dataclasses
import io

import numpy as np
import PIL.Image
import PIL.ImageFilter

from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.schema import Document, Image, Text
from nextstep_jax.data.shapes import ShapesSource

NUMBER = 60
# Places of the defects; every other document is a picture of the built-in world.
COPIES = {20: 3, 33: 3, 41: 9}
BLURRED = (5, 17, 50)
SMALL = (11, 47)
WIDE = (32,)
BROKEN = {13: "bad_image", 37: "missing_image"}
TEXT = (55,)


def as_file(picture, quality=92):
    """The bytes of a picture as JPEG."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=quality)
    return file.getvalue()


@dataclasses.dataclass(frozen=True)
class PlantedSource:
    """Pictures of side 128, and the defects of this file."""

    level: str = "full"

    def __len__(self):
        return NUMBER

    def __getitem__(self, index):
        if BROKEN.get(index) == "missing_image":
            raise DocumentError("missing_image", f"number {index}: no such image")
        if index in TEXT:
            return Document((Text("only words"),), f"planted/{index}", "planted", "text")
        picture = self._picture(COPIES.get(index, index))
        if index in COPIES:
            # Copies of 3 are smaller; that of 9 is larger, hence the better one.
            side = 200 if index == 41 else 100
            encoded = as_file(picture.resize((side, side)), 60)
        else:
            encoded = as_file(self._damaged(picture, index))
        if BROKEN.get(index) == "bad_image":
            encoded = encoded[:200]
        parts = (Text(f"picture <{index}>"), Image(encoded=encoded))
        return Document(parts, f"planted/{index}", "planted", "pair", {"number": index})

    def _picture(self, index):
        source = ShapesSource("pair", level=self.level, image_size=128)
        return PIL.Image.fromarray(np.array(source[index].images[0].pixels))

    def _damaged(self, picture, index):
        if index in BLURRED:
            return picture.filter(PIL.ImageFilter.GaussianBlur(8))
        if index in SMALL:
            return picture.resize((48, 48))
        if index in WIDE:
            return picture.crop((0, 20, 128, 50)).resize((512, 96))
        return picture
