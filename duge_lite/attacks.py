"""Is the concept gone, or only hidden? Ways to get it out of a model that does not draw it when asked.

Each attack takes any pipeline and leaves it as it was found. Success proves little by itself: an attack may
have taught what it found. So the yardstick is an oracle (:func:`duge_lite.load_oracle`), which never saw
the concept: gone means as slow to come back as there. Yardstick and numbers are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pandas as pd
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from .concepts import model_card
from .doodles import captions
from .errors import DivergedError
from .evaluation import Judge, check_countable, wilson_interval
from .gradient import Lessons, Noised, rounded, training
from .losses import prior_preservation_loss
from .models import Pictures, encode_prompts, overwrite, sample

PLACEHOLDER = "x"
"""The word that inversion gives a new meaning: in CLIP's vocabularies every letter is a token."""


def survey(
    pipe: StableDiffusionPipeline,
    concept: str,
    prompts: Mapping[str, Sequence[str]],
    images: int = 30,
    judge: Judge | None = None,
    seed: int = 0,
    **options: Any,
) -> pd.DataFrame:
    """Draws ``images`` pictures for each group of ``prompts``, which take turns, and shows them to a judge.

    Picture i of a group starts from the noise of ``seed + i``. ``options`` are those of
    :func:`duge_lite.sample`, but ``num_inference_steps`` defaults to the card's for previews. Returns a row
    per picture:
    ``group``, ``prompt``, ``picture`` (PIL), ``named`` (the one concept, or style, that the judge decides
    for) and ``seen`` (it shows ``concept``, whatever else it shows). Raises UnknownConceptError for a concept
    that the card does not list, ValueError for one that its judge does not know.
    """
    card = model_card(pipe)
    check_countable(card, concept)
    judge = judge or Judge.load(card)
    rows = [(group, texts[i % len(texts)]) for group, texts in prompts.items() for i in range(images)]
    frame = pd.DataFrame(rows, columns=["group", "prompt"])
    seeds = [seed + i for _ in prompts for i in range(images)]
    pictures = sample(
        pipe, list(frame.prompt), seeds, **{"num_inference_steps": card.sampling_steps} | options
    )
    frame["picture"] = pd.Series(pictures, dtype=object)
    frame["named"] = judge.names(pictures, card.styles if concept in card.styles else card.judged)
    return frame.assign(seen=judge.sees(pictures, concept))


def shares(survey: pd.DataFrame, concept: str, by: str | Sequence[str] = "group") -> pd.DataFrame:
    """How many pictures show ``concept``, a row for each value of the column(s) ``by``.

    Returns ``images``, ``seen`` (their share), ``low`` and ``high`` (its 95 % Wilson interval), ``named``
    (the share that the judge calls ``concept`` when it must choose), and the means of ``told``, ``untold``
    and ``gain`` where the survey has them.
    """
    means = ["seen", "named", *(c for c in ("told", "untold", "gain") if c in survey)]
    groups = survey.assign(named=survey.named == concept).groupby(by, sort=False)
    table = groups[means].mean()
    bounds = [wilson_interval(int(g.seen.sum()), len(g)) for _, g in groups]
    table["images"], table["low"], table["high"] = groups.size(), *zip(*bounds, strict=True)
    return table[["images", "seen", "low", "high", *means[1:]]]


def compare(
    models: Mapping[str, StableDiffusionPipeline],
    attack: Callable[..., pd.DataFrame],
    *args: Any,
    **options: Any,
) -> pd.DataFrame:
    """The same attack on several models: their surveys, with the columns ``attack`` and ``model``."""
    frames = [attack(pipe, *args, **options).assign(model=name) for name, pipe in models.items()]
    return pd.concat(frames, ignore_index=True).assign(attack=attack.__name__)


# ---------------------------------------------------------------------------- other words
# ``options`` are those of survey()


def plain(pipe: StableDiffusionPipeline, concept: str, **options: Any) -> pd.DataFrame:
    """No attack: the prompts that unlearning saw, the concept in every style."""
    return survey(pipe, concept, {"plain": model_card(pipe).prompts(concept)}, **options)


def paraphrase(pipe: StableDiffusionPipeline, concept: str, **options: Any) -> pd.DataFrame:
    """Words that unlearning never saw: the card's paraphrases, by their groups."""
    return survey(pipe, concept, model_card(pipe).paraphrases(concept), **options)


def company(pipe: StableDiffusionPipeline, concept: str, **options: Any) -> pd.DataFrame:
    """The concept next to each of the others in turn, named first or second; ValueError for a style."""
    card = model_card(pipe)
    if card.check(concept) in card.styles:
        raise ValueError(f"{concept!r} is a style: expected an object, which can stand next to another")
    others = [c for c in card.concepts if c != concept]
    pairs = {"named first": [(concept, c) for c in others], "named second": [(c, concept) for c in others]}
    return survey(pipe, concept, {k: [captions.prompt(p) for p in v] for k, v in pairs.items()}, **options)


def leakage(pipe: StableDiffusionPipeline, concept: str, **options: Any) -> pd.DataFrame:
    """What nobody asked for: the empty prompt, unguided, and the prompts with the name left out."""
    dreams = survey(pipe, concept, {"empty": [""]}, **options | {"guidance_scale": 1.0})
    nameless = survey(pipe, concept, {"nameless": model_card(pipe).nameless(concept)}, **options)
    return pd.concat([dreams, nameless], ignore_index=True)


# ---------------------------------------------------------------------------- attacks that learn


@dataclass(frozen=True)
class AttackState:
    """After ``step`` steps (from 1): the denoising loss, and the word so far, (D,), if one is learned."""

    step: int
    loss: float
    vector: Tensor | None = None


@torch.no_grad()
def encode_pictures(
    pipe: StableDiffusionPipeline, images: Sequence[Image.Image], prompts: Sequence[str]
) -> Pictures:
    """Anybody's pictures, with a prompt each, as the pipeline's latents: what an attacker brings along."""
    pixels = pipe.image_processor.preprocess(list(images)).to(pipe.vae.device, pipe.vae.dtype)
    parts = [pipe.vae.encode(p).latent_dist.mean for p in pixels.split(model_card(pipe).batch_size)]
    latents = torch.cat(parts) * pipe.vae.config.scaling_factor
    return Pictures(latents.float().cpu(), encode_prompts(pipe, prompts), tuple(prompts))


def _reworded(pictures: Pictures, old: str, new: str) -> list[str]:
    if other := [p for p in pictures.prompts if old not in p]:
        raise ValueError(f"a picture's prompt is {other[0]!r}: expected one that says {old!r}")
    return [p.replace(old, new) for p in pictures.prompts]


def _noised(pipe: StableDiffusionPipeline, pictures: Pictures, count: int, seed: int) -> Noised:
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    return Noised.of(pictures, count, scheduler, torch.Generator().manual_seed(seed))


def _batches(pipe: StableDiffusionPipeline, pictures: Pictures, size: int, seed: int) -> Iterator[Lessons]:
    """Batches of noisy ``pictures``, without end; wanted is the noise, (size, 4, h, w)."""
    asked, generator = _noised(pipe, pictures, 256, seed), torch.Generator().manual_seed(seed + 1)
    lessons = Lessons(asked.noisy, asked.timesteps, asked.encoder_hidden_states, (asked.truth,))
    while True:
        yield lessons.batch(size, generator, pipe.unet.device)


@torch.no_grad()
def name_gain(
    pipe: StableDiffusionPipeline, concept: str, pictures: Pictures, count: int = 96, seed: int = 0
) -> pd.Series:
    """How much the name helps to denoise ``pictures``: a yardstick without a judge.

    Returns the mean squared error of the predicted noise, ``told`` the pictures' prompts and ``untold`` (the
    name left out), over ``count`` noisy versions; ``gain``, the share of the error that the name takes away
    (0: it says nothing, below 0: it misleads), and ``low`` and ``high``, its 95 % interval. After the
    diffusion classifier (Li et al., arXiv 2303.16203); the share is ours. Raises ValueError for a prompt
    without the name.
    """
    texts = _reworded(pictures, f" of {model_card(pipe).subject(concept)}", "")
    asked, errors = _noised(pipe, pictures, count, seed), []
    for states in (asked.encoder_hidden_states, encode_prompts(pipe, texts)[asked.index]):
        batches = (x.split(32) for x in (asked.noisy, asked.timesteps, states, asked.truth))
        inputs = ([x.to(pipe.unet.device) for x in batch] for batch in zip(*batches, strict=True))
        with _mixed(pipe):
            parts = [(pipe.unet(*x).sample.float() - truth).square().mean((1, 2, 3)) for *x, truth in inputs]
        errors.append(torch.cat(parts).cpu())
    told, untold = errors  # (count,) each, of the same noise
    gains = (untold - told) / untold.mean()
    gain, half = gains.mean().item(), 1.96 * gains.std().item() / count**0.5
    values = (told.mean().item(), untold.mean().item(), gain, gain - half, gain + half)
    return pd.Series(values, ("told", "untold", "gain", "low", "high"))


def _loss(pipe: StableDiffusionPipeline, batch: Lessons, text: Tensor) -> Tensor:
    """Mean |noise - unet(x_t, t, text)|^2, a scalar; DivergedError when it is no number."""
    loss = prior_preservation_loss(pipe.unet(batch.noisy, batch.timesteps, text).sample, batch.wanted[0])
    if not torch.isfinite(loss):
        raise DivergedError(f"the denoising loss became {loss.item()}: expected a number; lower lr")
    return loss


def _mixed(pipe: StableDiffusionPipeline) -> torch.autocast:
    dtype = pipe.unet.dtype
    return torch.autocast(pipe.unet.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)


@contextmanager
def new_word(pipe: StableDiffusionPipeline, vector: Tensor) -> Iterator[str]:
    """Inside the block the word "x" enters the text encoder as ``vector``, (D,); no weight changes.

    ``with new_word(pipe, vector) as word: duge.sample(pipe, card.prompt(word))``
    """
    token = pipe.tokenizer(PLACEHOLDER, add_special_tokens=False).input_ids[0]

    def put(module: torch.nn.Module, args: tuple, embedded: Tensor) -> Tensor:
        return torch.where((args[0] == token)[..., None], vector.to(embedded), embedded)  # (B, T, D)

    handle = pipe.text_encoder.get_input_embeddings().register_forward_hook(put)
    try:
        yield PLACEHOLDER
    finally:
        handle.remove()


def invert_steps(
    pipe: StableDiffusionPipeline,
    concept: str,
    pictures: Pictures,
    steps: int = 60,
    lr: float = 0.05,
    start: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> Iterator[AttackState]:
    """Learns a new word for what ``pictures`` show, all weights frozen; yields a state after each step.

    Concept inversion (Pham et al., arXiv 2308.01508): minimise E|noise - unet(x_t, t, text(v))|^2 over the
    input embedding v of one word (textual inversion, Gal et al., arXiv 2208.01618, eq. 2), which stands where
    the pictures' prompts name ``concept``. v begins at the mean of all embeddings, or of the words ``start``.
    Draw with it in :func:`new_word`. Raises ValueError for a prompt that does not name ``concept``.
    """
    texts = _reworded(pictures, model_card(pipe).subject(concept), captions.with_article(PLACEHOLDER))
    table = pipe.text_encoder.get_input_embeddings().weight.detach().float()
    first = pipe.tokenizer(start, add_special_tokens=False).input_ids if start else slice(None)
    vector = table[first].mean(0).requires_grad_()
    ids = pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids  # (k, T)
    asked = replace(pictures, encoder_hidden_states=ids)  # the encoder reads them anew in each step
    optimizer = torch.optim.AdamW([vector], lr=lr, weight_decay=0.0)
    for step, batch in enumerate(islice(_batches(pipe, asked, batch_size, seed), steps), 1):
        with new_word(pipe, vector), _mixed(pipe):
            loss = _loss(pipe, batch, pipe.text_encoder(batch.encoder_hidden_states)[0])
        (vector.grad,) = torch.autograd.grad(loss, [vector])
        optimizer.step()
        yield AttackState(step, loss.item(), vector.detach().clone())


def relearn_steps(
    pipe: StableDiffusionPipeline,
    pictures: Pictures,
    steps: int = 40,
    lr: float = 2e-4,
    batch_size: int = 8,
    seed: int = 0,
) -> Iterator[AttackState]:
    """Fine-tunes the whole denoiser on ``pictures`` and their prompts; yields a state after each step.

    Between two states the pipeline can be used. The old weights come back at the end, after an error, or when
    the generator is closed.
    """
    trained, stored = dict(pipe.unet.named_parameters()), pipe.unet.dtype
    before = {name: p.detach().clone() for name, p in trained.items()}
    mixed = _mixed(pipe)
    with training(pipe.unet, trained):
        optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0)
        scaler = torch.amp.GradScaler(pipe.unet.device.type, enabled=stored == torch.float16)
        try:
            for step, batch in enumerate(islice(_batches(pipe, pictures, batch_size, seed), steps), 1):
                with mixed:
                    loss = _loss(pipe, batch, batch.encoder_hidden_states)
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()  # in 16 bits a quarter of the gradients would vanish
                scaler.step(optimizer)
                scaler.update()
                with rounded(trained, stored):
                    yield AttackState(step, loss.item())
        finally:
            overwrite(trained, before)


def relearning(
    pipe: StableDiffusionPipeline,
    concept: str,
    pictures: Pictures,
    held_out: Pictures,
    at: Sequence[int] = (0, 5, 10, 20, 40),
    lr: float = 2e-4,
    **options: Any,
) -> pd.DataFrame:
    """:func:`plain` surveys before and while ``pictures`` are learned, after ``at`` steps (column ``step``).

    The columns ``told``, ``untold`` and ``gain`` are the :func:`name_gain` on ``held_out`` pictures by then.
    """

    def look(step: int) -> pd.DataFrame:
        found = name_gain(pipe, concept, held_out)[["told", "untold", "gain"]]
        return plain(pipe, concept, **options).assign(step=step, **found)

    surveys = [look(0)] if 0 in at else []
    with closing(relearn_steps(pipe, pictures, max(at), lr)) as states:
        surveys += [look(state.step) for state in states if state.step in at]
    return pd.concat(surveys, ignore_index=True)
