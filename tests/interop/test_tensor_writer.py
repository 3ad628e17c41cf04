import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from nextstep_jax.interop.tensor_files import SAFETENSORS_DTYPES, open_tensors
from nextstep_jax.interop.tensor_writer import SafetensorsWriter, parse_size
from nextstep_jax.interop.tensors import TensorInfo


def tensors_of_all_kinds():
    rng = np.random.default_rng([5])
    made = {
        f"x.{name}": rng.integers(0, 256, (3, 5, dtype.itemsize), np.uint8).view(dtype)[..., 0]
        for name, dtype in SAFETENSORS_DTYPES.items()
        if name != "BOOL"
    }
    made["x.BOOL"] = rng.integers(0, 2, 7).astype(np.bool_)
    made["scalar"] = np.array(2.5, np.float32)
    made["empty"] = np.empty((4, 0, 2), ml_dtypes.bfloat16)
    made["last"] = rng.normal(size=3).astype(ml_dtypes.bfloat16)
    return made


def infos_of(tensors):
    return {name: TensorInfo(a.shape, a.dtype) for name, a in tensors.items()}


def write_all(folder, tensors, order=None, **options):
    with SafetensorsWriter(folder, infos_of(tensors), **options) as writer:
        for name in order or tensors:
            writer.write(name, tensors[name])


def header_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :], length


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def three():
    """Three tensors of 40, 80 and 40 bytes."""
    return {n: np.arange(size, dtype=np.float32) for n, size in (("c", 10), ("a", 20), ("b", 10))}


@pytest.mark.parametrize("max_shard_size", [10**9, 100])
def test_the_library_reads_the_same_bits(tmp_path, max_shard_size):
    tensors = tensors_of_all_kinds()
    backwards = list(tensors)[::-1]
    write_all(tmp_path / "deep" / "out", tensors, backwards, max_shard_size=max_shard_size)
    read = {}
    for path in (tmp_path / "deep" / "out").glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            read |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert set(read) == set(tensors)
    files = open_tensors(tmp_path / "deep" / "out")
    for name, array in tensors.items():
        for again in (read[name], files.read(name)):
            assert again.dtype == array.dtype and again.shape == array.shape
            assert again.tobytes() == array.tobytes()


def test_layout_of_one_file(tmp_path):
    """Header padded to 8 bytes; every tensor at a multiple of its item size, none apart."""
    tensors = tensors_of_all_kinds()
    write_all(
        tmp_path, tensors, stem="diffusion_pytorch_model", metadata={"format": "np", "a": "b"}
    )
    assert names(tmp_path) == ["diffusion_pytorch_model.safetensors"]
    header, data, length = header_of(tmp_path / "diffusion_pytorch_model.safetensors")
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "np", "a": "b"}
    end = 0
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        assert start == end and start % tensors[name].itemsize == 0
        assert data[start:stop] == tensors[name].tobytes()
        end = stop
    assert end == len(data)


def test_no_metadata(tmp_path, three):
    write_all(tmp_path, three, metadata=None)
    assert list(header_of(tmp_path / "model.safetensors")[0]) == list("cab")


@pytest.mark.parametrize(
    ("max_shard_size", "expected"),
    [
        (160, ["cab"]),
        (159, ["ca", "b"]),
        (120, ["ca", "b"]),
        (119, ["c", "a", "b"]),
        (1, ["c", "a", "b"]),
    ],
)
def test_shards_are_filled_in_order(tmp_path, three, max_shard_size, expected):
    write_all(tmp_path, three, max_shard_size=max_shard_size)
    if len(expected) == 1:
        assert names(tmp_path) == ["model.safetensors"]
        return
    shards = [f"model-{i + 1:05d}-of-{len(expected):05d}.safetensors" for i in range(len(expected))]
    assert names(tmp_path) == sorted([*shards, "model.safetensors.index.json"])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 160},
        "weight_map": {name: s for s, held in zip(shards, expected, strict=True) for name in held},
    }
    for shard, held in zip(shards, expected, strict=True):
        header, data, _ = header_of(tmp_path / shard)
        assert list(header)[1:] == list(held)
        assert data == b"".join(three[name].tobytes() for name in held)


def test_strided_arrays(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(4, 6).T
    write_all(tmp_path, {"x": array, "y": np.asfortranarray(array)})
    for name in "xy":
        np.testing.assert_array_equal(open_tensors(tmp_path).read(name), array)


def test_what_was_not_written_is_listed(tmp_path, three):
    writer = SafetensorsWriter(tmp_path, infos_of(three), max_shard_size=100)
    writer.write("a", three["a"])
    with pytest.raises(ValueError, match=r"2 of 3 tensors were never written: c, b$"):
        writer.close()
    # Nothing of it can be taken for a model.
    assert "model.safetensors.index.json" not in names(tmp_path)
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match="is cut off or damaged"):
            open_tensors(path)
    writer.write("b", three["b"])
    writer.write("c", three["c"])
    writer.close()
    writer.close()
    np.testing.assert_array_equal(open_tensors(tmp_path).read("c"), three["c"])
    with pytest.raises(ValueError, match="a: the writer is closed"):
        writer.write("a", three["a"])


def test_leaving_the_context(tmp_path, three):
    with (
        pytest.raises(ValueError, match="3 of 3 tensors were never written: c, a, b"),
        SafetensorsWriter(tmp_path / "1", infos_of(three)),
    ):
        pass
    # An error inside is not replaced by the list of what is therefore missing.
    with pytest.raises(KeyError), SafetensorsWriter(tmp_path / "2", infos_of(three)):
        raise KeyError


def test_wrong_tensors(tmp_path, three):
    writer = SafetensorsWriter(tmp_path, infos_of(three))
    array = three["a"]
    for name, wrong, message in (
        ("d", array, "d: was not among the 3 tensors announced"),
        ("a", array[:-1], r"a: expected float32 \(20,\), got float32 \(19,\)"),
        ("a", array[None], r"a: expected float32 \(20,\), got float32 \(1, 20\)"),
        ("a", array.astype(ml_dtypes.bfloat16), r"expected float32 \(20,\), got bfloat16 \(20,\)"),
        ("a", array.astype(">f4"), r"a: expected float32 \(20,\), got >f4 \(20,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.write(name, wrong)
    writer.write("a", array)
    with pytest.raises(ValueError, match="a: was written before"):
        writer.write("a", array)


@pytest.mark.parametrize(
    ("infos", "options", "message"),
    [
        ({}, {}, "there is no tensor to write"),
        ({"__metadata__": TensorInfo((1,), np.dtype("f4"))}, {}, "cannot be the name of a tensor"),
        ({"a": TensorInfo((1,), np.dtype("c8"))}, {}, r"no safetensors dtype for a \(complex64\)"),
        (None, {"stem": "../model"}, "stem='../model' must be a plain file name"),
        (None, {"stem": ""}, "stem='' must be a plain file name"),
        (None, {"max_shard_size": 0}, "max_shard_size=0 must be positive"),
    ],
)
def test_wrong_arguments(tmp_path, three, infos, options, message):
    infos = infos_of(three) if infos is None else infos
    with pytest.raises(ValueError, match=message):
        SafetensorsWriter(tmp_path / "out", infos, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "left",
    ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"],
)
def test_never_mixes_with_an_earlier_model(tmp_path, three, left):
    (tmp_path / "config.json").touch()
    (tmp_path / "model.json").touch()
    (tmp_path / "model_ema.safetensors").touch()
    (tmp_path / left).write_text("earlier")
    with pytest.raises(FileExistsError, match=rf"already holds \['{left}'\]"):
        SafetensorsWriter(tmp_path, infos_of(three))
    assert (tmp_path / left).read_text() == "earlier"
    (tmp_path / left).unlink()
    write_all(tmp_path, three)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("123", 123),
        ("7B", 7),
        ("5GB", 5 * 10**9),
        ("200MB", 2 * 10**8),
        ("3kb", 3000),
        ("1GiB", 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("0.1GB", 10**8),
        ("2TiB", 2**41),
    ],
)
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5G", "5 XB", "-5GB", "0", "0.5B", "1e9", "5GB5", "٣"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="expected a number of bytes such as 5GB, 200MB, 1GiB"):
        parse_size(text)
