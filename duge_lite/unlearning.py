"""The loop: make a pipeline forget one concept, as a generator of states.

First ask, then learn. Before anything is trained the model draws pictures of the concept and of other things
(its memory), and says what it predicts and hears for noisy versions of them: those answers are the frozen
reference (:mod:`duge_lite.lessons`). Then each iteration is one forward and one backward pass over a batch of
both. All that the device holds beside the model is a 16-bit copy of the trained tensors, to pull back to.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import pandas as pd
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from .attention import AttentionRecorder
from .config import ADAPTER, TRAINABLE, UnlearnConfig
from .errors import DivergedError, OutOfMemoryError
from .lessons import (
    DUGE,
    Lessons,
    Noised,
    Objective,
    Pictures,
    ask_about_concept,
    ask_about_memory,
    check_memory,
    draw_pictures,
    encode_prompts,
    fill_memory,
    passed,
    watching,
)
from .losses import estimate_importance, free_directions, prior_preservation_loss, regularization_loss
from .models import ModelCard, check_reads_one_text, model_card
from .plot import Plot
from .processes import averaged, check_batches, from_main, is_main, launched


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
def swapped(parameters: dict[str, Tensor], values: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Lets the model have other weights for a moment; None for its own."""
    own = {name: p.data for name, p in parameters.items()}
    torch.clear_autocast_cache()  # a caller's: see overwrite()
    try:
        for name, p in parameters.items():
            p.data = p.data if values is None else values[name]
        yield
    finally:
        for name, p in parameters.items():
            p.data = own[name]
        torch.clear_autocast_cache()


@contextmanager
def training(unet: torch.nn.Module, trained: dict[str, torch.nn.Parameter]) -> Iterator[None]:
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


@contextmanager
def sparing(pipe: StableDiffusionPipeline) -> Iterator[Callable[[], None]]:
    """Recomputes activations of the UNet, and keeps the pipeline's other models off its device.

    Those come back when they are used; what is yielded sends them away again. Afterwards all is as before.
    """
    unet, recomputes = pipe.unet, pipe.unet.is_gradient_checkpointing
    models = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module) and m is not unet]
    homes = {m: m.device for m in models}
    try:
        unet.enable_gradient_checkpointing()
        hooks = [cpu_offload_with_hook(m, unet.device)[1] for m in homes]
        yield lambda: [hook.offload() for hook in hooks]
    finally:
        for m, home in homes.items():
            remove_hook_from_module(m).to(home)
        if not recomputes:
            unet.disable_gradient_checkpointing()


def _importance(
    unet: torch.nn.Module, trained: dict[str, torch.nn.Parameter], asked: Noised, config: UnlearnConfig
) -> dict[str, Tensor]:
    """Importance of ``trained`` for the noised memory, a batch at a time."""
    size = config.memory_batch_size

    def scalars() -> Iterator[Tensor]:
        for i in range(0, len(asked.noisy), size):
            inputs = (asked.noisy, asked.timesteps, asked.encoder_hidden_states, asked.truth)
            *inputs, truth = (x[i : i + size].to(unet.device) for x in inputs)
            noise_pred = unet(*inputs).sample.float()
            by_loss = config.regularizer == "fisher"
            yield prior_preservation_loss(noise_pred, truth) if by_loss else noise_pred.square().mean()

    return estimate_importance(trained, scalars(), config.regularizer)


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


def trainable_parameters(unet: torch.nn.Module, config: UnlearnConfig) -> dict[str, torch.nn.Parameter]:
    """The tensors that ``config.train`` lets learn, by name.

    ``train="lora"`` adds an adapter named "duge" to the UNet if there is none yet; it changes no answer
    until it has learned. Its first weights depend on the seed alone.

    Raises ValueError for Stable Diffusion XL.
    """
    check_reads_one_text(unet)
    if config.train == "lora" and ADAPTER not in getattr(unet, "peft_config", {}):
        from peft import LoraConfig

        modules = r".*\.attn2\.(to_q|to_k|to_v|to_out\.0)"
        updates = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=modules)
        flags = {name: p.requires_grad for name, p in unet.named_parameters()}
        with torch.random.fork_rng(devices=[]):  # peft draws from the global state: it is put back
            torch.manual_seed(config.seed)
            unet.add_adapter(updates, ADAPTER)
        for name, p in plain_parameters(unet).items():
            p.requires_grad_(flags.get(name, True))  # peft freezes the rest of the model
    lora = config.train == "lora"
    chosen = TRAINABLE[config.train]
    return {n: p for n, p in plain_parameters(unet).items() if (".lora_" in n) == lora and chosen(n)}


def overwrite(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Writes ``values`` over the parameters of the same names, in place.

    A caller's ``torch.autocast`` forgets its 16-bit copies, or it would go on with the old weights.
    """
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    torch.clear_autocast_cache()


def plain_parameters(unet: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """All parameters, by the names that they have without an adapter too."""
    return {name.replace(".base_layer.", "."): p for name, p in unet.named_parameters()}


def _drop_idle_adapter(unet: torch.nn.Module) -> None:
    """Takes our adapter out again when it changes nothing."""
    ours = [p for n, p in unet.named_parameters() if TRAINABLE["lora"](n) and ".lora_B." in n]
    if not ours or any(p.any() for p in ours):
        return
    if len(unet.peft_config) == 1:
        unet.unload_lora()
    else:
        unet.delete_adapters(ADAPTER)


def _questions(
    card: ModelCard, concept: str, earlier: Sequence[str], objective: Objective, config: UnlearnConfig
) -> tuple[list[str], list[str]]:
    """Prompts of the concept and a share of earlier ones; and what the reference is asked in their place.

    No prompt names two that are to go: what the reference says without the one would teach the other again.
    """
    anchors = {}  # the first of each kind: of styles, the plain one too, and of objects
    for anchor in reversed(objective.anchors):
        anchors[anchor in card.styles] = anchor if anchor in card.styles else card.check(anchor)
    for name in (concept, *earlier):
        is_style = card.check(name) in card.styles
        if anchors and is_style not in anchors:
            given = ", ".join(objective.anchors)
            raise ValueError(
                f"anchor {given!r} for {name!r}: choose a style for a style, an object for an object"
            )
        if anchors and anchors[is_style] in (concept, *earlier):
            raise ValueError(f"anchor {anchors[is_style]!r} is to go itself: choose one that stays")

    def both(name: str, count: int) -> list[tuple[str, str]]:
        prompts = card.prompts(name)
        others = card.nameless(name) if config.without == "nameless" else [""] * len(prompts)
        if anchors:
            others = card.prompts(anchors[name in card.styles])
        gone = {text for other in (*earlier, concept) if other != name for text in card.prompts(other)}
        pairs = list(zip(prompts, others, strict=True))
        pairs = [pair for pair in pairs if pair[0] not in gone] or pairs
        return (pairs * -(-count // len(pairs)))[:count]

    old = round(config.revisit * config.target_size) if earlier else 0
    spread = [len(range(i, old, len(earlier))) for i in range(len(earlier))]  # whole numbers that sum to old
    asked = both(concept, config.target_size - old)
    for name, count in zip(earlier, spread, strict=True):
        asked += both(name, count)
    prompts, others = zip(*asked, strict=True)
    return list(prompts), list(others)


def batch_losses(
    unet: torch.nn.Module,
    forget: Lessons,
    keep: Lessons,
    objective: Objective,
    record: AttentionRecorder | None,
) -> tuple[Tensor, Tensor]:
    """The objective's loss and the prior-preservation loss, from one pass over both batches."""
    names = ("noisy", "timesteps", "encoder_hidden_states")
    inputs = (torch.cat([getattr(part, name) for part in (forget, keep)]) for name in names)
    noise_pred = unet(*inputs).sample  # (b + m, 4, h, w)
    size = len(forget.noisy)
    learner = passed(noise_pred, record, slice(size))
    loss = objective.loss(learner, forget.wanted)
    if record is not None:
        record.stop()  # or it would hold on to all that the backward pass computes again
    return loss, prior_preservation_loss(noise_pred[size:], keep.wanted[0])


def unlearn_steps(
    pipe: StableDiffusionPipeline,
    concept: str,
    config: UnlearnConfig | None = None,
    memory: Pictures | None = None,
    objective: Objective = DUGE,
    base: Mapping[str, Tensor] | None = None,
    earlier: Sequence[str] = (),
) -> Iterator[UnlearnState]:
    """Forgets ``concept`` (an object or a style) in place, yielding a state after each iteration.

    Stopping early (``break``) keeps what was learned so far. ``config`` defaults to that of the model's card,
    ``memory`` to pictures of the card's other concepts, drawn by the pipeline itself. After other requests
    (see :func:`duge_lite.sequence.unlearn_sequence`) ``base`` holds the trained tensors of the model before
    the first of them, and ``earlier`` their concepts. Between two states the pipeline can be used; with
    ``low_memory`` its text encoder and autoencoder then come to the device by themselves, for that long.

    Raises UnknownConceptError for a concept that the model's card does not list, ValueError for a memory
    that is empty or shows what is to go, or for a batch that several processes cannot share equally,
    DivergedError when a loss is no longer finite, OutOfMemoryError when the device's memory is too small;
    after the last two the weights are put back as they were.
    """
    card = model_card(pipe)
    config = config or card.config()
    check_batches(batch_size=config.batch_size, memory_batch_size=config.memory_batch_size)
    prompts, others = _questions(card, concept, earlier, objective, config)
    if memory is not None:
        check_memory(card, memory, [*earlier, concept])
    generator = torch.Generator().manual_seed(config.seed)
    unet, device = pipe.unet, pipe.unet.device
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    trained = trainable_parameters(unet, config)
    first = None
    if base is not None and config.reference == "base":
        first = {name: value.to(trained[name]) for name, value in base.items()}
    with swapped(trained, first):  # pictures are drawn by whose answers count
        if objective.partial:
            target = Noised.half_drawn(pipe, prompts, config.lessons, config.picture_seed, generator)
        else:
            pictures = draw_pictures(pipe, prompts, seed=config.picture_seed)
            target = Noised.of(pictures, config.lessons, scheduler, generator)
        memory = memory or fill_memory(pipe, [*earlier, concept], config)
    kept = Noised.of(memory, config.lessons, scheduler, generator)
    other_states = encode_prompts(pipe, others)[target.index]  # (n, T, D)
    stored = unet.dtype  # of the pipeline; what is trained is in 32 bits meanwhile
    asked = torch.is_autocast_enabled(device.type)  # by the caller
    precision = torch.get_autocast_dtype(device.type) if asked else stored
    # without autocast's cache, which would outlive the weights that are swapped in
    mixed = torch.autocast(device.type, precision, enabled=precision != torch.float32, cache_enabled=False)
    weights = (config.lambda_attention, config.lambda_prior, config.lambda_regularization)

    step = 0
    spare = sparing(pipe) if config.low_memory else nullcontext(lambda: None)
    with training(unet, trained), spare as send_away:
        start = {name: p.detach().cpu().clone() for name, p in trained.items()}  # exact, off the device
        pulls = start if base is None or config.anchor == "previous" else base
        anchor = {n: v.to(device, torch.float16) for n, v in pulls.items()}  # all that is kept on the device

        readers = [n for n in trained if n.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))]
        hold = {n: start[n].to(device) for n in readers if config.protect}
        if hold:
            states = memory.encoder_hidden_states.flatten(0, 1).to(device)  # (m*T, D)
            free = free_directions(states, config.protect)

        def put_back() -> None:
            for name, p in trained.items():
                p.data = start[name].to(device)

        try:
            with mixed, swapped(trained, first):
                lessons = ask_about_concept(unet, target, other_states, objective, config)
                memory_lessons = ask_about_memory(unet, kept, config)
                l2 = config.regularizer == "l2"
                importance = None if l2 else _importance(unet, trained, kept, config)
            optimizer = torch.optim.AdamW(trained.values(), lr=config.lr, weight_decay=0.0)
            scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)

            for step in range(1, config.iterations + 1):
                forget = lessons.batch(config.batch_size, generator, device, shared=True)
                keep = memory_lessons.batch(config.memory_batch_size, generator, device, shared=True)
                # watched to the end of the backward pass: gradient checkpointing runs the layers again
                with watching(unet, objective, config, memory.latents.shape[-2:]) as record:
                    with mixed:
                        forget_loss, prior_loss = batch_losses(unet, forget, keep, objective, record)
                    losses = {
                        "attention" if objective is DUGE else objective.name: forget_loss,
                        "prior": prior_loss,
                        "regularization": regularization_loss(trained, anchor, importance),
                    }
                    loss = sum(w * v for w, v in zip(weights, losses.values(), strict=True))
                    norms = []
                    if config.measure_every and (step - 1) % config.measure_every == 0:
                        scaled = [_gradient_norm(scaler.scale(v), trained) for v in losses.values()]
                        norms = [norm / scaler.get_scale() for norm in scaled]  # 16 bits would lose them
                    optimizer.zero_grad(set_to_none=True)
                    scaler.scale(loss).backward()
                loss, *parts = averaged(torch.stack([loss, *losses.values()]).detach())
                losses = dict(zip(losses, parts, strict=True))
                for p in trained.values():
                    p.grad = averaged(p.grad)
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(trained.values(), config.grad_clip)
                if not scaler.is_enabled() or not torch.isfinite(loss):  # a scaler skips steps that overflow
                    _stop_if_not_finite(losses, norm, step, config, put_back)
                scaler.step(optimizer)
                scaler.update()
                for name, held in hold.items():
                    trained[name].data = held + (trained[name].data - held) @ free
                values = [float(v) for v in (loss, *losses.values())]
                with swapped(trained, {name: p.data.to(stored) for name, p in trained.items()}):
                    yield UnlearnState(step, config.iterations, *values, *norms)  # previews can be drawn
                send_away()
        except torch.OutOfMemoryError as error:
            put_back()
            raise OutOfMemoryError(
                f"{device} ran out of memory at iteration {step}; the weights are back as they were. Lower "
                f"batch_size (now {config.batch_size}) and memory_batch_size "
                f"(now {config.memory_batch_size}), set low_memory=True (now {config.low_memory}), or train "
                f'less with train="kv" or train="lora" (now "{config.train}").'
            ) from error


def _peak_memory(device: torch.device) -> float:
    """In MB; see UnlearningRun.memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _gradient_norm(loss: Tensor, trained: dict[str, torch.nn.Parameter]) -> float:
    gradients = torch.autograd.grad(loss, list(trained.values()), retain_graph=True, allow_unused=True)
    gradients = averaged([g for g in gradients if g is not None])
    return float(torch.stack([g.float().norm() for g in gradients]).norm())


@dataclass
class UnlearningRun:
    """What :func:`unlearn` did, and the way back.

    Attributes:
        concept, config, objective: what was asked; ``objective`` is its name.
        history: a row per iteration: loss, forget, prior, regularization, and the gradient norms.
        seconds: wall-clock time, the drawing of the memory included.
        before: the trained weights from before, on the CPU.
        passes: pictures that went through the UNet, whatever for (a guided sampling step counts two).
        memory: the most that was ever in use, in MB: on CUDA of the GPU during this run, elsewhere of the
            process so far (nan where the system does not tell). What grows from run to run leaks.

    Of several processes each counts its own ``passes`` and ``memory``.
    """

    pipe: StableDiffusionPipeline = field(repr=False)
    concept: str
    config: UnlearnConfig
    history: pd.DataFrame = field(repr=False)
    seconds: float
    before: dict[str, Tensor] = field(repr=False)
    objective: str = DUGE.name
    passes: int = 0
    memory: float = math.nan

    def restore(self) -> None:
        """Puts the weights from before the run back into the pipeline."""
        parameters = plain_parameters(self.pipe.unet)  # an adapter that changes nothing is gone already
        overwrite(parameters, {n: value for n, value in self.before.items() if n in parameters})
        _drop_idle_adapter(self.pipe.unet)

    def plot(self) -> Plot:
        """The loss curves, as a figure."""
        from .visualize import loss_curves  # figures know runs, runs know figures only here

        return loss_curves(self.history, f"Forgetting “{self.concept}”")

    def save(self, folder: str | Path) -> Path:
        """Writes the trained weights as they are now, the settings and the history; all or nothing.

        Raises FileExistsError rather than overwrite a folder, OSError when the disk is full.
        """
        return from_main(lambda: self._write(Path(folder)))

    def _write(self, folder: Path) -> Path:
        if folder.exists():
            raise FileExistsError(f"{folder} exists already: choose another folder, or remove it first")
        draft = folder.with_name(folder.name + ".part")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        parameters = plain_parameters(self.pipe.unet)
        now = {n: parameters[n].detach().cpu().contiguous() for n in self.before}
        facts = ("concept", "objective", "seconds", "passes", "memory")
        about = {name: getattr(self, name) for name in facts}
        try:
            save_file(now, draft / "weights.safetensors")
            (draft / "run.json").write_text(json.dumps(about | {"config": asdict(self.config)}, indent=1))
            self.history.to_csv(draft / "history.csv")
            os.replace(draft, folder)
        except Exception as error:  # a full disk: safetensors has its own kind of error for it
            shutil.rmtree(draft, ignore_errors=True)
            size = sum(value.nbytes for value in now.values()) / 1e6
            raise OSError(
                f"could not write {folder} ({error}): it needs {size:.1f} MB of free disk"
            ) from error
        return folder

    def export_lora(self, folder: str | Path) -> Path:
        """Writes the low-rank updates so that plain diffusers reads them: ``pipe.load_lora_weights(folder)``.

        For one model in place of two parts: ``pipe.fuse_lora()``, ``pipe.unload_lora_weights()``, and then
        ``pipe.save_pretrained(folder)``. (Without the first two it writes what nobody can load.)

        Raises ValueError when the run trained no LoRA, or was restored.
        """
        if ADAPTER not in getattr(self.pipe.unet, "peft_config", {}):
            raise ValueError(f'no LoRA in the pipeline: forget with train="lora" (now "{self.config.train}")')
        from peft import get_peft_model_state_dict

        layers = get_peft_model_state_dict(self.pipe.unet, adapter_name=ADAPTER)
        from_main(lambda: self.pipe.save_lora_weights(folder, layers, safe_serialization=True))
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path, pipe: StableDiffusionPipeline) -> UnlearningRun:
        """Puts the weights that :meth:`save` wrote into ``pipe``; ``restore()`` takes them out again.

        Raises FileNotFoundError when the folder holds no run, ValueError when it is damaged or belongs to
        another model.
        """
        folder = Path(folder)
        if not (folder / "run.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no run.json: expected a folder written by run.save(folder)"
            )
        try:
            about = json.loads((folder / "run.json").read_text())
            weights = load_file(folder / "weights.safetensors")
            history = pd.read_csv(folder / "history.csv", index_col="step")
        except Exception as error:  # json, safetensors and pandas each raise their own kinds
            raise ValueError(
                f"{folder} is damaged ({error}): remove it; a sequence will then do this request again"
            ) from error
        config = UnlearnConfig.from_json(json.dumps(about.pop("config")))
        parameters = trainable_parameters(pipe.unet, config)
        strange = [n for n, w in weights.items() if n not in parameters or parameters[n].shape != w.shape]
        if strange:
            _drop_idle_adapter(pipe.unet)
            raise ValueError(
                f"{folder} belongs to another model: {strange[0]} and {len(strange) - 1} more do not fit"
            )
        before = {n: parameters[n].detach().cpu().clone() for n in weights}
        overwrite(parameters, weights)
        return cls(pipe=pipe, config=config, history=history, before=before, **about)


def unlearn(
    pipe: StableDiffusionPipeline,
    concept: str,
    config: UnlearnConfig | None = None,
    memory: Pictures | None = None,
    on_step: Callable[[UnlearnState], None] | None = None,
    progress: bool = True,
    objective: Objective = DUGE,
    base: Mapping[str, Tensor] | None = None,
    earlier: Sequence[str] = (),
) -> UnlearningRun:
    """Makes ``pipe`` forget ``concept``, in place: ``duge.unlearn(pipe, "apple")``.

    Shows a progress bar; ``on_step(state)`` is called after every iteration. An interruption (the stop
    button) keeps what has been learned so far and returns the run; after any error the weights are as they
    were. For the other arguments and the errors see :func:`unlearn_steps`.

    Under ``accelerate launch`` the processes share each batch and learn the same weights as one alone; an
    interruption then ends them (:mod:`duge_lite.processes`).
    """
    started = time.perf_counter()
    config = config or model_card(pipe).config()
    model_card(pipe).check(concept)
    trained = trainable_parameters(pipe.unet, config)
    before = {n: p.detach().cpu().clone() for n, p in trained.items()}
    rows: list[dict] = []
    passes = 0

    def count(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal passes
        passes += len(args[0] if args else kwargs["sample"])

    if pipe.unet.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pipe.unet.device)
    counter = pipe.unet.register_forward_pre_hook(count, with_kwargs=True)
    steps = unlearn_steps(pipe, concept, config, memory, objective, base, earlier)
    progress = progress and is_main()
    bar = tqdm(steps, total=config.iterations, desc=f"forgetting {concept}", disable=not progress)
    try:
        for state in bar:
            rows.append(asdict(state))
            bar.set_postfix(forget=f"{state.forget:.3f}", prior=f"{state.prior:.4f}")
            if on_step is not None:
                on_step(state)
    except KeyboardInterrupt:
        if launched():  # each process was stopped somewhere else
            raise
        if progress:
            bar.write(
                f"stopped after {len(rows)} of {config.iterations} iterations; what was learned is kept"
            )
    except Exception:  # there will be no run to undo it with
        steps.close()
        overwrite(trained, before)
        raise
    finally:
        steps.close()
        bar.close()
        counter.remove()
        if config.train == "lora":
            _drop_idle_adapter(pipe.unet)
    columns = [f.name for f in fields(UnlearnState) if f.name != "iterations"]
    history = pd.DataFrame(rows, columns=columns).set_index("step")
    seconds = time.perf_counter() - started
    memory = _peak_memory(pipe.unet.device)
    return UnlearningRun(pipe, concept, config, history, seconds, before, objective.name, passes, memory)
