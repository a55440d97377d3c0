"""What test_processes.py does alone and in several processes: the program that it launches.

``accelerate launch --multi_gpu --num_processes 2 launched.py work FOLDER``: without a GPU it runs on the CPU.
"""

import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import duge_lite as duge
from duge_lite import solver, unlearning

EXACT = duge.UnlearnConfig(num_inference_steps=2, places=8, instead="nearest")
MEMORY = ["a photo of an orange", "a sketch of a tree", "a photo of a car"]


def trained(pipe) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in pipe.unet.named_parameters() if ".attn2." in n}


def load(folder: Path):
    return duge.load_pipeline(folder / "pipeline", "cpu", torch.float32)


def work(folder: Path) -> dict:
    """All that can be compared, of the pipeline in ``folder / "pipeline"``."""
    pipe, found, how = load(folder), {}, dict(num_inference_steps=2)
    three = ["a photo of an apple", "a sketch of a tree", "a photo of a car"]
    found["latents"] = duge.sample(pipe, three, seed=3, output_type="latent", **how)
    found["one"] = np.asarray(duge.sample(pipe, "a photo of a harp", **how)[0], int)
    found["table"] = duge.evaluate(pipe, ["apple", "neon"], images=3, **how)
    run = duge.unlearn(pipe, ["apple", "neon"], EXACT, MEMORY, progress=False)
    found["solved"] = trained(pipe), run.history
    return found


def files(folder: Path) -> dict:
    """What is written: a sequence that goes on where it was, and a folder that is refused."""
    pipe, found, save = load(folder), {"written": []}, unlearning.save_file

    def count(values: dict, path: Path, **how) -> None:
        found["written"].append(f"{path.parent.name}/{path.name}")
        save(values, path, **how)

    solver.save_file = unlearning.save_file = count
    for concepts in (["apple"], ["apple", "neon"]):
        how = dict(memory=MEMORY, progress=False)
        so_far = duge.unlearn_sequence(pipe, concepts, EXACT, folder / "sequence", **how)
        found[len(concepts)] = trained(pipe)
    with pytest.raises(FileExistsError, match="exists already"):
        so_far.runs[0].save(folder / "sequence" / "step_01_apple")
    with pytest.raises(ValueError, match="the gradient solver runs in one process"):
        duge.unlearn(pipe, "car", duge.UnlearnConfig(solver="gradient"))
    so_far.withdraw("apple")
    found["left"] = sorted(p.name for p in (folder / "sequence").glob("step_*"))
    return found


def one_dies(folder: Path) -> dict:
    """The second process runs out of memory, and the first one waits for it."""
    pipe = load(folder)
    if not duge.is_main():
        pipe.unet.register_forward_pre_hook(Mock(side_effect=torch.OutOfMemoryError("not enough")))
    duge.unlearn(pipe, "apple", EXACT, MEMORY, progress=False)
    return {}


def main(what: str, folder: str) -> None:
    """Leaves what was found in FOLDER/WHAT-RANK.pt; also for ``accelerate.notebook_launcher``."""
    from accelerate import PartialState

    torch.save(globals()[what](Path(folder)), Path(folder) / f"{what}-{PartialState().process_index}.pt")


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)
    for each in sys.argv[1].split(","):
        main(each, sys.argv[2])
