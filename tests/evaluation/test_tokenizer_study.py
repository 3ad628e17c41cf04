"""The report of the study: every number of the table from where it belongs, pictures that show."""

import json

import numpy as np
import pytest
from PIL import Image

from nextstep_jax.evaluation import tokenizer_study

LEVELS = (0.0, 0.2, 0.5)


def results_of(base):
    """What the study writes for a cell, each number its own."""

    def levels(offset):
        return [
            {"noise_std": std, "psnr": base + offset - 10 * std, "scenes": {"accuracy": 1 - std}}
            for std in reversed(LEVELS)
        ]

    latents = {
        "channels": {"mean": [0.1, -0.1], "variance": [0.5, 2.0]},
        "histogram": {"edges": [-1.0, 0.0, 1.0], "counts": [3, 5]},
    }
    quality = {
        "shapes": {"levels": levels(0), "latents": latents},
        "photographs": {"levels": levels(-6)},
        "scaling_factor": base / 100,
    }
    statistics = {"mean": [0.0, 0.1], "variance": [1.0, 1.2]}
    drift = {
        "data": statistics,
        "guidance": {g: {**statistics, "variance_ratio": float(g) / 2} for g in ("1.5", "3", "15")},
    }
    scores = {"1": {"accuracy": 0.25}, "2": {"accuracy": 0.5}}
    return quality, {"loss": base / 1000, "scores": scores, "drift": drift}


@pytest.fixture
def workdir(tmp_path):
    for i, cell in enumerate(("norm-0.5", "plain-0.5", "norm-0", "plain-1", "plain-0.1")):
        quality, generation = results_of(30.0 + i)
        (tmp_path / cell).mkdir()
        (tmp_path / cell / "quality.json").write_text(json.dumps(quality))
        (tmp_path / cell / "generation.json").write_text(json.dumps(generation))
    # Not finished: left out.
    (tmp_path / "norm-1").mkdir()
    (tmp_path / "norm-1" / "quality.json").write_text("{}")
    return tmp_path


def test_cells_stand_by_gamma(workdir):
    cells = list(tokenizer_study.read_results(workdir))
    assert cells == ["norm-0", "plain-0.1", "plain-0.5", "norm-0.5", "plain-1"]
    with pytest.raises(ValueError, match="holds no finished cell"):
        tokenizer_study.read_results(workdir / "norm-0")


def test_the_table(workdir):
    lines = tokenizer_study.table(tokenizer_study.read_results(workdir)).splitlines()
    head, row = ([c.strip() for c in lines[i].strip("|").split("|")] for i in (0, 5))
    assert len(head) == len(row)
    expected = ["norm-0.5", "0.3", "30.0", "100", "25.0", "50", "24.0", "19.0"]
    assert row == [*expected, "0.0300", "25", "50", "1.50", "7.50"]


def test_the_report_is_whole_and_shows_every_cell(workdir):
    results = tokenizer_study.read_results(workdir)
    out = workdir / "report"
    tokenizer_study.write_report(results, out)
    assert json.loads((out / "study.json").read_text()) == results
    assert (out / "study.md").read_text().count("\n") == 2 + len(results)
    for name in ("robustness", "generation", "latents", "drift"):
        pixels = np.asarray(Image.open(out / f"{name}.png").convert("RGB"))
        assert min(pixels.shape[:2]) > 300
        # Coloured lines, not axes alone.
        spread = pixels.max(axis=2).astype(int) - pixels.min(axis=2)
        assert (spread > 60).sum() > 300, name
