"""What unlearning learns from: pictures that the model drew, noised, and the reference's answers to them.

The frozen reference is asked once, before anything is trained. So it is no second model, and no iteration
pays for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor

from .attention import AttentionRecorder, record_attention
from .config import UnlearnConfig
from .losses import attention_target, cross_attention_loss, mean_squares
from .models import ModelCard, check_reads_one_text, model_card, sample
from .processes import averaged, gathered, share

# ---------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Pictures:
    """Noise-free latents with the text that they were drawn from.

    Attributes:
        latents: (n, 4, h, w), scaled.
        encoder_hidden_states: (n, T, D).
        prompts: one each.
    """

    latents: Tensor
    encoder_hidden_states: Tensor
    prompts: tuple[str, ...]


@torch.no_grad()
def encode_prompts(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """The text encoder's hidden states, (n, T, D), float32 on the CPU; equal prompts are read once.

    Raises ValueError for Stable Diffusion XL.
    """
    check_reads_one_text(pipe.unet)
    distinct = list(dict.fromkeys(prompts))
    ids = pipe.tokenizer(
        distinct,
        padding="max_length",
        truncation=True,
        max_length=pipe.tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    states = pipe.text_encoder(ids.to(pipe.text_encoder.device))[0].float().cpu()
    return states[[distinct.index(p) for p in prompts]]


def draw_pictures(pipe: StableDiffusionPipeline, prompts: Sequence[str], seed: int) -> Pictures:
    """Lets the pipeline draw ``prompts``: what a model knows, in its own hand."""
    card = model_card(pipe)
    latents = sample(pipe, prompts, seed=seed, steps=card.sampling_steps, latents=True)
    return Pictures(latents.float(), encode_prompts(pipe, prompts), tuple(prompts))


def memory_prompts(card: ModelCard, forget: Sequence[str], size: int, seed: int = 0) -> list[str]:
    """``size`` prompts of what is to stay, spread evenly over concepts and styles; none names ``forget``."""
    kept = [c for c in card.concepts if c not in forget]
    styles = [s for s in card.styles if s not in forget]
    if not kept:
        raise ValueError("every concept is to be forgotten: nothing is left for the memory")
    generator = torch.Generator().manual_seed(seed)
    kept = [kept[i] for i in torch.randperm(len(kept), generator=generator)]
    styles = [styles[i] for i in torch.randperm(len(styles), generator=generator)]
    rounds = [divmod(i, len(kept)) for i in range(size)]  # each round: every concept once, styles in turn
    return [card.prompt(kept[i], styles[(i + turn) % len(styles)]) for turn, i in rounds]


def fill_memory(
    pipe: StableDiffusionPipeline,
    forget: Sequence[str],
    config: UnlearnConfig,
    memory: Pictures | None = None,
) -> Pictures:
    """A memory of ``config.memory_size`` pictures, none of which was asked for with a name of ``forget``.

    Keeps what it can of ``memory`` and lets the pipeline draw the rest.
    """
    card = model_card(pipe)
    gone = {prompt for concept in forget for prompt in card.prompts(concept)}
    parts = []
    if memory is not None:
        stay = [i for i, prompt in enumerate(memory.prompts) if prompt not in gone][: config.memory_size]
        texts = tuple(memory.prompts[i] for i in stay)
        parts.append(Pictures(memory.latents[stay], memory.encoder_hidden_states[stay], texts))
    if missing := config.memory_size - sum(len(p.prompts) for p in parts):
        texts = memory_prompts(card, forget, missing, config.seed)
        parts.append(draw_pictures(pipe, texts, seed=config.picture_seed + 500_000))
    return Pictures(
        torch.cat([p.latents for p in parts]),
        torch.cat([p.encoder_hidden_states for p in parts]),
        tuple(text for p in parts for text in p.prompts),
    )


def check_memory(card: ModelCard, memory: Pictures, forget: Sequence[str]) -> None:
    """Raises ValueError for an empty memory, or one that shows what is to go."""
    if not memory.prompts:
        raise ValueError("the memory is empty: expected at least one picture of something that is to stay")
    for concept in forget:
        if shown := set(card.prompts(concept)) & set(memory.prompts):
            raise ValueError(
                f"the memory shows {concept!r} ({min(shown)!r}), which is to go: leave its pictures out"
            )


@dataclass(frozen=True)
class Noised:
    """Pictures with noise and the text that belongs to them, before anybody was asked; all on the CPU.

    Attributes:
        noisy: (n, 4, h, w).
        timesteps: (n,).
        encoder_hidden_states: (n, T, D).
        truth: what a perfect model would answer, (n, 4, h, w): the noise, or the velocity in models that
            predict that; zero where it is not known.
        index: which picture each one was, (n,).
    """

    noisy: Tensor
    timesteps: Tensor
    encoder_hidden_states: Tensor
    truth: Tensor
    index: Tensor

    @classmethod
    def of(
        cls, pictures: Pictures, count: int, scheduler: DDPMScheduler, generator: torch.Generator
    ) -> Noised:
        """``count`` noisy versions of ``pictures``, which take turns."""
        index = torch.arange(count) % len(pictures.prompts)
        clean = pictures.latents[index]
        timesteps = torch.randint(len(scheduler.betas), (count,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        velocity = scheduler.config.prediction_type == "v_prediction"
        truth = scheduler.get_velocity(clean, noise, timesteps) if velocity else noise
        noisy = scheduler.add_noise(clean, noise, timesteps)
        return cls(noisy, timesteps, pictures.encoder_hidden_states[index], truth, index)

    @classmethod
    def half_drawn(
        cls,
        pipe: StableDiffusionPipeline,
        prompts: Sequence[str],
        count: int,
        seed: int,
        generator: torch.Generator,
    ) -> Noised:
        """``count`` moments of the pipeline's drawing of ``prompts``: x_t as the sampler meets it."""
        card, seen, drawn = model_card(pipe), [], []

        def keep(pipe: StableDiffusionPipeline, i: int, t: Tensor, kept: dict) -> dict:
            if i + 1 < len(pipe.scheduler.timesteps):  # after the last step there is no noise left
                following = pipe.scheduler.timesteps[i + 1]
                seen.append(pipe.scheduler.scale_model_input(kept["latents"], following).float().cpu())
            return kept

        texts, seeds = share(list(prompts)), share(range(seed, seed + len(prompts)))
        for start in range(0, len(texts), card.batch_size):
            part = slice(start, start + card.batch_size)
            pipe(
                texts[part],
                num_inference_steps=card.sampling_steps,
                guidance_scale=card.guidance_scale,
                generator=[torch.Generator().manual_seed(own) for own in seeds[part]],
                output_type="latent",
                callback_on_step_end=keep,
            )
            drawn.append(torch.stack(seen, 1))  # (m, steps, 4, h, w)
            seen.clear()
        times = pipe.scheduler.timesteps[1:].long().cpu()
        index = torch.arange(count) % len(prompts)
        when = torch.randint(len(times), (count,), generator=generator)
        noisy = torch.cat(gathered(drawn))[index, when]  # (n, 4, h, w)
        text = encode_prompts(pipe, prompts)[index]
        return cls(noisy, times[when], text, torch.zeros_like(noisy), index)


# ---------------------------------------------------------------------------- what forgetting asks for


@dataclass(frozen=True)
class Pass:
    """One forward pass over pictures of the concept.

    Attributes:
        noise_pred: (B, 4, h, w).
        layers: per cross-attention layer its maps (B, heads, H*W, T) or, with ``match="output"``, what it
            wrote (B, H*W, C); empty when the objective does not look at attention.
    """

    noise_pred: Tensor
    layers: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Objective:
    """How a method forgets; everything else (pictures, memory, budget) is shared by all of them.

    Attributes:
        name: for tables.
        target: what is wanted for a batch of pictures, a tuple of tensors (B, ...), from the reference's two
            passes (asked for the concept; asked for the anchor instead), the true answer (the noise that was
            added) and the settings.
        loss: a scalar, from the learning model's pass and the target: a mean over the pictures, so that
            several processes can share them.
        source: where it comes from.
        anchors: an object that the reference is asked for in place of an object, and a style (the plain one,
            too) for a style; without one, ``config.without`` says what it is asked. Not only for methods that
            need one: with ``replace(DUGE, anchors=("star", "photo"))`` and ``target="uncond"`` one name that
            went does not draw another (notebook 05).
        looks_at_attention: whether the layers have to be recorded.
        partial: noisy pictures are caught half-drawn, not drawn and then noised; the true answer is then
            zero.
    """

    name: str
    target: Callable[[Pass, Pass, Tensor, UnlearnConfig], tuple[Tensor, ...]]
    loss: Callable[[Pass, tuple[Tensor, ...]], Tensor]
    source: str
    anchors: tuple[str, ...] = ()
    looks_at_attention: bool = False
    partial: bool = False


def _attention_targets(
    concept: Pass, other: Pass, noise: Tensor, config: UnlearnConfig
) -> tuple[Tensor, ...]:
    pairs = zip(concept.layers, other.layers, strict=True)
    return tuple(attention_target(c, u, config.target, config.scale) for c, u in pairs)


def _attention_loss(learner: Pass, wanted: tuple[Tensor, ...]) -> Tensor:
    return cross_attention_loss(learner.layers, wanted, sizes=averaged(mean_squares(wanted)))


DUGE = Objective(
    "DUGE",
    _attention_targets,
    _attention_loss,
    "arXiv 2503.13769; the target is ours",
    looks_at_attention=True,
)
"""The cross-attention loss: hear, when the concept is named, what you would hear without the name."""


# ---------------------------------------------------------------------------- the reference's answers


@dataclass(frozen=True)
class Lessons:
    """Noisy pictures, what the model is asked about them, and the answer that is wanted; all on the CPU.

    Attributes:
        noisy: (n, 4, h, w).
        timesteps: (n,).
        encoder_hidden_states: (n, T, D).
        wanted: tensors (n, ...).
    """

    noisy: Tensor
    timesteps: Tensor
    encoder_hidden_states: Tensor
    wanted: tuple[Tensor, ...]

    def batch(
        self, size: int, generator: torch.Generator, device: torch.device, shared: bool = False
    ) -> Lessons:
        """``size`` random lessons on ``device``; if ``shared``, this process's part of them."""
        index = torch.randint(len(self.noisy), (size,), generator=generator)
        index = share(index) if shared else index
        return Lessons(
            self.noisy[index].to(device),
            self.timesteps[index].to(device),
            self.encoder_hidden_states[index].to(device),
            tuple(w[index].to(device) for w in self.wanted),
        )


def watching(
    unet: torch.nn.Module, objective: Objective, config: UnlearnConfig, size: tuple[int, int]
) -> AbstractContextManager[AttentionRecorder | None]:
    """Records what ``objective`` looks at, on latents of ``size``; None when that is nothing."""
    if not objective.looks_at_attention:
        return nullcontext()
    outputs = config.match == "output"
    return record_attention(unet, size, probs=not outputs, outputs=outputs)


def passed(noise_pred: Tensor, record: AttentionRecorder | None, part: slice) -> Pass:
    """A slice of the batch that just went through the UNet."""
    layers = () if record is None else (record.outputs or record.probs).values()
    return Pass(noise_pred[part], tuple(layer[part] for layer in layers))


@torch.no_grad()
def ask_about_concept(
    unet: torch.nn.Module, asked: Noised, other: Tensor, objective: Objective, config: UnlearnConfig
) -> Lessons:
    """The reference's answers about the concept; ``other`` (n, T, D) is the text that it is asked instead."""
    answers: tuple[Tensor, ...] = ()
    size = len(share(range(config.batch_size)))  # as many at once as in training
    for i in range(0, len(asked.noisy), size):
        part = slice(i, i + size)
        twice = (torch.cat([x[part]] * 2).to(unet.device) for x in (asked.noisy, asked.timesteps))
        text = torch.cat([asked.encoder_hidden_states[part], other[part]]).to(unet.device)
        with watching(unet, objective, config, asked.noisy.shape[-2:]) as record:
            frozen = unet(*twice, text).sample
        half = len(frozen) // 2
        concept, instead = (passed(frozen, record, s) for s in (slice(half), slice(half, None)))
        targets = objective.target(concept, instead, asked.truth[part].to(unet.device), config)
        if not answers:  # filled in place, in the model's precision: together they are large
            shapes = [(len(asked.noisy), *target.shape[1:]) for target in targets]
            answers = tuple(torch.empty(shape, dtype=frozen.dtype) for shape in shapes)
        for answer, target in zip(answers, targets, strict=True):
            answer[part] = target
    return Lessons(asked.noisy, asked.timesteps, asked.encoder_hidden_states, answers)


@torch.no_grad()
def ask_about_memory(unet: torch.nn.Module, asked: Noised, config: UnlearnConfig) -> Lessons:
    """What the prior loss wants for memory pictures: the reference's prediction, or the true noise."""
    answer, inputs = asked.truth, (asked.noisy, asked.timesteps, asked.encoder_hidden_states)
    if config.preserve == "reference":
        size = len(share(range(config.memory_batch_size)))
        parts = [
            unet(*(x[i : i + size].to(unet.device) for x in inputs)).sample.cpu()
            for i in range(0, len(answer), size)
        ]
        answer = torch.cat(parts)
    return Lessons(*inputs, (answer,))
