"""One concept after another: what is on disk, how it goes on, what is taken back, what is refused."""

import asyncio
import json
import multiprocessing
import os
import random
import shutil
import time
from dataclasses import replace
from unittest.mock import Mock

import conftest
import pandas as pd
import pytest
import torch
from conftest import BOTH, EXACT, GRADIENT, MEMORY, changed, distance, interrupted, undone, weights
from filelock import FileLock
from safetensors.torch import load_file

import duge_lite as duge
from duge_lite import models, unlearning
from duge_lite.unlearning import sequence_steps

THREE = ("apple", "car", "neon")


def forget(pipe, concepts=THREE, config=EXACT, directory=None, memory=MEMORY, **how):
    how = {"card": conftest.quick_card(pipe), "memory": memory, "progress": False} | how
    return duge.unlearn_sequence(pipe, concepts, config, directory, **how)


def steps(folder) -> list[str]:
    return sorted(p.name for p in folder.glob("step_*"))


@BOTH
def test_any_model_along_the_way_can_be_opened(tiny_pipe, config, tmp_path):
    after = [weights(tiny_pipe)]
    for so_far in sequence_steps(tiny_pipe, THREE, config, tmp_path, progress=False, memory=MEMORY):
        after.append(weights(so_far.pipe))
    assert so_far.concepts == THREE and (so_far.costs().seconds > 0).all()
    for at in (2, 0, 3, 1):
        assert not changed(so_far.pipeline(at=at), after[at])
    with pytest.raises(ValueError, match=r"at = 4: expected a number from 0 \(the base\) to 3"):
        so_far.pipeline(at=4)
    for k in (3, 2, 1):  # and each run is undone by itself; its old weights are on disk, mapped
        so_far.pipeline(at=k)
        assert so_far.runs[k - 1].before is so_far.states[k - 1]
        so_far.runs[k - 1].restore()
        assert not changed(tiny_pipe, after[k - 1])


def test_a_request_that_changes_nothing_keeps_those_before(tiny_pipe):
    again = duge.Concept("pomme", duge.model_card(tiny_pipe).prompts("apple"))
    sequence, now = forget(tiny_pipe, ["apple", again]), weights(tiny_pipe)
    assert not changed(sequence.pipeline(at=2), now)


@pytest.mark.parametrize(("kind", "config"), [
    (RuntimeError, EXACT), (asyncio.CancelledError, EXACT), (KeyboardInterrupt, EXACT),
    pytest.param(SystemExit, GRADIENT, marks=pytest.mark.slow),
])  # fmt: skip
def test_what_was_interrupted_goes_on_to_the_same_weights(fresh, tmp_path, kind, config, monkeypatch):
    undisturbed = weights(forget(fresh(), config=config).pipe)
    pipe, save, names = fresh(), unlearning.save_file, []

    def stop(tensors, path):
        names.append(path.parent.name)
        save(tensors, path)
        if len(names) == 2:
            raise kind("the power went out")

    monkeypatch.setattr(unlearning, "save_file", stop)
    with pytest.raises((kind, OSError)):
        forget(pipe, config=config, directory=tmp_path)
    assert [n for n in steps(tmp_path) if not n.endswith(".part")] == ["step_01_apple"]
    assert not changed(pipe, load_file(tmp_path / "step_01_apple/weights.safetensors"))
    sequence = forget(fresh(), config=config, directory=tmp_path)
    assert distance(weights(sequence.pipe), undisturbed) < 1e-6
    assert names[2:] == ["step_02_car.part", "step_03_neon.part"]  # the finished one is only read
    assert steps(tmp_path) == ["step_01_apple", "step_02_car", "step_03_neon"]
    assert list(sequence.history.index.get_level_values("request").unique()) == [1, 2, 3]


@pytest.mark.slow
def test_the_stop_button_takes_back_the_unfinished_request(tiny_pipe, tmp_path):
    forget(tiny_pipe, ["apple"], GRADIENT, tmp_path)
    told = r"stopped in request 2 \(car\)"
    with undone(tiny_pipe, KeyboardInterrupt, told), interrupted(tiny_pipe, KeyboardInterrupt, 6):
        forget(tiny_pipe, config=GRADIENT, directory=tmp_path)
    assert steps(tmp_path) == ["step_01_apple"]


@pytest.mark.slow
@pytest.mark.parametrize(("where", "middle"), [("memory", "house"), ("disk", "car")])
def test_a_request_that_is_withdrawn_was_never_made(tiny_pipe, fresh, tmp_path, where, middle):
    folder = tmp_path / "a" if where == "disk" else None
    sequence = forget(tiny_pipe, ("apple", middle, "neon"), directory=folder)
    sequence.withdraw(middle)
    other = forget(fresh(), ("apple", "neon")).pipe
    assert distance(weights(tiny_pipe), weights(other)) < 1e-4 and sequence.concepts == ("apple", "neon")
    if folder:
        assert steps(folder) == ["step_01_apple", "step_02_neon"]
        again = forget(fresh(), ("apple", "neon"), directory=folder).pipe
        assert distance(weights(again), weights(tiny_pipe)) < 1e-6
    with pytest.raises(ValueError, match=f"'{middle}' was not asked to go: the requests so far are apple, n"):
        sequence.withdraw(middle)


def widened(pipe):
    pipe.unet = type(pipe.unet).from_config({**pipe.unet.config, "cross_attention_dim": 64})


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "message"), [
    ({"config": replace(EXACT, eta=0.5)}, r"another eta \(1.0, now 0.5\)"),
    ({"config": replace(EXACT, instead="house")}, "another instead"),
    ({"memory": MEMORY[:3]}, "another memory"),
    ({"concepts": ["apple"]}, "holds another sequence: step_01_car instead of step_01_apple"),
    ({"concepts": [duge.Concept("car", ["a photo of a car"])]}, "forgets .*choose another directory"),
    ({"change": lambda pipe: pipe.unet.conv_in.weight.data.mul_(1.01)}, "another model"),
    ({"change": widened}, "another model"),
])  # fmt: skip
def test_a_directory_is_of_one_sequence(tiny_pipe, fresh, tmp_path, changes, message):
    forget(tiny_pipe, ["car"], directory=tmp_path)
    asked, pipe = {"concepts": ["car"], "card": conftest.quick_card(tiny_pipe)} | changes, fresh()
    asked.pop("change", lambda pipe: None)(pipe)
    with undone(pipe, ValueError, message):
        forget(pipe, **asked, directory=tmp_path)


def test_a_directory_is_of_one_program_at_a_time(tiny_pipe, fresh, tmp_path):
    """Also while a request is withdrawn."""
    busy = "is in use by another program: wait for it, or choose another"
    first = sequence_steps(tiny_pipe, THREE, EXACT, tmp_path, progress=False, memory=MEMORY)
    next(first)
    with pytest.raises(ValueError, match=busy):
        forget(fresh(), directory=tmp_path)
    first.close()
    done = forget(fresh(), directory=tmp_path)
    with FileLock(tmp_path / "sequence.lock"), pytest.raises(ValueError, match=busy):
        done.withdraw("car")
    assert done.concepts == THREE and steps(tmp_path)[1] == "step_02_car"


def test_a_directory_begins_with_a_model_that_has_forgotten_nothing_else(tiny_pipe, tmp_path):
    """Nothing in the directory would say so to the next process."""
    run = duge.unlearn(tiny_pipe, "harp", EXACT, MEMORY, progress=False)
    with undone(tiny_pipe, ValueError, "the pipeline has forgotten harp already"):
        forget(tiny_pipe, ["car"], directory=tmp_path)
    run.restore()
    forget(tiny_pipe, ["car"], directory=tmp_path)


def test_a_kill_while_it_is_begun(tiny_pipe, tmp_path, monkeypatch):
    """What is half written is a draft, and the next time it is begun anew; a damaged file is named."""
    file = tmp_path / "sequence.json"
    monkeypatch.setattr(models.os, "replace", Mock(side_effect=SystemExit))
    with undone(tiny_pipe, SystemExit):
        forget(tiny_pipe, ["car"], directory=tmp_path)
    assert not file.exists()
    monkeypatch.undo()
    forget(tiny_pipe, ["car"], directory=tmp_path)
    assert json.loads(file.read_text())["config"]["places"] == EXACT.places
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match="is damaged .*: choose another directory"):
        forget(tiny_pipe, ["car"], directory=tmp_path)


@pytest.mark.parametrize("file", ["weights.safetensors", "run.json", "history.csv"])
def test_a_damaged_step_is_named(tiny_pipe, tmp_path, file):
    learned = weights(forget(tiny_pipe, ["car"], directory=tmp_path).pipe)
    (tmp_path / "step_01_car" / file).write_bytes(b"")
    with pytest.raises(ValueError, match="step_01_car is damaged .* remove it; a sequence will then do"):
        forget(tiny_pipe, ["car"], directory=tmp_path)
    shutil.rmtree(tmp_path / "step_01_car")
    forget(tiny_pipe, ["car"], directory=tmp_path)
    assert distance(weights(tiny_pipe), learned) < 1e-6


def test_a_full_disk_takes_back_the_request(tiny_pipe, tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    forget(tiny_pipe, ["apple"], directory=tmp_path)
    monkeypatch.setattr(unlearning, "save_file", full)
    with undone(tiny_pipe, OSError, "could not write .*step_02_car.*No space left.*is there room on the"):
        forget(tiny_pipe, ["apple", "car"], directory=tmp_path)
    assert steps(tmp_path) == ["step_01_apple"]
    monkeypatch.undo()
    assert forget(tiny_pipe, ["apple", "car"], directory=tmp_path).concepts == ("apple", "car")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments(fresh, tmp_path):
    """kill -9, again and again: the weights are in the end those of a sequence that nobody disturbed."""

    def work(folder, seconds: float | None = None) -> int:
        def run():
            torch.set_num_threads(1)  # the threads of a forked process's parent are gone
            forget(fresh(), directory=tmp_path / folder)

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode

    started, moments = time.perf_counter(), random.Random(0)
    assert work("a") == 0
    seconds = time.perf_counter() - started
    for _ in range(5):
        work("b", moments.uniform(0, 0.5 * seconds))
    assert work("b") == 0 and steps(tmp_path / "a") == steps(tmp_path / "b")
    for step in steps(tmp_path / "a"):
        one, two = (load_file(tmp_path / x / step / "weights.safetensors") for x in "ab")
        assert distance(one, two) == 0


def test_metrics_by_hand(tiny_master):
    rows = [[1.0, 1.0, 0.8, 1.0, 1.0], [0.1, 0.9, 0.8, 1.0, 0.9]]
    rows += [[0.3, 0.6, 0.0, 0.9, 0.5], [0.2, 0.6, 0.2, 0.0, 0.5]]
    matrix = pd.DataFrame(rows, columns=["apple", "orange", "car", "neon", "sketch"])
    card = duge.model_card(tiny_master)
    table = duge.evaluation.sequence_metrics(matrix, ["apple", "car", "neon"], card)
    expected = {
        "UA": [0.9, 1 - 0.3 / 2, 1 - 0.4 / 3],
        "objects kept": [0.85, 0.6, 0.6],  # orange and car; orange; orange
        "styles kept": [0.95, 0.7, 0.5],  # neon and sketch; the same; sketch
        "IRA": [0.85, 0.6, 0.5],
        "CRA": [0.95, 0.7, 0.6],
        "revival": [float("nan"), 0.3, 0.2],
        "forgetting": [(0.1 + 0 + 0 + 0.1) / 4, (0.4 + 0.1 + 0.5) / 3, (0.4 + 0.5) / 2],
        "transfer": [-0.2 / 4, -1.0 / 3, -0.9 / 2],
        "gain": [0.9, (0.7 + 0.8) / 2, (0.8 + 0.6 + 1.0) / 3],
    }
    for name, values in expected.items():
        assert table[name].tolist() == pytest.approx(values, nan_ok=True), name
    assert table.HM[1] == pytest.approx(3 / (1 / 0.9 + 1 / 0.85 + 1 / 0.95))
    wrong = {"no column for harp": ["harp"], "4 rows for 2 requests: expected one more": ["apple", "car"]}
    for told, requests in wrong.items():
        with pytest.raises(ValueError, match=told):
            duge.evaluation.sequence_metrics(matrix, requests, card)


def test_the_matrix_has_a_row_for_every_model_and_drift_tells_how_far_it_went(tiny_pipe, tiny_judge):
    how = dict(concepts=["apple", "car", "neon"], images=2, judge=tiny_judge, num_inference_steps=2)
    sequence = forget(tiny_pipe, ("apple", "neon"))
    learned, matrix = weights(tiny_pipe), sequence.matrix(**how)
    assert matrix.shape == (3, 3) and matrix.index.name == "after" and not changed(tiny_pipe, learned)
    assert matrix.loc[1].tolist() == duge.evaluate(sequence.pipeline(at=1), **how).accuracy.tolist()
    assert list(sequence.metrics(matrix).request) == ["apple", "neon"]
    drift = sequence.drift()["from base"]
    assert set(drift.index.get_level_values("kind")) == {"to_q", "to_k", "to_v", "to_out"}
    names = [n for n in sequence.weights(0) if n.endswith("to_out.0.weight")]
    base, now = (torch.cat([sequence.weights(k)[n].flatten() for n in names]) for k in (0, 2))
    assert drift[2, "to_out"] == pytest.approx(float((now - base).norm() / base.norm()), rel=1e-5)
