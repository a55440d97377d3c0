"""Two processes and one: the same weights, pictures, tables and files, and errors that nobody waits for.

The processes are launched on the CPU. A launch takes several seconds, so that few tests share one.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import launched
import pandas as pd
import pytest
import torch
from accelerate.utils.other import get_free_port
from launched import EXACT, MEMORY

import duge_lite as duge
from duge_lite import models as processes

pytestmark = pytest.mark.xdist_group("processes")  # two of them are as many as there are workers

TESTS = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
LAUNCH += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


def start(*command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def launch(what: str, folder: Path) -> subprocess.CompletedProcess:
    return start(*LAUNCH, str(TESTS / "launched.py"), what, str(folder))


def found(folder: Path, what: str) -> list[dict]:
    return [torch.load(folder / f"{what}-{rank}.pt", weights_only=False) for rank in (0, 1)]


def save_pipeline(pipe, folder: Path) -> Path:
    pipe.save_pretrained(folder / "pipeline")
    return folder


@pytest.fixture(scope="module")
def together(tiny_master, tmp_path_factory) -> Path:
    """The folder in which two processes left what they found."""
    folder = save_pipeline(tiny_master, tmp_path_factory.mktemp("together"))
    done = launch("work,files", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(tiny_master, tmp_path_factory) -> dict:
    """What one process finds."""
    return launched.work(save_pipeline(tiny_master, tmp_path_factory.mktemp("alone")))


# ---------------------------------------------------------------------------- one process


def test_alone_nothing_is_set_up(tiny_pipe, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(processes, "PartialState", None)  # calling it would be an error
    items = ["a", "b"]
    assert processes.launched() is None and processes.is_main()
    assert processes.share(items) is items and processes.gathered(items) is items
    assert processes.from_main(lambda: 7) == 7
    duge.unlearn(tiny_pipe, "apple", EXACT, MEMORY, progress=False)
    assert not torch.distributed.is_initialized()
    for name, value in {"LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert processes.launched() is None  # the only one of a launcher


def process(index: int, count: int):
    """As much of a PartialState as sharing asks for."""
    names = {"process_index": index, "num_processes": count, "is_main_process": index == 0}
    return lambda: SimpleNamespace(**names, device=torch.device("cpu", index))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [0, 1, 2, 5, 8])
def test_the_parts_make_up_the_whole_and_each_process_has_a_device(monkeypatch, size, count):
    items, parts = list(range(size)), []
    for index in range(count):
        monkeypatch.setattr(processes, "launched", process(index, count))
        assert processes.default_device() == torch.device("cpu", index)
        parts.append(processes.share(items))
    assert sum(parts, [])[:size] == items
    assert max(map(len, parts)) == -(-size // count)  # nobody does more than is needed
    assert not size or min(map(len, parts)) >= 1  # no pipeline is called with nothing


def test_an_error_of_the_main_process_is_everybodys(monkeypatch):
    """Or the others would wait for ever: whatever kind of error it is."""
    said = []

    def broadcast(outcome: list) -> list:
        said.append(list(outcome))
        return outcome if processes.is_main() else said[0]

    monkeypatch.setattr(processes, "broadcast_object_list", broadcast)
    for index in (0, 1):
        monkeypatch.setattr(processes, "launched", process(index, 2))
        with pytest.raises(ZeroDivisionError):
            processes.from_main(lambda: 1 / 0)
    assert said[1] == [None, None]  # the second one did nothing itself


# ---------------------------------------------------------------------------- two processes


def assert_same(ours: dict, first: dict, second: dict | None = None) -> None:
    for n, value in ours.items():
        assert second is None or torch.equal(first[n], second[n])
        torch.testing.assert_close(first[n], value, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_processes_draw_and_solve_what_one_does(together, alone):
    (first, history), (second, _) = (theirs["solved"] for theirs in found(together, "work"))
    solved, alone_history = alone["solved"]
    base = launched.trained(launched.load(together))
    assert max(float((v - base[n]).abs().max()) for n, v in solved.items()) > 1e-2
    assert_same(solved, first, second)
    pd.testing.assert_frame_equal(history, alone_history, rtol=1e-3, atol=1e-6)
    for theirs in found(together, "work"):
        assert (theirs["latents"] - alone["latents"]).abs().max() < 1e-5 * alone["latents"].std()
        assert abs(theirs["one"] - alone["one"]).max() <= 1  # of 255: other batches, other rounding
        pd.testing.assert_frame_equal(theirs["table"], alone["table"])


@pytest.mark.slow
def test_a_sequence_is_written_once_and_goes_on(together, tiny_pipe):
    first, second = found(together, "files")
    weights = [name for name in first["written"] if name.endswith("weights.safetensors")]
    assert weights == [f"step_{step}.part/weights.safetensors" for step in ("01_apple", "02_neon", "01_neon")]
    assert not second["written"] and first["left"] == second["left"] == ["step_01_neon"]
    again = duge.unlearn_sequence(tiny_pipe, ["apple", "neon"], EXACT, memory=MEMORY, progress=False)
    assert_same(launched.trained(again.pipe), first[2], second[2])


@pytest.mark.slow
def test_when_one_dies_the_others_are_ended(tiny_master, tmp_path):
    done = launch("one_dies", save_pipeline(tiny_master, tmp_path))
    assert done.returncode != 0 and "not enough" in done.stderr
    assert not list(tmp_path.glob("one_dies-*.pt"))


@pytest.mark.slow
def test_a_notebook_starts_several(tiny_master, tmp_path, alone):
    """A kernel that has used the library already: it must not have settled that it is alone."""
    folder = save_pipeline(tiny_master, tmp_path)
    program = f"""
import sys, torch, duge_lite as duge
from accelerate import notebook_launcher
sys.path.insert(0, r"{TESTS}")
import launched
torch.set_num_threads(1)
pipe = duge.load_pipeline(r"{folder / "pipeline"}", "cpu")
duge.sample(pipe, "a photo of an apple", num_inference_steps=1)
notebook_launcher(launched.main, ("work", r"{folder}"), num_processes=2, use_port="{get_free_port()}")
"""
    done = start(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr[-4000:]
    for theirs in found(folder, "work"):
        assert_same(alone["solved"][0], theirs["solved"][0])
