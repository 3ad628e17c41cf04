"""What is known of a tensor before it is read, and what every source of tensors can do."""

import difflib
import pathlib
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read.

    Attributes:
        shape: Its axes.
        dtype: Its dtype on disk; bfloat16 is `ml_dtypes.bfloat16`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype


@runtime_checkable
class TensorFiles(Protocol):
    """Named tensors on disk, whatever the format.

    Attributes:
        infos: Shape and dtype of every tensor, by name.
    """

    infos: Mapping[str, TensorInfo]

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """The tensor as a fresh C-contiguous array, which nothing else holds.

        Raises:
            ValueError: There is no such tensor, or its file is cut off or damaged.
        """
        ...

    def where(self, name: str) -> pathlib.Path:
        """The file that holds the tensor, for messages.

        Raises:
            ValueError: There is no such tensor.
        """
        ...


def unknown_tensor(path: pathlib.Path, name: str, infos: Mapping[str, TensorInfo]) -> ValueError:
    """The error for a tensor that a file does not have, with the names nearest to it."""
    near = difflib.get_close_matches(name, infos, n=3)
    hint = f"; near it: {near}" if near else ""
    return ValueError(f"{path}: no tensor {name!r} among its {len(infos)}{hint}")
