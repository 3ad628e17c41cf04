r"""Writes a page that shows what the model will see: documents, tokens, weights, packed rows.

Examples:
    python launch/preview_data.py --config=configs/shapes.py:full --out=preview.html
    python launch/preview_data.py --config=configs/folder.py:photos --out=preview.html --n=200
    python launch/preview_data.py --config=configs/shapes.py:full --out=preview.html \
        --workdir=runs/full --config.data.row_length=1024

The config and its flags are those of launch/train.py, and the batches are the first ones of that
training. No image tokenizer is needed: images are shown as they are before they are encoded. The
page is one file that any browser opens; its numbers are in it as JSON too.

Text is cut into tokens by --text_tokenizer (a tokenizer.json), or by that of --workdir; without
either a small tokenizer is trained on the sources, as training does.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags

from nextstep_jax.data import preview
from nextstep_jax.data.pipeline import Sources, make_pipeline
from nextstep_jax.data.preview_page import render_page
from nextstep_jax.data.statistics import SKIPPED
from nextstep_jax.data.text_tokenizer import TextTokenizer
from nextstep_jax.training import experiment
from nextstep_jax.training.logs import run_program

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
_OUT = flags.DEFINE_string("out", None, "The page to write, such as preview.html.")
_NUM = flags.DEFINE_integer("n", 64, "Documents that are shown in full, the first ones.")
_BATCHES = flags.DEFINE_integer("num_batches", 1, "Batches that are read and counted at the least.")
_WORKDIR = flags.DEFINE_string("workdir", None, "A run whose tokenizer.json is taken.")
_TEXT_TOKENIZER = flags.DEFINE_string("text_tokenizer", None, "A tokenizer.json.")

# Ours: with more of them bad, the first good ones may be long in coming.
_MAX_BAD_FRACTION = 0.5


def check_flags(out: pathlib.Path, n: int, num_batches: int) -> None:
    """Checks what can be checked before the data are read, which may take minutes.

    Raises:
        ValueError: There can be no such file, or a number is not positive.
    """
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out={out} must be a file in a folder that exists")
    for name, value in (("n", n), ("num_batches", num_batches)):
        if value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")


def open_text_tokenizer(
    path: str | None, workdir: str | None, sources: Sources, vocab_size: int
) -> TextTokenizer:
    """The text tokenizer of a file or a run, or a new one.

    Raises:
        ValueError: Both are given, or the file cannot be read.
    """
    if path and workdir:
        raise ValueError("--text_tokenizer and --workdir both name a tokenizer; give one of them")
    if path or workdir:
        return TextTokenizer.from_file(path or pathlib.Path(str(workdir)) / "tokenizer.json")
    nowhere = pathlib.Path()  # A folder, so that nothing is read.
    return experiment.load_or_train_text_tokenizer(nowhere, sources, vocab_size)


def read(
    config: Any, tokenizer_path: str | None, workdir: str | None, n: int, num_batches: int
) -> dict[str, Any]:
    """What the page says of an experiment's first batches.

    Raises:
        ValueError: Something in the config, the tokenizer or the data is wrong.
    """
    experiment.check_sections(config, experiment.MODEL_SECTIONS)
    model_config = experiment.build_model_config(config["model"])
    asked = experiment.build_data(config)
    # A training run stops at fewer; here they are to be seen, as long as there are good ones too.
    lenient = max(asked.max_bad_fraction, _MAX_BAD_FRACTION)
    data_config = dataclasses.replace(asked, max_bad_fraction=lenient)
    sources = experiment.build_sources(config)
    vocab_size = model_config.decoder.vocab_size
    tokenizer = open_text_tokenizer(tokenizer_path, workdir, sources, vocab_size)
    batches = iter(make_pipeline(sources, tokenizer, model_config, data_config))
    try:
        shown = preview.read_batches(
            batches,
            tokenizer,
            num_documents=n,
            num_batches=num_batches,
            split_at_eos=data_config.attend_across_documents,
        )
        counts: Mapping[str, Mapping[str, int]] = batches.counts()
    finally:
        batches.close()
    bad = _too_many_bad(counts, asked.max_bad_fraction)
    return {
        "config": config,
        "sources": preview.source_table(sources, counts),
        "skipped": preview.skipped_documents(counts),
        **shown,
        "problems": [*bad, *shown["problems"]],
    }


def _too_many_bad(counts: Mapping[str, Mapping[str, int]], limit: float) -> list[str]:
    """A sentence for every source of which more documents are bad than a training run allows."""
    found = []
    for source, num_read in counts.get("read", {}).items():
        num_bad = sum(counts.get(SKIPPED + source, {}).values())
        if num_bad > limit * num_read:
            found.append(
                f"{num_bad} of the {num_read} documents read of source {source!r} are bad, more"
                f" than data.max_bad_fraction={limit} allows in the long run"
            )
    return found


def main(argv: list[str]) -> None:
    """Writes the page that the flags ask for."""
    del argv
    out = pathlib.Path(_OUT.value)
    check_flags(out, _NUM.value, _BATCHES.value)
    config = experiment.plain(_CONFIG.value)
    data = read(config, _TEXT_TOKENIZER.value, _WORKDIR.value, _NUM.value, _BATCHES.value)
    data["title"] = f"Data of {config_flags.get_config_filename(flags.FLAGS['config'])}"
    data["command_line"] = sys.argv[1:]
    out.write_text(render_page(data), encoding="utf-8")
    totals = data["totals"]
    print(
        f"{totals['documents']} documents in {totals['rows']} rows, padding"
        f" {totals['padding_share']:.1%}, {len(data['problems'])} problems: written to {out}"
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "out"])
    run_program(main)
