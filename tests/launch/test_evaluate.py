import dataclasses
import json
import pathlib
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from matplotlib.figure import Figure
from PIL import Image
from skimage.data import astronaut

import nextstep_jax
from launch import evaluate
from nextstep_jax.data.record_writer import ShardWriter, shard_name, write_index
from nextstep_jax.data.schema import Document
from nextstep_jax.data.schema import Image as DocumentImage
from nextstep_jax.data.shapes import ShapesSource, heldout_prompts
from nextstep_jax.evaluation.tokenizer_quality import evaluate_tokenizer
from nextstep_jax.interop.convert import export_checkpoint
from nextstep_jax.interop.model_directory import write_model_directory, write_vae_directory
from nextstep_jax.models.vae import VAE
from nextstep_jax.sampling.pipeline import NextStepPipeline, data_parallel_mesh
from tests import tiny_model

PROGRAM = "launch/evaluate.py"
SHAPES = {"type": "shapes", "kind": "pair", "level": "easy"}


@pytest.fixture(scope="module")
def untouched_workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers") / "tok"
    write_vae_directory(path, tiny_model.VAE_CONFIG, tiny_model.vae_params())
    write_config(path, {"sources": {"shapes": SHAPES}})
    return path


@pytest.fixture
def workdir(untouched_workdir, tmp_path):
    """What the training of a tokenizer leaves, checkpoints apart."""
    return pathlib.Path(shutil.copytree(untouched_workdir, tmp_path / "tok"))


@pytest.fixture
def empty_figures(monkeypatch):
    """Figures are files without content; other tests here draw them."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: pathlib.Path(path).touch())


def write_config(path, sections):
    config = {"tokenizer": {"image_size": 32}, **sections}
    (path / "config.json").write_text(json.dumps(config))


def run(workdir, *flags, names=("shapes",)):
    """The report of the program on a few images; there are pictures of the sources `names`."""
    settings = [f"--tokenizer={workdir}", "--num_images=5", "--batch_size=4"]
    settings += ["--noise_levels=0,0.5", *flags]
    args = evaluate.parse_flags([PROGRAM, "--task=tokenizer", *settings])
    evaluate.main(args)
    out = pathlib.Path(args.out or workdir / "evaluation")
    kinds = ("latents", "noise", "reconstructions")
    files = {"robustness.png", "tokenizer.json", *(f"{k}-{n}.png" for k in kinds for n in names)}
    assert {path.name for path in out.iterdir()} == files
    return json.loads((out / "tokenizer.json").read_text())


def test_a_workdir_is_judged_on_its_own_held_out_images(workdir, capsys):
    (workdir / "evaluation").mkdir()
    (workdir / "evaluation" / "tokenizer.json").write_text("old")
    report = run(workdir)
    source = ShapesSource("pair", "easy", "heldout", image_size=32)
    expected = evaluate_tokenizer(
        VAE(tiny_model.VAE_CONFIG),
        tiny_model.vae_params(),
        source,
        image_size=32,
        num_images=5,
        noise_levels=(0.0, 0.5),
    )
    assert report["task"] == "tokenizer"
    assert list(report["results"]) == ["shapes"]
    results = report["results"]["shapes"]
    for found, level in zip(results["levels"], expected["levels"], strict=True):
        assert found["num_images"] == 5
        assert found["scenes"] == level["scenes"]
        for name in ("psnr", "ssim"):
            assert found[name] == pytest.approx(level[name], rel=1e-5)
    assert results["originals"]["scenes"]["accuracy"] == 1.0
    assert report["version"] == nextstep_jax.__version__
    assert report["environment"]["jax"] == jax.__version__
    assert report["settings"]["source"] == {"shapes": SHAPES}
    assert report["settings"]["image_size"] == 32
    with Image.open(workdir / "evaluation" / "reconstructions-shapes.png") as picture:
        pixels = np.asarray(picture)
    # Pairs are 64x32 and enlarged to 192 without smoothing: the first original is there as it is.
    scale = 192 // 64
    shown = pixels[8 : 8 + 32 * scale : scale, 8 : 8 + 32 * scale : scale]
    np.testing.assert_array_equal(shown, source[0].images[0].pixels)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "5 images of 32x32 from shapes"
    assert printed[2].split()[:3] == ["noise", "0", f"{expected['levels'][0]['psnr']:.2f}"]
    assert printed[-1] == f"written to {workdir / 'evaluation'}"


def test_a_report_holds_numbers_alone(tmp_path):
    args = evaluate.parse_flags([PROGRAM, "--task=tokenizer"])
    with pytest.raises(ValueError, match="not JSON compliant"):
        evaluate.write_report(args, tmp_path, {"psnr": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_folder_of_images_and_a_published_tokenizer(tmp_path, empty_figures):
    """Exported, the tokenizer is the same; images come from where the flag says."""
    # The published format knows no other number of groups.
    config = dataclasses.replace(tiny_model.VAE_CONFIG, channels=32, num_groups=32)
    images = jnp.zeros((1, 8, 8, 3))
    shapes = jax.eval_shape(VAE(config).init, jax.random.key(0), images)["params"]
    write_vae_directory(tmp_path / "tok", config, tiny_model.random_tree(shapes, 3))
    export_checkpoint(tmp_path / "tok", tmp_path / "published")
    assert not (tmp_path / "published" / "vae.json").exists()
    (tmp_path / "photos").mkdir()
    for i in range(3):
        crop = astronaut()[100 * i : 100 * i + 60, 80:150]
        Image.fromarray(crop).save(tmp_path / "photos" / f"{i}.png")
    flags = [f"--source=images:{tmp_path / 'photos'}", "--image_size=24"]
    # The name of the source is that of the flag, as files can be called.
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", f"images:{tmp_path / 'photos'}")
    both = []
    for folder in ("tok", "published"):
        out = f"--out={tmp_path / 'results' / folder}"
        both.append(run(tmp_path / folder, *flags, out, names=(name,))["results"][name])
    ours, theirs = both
    assert ours["num_images"] == 3
    assert ours["latent"]["shape"] == [12, 12, 4]
    assert "originals" not in ours
    for one, other in zip(ours["levels"], theirs["levels"], strict=True):
        assert one["psnr"] == pytest.approx(other["psnr"], rel=1e-6)
    assert ours["bicubic"] == theirs["bicubic"]


def write_photos(folder):
    folder.mkdir()
    for i in range(2):
        Image.fromarray(astronaut()[:40, 40 * i : 40 * i + 40]).save(folder / f"{i}.png")


def test_several_sources_are_judged_apart(workdir, capsys, tmp_path, request):
    """Those of the run, and those of the flag."""
    write_photos(tmp_path / "photos")
    photos = {"type": "images", "root": str(tmp_path / "photos")}
    write_config(workdir, {"sources": {"the world": SHAPES, "photos": photos}})
    report = run(workdir, names=("the-world", "photos"))
    results = report["results"]
    assert {name: one["num_images"] for name, one in results.items()} == {
        "the-world": 5,
        "photos": 2,
    }
    assert ["originals" in one for one in results.values()] == [True, False]
    assert report["settings"]["source"] == {"the-world": SHAPES, "photos": photos}
    printed = capsys.readouterr()
    assert "may have seen these images: no held-out split of ['images']" in printed.err
    lines = printed.out.splitlines()
    titles = [line for line in lines if "images of" in line]
    assert titles == [
        "5 images of 32x32 from the-world",
        "2 images of 32x32 from photos",
    ]
    for title, one in zip(titles, results.values(), strict=True):
        first = lines[lines.index(title) + 2].split()
        assert first[:3] == ["noise", "0", f"{one['levels'][0]['psnr']:.2f}"]
    out = f"--out={tmp_path / 'flag'}"
    names = ("shapes-easy", "photographs")
    request.getfixturevalue("empty_figures")
    given = run(workdir, "--source=shapes:easy,photographs", out, names=names)["results"]
    # What the flag names is the run's own held-out world.
    assert given["shapes-easy"]["levels"][0]["psnr"] == results["the-world"]["levels"][0]["psnr"]
    assert given["photographs"]["levels"][0]["psnr"] != results["photos"]["levels"][0]["psnr"]
    with pytest.raises(SystemExit, match="need different names"):
        run(workdir, "--source=shapes:easy,shapes-easy")


class Distance(nn.Module):
    @nn.compact
    def __call__(self, images, others):
        return self.param("w", nn.initializers.ones, ()) * jnp.abs(images - others).mean((1, 2, 3))


class Features(nn.Module):
    @nn.compact
    def __call__(self, images):
        return self.param("w", nn.initializers.ones, ()) * images.mean(axis=(1, 2))


def test_networks_come_from_the_files_of_the_flags(workdir, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(evaluate, "Lpips", lambda network: Distance())
    monkeypatch.setattr(
        evaluate, "read_lpips", lambda *args: asked.append(args) or {"w": jnp.array(2.0)}
    )
    monkeypatch.setattr(
        evaluate, "read_inception", lambda path: (Features(), {"w": jnp.array(float(path.stem))})
    )
    for name in ("back", "lin", "3"):
        (tmp_path / f"{name}.pth").write_bytes(b"")
    flags = [f"--lpips_backbone={tmp_path / 'back.pth'}", f"--inception={tmp_path / '3.pth'}"]
    flags += ["--lpips_network=alex", f"--lpips_weights={tmp_path / 'lin.pth'}"]
    report = run(workdir, *flags, "--dtype=bfloat16")
    assert asked == [("alex", tmp_path / "back.pth", tmp_path / "lin.pth")]
    assert all(
        level["lpips"] > 0 and level["rfid"] > 0 for level in report["results"]["shapes"]["levels"]
    )
    assert "LPIPS      rFID" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokenizer=nowhere"], "source: .* give --source"),
        (["--tokenizer=nowhere", "--source=shapes:easy"], "nowhere holds no image tokenizer"),
        (["--source=shapes:hard"], "hard"),
        (["--source=videos:x"], "'videos' is unknown"),
        (["--noise_levels=0;1"], "noise_levels='0;1' must be different numbers between commas"),
        (["--noise_levels=0,-1"], "noise_levels"),
        (["--image_size=34"], "image_size: 34"),
        (["--num_images=0"], "num_images=0"),
        ([f"--out={__file__}"], "File exists"),
        (["--inception=gone.pth"], "inception: gone.pth is not there; usually .*pytorch-fid"),
        (["--lpips_backbone=gone.pth"], "gone.pth is not there; usually from torchvision"),
        (["--lpips_weights=vgg.pth"], "lpips_weights needs lpips_backbone"),
        (["--seed=-1"], "seed=-1 must lie in"),
        (["--seed=4294967296"], "seed=4294967296 must lie in"),
    ],
)
def test_bad_input_ends_with_one_line(workdir, flags, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(workdir, *flags)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The workdir of a tiny model that samples 32x32, in 64 tokens."""
    path = tmp_path_factory.mktemp("models") / "model"
    write_model_directory(
        path,
        tiny_model.CONFIG,
        tiny_model.VAE_CONFIG,
        tiny_model.vae_params(),
        tiny_model.tokenizer(),
        {"preset": "plain", "image_size": [32, 32], "sampler": {"num_steps": 1}},
        tiny_model.params(),
    )
    (path / "config.json").write_text(json.dumps({"score": {"level": "easy"}}))
    return path


def run_drift(model, *flags):
    settings = [f"--checkpoint={model}", "--guidance=1.5,7", "--num_images=3", "--batch_size=8"]
    evaluate.main(evaluate.parse_flags([PROGRAM, "--task=drift", *settings, *flags]))


def test_drift_of_a_model(model, capsys):
    """Its table and its file, recomputed from the pipeline's samples and the VAE's tokens."""
    run_drift(model)
    printed = capsys.readouterr().out.splitlines()
    out = model / "evaluation"
    assert sorted(path.name for path in out.iterdir()) == ["drift.json", "drift.png"]
    report = json.loads((out / "drift.json").read_text())
    assert report["settings"]["source"] == "shapes:easy"
    assert report["version"] == nextstep_jax.__version__
    results = report["results"]
    assert results["num_images"] == 3
    source = ShapesSource("pair", "easy", "heldout", image_size=32)
    pixels = np.stack([source[i].images[0].pixels for i in range(3)])
    vae = VAE(tiny_model.VAE_CONFIG)

    @jax.jit
    def encode(params, images):
        return vae.apply({"params": params}, images, 2, method="encode_tokens")

    data = encode(tiny_model.vae_params(), jnp.asarray(pixels) / 127.5 - 1)
    variance = np.asarray(data).var(axis=2).mean(axis=0)
    np.testing.assert_allclose(results["data"]["variance"], variance, rtol=1e-4)
    assert list(results["guidance"]) == ["1.5", "7"]
    # The same programs, as they are compiled already.
    mesh = data_parallel_mesh()
    pipe = NextStepPipeline.from_pretrained(model, mesh=mesh)
    prompts = [claim["prompt"] for claim in heldout_prompts("easy", 3, 0)]
    tokens = pipe(prompts, seed=[0, 1, 2], guidance_scale=7.0, batch_size=8).tokens
    found = results["guidance"]["7"]
    np.testing.assert_allclose(found["variance"], tokens.var(axis=2).mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found["mean"], tokens.mean(axis=(0, 2)), rtol=1e-4, atol=1e-5)
    assert printed[0] == "3 images at each scale, against 3 from shapes:easy"
    assert printed[1].split() == ["guidance", "variance_ratio", "last_over_first", "rms_mean"]
    ratio = tokens.var(axis=2).mean() / variance.mean()
    assert printed[3].split()[:2] == ["7", f"{ratio:.3f}"]
    assert printed[-1] == f"written to {out}"


def test_drift_of_given_prompts_against_records(model, tmp_path, monkeypatch):
    tokens = np.random.default_rng([3]).normal(size=(2, 64, 16)).astype(np.float32)
    documents = [
        Document((DocumentImage(latents=x, grid=(8, 8)),), str(i), "s", "pair")
        for i, x in enumerate(tokens)
    ]
    (tmp_path / "records").mkdir()
    with ShardWriter(tmp_path / "records" / shard_name(0, 1)) as writer:
        for document in documents:
            writer.write(document)
    write_index(tmp_path / "records", 1, {})
    (tmp_path / "prompts.txt").write_text("\ufeffgreen\n\n a red circle \n")
    asked = []

    def sample(pipe, prompts, callback, **settings):
        asked.append((prompts, settings))
        callback(64, 64)
        return types.SimpleNamespace(tokens=2 * tokens)

    monkeypatch.setattr(NextStepPipeline, "__call__", sample)
    flags = [f"--prompts={tmp_path / 'prompts.txt'}", f"--records={tmp_path / 'records'}"]
    run_drift(model, *flags, "--num_inference_steps=4", f"--out={tmp_path / 'out'}")
    settings = {"seed": [0, 1], "batch_size": 8, "num_inference_steps": 4}
    assert asked == [
        (["green", "a red circle"], {**settings, "guidance_scale": scale}) for scale in (1.5, 7.0)
    ]
    results = json.loads((tmp_path / "out" / "drift.json").read_text())["results"]
    np.testing.assert_allclose(
        results["data"]["variance"], tokens.var(axis=2).mean(axis=0), rtol=1e-5
    )
    assert results["guidance"]["7"]["variance_ratio"] == pytest.approx(4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guidance=1,,2"], "guidance='1,,2' must be different numbers"),
        (["--guidance=2,2.0"], "guidance='2,2.0' must be different numbers"),
        (["--guidance=inf"], "guidance_scale=inf must be a finite number"),
        (["--prompts=gone.txt"], "gone.txt"),
        (["--num_images=0"], "prompts: none .* num_images=0"),
        (["--source=photographs", "--records=x"], "one of --source and --records"),
        (["--records=gone"], "gone is no records folder"),
        (["--source=shapes:hard"], "hard"),
        (["--checkpoint=nowhere", "--source=photographs"], "prompts: .* give --prompts"),
        (["--checkpoint=nowhere", f"--prompts={__file__}"], "source: .* give --source"),
        (
            ["--checkpoint=nowhere", f"--prompts={__file__}", "--source=photographs"],
            "nowhere is not a folder",
        ),
        (["--seed=-1"], "seed=-1 must lie in"),
    ],
)
def test_bad_input_of_drift_ends_with_one_line(model, flags, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run_drift(model, *flags)


def test_drift_tries_its_folder_before_it_reads_the_model(model, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "NextStepPipeline", None)
    with pytest.raises(SystemExit, match=r"^error: .*File exists"):
        run_drift(model, f"--out={__file__}")

    def is_full(dir):
        raise OSError(f"{dir}: no space left")

    monkeypatch.setattr(evaluate.tempfile, "TemporaryFile", is_full)
    with pytest.raises(SystemExit, match=r"^error: .*out: no space left"):
        run_drift(model, f"--out={tmp_path / 'out'}")


def test_a_new_task_is_one_row(monkeypatch):
    seen = []
    monkeypatch.setitem(evaluate.TASKS, "model", lambda args: seen.append(args.num_images))
    evaluate.main(evaluate.parse_flags([PROGRAM, "--task=model", "--num_images=7"]))
    assert seen == [7]
    for task, message in (("tokenizer", "folder of an image tokenizer"), ("drift", "of a model")):
        with pytest.raises(SystemExit, match=message):
            evaluate.main(evaluate.parse_flags([PROGRAM, f"--task={task}"]))


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.parse_flags([PROGRAM, "--help"])
    assert stopped.value.code == 0
    assert f"python {PROGRAM} --task=tokenizer --tokenizer=runs/tok" in capsys.readouterr().out
