"""Make a pipeline forget: ``duge.unlearn(pipe, "apple")``.

How a request travels: the card turns a name into a :class:`~duge_lite.concepts.Concept`; the
:class:`~duge_lite.solver.PictureBook` knows what the layers saw and what is gone already; one of the two
solvers finds new weights; the :class:`UnlearningRun` is the way back.
"""

from __future__ import annotations

import hashlib
import json
import math
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

from . import figures
from .concepts import Concept, ModelCard, UnlearnConfig, model_card
from .gradient import (
    DUGE,
    Lessons,
    Objective,
    UnlearnState,
    gradient_steps,
    reads_one_text,
    trainable_parameters,
)
from .models import check_pipeline, from_main, is_main, launched, overwrite, written
from .solver import PictureBook

GRADIENT_MEMORY = 48
"""How many pictures the gradient solver remembers when the settings do not say."""


@dataclass
class UnlearningRun:
    """What :func:`unlearn` did, and the way back.

    Attributes:
        concepts: what was asked to go.
        config, objective: how; ``objective`` is the method's name.
        history: of the exact solver a row per layer, the three losses before and after; of the gradient
            solver a row per iteration: loss, forget, prior, regularization.
        seconds: wall-clock time, the drawing of the memory included.
        before: the weights that changed, as they were, on the CPU.
        base: the cross-attention weights of the model before anything went, by name.
    """

    pipe: DiffusionPipeline = field(repr=False)
    concepts: tuple[Concept, ...]
    config: UnlearnConfig
    history: pd.DataFrame = field(repr=False)
    seconds: float
    before: Mapping[str, Tensor] = field(repr=False)
    base: Mapping[str, Tensor] = field(repr=False, default_factory=dict)
    objective: str = DUGE.name

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
        return {name: parameters[name].detach().cpu().contiguous().clone() for name in self.before}

    def plot(self) -> figures.Plot:
        """The losses as a figure: per layer before and after, or over the iterations."""
        draw = figures.loss_curves if self.history.index.name == "step" else figures.losses_by_layer
        return draw(self.history, f"Forgetting “{self.concept}”")

    @torch.no_grad()
    def noise_loss(self, count: int = 32) -> pd.Series:
        """The prior-preservation loss that the exact solver does not look at: of the predicted noise.

        On ``count`` noisy versions of memory pictures, at moments that nobody learned from. Returns
        ``prior``, the mean squared error against the reference's prediction, and ``share``, the same as a
        share of the prediction's mean square. Raises ValueError for Stable Diffusion XL.
        """
        unet, book = self.pipe.unet, PictureBook.known(self.pipe)
        reads_one_text(unet)
        if book is None:
            what = "the pipeline's weights are not this run's any more"
            raise ValueError(f"{what}: there is nothing to compare")
        stay = [p for p in book.memory if not any(c.named_in(p) for c in book.gone(self.pipe))][:16]
        scheduler = DDPMScheduler.from_config(self.pipe.scheduler.config)
        generator = torch.Generator().manual_seed(self.config.seed + 1)
        asked = Lessons.of(book.pictures(self.pipe, stay), count, scheduler, generator)
        dtypes = (unet.dtype, torch.long, unet.dtype)
        inputs = [x.to(unet.device, dtype) for x, dtype in zip(asked.inputs, dtypes, strict=True)]
        now = unet(*inputs).sample.float()
        with book.at_base(self.pipe):
            was = unet(*inputs).sample.float()
        error = float((now - was).square().mean())
        return pd.Series({"prior": error, "share": error / float(was.square().mean())})

    def save(self, folder: str | Path) -> Path:
        """Writes the changed weights as they are now, the settings and the history; all or nothing.

        Raises FileExistsError rather than overwrite a folder, OSError when the disk is full.
        """
        return from_main(lambda: self._write(Path(folder)))

    def _write(self, folder: Path) -> Path:
        if folder.exists():
            raise FileExistsError(f"{folder} exists already: choose another folder, or remove it first")
        about = {"objective": self.objective, "seconds": self.seconds, "config": asdict(self.config)}
        book = PictureBook.known(self.pipe)  # the weights have forgotten what went before, too
        gone = book.gone(self.pipe) if book else self.concepts
        about |= {"concepts": [asdict(c) for c in self.concepts], "gone": [asdict(c) for c in gone]}
        with written(folder) as draft:
            draft.mkdir()
            save_file(self.weights(), draft / "weights.safetensors")
            about["sha256"] = hashlib.sha256((draft / "weights.safetensors").read_bytes()).hexdigest()
            self.history.to_csv(draft / "history.csv")
            (draft / "run.json").write_text(json.dumps(about, indent=1))
        return folder

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
            raise FileNotFoundError(f"{folder} holds no run.json: expected a folder of run.save(folder)")
        try:
            about = json.loads((folder / "run.json").read_text())
            data = (folder / "weights.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != about.pop("sha256"):
                raise ValueError("its weights are not those that were saved")
            weights, config = load(data), UnlearnConfig(**about.pop("config"))
            if not all(torch.isfinite(w).all() for w in weights.values()):
                raise ValueError("it holds numbers that are none")
            concepts, gone = (tuple(Concept(**c) for c in about.pop(k)) for k in ("concepts", "gone"))
            index = "step" if config.solver == "gradient" else "layer"
            history = pd.read_csv(folder / "history.csv", index_col=index)
            run = cls(pipe, concepts, config, history, before={}, **about)
        except Exception as error:  # json, safetensors and pandas each raise their own kinds
            raise ValueError(
                f"{folder} is damaged ({error}): remove it; a sequence will then do this request again"
            ) from error
        parameters = dict(pipe.unet.named_parameters())
        if odd := [n for n, w in weights.items() if n not in parameters or parameters[n].shape != w.shape]:
            raise ValueError(f"{folder} belongs to another model: {odd[0]} does not fit")
        book = PictureBook.known(pipe) or PictureBook.of(pipe, card or model_card(pipe), config)[0]
        run.base, run.before = book.reference, {n: parameters[n].detach().cpu().clone() for n in weights}
        with undone_by_errors(parameters, run.before):
            overwrite(parameters, weights)
            book.remember(pipe, gone)
        return run

    def export_lora(self, folder: str | Path, rank: int = 16) -> float:
        """Writes the change from the base model as LoRA, for ``pipe.load_lora_weights(folder)`` of diffusers.

        Each matrix's change is cut to its ``rank`` largest directions (SVD). Returns how much that loses: the
        norm of what is left out, as a share of the norm of the change.

        Raises ValueError when nothing changed, FileExistsError when ``folder`` is a file.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file: expected a folder to write to")
        now = dict(self.pipe.unet.named_parameters())
        changes = {n: now[n].detach().cpu().float() - w.float() for n, w in self.base.items()}
        total = sum(float(c.square().sum()) for c in changes.values())
        layers, kept = {}, 0.0  # biases have no place in LoRA
        for name, change in changes.items():
            if change.ndim != 2 or not change.any():
                continue
            left, size, right = torch.linalg.svd(change, full_matrices=False)
            root, part = size[:rank].sqrt(), name.removesuffix(".weight")
            layers[f"{part}.lora_A.weight"] = (root[:, None] * right[:rank]).contiguous()
            layers[f"{part}.lora_B.weight"] = (left[:, :rank] * root).contiguous()
            kept += float(size[:rank].square().sum())
        if not layers:
            raise ValueError("no change of cross-attention matrices to write: forget something first")
        from_main(lambda: self.pipe.save_lora_weights(folder, layers, safe_serialization=True))
        return math.sqrt(max(0.0, 1 - kept / total))


@contextmanager
def undone_by_errors(parameters: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts the weights back after any error or interruption: there is no run yet to undo it with."""
    try:
        yield
    except BaseException:
        overwrite(parameters, before)
        raise


def resolve(
    pipe: DiffusionPipeline,
    what: str | Concept | Sequence[str | Concept],
    card: ModelCard | None,
    config: UnlearnConfig | None = None,
    **settings: object,
) -> tuple[ModelCard, UnlearnConfig, tuple[Concept, ...]]:
    """The card, the settings and the concepts that are meant: the only place where a name is looked up.

    ``settings`` change the card's own, where no ``config`` is given. Raises TypeError, in one sentence, for
    what is most often mixed up, ValueError for no concept or one that comes twice.
    """
    check_pipeline(pipe)
    if config is not None and not isinstance(config, UnlearnConfig):
        raise TypeError(f"config is {type(config).__name__}: expected duge.UnlearnConfig(...)")
    card = card or model_card(pipe)
    config = config or UnlearnConfig(**dict(card.settings) | settings)
    several = isinstance(what, Iterable) and not isinstance(what, str)
    concepts = tuple(card.concept(one, config.instead) for one in (what if several else [what]))
    if not concepts:
        raise ValueError("no concept: expected at least one to forget")
    if len({c.name.casefold() for c in concepts}) != len(concepts):
        names = ", ".join(c.name for c in concepts)
        raise ValueError(f"{names}: a concept comes twice, but can be forgotten only once")
    return card, config, concepts


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
    card, config, concepts = resolve(pipe, concept, card, config)
    if objective is not DUGE and config.solver != "gradient":
        raise ValueError(f'objective {objective.name!r} goes with UnlearnConfig(solver="gradient") only')
    folder = None if directory is None else Path(directory)
    book, gone = PictureBook.of(pipe, card, config, memory, folder)
    gone = _all(gone, concepts)
    parameters, weights = dict(pipe.unet.named_parameters()), {}
    if config.solver == "exact":
        weights, history = book.solve(pipe, gone, config)
        if folder is not None:
            book.write(folder)
        weights = {n: w for n, w in weights.items() if not torch.equal(w.to(parameters[n]), parameters[n])}
        trained = weights
    else:
        trained = trainable_parameters(pipe.unet, objective)
    before = {n: parameters[n].detach().cpu().clone() for n in trained}
    with undone_by_errors(parameters, before):
        if config.solver == "gradient":
            steps = _steps(pipe, book, gone, concepts, config, objective)
            history = _learn(steps, config, concepts, on_step, progress)
        overwrite(parameters, weights)
        book.remember(pipe, gone)
    seconds = time.perf_counter() - started
    return UnlearningRun(pipe, concepts, config, history, seconds, before, book.reference, objective.name)


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
    card, config, concepts = resolve(pipe, concept, card, config, solver="gradient")
    if config.solver != "gradient":
        raise ValueError('the exact solver has no steps: call unlearn(), or set solver="gradient"')
    book, gone = PictureBook.of(pipe, card, config, memory)
    yield from _steps(pipe, book, _all(gone, concepts), concepts, config, objective)


def _all(gone: Sequence[Concept], concepts: Sequence[Concept]) -> tuple[Concept, ...]:
    """What is gone in the end; ``concepts`` are asked for anew, if they are among what went before."""
    names = {c.name.casefold() for c in concepts}
    return (*(c for c in gone if c.name.casefold() not in names), *concepts)


def _steps(
    pipe: DiffusionPipeline,
    book: PictureBook,
    gone: Sequence[Concept],
    concepts: Sequence[Concept],
    config: UnlearnConfig,
    objective: Objective,
) -> Iterator[UnlearnState]:
    reads_one_text(pipe.unet)  # before anything is drawn
    if launched():
        raise ValueError(
            'the gradient solver runs in one process: leave solver="exact", which shares its work'
        )
    ends, keep = book.wishes(pipe, gone)
    earlier = gone[: len(gone) - len(concepts)]
    old = round(config.revisit * config.target_size) if earlier else 0
    if (own := config.target_size - old) < len(concepts):
        raise ValueError(
            f"target_size = {config.target_size}, of which {old} show earlier requests (revisit): expected "
            f"at least a picture for each of {len(concepts)} concepts"
        )
    asks = _share([[(p, ends[p]) for p in c.prompts] for c in concepts], own)
    asks += _share([[(p, ends[p]) for p in c.prompts] for c in earlier], old)
    memory = None
    if objective is DUGE or config.weights[1]:  # DUGE tells the prior loss even where it does not count
        memory = book.pictures(pipe, keep[: config.memory_size or GRADIENT_MEMORY])
    seed = zlib.crc32(f"{config.seed} {concepts[0].name}".encode())  # of the request
    config = replace(config, seed=seed % 1_000_000)
    yield from gradient_steps(pipe, asks, memory, config, book.card, book.reference, objective)


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
) -> pd.DataFrame:
    """Runs the loop to its end and returns its history; a stop by hand keeps what was learned."""
    rows, what = [], ", ".join(c.name for c in concepts)
    shown = progress and is_main()
    bar = tqdm(steps, total=config.iterations, desc=f"forgetting {what}", disable=not shown)
    try:
        for state in bar:
            rows.append(asdict(state))
            bar.set_postfix(forget=f"{state.forget:.3f}", prior=f"{state.prior:.4f}")
            if on_step is not None:
                on_step(state)
    except KeyboardInterrupt:
        if shown:
            done = f"stopped after {len(rows)} of {config.iterations} iterations"
            bar.write(f"{done}; what was learned is kept")
    finally:
        steps.close()
        bar.close()
    columns = [f.name for f in fields(UnlearnState) if f.name != "iterations"]
    return pd.DataFrame(rows, columns=columns).set_index("step")
