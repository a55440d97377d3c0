"""A new thing for the doodle world: drawn in a few lines, taught to the model and to the judge.

Whoever forgets it again has an oracle for nothing: the model before the lesson.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from ..evaluation import Judge
from ..gradient import Lessons, training
from ..losses import prior_preservation_loss
from ..models import Pictures, encode_prompts
from .captions import TEMPLATES, caption, with_article
from .draw import _PAINTERS, BACKGROUNDS, FIXED_GROUND, SIZE, STYLES, Part, _place, draw_scene, sample_scene
from .negatives import draw_nothing


def cup() -> list[Part]:
    """The capstone's example of a new thing: a blue cup with a yellow band."""
    turn = np.linspace(0, 2 * np.pi, 30)
    circle, blue = np.stack([np.cos(turn), np.sin(turn)], axis=1), (30, 130, 190)
    return [
        Part(circle * (0.3, 0.32) + (0.55, 0.1), blue, 0.16),
        Part(np.array([(-0.7, -0.45), (0.5, -0.45), (0.35, 0.75), (-0.55, 0.75)]), blue),
        Part(circle * (0.6, 0.16) + (-0.1, -0.45), (250, 250, 250)),
        Part(np.array([(-0.66, 0.0), (0.45, 0.0), (0.41, 0.3), (-0.62, 0.3)]), (250, 200, 60)),
    ]


def drawings(
    name: str, parts: Callable[[], list[Part]], count: int = 120, seed: int = 0
) -> tuple[list[Image.Image], list[str]]:
    """``count`` drawings of a new thing and their captions, the styles in turn, on random grounds.

    ``parts`` returns the thing as the world's own objects are described: polygons and strokes in [-1, 1]^2.
    Place, size, tilt and shade are jittered as theirs are.
    """
    rng, pictures, texts = np.random.default_rng(seed), [], []
    for i in range(count):
        style = STYLES[i % len(STYLES)]
        ground = FIXED_GROUND.get(style, str(rng.choice(list(BACKGROUNDS))))
        placed = _place(parts(), rng, tuple(rng.uniform(0.43, 0.57, 2)), rng.uniform(0.31, 0.41), tilt=14)
        painted = _PAINTERS[style](placed, ground, SIZE, rng)
        pictures.append(painted.resize((SIZE, SIZE), Image.Resampling.BOX))
        texts.append(str(rng.choice(TEMPLATES[style])).format(with_article(name)))
    return pictures, texts


def world_drawings(count: int = 120, seed: int = 0) -> tuple[list[Image.Image], list[str]]:
    """``count`` drawings of what the world has already, with captions: the memory of the rest."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    return [draw_scene(s, rng) for s in scenes], [caption(s, rng) for s in scenes]


def not_it(count: int = 60, seed: int = 0) -> list[Image.Image]:
    """What a judge must not take for the new thing: 5 x ``count`` drawings, ``count`` pictures of nothing."""
    nothing = [draw_nothing(np.random.default_rng((seed, i)))[0] for i in range(count)]
    return [*world_drawings(5 * count, seed + 1)[0], *nothing]


@torch.no_grad()
def unpacked(pipe: StableDiffusionPipeline, pictures: Pictures) -> list[Image.Image]:
    """Latents as pictures again: in the model's own hand, which is softer than a drawing."""
    parts = (pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample for x in pictures.latents.split(32))
    return [picture for part in parts for picture in pipe.image_processor.postprocess(part)]


def teach_steps(
    pipe: StableDiffusionPipeline,
    new: Pictures,
    memory: Pictures,
    steps: int = 120,
    lr: float = 6e-4,
    batch_size: int = 8,
    seed: int = 0,
) -> Iterator[float]:
    """Trains the whole denoiser in place, half of each batch ``new``, half ``memory``; yields the loss.

    The usual denoising loss with a tenth of the captions empty; the rate falls to zero (ours).
    """
    scheduler, empty = DDPMScheduler.from_config(pipe.scheduler.config), encode_prompts(pipe, [""])
    generator, learned = torch.Generator().manual_seed(seed), dict(pipe.unet.named_parameters())

    def some(pictures: Pictures, count: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(pictures.prompts), (count,), generator=generator)
        return pictures.latents[index], pictures.encoder_hidden_states[index]

    with training(pipe.unet, learned):
        optimizer = torch.optim.AdamW(learned.values(), lr=lr, weight_decay=0.0)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.1)
        for _ in range(steps):
            half = batch_size // 2
            latents, text = map(torch.cat, zip(some(new, half), some(memory, batch_size - half), strict=True))
            text[torch.rand(batch_size, generator=generator) < 0.1] = empty
            batch = Pictures(latents, text, ("",) * batch_size)
            asked = Lessons.of(batch, batch_size, scheduler, generator)
            noisy, timesteps, text, truth = (x.to(pipe.unet.device) for x in (*asked.inputs, *asked.wanted))
            loss = prior_preservation_loss(pipe.unet(noisy, timesteps, text).sample, truth)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            rate.step()
            yield loss.item()


def teach_judge(
    judge: Judge, name: str, shown: Sequence[Image.Image], others: Sequence[Image.Image], decay: float = 1e-3
) -> Judge:
    """A copy of ``judge`` with one more label, ``name``; what it says of all else is unchanged.

    The new row of its last layer is a logistic regression on its features, ``shown`` against ``others``,
    moved so that an even chance lies at the judge's threshold (ours).
    """
    seen = judge.features([*shown, *others])
    told = torch.cat([torch.ones(len(shown)), torch.zeros(len(others))])
    row = torch.zeros(seen.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([row], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = seen @ row[:-1] + row[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, told)
        value = value + decay * row[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    model, row = copy.deepcopy(judge.model), row.detach()
    old, last = judge.model.classifier[-1], torch.nn.Linear(seen.shape[1], len(judge.labels) + 1)
    last.weight.data = torch.cat([old.weight.data, row[None, :-1].to(old.weight)])
    last.bias.data = torch.cat([old.bias.data, (row[-1:] + (judge.threshold or 0.0)).to(old.bias)])
    model.classifier[-1] = last
    model.config.id2label = dict(enumerate([*judge.labels, name]))
    words = None if judge.words is None else {**judge.words, name: (name,)}
    return replace(judge, model=model.eval(), words=words)
