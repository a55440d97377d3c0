"""One concept after another: a sequence of requests to forget, each starting from the last model.

Every finished request is on disk before the next one begins, so that a sequence that was killed goes on
where it was, and any model along the way can be opened again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import UnlearnConfig
from .evaluation import Judge, clip_score, evaluate, kid, sequence_metrics
from .lessons import DUGE, Objective, Pictures, fill_memory
from .models import model_card, sample
from .processes import check_batches, from_main
from .unlearning import (
    UnlearningRun,
    UnlearnState,
    overwrite,
    plain_parameters,
    swapped,
    trainable_parameters,
    unlearn,
)


def _kind(name: str) -> str:
    return next((kind for kind in ("to_q", "to_k", "to_v", "to_out") if kind in name), "other")


@dataclass
class UnlearningSequence:
    """What :func:`unlearn_sequence` did, step by step; step 0 is the base model.

    Attributes:
        concepts: what has been forgotten so far, in order.
        config: the settings of the first request; request k adds k to its seed.
        runs: one per request.
        base: the trained weights of the base model, on the CPU.
    """

    pipe: StableDiffusionPipeline = field(repr=False)
    config: UnlearnConfig
    base: dict[str, Tensor] = field(repr=False)
    runs: list[UnlearningRun] = field(default_factory=list, repr=False)

    @property
    def concepts(self) -> tuple[str, ...]:
        return tuple(run.concept for run in self.runs)

    @property
    def history(self) -> pd.DataFrame:
        """The histories of all requests, indexed by (request, step); requests count from 1."""
        parts = {k: run.history for k, run in enumerate(self.runs, 1)}
        return pd.concat(parts, names=["request", "step"]) if parts else pd.DataFrame()

    def costs(self) -> pd.DataFrame:
        """Seconds, pictures through the UNet and peak memory in MB, per request.

        The seconds of the first request hold the drawing of a memory that is kept; the pictures do not.
        """
        rows = [{n: getattr(r, n) for n in ("concept", "seconds", "passes", "memory")} for r in self.runs]
        return pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="request"))

    def weights(self, at: int) -> dict[str, Tensor]:
        """The trained weights after request ``at``; 0 for the base model's."""
        if not 0 <= at <= len(self.runs):
            raise ValueError(f"at = {at}: expected a number from 0 (the base) to {len(self.runs)}")
        if at == 0:
            return self.base
        return self.runs[at].before if at < len(self.runs) else self._last

    def pipeline(self, at: int) -> StableDiffusionPipeline:
        """The pipeline as it was after request ``at`` (in place); 0 for the base model.

        Raises ValueError for a request that there was not.
        """
        overwrite(plain_parameters(self.pipe.unet), self.weights(at))
        return self.pipe

    def matrix(self, concepts: Sequence[str] | None = None, **how: object) -> pd.DataFrame:
        """The accuracy matrix R[k, j]: accuracy on concept j after request k; row 0 is the base model.

        ``concepts`` defaults to all that can be forgotten and counted, styles too; the other
        arguments are those of :func:`duge_lite.evaluation.evaluate`, whose seeds are the same for every row.
        Afterwards the pipeline is the last model again.
        """
        card = model_card(self.pipe)
        known = [c for c in card.forgettable if c in card.labels]
        concepts = known if concepts is None else list(concepts)
        try:
            rows = [
                evaluate(self.pipeline(at=k), concepts, **how).accuracy for k in range(len(self.runs) + 1)
            ]
        finally:
            self.pipeline(at=len(self.runs))
        matrix = pd.DataFrame(rows, index=pd.RangeIndex(len(rows), name="after"))
        return matrix.rename_axis(columns="concept")

    def metrics(self, matrix: pd.DataFrame) -> pd.DataFrame:
        """UA, IRA, CRA and more after each request; see :func:`duge_lite.evaluation.sequence_metrics`."""
        return sequence_metrics(matrix, self.concepts, model_card(self.pipe))

    def quality(
        self,
        concepts: Sequence[str] | None = None,
        images: int = 5,
        steps: int | None = None,
        judge: Judge | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """What accuracy does not see, on pictures of ``concepts``: by default all objects that are to stay.

        ``KID``: distance from base pictures of *other* seeds, so that row 0, the base model itself, says how
        far apart two draws of one model are; ``CLIP``: the mean :func:`~duge_lite.evaluation.clip_score`.
        One row per model; afterwards the pipeline is the last one again.
        """
        card = model_card(self.pipe)
        judge = judge or Judge.load(card)
        stay = [c for c in card.concepts if c not in self.concepts] if concepts is None else concepts
        prompts = [card.prompt(c) for c in stay for _ in range(images)]
        try:
            others = sample(self.pipeline(at=0), prompts, seed=seed + len(prompts), steps=steps)
            rows = []
            for k in range(len(self.runs) + 1):
                drawn = sample(self.pipeline(at=k), prompts, seed=seed, steps=steps)
                score = float(clip_score(drawn, prompts, card.clip).mean())
                rows.append({"KID": kid(others, drawn, judge), "CLIP": score})
        finally:
            self.pipeline(at=len(self.runs))
        return pd.DataFrame(rows, index=pd.RangeIndex(len(rows), name="after"))

    def drift(self) -> pd.DataFrame:
        """How far the trained weights went, as a share of their own size: from the base, and in this request.

        One row per request and kind of layer (to_q, to_k, to_v, to_out, other).
        """

        def norm(change: dict[str, Tensor], kind: str) -> float:
            own = [v.float().flatten() for n, v in change.items() if _kind(n) == kind]
            return float(torch.cat(own).norm())

        rows = []
        for k in range(1, len(self.runs) + 1):
            now, last = self.weights(k), self.weights(k - 1)
            for kind in dict.fromkeys(map(_kind, now)):
                size = norm(self.base, kind) or 1.0  # LoRA starts from zeros
                far, step = ({n: now[n].float() - w[n].float() for n in now} for w in (self.base, last))
                share = {"from base": norm(far, kind) / size, "this request": norm(step, kind) / size}
                rows.append({"request": k, "kind": kind, **share})
        return pd.DataFrame(rows).set_index(["request", "kind"]) if rows else pd.DataFrame()

    def __post_init__(self) -> None:
        self._last = self.base

    def append(self, run: UnlearningRun) -> None:
        """Takes in what was just done to the pipeline, by whatever method."""
        parameters = plain_parameters(self.pipe.unet)
        self.runs.append(run)
        self._last = {n: parameters[n].detach().cpu().clone() for n in self.base}


def sequence_steps(
    pipe: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: UnlearnConfig | None = None,
    directory: str | Path | None = None,
    objective: Objective = DUGE,
    on_step: Callable[[UnlearnState], None] | None = None,
    progress: bool = True,
    memory: Pictures | None = None,
) -> Iterator[UnlearningSequence]:
    """Forgets ``concepts`` in order, in place, yielding the sequence so far after each request.

    Each request starts from the last model. The memory is of constant size and shows nothing that was ever
    asked to go: with ``reference="base"`` it is drawn once (or given), and what has to leave it is replaced
    by fresh pictures; with "previous" each model draws its own. A share ``config.revisit`` of the concept's
    pictures shows earlier ones.

    With ``directory``, each request is saved before the next begins (``step_01_apple/`` and so on: the
    trained weights alone, settings, history), and a sequence that was interrupted goes on after the last
    finished one, to the same weights.

    Several processes (see :mod:`duge_lite.processes`) need a directory that all of them can read.

    Raises UnknownConceptError before anything is done, ValueError for a concept that comes twice or a
    directory of another sequence or with a damaged file or a batch that the processes cannot share equally,
    and KeyboardInterrupt when it is stopped or OSError when the disk is full: the unfinished request is taken
    back, the finished ones stay.
    """
    card = model_card(pipe)
    config = config or card.config()
    check_batches(batch_size=config.batch_size, memory_batch_size=config.memory_batch_size)
    for concept in concepts:
        card.check(concept)
    if len(set(concepts)) != len(concepts):
        raise ValueError(f"{', '.join(concepts)}: a concept comes twice, but can be forgotten only once")
    trained = trainable_parameters(pipe.unet, config)
    base = {name: p.detach().cpu().clone() for name, p in trained.items()}
    folder = None if directory is None else Path(directory)
    if folder is not None:
        base = _open(folder, config, objective, base)
    sequence, filled = UnlearningSequence(pipe, config, base), 0
    sequence.pipeline(at=0)  # a sequence that goes on starts over from the base, and reads what is there
    for k, concept in enumerate(concepts, 1):
        step = None if folder is None else folder / f"step_{k:02d}_{concept.replace(' ', '-')}"
        if step is not None and from_main(step.exists):
            run = UnlearningRun.load(step, pipe)
        else:
            if folder is not None and (other := next(folder.glob(f"step_{k:02d}_*"), None)):
                if not other.name.endswith(".part"):
                    raise ValueError(f"{folder} holds another sequence: {other.name} instead of {step.name}")
            mine = replace(config, seed=config.seed + k - 1)
            earlier = tuple(concepts[: k - 1])
            started = time.perf_counter()
            if config.reference == "base":
                trained = trainable_parameters(pipe.unet, config)
                with swapped(trained, {name: value.to(trained[name]) for name, value in base.items()}):
                    for j in range(filled, k):  # request by request, also after an interruption
                        once = replace(config, seed=config.seed + j)
                        memory = fill_memory(pipe, concepts[: j + 1], once, memory)
                filled = k
            filling = time.perf_counter() - started
            last = sequence.weights(at=k - 1)
            if config.merge:
                sequence.pipeline(at=0)
            try:
                run = unlearn(pipe, concept, mine, memory, on_step, progress, objective, base, earlier)
            except BaseException:
                if config.merge:
                    sequence.pipeline(at=k - 1)
                raise
            run = replace(run, seconds=run.seconds + filling)
            if config.merge:
                parameters = plain_parameters(pipe.unet)
                changed = {n: last[n] + parameters[n].detach().cpu() - base[n] for n in base}
                overwrite(parameters, changed)
                run = replace(run, before=last)
            if len(run.history) < config.iterations:
                run.restore()
                raise KeyboardInterrupt(f"stopped in request {k} ({concept}), which is taken back")
            if step is not None:
                try:
                    run.save(step)
                except OSError:
                    run.restore()
                    raise
        sequence.append(run)
        yield sequence


def unlearn_sequence(
    pipe: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: UnlearnConfig | None = None,
    directory: str | Path | None = None,
    objective: Objective = DUGE,
    on_step: Callable[[UnlearnState], None] | None = None,
    progress: bool = True,
    memory: Pictures | None = None,
) -> UnlearningSequence:
    """Makes ``pipe`` forget ``concepts`` one after another: all of :func:`sequence_steps` at once."""
    if not concepts:
        raise ValueError("no concepts: expected at least one to forget")
    *_, sequence = sequence_steps(pipe, concepts, config, directory, objective, on_step, progress, memory)
    return sequence


def _open(
    folder: Path, config: UnlearnConfig, objective: Objective, base: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Starts a directory, or checks that it was started by the same request; returns the base weights."""
    about = {"objective": objective.name, "config": asdict(config)}

    def start() -> bool:
        if (folder / "sequence.json").exists():
            return False
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: w.contiguous() for n, w in base.items()}, folder / "base.safetensors")
        (folder / "sequence.json").write_text(json.dumps(about, indent=1))  # last: it says that all is there
        return True

    if from_main(start):
        return base
    stored = json.loads((folder / "sequence.json").read_text())
    known = UnlearnConfig.from_json(json.dumps(stored["config"]))  # a later version may have more settings
    stored["config"] = asdict(known)
    if stored != about:
        raise ValueError(f"{folder} holds a sequence with other settings: choose another directory")
    return load_file(folder / "base.safetensors")
