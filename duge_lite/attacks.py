"""Is the concept gone, or only hidden? Ways to get it out of a model that does not draw it when asked.

By other words, without words, and by learning. Each attack takes any pipeline and leaves it as it was found.
Success proves little by itself: an attack may have taught what it found. So the yardstick is an oracle
(:func:`duge_lite.load_oracle`), which never saw the concept: gone means as slow to come back as there.
Yardstick and numbers are ours. ``options`` are those of :func:`survey`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from .concepts import ModelCard, model_card
from .doodles import captions
from .errors import DivergedError
from .evaluation import Judge, choices, counted, draw_groups, judge_of
from .gradient import Lessons, reads_one_text, rounded, training
from .losses import prior_preservation_loss
from .models import Pictures, copied, encode_prompts, overwrite, with_bar

PLACEHOLDER = "x"
"""The word that inversion gives a new meaning: in CLIP's vocabularies every letter is a token."""


def survey(
    pipe: StableDiffusionPipeline, concept: str, prompts: Mapping[str, Sequence[str]], images: int = 30,
    judge: Judge | None = None, seed: int = 0, **options: Any,
) -> pd.DataFrame:  # fmt: skip
    """Draws ``images`` pictures for each group of ``prompts``, which take turns, and shows them to a judge.

    Picture i of a group starts from the noise of ``seed + i``. ``options`` are those of
    :func:`duge_lite.sample`, but ``num_inference_steps`` defaults to the card's for previews. Returns a row
    per picture: ``group``, ``prompt``, ``picture`` (PIL), ``named`` (the one concept, or style, that the
    judge decides for) and ``seen`` (it shows ``concept``, whatever else it shows). Raises
    UnknownConceptError for a word that the model never read, ValueError for one that the judge does not know.
    """
    card = model_card(pipe)
    judge = judge_of(pipe, card, [concept], judge)
    how = {"num_inference_steps": card.sampling_steps} | options
    return _judged(card, concept, judge, draw_groups(pipe, prompts, images, seed, **how))


def _judged(card: ModelCard, concept: str, judge: Judge, columns: Mapping[str, Any]) -> pd.DataFrame:
    """A :func:`survey`'s frame: ``columns`` hold the ``picture``s, and what else is known of them."""
    frame, pictures = pd.DataFrame(columns), list(columns["picture"])
    named = judge.names(pictures, choices(card, [concept], judge))
    return frame.assign(named=named, seen=judge.sees(pictures, concept))


def shares(survey: pd.DataFrame, concept: str, by: str | Sequence[str] = "group") -> pd.DataFrame:
    """How many pictures show ``concept``, a row for each value of the column(s) ``by``.

    Returns ``images``, ``seen`` (their share), ``low`` and ``high`` (its 95 % Wilson interval), and ``named``
    (the share that the judge calls ``concept`` when it must choose).
    """
    groups = survey.assign(named=survey.named == concept).groupby(by, sort=False)
    return counted(groups.seen, "seen").assign(named=groups.named.mean())


def across(
    models: Mapping[str, StableDiffusionPipeline], attack: Callable[..., pd.DataFrame], *args: Any,
    **options: Any,
) -> pd.DataFrame:  # fmt: skip
    """The same attack on several models: their surveys, with the columns ``attack`` and ``model``."""
    frames = [attack(pipe, *args, **options).assign(model=name) for name, pipe in models.items()]
    return pd.concat(frames, ignore_index=True).assign(attack=attack.__name__)


# ---------------------------------------------------------------------------- other words


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


# ---------------------------------------------------------------------------- pictures, no words


def completion(
    pipe: StableDiffusionPipeline, concept: str, base: StableDiffusionPipeline,
    at: Sequence[int] = (2, 4, 6), **options: Any,
) -> pd.DataFrame:  # fmt: skip
    """``base`` draws the first steps of the concept, as many as ``at`` says, and ``pipe`` finishes.

    Diffusion completion (arXiv 2505.17013). Both are asked for the concept, guided; a hand-over late enough
    brings it from any model, so read it beside the oracle. Returns a survey, grouped by "2 of 10 steps".
    Raises ValueError for more steps than there are.
    """
    card, frames = model_card(pipe), []
    steps = options.setdefault("num_inference_steps", card.sampling_steps)
    for k in at:
        if not 0 <= k <= steps:
            raise ValueError(f"at = {k!r}: expected a number of steps from 0 to {steps}")
        relay = copy(pipe)  # the same parts, but for its denoiser
        relay.unet = base.unet if k else pipe.unet

        def hand_over(own: Any, step: int, time: Tensor, tensors: dict, k: int = k) -> dict:
            after = (step + 1) % len(own.scheduler.timesteps)  # 0: the next batch begins
            own.unet = base.unet if after < k else pipe.unet
            return tensors

        asked = {f"{k} of {steps} steps": card.prompts(concept)}
        frames.append(survey(relay, concept, asked, callback_on_step_end=hand_over, **options))
    return pd.concat(frames, ignore_index=True)


@torch.no_grad()
def redrawing(
    pipe: StableDiffusionPipeline, concept: str, pictures: Pictures, at: float = 0.7, half: bool = False,
    num_inference_steps: int | None = None, judge: Judge | None = None, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """``pictures`` of the concept, noised to the moment ``at`` (1: only noise) and denoised, told nothing.

    The probes of noise and of in-painting (arXiv 2505.17013), under the empty prompt, without guidance. With
    ``half`` only the left half is given, and the other one begins as noise: it is put back after every step,
    with the noise of the moment (RePaint, arXiv 2201.09865, without its resampling). Picture i takes its
    noise from ``seed + i``. Returns a survey.
    """
    from diffusers import AutoPipelineForImage2Image  # imports all pipelines, and says so

    card = model_card(pipe)
    judge = judge_of(pipe, card, [concept], judge)
    relay, width, shown = AutoPipelineForImage2Image.from_pipe(pipe), pictures.latents.shape[-1], []
    relay.set_progress_bar_config(disable=True)
    given = torch.arange(width) < width // 2  # (w,)
    for clean in pictures.latents.split(card.batch_size):  # (B, 4, h, w)
        lots = [torch.Generator().manual_seed(seed + len(shown) + i) for i in range(len(clean))]

        def put_back(own: Any, step: int, time: Tensor, tensors: dict, lots=lots, clean=clean) -> dict:
            known, now = clean, tensors["latents"]
            if len(later := own.scheduler.timesteps[step + 1 : step + 2].cpu()):
                noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in lots])
                known = own.scheduler.add_noise(clean, noise, later.expand(len(clean)))
            return {"latents": torch.where(given.to(now.device), known.to(now), now)}

        shown += relay(
            [""] * len(clean),
            image=clean * given if half else clean,
            strength=1.0 if half else at,
            num_inference_steps=card.sampling_steps if num_inference_steps is None else num_inference_steps,
            guidance_scale=1.0,
            generator=lots,
            callback_on_step_end=put_back if half else None,
        ).images
    group = "half given" if half else f"noised to {at:g}"
    return _judged(card, concept, judge, {"group": group, "prompt": "", "picture": shown})


@torch.no_grad()
def noise_inversion(
    pipe: StableDiffusionPipeline, concept: str, pictures: Pictures, num_inference_steps: int = 25,
    judge: Judge | None = None,
) -> pd.DataFrame:  # fmt: skip
    """The noise from which ``pipe`` redraws given ``pictures`` by itself, told nothing; and what it redraws.

    DDIM run backwards, then forwards, under the empty prompt and without guidance, as TINA begins (arXiv
    2603.17828; its refinement of the noise is left out). A denoiser is nearly invertible whatever it knows,
    so read it beside the oracle. Returns a survey with the column ``error``: the root of the mean squared
    difference of latents, in units of the given latents' own standard deviation.
    """
    card = model_card(pipe)
    judge = judge_of(pipe, card, [concept], judge)
    same = {"clip_sample": False, "timestep_spacing": "leading", "set_alpha_to_one": False}
    there, back, shown, errors = copy(pipe), copy(pipe), [], []
    there.scheduler = DDIMInverseScheduler.from_config(pipe.scheduler.config, **same)
    back.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **same)
    ask = {"num_inference_steps": num_inference_steps, "guidance_scale": 1.0, "output_type": "latent"}
    for clean in pictures.latents.split(card.batch_size):  # (B, 4, h, w)
        latents = clean
        for one in (there, back):
            latents = one([""] * len(clean), latents=latents.to(pipe.unet.dtype), **ask).images
        errors += ((latents.cpu() - clean).square().mean((1, 2, 3)).sqrt() / pictures.latents.std()).tolist()
        decoded = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
        shown += pipe.image_processor.postprocess(decoded)
    known = {"group": "inverted", "prompt": "", "error": errors, "picture": shown}
    return _judged(card, concept, judge, known)


# ---------------------------------------------------------------------------- attacks that learn


@dataclass(frozen=True)
class AttackState:
    """After ``step`` steps (from 1): the denoising loss; of an attack that seeks words, the one so far.

    ``vector``: of a learned word, (D,); ``words``: of a search in the vocabulary.
    """

    step: int
    loss: float
    vector: Tensor | None = None
    words: str = ""


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


def _lessons(pipe: StableDiffusionPipeline, pictures: Pictures, count: int, seed: int) -> Lessons:
    reads_one_text(pipe.unet)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    return Lessons.of(pictures, count, scheduler, torch.Generator().manual_seed(seed))


def _batches(
    pipe: StableDiffusionPipeline, pictures: Pictures, size: int, seed: int, steps: int
) -> Iterator[tuple[int, Lessons]]:
    """Numbered batches of noisy ``pictures``, from 1; wanted is the noise, (size, 4, h, w)."""
    lessons, generator = _lessons(pipe, pictures, 256, seed), torch.Generator().manual_seed(seed + 1)
    for step in with_bar(range(1, steps + 1), "attacking"):
        yield step, lessons.batch(size, generator, pipe.unet.device)


@torch.no_grad()
def name_gain(
    pipe: StableDiffusionPipeline, concept: str, pictures: Pictures, count: int = 96, seed: int = 0
) -> pd.Series:
    """How much the name helps to denoise ``pictures``: a yardstick without a judge.

    Returns the mean squared error of the predicted noise, ``told`` the pictures' prompts and ``untold`` (the
    name left out), over ``count`` noisy versions; ``gain``, the share of it that the name takes away (0: it
    says nothing, below 0: it misleads), and ``low`` and ``high``, its 95 % interval. After the diffusion
    classifier (Li et al., arXiv 2303.16203); the share is ours. Raises ValueError for a prompt without it.
    """
    texts = _reworded(pictures, f" of {model_card(pipe).subject(concept)}", "")
    asked, errors = _lessons(pipe, pictures, count, seed), []
    for states in (asked.encoder_hidden_states, encode_prompts(pipe, texts)[asked.index]):
        batches = (x.split(32) for x in (asked.noisy, asked.timesteps, states, *asked.wanted))
        inputs = ([x.to(pipe.unet.device) for x in batch] for batch in zip(*batches, strict=True))
        with _mixed(pipe, pipe.unet.dtype):
            parts = [(pipe.unet(*x).sample.float() - truth).square().mean((1, 2, 3)) for *x, truth in inputs]
        errors.append(torch.cat(parts).cpu())
    told, untold = errors  # (count,) each, of the same noise
    gains = (untold - told) / untold.mean()
    gain, half = gains.mean().item(), 1.96 * gains.std().item() / count**0.5
    values = (told.mean().item(), untold.mean().item(), gain, gain - half, gain + half)
    return pd.Series(values, ("told", "untold", "gain", "low", "high"))


def _loss(
    pipe: StableDiffusionPipeline, batch: Lessons, stored: torch.dtype, vectors: Tensor | None = None
) -> Tensor:
    """Mean |noise - unet(x_t, t, text)|^2, a scalar; DivergedError when it is no number.

    With ``vectors`` of new words the batch's texts are token ids, (B, T), which the encoder reads anew.
    """
    text = batch.encoder_hidden_states
    with _mixed(pipe, stored):
        if vectors is not None:
            with new_word(pipe, vectors):
                text = pipe.text_encoder(text)[0]
        loss = prior_preservation_loss(pipe.unet(batch.noisy, batch.timesteps, text).sample, batch.wanted[0])
    if not torch.isfinite(loss):
        raise DivergedError(f"the denoising loss became {loss.item()}: expected a number; lower lr")
    return loss


def _mixed(pipe: StableDiffusionPipeline, stored: torch.dtype) -> torch.autocast:
    """In the precision ``stored`` of the pipeline, even while its denoiser is trained in 32 bits."""
    return torch.autocast(pipe.unet.device.type, stored, enabled=stored != torch.float32, cache_enabled=False)


def _descend(
    pipe: StableDiffusionPipeline, learned: Sequence[Tensor], batches: Iterator[tuple[int, Lessons]],
    lr: float, stored: torch.dtype, vectors: Tensor | None = None,
) -> Iterator[tuple[int, float]]:  # fmt: skip
    """AdamW takes ``learned`` down the slope of :func:`_loss`: each step's number, and the loss before it."""
    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=0.0)
    # in float16 a quarter of the gradients would vanish, and an attack look weaker than it is
    scaler = torch.amp.GradScaler(pipe.unet.device.type, enabled=stored == torch.float16)
    for step, batch in batches:
        loss = _loss(pipe, batch, stored, vectors)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward(inputs=learned)
        scaler.step(optimizer)
        scaler.update()
        yield step, loss.item()


@contextmanager
def new_word(pipe: StableDiffusionPipeline, vector: Tensor) -> Iterator[str]:
    """Inside the block the word "x" enters the text encoder as ``vector``, (D,); no weight changes.

    ``with new_word(pipe, vector) as word: duge.sample(pipe, card.prompt(word))``. Several vectors, (W, D),
    take turns: they are for texts that say "x" W times.
    """
    token = pipe.tokenizer(PLACEHOLDER, add_special_tokens=False).input_ids[0]
    vectors = vector.reshape(-1, vector.shape[-1])

    def put(module: torch.nn.Module, args: tuple, embedded: Tensor) -> Tensor:
        where = args[0] == token  # (B, T)
        turns = torch.arange(int(where.sum()), device=vectors.device) % len(vectors)
        return embedded.masked_scatter(where[..., None], vectors[turns].to(embedded))  # (B, T, D)

    handle = pipe.text_encoder.get_input_embeddings().register_forward_hook(put)
    try:
        yield PLACEHOLDER
    finally:
        handle.remove()


def _renamed(pipe: StableDiffusionPipeline, concept: str, pictures: Pictures, words: str) -> Pictures:
    """``pictures`` that are called ``words``, not ``concept``; their texts are token ids, (n, T)."""
    texts = _reworded(pictures, model_card(pipe).subject(concept), words)
    ids = pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return replace(pictures, encoder_hidden_states=ids)


def invert_steps(
    pipe: StableDiffusionPipeline, concept: str, pictures: Pictures, steps: int = 60, lr: float = 0.05,
    batch_size: int = 8, seed: int = 0,
) -> Iterator[AttackState]:  # fmt: skip
    """Learns a new word for what ``pictures`` show, all weights frozen; yields a state after each step.

    Concept inversion (Pham et al., arXiv 2308.01508): minimise E|noise - unet(x_t, t, text(v))|^2 over the
    input embedding v of one word (textual inversion, Gal et al., arXiv 2208.01618, eq. 2), which stands where
    the pictures' prompts name ``concept``. v begins at the mean of all embeddings. Draw with it in
    :func:`new_word`. Raises ValueError for a prompt that does not name ``concept``.
    """
    asked = _renamed(pipe, concept, pictures, captions.with_article(PLACEHOLDER))
    vector = pipe.text_encoder.get_input_embeddings().weight.detach().float().mean(0).requires_grad_()
    batches = _batches(pipe, asked, batch_size, seed, steps)
    for step, loss in _descend(pipe, [vector], batches, lr, pipe.unet.dtype, vector):
        yield AttackState(step, loss, vector.detach().clone())


def search_steps(
    pipe: StableDiffusionPipeline, concept: str, pictures: Pictures, steps: int = 12, words: int = 3,
    candidates: int = 12, batch_size: int = 8, seed: int = 0,
) -> Iterator[AttackState]:  # fmt: skip
    """Seeks ``words`` of the vocabulary that make ``pipe`` denoise ``pictures`` best; yields each step's.

    A discrete adversarial prompt, towards the noise itself as UnlearnDiffAtk's (arXiv 2310.11868), by greedy
    coordinate gradient (Zou et al., arXiv 2307.15043): the loss's slope at every place's embedding says which
    words promise most; ``candidates`` of the 32 best, at random places, are tried on the same noisy pictures,
    and the best stays if it is better. Begins with random words. Only words of one token count, and none of
    the concept's own name. Draw with ``f"a photo of {state.words}"``. Raises ValueError for a prompt that
    does not name ``concept``.
    """
    asked = _renamed(pipe, concept, pictures, " ".join([PLACEHOLDER] * words))
    table = pipe.text_encoder.get_input_embeddings().weight.detach().float()  # (V, D)
    read, lots = pipe.tokenizer, torch.Generator().manual_seed(seed)
    texts = [read.decode([i], skip_special_tokens=True) for i in range(len(read))]
    alone, own = read(texts, add_special_tokens=False).input_ids, read(concept).input_ids
    usable = torch.tensor([i for i, ids in enumerate(alone) if ids == [i] and i not in own]).to(table.device)
    chosen = usable[torch.randint(len(usable), (words,), generator=lots)]  # (W,)
    stored = pipe.unet.dtype
    for step, batch in _batches(pipe, asked, batch_size, seed, steps):
        vectors = table[chosen].requires_grad_()
        loss = _loss(pipe, batch, stored, vectors)
        (slope,) = torch.autograd.grad(loss * (1024 if stored == torch.float16 else 1), [vectors])
        best = (slope @ table[usable].T).topk(min(32, len(usable)), largest=False).indices  # (W, 32)
        least = loss.item()
        for other in [chosen.clone() for _ in range(candidates)]:
            place, rank = (int(torch.randint(n, (), generator=lots)) for n in best.shape)
            other[place] = usable[best[place, rank]]
            with torch.no_grad():
                now = _loss(pipe, batch, stored, table[other]).item()
            if now < least:
                least, chosen = now, other
        yield AttackState(step, least, words=" ".join(texts[i] for i in chosen))


def relearn_steps(
    pipe: StableDiffusionPipeline, pictures: Pictures, steps: int = 40, lr: float = 2e-4,
    batch_size: int = 8, seed: int = 0,
) -> Iterator[AttackState]:  # fmt: skip
    """Fine-tunes the whole denoiser on ``pictures`` and their prompts; yields a state after each step.

    Between two states the pipeline can be used. The old weights come back at the end, after an error, or when
    the generator is closed.
    """
    trained, stored = dict(pipe.unet.named_parameters()), pipe.unet.dtype
    before = copied(trained)
    batches = _batches(pipe, pictures, batch_size, seed, steps)
    with training(pipe.unet, trained):
        try:
            for step, loss in _descend(pipe, list(trained.values()), batches, lr, stored):
                with rounded(trained, stored):
                    yield AttackState(step, loss)
        finally:
            overwrite(trained, before)
