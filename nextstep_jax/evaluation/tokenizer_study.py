"""The report of `launch/tokenizer_study.py`: what noise and normalisation of the latent do.

A cell is a tokenizer with or without the token norm ("norm", "plain") and a gamma of equation 3
(arXiv 2508.10711); its results are the quality of the tokenizer and the generation of a tiny model
on its latents. The pictures follow the paper's: robustness (figure 6), drift of the tokens under
guidance (figure 5), the distribution of the latents (figure 7).
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nextstep_jax.evaluation.token_drift import plot_drift

Results = Mapping[str, Mapping[str, Any]]
SOURCES = {"shapes": "built-in world", "photographs": "photographs"}
NORMS = {"plain": "without the norm", "norm": "with the norm"}
# The paper's gamma, at which drift and latents are drawn.
_SHOWN_GAMMA = 0.5
# Standard deviations of the latents, which are scaled to about 1.
_SHOWN_RANGE = 5.0
_COLUMNS = (
    *("cell", "scale", "world dB", "read %", "at 0.5 dB", "read %", "photo dB", "at 0.5 dB"),
    *("loss", "right %", "g=2 %", "var g=3", "var g=15"),
)


def read_results(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The finished cells of a study's folder, by gamma, those without the norm first.

    Raises:
        ValueError: No cell is finished.
    """
    results = {}
    for path in pathlib.Path(workdir).glob("*/generation.json"):
        quality = json.loads((path.parent / "quality.json").read_text())
        generation = json.loads(path.read_text())
        results[path.parent.name] = {"quality": quality, "generation": generation}
    if not results:
        raise ValueError(f"{workdir} holds no finished cell")
    return dict(sorted(results.items(), key=lambda item: (_gamma(item[0]), item[0] < "o")))


def table(results: Results) -> str:
    """One line a cell, in Markdown."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    for cell, one in results.items():
        lines.append(f"| {cell} | {' | '.join(_numbers(one))} |")
    return "\n".join(lines)


def _numbers(one: Mapping[str, Any]) -> list[str]:
    quality, generation = one["quality"], one["generation"]
    world, photos = ({_std(level): level for level in quality[s]["levels"]} for s in SOURCES)
    drift = generation["drift"]["guidance"]
    return [
        f"{quality['scaling_factor']:.3g}",
        *(
            text
            for std in (0.0, 0.5)
            for text in (f"{world[std]['psnr']:.1f}", f"{100 * _read(world[std]):.0f}")
        ),
        *(f"{photos[std]['psnr']:.1f}" for std in (0.0, 0.5)),
        f"{generation['loss']:.4f}",
        *(f"{100 * generation['scores'][g]['accuracy']:.0f}" for g in ("1", "2")),
        *(f"{drift[g]['variance_ratio']:.2f}" for g in ("3", "15")),
    ]


def write_report(results: Results, out: pathlib.Path) -> None:
    """Writes study.md (the table), study.json and the pictures into a folder."""
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.md").write_text(table(results) + "\n")
    (out / "study.json").write_text(json.dumps(results, indent=1) + "\n")
    plot_robustness(results, out / "robustness.png")
    plot_generation(results, out / "generation.png")
    plot_latents(results, out / "latents.png")
    cells = {words: f"{norm}-{_SHOWN_GAMMA:g}" for norm, words in NORMS.items()}
    shown = {
        f"{words}, gamma {_SHOWN_GAMMA:g}": results[cell]["generation"]["drift"]
        for words, cell in cells.items()
        if cell in results
    }
    if shown:
        plot_drift(shown, out / "drift.png")


def plot_robustness(results: Results, path: pathlib.Path) -> None:
    """PSNR against noise on the latents: a row a source, a column with and without the norm."""
    figure = Figure(figsize=(8.4, 6.4), layout="constrained")
    grid = figure.subplots(len(SOURCES), len(NORMS), sharex=True, sharey="row", squeeze=False)
    for row, (source, title) in zip(grid, SOURCES.items(), strict=True):
        for axes, (norm, words) in zip(row, NORMS.items(), strict=True):
            for cell, one in _cells_of(results, norm):
                levels = one["quality"][source]["levels"]
                points = sorted((_std(level), level["psnr"]) for level in levels)
                label = f"gamma {_gamma(cell):g}"
                axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
            axes.set_title(f"{title}, {words}", fontsize=10)
            axes.grid(alpha=0.3)
        row[0].set_ylabel("PSNR in dB")
    for axes in grid[-1]:
        axes.set_xlabel("std of the noise on the latents")
    grid[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def plot_generation(results: Results, path: pathlib.Path) -> None:
    """Reconstruction, loss and accuracy of the models against gamma."""
    figure = Figure(figsize=(11.4, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = ("reconstruction of the world, dB", "flow loss, held out", "captions obeyed, %")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("gamma")
        axes.grid(alpha=0.3)
    for i, (norm, words) in enumerate(NORMS.items()):
        cells = _cells_of(results, norm)
        gammas = [_gamma(cell) for cell, _ in cells]
        levels = [one["quality"]["shapes"]["levels"] for _, one in cells]
        clean = [min(each, key=_std)["psnr"] for each in levels]
        panels[0].plot(gammas, clean, "o-", color=f"C{i}", label=words)
        losses = [one["generation"]["loss"] for _, one in cells]
        panels[1].plot(gammas, losses, "o-", color=f"C{i}", label=words)
        for guidance, style in (("1", "o--"), ("2", "o-")):
            right = [100 * one["generation"]["scores"][guidance]["accuracy"] for _, one in cells]
            label = f"{words}, guidance {guidance}"
            panels[2].plot(gammas, right, style, color=f"C{i}", label=label)
    for axes in panels:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def plot_latents(results: Results, path: pathlib.Path) -> None:
    """Histograms of all values, and mean and deviation by channel, with and without the norm."""
    figure = Figure(figsize=(8.4, 6.4), layout="constrained")
    grid = figure.subplots(2, len(NORMS), sharex="row", squeeze=False)
    for (top, below), (norm, words) in zip(np.transpose(grid), NORMS.items(), strict=True):
        for i, (cell, one) in enumerate(_cells_of(results, norm)):
            latents = one["quality"]["shapes"]["latents"]
            _draw_histogram(top, latents["histogram"], f"gamma {_gamma(cell):g}")
            mean, variance = (np.asarray(latents["channels"][k]) for k in ("mean", "variance"))
            places = np.arange(len(mean)) + 0.12 * i
            below.errorbar(places, mean, np.sqrt(variance), fmt="o", markersize=4, color=f"C{i}")
            below.set_xticks(range(len(mean)))
        # The histogram's last bins reach far; hardly anything lies there.
        top.set_xlim(-_SHOWN_RANGE, _SHOWN_RANGE)
        top.set_title(words, fontsize=10)
        top.set_xlabel("value, in units of the model")
        below.set_xlabel("channel of the latent")
    grid[0][0].set_ylabel("density")
    grid[1][0].set_ylabel("mean and standard deviation")
    grid[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _draw_histogram(axes: Axes, histogram: Mapping[str, Sequence[float]], label: str) -> None:
    edges, counts = np.asarray(histogram["edges"]), np.asarray(histogram["counts"], float)
    density = counts / max(counts.sum(), 1) / np.diff(edges)
    axes.stairs(density, edges, label=label)


def _cells_of(results: Results, norm: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The cells with or without the norm, gamma ascending."""
    cells = [(cell, one) for cell, one in results.items() if cell.startswith(f"{norm}-")]
    return sorted(cells, key=lambda item: _gamma(item[0]))


def _gamma(cell: str) -> float:
    return float(cell.partition("-")[2])


def _std(level: Mapping[str, Any]) -> float:
    return float(level["noise_std"])


def _read(level: Mapping[str, Any]) -> float:
    return level["scenes"]["accuracy"]
