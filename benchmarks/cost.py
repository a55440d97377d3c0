"""What one iteration of unlearning costs, beside a plain fine-tuning step on as many samples; in one run.

    python benchmarks/cost.py                    # the doodle model
    python benchmarks/cost.py --architecture sd  # Stable Diffusion 1.4's UNet, random weights

Ratios count; the seconds depend on the machine. Every way gets the same batch, trains the same tensors and
takes turns with the others, and the median over the rounds is printed. Memory is counted in tensors that a
method keeps on the device beside the UNet, as a share of the UNet.
"""

import argparse
import statistics
from dataclasses import replace

import torch
from common import Workbench, seconds, stable_diffusion, workbench

import duge_lite as duge
from duge_lite.lessons import DUGE
from duge_lite.unlearning import UnlearnConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--architecture", choices=("doodle", "sd"), default="doodle")
    parser.add_argument("--batch", type=int, help="pictures of the concept, and of the memory, in a step")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = duge.models.default_device()
    torch.manual_seed(0)
    if args.architecture == "doodle":
        unet, tokens, batch = duge.load_pipeline(device=device).unet, 24, args.batch or 8
    else:
        unet, tokens, batch = stable_diffusion(device).unet, 77, args.batch or 1
    with workbench(unet, UnlearnConfig(batch_size=batch, memory_batch_size=batch), tokens) as bench:
        compare(bench, args.architecture, args.rounds)


def compare(bench: Workbench, architecture: str, rounds: int) -> None:
    device, batch = bench.unet.device, bench.config.batch_size
    blind = replace(
        DUGE, looks_at_attention=False, loss=lambda learner, wanted: learner.noise_pred.square().mean()
    )
    ways = {
        "plain fine-tuning step": bench.plain,
        "iteration of unlearning": bench.iteration,
        "  without the regularization": lambda: bench.iteration(regularize=False),
        "  without recording attention": lambda: bench.iteration(blind),
        "the reference's answers for one batch (once, before learning)": bench.ask,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first round warms up
        for name, way in ways.items():
            took = seconds(way, device)
            if turn:
                times[name].append(took)
    base = statistics.median(times["plain fine-tuning step"])
    print(f"{architecture}, {batch} + {batch} pictures, on {device}, {torch.get_num_threads()} threads")
    print(f"{'':64}{'seconds':>9}{'ratio':>8}")
    for name, values in times.items():
        print(f"{name:64}{statistics.median(values):9.3f}{statistics.median(values) / base:8.2f}")
    every = sum(p.nbytes for p in bench.unet.parameters())
    copied = sum(p.nbytes for p in bench.anchor.values())
    answers = sum(w[0].numel() for w in (*bench.lessons.wanted, *bench.memory.wanted))
    share = f"{copied / 1e6:.1f} MB of {every / 1e6:.1f} ({copied / every:.1%})"
    print(f"kept beside the UNet on the device: {share}")
    print(f"answers kept on the CPU: {answers * 4 / 1e6:.2f} MB for each pair of lessons")


if __name__ == "__main__":
    main()
