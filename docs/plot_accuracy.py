"""Draws accuracy against documents seen, one line a category, from the workdir of a training run.

Example:
    python docs/plot_accuracy.py runs/full --guidance_scale=2 --out=docs/images/full-accuracy.png
"""

import argparse
import bisect
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_NAMES = {
    "single_object": "one object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colour",
    "position": "position",
    "color_attr": "colours of two objects",
}


def read_lines(path: pathlib.Path) -> list[dict]:
    """The JSON lines of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples_at(metrics: list[dict], step: int) -> int:
    """Documents seen after `step` updates, from the nearest line of the metrics before."""
    steps = [line["step"] + 1 for line in metrics]
    i = bisect.bisect_right(steps, step) - 1
    return round(metrics[i]["samples"] * step / steps[i])


def main() -> None:
    """Reads the flags and draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    metrics = read_lines(args.workdir / "metrics.jsonl")
    scores = [
        line
        for line in read_lines(args.workdir / "scores.jsonl")
        if line["guidance_scale"] == args.guidance_scale
    ]
    if not scores:
        parser.error(f"no scores with guidance scale {args.guidance_scale}")
    x = [samples_at(metrics, line["step"]) / 1000 for line in scores]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in scores[0]["per_category"]:
        shares = [line["per_category"][name] for line in scores]
        y = [100 * share["accuracy"] for share in shares]
        (drawn,) = axes.plot(x, y, marker="o", markersize=3, label=_NAMES[name])
        low, high = ([100 * share[side] for share in shares] for side in ("low", "high"))
        axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.08)
    if len(scores[0]["per_category"]) > 1:
        y = [100 * line["overall"] for line in scores]
        axes.plot(x, y, color="black", linewidth=2, label="mean of the categories")
    axes.set_xlabel("thousand documents seen")
    axes.set_ylabel("held-out captions right, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
