"""duge_lite: see how a text-to-image diffusion model can be made to forget.

>>> import duge_lite as duge
>>> pipe = duge.load_pipeline()
>>> run = duge.unlearn(pipe, "apple")
>>> duge.evaluate(pipe, ["apple", "orange"])
"""

import importlib

from transformers.utils import logging as _logging

_verbosity = _logging.get_verbosity()
_logging.set_verbosity_error()  # without torchvision, diffusers' own imports warn about image processors
import diffusers as _diffusers

_diffusers.StableDiffusionPipeline  # noqa: B018 (imported lazily: touch it while it is quiet)
_logging.set_verbosity(_verbosity)

from . import checks, doodles, errors, losses
from .attention import AttentionTrace, edit_attention, record_attention, trace
from .concepts import Concept, ModelCard, UnlearnConfig, model_card
from .evaluation import ClipJudge, Judge, evaluate
from .models import data_dir, is_main, load_oracle, load_pipeline, results_dir, sample
from .unlearning import UnlearningRun, UnlearningSequence, unlearn, unlearn_sequence, unlearn_steps
from .viewer import compare

__version__ = "0.2.0"
__all__ = [
    "AttentionTrace", "ClipJudge", "Concept", "Judge", "ModelCard", "UnlearnConfig", "UnlearningRun",
    "UnlearningSequence", "checks", "compare", "data_dir", "doodles", "edit_attention", "errors", "evaluate",
    "is_main", "load_oracle", "load_pipeline", "losses", "model_card", "record_attention", "results_dir",
    "sample", "trace", "unlearn", "unlearn_sequence", "unlearn_steps",
]  # fmt: skip


def __getattr__(name: str):
    if name in ("figures", "widgets"):  # when they are asked for: they take a while to import
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
