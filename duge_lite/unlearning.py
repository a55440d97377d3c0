"""The loop: make a pipeline forget one concept, as a generator of states.

Per iteration one batch holds pictures of the concept (asked for by name, pushed away from what the
frozen reference does) and pictures of other things from a small memory (held where they are). The
reference is no second model: only the trained tensors are kept twice and swapped for its forward pass.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import pandas as pd
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from .attention import AttentionRecorder, record_attention
from .errors import DivergedError
from .losses import (
    IMPORTANCE_KINDS,
    TARGET_KINDS,
    attention_target,
    cross_attention_loss,
    estimate_importance,
    prior_preservation_loss,
    regularization_loss,
)
from .models import ModelCard, model_card, sample

TRAINABLE: dict[str, Callable[[str], bool]] = {
    "cross_attention": lambda name: ".attn2." in name,
    "kv": lambda name: ".attn2.to_k" in name or ".attn2.to_v" in name,
    "qk": lambda name: ".attn2.to_q" in name or ".attn2.to_k" in name,
    "full": lambda name: True,
}
"""Which weights learn, by the name of the choice: a test of each parameter's name."""


@dataclass(frozen=True)
class UnlearnConfig:
    """How to forget. The paper does not fix these numbers for us: every default is ours.

    Attributes:
        iterations: optimizer steps.
        batch_size, memory_batch_size: pictures of the concept and of the memory in each step.
        target_size, memory_size: how many pictures of each the model draws of itself, once, at the start.
        lr: AdamW's learning rate.
        lambda_attention: weight of the cross-attention loss (lambda_U).
        lambda_prior: weight of the prior-preservation loss (lambda_pr).
        lambda_regularization: weight of the pull back to the weights at the start (lambda_R).
        target: what the concept's attention should become: "uncond", "negative" or "clamped";
            see :func:`duge_lite.losses.attention_target`.
        scale: eta, how far past the unconditional attention a "negative" target lies.
        match: "output" compares what each cross-attention layer writes, "probs" its softmax maps.
        preserve: what the prior loss asks for on memory pictures: "reference", the frozen model's own
            prediction (ours), or "noise", the noise that was added (the paper's form, as reviews give it).
        regularizer: what weighs the pull back: "l2" all weights alike, "fisher" or "mas" by how much each
            matters for the memory; see :func:`duge_lite.losses.estimate_importance`.
        train: "cross_attention", "kv", "qk" or "full".
        grad_clip: largest norm of the gradient.
        measure_every: measure the gradient norm of each loss at every so-manieth iteration; 0 for never
            (each measurement costs about as much as an iteration).
        seed: of the pictures, the noise and the order; one seed, one result.
    """

    iterations: int = 150
    batch_size: int = 8
    memory_batch_size: int = 8
    target_size: int = 32
    memory_size: int = 128
    lr: float = 1e-3
    lambda_attention: float = 1.0
    lambda_prior: float = 100.0
    lambda_regularization: float = 10.0
    target: str = "negative"
    scale: float = 0.5
    match: str = "output"
    preserve: str = "reference"
    regularizer: str = "l2"
    train: str = "cross_attention"
    grad_clip: float = 1.0
    measure_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "memory_batch_size", "target_size", "memory_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected a whole number, at least 1")
        for name in ("lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: expected a number above 0")
        for name in ("lambda_attention", "lambda_prior", "lambda_regularization", "scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: expected 0 (off) or more")
        if not isinstance(self.measure_every, int) or self.measure_every < 0:
            raise ValueError(f"measure_every = {self.measure_every!r}: expected 0 (never) or a whole number")
        choices = {
            "target": TARGET_KINDS,
            "match": ("output", "probs"),
            "preserve": ("reference", "noise"),
            "regularizer": ("l2", *IMPORTANCE_KINDS),
            "train": tuple(TRAINABLE),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}: choose one of {', '.join(known)}")
        if self.match == "output" and self.target == "clamped":
            raise ValueError('target = "clamped" makes probabilities: it goes with match = "probs" only')

    def table(self) -> pd.DataFrame:
        """The settings as a table."""
        return pd.DataFrame({"value": pd.Series(asdict(self), dtype=object)}).rename_axis("setting")

    def to_json(self) -> str:
        """The settings as json; :meth:`from_json` reads them back."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> UnlearnConfig:
        """Raises ValueError for a setting that there is not."""
        values = json.loads(text)
        if unknown := set(values) - {f.name for f in fields(cls)}:
            raise ValueError(f"no such setting: {', '.join(sorted(unknown))}; written by another version?")
        return cls(**values)


# ---------------------------------------------------------------------------- pictures to learn from


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

    def batch(
        self, size: int, generator: torch.Generator, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, hidden states and the indices of a random batch."""
        index = torch.randint(len(self.prompts), (size,), generator=generator)
        return self.latents[index].to(device), self.encoder_hidden_states[index].to(device), index


@torch.no_grad()
def encode_prompts(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """The text encoder's hidden states, (n, T, D), float32 on the CPU; equal prompts are read once."""
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


# ---------------------------------------------------------------------------- what forgetting asks for


@dataclass(frozen=True)
class Pass:
    """One forward pass over the concept's pictures.

    Attributes:
        noise_pred: (B, 4, h, w).
        layers: per cross-attention layer its maps (B, heads, H*W, T) or, with ``match="output"``, what it
            wrote (B, H*W, C); empty when the objective does not look at attention.
    """

    noise_pred: Tensor
    layers: tuple[Tensor, ...]


@dataclass(frozen=True)
class Passes:
    """What an objective sees of one batch of the concept's pictures.

    Attributes:
        learner: the model that learns, asked for the concept; the only one with a gradient.
        concept, other: the frozen reference, asked for the concept, and for the objective's anchor instead
            (the empty prompt when there is none).
        noise: what was added to the pictures, (B, 4, h, w).
    """

    learner: Pass
    concept: Pass
    other: Pass
    noise: Tensor


@dataclass(frozen=True)
class Objective:
    """How a method forgets; everything else (pictures, memory, budget) is shared by all of them.

    Attributes:
        name: for tables.
        loss: a scalar from the passes and the settings.
        source: where it comes from.
        anchor: a concept that the reference is asked for instead; None for the empty prompt.
        looks_at_attention: whether the layers have to be recorded.
    """

    name: str
    loss: Callable[[Passes, UnlearnConfig], Tensor]
    source: str
    anchor: str | None = None
    looks_at_attention: bool = False


def _attention_loss(passes: Passes, config: UnlearnConfig) -> Tensor:
    pairs = zip(passes.concept.layers, passes.other.layers, strict=True)
    targets = [attention_target(c, u, config.target, config.scale) for c, u in pairs]
    return cross_attention_loss(passes.learner.layers, targets)


DUGE = Objective("DUGE", _attention_loss, "arXiv 2503.13769; the target is ours", looks_at_attention=True)
"""The cross-attention loss: hear, when the concept is named, what you would hear without the name."""


# ---------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class UnlearnState:
    """Where the loop is after iteration ``step`` (counted from 1); losses are unweighted.

    ``forget`` is the objective's own loss (DUGE's cross-attention loss). The ``grad_`` fields are the norms
    of the three losses' gradients, unweighted, nan where they were not measured.
    """

    step: int
    iterations: int
    loss: float
    forget: float
    prior: float
    regularization: float
    grad_forget: float = math.nan
    grad_prior: float = math.nan
    grad_regularization: float = math.nan


@contextmanager
def _swapped(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> Iterator[None]:
    """Lets the model be the reference for a moment."""
    own = {name: p.data for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            p.data = values[name]
        yield
    finally:
        for name, p in parameters.items():
            p.data = own[name]


@contextmanager
def _training(unet: torch.nn.Module, trained: dict[str, torch.nn.Parameter]) -> Iterator[None]:
    """Only ``trained`` gets gradients, in 32 bits; afterwards flags and precision are as before."""
    flags = {p: p.requires_grad for p in unet.parameters()}
    dtypes = {p: p.dtype for p in trained.values()}
    unet.requires_grad_(False)
    try:
        for p in trained.values():
            p.requires_grad_(True).data = p.data.float()
        yield
    finally:
        for p, dtype in dtypes.items():
            p.data, p.grad = p.data.to(dtype), None
        for p, flag in flags.items():
            p.requires_grad_(flag)


def _importance(
    unet: torch.nn.Module,
    trained: dict[str, torch.nn.Parameter],
    memory: Pictures,
    scheduler: DDPMScheduler,
    config: UnlearnConfig,
) -> dict[str, Tensor]:
    """Importance of ``trained`` for the memory, from 16 batches that depend on the seed alone."""
    generator = torch.Generator().manual_seed(config.seed)

    def scalars() -> Iterator[Tensor]:
        for _ in range(16):
            clean, text, _ = memory.batch(config.memory_batch_size, generator, unet.device)
            noise = torch.randn(clean.shape, generator=generator).to(unet.device)
            timesteps = torch.randint(len(scheduler.betas), (len(clean),), generator=generator).to(
                unet.device
            )
            noise_pred = unet(scheduler.add_noise(clean, noise, timesteps), timesteps, text).sample.float()
            if config.regularizer == "fisher":
                yield prior_preservation_loss(noise_pred, _to_predict(scheduler, clean, noise, timesteps))
            else:
                yield noise_pred.square().mean()

    return estimate_importance(trained, scalars(), config.regularizer)


def _to_predict(scheduler: DDPMScheduler, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What a perfect model would answer: the noise, or the velocity in models that predict that."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    return noise


def _stop_if_not_finite(
    losses: dict[str, Tensor], norm: Tensor, step: int, config: UnlearnConfig, put_back: Callable[[], None]
) -> None:
    if torch.isfinite(sum(losses.values()) + norm):
        return
    put_back()
    bad = [name for name, value in losses.items() if not torch.isfinite(value)]
    what = (
        f"{' and '.join(bad)} loss became {losses[bad[0]].item()}"
        if bad
        else f"gradient's norm is {norm.item()}"
    )
    raise DivergedError(
        f"the {what} at iteration {step}; the weights are back as they were. "
        f"Lower lr (now {config.lr}) or the loss's weight."
    )


def unlearn_steps(
    pipe: StableDiffusionPipeline,
    concept: str,
    config: UnlearnConfig = UnlearnConfig(),  # noqa: B008 (frozen)
    memory: Pictures | None = None,
    objective: Objective = DUGE,
) -> Iterator[UnlearnState]:
    """Forgets ``concept`` in place, yielding a state after each iteration.

    Stopping early (``break``) keeps what was learned so far. ``memory`` defaults to pictures of the
    card's other concepts, drawn by the pipeline itself. Between two states the pipeline can be used.

    Raises UnknownConceptError for a concept that the model's card does not list, and DivergedError when
    a loss is no longer finite; the weights are then put back as they were.
    """
    card = model_card(pipe)
    card.check(concept)
    unet, device = pipe.unet, pipe.unet.device
    generator = torch.Generator().manual_seed(config.seed)
    repeats = -(-config.target_size // len(card.styles))
    prompts = (card.prompts(concept) * repeats)[: config.target_size]
    noise_seed = 1_000_000 * (config.seed + 1)  # far from the seeds of evaluation and of other runs
    target = draw_pictures(pipe, prompts, seed=noise_seed)
    if memory is None:
        texts = memory_prompts(card, [concept], config.memory_size, config.seed)
        memory = draw_pictures(pipe, texts, seed=noise_seed + 500_000)
    others = card.prompts(card.check(objective.anchor)) if objective.anchor else [""] * len(card.styles)
    other_states = encode_prompts(pipe, (others * repeats)[: config.target_size])  # (n, T, D)
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    trained = {n: p for n, p in unet.named_parameters() if TRAINABLE[config.train](n)}
    b, m = config.batch_size, config.memory_batch_size
    precision = unet.dtype
    # no cache: it would keep the reference's 16-bit weights for the learning model's pass
    mixed = torch.autocast(device.type, precision, enabled=precision != torch.float32, cache_enabled=False)
    weights = (config.lambda_attention, config.lambda_prior, config.lambda_regularization)

    def layers_of(record: AttentionRecorder | None, part: slice) -> tuple[Tensor, ...]:
        if record is None:
            return ()
        return tuple(a[part] for a in (record.outputs or record.probs).values())

    with _training(unet, trained):
        reference = {name: p.detach().clone() for name, p in trained.items()}
        importance = None
        if config.regularizer != "l2":
            with mixed:
                importance = _importance(unet, trained, memory, noise_scheduler, config)
        optimizer = torch.optim.AdamW(trained.values(), lr=config.lr, weight_decay=0.0)
        scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)

        def put_back() -> None:
            for name, p in trained.items():
                p.data = reference[name]

        for step in range(1, config.iterations + 1):
            x_target, c_target, index = target.batch(b, generator, device)
            x_memory, c_memory, _ = memory.batch(m, generator, device)
            clean = torch.cat([x_target, x_memory])  # (b + m, 4, h, w)
            noise = torch.randn(clean.shape, generator=generator).to(device)
            timesteps = torch.randint(len(noise_scheduler.betas), (b + m,), generator=generator).to(device)
            noisy = noise_scheduler.add_noise(clean, noise, timesteps)
            text = torch.cat([c_target, c_memory])  # (b + m, T, D)
            watch = nullcontext()
            if objective.looks_at_attention:
                by_output = config.match == "output"
                watch = record_attention(
                    unet, tuple(clean.shape[-2:]), probs=not by_output, outputs=by_output
                )

            with mixed, watch as record:
                with torch.no_grad(), _swapped(trained, reference):  # the concept, the memory, the other
                    frozen = unet(
                        torch.cat([noisy, noisy[:b]]),
                        torch.cat([timesteps, timesteps[:b]]),
                        torch.cat([text, other_states[index].to(device)]),
                    ).sample
                    asked = Pass(frozen[:b], layers_of(record, slice(b)))
                    other = Pass(frozen[b + m :], layers_of(record, slice(b + m, None)))
                noise_pred = unet(noisy, timesteps, text).sample
                learner = Pass(noise_pred[:b], layers_of(record, slice(b)))

            wanted = frozen[b : b + m]
            if config.preserve == "noise":
                wanted = _to_predict(noise_scheduler, clean, noise, timesteps)[b:]
            losses = {
                "attention" if objective is DUGE else objective.name: objective.loss(
                    Passes(learner, asked, other, noise[:b]), config
                ),
                "prior": prior_preservation_loss(noise_pred[b:], wanted),
                "regularization": regularization_loss(trained, reference, importance),
            }
            loss = sum(w * v for w, v in zip(weights, losses.values(), strict=True))
            norms = []
            if config.measure_every and (step - 1) % config.measure_every == 0:
                norms = [_gradient_norm(v, trained) for v in losses.values()]
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), config.grad_clip)
            if not scaler.is_enabled() or not torch.isfinite(loss):  # a scaler skips steps that overflow
                _stop_if_not_finite(losses, norm, step, config, put_back)
            scaler.step(optimizer)
            scaler.update()
            values = [float(v.detach()) for v in (loss, *losses.values())]
            with _swapped(trained, {n: p.data.to(precision) for n, p in trained.items()}):
                yield UnlearnState(
                    step, config.iterations, *values, *norms
                )  # a model that can draw a preview


def _gradient_norm(loss: Tensor, trained: dict[str, torch.nn.Parameter]) -> float:
    gradients = torch.autograd.grad(loss, list(trained.values()), retain_graph=True, allow_unused=True)
    return float(torch.stack([g.float().norm() for g in gradients if g is not None]).norm())


@dataclass
class UnlearningRun:
    """What :func:`unlearn` did, and the way back.

    Attributes:
        concept, config, objective: what was asked; ``objective`` is its name.
        history: a row per iteration: loss, forget, prior, regularization, and the gradient norms.
        seconds: wall-clock time, the drawing of the memory included.
        before: the trained weights from before, on the CPU.
    """

    pipe: StableDiffusionPipeline = field(repr=False)
    concept: str
    config: UnlearnConfig
    history: pd.DataFrame = field(repr=False)
    seconds: float
    before: dict[str, Tensor] = field(repr=False)
    objective: str = DUGE.name

    def restore(self) -> None:
        """Puts the weights from before the run back into the pipeline."""
        parameters = dict(self.pipe.unet.named_parameters())
        with torch.no_grad():
            for name, value in self.before.items():
                parameters[name].copy_(value)

    def save(self, folder: str | Path) -> Path:
        """Writes the trained weights as they are now, the settings and the history; all or nothing.

        Raises FileExistsError rather than overwrite a folder.
        """
        folder = Path(folder)
        if folder.exists():
            raise FileExistsError(f"{folder} exists already: choose another folder, or remove it first")
        draft = folder.with_name(folder.name + ".part")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        now = dict(self.pipe.unet.named_parameters())
        save_file({n: now[n].detach().cpu().contiguous() for n in self.before}, draft / "weights.safetensors")
        about = {"concept": self.concept, "objective": self.objective, "seconds": self.seconds}
        (draft / "run.json").write_text(json.dumps(about | {"config": asdict(self.config)}, indent=1))
        self.history.to_csv(draft / "history.csv")
        os.replace(draft, folder)
        return folder

    @classmethod
    def load(cls, folder: str | Path, pipe: StableDiffusionPipeline) -> UnlearningRun:
        """Puts the weights that :meth:`save` wrote into ``pipe``; ``restore()`` takes them out again.

        Raises FileNotFoundError when the folder holds no run, ValueError when it is another model's.
        """
        folder = Path(folder)
        if not (folder / "run.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no run.json: expected a folder written by run.save(folder)"
            )
        about = json.loads((folder / "run.json").read_text())
        weights = load_file(folder / "weights.safetensors")
        parameters = dict(pipe.unet.named_parameters())
        strange = [n for n, w in weights.items() if n not in parameters or parameters[n].shape != w.shape]
        if strange:
            raise ValueError(
                f"{folder} belongs to another model: {strange[0]} and {len(strange) - 1} more do not fit"
            )
        before = {n: parameters[n].detach().cpu().clone() for n in weights}
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[name].copy_(weight)
        config = UnlearnConfig.from_json(json.dumps(about.pop("config")))
        history = pd.read_csv(folder / "history.csv", index_col="step")
        return cls(pipe=pipe, config=config, history=history, before=before, **about)


def unlearn(
    pipe: StableDiffusionPipeline,
    concept: str,
    config: UnlearnConfig = UnlearnConfig(),  # noqa: B008 (frozen)
    memory: Pictures | None = None,
    on_step: Callable[[UnlearnState], None] | None = None,
    progress: bool = True,
    objective: Objective = DUGE,
) -> UnlearningRun:
    """Makes ``pipe`` forget ``concept``, in place: ``duge.unlearn(pipe, "apple")``.

    Shows a progress bar; ``on_step(state)`` is called after every iteration. An interruption (the stop
    button) keeps what has been learned so far and returns the run. For errors see :func:`unlearn_steps`.
    """
    started = time.perf_counter()
    chosen = TRAINABLE[config.train]
    before = {n: p.detach().cpu().clone() for n, p in pipe.unet.named_parameters() if chosen(n)}
    rows: list[dict] = []
    steps = unlearn_steps(pipe, concept, config, memory, objective)
    bar = tqdm(steps, total=config.iterations, desc=f"forgetting {concept}", disable=not progress)
    try:
        for state in bar:
            rows.append(asdict(state))
            bar.set_postfix(forget=f"{state.forget:.3f}", prior=f"{state.prior:.4f}")
            if on_step is not None:
                on_step(state)
    except KeyboardInterrupt:
        bar.write(f"stopped after {len(rows)} of {config.iterations} iterations; what was learned is kept")
    finally:
        steps.close()
        bar.close()
    columns = [f.name for f in fields(UnlearnState) if f.name != "iterations"]
    history = pd.DataFrame(rows, columns=columns).set_index("step")
    seconds = time.perf_counter() - started
    return UnlearningRun(pipe, concept, config, history, seconds, before, objective.name)
