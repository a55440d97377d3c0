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
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .concepts import Concept, ModelCard, model_card
from .config import UnlearnConfig
from .evaluation import evaluate, sequence_metrics
from .gradient import DUGE, Objective, UnlearnState
from .models import overwrite
from .processes import from_main, is_main
from .solver import PictureBook, cross_attention_weights, fingerprint
from .unlearning import UnlearningRun, check_arguments, resolve, sync, undone_by_errors, unlearn


class Saved(Mapping):
    """Tensors of a safetensors file, read when they are asked for; they take no memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, "pt") as file:
            self.names = list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _kind(name: str) -> str:
    return next((kind for kind in ("to_q", "to_k", "to_v", "to_out") if kind in name), "other")


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
        self._after: list[Mapping[str, Tensor]] = []

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
        """Seconds and peak memory in MB, per request; the first one draws the memory."""
        rows = [{name: getattr(r, name) for name in ("concept", "seconds", "memory")} for r in self.runs]
        return pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="request"))

    def weights(self, at: int) -> Mapping[str, Tensor]:
        """The weights that differ from ``base`` after request ``at``; none for 0.

        Raises ValueError for a request that there was not.
        """
        if not 0 <= at <= len(self.runs):
            raise ValueError(f"at = {at}: expected a number from 0 (the base) to {len(self.runs)}")
        return ChainMap(*reversed(self._after[:at])) if at else {}  # a request need not change all of them

    def pipeline(self, at: int) -> DiffusionPipeline:
        """The pipeline as it was after request ``at`` (in place); 0 for the model that it began with."""
        weights, parameters = self.weights(at), dict(self.pipe.unet.named_parameters())
        overwrite(parameters, self.base)
        overwrite(parameters, weights)
        return self.pipe

    def matrix(self, concepts: Sequence[str] | None = None, **how: object) -> pd.DataFrame:
        """The accuracy matrix R[k, j]: accuracy on concept j after request k; row 0 is the base model.

        ``concepts`` defaults to all that can be forgotten and counted, styles too; the other
        arguments are those of :func:`duge_lite.evaluation.evaluate`, whose seeds are the same for every row.
        Afterwards the pipeline is the last model again.
        """
        known = [c for c in self.card.forgettable if c in self.card.labels]
        concepts = known if concepts is None else list(concepts)
        how = {"card": self.card} | how
        try:
            rows = [
                evaluate(self.pipeline(at=k), concepts, **how).accuracy for k in range(len(self.runs) + 1)
            ]
        finally:
            self.pipeline(at=len(self.runs))
        matrix = pd.DataFrame(rows, index=pd.RangeIndex(len(rows), name="after"))
        return matrix.rename_axis(columns="concept")

    def metrics(self, matrix: pd.DataFrame) -> pd.DataFrame:
        """What is gone and kept after each request; see :func:`duge_lite.evaluation.sequence_metrics`."""
        return sequence_metrics(matrix, self.concepts, self.card)

    def drift(self) -> pd.DataFrame:
        """How far the weights went, as a share of their own size: from the base, and in this request.

        One row per request and kind of layer (to_q, to_k, to_v, to_out).
        """

        def norm(change: Sequence[Tensor]) -> float:
            return float(torch.cat([c.flatten() for c in change]).norm())

        base = {name: value.float() for name, value in self.base.items() if value.ndim == 2}
        rows, last = [], base
        for k in range(1, len(self.runs) + 1):
            changed = self.weights(k)
            now = {name: changed[name].float() if name in changed else base[name] for name in base}
            for kind in dict.fromkeys(map(_kind, base)):
                mine = [name for name in base if _kind(name) == kind]
                size = norm([base[name] for name in mine])
                far, step = ([now[name] - old[name] for name in mine] for old in (base, last))
                share = {"from base": norm(far) / size, "this request": norm(step) / size}
                rows.append({"request": k, "kind": kind, **share})
            last = now
        return pd.DataFrame(rows).set_index(["request", "kind"]) if rows else pd.DataFrame()

    def append(self, run: UnlearningRun, saved: Path | None = None) -> None:
        """Takes in what was just done to the pipeline, by any method; ``saved`` is where it is on disk."""
        if saved is None:
            self._after.append(run.weights())
        else:
            self._after.append(Saved(saved / "weights.safetensors"))
            before = self._after[-2] if len(self._after) > 1 else self.base
            run.before = before if set(before) >= set(run.before) else run.before  # on disk already
        self.runs.append(run)

    def _folders(self, step: int) -> list[Path]:
        """The folders of a step: one, or none yet; drafts left out."""
        return [p for p in self.directory.glob(f"step_{step:02d}_*") if p.suffix != ".part"]

    def request(self, concept: Concept) -> UnlearningRun:
        """One more concept to forget: from disk if it was done before, else now."""
        k, name = len(self.runs) + 1, re.sub(r"[^\w-]+", "-", concept.name)
        step = None if self.directory is None else self.directory / f"step_{k:02d}_{name}"
        if step is not None and from_main(step.exists):
            run = UnlearningRun.load(step, self.pipe, self.card)
            if run.concepts != (concept,):
                run.restore()
                raise ValueError(
                    f"{step} forgets {run.concepts!r}, not {concept!r}: choose another directory"
                )
        else:
            if step is not None:
                if others := self._folders(k):
                    raise ValueError(
                        f"{self.directory} holds another sequence: {others[0].name} instead of {step.name}"
                    )
            run = unlearn(self.pipe, concept, self.config, card=self.card, **self.how)
            if run.history.index.name == "step" and len(run.history) < self.config.iterations:
                run.restore()
                raise KeyboardInterrupt(f"stopped in request {k} ({concept.name}), which is taken back")
            if step is not None:
                with undone_by_errors(dict(self.pipe.unet.named_parameters()), run.before):
                    run.save(step)
        self.append(run, step)
        return run

    def withdraw(self, concept: str) -> None:
        """Takes one request back, and leaves the model that would be there had it never been made.

        The requests after it are done anew, which the exact solver does in a second each. Raises ValueError
        when it was not made.
        """
        if concept not in self.concepts:
            made = ", ".join(self.concepts) or "(none)"
            raise ValueError(f"{concept!r} was not asked to go: the requests so far are {made}")
        k = self.concepts.index(concept)
        later = [run.concepts[0] for run in self.runs[k + 1 :]]
        self.pipeline(at=k)
        for step in reversed(range(k, len(self.runs))):  # the last first: what is left is a sequence, always
            if self.directory is not None and is_main():
                folder = self._folders(step + 1)[0]
                draft = folder.with_name(folder.name + ".part")
                os.replace(folder, draft)
                shutil.rmtree(draft)
        del self.runs[k:], self._after[k:]
        for after in later:
            self.request(after)


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
    finished one, to the same weights. Several processes (see :mod:`duge_lite.processes`) need a directory
    that all of them can read; two programs cannot have the same one at a time.

    Raises UnknownConceptError before anything is done, ValueError for a concept that comes twice or a
    directory of another sequence, model, memory or settings, or with a damaged file, or in use, and
    KeyboardInterrupt when it is stopped or OSError when the disk is full: the unfinished request is taken
    back, the finished ones stay.
    """
    check_arguments(pipe, config)
    card = card or model_card(pipe)
    config = config or UnlearnConfig(**card.settings)
    wanted = resolve(pipe, concepts, card)
    folder = None if directory is None else Path(directory)
    how = {"objective": objective, "on_step": on_step, "progress": progress, "memory": memory}
    with ExitStack() as stack:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if is_main():
                lock = FileLock(folder / "sequence.lock", timeout=0)
                try:
                    stack.enter_context(lock)
                except Timeout as error:
                    raise ValueError(
                        f"{folder} is in use by another program: wait for it, or choose another directory"
                    ) from error
            how["directory"] = folder
            base = _open(pipe, folder, config, objective, card, memory)
        else:
            base = {n: p.detach().cpu().clone() for n, p in cross_attention_weights(pipe.unet).items()}
        PictureBook.of(pipe, card, config, memory, folder)
        sequence = UnlearningSequence(pipe, config, base, card, directory=folder, how=how)
        for concept in wanted:
            sequence.request(concept)
            yield sequence


def unlearn_sequence(
    pipe: DiffusionPipeline,
    concepts: Sequence[str | Concept],
    config: UnlearnConfig | None = None,
    directory: str | Path | None = None,
    objective: Objective = DUGE,
    on_step: Callable[[UnlearnState], None] | None = None,
    progress: bool = True,
    memory: Sequence[str] | None = None,
    card: ModelCard | None = None,
) -> UnlearningSequence:
    """Makes ``pipe`` forget ``concepts`` one after another: all of :func:`sequence_steps` at once."""
    *_, sequence = sequence_steps(
        pipe, concepts, config, directory, objective, on_step, progress, memory, card
    )
    return sequence


def _open(
    pipe: DiffusionPipeline,
    folder: Path,
    config: UnlearnConfig,
    objective: Objective,
    card: ModelCard,
    memory: Sequence[str] | None,
) -> Mapping[str, Tensor]:
    """Starts a directory, or checks that the same request did; the pipeline is then at step 0."""
    about = {"objective": objective.name, "card": card.name, "memory": memory and list(memory)}
    about["config"] = asdict(config)
    file, weights = folder / "sequence.json", cross_attention_weights(pipe.unet)

    def start() -> bool:
        if file.exists():
            return False
        tensors = {n: p.detach().cpu().contiguous() for n, p in weights.items()}
        save_file(tensors, folder / "base.safetensors")
        draft = file.with_suffix(".part")
        draft.write_text(json.dumps(about | {"model": fingerprint(pipe)}, indent=1))
        sync(draft, folder / "base.safetensors")
        os.replace(draft, file)  # last: it says that all is there
        return True

    if not from_main(start):
        try:
            stored = json.loads(file.read_text())
            base = Saved(folder / "base.safetensors")
        except Exception as error:  # json and safetensors each raise their own kinds
            raise ValueError(f"{folder} is damaged ({error}): choose another directory") from error
        model, now = stored.pop("model", None), {n: p.detach().clone() for n, p in weights.items()}
        other = [key for key in about if about[key] != stored.get(key)]
        if other == ["config"]:
            known = stored["config"]
            other = [
                f"{k} ({known.get(k)!r}, now {v!r})" for k, v in about["config"].items() if known.get(k) != v
            ]
        if not other and {n: w.shape for n, w in base.items()} == {n: w.shape for n, w in weights.items()}:
            overwrite(weights, base)
        if other or fingerprint(pipe) != model:
            overwrite(weights, now)
            raise ValueError(
                f"{folder} holds a sequence of another {', '.join(other) or 'model'}: "
                "choose another directory"
            )
    return Saved(folder / "base.safetensors")
