"""One host of a run, as a process of its own: takes batches, and keeps its state in files.

Nothing here touches a device; the processes meet in a folder alone, as hosts of a cluster do.
"""

import asyncio
import json
import os
import pathlib
import signal
from contextlib import closing

import numpy as np

from nextstep_jax.data import pipeline, shapes, text_tokenizer
from nextstep_jax.data.arrangement import LayoutConfig
from nextstep_jax.data.pipeline import DataConfig
from nextstep_jax.models import config as model_configs

NUM_STREAMS = 4
WEIGHTS = {"text": 0.2, "pair": 0.5, "edit": 0.1, "interleaved": 0.2}


def make_iterator(index, count, num_threads, num_documents):
    """The host's iterator over all kinds of the built-in world, `num_documents` of each."""
    tokenizer = text_tokenizer.train_bpe([], len(text_tokenizer.SPECIAL_TOKENS) + 256)
    ids = {field: getattr(tokenizer, field) for field in text_tokenizer.CONFIG_FIELDS}
    model = model_configs.NextStepConfig(
        decoder=model_configs.DECODERS["tiny"], bos_id=tokenizer.eos_id, **ids
    )
    sources = {
        kind: (
            shapes.ShapesSource(kind, "full", image_size=32, num_documents=num_documents),
            weight,
        )
        for kind, weight in WEIGHTS.items()
    }
    config = DataConfig(
        row_length=512,
        rows_per_batch=8,
        num_streams=NUM_STREAMS,
        layout=LayoutConfig(image_bases=(32,), square_only=True),
        num_open_rows=4,
        num_threads=num_threads,
    )
    return iter(pipeline.make_pipeline(sources, tokenizer, model, config, index, count))


class _Folder:
    """What orbax hands to `save`: a folder that will be there."""

    def __init__(self, path):
        self._path = path

    async def await_creation(self):
        return self._path


def as_arrays(batch):
    """A batch as a flat dict of arrays, with the images of each row joined to its tokens."""
    flat = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    flat["document_ids"] = np.array([json.dumps(ids) for ids in batch["document_ids"]])
    # Of the global batch, the images of a size come in the order of the rows.
    rows, length = batch["token_ids"].shape
    canvas = np.zeros((rows * length, 16, 16, 3), np.uint8)
    for key, images in batch["images"].items():
        side = int(key.split("x")[0])
        patches = images.reshape(len(images), side // 16, 16, side // 16, 16, 3)
        patches = np.moveaxis(patches, 3, 2).reshape(len(images), -1, 16, 16, 3)
        canvas[batch["image_slots"][key]] = patches
    flat["pixels"] = canvas.reshape(rows, length, -1)
    return flat


def run(index, count, num_threads, num_documents, folder, start, stop, kill=False):
    """Takes batches [start, stop) into `folder`, saving the state before each.

    Started at other than 0 it continues from the state before that batch. With `kill` the process
    is killed while it takes the batch `stop`.
    """
    folder = pathlib.Path(folder)
    with closing(make_iterator(index, count, num_threads, num_documents)) as iterator:
        if start:
            asyncio.run(_await_twice(iterator.load(folder / f"state-{start}")))
        for step in range(start, stop):
            state = folder / f"state-{step}"
            state.mkdir(exist_ok=True)
            asyncio.run(_await_twice(iterator.save(_Folder(state))))
            np.savez(folder / f"batch-{step}-{index}-of-{count}.npz", **as_arrays(next(iterator)))
        if kill:
            next(iterator)
            os.kill(os.getpid(), signal.SIGKILL)


async def _await_twice(coroutine):
    """Orbax awaits what it calls, and in the background what that returns."""
    await (await coroutine)
