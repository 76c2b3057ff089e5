"""Free memory, by the real nvidia-ml-py, over a stub driver with machines of many kinds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from drivers import Nvml
from forks import Forks
from harness import own_environment

GIB = 2**30

#: Two GPUs that differ, and one that is split in two.
WORLD = f"""
gpu GPU-aaaa-1111 T4 {16 * GIB} {1 * GIB}
gpu GPU-bbbb-2222 H100 {80 * GIB} {30 * GIB}
gpu GPU-bbcc-3333 A100 {40 * GIB} {3 * GIB}
mig MIG-dddd-4444 {20 * GIB} {2 * GIB}
mig MIG-eeee-5555 {10 * GIB} {1 * GIB}
process GPU-bbbb-2222 0 {12 * GIB}
process GPU-bbbb-2222 1 {17 * GIB}
process MIG-dddd-4444 0 -1
"""

ALIKE = f"gpu GPU-aaaa H100 {80 * GIB} 0\ngpu GPU-bbbb H100 {80 * GIB} {GIB}\n"


#: Asks for a line of Python as JSON.
ASKS = """
import json
import legit_worker.models.budget, legit_worker.settings
from legit_worker.device.vram import *

def job(code):
    print(json.dumps(eval(code)))
"""


@dataclass(frozen=True)
class Machine:
    """The stub, and a process that finds it."""

    nvml: Nvml
    forks: Forks

    def ask(self, world: str, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """What a process prints that looks at this world."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
        return self.forks.run(code, kept | self.nvml.environment(world) | variables)


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> Nvml:
    """The stub, compiled once."""
    return Nvml.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="module")
def machine(nvml: Nvml) -> Iterator[Machine]:
    """The processes that are asked, forked from one."""
    forks = Forks(ASKS, own_environment() | nvml.environment(""))
    yield Machine(nvml, forks)
    forks.close()


def ask(machine: Machine, world: str, code: str, **variables: str) -> Any:
    """What a line of Python gives as JSON in a process that finds the stub."""
    finished = machine.ask(world, code, **variables)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


VISIBLE = "[gpu.uuid for gpu in visible_gpus()]"

SHOWN = {
    "0,1": ["GPU-aaaa-1111", "GPU-bbbb-2222"],
    "1, 0": ["GPU-bbbb-2222", "GPU-aaaa-1111"],
    "2": ["MIG-dddd-4444"],
    "": [],
    "-1": [],
    "0,7,1": ["GPU-aaaa-1111"],
    "0,0,1": ["GPU-aaaa-1111"],
    "none": [],
    "GPU-aaaa-1111": ["GPU-aaaa-1111"],
    "GPU-aa": ["GPU-aaaa-1111"],
    "GPU-ffff,0": [],
    "GPU-bb": ["GPU-bbbb-2222"],
    "MIG-eeee-5555,MIG-dddd-4444": ["MIG-eeee-5555", "MIG-dddd-4444"],
    "0,-1,1": ["GPU-aaaa-1111"],
}


@pytest.mark.parametrize("listed", SHOWN)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(machine: Machine, listed: str) -> None:
    assert ask(machine, WORLD, VISIBLE, CUDA_VISIBLE_DEVICES=listed) == SHOWN[listed]


def test_without_the_variable_all_are_shown_and_of_a_split_one_an_instance(machine: Machine) -> None:
    assert ask(machine, WORLD, VISIBLE) == ["GPU-aaaa-1111", "GPU-bbbb-2222", "MIG-dddd-4444"]


def test_the_beginning_of_two_uuids_names_neither(machine: Machine) -> None:
    world = "gpu GPU-aab1 X 10 0\ngpu GPU-aab2 X 10 0\n"
    assert ask(machine, world, VISIBLE, CUDA_VISIBLE_DEVICES="GPU-aab") == []


@pytest.mark.parametrize(
    ("world", "variables", "known"),
    [
        (WORLD, {}, False),
        (WORLD, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, True),
        (WORLD, {"CUDA_VISIBLE_DEVICES": "1,0"}, False),
        (WORLD, {"CUDA_VISIBLE_DEVICES": "GPU-bbbb,GPU-aaaa"}, True),
        (WORLD, {"CUDA_VISIBLE_DEVICES": "1"}, True),
        (ALIKE, {}, True),
    ],
)
def test_whether_cuda_counts_as_nvml_does(machine: Machine, world: str, variables: dict[str, str], known: bool) -> None:
    assert ask(machine, world, "is_order_known(visible_gpus())", **variables) is known


MEMORY = "[(m.total, m.free, m.mine, m.used) for m in map(memory, all_gpus())]"


def test_memory_is_each_ones_own(machine: Machine) -> None:
    assert ask(machine, WORLD, MEMORY) == [
        [16 * GIB, 15 * GIB, 0, 1 * GIB],
        [80 * GIB, 50 * GIB, 12 * GIB, 30 * GIB],
        [20 * GIB, 18 * GIB, None, 2 * GIB],
        [10 * GIB, 9 * GIB, 0, 1 * GIB],
    ]


def test_other_processes_can_be_asked_about(machine: Machine) -> None:
    assert ask(machine, WORLD, "memory(all_gpus()[1], {1}).mine") == 17 * GIB


def test_a_driver_that_does_not_tell_of_processes_tells_of_memory(machine: Machine) -> None:
    found = ask(machine, WORLD + "error nvmlDeviceGetComputeRunningProcesses_v3 4\n", MEMORY)
    assert found[1] == [80 * GIB, 50 * GIB, None, 30 * GIB]


def test_a_gpu_that_knows_no_mig_is_a_gpu(machine: Machine) -> None:
    assert ask(machine, "gpu GPU-old old 100 40\n", MEMORY) == [[100, 60, 0, 40]]


@pytest.mark.parametrize(
    ("world", "words"),
    [
        ("error nvmlInitWithFlags 9\n", "driver is not loaded"),
        ("error nvmlInitWithFlags 18\n", "different versions"),
        ("error nvmlInitWithFlags 4\n", "permissions of /dev/nvidia"),
        ("error nvmlDeviceGetHandleByIndex_v2 15\n" + ALIKE, "fallen off the bus"),
        ("error nvmlDeviceGetCount_v2 999\n", "Unknown Error|stub error 999"),
    ],
)
def test_each_failure_says_why_and_what_to_set(machine: Machine, world: str, words: str) -> None:
    check_refused(machine.ask(world, "visible_gpus()"), words)


def test_one_lost_gpu_hides_no_other(machine: Machine) -> None:
    world = WORLD + "lost GPU-bbbb-2222 15\n"
    assert ask(machine, world, VISIBLE) == ["GPU-aaaa-1111", "MIG-dddd-4444"]
    assert ask(machine, world, VISIBLE, CUDA_VISIBLE_DEVICES="GPU-bbbb-2222") == []
    assert ask(machine, world, "memory(all_gpus()[0]).free") == 15 * GIB


def test_a_lost_gpu_is_told_with_its_reason(nvml: Nvml) -> None:
    code = "import logging; logging.basicConfig(); from legit_worker.device.vram import *; all_gpus()"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ
        | {"PYTHONPATH": str(Path(__file__).parents[2])}
        | nvml.environment(ALIKE + "lost GPU-bbbb 15\n"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(r"GPU 1 does not answer, and is left out: .*fallen off the bus", finished.stderr)


def test_a_machine_without_nvml_says_so() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", "from legit_worker.device.vram import *\nvisible_gpus()"],
        env=own_environment() | {"LD_LIBRARY_PATH": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    check_refused(finished, r"libnvidia-ml\.so\.1 is not there")


def check_refused(finished: subprocess.CompletedProcess[str], words: str) -> None:
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("legit_worker.device.vram.NvmlMuteError: free GPU memory is unknown: ")
    assert "LEGIT_WORKER_VRAM_LIMIT" in last
    assert re.search(words, last)


BUDGET = """(lambda chosen: __import__('legit_worker.models.budget', fromlist=['x']).DeviceBudget(chosen))(
    __import__('legit_worker.settings', fromlist=['x']).load()).bytes(2 * 2**30)"""


@pytest.mark.parametrize(
    ("variables", "gib"),
    [
        ({"DEVICE": "cuda:1"}, 2 + 50 - 8),
        ({"DEVICE": "cuda:1", "VRAM_HEADROOM": "20GiB"}, 2 + 50 - 20),
        ({"DEVICE": "cuda:1", "VRAM_LIMIT": "10GiB"}, 10),
        ({"DEVICE": "cuda:1", "VRAM_LIMIT": "25%"}, 20),
        ({"DEVICE": "cuda"}, 2 + 15 - 1.6),
        ({"DEVICE": "cuda:9"}, None),
        ({"DEVICE": "cuda:9", "VRAM_LIMIT": "3GiB"}, 3),
        ({"DEVICE": "cpu"}, None),
        ({"DEVICE": "cpu", "VRAM_LIMIT": "3GiB"}, 3),
        ({"DEVICE": "simulated", "VRAM_LIMIT": "50%"}, None),
    ],
)
def test_weights_may_take_what_is_free_less_the_headroom(
    machine: Machine, variables: dict[str, str], gib: float | None
) -> None:
    named = {f"LEGIT_WORKER_{name}": value for name, value in variables.items()}
    found = ask(machine, WORLD, BUDGET, **named)
    assert found == (None if gib is None else pytest.approx(gib * GIB, abs=1))


#: Takes the turn for some seconds, in the folder that the settings name.
TAKES_TURN = (
    "import logging, os, sys, time\nfrom pathlib import Path\nfrom legit_worker.device.vram import *\n"
    "logging.basicConfig()\nfolder = os.environ.get('FOLDER')\n"
    "with turn(all_gpus()[0], folder and Path(folder)):\n    print('in', flush=True)\n"
    "    time.sleep(float(sys.argv[1]))"
)


def take_turn(nvml: Nvml, seconds: int, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | variables | nvml.environment(ALIKE)
    command = [sys.executable, "-c", TAKES_TURN, str(seconds)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("variable", ["TMPDIR", "FOLDER"])
def test_workers_take_turns_on_a_gpu(nvml: Nvml, tmp_path: Path, variable: str) -> None:
    """The second waits until the first is done, or gone."""
    variables = {variable: str(tmp_path)}
    with take_turn(nvml, 60, **variables) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "in\n"
        with take_turn(nvml, 0, **variables) as second:
            with pytest.raises(subprocess.TimeoutExpired):
                second.wait(timeout=2)
            first.kill()
            assert second.wait(timeout=20) == 0


def test_other_users_can_not_hold_the_turn(nvml: Nvml, tmp_path: Path) -> None:
    with take_turn(nvml, 0, TMPDIR=str(tmp_path)) as worker:
        assert worker.wait(timeout=20) == 0
    folder = tmp_path / f"legit_worker-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("planted", ["a folder for all", "a link", "a file"])
def test_what_another_user_planted_is_not_used(nvml: Nvml, tmp_path: Path, planted: str) -> None:
    place, elsewhere = tmp_path / f"legit_worker-{os.getuid()}", tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if planted == "a link":
        place.symlink_to(elsewhere)
    elif planted == "a file":
        place.touch()
    else:
        place.mkdir()
        place.chmod(0o777)
    with take_turn(nvml, 0, TMPDIR=str(tmp_path)) as worker:
        _, log = worker.communicate(timeout=20)
    assert worker.returncode == 0
    assert re.search("can't take turns at loading onto GPU-aaaa: .*Set LEGIT_WORKER_LOCK_DIR", log)
    assert not list(elsewhere.iterdir())


def test_somebody_elses_shutdown_is_survived_and_a_child_asks_anew(machine: Machine) -> None:
    code = "[len(all_gpus()), __import__('pynvml').nvmlShutdown(), len(all_gpus())]"
    assert ask(machine, ALIKE, code) == [2, None, 2]


def test_importing_the_module_asks_nobody() -> None:
    code = "import sys, legit_worker.device.vram; print(sorted({'pynvml', 'torch'} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
