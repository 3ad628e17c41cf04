import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from launch import sample
from nextstep_jax.interop.model_directory import write_model_directory
from nextstep_jax.sampling.generate import SamplerConfig
from nextstep_jax.sampling.presets import get_preset
from tests import tiny_model

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PROGRAM = "launch/sample.py"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model directory of the tiny model."""
    path = tmp_path_factory.mktemp("model")
    sampling = {
        "preset": "plain",
        "guidance_scale": 2.5,
        "negative_prompt": "blurry",
        "image_size": list(tiny_model.IMAGE_SIZE),
        "sampler": {"solver": "ode", "num_steps": 2},
    }
    write_model_directory(
        path,
        tiny_model.CONFIG,
        tiny_model.VAE_CONFIG,
        tiny_model.vae_params(),
        tiny_model.tokenizer(),
        sampling,
        tiny_model.params(),
    )
    return path


def test_pictures_of_a_fresh_process_on_eight_devices(directory, tmp_path):
    """The program reads the model from disk and spreads it; one device here gives the same."""
    (tmp_path / "prompts.txt").write_text("green\n\n  a large red triangle \n")
    command = [
        *(sys.executable, PROGRAM, f"--checkpoint={directory}", f"--out={tmp_path / 'out'}"),
        *("--prompt=a red circle", f"--prompts_file={tmp_path / 'prompts.txt'}"),
        *("--num_images=2", "--seed=7"),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"6 images in {tmp_path / 'out'}" in done.stdout
    assert "100%" in done.stderr and "16/16" in done.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "0000-a-red-circle-seed-7.png",
        "0001-a-red-circle-seed-8.png",
        "0002-green-seed-7.png",
        "0003-green-seed-8.png",
        "0004-a-large-red-triangle-seed-7.png",
        "0005-a-large-red-triangle-seed-8.png",
        "grid.png",
    ]
    with Image.open(tmp_path / "out" / names[1]) as image:
        settings = json.loads(image.text[sample.METADATA_KEY])
        pixels = np.asarray(image).astype(int)
    expected = {
        "prompt": "a red circle",
        "negative_prompt": "blurry",
        "seed": 8,
        "height": 8,
        "width": 32,
        "shared_noise": False,
        "guidance_scale": 2.5,
        "solver": "ode",
        "num_steps": 2,
        "checkpoint": str(directory),
        "step": None,
        "dtype": "float32",
        "input_images": [],
    }
    assert expected.items() <= settings.items()
    made_here = tiny_model.pipeline()("a red circle", seed=8, solver="ode", num_inference_steps=2)
    assert np.abs(np.asarray(made_here.images[0]).astype(int) - pixels).max() <= 1
    assert pixels.std() > 10
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.width == 4 * 168 + 8 and grid.height > 2 * (40 + 8)


def test_flags_reach_the_pipeline(tmp_path, monkeypatch):
    source = np.random.default_rng([6]).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(source).save(tmp_path / "source.png")
    args = sample.parse_flags(
        [
            *(PROGRAM, "--checkpoint=x", "--prompt=a", "--prompt=b", "--num_images=3", "--seed=5"),
            *("--negative_prompt=n", "--height=64", "--width=32", "--steps=9", "--solver=heun"),
            *("--guidance_scale=3.5", "--image_guidance_scale=1.5", "--shift=2", "--renorm"),
            *("--noise_level=0.5", "--schedule=falling", "--interval", "0.1", "0.9"),
            *("--no-token_norm", "--shared_noise", "--positive_prompt=p"),
            *("--batch_size=4", "--chunk_tokens=8", f"--image={tmp_path / 'source.png'}"),
        ]
    )
    seen = {}
    monkeypatch.setattr(sample, "tqdm", lambda **_: contextlib.nullcontext())
    sample.sample(lambda prompts, **settings: seen.update(prompts=prompts, **settings), args)
    np.testing.assert_array_equal(seen.pop("image"), [source])
    assert callable(seen.pop("callback"))
    assert seen == {
        "prompts": ["a", "b"],
        "negative_prompt": "n",
        "positive_prompt": "p",
        "shared_noise": True,
        "height": 64,
        "width": 32,
        "num_inference_steps": 9,
        "guidance_scale": 3.5,
        "image_guidance_scale": 1.5,
        "num_images_per_prompt": 3,
        "seed": 5,
        "batch_size": 4,
        "chunk_tokens": 8,
        "solver": "heun",
        "shift": 2.0,
        "noise_level": 0.5,
        "schedule": "falling",
        "interval": [0.1, 0.9],
        "renorm": True,
        "token_norm": False,
    }
    # Every field of the sampler has a flag; num_inference_steps is its num_steps.
    fields = {field.name for field in dataclasses.fields(SamplerConfig)}
    assert fields - set(seen) == {"num_steps"}


def test_settings_that_no_flag_names_are_those_of_the_directory(monkeypatch):
    seen = {}
    monkeypatch.setattr(sample, "tqdm", lambda **_: contextlib.nullcontext())
    args = sample.parse_flags([PROGRAM, "--checkpoint=x", "--prompt=a"])
    sample.sample(lambda prompts, **settings: seen.update(settings), args)
    assert not {field.name for field in dataclasses.fields(SamplerConfig)} & set(seen)
    unset = ("height", "width", "guidance_scale", "negative_prompt", "positive_prompt", "image")
    assert [seen[name] for name in unset] == [None] * len(unset) and not seen["shared_noise"]


def test_a_preset_replaces_the_settings_of_the_directory(directory):
    args = sample.parse_flags([PROGRAM, f"--checkpoint={directory}", "--preset=nextstep-1-edit"])
    pipe = sample.load(args)
    assert pipe.preset == get_preset("nextstep-1-edit")
    assert pipe.image_size == tiny_model.IMAGE_SIZE
    args.preset = None
    assert sample.load(args).preset.guidance_scale == 2.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no prompts; give --prompt or --prompts_file"),
        (["--prompts_file=nowhere.txt"], "No such file or directory: 'nowhere.txt'"),
        (["--prompt=a", "--checkpoint=nowhere"], "nowhere is not a model directory"),
        (["--prompt=a", "--height=13"], "image size 13x32 .* is off the 17 aspect grids"),
        (["--prompt=a", "--steps=0"], "num_steps must be at least 1"),
        (["--prompt=a", "--num_images=0"], "num_images_per_prompt=0 must be at least 1"),
        (["--prompt=a", f"--image={__file__}"], "test_sample.py: cannot decode the image"),
    ],
)
def test_bad_input_ends_with_one_line(flags, message, directory, tmp_path):
    argv = [PROGRAM, f"--checkpoint={directory}", f"--out={tmp_path / 'out'}", *flags]
    with pytest.raises(SystemExit, match=f"^sample: .*{message}") as stopped:
        sample.main(sample.parse_flags(argv))
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists()


def stopped_by(*flags):
    with pytest.raises(SystemExit) as stopped:
        sample.main(sample.parse_flags([PROGRAM, *flags]))
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


def test_a_file_in_the_way_is_refused_before_sampling(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load", lambda _: pytest.fail("read the model"))
    (tmp_path / "taken").write_text("")
    for out in (tmp_path / "taken", tmp_path / "taken" / "deeper"):
        message = stopped_by("--checkpoint=x", "--prompt=a", f"--out={out}")
        assert message == f"sample: out={out}: {tmp_path / 'taken'} is a file, not a folder"


def test_a_model_json_with_other_keys_ends_with_one_line(tmp_path):
    (tmp_path / "model.json").write_text('{"format": 1, "model": {"depth": 3}}')
    message = stopped_by(f"--checkpoint={tmp_path}", "--prompt=a", f"--out={tmp_path / 'out'}")
    assert message.startswith(f"sample: {tmp_path / 'model.json'}: 'model'")


def test_prompts_files_of_other_systems(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\n\r\nb\r\n")
    args = sample.parse_flags([PROGRAM, "--checkpoint=x", f"--prompts_file={path}"])
    assert sample.read_prompts(args) == ["a", "b"]
    path.write_bytes(b"a\xff")
    message = stopped_by("--checkpoint=x", f"--prompts_file={path}")
    assert message.startswith(f"sample: prompts file {path} is not UTF-8")


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.parse_flags([PROGRAM, "--help"])
    assert stopped.value.code == 0
    assert f"python {PROGRAM} --checkpoint=runs/easy --prompt=" in capsys.readouterr().out
