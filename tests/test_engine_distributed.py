"""Two processes (gloo) train like one: data parallel and ZeRO, and their states move freely."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engine_toy import STEPS, ZERO, build, largest_difference, lms_by_turns, train

from lw_fast.engine import World

WORKER = Path(__file__).with_name("engine_worker.py")
ENGINES = ["plain", *ZERO]
ONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
TOLERANCE = 1e-6
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def environment() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return {**env, "OMP_NUM_THREADS": "1"}


def torchrun(*command: str, processes: int = 2) -> list[str]:
    """On a port that the rendezvous finds free."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc_per_node", str(processes), *command]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def one_process(
    *, stop: int = STEPS, resume: dict | None = None, accumulation: int = 1, lms=None
) -> dict:
    engine, parts = build(ONE, None, accumulation), []
    if resume:
        engine.load_module_state(resume["weights"])
        engine.load_optimizer_state(resume["optimizer"])
    start = STEPS // 2 if resume else 0
    norms = train(engine, start=start, steps=stop, accumulation=accumulation, lms=lms, parts=parts)
    return {
        "norms": norms,
        "parts": parts,
        "weights": engine.module_state(),
        "optimizer": engine.optimizer_state(),
    }


@pytest.fixture(scope="module")
def reference():
    return one_process()


def run_worker(folder: Path, launch: list[str]) -> dict:
    """Hands the worker half a training of one process; returns what it made of it."""
    half = one_process(stop=STEPS // 2)
    torch.save({key: half[key] for key in ("weights", "optimizer")}, folder / "in.pt")
    run = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The results of one run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    return run_worker(folder, torchrun(str(WORKER), str(folder)))


def assert_same(result: dict, expected: dict, tolerance: float = TOLERANCE) -> None:
    norms = expected["norms"][-len(result["norms"]) :]
    assert result["norms"] == pytest.approx(norms, rel=10 * tolerance)
    assert largest_difference(result["weights"], expected["weights"]) < tolerance
    assert result["optimizer"]["step"] == expected["optimizer"]["step"]
    assert result["optimizer"]["moments"].keys() == expected["optimizer"]["moments"].keys()
    for name, moments in expected["optimizer"]["moments"].items():
        assert largest_difference(result["optimizer"]["moments"][name], moments) < tolerance


@pytest.mark.parametrize("case", ["whole", "accumulated", "resumed"])
@pytest.mark.parametrize("name", ENGINES)
def test_two_processes_equal_one(two, reference, name, case):
    assert two["size"] == 2
    assert_same(two[name][case], reference)


@pytest.mark.parametrize("name", ENGINES)
def test_state_of_two_loads_in_one(two, reference, name):
    assert_same(one_process(resume=two[name]["half"]), reference)


@pytest.mark.parametrize("name", ENGINES)
def test_left_out_adapters_on_two_processes(two, name):
    # One process meets the micro-batches of rank 0, then those of rank 1.
    one = one_process(accumulation=4, lms=lambda step, micro: lms_by_turns(step, micro % 2))
    assert_same(two[name]["by_turns"], one)
    for found, expected in zip(two[name]["by_turns"]["parts"], one["parts"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", ENGINES)
def test_nan_on_one_rank_stops_all(two, name):
    """Every rank sees a norm that is not finite and keeps its weights."""
    for norm, unchanged in two[name]["nan"]:
        assert not torch.isfinite(torch.tensor(norm)) and unchanged


@pytest.mark.parametrize("name", ENGINES)
def test_ranks_start_from_the_weights_of_rank_0(two, name):
    assert two[name]["same_start"]


def test_collectives(two):
    assert two["reduced"] == [3.0, 1.0]


FAULTS = """
import os, sys, time, torch
from lw_fast.engine import init_world
world = init_world(use_deepspeed=False, device="cpu", timeout_seconds=4)

if world.is_main:
    time.sleep(8)
world.barrier(patient=True)
if world.is_main:
    print("the patient barrier outlasts the time-out", flush=True)

if world.rank == 1:
    time.sleep(60)
start = time.monotonic()
try:
    world.all_reduce(torch.ones(1))
except RuntimeError as error:
    print("gave up on a hung peer after", round(time.monotonic() - start), flush=True)
os._exit(7)
"""

DIES = """
import os, signal, time
from lw_fast.engine import init_world
world = init_world(use_deepspeed=False, device="cpu", timeout_seconds=4)
world.barrier()
if world.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    world.barrier(patient=True)
except RuntimeError as error:
    print("saw the peer die", flush=True)
"""


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (FAULTS, ["the patient barrier outlasts the time-out", "gave up on a hung peer after 4"]),
        (DIES, []),
    ],
)
def test_no_hang_on_a_missing_peer(tmp_path, script, said):
    """A rank that hangs or dies does not hang the others past the time-out."""
    path = tmp_path / "faults.py"
    path.write_text(script)
    env = {**environment(), "PYTHONPATH": str(WORKER.parents[1])}
    start = time.monotonic()
    run = subprocess.run(torchrun(str(path)), env=env, capture_output=True, text=True, timeout=100)
    assert run.returncode != 0
    for words in said:
        assert words in run.stdout, run.stdout + run.stderr[-2000:]
    assert time.monotonic() - start < 50


def test_the_deepspeed_launcher(tmp_path, reference):
    """The launcher of the main job, with one process; it passes --local_rank."""
    launch = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "1"]
    launch += ["--master_port", str(free_port()), str(WORKER), str(tmp_path)]
    results = run_worker(tmp_path, launch)
    assert results["size"] == 1
    for name in ENGINES:
        assert_same(results[name]["accumulated"], reference)


@pytest.mark.parametrize(
    "gpus",
    [pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.multi_gpu)],
)
def test_gpus_equal_one_cpu(tmp_path, reference, gpus):
    """NCCL, fused AdamW and offloading, in fp32."""
    worker = [str(WORKER), str(tmp_path), "--device", "cuda"]
    results = run_worker(tmp_path, torchrun(*worker, processes=gpus))
    assert results["size"] == gpus
    for name in ENGINES:
        for case in ("whole", "accumulated", "resumed"):
            assert_same(results[name][case], reference, tolerance=1e-4)
        if gpus == 2:
            assert not any(torch.tensor(norm).isfinite() for norm, _ in results[name]["nan"])
            assert results[name]["same_start"]
