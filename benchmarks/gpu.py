"""What a request takes beside plain drawing, at the size of Stable Diffusion 1.4: memory and seconds.

    python benchmarks/gpu.py            # on the GPU at hand: measured
    python benchmarks/gpu.py --count    # anywhere: bytes of all tensors that live at once; the solve's time

Weights are random, sizes those of the model's card. Counting runs the drawing on tensors without data
(FakeTensorMode), in 16 bits as on a GPU, and the solve on real ones, from hidden states that are random;
what the library keeps in main memory (the book, the base weights) is printed beside it. It says nothing of
an allocator's slack and cuDNN's workspace.
"""

from __future__ import annotations

import argparse
import weakref
from functools import partial
from types import SimpleNamespace

import torch
from common import RESULTS, timed
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import duge_lite as duge
from duge_lite.config import UnlearnConfig
from duge_lite.solver import PictureBook

GIB = 2**30
UNET = dict(sample_size=64, cross_attention_dim=768)
Counts = dict[str, float]


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
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.now += storage.nbytes()
                self.seen[storage] = weakref.finalize(storage, self._subtract, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _subtract(self, size: int) -> None:
        self.now -= size


def stable_diffusion(dtype: torch.dtype, device: str = "cpu") -> StableDiffusionPipeline:
    """Stable Diffusion 1.4 with random weights, made without the hub."""
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    with torch.device(device):
        torch.set_default_dtype(dtype)  # tensors without data cannot be cast later
        parts = {"unet": UNet2DConditionModel(**UNET), "text_encoder": CLIPTextModel(text)}
        torch.set_default_dtype(torch.float32 if dtype == torch.float16 else dtype)
        parts["vae"] = AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
        torch.set_default_dtype(torch.float32)
    parts["tokenizer"] = CLIPTokenizer.from_pretrained(duge.data_dir() / "doodle-sd" / "tokenizer")
    parts["tokenizer"].model_max_length = 77
    parts["scheduler"] = DDIMScheduler(clip_sample=False, steps_offset=1)
    unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline(**parts, **unchecked)
    pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weights(pipe: StableDiffusionPipeline) -> float:
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    return sum(p.nbytes for part in parts for p in part.parameters()) / GIB


@torch.no_grad()
def counted_drawing() -> Counts:
    """The peak of the denoiser on both halves of a batch, and of decoding a picture; beside the weights."""
    found = {}
    with FakeTensorMode():
        pipe = stable_diffusion(torch.bfloat16)
        halves = 2 * duge.model_card(pipe).batch_size
        x, text = (torch.empty(halves, *rest, dtype=torch.bfloat16) for rest in ((4, 64, 64), (77, 768)))
        ways = {"denoiser": partial(pipe.unet, x, torch.ones(1), text)}
        ways["decoder"] = partial(pipe.vae.decode, x[:1])
        for name, way in ways.items():
            with Tally() as tally:
                way()
            found[name] = tally.peak / GIB
    return found | {"weights": weights(pipe)}


@torch.no_grad()
def counted_solve() -> Counts:
    """The solve on random hidden states: its peak beside the weights, its seconds, the book's size."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
    for name, module in unet.named_modules():  # the solve needs no other layers than the cross-attention's
        if ".attn2" in name:
            module.to_empty(device="cpu", recurse=False)
            for p in module.parameters(recurse=False):
                p.normal_(std=p.shape[-1] ** -0.5)
        else:
            module._parameters.clear()
    read = SimpleNamespace(unet=unet)
    read.encode_prompt = lambda texts, **_: (torch.randn(len(texts), 77, UNET["cross_attention_dim"]), None)
    card = duge.model_card(read)
    config = UnlearnConfig(**card.settings, instead="nameless", eta=0.5)
    book, goes = PictureBook(read, card, config), card.concept("apple", config.instead)
    rows, prompts = 2 * config.places * config.num_inference_steps, {*book.memory, *goes.prompts}
    for prompt in prompts:
        book.seen[prompt] = {n: torch.randn(rows, a.to_q.in_features).half() for n, a in book.layers.items()}
    with Tally() as tally:
        seconds, _ = timed(partial(book.solve, read, [goes], config))
    return {
        "layers": len(book.layers),
        "solve, GiB": tally.peak / GIB,
        "solve, CPU s": seconds,
        "book, MB a prompt": sum(x.nbytes for x in book.seen[goes.prompts[0]].values()) / 1e6,
        "prompts": len(prompts),
        "base weights, GiB": sum(x.nbytes for x in book.reference.values()) / GIB,
    }


def measured() -> Counts:
    """On CUDA: what the allocator gave out at most, drawing a batch and forgetting."""
    pipe = stable_diffusion(duge.models.default_dtype(torch.device("cuda")), "cuda")
    prompts, found = ["a photo of an apple"] * duge.model_card(pipe).batch_size, {"weights": weights(pipe)}
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


def lines(found: Counts) -> list[str]:
    return [f"{name:28}{value:10.3f}" for name, value in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", action="store_true", help="count bytes, without a GPU")
    if parser.parse_args().count:
        draws, solve = counted_drawing(), counted_solve()
        copy = solve["base weights, GiB"] / 2  # the base's, in 16 bits, while it draws
        plain = draws["weights"] + max(draws["denoiser"], draws["decoder"])
        request = draws["weights"] + copy + max(draws["denoiser"], solve["solve, GiB"])
        solve["request over drawing"] = request / plain
        text = ["counted, not measured; Stable Diffusion 1.4's size: GiB on the device", *lines(draws)]
        text, file = [*text, "", "Stable Diffusion 1.4", *lines(solve)], "gpu-count.txt"
    else:
        found, file = lines(measured()), "gpu.txt"
        text = [f"measured on {torch.cuda.get_device_name()}, Stable Diffusion 1.4's size", *found]
    print("\n".join(text))
    (RESULTS / file).write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
