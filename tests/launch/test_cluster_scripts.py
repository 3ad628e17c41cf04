"""The scripts for clusters, with commands of the cluster that note what they are asked.

That slurm.sbatch trains on two processes is shown in tests/training/test_many_processes.py.
"""

import os
import pathlib
import re
import shutil
import signal
import string
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
import yaml
from jax.sharding import SingleDeviceSharding

from nextstep_jax.parallel.topologies import get_topology

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = ["slurm.sbatch", "tpu_vm.sh", "xla_flags.sh"]
JOBSET = {
    **{"NAME": "stage1", "IMAGE": "place/nextstep", "CLAIM": "training", "CHIPS": "4"},
    **{"ACCELERATOR": "tpu-v5p-slice", "TOPOLOGY": "4x4x4", "SLICES": "2", "HOSTS": "16"},
    **{"CONFIG": "configs/pretrain_stage1.py:14b", "TOKENIZER": "/data/vae"},
    **{"WORKDIR": "/data/stage1", "MAX_RESTARTS": "20"},
}


def bash(command, folder, cwd=ROOT, **environment):
    """Runs a command with the fake cluster in front of the path."""
    path = f"{ROOT / 'tests/launch/fake_cluster'}:{os.environ['PATH']}"
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return subprocess.run(
        ["bash", *command],
        env={**clean, "PATH": path, "LOGS": str(folder), **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def program(tmp_path):
    """(body) -> a program that notes its environment and arguments, then runs the body."""
    path = tmp_path / "program"

    def make(body=""):
        path.write_text(
            "#!/usr/bin/env bash\n"
            'echo "$XLA_FLAGS|$LIBTPU_INIT_ARGS|$NEXTSTEP_CLUSTER|$*"'
            f" >>{tmp_path}/started\n{body}\n"
        )
        path.chmod(0o755)
        return str(path)

    return make


def flags_of(platform):
    """The flags that xla_flags.sh sets, and those of the other variable."""
    done = bash(
        ["-c", 'source launch/xla_flags.sh && echo "$XLA_FLAGS" && echo "$LIBTPU_INIT_ARGS"'],
        "/nowhere",
        NEXTSTEP_PLATFORM=platform,
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.split("\n")[:2]]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse(name):
    assert subprocess.run(["bash", "-n", str(LAUNCH / name)], capture_output=True).returncode == 0
    if shutil.which("shellcheck"):
        done = subprocess.run(
            ["shellcheck", "-x", "-e", "SC1091", str(LAUNCH / name)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_flags_by_platform():
    gpu, none = flags_of("gpu")
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in gpu and none == []
    none, tpu = flags_of("tpu")
    assert "--xla_tpu_enable_async_collective_fusion=true" in tpu and none == []
    assert flags_of("cpu") == [[], []]
    done = bash(["-c", "set -e; source launch/xla_flags.sh; echo on"], "/nowhere")
    assert done.returncode == 2 and "must be gpu, tpu or cpu" in done.stderr and not done.stdout


def test_the_users_flags_win():
    """They come last, and the last of two counts."""
    done = bash(
        ["-c", 'source launch/xla_flags.sh && echo "$XLA_FLAGS"'],
        "/nowhere",
        NEXTSTEP_PLATFORM="gpu",
        XLA_FLAGS="--xla_gpu_enable_triton_gemm=true",
    )
    assert done.stdout.split()[-1] == "--xla_gpu_enable_triton_gemm=true"


def test_jaxlib_knows_the_flags_for_gpus():
    """It ends a program at an unknown one."""
    run = [sys.executable, "-c", "import jax; print(jax.device_count())"]
    outputs = []
    # Of one that is given twice the last counts, as `test_the_users_flags_win` needs.
    twice = [f"--xla_force_host_platform_device_count={number}" for number in (3, 5)]
    for flags in ([*flags_of("gpu")[0], *twice], ["--xla_gpu_no_such_flag=true"]):
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
        outputs.append(subprocess.run(run, env=env, capture_output=True, text=True, timeout=60))
    assert outputs[0].returncode == 0 and outputs[0].stdout == "5\n", outputs[0].stderr
    assert outputs[1].returncode != 0 and "Unknown flag in XLA_FLAGS" in outputs[1].stderr


def directives():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    found = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert lines[0] == "#!/usr/bin/env bash" and max(found) < first_command
    return dict(re.fullmatch(r"#SBATCH --([a-z-]+)=?(.*)", lines[i]).groups() for i in found)


def test_directives_of_slurm():
    """One process per GPU; five minutes to save; queued again when a node is lost."""
    found = directives()
    assert found["ntasks-per-node"] == found["gpus-per-node"] == "8"
    assert found["signal"] == "B:USR1@300"
    assert {"requeue", "exclusive", "nodes", "time", "output"} <= set(found)


def slurm(folder, program, **environment):
    settings = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "2", "CONFIG": "c.py:a", "WORKDIR": "w"}
    settings |= {"PYTHON": "bash", "PROGRAM": program, "TOKENIZER": "t", "MAX_RESTARTS": "1"}
    settings["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
    return bash([str(LAUNCH / "slurm.sbatch"), "--x=1"], folder, **{**settings, **environment})


def test_slurm_starts_the_program_once_per_task(tmp_path, program):
    done = slurm(tmp_path, program())
    assert done.returncode == 0, done.stderr
    started = (tmp_path / "started").read_text().splitlines()
    assert len(started) == 2
    for line in started:
        flags, libtpu, cluster, arguments = line.split("|")
        assert "--xla_gpu_enable_latency_hiding_scheduler=true" in flags
        assert (libtpu, cluster) == ("", "")  # SLURM's own variables say the rest.
        assert arguments == "--config=c.py:a --workdir=w --x=1 --tokenizer=t"
    assert (tmp_path / "srun").read_text() == "--kill-on-bad-exit=1 --label\n"
    assert (tmp_path / "cache").is_dir()
    assert not (tmp_path / "slurm").exists()  # Finished: not queued again.


def test_slurm_queues_again_after_a_failure(tmp_path, program):
    failing = program("exit 3")
    assert slurm(tmp_path, failing).returncode == 3
    assert (tmp_path / "slurm").read_text() == "scontrol requeue 4711\n"
    done = slurm(tmp_path, failing, SLURM_RESTART_COUNT="1")
    assert done.returncode == 3 and "after 1 restarts; not again" in done.stderr
    assert (tmp_path / "slurm").read_text() == "scontrol requeue 4711\n"


def test_slurm_saves_before_the_time_is_up(tmp_path, program):
    """USR1 to the script is TERM to the tasks; their status 0 is not the end of the run."""
    waiting = program("trap 'exit 0' TERM; while :; do sleep 0.05; done")
    path = f"{ROOT / 'tests/launch/fake_cluster'}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "LOGS": str(tmp_path), "CONFIG": "c", "WORKDIR": "w"}
    env |= {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "2", "PYTHON": "bash", "PROGRAM": waiting}
    script = subprocess.Popen(["bash", str(LAUNCH / "slurm.sbatch")], env=env, cwd=ROOT)
    for _ in range(500):
        if (tmp_path / "tasks").exists() and (tmp_path / "started").exists():
            break
        time.sleep(0.02)
    time.sleep(0.2)
    script.send_signal(signal.SIGUSR1)
    assert script.wait(20) == 0
    noted = (tmp_path / "slurm").read_text().splitlines()
    assert noted == ["scancel --signal=TERM 4711", "scontrol requeue 4711"]


@pytest.mark.parametrize("missing", ["CONFIG", "WORKDIR"])
def test_slurm_names_what_is_missing(tmp_path, program, missing):
    done = slurm(tmp_path, program(), **{missing: ""})
    assert done.returncode != 0 and f"{missing}: is not set" in done.stderr
    assert not (tmp_path / "started").exists()


def tpu_vm(folder, *arguments, **environment):
    settings = {"TPU": "stage1", "ZONE": "us-east5-a", **environment}
    return bash([str(LAUNCH / "tpu_vm.sh"), *arguments], folder, **settings)


def asked(folder):
    """What gcloud was asked, one list a call."""
    return [call.split("\n") for call in (folder / "gcloud").read_text().split("\n\n") if call]


def test_tpu_vm_asks_gcloud(tmp_path):
    for arguments in (["create", "v5p-128"], ["delete"]):
        assert tpu_vm(tmp_path, *arguments, PROJECT="p").returncode == 0
    start = ["compute", "tpus", "tpu-vm"]
    where = ["stage1", "--zone=us-east5-a", "--project=p"]
    kind = ["--accelerator-type=v5p-128", "--version=v2-alpha-tpuv5"]
    assert asked(tmp_path) == [[*start, "create", *where, *kind], [*start, "delete", *where]]


def test_tpu_vm_trains_and_starts_again(tmp_path, program):
    """The command for the workers, run here: flags, the word for jax, a restart, quoted flags."""
    python = program(f'[ "$(wc -l <{tmp_path}/started)" -gt 1 ] || exit 134')
    worker = tmp_path / "worker"
    (worker / "launch").mkdir(parents=True)
    shutil.copy(LAUNCH / "xla_flags.sh", worker / "launch")
    environment = {"FOLDER": str(worker), "PYTHON": python, "RESTART_SECONDS": "0"}
    done = tpu_vm(tmp_path, "train", "--config=a b.py", "--workdir=w", **environment)
    assert done.returncode == 0, done.stderr
    for _ in range(500):
        if "ended" in (worker / "run.log").read_text():
            break
        time.sleep(0.02)
    assert (worker / "run.log").read_text().splitlines() == [
        "status 134; restart 1",
        "ended with status 0",
    ]
    for line in (tmp_path / "started").read_text().splitlines():
        flags, libtpu, cluster, arguments = line.split("|")
        assert "--xla_tpu_enable_async_collective_fusion=true" in libtpu and flags == ""
        assert cluster == "auto"
        assert arguments == "launch/train.py --config=a b.py --workdir=w"
    call = (tmp_path / "gcloud").read_text()
    assert "ssh\nstage1\n--zone=us-east5-a\n--worker=all\n--command=" in call
    done = tpu_vm(tmp_path, "logs", "1", FOLDER=str(worker))
    assert done.stdout == "ended with status 0\n"


def test_tpu_vm_stops(tmp_path, program):
    """TERM to the script on a worker reaches the program, which is not started again."""
    python = program("trap 'exit 0' TERM; while :; do sleep 0.05; done")
    worker = tmp_path / "worker"
    (worker / "launch").mkdir(parents=True)
    shutil.copy(LAUNCH / "xla_flags.sh", worker / "launch")
    assert tpu_vm(tmp_path, "train", FOLDER=str(worker), PYTHON=python).returncode == 0
    for _ in range(500):
        if (tmp_path / "started").exists():
            break
        time.sleep(0.02)
    time.sleep(0.2)
    assert tpu_vm(tmp_path, "stop", FOLDER=str(worker)).returncode == 0
    for _ in range(500):
        if "ended" in (worker / "run.log").read_text():
            break
        time.sleep(0.02)
    assert (worker / "run.log").read_text() == "ended with status 0\n"
    assert len((tmp_path / "started").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        ([], {}),
        (["fly"], {}),
        (["create"], {}),
        (["train"], {"TPU": ""}),
        (["train"], {"ZONE": ""}),
    ],
)
def test_tpu_vm_refuses(tmp_path, arguments, environment):
    done = tpu_vm(tmp_path, *arguments, **environment)
    assert done.returncode == 2 and "error: " in done.stderr and "tpu_vm.sh create" in done.stderr
    assert not (tmp_path / "gcloud").exists()


def test_jobset(tmp_path, program):
    """Filled in, it is a JobSet; its container's command is run here."""
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    names = set(re.findall(r"\$\{(\w+)\}", text.partition("apiVersion")[2]))
    assert names == set(JOBSET)
    jobset = yaml.safe_load(string.Template(text).safe_substitute(JOBSET))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "stage1"
    assert jobset["spec"]["failurePolicy"] == {"maxRestarts": 20}
    (group,) = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert (group["replicas"], job["parallelism"], job["completions"]) == (2, 16, 16)
    assert (job["backoffLimit"], job["completionMode"]) == (0, "Indexed")
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 300
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}

    (tmp_path / "bin").mkdir()
    shutil.copy(program(), tmp_path / "bin" / "python")
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert all(isinstance(value, str) for value in environment.values())
    environment["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        [*container["command"], *container["args"]],
        env={"HOME": str(tmp_path), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0, done.stderr
    flags, libtpu, cluster, arguments = (tmp_path / "started").read_text().strip().split("|")
    assert "--xla_tpu_overlap_compute_collective_tc=true" in libtpu and flags == ""
    assert cluster == "auto"
    assert arguments == (
        "launch/train.py --config=configs/pretrain_stage1.py:14b --tokenizer=/data/vae"
        " --workdir=/data/stage1"
    )


@pytest.mark.libtpu
def test_libtpu_knows_the_flags_for_tpus():
    """Each is taken by the compiler of a slice that is not there, and an unknown one is not."""
    options = dict(flag.removeprefix("--").split("=") for flag in flags_of("tpu")[1])
    for name in ("v5p:2x2x1", "v6e:2x2"):
        place = SingleDeviceSharding(get_topology(name).devices[0])
        array = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=place)
        lowered = jax.jit(lambda x: x + 1).lower(array)
        lowered.compile(compiler_options=options)
        with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
            lowered.compile(compiler_options={**options, "xla_tpu_no_such_flag": "true"})
