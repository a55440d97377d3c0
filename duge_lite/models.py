"""Pipelines: where they come from, how they sample, in one process or several; their weights, their files.

Several processes, each on a GPU of its own, run the same program and make the same calls in the same order
(``accelerate launch --multi_gpu``, also on CPUs). Then :func:`~duge_lite.unlearning.unlearn`, sequences,
:func:`sample` and all that draws with it end in each as they would in one alone: prompts are shared out, and
pictures, or what the layers saw of them, gathered; the main process alone writes files and shows progress.
The gradient solver, attacks and what a :func:`~duge_lite.attention.trace` draws are not shared.

Whoever makes a call that the others do not make waits for them: print and plot in the main process
(:func:`is_main`), but draw, forget and save in all. When one dies, the launcher ends the others; one that
catches its error and goes on keeps them waiting until the backend's time is out.

In a process that no launcher started nothing is set up, so that a notebook can still start several with
``accelerate.notebook_launcher``. It forks: the notebook must not have touched the GPU, and without one must
have begun with ``torch.set_num_threads(1)``, or the forks hang.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from PIL import Image
from tqdm.auto import tqdm

from .concepts import ModelCard, data_dir, model_card
from .errors import ModelNotFoundError

DEFAULT_REAL_MODEL = "CompVis/stable-diffusion-v1-4"

# ---- one process or several


def launched() -> PartialState | None:
    """The launched processes as this one sees them, which joins them if it did not; None when it is alone."""
    if "LOCAL_RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    return PartialState(cpu=not torch.cuda.is_available())


def with_bar(items: Sequence, what: str) -> Iterable:
    """``items``, with a bar in a notebook or a terminal where they take more than two seconds."""
    return tqdm(items, what, leave=False, delay=2, disable=None if is_main() else True)


def is_main() -> bool:
    """Whether this process writes the files and shows progress."""
    state = launched()
    return state is None or state.is_main_process


def share(items: Sequence) -> Sequence:
    """This process's part of ``items``; in their order the parts make up the whole, once cut to its length.

    A process for which none is left repeats the last one.
    """
    if (state := launched()) is None:
        return items
    size = -(-len(items) // state.num_processes)
    part = items[state.process_index * size :][:size]
    return part if len(part) else items[-1:]


def gathered(mine: list) -> list:
    """The lists of all processes, one after another, in every process."""
    return gather_object(mine) if launched() else mine


def from_main(function: Callable[[], object]) -> object:
    """What ``function`` returns, or raises, in the main process, for all; they wait."""
    if launched() is None:
        return function()
    outcome = [None, None]
    if is_main():
        try:
            outcome[0] = function()
        except Exception as error:  # or the others would wait for ever
            outcome[1] = error
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A draft of ``path``, a file or a folder, which gets its name when all of it is on the disk, or never.

    Raises OSError, and leaves what was there, when the block fails.
    """
    draft = path.with_name(path.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)  # of somebody who was killed
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield draft
        for part in draft.iterdir() if draft.is_dir() else [draft]:
            with part.open("rb") as file:
                os.fsync(file.fileno())  # or the rename could overtake what it renames
        os.replace(draft, path)
    except Exception as error:  # a full disk: safetensors has its own kind of error for it
        shutil.rmtree(draft, ignore_errors=True)
        draft.unlink(missing_ok=True)
        raise OSError(f"could not write {path} ({error}): is there room on the disk?") from error


# ---- where pipelines come from


def results_dir() -> Path:
    """The folder of what ``benchmarks/`` measured: inside an installed package, or in a checkout."""
    packaged = data_dir() / "results"
    return packaged if packaged.is_dir() else data_dir().parent / "benchmarks" / "results"


def course_dir() -> Path:
    """The folder of ``notebooks/`` and ``docs/``: inside an installed package, or the checkout."""
    packaged = data_dir() / "course"
    return packaged if packaged.is_dir() else data_dir().parent


def default_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU; of several launched processes each has its own."""
    if state := launched():
        return state.device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """16 bits on CUDA (bfloat16 where the hardware has it), 32 elsewhere: MPS can draw black in 16."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_pipeline(
    model: str | Path = "doodle", device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """Loads a text-to-image pipeline, ready to sample: Stable Diffusion 1.x or 2.x, or XL to look at.

    Args:
        model: ``"doodle"`` (shipped with this package), a local diffusers folder, or a hub id such as
            ``"CompVis/stable-diffusion-v1-4"``.
        device: by default CUDA, else MPS, else CPU; under ``accelerate launch`` each process's own GPU.
        dtype: by default 16 bits on CUDA, 32 bits elsewhere. A pipeline in float16 keeps its autoencoder in
            32 bits: that one overflows, and a black picture looks like a concept well forgotten.

    Raises ModelNotFoundError when a folder is missing, broken or of another kind, or the hub does not hand
    it out. Only safetensors are read: pickled weights are refused, and so is code that comes with a model.
    """
    device = torch.device(device) if device is not None else default_device()
    dtype = dtype or default_dtype(device)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype = {dtype!r}: expected a torch.dtype, such as torch.float32")
    is_doodle = str(model) == "doodle"
    source = data_dir() / "doodle-sd" if is_doodle else Path(model).expanduser()
    local = is_doodle or isinstance(model, Path) or source.exists() or model.startswith((".", "/", "~"))
    index, place = source / "model_index.json", str(source if local else model)
    if local and not index.is_file():
        advice = "Expected a folder written by `pipe.save_pretrained(folder)`."
        if is_doodle:
            advice = "Reinstall duge-lite, or make it with `python -m duge_lite.doodles.train`."
        raise ModelNotFoundError(f"no diffusers pipeline at {source}: it holds no {index.name}. {advice}")
    try:
        kind = _read_kind(index if local else Path(hf_hub_download(place, index.name)), place)
        xl = kind is StableDiffusionXLPipeline
        unchecked = {} if xl else {"safety_checker": None, "requires_safety_checker": False}
        dtypes = {"default": dtype, "vae": torch.float32 if dtype == torch.float16 else dtype}
        pipe = _load(kind, place, dtypes, **unchecked)
        if len(pipe.tokenizer) < pipe.text_encoder.config.vocab_size:  # transformers makes up an empty one
            raise OSError("the tokenizer's vocabulary is missing or cut")
        if any(p.is_meta for p in (*pipe.unet.parameters(), *pipe.vae.parameters())):
            raise OSError("weights are missing")  # of a LoRA that was saved with its model, for example
    except ModelNotFoundError:
        raise
    except Exception as error:  # diffusers, the hub and safetensors each raise their own kinds
        damaged = f"the pipeline at {source} is incomplete or damaged"
        why = damaged if local else f"could not load {place!r} from the hub"
        raise ModelNotFoundError(why + trouble(error, place)) from error
    if pipe.vae.dtype != dtype:  # diffusers hands it latents in the denoiser's precision
        first = pipe.vae.post_quant_conv
        first.register_forward_pre_hook(lambda conv, args: (args[0].to(conv.weight.dtype),))
    if not is_doodle:
        pipe.vae.enable_slicing()  # decodes picture by picture, which takes less memory and no more time
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_oracle(pipe: StableDiffusionPipeline, concept: str) -> StableDiffusionPipeline:
    """``pipe`` with a denoiser that was trained in a world without ``concept``: what forgetting aims at.

    The text encoder and the autoencoder are those of ``pipe``, not copies. Raises ModelNotFoundError when
    nobody trained such a denoiser.
    """
    card = model_card(pipe)
    folder = data_dir() / f"{card.name}-oracle-{concept.replace(' ', '-')}" / "unet"
    if folder.parents[1] != data_dir() or not folder.is_dir():  # a name with slashes leads elsewhere
        raise ModelNotFoundError(
            f"no oracle without {concept!r} for {card.name}: only a world of one's own can be drawn "
            f'anew, as that of the doodles by `python -m duge_lite.doodles.train --without "{concept}"`'
        )
    unet = _load(UNet2DConditionModel, folder, pipe.unet.dtype).to(pipe.unet.device).eval()
    oracle = StableDiffusionPipeline(**pipe.components | {"unet": unet}, requires_safety_checker=False)
    oracle.set_progress_bar_config(disable=True)
    return oracle


def _load(kind: type, place: str | Path, dtype: object, **options: object):
    with warnings.catch_warnings():  # `torch_dtype` is the name that every diffusers below 1.0 knows
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        return kind.from_pretrained(place, torch_dtype=dtype, use_safetensors=True, **options)


def _read_kind(index: Path, place: str) -> type[StableDiffusionPipeline | StableDiffusionXLPipeline]:
    """What a model's ``index`` says it is. ModelNotFoundError for another kind, and for code of its own."""
    about = json.loads(index.read_text("utf-8"))
    kinds = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
    if (name := str(about["_class_name"])) not in kinds:
        expected = "expected Stable Diffusion 1.x or 2.x, or XL to look at"
        raise ModelNotFoundError(f"{place} holds a {name}: {expected}")
    parts = {part: of[0] for part, of in about.items() if isinstance(of, list) and of[0]}
    missing = set(parts) - {"safety_checker"} - {folder.name for folder in index.parent.iterdir()}
    if missing and Path(place).is_dir():
        raise FileNotFoundError(f"it lacks {', '.join(sorted(missing))}")
    if code := [f"{n}/{m}.py" for n, m in parts.items() if (index.parent / n / f"{m}.py").exists()]:
        why = f"{place} brings code of its own ({code[0]}), which is never run"
        raise ModelNotFoundError(f"{why}: expected parts that diffusers and transformers know")
    return kinds[name]


def trouble(error: BaseException, place: str | Path) -> str:
    """Why ``place`` could not be loaded, in brackets, and a sentence that says what to do."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)  # the hub's own error says most, if there is one
    error = next((e for e in chain if type(e).__module__.startswith("huggingface_hub")), error)
    login = "log in with `hf auth login` or set HF_TOKEN"
    hub = {
        "GatedRepoError": f"Accept its terms at https://huggingface.co/{place}, then {login}.",
        "RepositoryNotFoundError": f"Check the name; if it is the name of a private model, {login}.",
    }
    elsewhere = 'Check the name and the network, or stay offline with load_pipeline("doodle").'
    here = "Compare it with a fresh copy; only safetensors files are read."
    advice = here if Path(place).is_dir() else hub.get(type(error).__name__, elsewhere)
    text = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")
    return f" ({type(error).__name__}: {text}). {advice}"


def check_pipeline(pipe: object) -> None:
    """Raises TypeError for anything but a pipeline with a denoiser."""
    if not hasattr(pipe, "unet"):
        kind = type(pipe).__name__
        raise TypeError(f"pipe is {kind}: expected a pipeline, as duge.load_pipeline() returns it")


# ---- how they sample


def sample(
    pipe: StableDiffusionPipeline | StableDiffusionXLPipeline, prompts: str | Sequence[str],
    seed: int | Sequence[int] = 0, num_inference_steps: int | None = None,
    guidance_scale: float | None = None, batch_size: int | None = None, output_type: str = "pil",
    card: ModelCard | None = None, **options: object,
) -> list[Image.Image] | torch.Tensor:  # fmt: skip
    """Pictures for ``prompts``; picture i starts from noise of seed ``seed + i``, or of its own ``seed[i]``.

    Under ``accelerate launch`` every process must ask, draws its share and gets all the pictures.

    Returns a list of PIL images, or with ``output_type="latent"`` the scaled latents (n, 4, h, w) on the CPU.
    ``num_inference_steps``, ``guidance_scale`` and ``batch_size`` default to those of the model's card;
    ``options`` go to the pipeline as they are. Raises TypeError for one that it does not know, ValueError for
    numbers out of range, or another number of seeds than of prompts.
    """
    check_pipeline(pipe)
    card = card or model_card(pipe)
    steps = card.num_inference_steps if num_inference_steps is None else num_inference_steps
    scale = card.guidance_scale if guidance_scale is None else guidance_scale
    batch_size = card.batch_size if batch_size is None else batch_size
    sizes = {name: options[name] for name in ("height", "width") if options.get(name) is not None}
    for name, value in {"num_inference_steps": steps, "batch_size": batch_size, **sizes}.items():
        if not isinstance(value, Integral) or value < 1:  # diffusers takes 0 pixels for "not given"
            raise ValueError(f"{name} = {value!r}: expected a whole number, at least 1")
    if len(sizes) == 1:  # diffusers would ignore it
        raise ValueError("height and width go together: expected both, or none")
    if not 0 <= scale < math.inf:
        raise ValueError(f"guidance_scale = {scale!r}: expected a number from 0 (the empty prompt) up")
    if output_type not in ("pil", "latent"):
        raise ValueError(f'output_type = {output_type!r}: expected "pil" or "latent"')
    if unknown := set(options) - set(inspect.signature(type(pipe).__call__).parameters):
        raise TypeError(f"{type(pipe).__name__} got an unexpected keyword argument {min(unknown)!r}")
    texts = [prompts] if isinstance(prompts, str | None) else list(prompts)
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"a prompt is {wrong[0]!r}: expected a text")
    if isinstance(seed, str | float | None):
        raise TypeError(f"seed = {seed!r}: expected a whole number, or one for each prompt")
    seeds = range(seed, seed + len(texts)) if isinstance(seed, Integral) else list(seed)
    if len(seeds) != len(texts):
        count = f"{len(texts)} prompts and {len(seeds)} seeds"
        raise ValueError(f"{count}: expected one seed each, or one number")
    unwanted, out, mine = options.get("negative_prompt"), [], share(list(zip(texts, seeds, strict=True)))
    for start in with_bar(range(0, len(mine), batch_size), "drawing"):
        part, own = zip(*mine[start : start + batch_size], strict=True)
        if isinstance(unwanted, str):
            options["negative_prompt"] = [unwanted] * len(part)  # diffusers wants as many
        result = pipe(
            list(part),
            num_inference_steps=int(steps),
            guidance_scale=float(scale),
            generator=[torch.Generator("cpu").manual_seed(int(s)) for s in own],
            output_type=output_type,
            **options,
        ).images
        out += [result.cpu()] if output_type == "latent" else result
    out = gathered(out)
    return (torch.cat(out) if output_type == "latent" else out)[: len(texts)]


@torch.no_grad()
def encode_prompts(
    pipe: StableDiffusionPipeline | StableDiffusionXLPipeline, prompts: Sequence[str]
) -> torch.Tensor:
    """What the denoiser reads: hidden states (n, T, D), float32, on the CPU; XL's two side by side."""
    distinct = list(dict.fromkeys(prompts))
    how = {"device": pipe.unet.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    batches = (distinct[i : i + 64] for i in range(0, len(distinct), 64))
    states = torch.cat([pipe.encode_prompt(batch, **how)[0].float().cpu() for batch in batches])
    return states[[distinct.index(p) for p in prompts]]


@dataclass(frozen=True)
class Pictures:
    """Noise-free latents with the text that they were drawn from, as many of each, or a ValueError."""

    latents: torch.Tensor  #: (n, 4, h, w), scaled
    encoder_hidden_states: torch.Tensor  #: (n, T, D)
    prompts: tuple[str, ...]  #: n

    def __post_init__(self) -> None:
        counts = len(self.latents), len(self.encoder_hidden_states), len(self.prompts)
        if len(set(counts)) != 1:
            raise ValueError("{} latents, {} texts, {} prompts: expected one each".format(*counts))


def draw_pictures(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], seed: int | Sequence[int],
    card: ModelCard | None = None,
) -> Pictures:  # fmt: skip
    """Lets the pipeline draw ``prompts``: what a model knows, in its own hand."""
    card = card or model_card(pipe)
    latents = sample(pipe, prompts, seed, card.sampling_steps, output_type="latent", card=card)
    return Pictures(latents.float(), encode_prompts(pipe, prompts), tuple(prompts))


# ---- their weights


def copied(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights as they are now, in main memory."""
    return {name: w.detach().cpu().clone() for name, w in weights.items()}


def overwrite(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Writes ``values`` over the parameters of the same names, in place."""
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    torch.clear_autocast_cache()  # or a caller's torch.autocast would go on with 16-bit copies of the old


@contextmanager
def swapped(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Lets the model have other weights for a moment."""
    own = {name: p.data for name, p in parameters.items()}
    torch.clear_autocast_cache()  # a caller's: see overwrite()
    try:
        for name, p in parameters.items():
            p.data = values[name].to(p)
        yield
    finally:
        for name, p in parameters.items():
            p.data = own[name]
        torch.clear_autocast_cache()
