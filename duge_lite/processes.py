"""Several processes, one result: what ``accelerate launch`` starts shares the work and comes to the same end.

Each process, on a GPU of its own, runs the same program and makes the same calls in the same order. Then
:func:`~duge_lite.unlearning.unlearn`, sequences, :func:`~duge_lite.models.sample` and all that draws with it
end in each as they would in one alone. Batches of lessons and lists of prompts are shared out, gradients are
averaged, pictures gathered; the main process alone writes files and shows progress. The reference's answers,
attacks and what a :func:`~duge_lite.attention.trace` draws are not shared: each works them out itself.

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
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor

Items = TypeVar("Items", Tensor, Sequence)
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
    """This process's part of ``items``, a sequence or a tensor; in their order the parts make up the whole.

    A process for which none is left repeats the last one, so that the whole has to be cut to its length.
    """
    if (state := launched()) is None:
        return items
    size = -(-len(items) // state.num_processes)
    part = items[state.process_index * size :][:size]
    return part if len(part) else items[-1:]


def check_batches(**sizes: int) -> None:
    """Raises ValueError for a size that the processes cannot share equally, as their mean supposes."""
    count = state.num_processes if (state := launched()) else 1
    for name, size in sizes.items():
        if size % count:
            raise ValueError(f"{name} = {size}: expected a multiple of {count}, the number of processes")


def gathered(mine: list) -> list:
    """The lists of all processes, one after another, in every process."""
    return gather_object(mine) if launched() else mine


def averaged(tensors: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """The mean over the processes, in every process; of tensors without gradient."""
    return reduce(tensors, "mean") if launched() else tensors


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
