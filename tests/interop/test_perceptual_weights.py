import json
import zlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from nextstep_jax.interop.perceptual_weights import read_inception, read_lpips
from nextstep_jax.interop.tensor_map import leaves_of
from nextstep_jax.models.inception import Inception
from nextstep_jax.models.perceptual import Lpips
from tests.interop import test_torch_legacy as legacy
from tests.interop import test_torch_pickle as zipped
from tests.recorded import record_perceptual as recorder

RECORD = json.loads(recorder.PATH.read_text())

# The published networks, written out a second time: names, widths and windows.

VGG = dict(
    zip(
        (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
        (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512),
        strict=True,
    )
)
ALEX = {0: 64, 3: 192, 6: 384, 8: 256, 10: 256}
WINDOWS = {0: 11, 3: 5}
LINEAR = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
SLICES = {"vgg": (4, 9, 16, 23, 31), "alex": (2, 5, 8, 10, 13)}


def backbone_of(network):
    """torchvision's shapes of the features, by name."""
    shapes, before = {}, 3
    for index, width in (VGG if network == "vgg" else ALEX).items():
        window = 3 if network == "vgg" else WINDOWS.get(index, 3)
        shapes[f"features.{index}.weight"] = (width, before, window, window)
        shapes[f"features.{index}.bias"] = (width,)
        before = width
    return shapes


def linear_of(network):
    """lpips' shapes of the channel weights, by name."""
    return {f"lin{k}.model.1.weight": (1, w, 1, 1) for k, w in enumerate(LINEAR[network])}


def whole_of(network):
    """The names in a saved `lpips.LPIPS`, and those of the two files for each."""
    names = {}
    for name in backbone_of(network):
        index = int(name.split(".")[1])
        number = 1 + sum(index >= end for end in SLICES[network])
        names[f"net.slice{number}.{name.removeprefix('features.')}"] = name
    for name in linear_of(network):
        names |= {name: name, name.replace("lin", "lins."): name}
    return names


# Files that are small although their tensors are large: every tensor is a view of one storage, with
# strides that tell the axes apart.

STORAGE = np.random.default_rng([5]).standard_normal(12000).astype(np.float32)
STRIDES = {0: (), 1: (1,), 2: (1, 2), 4: (1, 3, 17, 5)}


def values_of(name, shape):
    """What a file says of a tensor."""
    view = STORAGE[zlib.crc32(name.encode()) % 1000 :]
    return np.lib.stride_tricks.as_strided(view, shape, [4 * s for s in STRIDES[len(shape)]])


def body_of(shapes, storage, names=None):
    """The pickle of a state dict; `names` are those that the values are of."""
    items = {
        name: zipped.tensor(
            storage("Float", "0", STORAGE.size),
            shape,
            STRIDES[len(shape)],
            zlib.crc32((names or {}).get(name, name).encode()) % 1000,
        )
        for name, shape in shapes.items()
    }
    return zipped.mapping(zipped.ORDERED, **items)


def write_old(path, shapes, names=None):
    return legacy.write_legacy(path, body_of(shapes, legacy.storage, names), {"0": STORAGE})


def write_new(path, shapes):
    return zipped.write_zip(path, body_of(shapes, zipped.storage), {"0": STORAGE.tobytes()})


def assert_lpips(params, network):
    """Every parameter against the tensor it should be."""
    shapes = backbone_of(network)
    leaves = leaves_of(params)
    assert len(leaves) == len(shapes) + 5
    for name, shape in shapes.items():
        _, index, kind = name.split(".")
        leaf = params["net"][f"features_{index}"]["kernel" if kind == "weight" else "bias"]
        values = values_of(name, shape)
        expected = values.transpose(2, 3, 1, 0) if kind == "weight" else values
        np.testing.assert_array_equal(leaf, expected)
    for k, (name, shape) in enumerate(linear_of(network).items()):
        np.testing.assert_array_equal(
            params[f"lin{k}"], values_of(name, shape).transpose(2, 3, 1, 0)
        )
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(np.float32)}
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    wanted = jax.eval_shape(Lpips(network).init, jax.random.key(0), image, image)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, wanted)


@pytest.mark.parametrize("network", ["vgg", "alex"])
def test_two_files(tmp_path, network):
    classifier = {"classifier.6.weight": (1000, 4096), "classifier.6.bias": (1000,)}
    write = write_old if network == "vgg" else write_new
    backbone = write(tmp_path / "backbone.pth", backbone_of(network) | classifier)
    linear = write_old(tmp_path / "linear.pth", linear_of(network))
    assert_lpips(read_lpips(network, backbone, linear), network)


@pytest.mark.parametrize("network", ["vgg", "alex"])
def test_one_file(tmp_path, network):
    names = whole_of(network)
    shapes = backbone_of(network) | linear_of(network)
    shapes = {name: shapes[plain] for name, plain in names.items()}
    needed = {name: shape for name, shape in shapes.items() if not name.startswith("lins.")}
    assert recorder.digest_of(needed) == RECORD["lpips"][network]["digest"]
    shapes |= {"scaling_layer.shift": (1, 3, 1, 1), "scaling_layer.scale": (1, 3, 1, 1)}
    path = write_old(tmp_path / "whole.pth", shapes, names)
    assert_lpips(read_lpips(network, path), network)


def test_safetensors_and_half_precision(tmp_path):
    network = "alex"
    for number, shapes in enumerate((backbone_of(network), linear_of(network))):
        tensors = {n: np.float16(values_of(n, shape)) for n, shape in shapes.items()}
        tensors = {n: np.ascontiguousarray(values) for n, values in tensors.items()}
        save_file(tensors, tmp_path / f"{number}.safetensors")
    params = read_lpips(network, *(tmp_path / f"{n}.safetensors" for n in (0, 1)))
    kernel = params["net"]["features_3"]["kernel"]
    assert kernel.dtype == np.float32
    expected = values_of("features.3.weight", (192, 64, 5, 5)).astype(np.float16)
    np.testing.assert_array_equal(kernel, expected.transpose(2, 3, 1, 0))


def test_faults_of_lpips_are_all_listed(tmp_path):
    shapes = backbone_of("alex")
    good = write_old(tmp_path / "good.pth", shapes)
    linear = write_old(tmp_path / "linear.pth", linear_of("alex"))
    del shapes["features.3.bias"]
    shapes |= {"features.0.weight": (64, 3, 7, 7), "features.1.running_mean": (64,)}
    bad = write_old(tmp_path / "bad.pth", shapes)
    with pytest.raises(ValueError) as caught:
        read_lpips("alex", bad, linear)
    message = str(caught.value)
    assert message.startswith(str(bad))
    for words in (
        "1 missing: features.3.bias",
        "1 unexpected: features.1.running_mean",
        "features.0.weight is [64, 3, 7, 7], expected [64, 3, 11, 11]",
    ):
        assert words in message
    vgg = write_old(tmp_path / "vgg.pth", linear_of("vgg"))
    with pytest.raises(ValueError, match=r"vgg.pth: .* 4 of another shape: lin1.model.1.weight is"):
        read_lpips("alex", good, vgg)
    with pytest.raises(ValueError, match=r"good.pth: .* 15 missing: .*net.slice1.0.weight"):
        read_lpips("alex", good)
    with pytest.raises(ValueError, match=r"network='squeeze' must be one of \['vgg', 'alex'\]"):
        read_lpips("squeeze", good, linear)
    with pytest.raises(FileNotFoundError, match=r"none.pth: no such file"):
        read_lpips("alex", tmp_path / "none.pth", linear)


@pytest.fixture(scope="module")
def inception_shapes():
    """What the originals need; that these are their names and shapes, the digest says."""
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
    params = jax.eval_shape(Inception().init, jax.random.key(0), image)["params"]
    parts = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    shapes = {}
    for path, leaf in leaves_of(params).items():
        module = ".".join(path[:-1])
        if path[-1] == "kernel":
            shapes[f"{module}.conv.weight"] = tuple(leaf.shape[axis] for axis in (3, 2, 0, 1))
        else:
            shapes[f"{module}.bn.{parts[path[-1]]}"] = leaf.shape
    for variant in ("fid", "torchvision"):
        assert recorder.digest_of(shapes) == RECORD["inception"][variant]["digest"]
    return shapes


@pytest.mark.parametrize(("variant", "classes"), [("fid", 1008), ("torchvision", 1000)])
def test_inception(tmp_path, inception_shapes, variant, classes):
    unused = {"fc.weight": (classes, 2048), "fc.bias": (classes,)}
    unused["Conv2d_1a_3x3.bn.num_batches_tracked"] = ()
    if variant == "torchvision":
        unused |= {"AuxLogits.conv0.conv.weight": (128, 768, 1, 1), "AuxLogits.fc.bias": (1000,)}
    write = write_old if variant == "torchvision" else write_new
    path = write(tmp_path / "inception.pth", inception_shapes | unused)
    model, params = read_inception(path)
    assert model == Inception(variant)
    assert len(leaves_of(params)) == len(inception_shapes) == 94 * 5
    for name in ("Conv2d_2a_3x3", "Mixed_6e.branch7x7dbl_3", "Mixed_7c.branch3x3_2b"):
        leaf = params
        for part in name.split("."):
            leaf = leaf[part]
        shape = inception_shapes[f"{name}.conv.weight"]
        kernel = values_of(f"{name}.conv.weight", shape).transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(leaf["kernel"], kernel)
        for ours, theirs in {
            "scale": "weight",
            "mean": "running_mean",
            "var": "running_var",
        }.items():
            np.testing.assert_array_equal(leaf[ours], values_of(f"{name}.bn.{theirs}", shape[:1]))
        np.testing.assert_array_equal(leaf["bias"], values_of(f"{name}.bn.bias", shape[:1]))


def test_faults_of_inception(tmp_path, inception_shapes):
    path = tmp_path / "inception.pth"
    accepted = r"expected \[1008, 2048\] \(fid\) or \[1000, 2048\] \(torchvision\)"
    write_new(path, inception_shapes)
    with pytest.raises(
        ValueError, match=rf"inception.pth is no .* it has no fc.weight, {accepted}"
    ):
        read_inception(path)
    write_new(path, inception_shapes | {"fc.weight": (10, 2048)})
    with pytest.raises(ValueError, match=rf"it has fc.weight \[10, 2048\], {accepted}"):
        read_inception(path)
    shapes = inception_shapes | {"fc.weight": (1008, 2048), "Mixed_8a.conv.weight": (1, 1, 1, 1)}
    del shapes["Mixed_5b.branch_pool.bn.running_var"]
    write_new(path, shapes)
    words = r"1 missing: Mixed_5b.branch_pool.bn.running_var; 1 unexpected: Mixed_8a.conv.weight"
    with pytest.raises(ValueError, match=words):
        read_inception(path)
