import argparse
import json
import pathlib
import subprocess
import sys

import pytest

from launch.count_parameters import count_parameters, main, parse_flags
from nextstep_jax.models.config import nextstep_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = "launch/count_parameters.py"


def run(*flags):
    command = [sys.executable, PROGRAM, *flags]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120
    )


def test_published_counts(capsys):
    main(parse_flags([PROGRAM, "--size=14b", "--json"]))
    assert json.loads(capsys.readouterr().out) == {
        "total": 14_953_814_080,
        "decoder": 13_212_898_304,
        "embeddings": 778_567_680,
        "lm_head": 778_567_680,
        "projectors": 332_800 + 26_219_520,
        "flow_head": 157_228_096,
    }


@pytest.mark.parametrize(("head", "expected"), [("s", 40_288_320), ("l", 527_528_000)])
def test_head_flag(head, expected, capsys):
    main(parse_flags([PROGRAM, f"--head={head}", "--json"]))
    counts = json.loads(capsys.readouterr().out)
    assert counts["flow_head"] == expected
    assert counts["total"] == 14_953_814_080 - 157_228_096 + expected


@pytest.mark.parametrize(
    ("size", "language_model"),
    # Qwen2.5 model cards give 0.49B, 1.54B, 3.09B, 7.61B; counted from the shapes by hand below.
    [("0.5b", 494_032_768), ("1.5b", 1_543_714_304), ("3b", 3_085_938_688), ("7b", 7_615_616_512)],
)
def test_other_sizes(size, language_model):
    config = nextstep_config(size)
    counts = count_parameters(config)
    d = config.decoder
    q, kv = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    attention = d.embed_dim * (q + 2 * kv) + q + 2 * kv + q * d.embed_dim
    layer = attention + 3 * d.embed_dim * d.mlp_dim + 2 * d.embed_dim
    assert counts["decoder"] == d.num_layers * layer + d.embed_dim
    assert (counts["lm_head"] == 0) == d.tie_embeddings
    assert counts["decoder"] + counts["embeddings"] + counts["lm_head"] == language_model
    assert counts["total"] == sum(count for name, count in counts.items() if name != "total")


def test_table_shows_every_part(capsys):
    main(argparse.Namespace(size="14b", head=None, json=False))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["total", "14,953,814,080", "100.00%"]
    assert rows[-1] == ["flow_head", "157,228,096", "1.05%"]
    assert len(rows) == 6


def test_unknown_size_is_one_clear_line():
    result = run("--size=15b")
    assert result.returncode != 0
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if "xla_bridge" not in line]
    assert len(lines) == 1
    assert "size='15b' is unknown; choose from ['tiny', '0.5b'" in lines[0]


def test_help_has_an_example():
    result = run("--help")
    assert result.returncode == 0
    assert f"python {PROGRAM} --size=14b --head=b --json" in result.stdout
