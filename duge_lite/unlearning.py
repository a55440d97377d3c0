"""Make a pipeline forget: ``duge.unlearn(pipe, "apple")``.

How a request travels: the card turns a name into a :class:`~duge_lite.concepts.Concept`; the
:class:`~duge_lite.solver.PictureBook` knows what the layers saw and what is gone already; one of the two
solvers finds new weights; the :class:`UnlearningRun` is the way back.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import pandas as pd
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from safetensors.torch import load, save_file
from torch import Tensor
from tqdm.auto import tqdm

from .concepts import Concept, ModelCard, model_card
from .config import UnlearnConfig
from .gradient import DUGE, Noised, Objective, UnlearnState, gradient_steps, trainable_parameters
from .models import check_pipeline, overwrite
from .processes import from_main, is_main, launched
from .solver import PictureBook, fingerprint

_NUMBERS = ("objective", "seconds", "memory")  # of a run, in run.json
GRADIENT_MEMORY = 48
"""How many pictures the gradient solver remembers when the settings do not say."""


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


@dataclass
class UnlearningRun:
    """What :func:`unlearn` did, and the way back.

    Attributes:
        concepts: what was asked to go.
        config, objective: how; ``objective`` is the method's name.
        history: of the exact solver a row per layer, the three losses before and after; of the gradient
            solver a row per iteration: loss, forget, prior, regularization, and the gradient norms.
        seconds: wall-clock time, the drawing of the memory included.
        before: the weights that changed, as they were, on the CPU.
        base: the cross-attention weights of the model before anything went, by name.
        memory: the most that was ever in use, in MB: on CUDA of the GPU during this run, elsewhere of the
            process so far (nan where the system does not tell). What grows from run to run leaks.
    """

    pipe: DiffusionPipeline = field(repr=False)
    concepts: tuple[Concept, ...]
    config: UnlearnConfig
    history: pd.DataFrame = field(repr=False)
    seconds: float
    before: Mapping[str, Tensor] = field(repr=False)
    base: Mapping[str, Tensor] = field(repr=False, default_factory=dict)
    objective: str = DUGE.name
    memory: float = math.nan

    @property
    def concept(self) -> str:
        """What went, in words."""
        return ", ".join(c.name for c in self.concepts)

    def restore(self) -> None:
        """Puts the weights from before the run back into the pipeline."""
        overwrite(dict(self.pipe.unet.named_parameters()), self.before)

    def weights(self) -> dict[str, Tensor]:
        """What the run changed, as it is in the pipeline now; on the CPU."""
        parameters = dict(self.pipe.unet.named_parameters())
        return {name: parameters[name].detach().cpu().clone() for name in self.before}

    def plot(self):
        """The losses as a figure: per layer before and after, or over the iterations."""
        from . import figures

        title = f"Forgetting “{self.concept}”"
        draw = figures.loss_curves if self.history.index.name == "step" else figures.losses_by_layer
        return draw(self.history, title)

    @torch.no_grad()
    def noise_loss(self, count: int = 32) -> pd.Series:
        """The prior-preservation loss that the exact solver does not look at: of the predicted noise.

        On ``count`` noisy versions of memory pictures, at moments that nobody learned from. Returns
        ``prior``, the mean squared error against the reference's prediction, and ``share``, the same as a
        share of the prediction's mean square.
        """
        book = PictureBook.known(self.pipe)
        if book is None:
            raise ValueError(
                "the pipeline's weights are not this run's any more: there is nothing to compare"
            )
        stay = [p for p in book.memory if not any(c.named_in(p) for c in book.gone(self.pipe))][:16]
        scheduler = DDPMScheduler.from_config(self.pipe.scheduler.config)
        generator = torch.Generator().manual_seed(self.config.seed + 1)
        asked = Noised.of(book.pictures(self.pipe, stay), count, scheduler, generator)
        unet, parts = self.pipe.unet, (asked.noisy, asked.timesteps, asked.encoder_hidden_states)
        inputs = [x.to(unet.device) for x in parts]
        inputs[0], inputs[2] = inputs[0].to(unet.dtype), inputs[2].to(unet.dtype)
        now = unet(*inputs).sample.float()
        with book.at_base(self.pipe):
            was = unet(*inputs).sample.float()
        error = (now - was).square().mean()
        return pd.Series({"prior": float(error), "share": float(error / was.square().mean())})

    def save(self, folder: str | Path) -> Path:
        """Writes the changed weights as they are now, the settings and the history; all or nothing.

        Raises FileExistsError rather than overwrite a folder, OSError when the disk is full.
        """
        return from_main(lambda: self._write(Path(folder)))

    def _write(self, folder: Path) -> Path:
        if folder.exists():
            raise FileExistsError(f"{folder} exists already: choose another folder, or remove it first")
        draft = folder.with_name(folder.name + ".part")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        now = {name: value.contiguous() for name, value in self.weights().items()}
        about = {name: getattr(self, name) for name in _NUMBERS}
        about |= {"concepts": [asdict(c) for c in self.concepts], "config": asdict(self.config)}
        book = PictureBook.known(self.pipe)  # the weights have forgotten what went before, too
        about["gone"] = [asdict(c) for c in (book.gone(self.pipe) if book else self.concepts)]
        try:
            save_file(now, draft / "weights.safetensors")
            about["sha256"] = hashlib.sha256((draft / "weights.safetensors").read_bytes()).hexdigest()
            self.history.to_csv(draft / "history.csv")
            (draft / "run.json").write_text(json.dumps(about, indent=1))
            sync(*draft.iterdir())
            os.replace(draft, folder)
        except Exception as error:  # a full disk: safetensors has its own kind of error for it
            shutil.rmtree(draft, ignore_errors=True)
            size = sum(value.nbytes for value in now.values()) / 1e6
            raise OSError(
                f"could not write {folder} ({error}): it needs {size:.1f} MB of free disk"
            ) from error
        return folder

    def export_lora(self, folder: str | Path, rank: int = 16) -> float:
        """Writes the change from the base model as LoRA, for ``pipe.load_lora_weights(folder)`` of diffusers.

        Each matrix's change is cut to its ``rank`` largest directions (SVD). Returns how much that loses: the
        norm of what is left out, as a share of the norm of the change.

        Raises ValueError when nothing changed or something else than cross-attention did, FileExistsError
        when ``folder`` is a file.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file: expected a folder to write to")
        now = dict(self.pipe.unet.named_parameters())
        changes = {n: now[n].detach().cpu().float() - w.float() for n, w in self.base.items()}
        biases = [c for c in changes.values() if c.ndim != 2]
        changes = {n: c for n, c in changes.items() if c.ndim == 2 and c.any()}
        if not changes or set(self.before) - set(self.base):
            raise ValueError("no change of cross-attention matrices alone to write: forget something first")
        layers, lost = {}, sum(float(c.square().sum()) for c in biases)  # they have no place in LoRA
        total = lost
        for name, change in changes.items():
            left, size, right = torch.linalg.svd(change, full_matrices=False)
            root = size[:rank].sqrt()
            layers[name.replace(".weight", ".lora_A.weight")] = (root[:, None] * right[:rank]).contiguous()
            layers[name.replace(".weight", ".lora_B.weight")] = (left[:, :rank] * root).contiguous()
            lost, total = lost + float(size[rank:].square().sum()), total + float(size.square().sum())
        from_main(lambda: self.pipe.save_lora_weights(folder, layers, safe_serialization=True))
        return math.sqrt(lost / total)

    @classmethod
    def load(
        cls, folder: str | Path, pipe: DiffusionPipeline, card: ModelCard | None = None
    ) -> UnlearningRun:
        """Puts the weights that :meth:`save` wrote into ``pipe``; ``restore()`` takes them out again.

        All is checked before anything changes. Raises FileNotFoundError when the folder holds no run,
        ValueError when it is damaged or belongs to another model.
        """
        folder = Path(folder)
        if not (folder / "run.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no run.json: expected a folder written by run.save(folder)"
            )
        try:
            about = json.loads((folder / "run.json").read_text())
            data = (folder / "weights.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != about.pop("sha256"):
                raise ValueError("its weights are not those that were saved")
            weights = load(data)
            config = UnlearnConfig.from_json(json.dumps(about.pop("config")))
            concepts = tuple(Concept(**c) for c in about.pop("concepts"))
            index = "step" if config.solver == "gradient" else "layer"
            history = pd.read_csv(folder / "history.csv", index_col=index)
            gone = tuple(Concept(**c) for c in about.pop("gone"))
            if strange := set(about) ^ set(_NUMBERS):
                raise ValueError(f"run.json has one field too many or too few: {', '.join(sorted(strange))}")
        except Exception as error:  # json, safetensors and pandas each raise their own kinds
            raise ValueError(
                f"{folder} is damaged ({error}): remove it; a sequence will then do this request again"
            ) from error
        parameters = dict(pipe.unet.named_parameters())
        odd = [n for n, w in weights.items() if n not in parameters or parameters[n].shape != w.shape]
        if odd:
            raise ValueError(
                f"{folder} belongs to another model: {odd[0]} and {len(odd) - 1} more do not fit"
            )
        if not all(torch.isfinite(w).all() for w in weights.values()):
            raise ValueError(f"{folder} is damaged (it holds numbers that are none): remove it")
        book = PictureBook.known(pipe) or PictureBook.of(pipe, card or model_card(pipe), config)
        before = {n: parameters[n].detach().cpu().clone() for n in weights}
        with undone_by_errors(parameters, before):
            overwrite(parameters, weights)
            book.gone_at.setdefault(fingerprint(pipe), gone)
        return cls(pipe, concepts, config, history, before=before, base=book.reference, **about)


@contextmanager
def undone_by_errors(parameters: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts the weights back after any error or interruption: there is no run yet to undo it with."""
    try:
        yield
    except BaseException:
        overwrite(parameters, before)
        raise


def sync(*paths: Path) -> None:
    """Waits until the files are on the disk, so that a rename never overtakes what it renames."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def resolve(
    pipe: DiffusionPipeline, what: str | Concept | Sequence[str | Concept], card: ModelCard
) -> tuple[Concept, ...]:
    """The concepts that ``what`` means, one or several: the only place where a name is looked up.

    Raises TypeError for anything else, ValueError for none or one that comes twice.
    """
    several = isinstance(what, Iterable) and not isinstance(what, str)
    concepts = tuple(map(card.concept, what if several else [what]))
    if not concepts:
        raise ValueError("no concept: expected at least one to forget")
    names = [c.name for c in concepts]
    if len(set(names)) != len(names):
        raise ValueError(f"{', '.join(names)}: a concept comes twice, but can be forgotten only once")
    return concepts


def check_arguments(pipe: DiffusionPipeline, config: UnlearnConfig | None) -> None:
    """Raises TypeError, in one sentence, for what is most often mixed up."""
    check_pipeline(pipe)
    if config is not None and not isinstance(config, UnlearnConfig):
        raise TypeError(f"config is {type(config).__name__}: expected duge.UnlearnConfig(...)")


def unlearn(
    pipe: DiffusionPipeline,
    concept: str | Concept | Sequence[str | Concept],
    config: UnlearnConfig | None = None,
    memory: Sequence[str] | None = None,
    on_step: Callable[[UnlearnState], None] | None = None,
    progress: bool = True,
    objective: Objective = DUGE,
    card: ModelCard | None = None,
    directory: str | Path | None = None,
) -> UnlearningRun:
    """Makes ``pipe`` forget ``concept``, in place: ``duge.unlearn(pipe, "apple")``.

    What the same pipeline forgot before stays forgotten, and the order does not matter: the exact solver
    solves for all of it together.

    Args:
        concept: a name, a :class:`~duge_lite.concepts.Concept`, or several at once.
        config: by default that of the model's card.
        memory: prompts of what is to stay; by default the card's.
        on_step: called after every iteration of the gradient solver.
        objective: another method for the gradient solver (:mod:`duge_lite.baselines`).
        card: what the model knows; by default :func:`~duge_lite.concepts.model_card`.
        directory: where the exact solver keeps what it saw, for the next time.

    The stop button keeps what the gradient solver has learned so far; after any other interruption and after
    an error the weights are as they were. Raises UnknownConceptError for a word that the model never read,
    ValueError when nothing is left to stay or to be drawn instead, and what :func:`unlearn_steps` raises.
    """
    started = time.perf_counter()
    check_arguments(pipe, config)
    card = card or model_card(pipe)
    config = config or UnlearnConfig(**card.settings)
    if objective is not DUGE and config.solver != "gradient":
        raise ValueError(f'objective {objective.name!r} goes with UnlearnConfig(solver="gradient") only')
    concepts = resolve(pipe, concept, card)
    folder = None if directory is None else Path(directory)
    book = PictureBook.of(pipe, card, config, memory, folder)
    gone = _gone(book, pipe, concepts)
    if pipe.unet.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pipe.unet.device)
    parameters = dict(pipe.unet.named_parameters())
    if config.solver == "exact":
        weights, history = book.solve(pipe, [*gone, *concepts], config)
        if folder is not None:
            book.write(folder)
        changed = [n for n, w in weights.items() if not torch.equal(w.to(parameters[n]), parameters[n])]
        before = {n: parameters[n].detach().cpu().clone() for n in changed}
        with undone_by_errors(parameters, before):
            overwrite(parameters, {n: weights[n] for n in changed})
            now = fingerprint(pipe)
    else:
        trained = trainable_parameters(pipe.unet, config.train)
        before = {n: p.detach().cpu().clone() for n, p in trained.items()}
        steps = _steps(pipe, book, gone, concepts, config, objective)
        rows = _learn(steps, config, concepts, on_step, progress, lambda: overwrite(trained, before))
        columns = [f.name for f in fields(UnlearnState) if f.name != "iterations"]
        history = pd.DataFrame(rows, columns=columns).set_index("step")
        with undone_by_errors(parameters, before):
            now = fingerprint(pipe)
    if set(before) <= set(book.reference):
        book.gone_at.setdefault(now, (*gone, *concepts))  # known weights: nothing went
    seconds, peak = time.perf_counter() - started, _peak_memory(pipe.unet.device)
    return UnlearningRun(
        pipe, concepts, config, history, seconds, before, book.reference, objective.name, peak
    )


def unlearn_steps(
    pipe: DiffusionPipeline,
    concept: str | Concept | Sequence[str | Concept],
    config: UnlearnConfig | None = None,
    memory: Sequence[str] | None = None,
    objective: Objective = DUGE,
    card: ModelCard | None = None,
) -> Iterator[UnlearnState]:
    """The gradient solver as a generator: forgets in place and yields a state after each iteration.

    Stopping early (``break``) keeps what was learned so far; between two states the pipeline can be used.
    Raises DivergedError when a loss is no longer finite, OutOfMemoryError when the device's memory is too
    small; after both the weights are as they were.
    """
    check_arguments(pipe, config)
    card = card or model_card(pipe)
    config = config or UnlearnConfig(**(dict(card.settings) | {"solver": "gradient"}))
    if config.solver != "gradient":
        raise ValueError('the exact solver has no steps: call unlearn(), or set solver="gradient"')
    concepts = resolve(pipe, concept, card)
    book = PictureBook.of(pipe, card, config, memory)
    yield from _steps(pipe, book, _gone(book, pipe, concepts), concepts, config, objective)


def _gone(book: PictureBook, pipe: DiffusionPipeline, concepts: Sequence[Concept]) -> tuple[Concept, ...]:
    """What went before; ``concepts`` are asked for anew, if they are among it."""
    names = {c.name for c in concepts}
    return tuple(c for c in book.gone(pipe) if c.name not in names)


def _steps(
    pipe: DiffusionPipeline,
    book: PictureBook,
    gone: Sequence[Concept],
    concepts: Sequence[Concept],
    config: UnlearnConfig,
    objective: Objective,
) -> Iterator[UnlearnState]:
    if launched():
        raise ValueError(
            'the gradient solver runs in one process: leave solver="exact", which shares its work'
        )
    trainable_parameters(pipe.unet, config.train)  # says no to Stable Diffusion XL before anything is drawn
    ends, keep = book.wishes(pipe, [*gone, *concepts], config)
    old = round(config.revisit * config.target_size) if gone else 0
    asks = _share([[(p, ends[p]) for p in c.prompts] for c in concepts], config.target_size - old)
    asks += _share([[(p, ends[p]) for p in c.prompts] for c in gone], old)
    memory = None
    if objective is DUGE or config.weights[1]:  # DUGE tells the prior loss even where it does not count
        memory = book.pictures(pipe, keep[: config.memory_size or GRADIENT_MEMORY])
    seed = zlib.crc32(f"{config.seed} {concepts[0].name}".encode())  # of the request
    own = replace(config, seed=seed % 1_000_000)
    yield from gradient_steps(pipe, asks, memory, own, book.card, book.reference, objective)


def _share(groups: Sequence[Sequence], count: int) -> list:
    """``count`` items, as many of each group, whose items take turns."""
    spread = [len(range(i, count, len(groups))) for i in range(len(groups))]
    return [group[i % len(group)] for group, n in zip(groups, spread, strict=True) for i in range(n)]


def _learn(
    steps: Iterator[UnlearnState],
    config: UnlearnConfig,
    concepts: Sequence[Concept],
    on_step: Callable[[UnlearnState], None] | None,
    progress: bool,
    put_back: Callable[[], None],
) -> list[dict]:
    """Runs the loop to its end; a stop by hand keeps what was learned, anything else takes it back."""
    rows, what = [], ", ".join(c.name for c in concepts)
    bar = tqdm(
        steps, total=config.iterations, desc=f"forgetting {what}", disable=not (progress and is_main())
    )
    try:
        for state in bar:
            rows.append(asdict(state))
            bar.set_postfix(forget=f"{state.forget:.3f}", prior=f"{state.prior:.4f}")
            if on_step is not None:
                on_step(state)
    except KeyboardInterrupt:
        steps.close()
        if progress:
            bar.write(
                f"stopped after {len(rows)} of {config.iterations} iterations; what was learned is kept"
            )
    except BaseException:  # there will be no run to undo it with
        steps.close()
        put_back()
        raise
    finally:
        steps.close()
        bar.close()
    return rows
