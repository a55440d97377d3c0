"""What a request takes beside plain drawing, at the sizes of Stable Diffusion 1.4 and XL: memory and seconds.

    python benchmarks/gpu.py            # on the GPU at hand: measured, Stable Diffusion 1.4's size
    python benchmarks/gpu.py --count    # anywhere: bytes of all tensors that live at once; the solve's time

Weights are random, sizes those of the model's card. Counting runs the drawing on tensors without data
(FakeTensorMode), in 16 bits as on a GPU, and the solve on real ones, from hidden states that are random;
what the library keeps in main memory (the book, the base weights) is printed beside it. It says nothing of
an allocator's slack and cuDNN's workspace. Of XL only the cross-attention layers are made: the solve needs
no others.
"""

from __future__ import annotations

import argparse
import time
import weakref
import zlib
from types import SimpleNamespace

import torch
from common import RESULTS
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import duge_lite as duge
from duge_lite.concepts import UnlearnConfig
from duge_lite.solver import PictureBook

GIB = 2**30
XL = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    cross_attention_dim=2048,
)
SD14 = dict(sample_size=64, cross_attention_dim=768)


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


def stable_diffusion(device: str, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Stable Diffusion 1.4 with random weights, made without the hub; on "meta" without any."""
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
    )
    tokenizer = CLIPTokenizer.from_pretrained(duge.data_dir() / "doodle-sd" / "tokenizer")
    tokenizer.model_max_length = 77
    with torch.device("meta"):
        unet, encoder = UNet2DConditionModel(**SD14), CLIPTextModel(text)
        vae = AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    parts = {"unet": unet, "text_encoder": encoder, "vae": vae}
    for name, part in parts.items():
        if device != "meta":
            part.to_empty(device=device)
            for p in (*part.parameters(), *part.buffers()):
                p.data = torch.empty_like(p).uniform_(-0.02, 0.02) if p.is_floating_point() else p.data
            encoder.text_model.embeddings.position_ids = torch.arange(77, device=device)[None]
        parts[name] = part.to(torch.float32 if name == "vae" and dtype == torch.float16 else dtype).eval()
    unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    pipe = StableDiffusionPipeline(**parts, tokenizer=tokenizer, scheduler=scheduler, **unchecked)
    pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def size(*modules: torch.nn.Module) -> int:
    return sum(p.nbytes for m in modules for p in m.parameters())


@torch.no_grad()
def counted_drawing() -> dict[str, int]:
    """The peak of the denoiser on both halves of a batch, and of decoding a picture; beside the weights."""
    pipe, found = stable_diffusion("meta", torch.bfloat16), {}
    batch = duge.model_card(pipe).batch_size
    for name, part, n in (("denoiser", pipe.unet, 2 * batch), ("decoder", pipe.vae, 1)):
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in part.modules():
                full = {k: p for k, p in module._parameters.items() if p is not None}
                full = {k: torch.empty_like(p, device="cpu") for k, p in full.items()}
                module._parameters.update({k: torch.nn.Parameter(p, False) for k, p in full.items()})
            x, text = (torch.empty(n, *rest, dtype=torch.bfloat16) for rest in ((4, 64, 64), (77, 768)))
            with Tally() as tally:
                part.decode(x) if name == "decoder" else part(x, torch.ones(1), text)
        found[name] = tally.peak
    found["weights"] = size(pipe.unet, pipe.vae, pipe.text_encoder)
    return found


@torch.no_grad()
def counted_solve(shape: dict, forget: str = "apple") -> dict[str, float]:
    """The solve on random hidden states: its peak beside the weights, its seconds, the book's size."""
    stub = SimpleNamespace(unet=SimpleNamespace(config=SimpleNamespace(cross_attention_dim=0)))
    card = duge.model_card(stub)
    config = UnlearnConfig(**card.settings, instead="nameless", eta=0.5)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**shape)
    for name, module in unet.named_modules():
        if ".attn2" not in name:
            module._parameters.clear()
        else:
            full = {k: torch.randn(p.shape) for k, p in module._parameters.items() if p is not None}
            full = {k: torch.nn.Parameter(p * p.shape[-1] ** -0.5, False) for k, p in full.items()}
            module._parameters.update(full)
    width = shape["cross_attention_dim"]

    def encode_prompt(prompts: list[str], **_: object) -> tuple[Tensor, None]:
        seeds = (torch.Generator().manual_seed(zlib.crc32(p.encode())) for p in prompts)
        return torch.stack([torch.randn(77, width, generator=seed) for seed in seeds]), None

    pipe = SimpleNamespace(unet=unet, encode_prompt=encode_prompt)
    book, goes = PictureBook(pipe, card, config), card.concept(forget, config.instead)
    rows, prompts = 2 * config.places * config.num_inference_steps, {*book.memory, *goes.prompts}
    for prompt in prompts:
        book.seen[prompt] = {n: torch.randn(rows, a.to_q.in_features).half() for n, a in book.layers.items()}
    started = time.process_time()
    with Tally() as tally:
        book.solve(pipe, [goes], config)
    return {
        "layers": len(book.layers),
        "solve, GiB": tally.peak / GIB,
        "solve, CPU s": time.process_time() - started,
        "book, MB a prompt": sum(x.nbytes for x in book.seen[goes.prompts[0]].values()) / 1e6,
        "prompts": len(prompts),
        "base weights, GiB": sum(x.nbytes for x in book.reference.values()) / GIB,
    }


def measured() -> dict[str, float]:
    """On CUDA: what the allocator gave out at most, drawing two pictures' batches and forgetting."""
    pipe = stable_diffusion("cuda", duge.models.default_dtype(torch.device("cuda")))
    card, found = duge.model_card(pipe), {"weights": size(pipe.unet, pipe.vae, pipe.text_encoder) / GIB}
    ways = {
        "drawing": lambda: duge.sample(pipe, ["a photo of an apple"] * card.batch_size, 0, 10),
        "request": lambda: duge.unlearn(pipe, "apple", progress=False),
        "further request": lambda: duge.unlearn(pipe, "car", progress=False),
    }
    for name, way in ways.items():
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.perf_counter()
        way()
        torch.cuda.synchronize()
        found[f"{name}, s"] = time.perf_counter() - started
        found[f"{name}, GiB"] = torch.cuda.max_memory_allocated() / GIB
    return found | {"request over drawing": found["request, GiB"] / found["drawing, GiB"]}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", action="store_true", help="count bytes, without a GPU")
    parser.add_argument("--no-xl", action="store_true", help="leave the larger one out (minutes on a CPU)")
    args = parser.parse_args(words)
    if not args.count:
        lines = [f"{name:28}{value:10.3f}" for name, value in measured().items()]
        lines.insert(0, f"measured on {torch.cuda.get_device_name()}, Stable Diffusion 1.4's size")
    else:
        drawing = counted_drawing()
        plain = drawing["weights"] + max(drawing["denoiser"], drawing["decoder"])
        lines = ["counted, not measured; Stable Diffusion 1.4's size: GiB on the device"]
        lines += [f"{name:28}{value / GIB:10.3f}" for name, value in drawing.items()]
        shapes = {"Stable Diffusion 1.4": SD14} | ({} if args.no_xl else {"Stable Diffusion XL": XL})
        for name, shape in shapes.items():
            solve = counted_solve(shape)
            lines += ["", name] + [f"{key:28}{value:10.3f}" for key, value in solve.items()]
            if name == "Stable Diffusion 1.4":
                copy = solve["base weights, GiB"] * GIB / 2  # the base's, in 16 bits, while it draws
                request = drawing["weights"] + copy + max(drawing["denoiser"], solve["solve, GiB"] * GIB)
                lines += [f"{'request over drawing':28}{request / plain:10.3f}"]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    (RESULTS / ("gpu-count.txt" if args.count else "gpu.txt")).write_text(text)


if __name__ == "__main__":
    main()
