"""What one iteration of unlearning costs, beside a plain fine-tuning step on as many samples; in one run.

    python benchmarks/cost.py                    # the doodle model
    python benchmarks/cost.py --architecture sd  # Stable Diffusion 1.4's UNet, random weights

Ratios count; the seconds depend on the machine. Every way gets the same batch, trains the same tensors and
takes turns with the others, and the median over the rounds is printed. Memory is counted in tensors that a
method keeps on the device beside the UNet, as a share of the UNet.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

import duge_lite as duge
from duge_lite.lessons import (
    DUGE,
    Lessons,
    Noised,
    Objective,
    Pictures,
    ask_about_concept,
    ask_about_memory,
    watching,
)
from duge_lite.losses import prior_preservation_loss, regularization_loss
from duge_lite.unlearning import UnlearnConfig, batch_losses, trainable_parameters


def seconds(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--architecture", choices=("doodle", "sd"), default="doodle")
    parser.add_argument("--batch", type=int, help="pictures of the concept, and of the memory, in a step")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    if args.architecture == "doodle":
        unet, width, tokens, batch = duge.load_pipeline(device=device).unet, 128, 24, args.batch or 8
    else:
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).to(device)
        width, tokens, batch = 768, 77, args.batch or 1
    unet.eval().requires_grad_(False)
    config = UnlearnConfig(batch_size=batch, memory_batch_size=batch)
    trained = trainable_parameters(unet, config)
    for p in trained.values():
        p.requires_grad_(True)
    start = {n: p.detach().half() for n, p in trained.items()}
    side = unet.config.sample_size
    clean, text = torch.randn(batch, 4, side, side), torch.randn(batch, tokens, width)
    scheduler, generator = DDPMScheduler(), torch.Generator().manual_seed(0)
    pictures = Pictures(clean, text, ("x",) * batch)
    about = Noised.of(pictures, batch, scheduler, generator)
    kept = Noised.of(pictures, batch, scheduler, generator)
    lessons = ask_about_concept(unet, about, text, DUGE, config)
    memory = ask_about_memory(unet, kept, config)
    blind = replace(
        DUGE, looks_at_attention=False, loss=lambda learner, wanted: learner.noise_pred.square().mean()
    )
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-6)

    def draw() -> tuple[Lessons, Lessons]:
        return lessons.batch(batch, generator, device), memory.batch(batch, generator, device)

    def learn(loss: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()

    def plain() -> None:
        names = ("noisy", "timesteps", "encoder_hidden_states")
        parts = draw()
        inputs = [torch.cat([getattr(part, n) for part in parts]) for n in names]
        learn(prior_preservation_loss(unet(*inputs).sample, inputs[0]))

    def iteration(objective: Objective = DUGE, regularize: bool = True) -> None:
        with watching(unet, objective, config, (side, side)) as record:
            forget, prior = batch_losses(unet, *draw(), objective, record)
            loss = forget + 100 * prior
            if regularize:
                loss = loss + 10 * regularization_loss(trained, start)
            learn(loss)

    def reference() -> None:
        ask_about_concept(unet, about, text, DUGE, config)
        ask_about_memory(unet, kept, config)

    ways = {
        "plain fine-tuning step": plain,
        "iteration of unlearning": iteration,
        "  without the regularization": lambda: iteration(regularize=False),
        "  without recording attention": lambda: iteration(blind),
        "the reference's answers for one batch (once, before learning)": reference,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.rounds + 1):  # the first round warms up
        for name, way in ways.items():
            took = seconds(way, device)
            if turn:
                times[name].append(took)
    base = statistics.median(times["plain fine-tuning step"])
    print(f"{args.architecture}, {batch} + {batch} pictures, on {device}, {torch.get_num_threads()} threads")
    print(f"{'':64}{'seconds':>9}{'ratio':>8}")
    for name, values in times.items():
        print(f"{name:64}{statistics.median(values):9.3f}{statistics.median(values) / base:8.2f}")
    every = sum(p.nbytes for p in unet.parameters())
    copied = sum(p.nbytes for p in start.values())
    answers = sum(w[0].numel() for w in (*lessons.wanted, *memory.wanted))
    share = f"{copied / 1e6:.1f} MB of {every / 1e6:.1f} ({copied / every:.1%})"
    print(f"kept beside the UNet on the device: {share}")
    print(f"answers kept on the CPU: {answers * 4 / 1e6:.2f} MB for each pair of lessons")


if __name__ == "__main__":
    main()
