"""Make a pipeline forget: one request, ``duge.unlearn(pipe, "apple")``, or one after another.

How a request travels: the card turns a name into a :class:`~duge_lite.concepts.Concept`; the
:class:`~duge_lite.solver.PictureBook` knows what the layers saw and what is gone already; one of the two
solvers finds new weights; the :class:`UnlearningRun` is the way back.

In an :class:`UnlearningSequence` every finished request can be on disk before the next one begins. Then it
goes on where it was killed, any model along the way can be opened again, and a request can be withdrawn.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
import zlib
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import cycle, islice, product
from pathlib import Path

import pandas as pd
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from filelock import FileLock, Timeout
from safetensors.torch import load, load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from . import figures
from .concepts import Concept, ModelCard, UnlearnConfig, model_card
from .evaluation import evaluate, sequence_metrics
from .gradient import DUGE, Lessons, Objective, UnlearnState, gradient_steps, reads_one_text
from .models import check_pipeline, copied, from_main, is_main, launched, overwrite, written
from .solver import PictureBook, cross_attention_weights


@dataclass
class UnlearningRun:
    """What :func:`unlearn` did, and the way back.

    Attributes:
        history: of the exact solver a row per layer, the three losses before and after; of the gradient
            solver a row per iteration: loss, forget, prior, regularization.
        seconds: wall-clock time, the drawing of the memory included.
        before: the weights that changed, as they were, by name, on the CPU.
        base: the cross-attention weights of the model before anything went.
        objective: the method's name.
    """

    pipe: DiffusionPipeline = field(repr=False)
    concepts: tuple[Concept, ...]
    config: UnlearnConfig
    history: pd.DataFrame = field(repr=False)
    seconds: float
    before: Mapping[str, Tensor] = field(repr=False)
    base: Mapping[str, Tensor] = field(repr=False)
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
        return copied({name: parameters[name].contiguous() for name in self.before})

    def plot(self) -> figures.Plot:
        """The losses as a figure: per layer before and after, or over the iterations."""
        draw = figures.loss_curves if self.history.index.name == "step" else figures.losses_by_layer
        return draw(self.history, f"Forgetting “{self.concept}”")

    @torch.no_grad()
    def noise_loss(self, count: int = 32) -> pd.Series:
        """The prior-preservation loss that the exact solver does not look at: of the predicted noise.

        On ``count`` noisy versions of memory pictures. Returns ``prior``, the mean squared error against the
        reference's prediction, and ``share``, the same as a share of the prediction's mean square. Raises
        ValueError for Stable Diffusion XL.
        """
        unet, book = self.pipe.unet, PictureBook.known(self.pipe)
        reads_one_text(unet)
        if book is None:
            raise ValueError("the pipeline's weights are not this run's any more: nothing can be compared")
        stay = [p for p in book.memory if not any(c.named_in(p) for c in book.gone(self.pipe))][:16]
        scheduler = DDPMScheduler.from_config(self.pipe.scheduler.config)
        generator = torch.Generator().manual_seed(self.config.seed + 1)
        asked = Lessons.of(book.pictures(self.pipe, stay), count, scheduler, generator)
        noisy, timesteps, text = (x.to(unet.device) for x in asked.inputs)
        inputs = noisy.to(unet.dtype), timesteps, text.to(unet.dtype)
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
        book = PictureBook.known(self.pipe)  # the weights have forgotten what went before, too
        gone = book.gone(self.pipe) if book else self.concepts
        about = {"objective": self.objective, "seconds": self.seconds, "config": asdict(self.config)}
        about |= {"concepts": [asdict(c) for c in self.concepts], "gone": [asdict(c) for c in gone]}
        with written(folder) as draft:
            draft.mkdir()
            save_file(self.weights(), file := draft / "weights.safetensors")
            about["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
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
        folder, parameters = Path(folder), dict(pipe.unet.named_parameters())
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
            run = cls(pipe, concepts, config, history, before={}, base={}, **about)
        except Exception as error:  # json, safetensors and pandas each raise their own kinds
            advice = "remove it; a sequence will then do this request again"
            raise ValueError(f"{folder} is damaged ({error}): {advice}") from error
        if odd := [n for n, w in weights.items() if n not in parameters or parameters[n].shape != w.shape]:
            raise ValueError(f"{folder} belongs to another model: {odd[0]} does not fit")
        book = PictureBook.known(pipe) or PictureBook.of(pipe, card or model_card(pipe), config)[0]
        run.base, run.before = book.reference, copied({n: parameters[n] for n in weights})
        with undone_by_errors(parameters, run.before):
            overwrite(parameters, weights)
            book.remember(pipe, gone)
        return run

    def export_lora(self, folder: str | Path, rank: int = 16) -> float:
        """Writes the change from the base model as LoRA, for ``pipe.load_lora_weights(folder)`` of diffusers.

        Each matrix's change is cut to its ``rank`` largest directions (SVD); biases have no place in LoRA.
        Returns how much that loses: the norm of what is left out, as a share of the norm of the change.
        Raises ValueError when nothing changed, FileExistsError when ``folder`` is a file.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file: expected a folder to write to")
        now, layers, kept, total = cross_attention_weights(self.pipe.unet), {}, 0.0, 0.0
        for name, base in self.base.items():
            change = now[name].detach().cpu().float() - base.float()
            total += float(change.square().sum())
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


# ---- one request


def resolve(
    pipe: DiffusionPipeline, what: str | Concept | Sequence[str | Concept], card: ModelCard | None,
    config: UnlearnConfig | None = None, **settings: object,
) -> tuple[ModelCard, UnlearnConfig, tuple[Concept, ...]]:  # fmt: skip
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
    pipe: DiffusionPipeline, concept: str | Concept | Sequence[str | Concept],
    config: UnlearnConfig | None = None, memory: Sequence[str] | None = None, progress: bool = True,
    objective: Objective = DUGE, card: ModelCard | None = None, directory: str | Path | None = None,
) -> UnlearningRun:  # fmt: skip
    """Makes ``pipe`` forget ``concept``, or several at once, in place: ``duge.unlearn(pipe, "apple")``.

    What the same pipeline forgot before stays forgotten; the exact solver solves for all of it together.

    Args:
        config, memory: the settings, and prompts of what is to stay; by default those of the card.
        objective: another method for the gradient solver (:mod:`duge_lite.baselines`).
        card: what the model knows; by default :func:`~duge_lite.concepts.model_card`.
        directory: where the exact solver keeps what it saw, for the next time.

    The stop button keeps what the gradient solver has learned so far; after any other interruption or error
    the weights are as they were. Raises UnknownConceptError for a word that the model never read, ValueError
    when nothing is left to stay or to be drawn instead, and what :func:`unlearn_steps` raises.
    """
    started = time.perf_counter()
    card, config, concepts = resolve(pipe, concept, card, config)
    if objective is not DUGE and config.solver != "gradient":
        raise ValueError(f'objective {objective.name!r} goes with UnlearnConfig(solver="gradient") only')
    book, gone = PictureBook.of(pipe, card, config, memory, directory)
    gone, parameters, weights = _all(gone, concepts), dict(pipe.unet.named_parameters()), {}
    if config.solver == "exact":
        weights, history = book.solve(pipe, gone, config)
        if directory is not None:
            book.write(directory)
        weights = {n: w for n, w in weights.items() if not torch.equal(w.to(parameters[n]), parameters[n])}
        before = copied({n: parameters[n] for n in weights})
    else:
        before = copied(objective.trained(pipe.unet))
    with undone_by_errors(parameters, before):
        if config.solver == "gradient":
            steps = _steps(pipe, book, gone, concepts, config, objective)
            history = _learn(steps, concepts, config, progress)
        overwrite(parameters, weights)
        book.remember(pipe, gone)
    seconds = time.perf_counter() - started
    return UnlearningRun(pipe, concepts, config, history, seconds, before, book.reference, objective.name)


def unlearn_steps(
    pipe: DiffusionPipeline, concept: str | Concept | Sequence[str | Concept],
    config: UnlearnConfig | None = None, memory: Sequence[str] | None = None,
    objective: Objective = DUGE, card: ModelCard | None = None,
) -> Iterator[UnlearnState]:  # fmt: skip
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
    pipe: DiffusionPipeline, book: PictureBook, gone: Sequence[Concept], concepts: Sequence[Concept],
    config: UnlearnConfig, objective: Objective,
) -> Iterator[UnlearnState]:  # fmt: skip
    reads_one_text(pipe.unet)  # before anything is drawn
    if launched():
        raise ValueError('the gradient solver runs in one process: leave solver="exact", which can share')
    ends, keep = book.wishes(pipe, gone)
    earlier = gone[: len(gone) - len(concepts)]
    old = round(config.revisit * config.target_size) if earlier else 0
    if (own := config.target_size - old) < len(concepts):
        size = f"target_size = {config.target_size}, of which {old} show earlier requests (revisit)"
        raise ValueError(f"{size}: expected at least a picture for each of {len(concepts)} concepts")
    asks = []
    for some, count in ((concepts, own), (earlier, old)):  # as many of each concept, whose prompts take turns
        for i, concept in enumerate(some):
            pictures = len(range(i, count, len(some)))
            asks += [(prompt, ends[prompt]) for prompt in islice(cycle(concept.prompts), pictures)]
    looks = objective is DUGE or config.weights[1]  # DUGE tells the prior loss even where it does not count
    memory = book.pictures(pipe, keep[: config.memory_size or 48]) if looks else None
    seed = zlib.crc32(f"{config.seed} {concepts[0].name}".encode()) % 1_000_000  # of the request
    config = replace(config, seed=seed)
    yield from gradient_steps(pipe, asks, memory, config, book.card, book.reference, objective)


def _learn(
    steps: Iterator[UnlearnState], concepts: Sequence[Concept], config: UnlearnConfig, progress: bool
) -> pd.DataFrame:
    """Runs the loop to its end, or until it is stopped by hand, and returns its history."""
    rows, what = [], f"forgetting {', '.join(c.name for c in concepts)}"
    with closing(steps), tqdm(steps, what, config.iterations, disable=not (progress and is_main())) as bar:
        try:
            for state in bar:
                rows.append(asdict(state))
                bar.set_postfix(forget=f"{state.forget:.3f}", prior=f"{state.prior:.4f}")
        except KeyboardInterrupt:
            if not bar.disable:
                bar.write(f"stopped after iteration {len(rows)}; what was learned is kept")
    columns = [f.name for f in fields(UnlearnState)]
    return pd.DataFrame(rows, columns=columns).set_index("step").drop(columns="iterations")


# ---- one request after another


@dataclass
class UnlearningSequence:
    """What :func:`unlearn_sequence` did, step by step; step 0 is the model that it began with.

    Attributes:
        states: the cross-attention weights at every step, by name.
        directory: where runs are saved; None for nowhere.
        how: what :func:`unlearn` is told.
        runs: one per request.
    """

    pipe: DiffusionPipeline = field(repr=False)
    config: UnlearnConfig
    card: ModelCard = field(repr=False)
    states: list[ChainMap[str, Tensor]] = field(repr=False)
    directory: Path | None
    how: Mapping[str, object] = field(repr=False)
    runs: list[UnlearningRun] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._lock = self.directory and FileLock(self.directory / "sequence.lock", timeout=0)

    @property
    def concepts(self) -> tuple[str, ...]:
        """What has been forgotten so far, in order."""
        return tuple(run.concept for run in self.runs)

    @property
    def history(self) -> pd.DataFrame:
        """The histories of all requests, one below the other."""
        parts = {k: run.history for k, run in enumerate(self.runs, 1)}
        return pd.concat(parts, names=["request"]) if parts else pd.DataFrame()

    def costs(self) -> pd.DataFrame:
        """Seconds per request; the first one draws the memory."""
        index = pd.RangeIndex(1, len(self.states), name="request")
        return pd.DataFrame({"concept": self.concepts, "seconds": [r.seconds for r in self.runs]}, index)

    def weights(self, at: int) -> Mapping[str, Tensor]:
        """The cross-attention weights after request ``at``. ValueError for a request that there was not."""
        if not 0 <= at <= len(self.runs):
            raise ValueError(f"at = {at}: expected a number from 0 (the base) to {len(self.runs)}")
        return self.states[at]

    def pipeline(self, at: int) -> DiffusionPipeline:
        """The pipeline as it was after request ``at``, in place."""
        overwrite(cross_attention_weights(self.pipe.unet), self.weights(at))
        return self.pipe

    def matrix(self, concepts: Sequence[str] | None = None, **how: object) -> pd.DataFrame:
        """The accuracy matrix R[k, j]: accuracy on concept j after request k; row 0 is the base model.

        ``concepts`` defaults to all that can be forgotten and counted, styles too; ``how`` is that of
        :func:`duge_lite.evaluation.evaluate`. Afterwards the pipeline is the last model again.
        """
        known = [c for c in self.card.forgettable if c in self.card.labels]
        concepts, how = known if concepts is None else list(concepts), {"card": self.card} | how
        every = range(len(self.states))
        try:
            rows = [evaluate(self.pipeline(at=k), concepts, **how).accuracy for k in every]
        finally:
            self.pipeline(at=every[-1])
        return pd.DataFrame(rows, pd.RangeIndex(len(rows), name="after")).rename_axis(columns="concept")

    def metrics(self, matrix: pd.DataFrame) -> pd.DataFrame:
        """What is gone and kept after each request; see :func:`duge_lite.evaluation.sequence_metrics`."""
        return sequence_metrics(matrix, self.concepts, self.card)

    def drift(self) -> pd.DataFrame:
        """How far the weights went, as a share of their own size, after each request; by kind of matrix."""
        rows = {}
        for k, kind in product(range(1, len(self.states)), ("to_q", "to_k", "to_v", "to_out")):
            names = [n for n, w in self.states[0].items() if kind in n and w.ndim == 2]
            old, now = (torch.cat([self.states[i][n].float().flatten() for n in names]) for i in (0, k))
            rows[k, kind] = float((now - old).norm() / old.norm())
        return pd.Series(rows, dtype=float).rename_axis(["request", "kind"]).to_frame("from base")

    def _step(self, k: int, concept: Concept) -> Path:
        name = re.sub(r"[^\w-]+", "-", concept.name)
        return self.directory / f"step_{k:02d}_{name}"

    def request(self, concept: Concept) -> UnlearningRun:
        """One more concept to forget: from disk if it was done before, else now."""
        k = len(self.states)
        step = self.directory and self._step(k, concept)
        found = from_main(lambda: sorted(self.directory.glob(f"step_{k:02d}_*"))) if step else []
        if done := [path for path in found if path.suffix != ".part"]:
            if step not in done:
                what = f"{self.directory} holds another sequence"
                raise ValueError(f"{what}: {done[0].name} instead of {step.name}")
            run = UnlearningRun.load(step, self.pipe, self.card)
            if run.concepts != (concept,):
                run.restore()
                raise ValueError(
                    f"{step} forgets {run.concepts!r}, not {concept!r}: choose another directory"
                )
        else:
            run = unlearn(self.pipe, concept, self.config, **self.how)
            if self.config.solver == "gradient" and len(run.history) < self.config.iterations:
                run.restore()
                raise KeyboardInterrupt(f"stopped in request {k} ({concept.name}), which is taken back")
            if step:
                with undone_by_errors(dict(self.pipe.unet.named_parameters()), run.before):
                    run.save(step)
        # on disk they are mapped, and take no memory; a request need not change all of them
        after = load_file(step / "weights.safetensors") if step else run.weights()
        run.before = self.states[-1]
        self.states.append(run.before.new_child(after))
        self.runs.append(run)
        return run

    def withdraw(self, concept: str) -> None:
        """Takes one request back, and leaves the model that would be there had it never been made.

        The requests after it are done anew. Raises ValueError when it was not made, or while another program
        uses the directory.
        """
        if concept not in self.concepts:
            made = ", ".join(self.concepts) or "(none)"
            raise ValueError(f"{concept!r} was not asked to go: the requests so far are {made}")
        k = self.concepts.index(concept)
        later = [run.concepts[0] for run in self.runs[k + 1 :]]
        with self.alone():
            self.pipeline(at=k)
            for step in range(len(self.runs), k, -1):  # the last first: what is left is a sequence, always
                if self.directory is not None and is_main():
                    folder = self._step(step, self.runs[step - 1].concepts[0])
                    draft = folder.with_name(folder.name + ".part")
                    os.replace(folder, draft)
                    shutil.rmtree(draft)
            del self.runs[k:], self.states[k + 1 :]
            for after in later:
                self.request(after)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other program can have the directory meanwhile; ValueError when one has it."""

        def take() -> None:
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout:
                what = f"{self.directory} is in use by another program"
                raise ValueError(f"{what}: wait for it, or choose another directory") from None

        if self._lock:
            from_main(take)
        try:
            yield
        finally:
            if self._lock:
                self._lock.release()  # the main process's: the others do not hold theirs


def sequence_steps(
    pipe: DiffusionPipeline, concepts: Sequence[str | Concept], config: UnlearnConfig | None = None,
    directory: str | Path | None = None, objective: Objective = DUGE, progress: bool = True,
    memory: Sequence[str] | None = None, card: ModelCard | None = None,
) -> Iterator[UnlearningSequence]:  # fmt: skip
    """Forgets ``concepts`` in order, in place, yielding the sequence so far after each request.

    With ``directory``, each request is saved before the next begins (``step_01_apple/`` and so on), and a
    sequence that was interrupted goes on after the last finished one, to the same weights. It begins with a
    model that has forgotten nothing else. Several processes (see :mod:`duge_lite.models`) need a directory
    that all of them can read; two programs cannot have the same one at a time.

    Raises UnknownConceptError before anything is done, ValueError for a concept that comes twice or a
    directory of another sequence, model, memory or settings, or with a damaged file, or in use, and
    KeyboardInterrupt when it is stopped or OSError when the disk is full: the unfinished request is taken
    back, the finished ones stay.
    """
    card, config, wanted = resolve(pipe, concepts, card, config)
    folder = None if directory is None else Path(directory)
    how = {"objective": objective, "progress": progress, "memory": memory, "card": card, "directory": folder}
    book, gone = PictureBook.of(pipe, card, config, memory, folder)
    weights = cross_attention_weights(pipe.unet)
    base = copied(weights) if gone and folder is None else book.reference
    sequence = UnlearningSequence(pipe, config, card, [ChainMap(base)], folder, how)
    with sequence.alone():
        if folder is not None:
            about = {"objective": objective.name, "card": card.name, "memory": memory and list(memory)}
            about |= {"config": asdict(config), "model": book.base}
            from_main(lambda: _check(folder / "sequence.json", about))
            if strange := sorted({c.name for c in gone} - {c.name for c in wanted}):
                what = f"the pipeline has forgotten {', '.join(strange)} already, unknown to {folder}"
                raise ValueError(f"{what}: restore() that first, or ask for all of it in one sequence")
            overwrite(weights, base)
        for concept in wanted:
            sequence.request(concept)
            yield sequence


def unlearn_sequence(
    pipe: DiffusionPipeline, concepts: Sequence[str | Concept], config: UnlearnConfig | None = None,
    directory: str | Path | None = None, **how: object,
) -> UnlearningSequence:  # fmt: skip
    """Makes ``pipe`` forget ``concepts`` one after another: all of :func:`sequence_steps` at once."""
    *_, sequence = sequence_steps(pipe, concepts, config, directory, **how)
    return sequence


def _check(file: Path, about: Mapping[str, object]) -> None:
    """Writes down what a directory is about, or raises ValueError when it is about something else."""
    if not file.exists():
        with written(file) as draft:
            draft.write_text(json.dumps(about, indent=1))
    try:
        known = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file.parent} is damaged ({error}): choose another directory") from None
    was = known.get("config", {})
    other = [key for key in about if key != "config" and about[key] != known.get(key)]
    other += [f"{k} ({was.get(k)!r}, now {v!r})" for k, v in about["config"].items() if was.get(k) != v]
    if other:
        what = f"{file.parent} holds a sequence of another {', '.join(other)}"
        raise ValueError(f"{what}: choose another directory")
