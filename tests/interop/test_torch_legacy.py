import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from nextstep_jax.interop.tensor_files import open_tensors
from nextstep_jax.interop.tensors import TensorFiles, TensorInfo
from nextstep_jax.interop.torch_legacy import TorchLegacy, is_legacy
from nextstep_jax.interop.torch_pickle import TorchPickle
from tests.interop.test_torch_pickle import (
    KINDS,
    ORDERED,
    VALUES,
    mapping,
    name_of,
    number,
    program,
    tensor,
    text,
    write_zip,
)

MAGIC = 0x1950A86A20F9469CFC6C
MACHINE = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4, "long": 4}}


def storage(kind="Float", key="0", num_elements=24, view=b"N", place="cpu", as_text=text):
    parts = as_text("storage"), name_of("torch", f"{kind}Storage"), as_text(key), as_text(place)
    return b"(" + b"".join(parts) + number(num_elements) + view + b"tQ"


def write_legacy(path, body, raw=None, *, keys=None, magic=MAGIC, protocol=1001):
    """A checkpoint as torch wrote them before 1.6.

    `body` is what the pickle of the object does, `raw` are the arrays of the storages by key.
    """
    raw = {"0": VALUES} if raw is None else raw
    parts = [pickle.dumps(part, 2) for part in (magic, protocol, MACHINE)]
    parts += [program(body), pickle.dumps(list(raw) if keys is None else keys, 2)]
    parts += [struct.pack("<q", array.size) + array.tobytes() for array in raw.values()]
    path.write_bytes(b"".join(parts))
    return path


PLAIN = tensor(storage(), (2, 3, 4), (12, 4, 1))


@pytest.fixture
def write(tmp_path):
    return lambda body, *args, **options: write_legacy(tmp_path / "old.pth", body, *args, **options)


def refused(path, *words):
    """The message with which a file is refused: of a ValueError, with the file's name."""
    with pytest.raises(ValueError) as caught:
        open_tensors(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    for word in words:
        assert word in message, message


def test_tensors_of_two_storages(write):
    small = np.array([3, -1, 7], np.int64)
    state = mapping(
        ORDERED,
        whole=PLAIN,
        transposed=tensor(storage(), (4, 6), (1, 4)),
        part=tensor(storage(), (3, 2), (8, 3), offset=2),
        other=tensor(storage("Long", "k", 3, place="cuda:0"), (3,), (1,)),
        scalar=tensor(storage(), (), (), offset=7),
        nothing=tensor(storage(), (0, 5), (5, 1)),
        epoch=number(4),
    )
    file = open_tensors(write(state, {"k": small, "0": VALUES}))
    expected = {
        "whole": VALUES.reshape(2, 3, 4),
        "transposed": VALUES.reshape(6, 4).T,
        "part": VALUES[[[2, 5], [10, 13], [18, 21]]],
        "other": small,
        "scalar": VALUES[7].reshape(()),
        "nothing": np.empty((0, 5), np.float32),
    }
    assert isinstance(file, TorchLegacy) and isinstance(file, TensorFiles)
    assert list(file.infos) == list(expected)
    for name, values in expected.items():
        assert file.infos[name] == TensorInfo(values.shape, values.dtype)
        array = file.read(name)
        assert array.flags.c_contiguous and array.flags.writeable
        np.testing.assert_array_equal(array, values)
        array += 1  # fresh: the next reading does not see it
        np.testing.assert_array_equal(file.read(name), values)
        assert file.where(name).name == "old.pth"
    with pytest.raises(ValueError, match=r"no tensor 'wholes' among its 6; .*\['whole'\]"):
        file.read("wholes")


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(write, kind):
    dtype = np.dtype(KINDS[kind])
    values = np.array([0, 1, 1, 0, 1] if kind == "Bool" else [0, 1, 2, 3, 100]).astype(dtype)
    path = write(mapping(x=tensor(storage(kind, "7", 5), (5,), (1,))), {"7": values})
    file = open_tensors(path)
    assert file.infos["x"] == TensorInfo((5,), dtype)
    assert file.read("x").tobytes() == values.tobytes()


def test_wrappers(write):
    for body in (
        mapping(state_dict=mapping(ORDERED, x=PLAIN), epoch=number(4)),
        mapping(model=mapping(x=PLAIN)),
    ):
        file = open_tensors(write(body))
        assert list(file.infos) == ["x"]
    refused(write(mapping(optimizer=mapping(x=PLAIN))), "holds nested values: 'optimizer' (dict)")


# Python 2, which the files of lpips and of older classifiers were written with.


def old_text(value):
    return b"U" + bytes([len(value)]) + value.encode()


def pairs(**items):
    """An OrderedDict out of a list of pairs, and the list."""
    listed = b"".join(b"](" + old_text(name) + value + b"e" for name, value in items.items())
    return name_of("collections", "OrderedDict") + b"q\x01](" + listed + b"e\x85R"


def test_python_2(write):
    old = storage(num_elements=24, place="cuda:0", as_text=old_text)
    state = pairs(first=tensor(old, (4, 6), (6, 1)), second=tensor(old, (3,), (1,), offset=5))
    versions = b"}(" + old_text("_metadata") + pairs(a=b"}(" + old_text("version") + b"K\x01u")
    file = open_tensors(write(state + versions + b"ub"))
    assert list(file.infos) == ["first", "second"]
    np.testing.assert_array_equal(file.read("first"), VALUES.reshape(4, 6))
    np.testing.assert_array_equal(file.read("second"), VALUES[5:8])
    empty = name_of("collections", "OrderedDict") + b"]\x85R"
    refused(write(empty, {}), "the top level holds no tensor")


def test_pairs_fill_nothing_but_an_ordered_dict(write):
    listed = b"](](" + text("x") + b"K\x01ee\x85R"
    refused(write(name_of("torch._utils", "_rebuild_tensor") + listed), "TypeError")
    refused(write(name_of("torch", "FloatStorage") + listed), "to call something of type Storage")
    refused(write(name_of("os", "system") + listed), "the global 'os.system'")
    ordered = name_of("collections", "OrderedDict")
    refused(write(ordered + b"](](K\x01K\x02ee\x85R"), "a key that is no string, but of type int")
    refused(write(ordered + b"](K\x01e\x85R"), "to make an OrderedDict out of something else")
    refused(write(ordered + b"](](K\x01ee\x85R"), "to make an OrderedDict out of something else")


def test_a_list_of_pairs_serves_once(write):
    """Else a file of n bytes could ask for n^2 entries."""
    ordered = name_of("collections", "OrderedDict")
    first = ordered + b"](](" + text("x") + PLAIN + b"eeq\x05\x85R"
    assert list(open_tensors(write(first)).infos) == ["x"]
    refused(write(first + ordered + b"h\x05\x85R"), "the top level holds no tensor")


# What is refused.


def test_other_files(write, tmp_path):
    path = tmp_path / "old.pth"
    path.write_bytes(pickle.dumps([1, 2], 2))
    refused(path, "a pickle, but no torch checkpoint: it lacks the magic number")
    path.write_bytes(pickle.dumps(print, 2))
    refused(path, "refused the global '__builtin__.print'")
    refused(write(mapping(x=PLAIN), magic=MAGIC + 1), "lacks the magic number")
    refused(write(mapping(x=PLAIN), protocol=1000), "its protocol is 1000, expected 1001")
    refused(write(mapping(x=PLAIN), protocol=[]), "its protocol is list, expected 1001")
    refused(write(mapping(x=PLAIN), protocol=10**100), "its protocol is 1000000000")
    refused(write(b"N"), "the top level is of type NoneType, expected tensors by name")
    zipped = write_zip(tmp_path / "new.pth", mapping(x=PLAIN))
    assert not is_legacy(zipped) and is_legacy(path)
    with pytest.raises(ValueError, match="is cut off or damaged"):
        TorchLegacy(zipped)
    with pytest.raises(ValueError, match=r"before 1.6, which `open_tensors` reads"):
        TorchPickle(path)
    with pytest.raises(FileNotFoundError):
        TorchLegacy(tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (name_of("os", "system") + b"(" + text("exit 3") + b"tR", "the global 'os.system'"),
        (name_of("torch.cuda", "FloatStorage"), "the global 'torch.cuda.FloatStorage'"),
        (mapping(x=tensor(storage(view=b"(K\x00K\x00K\x02t"), (2,), (1,))), "a view of another"),
        (mapping(x=tensor(storage()[:-2] + b"NtQ", (2,), (1,))), "a persistent id that names"),
        (mapping(x=tensor(text("module") + b"Q", (2,), (1,))), "a persistent id that names"),
        (
            mapping(x=PLAIN, y=tensor(storage(num_elements=4), (2,), (1,))),
            "storage '0' is said to be of two kinds",
        ),
        (mapping(x=tensor(storage(), (5, 5), (5, 1))), "x: it reaches to element 25 of a storage"),
        (mapping(x=tensor(storage(), (2**62, 9), (0, 0))), "is too large"),
        (mapping(x=tensor(storage(key="1"), (2,), (1,))), "list of storages is not that of its"),
    ],
)
def test_hostile_pickles(write, body, words):
    refused(write(body), words)


@pytest.mark.parametrize("keys", [[], ["0", "0"], ["0", "1"], [0], {"0": 1}, None])
def test_lists_of_storages(write, keys):
    path = write(mapping(x=PLAIN), keys=keys)
    if keys is None:
        assert list(open_tensors(path).infos) == ["x"]
    else:
        refused(path, "its list of storages is no" if keys in ([0], {"0": 1}) else "is not that of")


def test_counts(write):
    whole = write(mapping(x=PLAIN)).read_bytes()
    path = write(mapping(x=PLAIN), {"0": VALUES[:20]})
    refused(path, f"it is cut off: expected {len(whole)} bytes up to storage 1 of 1, found")
    path = write(mapping(x=PLAIN), {"0": np.append(VALUES, VALUES)})
    refused(path, "damaged: storage 1 of 1 has 48 elements, expected 24")
    huge = mapping(x=tensor(storage(num_elements=2**62), (2,), (1,)))
    refused(write(huge), "it is cut off: expected")


def test_every_cut_is_reported(write):
    """A state dict cut in its pickles or its numbers; afterwards, too."""
    path = write(mapping(x=PLAIN))
    file, whole = open_tensors(path), path.read_bytes()
    for length in range(2, len(whole), 2):
        path.write_bytes(whole[:length])
        refused(path, "cut off")
    with pytest.raises(ValueError, match=r"old.pth is cut off: it ends in the storage of x"):
        file.read("x")


def test_damaged_bytes_raise_only_value_errors(write):
    state = pairs(x=tensor(storage(as_text=old_text), (4, 6), (6, 1)), y=number(3))
    path = write(state)
    whole = path.read_bytes()
    outcomes = {"read": 0, "refused": 0}
    for place in range(2, len(whole) - VALUES.nbytes, 3):
        for byte in b"\0R(bQ":
            path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
            try:
                file = open_tensors(path)
                for name in file.infos:
                    file.read(name)
                outcomes["read"] += 1
            except ValueError as error:
                assert str(error).startswith(str(path))
                outcomes["refused"] += 1
    assert outcomes["refused"] > 0.7 * sum(outcomes.values())
    assert outcomes["read"] > 0


def test_large_claims_cost_nothing(write, tmp_path):
    """Strings of gigabytes that are not there, a memo's index, a line without end."""
    path = tmp_path / "old.pth"
    start = write(b"}").read_bytes().partition(b"}.\x80")[0]
    for claim in (b"X\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 7 + b"\0", b"T\xff\xff\xff\x7f"):
        path.write_bytes(start + claim + b"abc")
        tracemalloc.start()
        try:
            refused(path, "its pickles claim more than 67108864 bytes")
            assert tracemalloc.get_traced_memory()[1] < 2**22
        finally:
            tracemalloc.stop()
    with path.open("wb") as file:
        file.write(start + b"c")
        file.truncate(2**28)  # sparse
    refused(path, "its pickles claim more than 67108864 bytes")


def test_memory_is_that_of_one_tensor(write):
    size = 2**24
    ones, twos = (np.full(size, n, np.uint8) for n in (1, 2))
    body = mapping(
        a=tensor(storage("Byte", "0", size), (size // 16, 16), (16, 1)),
        b=tensor(storage("Byte", "1", size), (size,), (1,)),
    )
    path = write(body, {"0": ones, "1": twos})
    tracemalloc.start()
    try:
        file = open_tensors(path)
        total = int(file.read("a")[-1, -1]) + int(file.read("b")[-1])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 3
    assert size < peak < 1.6 * size


def test_against_torch(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = module.state_dict()
    state["parameter"] = torch.nn.Parameter(base)
    state["view"] = base[1:5, 2:7:2]
    state["transposed"] = base.t()
    state["empty"] = torch.empty(0, 3)
    for name in ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"):
        state[name] = (base * 50).abs().to(getattr(torch, name))
    state["bool"] = base > 0
    path = tmp_path / "old.pt"
    for protocol in (2, 4):
        torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
        file = open_tensors(path)
        assert isinstance(file, TorchLegacy)
        assert list(file.infos) == list(state)
        for name, values in state.items():
            array = file.read(name)
            assert array.shape == tuple(values.shape)
            as_bytes = values.detach().contiguous().reshape(-1).view(torch.uint8)
            assert array.tobytes() == as_bytes.numpy().tobytes(), name
    # And what our writer writes is such a file.
    write_legacy(path, mapping(ORDERED, x=tensor(storage(), (4, 6), (1, 4))))
    values = torch.load(path, weights_only=True)["x"]
    np.testing.assert_array_equal(values.numpy(), VALUES.reshape(6, 4).T)
