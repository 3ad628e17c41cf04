"""The weights of LPIPS and Inception, out of the files that users have.

LPIPS (arXiv 1801.03924) takes a classifier as torchvision publishes it and the package's own small
file of channel weights, or both in one saved `lpips.LPIPS`; Inception is pytorch-fid's or
torchvision's. What the networks do not use, such as their classifiers, is left in the file. They
judge and train the image tokenizer of NextStep-1 (arXiv 2508.10711).
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nextstep_jax.interop import streaming
from nextstep_jax.interop.tensor_files import open_tensors
from nextstep_jax.interop.tensor_map import CONV, SAME, Path, Slot, leaves_of, published_shape
from nextstep_jax.interop.tensors import TensorFiles
from nextstep_jax.models.inception import Inception
from nextstep_jax.models.perceptual import LPIPS_MIN_SIDES, Lpips

# Beginnings of names that may be there and are not needed.
_UNUSED_OF_BACKBONE = ("classifier.",)
# `lins` are the same weights once more; the scaling layer is a constant of the version.
_UNUSED_OF_LPIPS = ("lins.", "scaling_layer.")
_UNUSED_OF_INCEPTION = ("fc.", "AuxLogits.")

# The width of the classifier is the one thing by which the files differ.
_VARIANTS = {1008: "fid", 1000: "torchvision"}

_LEAVES_OF_INCEPTION = {
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "var": "bn.running_var",
}


def read_lpips(
    network: str, backbone: pathlib.Path, linear: pathlib.Path | None = None
) -> dict[str, Any]:
    """Reads the parameters of `Lpips(network)`, float32.

    Args:
        network: One of `LPIPS_NETWORKS`.
        backbone: torchvision's weights of the network ("features.0.weight", ...). Without
            `linear`, the state of a whole `lpips.LPIPS` ("net.slice1.0.weight", ...).
        linear: The package's `vgg.pth` or `alex.pth` ("lin0.model.1.weight", ...).

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: The network is unknown, a file is damaged, or it holds other tensors than the
            network needs, which are all listed.
    """
    model = Lpips(network)
    side = LPIPS_MIN_SIDES[network]
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    abstract = jax.eval_shape(model.init, jax.random.key(0), image, image)["params"]
    slots = lpips_slots(abstract, whole=linear is None)
    if linear is None:
        return _read(backbone, slots, abstract, _UNUSED_OF_LPIPS)
    # Both are checked, as far as they can be unread, before the large one is read.
    files = [open_tensors(path) for path in (backbone, linear)]
    halves = [[s for s in slots if (s.path[0] == "net") == is_net] for is_net in (True, False)]
    unused = (_UNUSED_OF_BACKBONE, _UNUSED_OF_LPIPS)
    for path, file, half, names in zip((backbone, linear), files, halves, unused, strict=True):
        _check(path, file, half, names)
    params = {}
    for file, half in zip(files, halves, strict=True):
        params |= streaming.load_params(file, half, abstract, dtype=jnp.float32)
    return params


def read_inception(path: pathlib.Path) -> tuple[Inception, dict[str, Any]]:
    """Reads Inception v3, float32, and tells pytorch-fid's from torchvision's.

    Args:
        path: `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, or torchvision's
            `inception_v3_google-*.pth`.

    Returns:
        The network that fits the file, and its parameters.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, its classifier has neither 1008 nor 1000 classes, or it
            holds other tensors than the network needs, which are all listed.
    """
    files = open_tensors(path)
    shape = files.infos["fc.weight"].shape if "fc.weight" in files.infos else None
    classes = shape[0] if shape else None
    if classes not in _VARIANTS:
        found = "no fc.weight" if shape is None else f"fc.weight {list(shape)}"
        accepted = " or ".join(f"[{n}, 2048] ({variant})" for n, variant in _VARIANTS.items())
        raise ValueError(f"{path} is no Inception v3: it has {found}, expected {accepted}")
    model = Inception(_VARIANTS[classes])
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    abstract = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    return model, _read(path, inception_slots(abstract), abstract, _UNUSED_OF_INCEPTION, files)


def lpips_slots(abstract: Any, *, whole: bool = False) -> list[Slot]:
    """The slots of LPIPS.

    Args:
        abstract: Its parameters, or anything with their paths and shapes.
        whole: By the names in a saved `lpips.LPIPS`, else by those of torchvision's network and of
            the package's file of channel weights.
    """
    slots = []
    slices = _slices(abstract["net"])
    for path, leaf in leaves_of(abstract).items():
        if path[0] == "net":
            index = int(path[1].removeprefix("features_"))
            prefix = f"net.slice{slices[index]}" if whole else "features"
            name = f"{prefix}.{index}.{'weight' if path[-1] == 'kernel' else 'bias'}"
        else:
            name = f"{path[0]}.model.1.weight"
        slots.append(_slot(name, path, leaf.shape))
    return slots


def inception_slots(abstract: Any) -> list[Slot]:
    """The slots of Inception, of either variant."""
    return [
        _slot(f"{'.'.join(path[:-1])}.{_LEAVES_OF_INCEPTION[path[-1]]}", path, leaf.shape)
        for path, leaf in leaves_of(abstract).items()
    ]


def _slices(convs: Any) -> dict[int, int]:
    """The slice of `lpips.LPIPS`, from 1, that each convolution of the network is in."""
    # A slice ends where features are looked at; the index of a layer is also that of the network.
    starts = (0, 4, 9, 16, 23) if "features_28" in convs else (0, 2, 5, 8, 10)
    indices = [int(name.removeprefix("features_")) for name in convs]
    return {index: sum(start <= index for start in starts) for index in indices}


def _slot(name: str, path: Path, shape: tuple[int, ...]) -> Slot:
    layout = CONV if len(shape) == 4 else SAME
    return Slot(name, path, None, layout, published_shape(shape, layout))


def _read(
    path: pathlib.Path,
    slots: Sequence[Slot],
    abstract: Any,
    unused: tuple[str, ...],
    files: TensorFiles | None = None,
) -> dict[str, Any]:
    """All parameters out of one file."""
    files = open_tensors(path) if files is None else files
    _check(path, files, slots, unused)
    return streaming.load_params(files, slots, abstract, dtype=jnp.float32)


def _check(
    path: pathlib.Path, files: TensorFiles, slots: Sequence[Slot], unused: tuple[str, ...]
) -> None:
    """Lists what is missing, unexpected or of another shape, in one error."""
    ignored = [n for n in files.infos if n.startswith(unused) or n.endswith(".num_batches_tracked")]
    streaming.check_tensors(files, slots, ignored, what=str(path))
