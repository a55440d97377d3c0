"""Several processes, one result: what ``accelerate launch`` starts shares the work and comes to the same end.

Each process, on a GPU of its own, runs the same program and makes the same calls in the same order. Then
:func:`~duge_lite.unlearning.unlearn`, sequences, :func:`~duge_lite.models.sample` and all that draws with it
end in each as they would in one alone. Lists of prompts are shared out and pictures, or what the layers saw
of them, gathered; the main process alone writes files and shows progress. The gradient solver, attacks and
what a :func:`~duge_lite.attention.trace` draws are not shared.

Whoever makes a call that the others do not make waits for them. So print and plot in the main process, but
draw, forget and save in all. When one dies (of a full memory, say), the launcher ends the others; one that
catches its error and goes on keeps them waiting until the backend's time is out.

A process that no launcher started is alone: nothing here costs it anything or sets anything up, so that a
notebook can still start several with ``accelerate.notebook_launcher``. It forks: the notebook must not have
touched the GPU, and without one must have begun with ``torch.set_num_threads(1)``, or the forks hang.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

Items = TypeVar("Items", bound=Sequence)
Result = TypeVar("Result")


def launched() -> PartialState | None:
    """The launched processes as this one sees them; None when it is alone.

    Joins them if the program did not, by ``Accelerator()`` or ``PartialState()``. Without CUDA they run on
    the CPU: by ``accelerate launch --multi_gpu`` all the same, for ``--cpu`` starts one process alone.
    """
    if "LOCAL_RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    return PartialState(cpu=not torch.cuda.is_available())


def is_main() -> bool:
    """Whether this process writes the files and shows progress."""
    state = launched()
    return state is None or state.is_main_process


def share(items: Items) -> Items:
    """This process's part of ``items``; in their order the parts make up the whole.

    A process for which none is left repeats the last one, so that the whole has to be cut to its length.
    """
    if (state := launched()) is None:
        return items
    size = -(-len(items) // state.num_processes)
    part = items[state.process_index * size :][:size]
    return part if len(part) else items[-1:]


def gathered(mine: list) -> list:
    """The lists of all processes, one after another, in every process."""
    return gather_object(mine) if launched() else mine


def from_main(function: Callable[[], Result]) -> Result:
    """What ``function`` returns in the main process, for all; they wait. So it is with its OSError."""
    if (state := launched()) is None:
        return function()
    outcome: list = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = function()
        except OSError as error:
            outcome[1] = error
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result
