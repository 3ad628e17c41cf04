"""Tensors under other names, in memory, or from several places: all of them `TensorFiles`."""

import pathlib
from collections.abc import Mapping, Sequence

from jaxtyping import Shaped
from numpy import ndarray

from nextstep_jax.interop.tensors import TensorFiles, TensorInfo


class MemoryTensors:
    """Arrays in memory.

    Attributes:
        infos: Shape and dtype by name.
    """

    def __init__(self, arrays: Mapping[str, Shaped[ndarray, "..."]]):
        """Keeps the arrays as they are."""
        self._arrays = dict(arrays)
        self.infos = {n: TensorInfo(tuple(a.shape), a.dtype) for n, a in self._arrays.items()}

    def read(self, name: str) -> Shaped[ndarray, "..."]:
        """The array of a name."""
        return self._arrays[name]

    def where(self, name: str) -> pathlib.Path:
        """Nowhere on disk."""
        return pathlib.Path("memory")


class RenamedTensors:
    """Another's tensors without a prefix of their names.

    Attributes:
        infos: Shape and dtype by the new names.
        renamed: The old name of every tensor that has another one now.
    """

    def __init__(self, files: TensorFiles, prefix: str):
        """A name without the prefix stays.

        Raises:
            ValueError: A tensor is there both with and without the prefix.
        """
        double = [name for name in files.infos if prefix + name in files.infos]
        if double:
            where = files.where(double[0])
            raise ValueError(f"{where}: with and without {prefix!r} in front: {', '.join(double)}")
        self._files = files
        self._names = {name.removeprefix(prefix): name for name in files.infos}
        self.infos = {new: files.infos[old] for new, old in self._names.items()}
        self.renamed = {new: old for new, old in self._names.items() if new != old}

    def read(self, name: str) -> Shaped[ndarray, "..."]:
        """The tensor of a new name."""
        return self._files.read(self._names[name])

    def where(self, name: str) -> pathlib.Path:
        """Its file."""
        return self._files.where(self._names[name])


class MergedTensors:
    """Several sources as one; the first that has a name gives the tensor.

    Attributes:
        infos: Shape and dtype by name.
    """

    def __init__(self, sources: Sequence[TensorFiles]):
        """Looks names up in the order of the sources."""
        self._sources = {name: s for s in reversed(sources) for name in s.infos}
        self.infos = {name: s.infos[name] for name, s in self._sources.items()}

    def read(self, name: str) -> Shaped[ndarray, "..."]:
        """The tensor of a name."""
        return self._sources[name].read(name)

    def where(self, name: str) -> pathlib.Path:
        """Its file."""
        return self._sources[name].where(name)
