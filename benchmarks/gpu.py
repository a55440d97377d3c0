"""What unlearning takes of a GPU: memory and seconds on Stable Diffusion 1.4's architecture at 512 px.

    python benchmarks/gpu.py                           # measures, on the GPU at hand
    python benchmarks/gpu.py --estimate                # memory alone, without a GPU and without computing
    python benchmarks/gpu.py --device cpu --size tiny  # both ways work anywhere on a narrow model

Weights are random, sizes those of the model's card. The rows named DUGE are the library's own loop. A plain
fine-tuning step trains the same tensors on as many pictures; *two UNets* asks a frozen copy at every
iteration in place of answers that were collected before. Measured memory is what PyTorch's allocator gave
out at most during the rounds, and what it took from the GPU for that ("reserved").

An estimate runs the same code on tensors without data (FakeTensorMode) and counts the bytes of all that are
alive on the device at once. It says nothing of the allocator's slack, cuDNN's workspace and CUDA's own needs
(one to two GiB together). bfloat16 stands for either kind of 16 bits, and the rules of autocast are those on
CUDA. On the CPU the same counter is used on real tensors.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import math
import statistics
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import diffusers
import torch
from attention import ways
from common import seconds, stable_diffusion, workbench
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import duge_lite as duge
from duge_lite.config import UnlearnConfig
from duge_lite.lessons import Pictures
from duge_lite.models import ModelCard, model_card
from duge_lite.unlearning import trainable_parameters, unlearn_steps

GIB = 2**30

# ---------------------------------------------------------------------------- counting


class Tally(TorchDispatchMode):
    """Counts the bytes of all tensors that were made in the block and live: ``now``, and ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: WeakIdKeyDictionary = WeakIdKeyDictionary()  # storage -> what ends its count

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # noqa: ANN001, ANN201
        if op is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1  # there is no data: any number will do
        result = op(*args, **(kwargs or {}))
        self.add(result)
        return result

    def add(self, tensors: object) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.now += storage.nbytes()
                self.seen[storage] = weakref.finalize(storage, self._subtract, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def elsewhere(self, tensors: object) -> None:
        """Ends the count of tensors that a GPU would not hold."""
        for tensor in tree_leaves(tensors):
            if end := self.seen.get(tensor.untyped_storage()):
                end()

    def _subtract(self, size: int) -> None:
        self.now -= size


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Autocast on the CPU with CUDA's rule for the norms: they are computed in 32 bits."""

    def widened(op: Callable) -> Callable:
        def compute(*args: object) -> Tensor:
            inside = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
            with torch._C._ExcludeDispatchKeyGuard(inside):
                return op(*(a.float() if isinstance(a, Tensor) else a for a in args))

        return compute

    with torch.library._scoped_library("aten", "IMPL") as rules:
        for op in (torch.ops.aten.group_norm, torch.ops.aten.layer_norm):
            rules.impl(op.default, widened(op), "AutocastCPU")
        yield


# ---------------------------------------------------------------------------- what is compared


def loop(pipe: StableDiffusionPipeline, **changes: object) -> Iterator[object]:
    """The library's loop, with few pictures to begin with."""
    config = model_card(pipe).config(target_size=2, memory_size=2, lessons=2, iterations=10**6, **changes)
    side, width = pipe.unet.config.sample_size, pipe.unet.config.cross_attention_dim
    memory = Pictures(torch.randn(2, 4, side, side), torch.randn(2, 77, width), ("a photo of a harp",) * 2)
    return unlearn_steps(pipe, "apple", config, memory)


def other(pipe: StableDiffusionPipeline, two_unets: bool = False) -> Iterator[None]:
    """Other ways to use the UNet. What main memory holds is named as in the library's loop."""
    frozen = copy.deepcopy(pipe.unet).requires_grad_(False) if two_unets else None
    with workbench(pipe.unet, model_card(pipe).config()) as bench:
        start, lessons, memory_lessons = {}, bench.lessons, bench.memory  # noqa: F841
        while True:
            bench.two_unets(frozen) if two_unets else bench.plain()
            yield


def drawing(pipe: StableDiffusionPipeline) -> Iterator[None]:
    while True:
        duge.sample(pipe, ["a photo of an apple"] * model_card(pipe).batch_size, steps=2, latents=True)
        yield


@torch.no_grad()
def decoding(pipe: StableDiffusionPipeline) -> Iterator[None]:
    side, where = pipe.unet.config.sample_size, {"dtype": pipe.vae.dtype, "device": pipe.vae.device}
    while True:
        pipe.vae.decode(torch.zeros(model_card(pipe).batch_size, 4, side, side, **where))
        yield


LOW, LORA = {"low_memory": True}, {"low_memory": True, "train": "lora"}
WAYS: dict[str, Callable[[StableDiffusionPipeline], Iterator[object]]] = {
    "two steps of drawing pictures": drawing,
    "decoding them": decoding,
    "plain fine-tuning step": other,
    "two UNets": partial(other, two_unets=True),
    "DUGE": loop,
    'DUGE, match="probs"': partial(loop, match="probs"),
    "DUGE, low_memory": partial(loop, **LOW),
    "DUGE, low_memory, LoRA": partial(loop, **LORA),  # last: its adapter stays
}


@dataclass(frozen=True)
class Row:
    """What one turn took: GiB given out, GiB taken from the GPU for it, seconds; and MB a lesson."""

    peak: float
    reserved: float = math.nan
    seconds: float = math.nan
    lesson: float = math.nan


def models(pipe: StableDiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {"UNet": pipe.unet, "text encoder": pipe.text_encoder, "autoencoder": pipe.vae}


def in_main_memory(steps: Iterator[object]) -> dict[str, object]:
    """What a loop that was begun keeps off the device."""
    names = inspect.getgeneratorlocals(steps)
    return {n: getattr(names[n], "__dict__", names[n]) for n in ("start", "lessons", "memory_lessons")}


def counted(name: str, pipe: StableDiffusionPipeline) -> Row:
    """One turn, by counting tensors."""
    learns, lesson = WAYS[name] not in (drawing, decoding), math.nan
    with Tally() as tally:
        tally.add([list(model.parameters()) for model in models(pipe).values()])
        steps = WAYS[name](pipe)
        next(steps)  # the reference's answers, and the optimizer's state
        if learns:
            tally.elsewhere(kept := in_main_memory(steps))
            lesson = sum(answer[0].nbytes for answer in kept["lessons"]["wanted"]) / 1e6
        if "low_memory" in name:
            tally.elsewhere([list(m.parameters()) for m in (pipe.text_encoder, pipe.vae)])
        tally.peak = tally.now
        next(steps)
        steps.close()
    return Row(tally.peak / GIB, lesson=lesson)


def estimated(name: str, tiny: bool) -> Row:
    """The same without data: the UNet's tensors only say that they are on the CPU."""
    pipe = stable_diffusion("meta", torch.bfloat16, tiny)
    if "LoRA" in name:
        trainable_parameters(pipe.unet, model_card(pipe).config(**LORA))
    for part in (pipe.text_encoder, pipe.vae.float()):  # as for float16; these have room, and nothing in it
        part.to_empty(device="cpu")
    with FakeTensorMode(allow_non_fake_inputs=True), cuda_autocast():
        for module in pipe.unet.modules():
            for own, p in module._parameters.items():
                if p is not None:
                    module._parameters[own] = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype))
        return counted(name, pipe)


def measured(name: str, pipe: StableDiffusionPipeline, rounds: int) -> Row:
    """The median second of some turns; and their peak."""
    device, cuda = pipe.unet.device, torch.cuda
    if device.type == "cpu":
        row = counted(name, pipe)
    steps = WAYS[name](pipe)
    next(steps), next(steps)
    if device.type == "cuda":
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()
    took = statistics.median(seconds(lambda: next(steps), device) for _ in range(rounds))
    if device.type == "cuda":
        row = Row(cuda.max_memory_allocated() / GIB, cuda.max_memory_reserved() / GIB)
    steps.close()
    return replace(row, seconds=took)


# ---------------------------------------------------------------------------- the table


def table(rows: dict[str, Row]) -> Iterator[str]:
    yield f"{'':32}{'GiB':>8}{'reserved':>10}{'seconds':>9}{'a second':>10}"
    for name, row in rows.items():
        numbers = f"{row.peak:8.3f}{row.reserved:10.3f}{row.seconds:9.3f}{1 / row.seconds:10.2f}"
        yield f"{name:32}" + numbers.replace("nan", "  -")


def shares(pipe: StableDiffusionPipeline) -> Iterator[str]:
    """What each part holds, when the cross-attention learns in 16 bits."""
    for name, model in models(pipe).items():
        yield f"{name:32}{sum(p.nbytes for p in model.parameters()) / GIB:8.3f}"
    count = sum(p.numel() for p in trainable_parameters(pipe.unet, model_card(pipe).config()).values())
    learning = {"what learns, in 32 bits": 4, "its gradient": 4, "the optimizer's state": 8, "the anchor": 2}
    for name, size in learning.items():
        yield f"{name:32}{count * size / GIB:8.3f}"


def lessons(rows: dict[str, Row], card: ModelCard) -> Iterator[str]:
    """What the reference's answers take of main memory: as many as the card says, and as for doodles."""
    counts = (card.config().lessons, UnlearnConfig().lessons)
    yield f"{'lessons in main memory':32}{'MB each':>8}" + "".join(f"{f'{n}, GB':>10}" for n in counts)
    for name, row in rows.items():
        if row.lesson > 0 and name.startswith("DUGE"):
            yield f"{name:32}{row.lesson:8.1f}" + "".join(f"{row.lesson * n / 1e3:10.1f}" for n in counts)


def tracing(pipe: StableDiffusionPipeline, rounds: int, steps: int = 10) -> str:
    """Seconds a step of plain and of traced sampling, and their ratio."""
    draw = ways(pipe, steps, pipe.unet.config.sample_size * pipe.vae_scale_factor)
    times: dict[str, list[float]] = {"plain": [], "traced": []}
    for _ in range(rounds + 1):
        for way, took in times.items():
            took.append(seconds(draw[way], pipe.unet.device) / steps)
    plain, traced = (statistics.median(took[1:]) for took in times.values())  # the first one warms up
    return f"tracing: {plain:.3f} s a step plain, {traced:.3f} s traced, {traced / plain:.3f} times as long"


def report(device: torch.device, tiny: bool, estimate: bool, rounds: int) -> Iterator[str]:
    dtype = torch.float16 if estimate else duge.models.default_dtype(device)
    pipe = stable_diffusion("meta" if estimate else device, dtype, tiny)
    card, pixels = model_card(pipe), pipe.unet.config.sample_size * pipe.vae_scale_factor
    sizes = f"{card.config().batch_size} + {card.config().memory_batch_size} pictures of {pixels} px"
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    where = "an ESTIMATE of tensors alone, for 16 bits" if estimate else f"{str(dtype)[6:]} on {named}"
    yield f"{'narrow' if tiny else 'Stable Diffusion 1.4'}, {sizes}, {where}"
    yield f"torch {torch.__version__}, diffusers {diffusers.__version__}\n"
    if not estimate:
        yield tracing(pipe, rounds) + "\n"
    yield from shares(pipe)
    rows = {name: estimated(name, tiny) if estimate else measured(name, pipe, rounds) for name in WAYS}
    yield from ("", *table(rows), "", *lessons(rows, card))


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--estimate", action="store_true")
    parser.add_argument("--device", type=torch.device, default=duge.models.default_device())
    parser.add_argument("--size", choices=("sd", "tiny"), default="sd")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="a file for the table, such as benchmarks/results/gpu.txt")
    args = parser.parse_args(words)
    diffusers.utils.logging.set_verbosity_error()  # it warns of casting models that were never saved
    lines = []
    for line in report(args.device, args.size == "tiny", args.estimate, args.rounds):
        print(line, flush=True)
        lines.append(line)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
