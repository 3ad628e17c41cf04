import dataclasses
import functools
import io
import json
import os
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import PIL.Image
import pytest
from flax import linen as nn

from nextstep_jax.data import source_types
from nextstep_jax.data.layout import LayoutConfig, fit_image
from nextstep_jax.data.record_writer import shard_name
from nextstep_jax.data.records import RecordSource, read_index
from nextstep_jax.data.schema import Document, Image, Text
from nextstep_jax.data.shapes import ShapesSource
from nextstep_jax.models.nextstep import init_params
from nextstep_jax.models.vae import VAE, from_uint8
from nextstep_jax.parallel.mesh import make_mesh
from nextstep_jax.training import experiment
from nextstep_jax.training.encoding import (
    SETTINGS,
    EncodingConfig,
    encode_source,
    image_tokenizer_digest,
    shard_range,
)

fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Four pixels a token, and images of four tokens: what compiles fast.
CONFIG = EncodingConfig(image_bases=(8,), num_shards=3, batch_size=4, window=16)
NUM = 25


def png(pixels):
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


class MixedSource:
    """All kinds of documents, with images of three aspects in both forms, and many sizes."""

    fingerprint = "mixed"
    sizes = ((10, 11), (8, 8), (5, 18), (16, 4), (9, 8))

    def __init__(self, fail_at=None):
        self.fail_at = fail_at

    def __len__(self):
        return NUM

    def __getitem__(self, index):
        if index == self.fail_at:
            raise RuntimeError("the machine dies")
        rng = np.random.default_rng(index)

        def image(**more):
            size = self.sizes[rng.integers(len(self.sizes))]
            pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
            form = {"pixels": pixels} if rng.integers(2) else {"encoded": png(pixels)}
            return Image(**form, **more)

        kind = ("pair", "text", "edit", "interleaved", "pair")[index % 5]
        parts = {
            "text": lambda: (Text("only"), Text("words", loss=False)),
            "pair": lambda: (Text(f"image {index}"), image()),
            "edit": lambda: (image(loss=False), Text("turn it"), image()),
            "interleaved": lambda: (Text("a"), image(), Text("b"), image(loss=False), image()),
        }[kind]()
        return Document(parts, f"d/{index}", "mixed", kind, {"index": index, "x": 0.1 * index})


class Poisoned(MixedSource):
    """Some documents with an image that cannot be decoded."""

    def __init__(self, bad):
        super().__init__()
        self.bad = bad

    def __getitem__(self, index):
        document = super().__getitem__(index)
        if index not in self.bad:
            return document
        return dataclasses.replace(document, parts=(Image(encoded=b"GIF89a"),))


@pytest.fixture(scope="module")
def small(make_vae):
    """An image tokenizer of two levels."""
    return make_vae(channel_multipliers=(1, 2))


@pytest.fixture(scope="module")
def encode(small):
    """(out, **changes) -> the report of encoding the mixed source, on two devices."""

    def encode(out, source=None, devices=2, process=(0, 1), params=None, **changes):
        return encode_source(
            small.module,
            small.params if params is None else params,
            source or MixedSource(),
            dataclasses.replace(CONFIG, **changes),
            out,
            process_index=process[0],
            process_count=process[1],
            devices=jax.devices("cpu")[:devices],
        )

    return encode


@pytest.fixture(scope="module")
def unbroken(encode, tmp_path_factory):
    """A whole folder, and the report of the run that made it."""
    out = tmp_path_factory.mktemp("records") / "unbroken"
    return types.SimpleNamespace(out=out, report=encode(out))


def files(folder):
    """Names and bytes; nothing temporary may be left."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert not [name for name in found if name.endswith(("tmp", "unfinished"))]
    return found


def test_all_but_the_images_stays(unbroken):
    source, made = MixedSource(), RecordSource(unbroken.out)
    assert len(made) == NUM
    for index in range(NUM):
        before, after = source[index], made[index]
        for name in ("id", "source", "kind", "metadata"):
            assert getattr(after, name) == getattr(before, name)
        assert [type(p) for p in after.parts] == [type(p) for p in before.parts]
        assert [p.loss for p in after.parts] == [p.loss for p in before.parts]
        texts = [[p.text for p in d.parts if isinstance(p, Text)] for d in (before, after)]
        assert texts[0] == texts[1]
        assert all(image.latents.dtype == ml_dtypes.bfloat16 for image in after.images)


def test_latents_are_those_of_the_fitted_image(unbroken, small):
    """One image at a time, plainly; bfloat16 has 8 bits: a relative error of at most 2^-8."""
    plain = fast_jit(
        lambda params, pixels: small.module.apply(
            {"params": params}, from_uint8(pixels), 2, method="encode_tokens"
        )
    )
    layout = LayoutConfig(image_bases=(8,), pixels_per_token=4)
    made, sizes, worst = RecordSource(unbroken.out), set(), 0.0
    for index in range(NUM):
        for before, after in zip(MixedSource()[index].images, made[index].images, strict=True):
            pixels, grid = fit_image(before, layout)
            assert after.grid == grid
            exact = np.asarray(plain(small.params, pixels[None]))[0]
            error = np.abs(after.latents.astype(np.float32) - exact)
            assert (error <= 2.0**-8 * np.abs(exact) + 2e-5).all()
            worst = max(worst, float((error / np.abs(exact).max()).max()))
            sizes.add(pixels.shape[:2])
    assert sizes == {(4, 16), (8, 8), (16, 4)}
    assert worst > 2.0**-10  # they are rounded


def test_index_and_report(unbroken):
    source, index = MixedSource(), RecordSource(unbroken.out).index
    images = [image for i in range(NUM) for image in source[i].images]
    assert index["documents"] == unbroken.report.documents == NUM
    assert sum(index["images"]["latents"].values()) == unbroken.report.images == len(images)
    assert set(index["images"]["latents"]) == {"1x4", "2x2", "4x1"}
    assert index["image_tokens"] == 4 * len(images)
    assert index["kinds"] == {"edit": 5, "interleaved": 5, "pair": 10, "text": 5}
    assert index["latents"] == {"dtype": "bfloat16", "token_dim": 64}
    assert [s["documents"] for s in index["shards"]] == [8, 8, 9]
    assert index["made_by"]["image_bases"] == [8]
    report = unbroken.report
    assert (report.shards, report.kept, report.complete) == (3, 0, True)
    # Whole batches of 4 images on each of 2 devices.
    assert report.rows % 8 == 0
    assert report.padding == 1 - len(images) / report.rows


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 25])
def test_shards_cover_the_documents(num_shards):
    ranges = [shard_range(k, num_shards, 25) for k in range(num_shards)]
    assert [i for r in ranges for i in r] == list(range(25))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize("devices", [1, 8])
def test_bytes_do_not_depend_on_devices_and_threads(encode, unbroken, tmp_path, devices):
    encode(tmp_path / "out", devices=devices, num_threads=5)
    assert files(tmp_path / "out") == files(unbroken.out)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_processes_give_the_bytes_of_one(encode, unbroken, tmp_path, order):
    """The one that ends last writes the index."""
    first = encode(tmp_path / "out", process=(order[0], 2))
    assert not first.complete
    with pytest.raises(ValueError, match="is unfinished"):
        RecordSource(tmp_path / "out")
    second = encode(tmp_path / "out", process=(order[1], 2))
    assert second.complete
    assert {first.shards, second.shards} == {1, 2}
    assert files(tmp_path / "out") == files(unbroken.out)


@pytest.mark.parametrize("fail_at", [3, 8, 24])
def test_a_restart_gives_the_bytes_of_the_unbroken_run(encode, unbroken, tmp_path, fail_at):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="the machine dies"):
        encode(out, MixedSource(fail_at))
    whole = sum(fail_at >= shard_range(k, 3, NUM).stop for k in range(3))
    assert [p.name for p in sorted(out.glob("*.arrayrecord"))] == [
        shard_name(k, 3) for k in range(whole)
    ]
    assert not (out / "index.json").exists()
    report = encode(out)
    assert (report.kept, report.shards) == (whole, 3 - whole)
    assert files(out) == files(unbroken.out)
    # And once more, when all is done: nothing is encoded and nothing changes.
    again = encode(out)
    assert (again.kept, again.images, again.complete) == (3, 0, True)
    assert files(out) == files(unbroken.out)


def test_the_index_is_made_later_if_it_is_missing(encode, unbroken, tmp_path):
    """All shards are there, and the process was killed before it wrote the index."""
    encode(tmp_path / "out", num_documents=5, num_shards=2)
    expected = files(tmp_path / "out")
    (tmp_path / "out" / "index.json").unlink()
    assert encode(tmp_path / "out", num_documents=5, num_shards=2, process=(1, 2)).complete
    assert files(tmp_path / "out") == expected


def test_no_image_waits_longer_than_the_window(encode, tmp_path):
    """A lone tall image among 39 squares, in batches of 4 images on one device."""

    def document(index):
        size = (16, 4) if index == 0 else (8, 8)
        pixels = np.random.default_rng(index).integers(0, 256, (*size, 3)).astype(np.uint8)
        return Document((Text("x"), Image(pixels=pixels)), f"d/{index}", "s", "pair")

    source = [document(i) for i in range(40)]
    rows = {}
    for window in (2, 1000):
        report = encode(tmp_path / str(window), source, devices=1, num_shards=1, window=window)
        rows[window] = report.rows
    # The tall one is padded alone; the squares come in tens, or in pairs that the window closes.
    assert rows == {1000: 4 + 4 * 10, 2: 4 + 4 * 20}
    first, second = (RecordSource(tmp_path / str(window)) for window in rows)
    assert [first[i].id for i in range(40)] == [one.id for one in source]
    assert first.fingerprint == second.fingerprint  # on a CPU the neighbours have no effect


def test_other_settings_are_refused_with_a_list(encode, unbroken, small, tmp_path):
    before = files(unbroken.out)
    with pytest.raises(ValueError) as caught:
        encode(unbroken.out, dtype="float16", batch_size=8, image_bases=(16,), num_shards=4)
    message = str(caught.value)
    for part in (
        "was begun with other settings: batch_size: 4 there, 8 now; ",
        "dtype: 'bfloat16' there, 'float16' now",
        "image_bases: [8] there, [16] now",
        "num_shards: 3 there, 4 now",
    ):
        assert part in message
    assert message.count(" now") == 4
    other = jax.tree.map(lambda x: x * 1.5, small.params)
    with pytest.raises(ValueError, match=r"image_tokenizer: '.*' there, '.*' now"):
        encode(unbroken.out, params=other)
    source = ShapesSource("pair", num_documents=NUM)
    with pytest.raises(ValueError, match=r"source: 'MixedSource mixed' there, .*ShapesSource"):
        encode(unbroken.out, source)
    with pytest.raises(ValueError, match="num_documents: 25 there, 24 now"):
        encode(unbroken.out, num_documents=24)
    assert files(unbroken.out) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"holds other things .notes.txt, .* and no {SETTINGS}"):
        encode(tmp_path)
    with pytest.raises(ValueError, match=r"out=.*notes.txt is not a folder"):
        encode(tmp_path / "notes.txt")
    (tmp_path / SETTINGS).write_text("[1]")
    with pytest.raises(ValueError, match="does not hold settings"):
        encode(tmp_path)


def test_of_processes_with_other_settings_one_begins_the_folder(encode, tmp_path, monkeypatch):
    """The other's settings appear while ours are written: they stay and ours are refused."""
    out, sync = tmp_path / "out", os.fsync

    def overtaken(handle):
        if not (out / SETTINGS).exists():
            (out / SETTINGS).write_text(json.dumps({"batch_size": 8}))
        sync(handle)

    monkeypatch.setattr(os, "fsync", overtaken)
    with pytest.raises(ValueError, match="begun with other settings: batch_size: 8 there, 4 now"):
        encode(out)
    assert files(out) == {SETTINGS: b'{"batch_size": 8}'}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, r"dtype='int8'; choose from \['float16', 'bfloat16', 'float32'\]"),
        ({"num_shards": 0}, "num_shards=0 must be at least 1"),
        ({"num_shards": 26}, "num_shards=26 is more than the 25 documents"),
        ({"num_documents": 26}, "num_documents=26, but the source has 25"),
        ({"num_threads": 0}, "num_threads=0 must be at least 1"),
        ({"image_bases": (10,)}, "base=10 must be a positive multiple of stride=4"),
        ({"image_bases": ()}, "image_bases must name at least one"),
        ({"process": (2, 2)}, r"process_index=2 must lie in \[0, 2\)"),
    ],
)
def test_bad_settings_leave_no_trace(encode, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        encode(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_bad_documents_are_left_out_up_to_a_limit(encode, unbroken, tmp_path, caplog):
    """Two that cannot be decoded, in different shards: all others are there, as before."""
    report = encode(tmp_path / "a", Poisoned({3, 20}))
    assert report.skipped == {"bad_image": 2} and report.documents == NUM - 2
    assert "document mixed/d/20: cannot decode the image" in caplog.text
    assert read_index(tmp_path / "a")["skipped"] == {"bad_image": 2}
    found, whole = RecordSource(tmp_path / "a"), RecordSource(unbroken.out)
    rest = [i for i in range(NUM) if i not in (3, 20)]
    assert [found[k].id for k in range(len(found))] == [f"d/{i}" for i in rest]
    for k, i in enumerate(rest):
        for one, other in zip(found[k].images, whole[i].images, strict=True):
            np.testing.assert_allclose(
                np.float32(one.latents), np.float32(other.latents), atol=0.05
            )
    with pytest.raises(ValueError, match=r"11 of the first \d+ documents are bad, more than"):
        encode(tmp_path / "all", Poisoned(set(range(NUM))))


def test_bad_latents_are_named(encode, small, tmp_path):
    encode(tmp_path / "b", num_documents=3, num_shards=1)
    with pytest.raises(ValueError, match=r"document mixed/d/0: it has latents already$"):
        encode(tmp_path / "c", RecordSource(tmp_path / "b"), num_shards=1)
    kernel = small.params["encoder"]["conv_out"]
    broken = {**small.params["encoder"], "conv_out": jax.tree.map(lambda x: x * jnp.nan, kernel)}
    with pytest.raises(ValueError, match="document mixed/d/0: image 0 has latents that are not fi"):
        encode(tmp_path / "d", num_documents=1, num_shards=1, params={"encoder": broken})
    assert not list((tmp_path / "d").glob("*.arrayrecord"))


def test_digest_is_of_what_the_latents_depend_on(vae):
    config, params = vae.module.config, vae.params
    digest = image_tokenizer_digest(config, params)
    decoder = jax.tree.map(lambda x: x + 1, params["decoder"])
    assert image_tokenizer_digest(config, {**params, "decoder": decoder}) == digest
    sampled = dataclasses.replace(config, deterministic=not config.deterministic)
    assert image_tokenizer_digest(sampled, params) == digest
    encoder = jax.tree.map(np.array, params["encoder"])
    encoder["conv_out"]["bias"][3] += 1e-6
    others = [(config, {"encoder": encoder})]
    for change in ({"norm_patch_size": 1}, {"scaling_factor": 0.5}, {"latent_norm_eps": 1e-5}):
        others.append((dataclasses.replace(config, **change), params))
    digests = {image_tokenizer_digest(*other) for other in others}
    assert len(digests | {digest}) == 5


def test_digest_does_not_depend_on_how_the_same_values_are_stored(vae):
    """Published bfloat16 parameters, and their conversion to float32."""
    published = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), vae.params)
    converted = jax.tree.map(lambda x: np.asarray(x).astype(np.float32), published)
    found = {image_tokenizer_digest(vae.module.config, x) for x in (published, converted)}
    assert len(found) == 1
    assert image_tokenizer_digest(vae.module.config, vae.params) not in found


# Training on them


@pytest.fixture(scope="module")
def losses(make_config, tokenizer, vae, fill, tmp_path_factory):
    """Pixels and records of the same documents: losses, latents and the loss's gradient by them."""
    source = {"type": "shapes", "kind": "pair", "level": "easy", "num_documents": 40}
    root = tmp_path_factory.mktemp("records")

    def make(source, **data):
        """A batch with its latents, and the task."""
        config = make_config(data={"max_image_tokens": None, **data})
        config["sources"] = {"pair": source}
        task, _ = experiment.build_nextstep_task(config, vae.module, vae.params, tokenizer)
        iterator = iter(task.dataset(0, 1))
        local = next(iterator)
        iterator.close()
        mesh = make_mesh({"fsdp": 1}, jax.devices("cpu")[:1])
        batch = task.place(mesh, local)
        return task, {k: jnp.asarray(np.asarray(v)) for k, v in batch.items()}

    tasks = {"pixels": make(source)}
    for dtype in ("bfloat16", "float16", "float32"):
        config = EncodingConfig(
            image_bases=(32,), square_only=True, dtype=dtype, num_shards=2, batch_size=8
        )
        built = source_types.build_source(source, 32)
        encode_source(
            vae.module, vae.params, built, config, root / dtype, devices=jax.devices("cpu")[:2]
        )
        records = {"type": "records", "root": str(root / dtype)}
        tasks[dtype] = make(records, latents=True)

    task = tasks["pixels"][0]
    boxed = jax.eval_shape(lambda key: init_params(task.model, key), jax.random.key(0))
    params = jax.tree.map(jnp.asarray, fill(nn.unbox(boxed)))

    @fast_jit
    @jax.value_and_grad
    def loss(latents, params, batch):
        return task.loss(params, {**batch, "latents": latents}, jax.random.key(6))[0]

    results = {}
    for name, (_, batch) in tasks.items():
        value, gradient = loss(batch["latents"], params, batch)
        arrays = {"latents": batch["latents"], "gradient": gradient}
        results[name] = (float(value), {k: np.float64(v) for k, v in arrays.items()}, batch)
    return results


def test_records_give_the_batches_of_pixels(losses):
    """All but the latents bit for bit."""
    _, _, pixels = losses["pixels"]
    for name in ("bfloat16", "float16", "float32"):
        _, _, batch = losses[name]
        assert set(batch) == set(pixels)
        for field in set(batch) - {"latents"}:
            np.testing.assert_array_equal(batch[field], pixels[field], err_msg=field)
        assert ((batch["latents"] != 0).any(-1) == (pixels["latents"] != 0).any(-1)).all()
    assert (np.asarray(pixels["image_weights"]) > 0).sum() >= 40


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_loss_from_records_is_the_loss_from_pixels(losses, dtype, bits):
    """Within the rounding of the latents.

    A number with so many bits is off by at most x / 2^bits, so that the loss is off, to first
    order, by at most sum |d loss / d x| |x| / 2^bits. How far it is off really is the gradient
    times the errors, up to the second order.
    """
    exact, arrays, _ = losses["pixels"]
    value, rounded, _ = losses[dtype]
    error = rounded["latents"] - arrays["latents"]
    # The other shape of the batch gives a float32 some more.
    assert (np.abs(error) <= np.abs(arrays["latents"]) / 2**bits + 1e-5).all()
    assert np.abs(error).max() > 2.0 ** -(bits + 1)
    bound = np.sum(np.abs(arrays["gradient"] * arrays["latents"])) / 2**bits
    float32 = 4 * np.finfo(np.float32).eps * exact
    assert abs(value - exact) <= bound + float32
    expected = np.sum(arrays["gradient"] * error)
    # Second order: a relative change of 2^-bits, squared, of a loss of order one.
    assert abs(value - exact - expected) <= 4.0**-bits * exact + float32
    assert bound < 8 * exact / 2**bits


def test_loss_from_float32_records(losses):
    """Up to the order of sums in the encoder."""
    exact, arrays, _ = losses["pixels"]
    value, stored, _ = losses["float32"]
    np.testing.assert_allclose(stored["latents"], arrays["latents"], atol=1e-5)
    assert value == pytest.approx(exact, rel=2e-6)


def test_compute_dtype_is_a_setting(small, unbroken):
    module = VAE(small.module.config, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="settings: compute_dtype: 'float32' there, 'bfloat16' no"):
        encode_source(module, small.params, MixedSource(), CONFIG, unbroken.out)
