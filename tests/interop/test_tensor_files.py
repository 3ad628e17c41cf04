import json
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from nextstep_jax.interop.tensor_files import open_tensors
from nextstep_jax.interop.tensors import TensorFiles, TensorInfo
from tests.interop.test_torch_pickle import PLAIN, VALUES, mapping, write_zip

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
DTYPES = ("bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")


def make(seed, shape, dtype=np.float32):
    values = np.asarray(np.random.default_rng([seed]).normal(size=shape) * 40)
    return values > 0 if dtype == "bool" else np.asarray(np.abs(values), dtype)


def raw_file(path, entries, data, **more):
    """A safetensors file by hand, right or wrong."""
    header = json.dumps({**entries, **more}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def shards(folder, weight_map, files, stem="model"):
    """A sharded checkpoint: an index, and files with tensors of three values each."""
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    for file, names in files.items():
        save_file({name: make(ord(name), 3) for name in names}, folder / file)
    return folder


def refusal(path):
    with pytest.raises(ValueError) as caught:
        open_tensors(path)
    return str(caught.value)


def test_one_file(tmp_path):
    tensors = {dtype: make(i, (2, 3), dtype) for i, dtype in enumerate(DTYPES)}
    tensors["bfloat16"] = make(20, (4, 2), ml_dtypes.bfloat16)
    tensors["scalar"] = make(21, ())
    tensors["empty"] = make(22, (0, 7))
    path = tmp_path / "any.safetensors"
    save_file(tensors, path)
    files = open_tensors(path)
    assert isinstance(files, TensorFiles)
    assert set(files.infos) == set(tensors)
    for name, values in tensors.items():
        assert files.infos[name] == TensorInfo(values.shape, values.dtype)
        assert files.where(name) == path
        array = files.read(name)
        assert array.dtype == values.dtype and array.shape == values.shape
        assert array.tobytes() == values.tobytes()
        assert array.flags.c_contiguous and array.flags.writeable
        array.fill(0)  # fresh: the file and the next reading do not change
        assert files.read(name).tobytes() == values.tobytes()


def test_unknown_name(tmp_path):
    save_file({"norm.weight": make(0, 3)}, tmp_path / "model.safetensors")
    files = open_tensors(tmp_path)
    for call in (files.read, files.where):
        with pytest.raises(
            ValueError, match=r"no tensor 'norm.weights' among its 1; near it: \['n"
        ):
            call("norm.weights")


def test_order_in_a_folder(tmp_path):
    """The published names, the index of shards before the single file."""
    with pytest.raises(FileNotFoundError) as caught:
        open_tensors(tmp_path)
    names = [
        "model.safetensors.index.json",
        "model.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors",
        "checkpoint.pt",
    ]
    assert str(caught.value) == f"{tmp_path} holds no checkpoint: none of {names}"
    write_zip(tmp_path / "checkpoint.pt", mapping(pickled=PLAIN))
    assert list(open_tensors(tmp_path).infos) == ["pickled"]
    save_file({"c": make(0, 3)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert list(open_tensors(tmp_path).infos) == ["c"]
    shards(tmp_path, {"d": "one"}, {"one": "d"}, stem="diffusion_pytorch_model")
    assert list(open_tensors(tmp_path).infos) == ["d"]
    save_file({"e": make(0, 3)}, tmp_path / "model.safetensors")
    assert list(open_tensors(tmp_path).infos) == ["e"]
    shards(tmp_path, {"f": "two"}, {"two": "f"})
    assert list(open_tensors(tmp_path).infos) == ["f"]
    assert list(open_tensors(tmp_path / "model.safetensors.index.json").infos) == ["f"]


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "pytorch_model.bin"])
def test_torch_files(tmp_path, name):
    files = open_tensors(write_zip(tmp_path / name, mapping(weight=PLAIN)))
    assert isinstance(files, TensorFiles)
    assert files.where("weight") == tmp_path / name
    np.testing.assert_array_equal(files.read("weight"), VALUES.reshape(2, 3, 4))


def test_other_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.safetensors: no such file or folder"):
        open_tensors(tmp_path / "none.safetensors")
    (tmp_path / "model.onnx").touch()
    assert "expected a name that ends in ['.safetensors', " in refusal(tmp_path / "model.onnx")
    for name in ("model.safetensors", "checkpoint.pt"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
        message = f"{tmp_path / name} is a Git LFS pointer, not the file itself: git lfs pull"
        assert refusal(tmp_path / name) == message


def test_shards(tmp_path):
    weight_map = {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}
    files = open_tensors(
        shards(tmp_path, weight_map, {"m-1.safetensors": "ac", "m-2.safetensors": "b"})
    )
    assert set(files.infos) == set("abc")
    for name, shard in weight_map.items():
        assert files.where(name) == tmp_path / shard
        np.testing.assert_array_equal(files.read(name), make(ord(name), 3))


def test_all_that_is_wrong_with_shards_is_listed(tmp_path):
    weight_map = {"a": "1", "b": "1", "c": "2", "d": "1", "e": "gone", "f": "also gone", "g": "cut"}
    shards(tmp_path, weight_map, {"1": "abx", "2": "cda", "cut": "g", "not named": "z"})
    cut = tmp_path / "cut"
    size = cut.stat().st_size
    cut.write_bytes(cut.read_bytes()[:-1])
    lines = refusal(tmp_path).splitlines()
    index = tmp_path / "model.safetensors.index.json"
    assert lines[0] == f"{index}: the shards are not what the index says:"
    damage = f"  {cut} is cut off or damaged: expected {size} bytes, found {size - 1} ("
    assert [line for line in lines[1:] if not line.startswith(damage)] == [
        "  also gone: no such file",
        "  gone: no such file",
        "  d: the index says 1, which lacks it; it is in ['2']",
        "  a: in more than one shard, ['1', '2']",
        "  x: in 1, but not in the index",
    ]
    assert len(lines) == 7


def test_a_tensor_that_the_shard_lacks(tmp_path):
    shards(tmp_path, {"a": "1", "b": "1"}, {"1": "a"})
    assert refusal(tmp_path).splitlines()[1:] == ["  b: the index says 1, which lacks it"]


@pytest.mark.parametrize("shard", ["../model", "/etc/passwd", "sub/model", "a\\b", "..", "", "C:x"])
def test_shards_stay_in_their_folder(tmp_path, shard):
    folder = tmp_path / "inside"
    folder.mkdir()
    save_file({"a": make(0, 3)}, tmp_path / "model")
    shards(folder, {"a": shard, "b": "fine"}, {})
    assert f"shards must be plain file names beside the index, not {[shard]}" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 10**5, "is not JSON"),
        ("[]", 'expected {"weight_map": {tensor: file name}}'),
        ("{}", 'expected {"weight_map": {tensor: file name}}'),
        ('{"weight_map": {}}', 'expected {"weight_map": {tensor: file name}}'),
        ('{"weight_map": {"a": 1}}', 'expected {"weight_map": {tensor: file name}}'),
    ],
)
def test_indexes_that_are_none(tmp_path, text, words):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    assert refusal(tmp_path).startswith(f"{index}")
    assert words in refusal(tmp_path)


def test_every_cut_is_reported_with_its_size(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": make(0, 5), "b": make(1, (2, 2))}, path)
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    for length in [*range(0, len(whole), 5), len(whole) - 1]:
        path.write_bytes(whole[:length])
        message = refusal(path)
        assert message.startswith(f"{path} is cut off or damaged: expected ")
        assert f"found {length} (" in message
        if length >= data:
            assert f"expected {len(whole)} bytes" in message
        elif length >= 8:
            assert f"expected a header of {data} bytes" in message
    path.write_bytes(whole + b"more")
    assert f"expected {len(whole)} bytes, found {len(whole) + 4} (" in refusal(path)
    path.write_bytes(whole)
    assert set(open_tensors(path).infos) == {"a", "b"}


def test_a_file_cut_after_opening(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": make(0, 5)}, path)
    files = open_tensors(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model.safetensors is cut off or damaged: expected \d+"):
        files.read("a")


@pytest.mark.parametrize(
    "header", [b"{" * 16, b'{"a": 5}        ', b'{"a": {"dtype":1}}', b"\xff" * 16]
)
def test_headers_that_are_none(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert f"{path} is cut off or damaged: " in refusal(path)


def test_offsets_that_do_not_fit(tmp_path):
    path = tmp_path / "model.safetensors"
    raw_file(path, {"a": entry("F32", [3], 0, 8)}, b"\0" * 8)
    assert f"{path} is cut off or damaged: " in refusal(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "Q4_0"])
def test_unknown_dtypes_are_named(tmp_path, dtype):
    """One that the library knows and we do not, and one that nobody knows."""
    path = tmp_path / "model.safetensors"
    entries = {"fine": entry("U8", [2], 0, 2), "w.a": entry(dtype, [2], 2, 4)}
    raw_file(path, entries | {"w.b": entry(dtype, [2], 4, 6)}, b"\0" * 6, __metadata__={"a": "b"})
    message = refusal(path)
    assert message.startswith(f"{path} has tensors of unknown dtype: w.a ({dtype}), w.b ({dtype});")
    assert "known are ['BOOL', 'U8'," in message


# Peak resident memory counts mapped pages; it is that of the process, so it needs its own.
_PEAK = """
import pathlib, re, sys
import numpy as np
from safetensors import safe_open
from nextstep_jax.interop.tensor_files import open_tensors

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

path = pathlib.Path(sys.argv[1])
files = open_tensors(path)
before = peak()
total = sum(int(files.read(name)[-1]) for name in files.infos)
ours = peak() - before
with safe_open(path, "numpy") as file:
    total += sum(int(file.get_tensor(name)[-1]) for name in files.infos)
print(total, ours, peak() - before)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_stays_near_one_tensor(tmp_path):
    num_tensors, num_bytes = 50, 4 * 2**20
    path = tmp_path / "model.safetensors"
    save_file({f"{i}": np.full(num_bytes, i, np.uint8) for i in range(num_tensors)}, path)
    command = [sys.executable, "-c", _PEAK, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    total, ours, held_open = map(int, done.stdout.split())
    assert total == 2 * sum(range(num_tensors))
    # The tensor, its mapped pages, and some room.
    assert ours * 1024 < 4 * num_bytes
    # The measure sees a file that stays mapped.
    assert held_open * 1024 > 0.8 * num_tensors * num_bytes
