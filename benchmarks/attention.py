"""What seeing attention costs: plain sampling, tracing, and the naive way, in turns in one run.

    python benchmarks/attention.py                # doodle-sd, and the size of Stable Diffusion 1.4
    python benchmarks/attention.py --only doodle --rounds 20

*Traced* is ``duge.trace``: the conditional half, averaged over heads, in 16 bits. *Naive* keeps every map of
every head, both halves of guidance, in 32 bits. Each round runs the three one after the other, beginning
with another one each time; a ratio is the median over rounds of that round's times. Decoding the picture is
left out (it costs the same in all three), which makes the ratios larger, not smaller. Weights of the large
model are random: the time does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import stable_diffusion
from diffusers import StableDiffusionPipeline

import duge_lite as duge

PROMPT = "a photo of an apple next to an umbrella"


def ways(pipe: StableDiffusionPipeline, steps: int, pixels: int) -> dict[str, Callable[[], int]]:
    """The three ways to draw; each returns the bytes of attention that it kept."""
    settings = dict(guidance_scale=7.5, height=pixels, width=pixels, output_type="latent")

    def plain() -> int:
        generator = torch.Generator().manual_seed(0)
        pipe(PROMPT, num_inference_steps=steps, generator=generator, **settings)
        return 0

    def traced() -> int:
        trace = duge.trace(pipe, PROMPT, seed=0, steps=steps, **settings)
        return sum(maps.nbytes for maps in trace.maps.values())

    def naive() -> int:
        kept: list[torch.Tensor] = []

        def keep(_, index, timestep, tensors):
            kept.extend(p.cpu() for p in record.probs.values())
            return tensors

        latents = (pixels // pipe.vae_scale_factor,) * 2
        with torch.no_grad(), duge.record_attention(pipe.unet, size=latents) as record:
            generator = torch.Generator().manual_seed(0)
            pipe(
                PROMPT,
                num_inference_steps=steps,
                generator=generator,
                callback_on_step_end=keep,
                **settings,
            )
        return sum(p.nbytes for p in kept)

    return {"plain": plain, "traced": traced, "naive": naive}


def measure(name: str, pipe: StableDiffusionPipeline, steps: int, pixels: int, rounds: int) -> None:
    ways_ = ways(pipe, steps, pixels)
    size = {way: run() for way, run in ways_.items()}  # also warms up
    seconds: dict[str, list[float]] = {way: [] for way in ways_}
    order = list(ways_)
    for i in range(rounds):
        for way in order[i % 3 :] + order[: i % 3]:
            started = time.perf_counter()
            ways_[way]()
            if pipe.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[way].append(time.perf_counter() - started)
    weights = sum(p.numel() for p in pipe.unet.parameters()) / 1e6
    print(f"\n{name}: {weights:.0f} M weights, {pixels}x{pixels} px, {steps} steps, {rounds} rounds")
    print(f"{'':8s}{'seconds':>9s}{'x plain':>9s}{'kept, MB a step':>17s}")
    for way, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds["plain"], strict=True))
        print(f"{way:8s}{statistics.median(times):9.3f}{ratio:9.3f}{size[way] / 1e6 / steps:17.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("doodle", "sd14"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pixels", type=int, default=256, help="of the large model (default 256)")
    parser.add_argument("--steps", type=int, default=2, help="of the large model (default 2)")
    args = parser.parse_args()
    device = duge.models.default_device()
    print(f"torch {torch.__version__} on {device}, {torch.get_num_threads()} threads")
    if args.only != "sd14":
        measure("doodle-sd", duge.load_pipeline("doodle"), 20, 64, max(args.rounds, 15))
    if args.only != "doodle":
        measure("Stable Diffusion 1.4 size", stable_diffusion(device), args.steps, args.pixels, args.rounds)


if __name__ == "__main__":
    main()
