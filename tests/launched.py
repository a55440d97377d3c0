"""What test_processes.py does alone and in several processes: the program that it launches.

``accelerate launch --multi_gpu --num_processes 2 launched.py work FOLDER``: without a GPU it runs on the CPU.
"""

import contextlib
import io
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from duge_lite.lessons import DUGE, fill_memory

import duge_lite as duge
from duge_lite import baselines, sequence, unlearning
from duge_lite.errors import DivergedError
from duge_lite.processes import is_main

SETTINGS = duge.UnlearnConfig(
    iterations=3,
    batch_size=4,
    memory_batch_size=2,
    target_size=3,
    memory_size=3,
    lessons=6,
    lr=2e-4,
    lambda_prior=1.0,
    measure_every=2,
)
RUNS = {
    "duge": (SETTINGS, DUGE),
    # of its own layer's V, "probs" knows nothing: all that would reach it is rounding
    "maps": (replace(SETTINGS, match="probs", target="clamped", regularizer="fisher", train="qk"), DUGE),
    "lora": (replace(SETTINGS, train="lora"), DUGE),
    "protected": (replace(SETTINGS, protect=0.9), DUGE),
    "esd": (replace(SETTINGS, target_size=1), baselines.esd()),  # one picture for two processes
}


def worse_at(step: int, factor: float) -> unlearning.Objective:
    """DUGE, but in the second process the loss of one step is ``factor`` times as large."""
    calls = 0

    def loss(learner, wanted):
        nonlocal calls
        calls += 1
        return DUGE.loss(learner, wanted) * (factor if calls == step and not is_main() else 1.0)

    return replace(DUGE, loss=loss)


def trained(pipe) -> dict[str, torch.Tensor]:
    parameters = unlearning.plain_parameters(pipe.unet)
    return {n: p.detach().clone() for n, p in parameters.items() if ".attn2." in n}


def work(folder: Path) -> dict:
    """All that can be compared, of the pipeline in ``folder / "pipeline"``."""
    pipe, found = duge.load_pipeline(folder / "pipeline", dtype=torch.float32), {}
    three = ["a photo of an apple", "a sketch of a tree", "a photo of a car"]
    found["latents"] = duge.sample(pipe, three, seed=3, steps=2, latents=True)
    found["pictures"] = np.stack([np.asarray(p, int) for p in duge.sample(pipe, three, steps=2)])
    found["one"] = np.asarray(duge.sample(pipe, "a photo of a harp", steps=2)[0], int)
    found["table"] = duge.evaluate(pipe, ["apple", "neon"], images=3, steps=2)
    memory = fill_memory(pipe, ["apple"], SETTINGS)
    for name, (config, objective) in RUNS.items():
        with contextlib.redirect_stderr(io.StringIO()) as shown:
            run = duge.unlearn(pipe, "apple", config, memory, objective=objective)
        found[name] = trained(pipe), run.history
        run.restore()
    found["bar"] = shown.getvalue()
    return found


def learn(folder: Path) -> dict:
    """The first run of :func:`work` alone."""
    pipe = duge.load_pipeline(folder / "pipeline", dtype=torch.float32)
    duge.unlearn(pipe, "apple", SETTINGS, fill_memory(pipe, ["apple"], SETTINGS), progress=False)
    return {"duge": trained(pipe)}


def files(folder: Path) -> dict:
    """What is written: a run, and a sequence that is interrupted and goes on."""
    pipe, found, written = duge.load_pipeline(folder / "pipeline", dtype=torch.float32), {}, []
    save = unlearning.save_file

    def count(values: dict, path: Path) -> None:
        written.append(path.parent.name)
        save(values, path)

    sequence.save_file = unlearning.save_file = count
    for concepts in (["apple"], ["apple", "neon"]):
        asked: list = []
        so_far = sequence.unlearn_sequence(
            pipe, concepts, SETTINGS, folder / "sequence", on_step=asked.append, progress=False
        )
        found[len(concepts)] = trained(pipe), so_far.history, len(asked)
    found["written"] = written
    try:
        so_far.runs[0].save(folder / "sequence" / "step_01_apple")
    except FileExistsError as error:
        found["refused"] = str(error)
    return found


def errors(folder: Path) -> dict:
    """What is to happen in all processes alike."""
    pipe, found = duge.load_pipeline(folder / "pipeline", dtype=torch.float32), {}
    before, memory = trained(pipe), fill_memory(pipe, ["apple"], SETTINGS)

    def forget(objective, **changes) -> None:
        duge.unlearn(pipe, "apple", replace(SETTINGS, **changes), memory, None, False, objective)

    for name in ("batch_size", "memory_batch_size"):
        for call, what in ((duge.unlearn, "apple"), (duge.unlearn_sequence, ["apple"])):
            try:
                call(pipe, what, replace(SETTINGS, **{name: 3}), progress=False)
            except ValueError as error:
                found[name, call.__name__] = str(error)
    try:
        forget(worse_at(2, float("nan")))
    except DivergedError as error:
        found["diverged"] = str(error)
    found["back"] = all(torch.equal(value, before[n]) for n, value in trained(pipe).items())
    with torch.autocast("cpu", torch.float16):
        forget(worse_at(1, 1e30), target_size=1, lessons=2, batch_size=2, measure_every=0)
    found["fp16"] = before, trained(pipe)
    return found


def one_dies(folder: Path) -> dict:
    """The second process runs out of memory, and the first one waits for it."""
    pipe = duge.load_pipeline(folder / "pipeline", dtype=torch.float32)

    def on_step(state) -> None:
        if state.step == 2 and not is_main():
            raise torch.OutOfMemoryError("not enough")

    duge.unlearn(pipe, "apple", SETTINGS, on_step=on_step, progress=False)
    return {}


def main(what: str, folder: str) -> None:
    """Leaves what was found in FOLDER/WHAT-RANK.pt; also for ``accelerate.notebook_launcher``."""
    from accelerate import PartialState

    programs = {each.__name__: each for each in (work, learn, files, errors, one_dies)}
    found = programs[what](Path(folder))
    torch.save(found, Path(folder) / f"{what}-{PartialState().process_index}.pt")


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)
    for each in sys.argv[1].split(","):
        main(each, sys.argv[2])
