"""One concept after another: a sequence of requests to forget.

Every finished request is on disk before the next one begins, so that a sequence that was killed goes on
where it was, and any model along the way can be opened again. With the exact solver a request can also be
withdrawn, as if it had never been made.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor

from .concepts import Concept, ModelCard, UnlearnConfig
from .evaluation import evaluate, sequence_metrics
from .gradient import DUGE, Objective, UnlearnState
from .models import from_main, is_main, overwrite, written
from .solver import PictureBook, cross_attention_weights
from .unlearning import UnlearningRun, resolve, undone_by_errors, unlearn


@dataclass
class UnlearningSequence:
    """What :func:`unlearn_sequence` did, step by step; step 0 is the model that it began with.

    Attributes:
        config: the settings of all requests.
        base: the cross-attention weights at step 0.
        runs: one per request.
        directory: where they are saved; None for nowhere.
    """

    pipe: DiffusionPipeline = field(repr=False)
    config: UnlearnConfig
    base: Mapping[str, Tensor] = field(repr=False)
    card: ModelCard = field(repr=False)
    runs: list[UnlearningRun] = field(default_factory=list, repr=False)
    directory: Path | None = None
    how: Mapping[str, object] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._after: list[Mapping[str, Tensor]] = []  # what each request changed
        self._lock = self.directory and FileLock(self.directory / "sequence.lock", timeout=0)

    @property
    def concepts(self) -> tuple[str, ...]:
        """What has been forgotten so far, in order."""
        return tuple(run.concept for run in self.runs)

    @property
    def history(self) -> pd.DataFrame:
        """The histories of all requests, one below the other; requests count from 1."""
        parts = {k: run.history for k, run in enumerate(self.runs, 1)}
        return pd.concat(parts, names=["request"]) if parts else pd.DataFrame()

    def costs(self) -> pd.DataFrame:
        """Seconds per request; the first one draws the memory."""
        rows = [(run.concept, run.seconds) for run in self.runs]
        index = pd.RangeIndex(1, len(rows) + 1, name="request")
        return pd.DataFrame(rows, index, columns=["concept", "seconds"])

    def weights(self, at: int) -> Mapping[str, Tensor]:
        """The cross-attention weights after request ``at``; 0 for those that it began with.

        Raises ValueError for a request that there was not.
        """
        if not 0 <= at <= len(self.runs):
            raise ValueError(f"at = {at}: expected a number from 0 (the base) to {len(self.runs)}")
        return ChainMap(*reversed(self._after[:at]), self.base)  # a request need not change all of them

    def pipeline(self, at: int) -> DiffusionPipeline:
        """The pipeline as it was after request ``at`` (in place); 0 for the model that it began with."""
        overwrite(cross_attention_weights(self.pipe.unet), self.weights(at))
        return self.pipe

    def matrix(self, concepts: Sequence[str] | None = None, **how: object) -> pd.DataFrame:
        """The accuracy matrix R[k, j]: accuracy on concept j after request k; row 0 is the base model.

        ``concepts`` defaults to all that can be forgotten and counted, styles too; the other
        arguments are those of :func:`duge_lite.evaluation.evaluate`, whose seeds are the same for every row.
        Afterwards the pipeline is the last model again.
        """
        known = [c for c in self.card.forgettable if c in self.card.labels]
        concepts, how = known if concepts is None else list(concepts), {"card": self.card} | how
        every = range(len(self.runs) + 1)
        try:
            rows = [evaluate(self.pipeline(at=k), concepts, **how).accuracy for k in every]
        finally:
            self.pipeline(at=every[-1])
        matrix = pd.DataFrame(rows, index=pd.RangeIndex(len(rows), name="after"))
        return matrix.rename_axis(columns="concept")

    def metrics(self, matrix: pd.DataFrame) -> pd.DataFrame:
        """What is gone and kept after each request; see :func:`duge_lite.evaluation.sequence_metrics`."""
        return sequence_metrics(matrix, self.concepts, self.card)

    def drift(self) -> pd.DataFrame:
        """How far the weights went, as a share of their own size: from the base, and in this request.

        One row per request and kind of layer (to_q, to_k, to_v, to_out).
        """
        rows, states = [], [self.weights(k) for k in range(len(self.runs) + 1)]
        for k in range(1, len(states)):
            for kind in ("to_q", "to_k", "to_v", "to_out"):
                names = [n for n, w in self.base.items() if kind in n and w.ndim == 2]
                base, last, now = (
                    torch.cat([state[n].float().flatten() for n in names])
                    for state in (self.base, states[k - 1], states[k])
                )
                share = {"from base": now - base, "this request": now - last}
                row = {name: float(change.norm() / base.norm()) for name, change in share.items()}
                rows.append({"request": k, "kind": kind, **row})
        return pd.DataFrame(rows).set_index(["request", "kind"]) if rows else pd.DataFrame()

    def _step(self, k: int, concept: Concept) -> Path:
        name = re.sub(r"[^\w-]+", "-", concept.name)
        return self.directory / f"step_{k:02d}_{name}"

    def request(self, concept: Concept) -> UnlearningRun:
        """One more concept to forget: from disk if it was done before, else now."""
        k = len(self.runs) + 1
        if self.directory is None:
            run = self._forget(concept, k)
            self._after.append(run.weights())
        else:
            step = self._step(k, concept)
            if from_main(step.exists):
                run = UnlearningRun.load(step, self.pipe, self.card)
                if run.concepts != (concept,):
                    run.restore()
                    raise ValueError(
                        f"{step} forgets {run.concepts!r}, not {concept!r}: choose another directory"
                    )
            else:
                if others := [p.name for p in self.directory.glob(f"step_{k:02d}_*") if p.suffix != ".part"]:
                    raise ValueError(
                        f"{self.directory} holds another sequence: {others[0]} instead of {step.name}"
                    )
                run = self._forget(concept, k)
                with undone_by_errors(dict(self.pipe.unet.named_parameters()), run.before):
                    run.save(step)
            run.before = self.weights(k - 1)  # on disk already
            self._after.append(load_file(step / "weights.safetensors"))  # mapped: it takes no memory
        self.runs.append(run)
        return run

    def _forget(self, concept: Concept, k: int) -> UnlearningRun:
        run = unlearn(self.pipe, concept, self.config, card=self.card, directory=self.directory, **self.how)
        if run.history.index.name == "step" and len(run.history) < self.config.iterations:
            run.restore()
            raise KeyboardInterrupt(f"stopped in request {k} ({concept.name}), which is taken back")
        return run

    def withdraw(self, concept: str) -> None:
        """Takes one request back, and leaves the model that would be there had it never been made.

        The requests after it are done anew, which the exact solver does in a second each. Raises ValueError
        when it was not made, or while another program uses the directory.
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
            del self.runs[k:], self._after[k:]
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

        if self._lock is None:
            yield
            return
        from_main(take)
        try:
            yield
        finally:
            if is_main():
                self._lock.release()


def sequence_steps(
    pipe: DiffusionPipeline,
    concepts: Sequence[str | Concept],
    config: UnlearnConfig | None = None,
    directory: str | Path | None = None,
    objective: Objective = DUGE,
    on_step: Callable[[UnlearnState], None] | None = None,
    progress: bool = True,
    memory: Sequence[str] | None = None,
    card: ModelCard | None = None,
) -> Iterator[UnlearningSequence]:
    """Forgets ``concepts`` in order, in place, yielding the sequence so far after each request.

    Each request starts from the last model. The exact solver solves for all requests so far together: their
    order does not matter, and the second costs what the twelfth does. The memory shows nothing that was ever
    asked to go.

    With ``directory``, each request is saved before the next begins (``step_01_apple/`` and so on: the
    changed weights alone, settings, history), and a sequence that was interrupted goes on after the last
    finished one, to the same weights. It begins with a model that has forgotten nothing else. Several
    processes (see :mod:`duge_lite.models`) need a directory that all of them can read; two programs cannot
    have the same one at a time.

    Raises UnknownConceptError before anything is done, ValueError for a concept that comes twice or a
    directory of another sequence, model, memory or settings, or with a damaged file, or in use, and
    KeyboardInterrupt when it is stopped or OSError when the disk is full: the unfinished request is taken
    back, the finished ones stay.
    """
    card, config, wanted = resolve(pipe, concepts, card, config)
    folder = None if directory is None else Path(directory)
    how = {"objective": objective, "on_step": on_step, "progress": progress, "memory": memory}
    book, gone = PictureBook.of(pipe, card, config, memory, folder)
    weights, base = cross_attention_weights(pipe.unet), book.reference
    if folder is None and gone:
        base = {n: p.detach().cpu().clone() for n, p in weights.items()}
    sequence = UnlearningSequence(pipe, config, base, card, directory=folder, how=how)
    with sequence.alone():
        if folder is not None:
            about = {"objective": objective.name, "card": card.name, "memory": memory and list(memory)}
            _check(folder, about | {"config": asdict(config), "model": book.base})
            if strange := {c.name for c in gone} - {c.name for c in wanted}:
                raise ValueError(
                    f"the pipeline has forgotten {', '.join(sorted(strange))} already, which {folder} would "
                    "not know: restore() that first, or ask for all of it in one sequence"
                )
            overwrite(weights, base)
        for concept in wanted:
            sequence.request(concept)
            yield sequence


def unlearn_sequence(
    pipe: DiffusionPipeline,
    concepts: Sequence[str | Concept],
    config: UnlearnConfig | None = None,
    directory: str | Path | None = None,
    **how: object,
) -> UnlearningSequence:
    """Makes ``pipe`` forget ``concepts`` one after another: all of :func:`sequence_steps` at once."""
    *_, sequence = sequence_steps(pipe, concepts, config, directory, **how)
    return sequence


def _check(folder: Path, about: Mapping[str, object]) -> None:
    """Writes down what a directory is about, or raises ValueError when it is about something else."""
    file = folder / "sequence.json"

    def stored() -> dict[str, object]:
        if not file.exists():
            with written(file) as draft:
                draft.write_text(json.dumps(about, indent=1))
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{folder} is damaged ({error}): choose another directory") from None

    known = from_main(stored)
    other = [key for key in about if about[key] != known.get(key)]
    if "config" in other:
        was, now = known.get("config", {}), about["config"]
        other = [key for key in other if key != "config"]
        other += [f"{k} ({was.get(k)!r}, now {v!r})" for k, v in now.items() if was.get(k) != v]
    if other:
        what = f"{folder} holds a sequence of another {', '.join(other)}"
        raise ValueError(f"{what}: choose another directory")
