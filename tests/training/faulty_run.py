"""A program as it is, with faults: faulty_run.py PROGRAM ARGUMENTS, or faulty_run.py toy.

`toy` trains the matrix of test_loop.py in the workdir WORKDIR; any other program is run as if it
had been started itself. The metrics get a checksum of the batch, latents included, and FAULTS, a
JSON object in the environment, says what goes wrong; `process` is the one concerned:

    {"slow": seconds that every step takes longer,
     "full_disk_at": the step whose save finds the disk of the process full,
     "kill_in_save_of": the step whose save the process does not survive, all but one rename done,
     "nan_at": the batch whose loss is NaN}
"""

import json
import os
import pathlib
import resource
import runpy
import signal
import sys
import time
import types

import jax
from jax._src import compiler

from nextstep_jax.parallel import distributed
from nextstep_jax.training import checkpoint, loop
from nextstep_jax.training.logs import run_program
from nextstep_jax.training.pretrain import NextStepTask
from tests.training.tiny_run import checksum

FAULTS = json.loads(os.environ.get("FAULTS", "{}"))


def is_concerned():
    """Whether this process is the one with the fault."""
    return os.environ.get("NEXTSTEP_PROCESS_ID", "0") == str(FAULTS.get("process", 0))


def fill_the_disk(step):
    """From the start of the save of a step to its end the kernel refuses every byte."""
    save, wait = checkpoint.CheckpointStore.save, checkpoint.CheckpointStore.wait
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def faulty_save(store, number, *args):
        store.wait()
        if number == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        save(store, number, *args)

    def faulty_wait(store):
        was_pending = store._pending
        try:
            wait(store)
        finally:
            if was_pending:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    checkpoint.CheckpointStore.save, checkpoint.CheckpointStore.wait = faulty_save, faulty_wait


def die_in_save_of(step):
    """A checkpoint is there when its folder gets its name: this process does not live to do it."""

    def deadly(plain):
        def rename(source, target, *args, **options):
            if pathlib.Path(os.fspath(target)).name == str(step):
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(source, target, *args, **options)

        return rename

    os.rename, os.replace = deadly(os.rename), deadly(os.replace)


def main():
    """Patches what the faults ask for and runs the program."""
    # Only process 0 keeps what it compiles, and on a CPU the others' is not the same: all do here.
    everyone = types.SimpleNamespace(process_id=0, client=None)
    compiler.distributed = types.SimpleNamespace(global_state=everyone)
    checkpoint.SAVE_SECONDS = int(os.environ.get("SAVE_SECONDS", checkpoint.SAVE_SECONDS))
    if is_concerned() and "full_disk_at" in FAULTS:
        fill_the_disk(FAULTS["full_disk_at"])
    if is_concerned() and "kill_in_save_of" in FAULTS:
        die_in_save_of(FAULTS["kill_in_save_of"])
    plain_loss, plain_place = NextStepTask.loss, NextStepTask.place

    def loss(self, params, batch, *args):
        value, metrics = plain_loss(self, params, batch, *args)
        return value, {**metrics, "batch": checksum(batch)}

    def place(self, *args):
        time.sleep(FAULTS.get("slow", 0.0))
        return plain_place(self, *args)

    NextStepTask.loss, NextStepTask.place = loss, place
    if sys.argv[1] == "toy":
        del sys.argv[1:]
        run_program(train_toy)
    else:
        del sys.argv[0]
        runpy.run_path(sys.argv[0], run_name="__main__")


def train_toy(argv):
    """Test_loop.py's matrix, saved every other step."""
    from tests.training import test_loop

    del argv
    distributed.initialize()

    class Task(test_loop.Toy):
        def place(self, *args):
            time.sleep(FAULTS.get("slow", 0.0))
            return super().place(*args)

    task = Task(nan_at=FAULTS.get("nan_at"))
    config = test_loop.config(
        num_steps=40, checkpoint_every=2, mesh=(("fsdp", jax.device_count()),)
    )
    loop.run(task, config, pathlib.Path(os.environ["WORKDIR"]))


if __name__ == "__main__":
    main()
