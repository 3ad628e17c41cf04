import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from launch.convert import main, parse_flags
from nextstep_jax.interop.model_directory import read_configs, read_model_directory
from tests import published_files
from tests.interop.test_new_model import write_qwen
from tests.published_files import BFLOAT16, CASE, MODEL, assert_same, read

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = "launch/convert.py"
IMPORT, EXPORT = "--from=huggingface", "--to=huggingface"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return published_files.write_model(tmp_path_factory.mktemp("published"), tokenizer=True)


def run(*flags):
    """The program in this process; a refusal is its SystemExit."""
    main(parse_flags([PROGRAM, *map(str, flags)]))


def refusal(capsys, *flags):
    """The one line that bad input ends in."""
    with pytest.raises(SystemExit) as caught:
        run(*flags)
    line = caught.value.code
    if line == 2:  # Of the parser, after the usage.
        line = capsys.readouterr().err.splitlines()[-1]
    assert isinstance(line, str)
    assert "error: " in line
    return line


def test_there_and_back(tmp_path, capsys):
    ours, theirs = tmp_path / "ours", tmp_path / "deep" / "theirs"
    run(IMPORT, f"--model={CASE / 'model'}", f"--vae={CASE / 'vae'}", f"--out={ours}")
    assert capsys.readouterr().out == f"written to {ours}\n"
    run(EXPORT, f"--checkpoint={ours}", f"--out={theirs}", "--max_shard_size=300KB")
    assert capsys.readouterr().out == f"written to {theirs}\n"
    shards = sorted(theirs.glob("*.safetensors"))
    assert len(shards) == 5
    assert all(path.stat().st_size < 310_000 for path in shards)
    assert_same(read(theirs), read(CASE / "model"))
    config = CASE / "model" / "config.json"
    assert json.loads((theirs / "config.json").read_text()) == json.loads(config.read_text())


def test_flags_of_an_import(published, tmp_path, capsys):
    """The image tokenizer is the model's own; settings go into the model directory."""
    flags = ["--dtype=bfloat16", "--preset=nextstep-1-edit", "--image_size=64", "--sharded"]
    run(IMPORT, f"--model={published}", f"--out={tmp_path / 'ours'}", *flags)
    assert read_configs(tmp_path / "ours")[2] == {
        "preset": "nextstep-1-edit",
        "image_size": [64, 64],
    }
    run(EXPORT, f"--checkpoint={tmp_path / 'ours'}", f"--out={tmp_path / 'theirs'}")
    expected = {name: tensor.astype(BFLOAT16) for name, tensor in read(published).items()}
    assert_same(read(tmp_path / "theirs"), expected)
    assert "no tokenizer.json" not in capsys.readouterr().err


def test_an_image_tokenizer_alone(published, tmp_path):
    run(IMPORT, f"--vae={published / 'vae'}", f"--out={tmp_path / 'ours'}")
    run(EXPORT, f"--checkpoint={tmp_path / 'ours'}", f"--out={tmp_path / 'theirs'}")
    assert_same(read(tmp_path / "theirs"), read(published / "vae"))


def test_a_new_model(published, tmp_path):
    qwen = write_qwen(tmp_path / "qwen")
    flags = ["--flow_head=tiny", "--new_rows=keep", "--seed=3", "--image_size=64"]
    vae, out = f"--vae={published / 'vae'}", tmp_path / "ours"
    run(IMPORT, f"--model={qwen}", vae, f"--out={out}", *flags)
    made = read_model_directory(out)
    assert made.config.flow_head.width == 256
    assert made.config.latent_channels == 4
    table = read(qwen)["model.embed_tokens.weight"]
    assert made.params["embed_tokens"].tobytes() == table.tobytes()
    assert made.tokenizer.boi_id == 424


def test_a_model_without_a_tokenizer_is_converted_with_a_warning(tmp_path, capsys):
    folder = published_files.write_model(tmp_path / "in")
    run(IMPORT, f"--model={folder}", f"--out={tmp_path / 'ours'}", "--image_size=64")
    warning = f"{folder} has no tokenizer.json: the result cannot be prompted"
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "one of the arguments --from --to is required"),
        ([IMPORT, EXPORT], "argument --to: not allowed with argument --from"),
        (["--from=torch"], "argument --from: invalid choice: 'torch'"),
        ([IMPORT], "nothing to import: give --model, --vae or both"),
        ([EXPORT], "--to needs --checkpoint"),
        ([IMPORT, "--vae=x", "--checkpoint=y"], "--checkpoint: not with --from (import)"),
        ([EXPORT, "--checkpoint=x", "--dtype=bfloat16"], "--dtype: not with --to (export)"),
        ([IMPORT, "--model=x", "--dtype=int8"], "argument --dtype: invalid choice: 'int8'"),
        ([IMPORT, "--model=x", "--preset=best"], "argument --preset: invalid choice: 'best'"),
        ([IMPORT, "--model=x", "--image_size=big"], "argument --image_size: invalid int value"),
        ([EXPORT, "--checkpoint=x", "--max_shard_size=5XB"], "size '5XB': expected a number of"),
        ([EXPORT, "--checkpoint=x", "--max_shard_size=0"], "size '0': expected a number of bytes"),
        ([EXPORT, "--checkpoint=/none"], "/none is no folder"),
        ([IMPORT, "--model=/none"], "/none/config.json is not there"),
        ([IMPORT, "--vae=/none"], "/none/config.json is not there"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_bad_flags(tmp_path, capsys, flags, message):
    line = refusal(capsys, *flags, f"--out={tmp_path / 'out'}")
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_out_is_required(capsys):
    assert "the following arguments are required: --out" in refusal(capsys, IMPORT, "--vae=x")


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def set_values(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json is not there"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), "config.json is not JSON"),
        (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "no NextStep config"),
        (lambda d: (d / "model.safetensors").unlink(), "holds no checkpoint"),
        (lambda d: truncate(d / "model.safetensors"), "model.safetensors is cut off or damaged"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors is cut off"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "not the content of a tokenizer.json"),
        (lambda d: (d / "tokenizer.json").write_bytes(b"\xff"), "tokenizer.json"),
        (lambda d: shutil.rmtree(d / "vae"), "no image tokenizer (a folder with config.json) in"),
        (lambda d: (d / "vae" / "model.safetensors").unlink(), "vae holds no checkpoint"),
        (lambda d: truncate(d / "vae" / "model.safetensors"), "is cut off or damaged"),
        (lambda d: set_values(d / "config.json", boi=430), "boi_id: the tokenizer has 424"),
        (lambda d: set_values(d / "config.json", boi=430.5), "boi=430.5 must be an id"),
        (lambda d: set_values(d / "config.json", hidden_size=64), "of another shape: "),
        (lambda d: set_values(d / "config.json", num_hidden_layers=2), "12 unexpected: layers.2."),
        (lambda d: set_values(d / "config.json", latent_channels=16), "of another shape: "),
        (
            lambda d: set_values(d / "config.json", tie_word_embeddings=True),
            "lm_head.weight differ",
        ),
        (lambda d: set_values(d / "config.json", rope_scaling={"type": "yarn"}), "rope_scaling="),
        (lambda d: set_values(d / "vae" / "config.json", ch=33), "ch=33 must be a multiple"),
        (lambda d: set_values(d / "vae" / "config.json", z_channels=8), "of another shape: "),
        (lambda d: set_values(d / "vae" / "config.json", ch_mult=[1, 2, 2]), "missing: "),
        (
            lambda d: set_values(d / "vae" / "config.json", ch_mult="1"),
            "ch_mult='1' must be a list",
        ),
    ],
)
def test_bad_files(published, tmp_path, capsys, spoil, message):
    folder = shutil.copytree(published, tmp_path / "in")
    spoil(folder)
    line = refusal(capsys, IMPORT, f"--model={folder}", f"--out={tmp_path / 'out'}")
    assert message in line
    assert "\n" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_other_refusals(published, tmp_path, capsys):
    out = f"--out={tmp_path / 'out'}"
    line = refusal(capsys, IMPORT, f"--model={published}", f"--vae={CASE / 'vae'}", out)
    assert "latent_channels: the model has 4, its image tokenizer 16" in line
    line = refusal(capsys, IMPORT, f"--model={published}", "--tokenizer=none.json", out)
    assert "cannot read the tokenizer none.json" in line
    line = refusal(capsys, IMPORT, f"--model={published}", "--image_size=66", out)
    assert "image size 66x66 (height x width) is off the 17 aspect grids" in line
    line = refusal(capsys, IMPORT, f"--vae={published / 'vae'}", f"--out={published}")
    assert f"{published} is there already; give another --out or remove it" in line
    line = refusal(capsys, EXPORT, f"--checkpoint={published}", out)
    assert "holds no image tokenizer: no vae.json" in line
    qwen = write_qwen(tmp_path / "qwen")
    line = refusal(capsys, IMPORT, f"--model={qwen}", out)
    assert "no image tokenizer" in line
    vae = f"--vae={published / 'vae'}"
    line = refusal(capsys, IMPORT, f"--model={qwen}", vae, "--seed=-3", out)
    assert "seed=-3 must be in [0, 2**32)" in line


def test_the_program(published, tmp_path):
    """As a process: one line, no trace, status 1."""
    spoilt = shutil.copytree(published, tmp_path / "in")
    set_values(spoilt / "config.json", **{**MODEL, "intermediate_size": 40})
    command = [sys.executable, PROGRAM, IMPORT, f"--model={spoilt}", f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"error: {spoilt}: the tensors are not those of the config; 9 of another"
    )
    assert "Traceback" not in done.stderr


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_flags([PROGRAM, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "python launch/convert.py --from=huggingface --model=NextStep-1-Large" in printed
    assert "python launch/convert.py --to=huggingface --checkpoint=" in printed
