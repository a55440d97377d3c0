"""Two processes and one: the same weights, pictures, tables and files, and errors that nobody waits for.

The processes are launched on the CPU. A launch takes several seconds, so that few tests share one.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import launched
import numpy as np
import pandas as pd
import pytest
import torch
from launched import SETTINGS

import duge_lite as duge
from duge_lite import processes
from duge_lite.unlearning import UnlearningRun

pytestmark = pytest.mark.xdist_group("processes")  # two of them are as many as there are workers

TESTS = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
LAUNCH += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


def start(*command: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(TESTS.parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
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
    done = launch("work,files,errors", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(tiny_master, tmp_path_factory) -> dict:
    """What one process finds."""
    return launched.work(save_pipeline(tiny_master, tmp_path_factory.mktemp("alone")))


# ---------------------------------------------------------------------------- one process


def test_alone_nothing_is_set_up(tiny_pipe, tiny_memory, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(processes, "PartialState", None)  # calling it would be an error
    tensor, items = torch.ones(3), ["a", "b"]
    assert processes.launched() is None and processes.is_main()
    assert processes.share(items) is items and processes.gathered(items) is items
    assert processes.averaged(tensor) is tensor and processes.from_main(lambda: 7) == 7
    processes.check_batches(batch_size=7)
    duge.unlearn(tiny_pipe, "apple", SETTINGS, tiny_memory, progress=False)
    assert not torch.distributed.is_initialized()


def test_one_process_of_a_launcher_is_alone(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert processes.launched() is None


class Launched:
    """As much of a PartialState as sharing asks for."""

    def __init__(self, index: int, count: int) -> None:
        self.process_index, self.num_processes, self.device = index, count, torch.device("cpu", index)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [0, 1, 2, 5, 8])
def test_the_parts_make_up_the_whole(monkeypatch, size, count):
    items, parts = list(range(size)), []
    for index in range(count):
        monkeypatch.setattr(processes, "launched", lambda index=index: Launched(index, count))
        parts.append(processes.share(items))
        assert processes.share(torch.arange(size)).tolist() == parts[-1]
    assert sum(parts, [])[:size] == items
    assert max(map(len, parts)) == -(-size // count)  # nobody does more than is needed
    assert not size or min(map(len, parts)) >= 1  # no pipeline is called with nothing
    if size % count == 0:
        assert {len(part) for part in parts} == {size // count}


def test_a_batch_is_shared_equally_or_not_at_all(monkeypatch):
    monkeypatch.setattr(processes, "launched", lambda: Launched(0, 4))
    processes.check_batches(batch_size=8, memory_batch_size=4)
    with pytest.raises(ValueError, match=r"^memory_batch_size = 6: expected a multiple of 4, the number of"):
        processes.check_batches(batch_size=8, memory_batch_size=6)


def test_an_interruption_of_several_is_not_kept(tiny_pipe, tiny_memory, monkeypatch):
    """Each process is stopped somewhere else: one that goes on would wait for the others."""
    monkeypatch.setattr("duge_lite.unlearning.launched", lambda: Launched(0, 2))

    def stop(state) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        duge.unlearn(tiny_pipe, "apple", SETTINGS, tiny_memory, stop, progress=False)


def test_each_process_has_a_device(monkeypatch):
    monkeypatch.setattr("duge_lite.models.launched", lambda: Launched(1, 2))
    assert duge.models.default_device() == torch.device("cpu", 1)


# ---------------------------------------------------------------------------- two processes


@pytest.mark.slow
@pytest.mark.parametrize("name", launched.RUNS)
def test_two_processes_learn_what_one_learns(together, alone, name):
    weights, history = alone[name]
    base = launched.trained(duge.load_pipeline(together / "pipeline", "cpu", torch.float32))
    moved = max((value - base[n]).abs().max().item() for n, value in weights.items() if n in base)
    for theirs, their_history in (other[name] for other in found(together, "work")):
        assert theirs.keys() == weights.keys()
        for n, value in weights.items():
            torch.testing.assert_close(theirs[n], value, rtol=0, atol=1e-5)
        pd.testing.assert_frame_equal(their_history, history, rtol=1e-4, atol=1e-6)
    assert name == "lora" or moved > 3e-4  # what was learned is larger than what may differ


@pytest.mark.slow
@pytest.mark.parametrize("name", launched.RUNS)
def test_all_processes_come_to_the_same_weights(together, name):
    (first, _), (second, _) = (theirs[name] for theirs in found(together, "work"))
    assert all(torch.equal(value, second[n]) for n, value in first.items())


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(together, alone):
    for theirs in found(together, "work"):
        far = (theirs["latents"] - alone["latents"]).abs().max() / alone["latents"].std()
        assert far < 1e-5
        for name in ("pictures", "one"):
            assert theirs[name].shape == alone[name].shape
            assert np.abs(theirs[name] - alone[name]).max() <= 1  # of 255: other batches, other rounding
        pd.testing.assert_frame_equal(theirs["table"], alone["table"])


@pytest.mark.slow
def test_the_main_process_alone_shows_progress(together):
    first, second = found(together, "work")
    assert "forgetting apple" in first["bar"] and not second["bar"]


@pytest.mark.slow
def test_a_sequence_is_written_once_and_goes_on(together, tiny_pipe):
    first, second = found(together, "files")
    assert first["written"] == ["sequence", "step_01_apple.part", "step_02_neon.part"]
    assert not second["written"]
    steps = [[n[2] for n in (rank[1], rank[2])] for rank in (first, second)]
    assert steps == [[SETTINGS.iterations] * 2] * 2  # the second time apple was read, not learned
    names = {p.name for p in (together / "sequence").iterdir()}
    assert names == {"base.safetensors", "sequence.json", "step_01_apple", "step_02_neon"}
    assert [rank["refused"] for rank in (first, second)] == [first["refused"]] * 2

    run = UnlearningRun.load(together / "sequence" / "step_02_neon", tiny_pipe)  # as one process reads it
    weights, history, _ = second[2]
    assert all(torch.equal(value, weights[n]) for n, value in launched.trained(tiny_pipe).items())
    assert run.history.loss.tolist() == pytest.approx(history.loss.loc[2].tolist())
    run.restore()
    again = duge.unlearn_sequence(tiny_pipe, ["apple", "neon"], SETTINGS, progress=False)
    for n, value in launched.trained(again.pipe).items():
        torch.testing.assert_close(value, weights[n], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_errors_are_the_same_in_all_processes(together):
    first, second = found(together, "errors")
    for name in ("batch_size", "memory_batch_size"):
        for call in ("unlearn", "unlearn_sequence"):
            expected = f"{name} = 3: expected a multiple of 2, the number of processes"
            assert first[name, call] == second[name, call] == expected
    assert first["diverged"] == second["diverged"] and "at iteration 2" in first["diverged"]
    assert first["back"] and second["back"]
    before, weights = first["fp16"]
    assert all(torch.equal(value, second["fp16"][1][n]) for n, value in weights.items())
    assert all(value.isfinite().all() for value in weights.values())
    assert any(not torch.equal(value, before[n]) for n, value in weights.items())


@pytest.mark.slow
def test_when_one_dies_the_others_are_ended(tiny_master, tmp_path):
    done = launch("one_dies", save_pipeline(tiny_master, tmp_path))
    assert done.returncode != 0
    assert "not enough" in done.stderr
    assert not list(tmp_path.glob("one_dies-*.pt"))


@pytest.mark.slow
def test_a_notebook_starts_several(tiny_master, tmp_path, alone):
    """A kernel that has used the library already: it must not have settled that it is alone."""
    folder = save_pipeline(tiny_master, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = f"""
import sys, torch, duge_lite as duge
from accelerate import notebook_launcher
sys.path.insert(0, r"{TESTS}")
import launched
torch.set_num_threads(1)
pipe = duge.load_pipeline(r"{folder / "pipeline"}", "cpu")
duge.sample(pipe, "a photo of an apple", steps=1)
notebook_launcher(launched.main, ("learn", r"{folder}"), num_processes=2, use_port="{port}")
"""
    done = start(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr[-4000:]
    for theirs in found(folder, "learn"):
        for n, value in alone["duge"][0].items():
            torch.testing.assert_close(theirs["duge"][n], value, rtol=0, atol=1e-5)
