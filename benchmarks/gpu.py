"""What a request takes beside plain drawing, at the size of Stable Diffusion 1.4: memory and seconds.

    python benchmarks/gpu.py            # on the GPU at hand: measured
    python benchmarks/gpu.py --count    # anywhere: bytes of all tensors that live at once; the solve's time

Weights are random, sizes those of the model's card. Counting draws on tensors without data, in 16 bits as on
a GPU, and solves on real ones, from random hidden states; what the library keeps in main memory (the book,
the base weights) is printed beside it. It says nothing of an allocator's slack and cuDNN's workspace.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from common import RESULTS, timed
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import duge_lite as duge
from duge_lite.solver import PictureBook

GIB = 2**30


class Tally(TorchDispatchMode):
    """Counts the bytes of all tensors that were made in the block and live: ``now``, and their ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = WeakIdKeyDictionary(), 0  # storage -> bytes

    @property
    def now(self) -> int:
        return sum(self.live.values())

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1  # there is no data: any number will do
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.live[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, self.now)
        return result


def stable_diffusion(dtype: torch.dtype, device: str = "cpu") -> StableDiffusionPipeline:
    """Stable Diffusion 1.4 with random weights, made without the hub."""
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    with torch.device(device):
        torch.set_default_dtype(dtype)  # tensors without data cannot be cast later
        unet, encoder = UNet2DConditionModel(sample_size=64, cross_attention_dim=768), CLIPTextModel(text)
        torch.set_default_dtype(torch.float32 if dtype == torch.float16 else dtype)
        vae = AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
        torch.set_default_dtype(torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(duge.data_dir() / "doodle-sd" / "tokenizer")
    tokenizer.model_max_length, scheduler = 77, DDIMScheduler(clip_sample=False, steps_offset=1)
    parts = (vae, encoder, tokenizer, unet, scheduler)
    pipe = StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)
    pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def peak(way: Callable[[], object]) -> float:
    with Tally() as tally:
        way()
    return tally.peak / GIB


@torch.no_grad()
def counted_drawing() -> dict[str, float]:
    """The peak of the denoiser on both halves of a batch, and of decoding a picture; beside the weights."""
    with FakeTensorMode():
        pipe = stable_diffusion(torch.bfloat16)
        halves = 2 * duge.model_card(pipe).batch_size
        x, text = (torch.empty(halves, *rest, dtype=torch.bfloat16) for rest in ((4, 64, 64), (77, 768)))
        found = {"denoiser": peak(lambda: pipe.unet(x, torch.ones(1), text))}
        found["decoder"] = peak(lambda: pipe.vae.decode(x[:1]))
    all_weights = (p for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters())
    return found | {"weights": sum(p.nbytes for p in all_weights) / GIB}


@torch.no_grad()
def counted_solve() -> dict[str, float]:
    """The solve on random hidden states: its peak beside the weights, its seconds, the book's size."""
    pipe = stable_diffusion(torch.float32)
    card, pipe.encode_prompt = duge.model_card(pipe), lambda p, **_: (torch.randn(len(p), 77, 768), None)
    config = duge.UnlearnConfig(**card.settings, instead="nameless", eta=0.5)
    book, goes = PictureBook(pipe, card, config), card.concept("apple", config.instead)
    rows, prompts = 2 * config.places * config.num_inference_steps, {*book.memory, *goes.prompts}
    for prompt in prompts:
        book.seen[prompt] = {n: torch.randn(rows, a.to_q.in_features).half() for n, a in book.layers.items()}
    seconds, most = timed(lambda: peak(lambda: book.solve(pipe, [goes], config)))
    return {
        "layers": len(book.layers),
        "solve, GiB": most,
        "solve, CPU s": seconds,
        "book, MB a prompt": sum(x.nbytes for x in book.seen[goes.prompts[0]].values()) / 1e6,
        "prompts": len(prompts),
        "base weights, GiB": sum(x.nbytes for x in book.reference.values()) / GIB,
    }


def measured() -> dict[str, float]:
    """On CUDA: what the allocator gave out at most, drawing a batch and forgetting."""
    pipe = stable_diffusion(duge.models.default_dtype(torch.device("cuda")), "cuda")
    prompts = ["a photo of an apple"] * duge.model_card(pipe).batch_size
    found = {"weights": torch.cuda.memory_allocated() / GIB}
    ways = {
        "drawing": partial(duge.sample, pipe, prompts, 0, 10),
        "request": partial(duge.unlearn, pipe, "apple", progress=False),
        "further request": partial(duge.unlearn, pipe, "car", progress=False),
    }
    for name, way in ways.items():
        torch.cuda.reset_peak_memory_stats()
        found[f"{name}, s"], _ = timed(way)
        found[f"{name}, GiB"] = torch.cuda.max_memory_allocated() / GIB
    return found | {"request over drawing": found["request, GiB"] / found["drawing, GiB"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", action="store_true", help="count bytes, without a GPU")
    if parser.parse_args().count:
        draws, solve = counted_drawing(), counted_solve()
        copy = solve["base weights, GiB"] / 2  # the base's, in 16 bits, while it draws
        plain = draws["weights"] + max(draws["denoiser"], draws["decoder"])
        request = draws["weights"] + copy + max(draws["denoiser"], solve["solve, GiB"])
        solve["request over drawing"] = request / plain
        about, file = "counted, not measured; Stable Diffusion 1.4's size: GiB on the device", "gpu-count.txt"
        found = {about: None, **draws, "": None, "Stable Diffusion 1.4": None, **solve}
    else:
        about, file = f"measured on {torch.cuda.get_device_name()}, Stable Diffusion 1.4's size", "gpu.txt"
        found = {about: None, **measured()}
    lines = [name if value is None else f"{name:28}{value:10.3f}" for name, value in found.items()]
    print(*lines, sep="\n")
    (RESULTS / file).write_text("\n".join(lines) + "\n")
