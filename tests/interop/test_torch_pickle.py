import io
import pickle
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from nextstep_jax.interop.tensors import TensorFiles, TensorInfo
from nextstep_jax.interop.torch_pickle import TorchPickle

KINDS = {
    "Double": np.float64,
    "Float": np.float32,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
}
VALUES = np.arange(24, dtype=np.float32) * 0.75 - 5
RAW = {"0": VALUES.tobytes()}


# A tiny assembler of pickles; only what it writes by hand says what a file holds.


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def counts(*values):
    return b"(" + b"".join(map(number, values)) + b"t"


def name_of(module, name):
    return f"c{module}\n{name}\n".encode()


def storage(kind="Float", key="0", num_elements=24):
    parts = text("storage"), name_of("torch", f"{kind}Storage"), text(key), text("cpu")
    return b"(" + b"".join(parts) + number(num_elements) + b"tQ"


ORDERED = name_of("collections", "OrderedDict") + b")R"
REBUILD = name_of("torch._utils", "_rebuild_tensor_v2")


def tensor(source, shape, strides, offset=0, metadata=b""):
    where = number(offset) + counts(*shape) + counts(*strides)
    return REBUILD + b"(" + source + where + b"\x89" + ORDERED + metadata + b"tR"


def mapping(start=b"}", /, **items):
    return start + b"(" + b"".join(text(k) + v for k, v in items.items()) + b"u"


def program(body):
    return b"\x80\x02" + body + b"."


def write_zip(path, body, raw=RAW, order=b"little", folder="any name", **options):
    """A torch zip checkpoint; `body` is what data.pkl does between its protocol and its end."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr(f"{folder}/data.pkl", program(body))
        if order is not None:
            archive.writestr(f"{folder}/byteorder", order)
        for key, data in raw.items():
            archive.writestr(f"{folder}/data/{key}", data)
        archive.writestr(f"{folder}/version", b"3\n")
    return path


PLAIN = tensor(storage(), (2, 3, 4), (12, 4, 1))


@pytest.fixture
def write(tmp_path):
    return lambda body, **options: write_zip(tmp_path / "checkpoint.pt", body, **options)


def refused(path, *words):
    """The message with which a file is refused: of a ValueError, with the file's name."""
    with pytest.raises(ValueError) as caught:
        TorchPickle(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    for word in words:
        assert word in message, message
    return message


def test_views_of_one_storage(write):
    file = TorchPickle(
        write(
            mapping(
                whole=PLAIN,
                transposed=tensor(storage(), (4, 6), (1, 4)),
                part=tensor(storage(), (3, 2), (8, 3), offset=2),
                repeated=tensor(storage(), (2, 3), (0, 1), offset=21),
                scalar=tensor(storage(), (), (), offset=7),
                nothing=tensor(storage(), (0, 5), (5, 1)),
            )
        )
    )
    expected = {
        "whole": VALUES.reshape(2, 3, 4),
        "transposed": VALUES.reshape(6, 4).T,
        "part": VALUES[[[2, 5], [10, 13], [18, 21]]],
        "repeated": VALUES[[[21, 22, 23], [21, 22, 23]]],
        "scalar": VALUES[7].reshape(()),
        "nothing": np.empty((0, 5), np.float32),
    }
    assert isinstance(file, TensorFiles)
    assert list(file.infos) == list(expected)
    for name, values in expected.items():
        assert file.infos[name] == TensorInfo(values.shape, np.dtype(np.float32))
        array = file.read(name)
        assert array.dtype == np.float32 and array.shape == values.shape
        assert array.flags.c_contiguous and array.flags.writeable
        np.testing.assert_array_equal(array, values)
        array += 1  # fresh: the next reading does not see it
        np.testing.assert_array_equal(file.read(name), values)
        assert file.where(name).name == "checkpoint.pt"


@pytest.mark.parametrize("order", [b"little", b"big", None])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_and_byte_orders(write, kind, order):
    dtype = np.dtype(KINDS[kind])
    values = np.array([0, 1, 1, 0, 1] if kind == "Bool" else [0, 1, 2, 3, 100]).astype(dtype)
    little = values.tobytes()
    pieces = [little[i : i + dtype.itemsize] for i in range(0, len(little), dtype.itemsize)]
    raw = b"".join(piece[::-1] for piece in pieces) if order == b"big" else little
    source = storage(kind, "7", 5)
    file = TorchPickle(write(mapping(x=tensor(source, (5,), (1,))), raw={"7": raw}, order=order))
    assert file.infos["x"] == TensorInfo((5,), dtype)
    assert file.read("x").tobytes() == little
    assert file.read("x").dtype == dtype


def test_state_dicts_and_wrappers(write):
    versions = mapping(_metadata=mapping(ORDERED, conv=mapping(version=number(1))))
    rebuild = name_of("torch._utils", "_rebuild_tensor")
    lone = rebuild + b"(" + storage() + number(0) + counts(24) + counts(1) + b"tR"
    parameter = name_of("torch._utils", "_rebuild_parameter")
    state = mapping(
        ORDERED,
        weight=parameter + b"(" + PLAIN + b"\x88" + ORDERED + b"tR",
        bias=lone,
        version=number(3),
        note=text("plain"),
        nothing=b"N",
    )
    state += versions + b"b"
    for body in (
        state,
        mapping(state_dict=state, epoch=number(4), lr=b"G" + struct.pack(">d", 0.5)),
        mapping(ORDERED, model=state, name=text("run"), done=b"\x88"),
    ):
        file = TorchPickle(write(body))
        assert list(file.infos) == ["weight", "bias"]
        np.testing.assert_array_equal(file.read("weight"), VALUES.reshape(2, 3, 4))
        np.testing.assert_array_equal(file.read("bias"), VALUES)


def test_later_protocols(write):
    """The same state dict with frames, STACK_GLOBAL, short strings and a memo."""
    ordered = b"\x8c\x0bcollections\x8c\x0bOrderedDict\x93\x94)R"  # memo 0: the function
    ignored = b"\x8c\x01a\x8c\x04text\x94s"  # memo 1: "text"
    body = ordered + ignored + b"\x8c\x01xh\x00)R" + text("y") + PLAIN + b"ss"
    framed = b"\x95" + struct.pack("<Q", len(body)) + body
    message = refused(write(framed), "the top level holds nested values: 'x' (OrderedDict)")
    assert "text" not in message
    file = TorchPickle(write(framed.replace(b"\x8c\x01x", b"\x8c\x05model")[9:]))
    assert list(file.infos) == ["y"]
    np.testing.assert_array_equal(file.read("y"), VALUES.reshape(2, 3, 4))


def test_unknown_name(write):
    file = TorchPickle(write(mapping(weight=PLAIN)))
    for call in (file.read, file.where):
        with pytest.raises(ValueError, match=r"no tensor 'weights' among its 1; .*\['weight'\]"):
            call("weights")


def test_memory_is_that_of_one_tensor(write):
    size = 2**24
    body = mapping(
        a=tensor(storage("Byte", "0", size), (size // 16, 16), (16, 1)),
        b=tensor(storage("Byte", "1", size), (size,), (1,)),
    )
    path = write(body, raw={"0": b"\1" * size, "1": b"\2" * size})
    file = TorchPickle(path)
    tracemalloc.start()
    try:
        total = int(file.read("a")[-1, -1]) + int(file.read("b")[-1])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        path.read_bytes()
        both = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 3
    assert size < peak < 1.6 * size
    assert both > 2 * size  # the measure sees what a careless reader takes


class _Runs:
    """Pickles into a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _pickled(value, protocol):
    return pickle.dumps(value, protocol)[2:-1]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("function", [eval, getattr, __import__, open, io.BytesIO])
def test_foreign_functions_are_named(write, tmp_path, function, protocol):
    witness = tmp_path / "witness"
    arguments = [str(witness), "w"] if function is open else ["1"]
    body = mapping(x=PLAIN, y=_pickled(_Runs(function, *arguments), protocol))
    module = {2: "__builtin__", 4: "builtins"}[protocol]
    name = "_io.BytesIO" if function is io.BytesIO else f"{module}.{function.__name__}"
    if function is open:  # Of "io" up to Python 3.11, then of "_io".
        name = f"{open.__module__}.open"
    refused(write(body), f"refused the global '{name}'", "only tensors are read")
    assert not witness.exists()


STACK_GLOBAL = b"\x8c\x05posix\x8c\x06system\x93"
NESTED = name_of("builtins", "getattr") + b"(" + name_of("os", "path") + text("os") + b"tR"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (name_of("os", "system") + b"(" + text("exit 3") + b"tR", "the global 'os.system'"),
        (b"(" + text("exit 3") + b"ios\nsystem\n", "the global 'os.system'"),
        (b"(icollections\nOrderedDict\n", "the opcode INST"),
        (STACK_GLOBAL + b"(" + text("exit 3") + b"tR", "the global 'posix.system'"),
        (name_of("torch", "load") + text("a.pt") + b"\x85R", "the global 'torch.load'"),
        (name_of("torch.serialization", "load"), "the global 'torch.serialization.load'"),
        (NESTED, "the global 'builtins.getattr'"),
        # A dotted name would walk through the attributes of an allowed module.
        (name_of("torch", "_utils._rebuild_tensor_v2"), "'torch._utils._rebuild_tensor_v2'"),
        (name_of("collections", "OrderedDict.fromkeys"), "'collections.OrderedDict.fromkeys'"),
        (number(1) + text("system") + b"\x93", "a global whose name is no string"),
        (name_of("torch", "UntypedStorage"), "the global 'torch.UntypedStorage'"),
        (name_of("torch._utils", "_rebuild_tensor_v3"), "'torch._utils._rebuild_tensor_v3'"),
        # Attributes of what stands for a global, of a storage, of a tensor.
        (REBUILD + mapping(call=number(1)) + b"b", "the attributes of something of type Function"),
        (REBUILD + mapping(_metadata=b"N") + b"b", "the attributes of something of type Function"),
        (name_of("torch", "FloatStorage") + mapping(dtype=b"N") + b"b", "of type StorageType"),
        (storage() + mapping(key=text("1")) + b"b", "something of type Storage"),
        (PLAIN + mapping(offset=number(9)) + b"b", "something of type LazyTensor"),
        (ORDERED + mapping(update=number(1)) + b"b", "something of type OrderedDict"),
        (ORDERED + text("ab") + b"b", "something of type OrderedDict"),
        # Calls of what is not a function of ours.
        (name_of("torch", "FloatStorage") + b")R", "call something of type StorageType"),
        (text("eval") + text("1") + b"\x85R", "call something of type str"),
        (REBUILD + b"]R", "call something of type Function"),
        (name_of("collections", "OrderedDict") + b"]\x85R", "to make an OrderedDict out of"),
        (REBUILD + b")\x81", "the opcode NEWOBJ"),
        (REBUILD + b")}\x92", "the opcode NEWOBJ_EX"),
        (b"(" + REBUILD + b"o", "the opcode OBJ"),
        # The registry of extensions, whose cache would go round the check of globals.
        (b"\x82\x01", "the opcode EXT1"),
        (b"\x83\x01\x00", "the opcode EXT2"),
        (b"\x84\x01\x00\x00\x00", "the opcode EXT4"),
        (b"\x97", "the opcode NEXT_BUFFER"),
        (b"Ptext\n", "the opcode PERSID"),
        (text("0") + b"Q", "a persistent id that names no storage"),
        (storage(num_elements=-1), "a persistent id that names no storage"),
        (storage(num_elements=2**63), "a persistent id that names no storage"),
        (storage().replace(b"storage", b"Storage"), "names no storage"),
        (tensor(text("0"), (1,), (1,)), "expected a storage, an offset"),
        (tensor(storage(), (-1,), (1,)), "none of them negative"),
        (tensor(storage(), (2,), (-1,)), "none of them negative"),
        (tensor(storage(), (2,), (1,), offset=-1), "none of them negative"),
        (tensor(storage(), (2, 2), (1,)), "as many sizes as strides"),
        (tensor(storage(), (1,) * 33, (1,) * 33), "at most 32"),
        (tensor(storage(), (2,), (1,), metadata=mapping(conj=b"\x88")), "a conjugate or negative"),
        (
            name_of("torch._utils", "_rebuild_parameter") + b"(NN}tR",
            "a parameter that is no tensor",
        ),
        (b"}" + number(1) + PLAIN + b"s", "a key that is no string, but of type int"),
        (
            b"}" + b")" + b"\x85" * 10**4 + PLAIN + b"s",
            "a key that is no string, but of type tuple",
        ),
        (b"]" + text("a") + text("b") + b"s", "to set an item of something that is no dictionary"),
        (b"}" + text("a") + b"a", "to append to something that is no list"),
    ],
)
def test_refuses_by_name(write, body, words):
    refused(write(body), "refused", words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (PLAIN, "the top level is of type LazyTensor, expected tensors by name"),
        (b"](" + PLAIN + b"e", "the top level is of type list"),
        (b"}", "the top level holds no tensor"),
        (mapping(epoch=number(1)), "the top level holds no tensor"),
        (mapping(state_dict=b"}"), "'state_dict' holds no tensor"),
        (mapping(x=PLAIN, sub=mapping(y=PLAIN)), "holds nested values: 'sub' (dict)"),
        (mapping(ema=mapping(x=PLAIN)), "holds nested values: 'ema' (dict)"),
        (mapping(model=mapping(x=PLAIN), ema=mapping(x=PLAIN)), "values: 'ema' (dict); expected"),
        (mapping(model=mapping(x=PLAIN), args=b"]"), "nested values: 'args' (list)"),
        (mapping(model=mapping(sub=mapping(x=PLAIN))), "'model' holds nested values: 'sub' (dict)"),
    ],
)
def test_refuses_other_structures(write, body, words):
    refused(write(body), words)


def test_all_tensors_that_do_not_fit_are_listed(write):
    body = mapping(
        fine=PLAIN,
        beyond=tensor(storage(), (2, 3), (20, 2)),
        behind=tensor(storage(), (1,), (1,), offset=24),
        missing=tensor(storage(key="1"), (1,), (1,)),
        elsewhere=tensor(storage(key="../data.pkl"), (1,), (1,)),
        narrow=tensor(storage("Double"), (1,), (1,)),
        short=tensor(storage(num_elements=23), (1,), (1,)),
        vast=tensor(storage(), (2**40, 2**40), (0, 0)),
    )
    message = refused(write(body), "tensors that do not fit:")
    assert message.splitlines()[1:] == [
        "  beyond: it reaches to element 25 of a storage of 24",
        "  behind: it reaches to element 25 of a storage of 24",
        "  missing: any name/data/1 is missing from the archive",
        "  elsewhere: any name/data/../data.pkl is missing from the archive",
        "  narrow: any name/data/0 has 96 bytes, but its storage should have 24 elements of 8",
        "  short: any name/data/0 has 96 bytes, but its storage should have 23 elements of 4",
        f"  vast: its shape ({2**40}, {2**40}) is too large",
    ]


def test_archives_that_are_no_checkpoints(write, tmp_path):
    path = tmp_path / "checkpoint.pt"
    body = mapping(x=PLAIN)
    refused(write(body, compression=zipfile.ZIP_DEFLATED), "data.pkl is compressed or encrypted")
    refused(write(body, order=b"middle"), "byteorder is b'middle', expected b'little' or b'big'")
    refused(write(b"N" * (64 * 2**20 + 1)), "bytes, more than 67108864")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/other", b"")
    refused(path, "no torch zip checkpoint: expected one data.pkl, found 0")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", program(b"}"))
        archive.writestr("b/data.pkl", program(b"}"))
    refused(path, "expected one data.pkl, found 2")
    # Python would read an archive behind anything; torch would take this for a pickle.
    path.write_bytes(b"\x80\x02N." + write(body).read_bytes())
    refused(path, "of the kind before 1.6")
    path.write_bytes(b"#!/bin/sh\n" + write(body).read_bytes())
    refused(path, "is cut off or no torch zip checkpoint")
    path.write_bytes(b"")
    refused(path, "is cut off or no torch zip checkpoint")
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2))
    refused(path, "of the kind before 1.6, which `open_tensors` reads")
    with pytest.raises(FileNotFoundError):
        TorchPickle(tmp_path / "none.pt")


def test_compressed_storage(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", program(mapping(x=PLAIN)))
        archive.writestr("a/data/0", RAW["0"], zipfile.ZIP_DEFLATED)
    refused(path, "x: a/data/0 is compressed or encrypted, which torch never does")
    # Said to be stored, but in fewer bytes than it has.
    whole = write_zip(path, mapping(x=PLAIN), folder="a").read_bytes()
    entry = whole.rindex(b"PK\1\2", 0, whole.rindex(b"a/data/0"))
    path.write_bytes(whole[: entry + 20] + struct.pack("<I", 4) + whole[entry + 24 :])
    refused(path, "x: a/data/0 is compressed or encrypted")


def test_damage_after_opening(write):
    path = write(mapping(x=PLAIN))
    file = TorchPickle(path)
    whole = path.read_bytes()
    at = whole.index(RAW["0"])
    path.write_bytes(whole[:at] + b"!" + whole[at + 1 :])
    with pytest.raises(ValueError, match=r"checkpoint.pt is cut off or damaged .*Bad CRC-32"):
        file.read("x")
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"checkpoint.pt is cut off or no torch zip checkpoint"):
        file.read("x")


def test_every_cut_is_reported(write):
    path = write(mapping(x=PLAIN))
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refused(path, "is cut off or no torch zip checkpoint")


def test_a_damaged_stream_raises_only_value_errors(write):
    """Each byte of data.pkl, replaced and cut: a refusal with the file's name, or still a file."""
    whole = mapping(x=PLAIN, y=tensor(storage(), (4,), (2,)), epoch=number(3))
    outcomes = {"read": 0, "refused": 0}
    streams = [whole[:i] for i in range(0, len(whole), 5)]
    streams += [
        whole[:i] + bytes([b]) + whole[i + 1 :] for i in range(len(whole)) for b in b"\0R(b"
    ]
    for stream in streams:
        path = write(stream)
        try:
            file = TorchPickle(path)
            for name in file.infos:
                file.read(name)
            outcomes["read"] += 1
        except ValueError as error:
            assert str(error).startswith(str(path))
            outcomes["refused"] += 1
    assert outcomes["refused"] > 0.8 * len(streams)
    assert outcomes["read"] > 0


def test_a_large_memo_index_costs_nothing(write):
    """The C unpickler allocates room for all indices below."""
    tracemalloc.start()
    try:
        TorchPickle(write(b"r\xff\xff\xff\x7f".join([b"}", mapping(b"", x=PLAIN)])))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**22


def test_against_torch(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = module.state_dict()
    state["parameter"] = torch.nn.Parameter(base)
    state["view"] = base[1:5, 2:7:2]
    state["transposed"] = base.t()
    state["expanded"] = base[0, 0].expand(2, 3)
    state["scalar"] = torch.tensor(3.25)
    state["empty"] = torch.empty(0, 3)
    for name in ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"):
        state[name] = (base * 50).abs().to(getattr(torch, name))
    state["bool"] = base > 0

    def check(saved, **options):
        torch.save(saved, tmp_path / "c.pt", **options)
        file = TorchPickle(tmp_path / "c.pt")
        assert list(file.infos) == list(state)
        for name, values in state.items():
            array = file.read(name)
            assert str(array.dtype) == str(values.dtype).removeprefix("torch.")
            assert array.shape == tuple(values.shape)
            as_bytes = values.detach().contiguous().reshape(-1).view(torch.uint8)
            assert array.tobytes() == as_bytes.numpy().tobytes(), name

    check(state)
    check(dict(state), pickle_protocol=4)
    check({"state_dict": state, "epoch": 3})
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pt", "of the kind before 1.6")
    torch.save(module, tmp_path / "module.pt")
    refused(tmp_path / "module.pt", "the global 'torch.nn.modules.container.Sequential'")
    torch.save({"x": torch.tensor([1j]).conj()}, tmp_path / "complex.pt")
    refused(tmp_path / "complex.pt", "the global 'torch.ComplexFloatStorage'")
