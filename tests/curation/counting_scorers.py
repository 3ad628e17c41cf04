"""A scorer that leaves a trace: one file for every document that it rates."""

import pathlib
import uuid

from nextstep_jax.curation.scorers import pixels_in


class Brightness:
    """The mean of the last image's values."""

    fields = ("mean",)
    accelerator = False

    def __init__(self, trace, name="brightness", batch_size=4):
        self.name, self.batch_size = name, batch_size
        self._trace = pathlib.Path(trace)

    def score(self, documents):
        for _ in documents:
            (self._trace / uuid.uuid4().hex).touch()
        return [{"mean": float(pixels_in(one, -1).mean())} for one in documents]
