"""Pipelines: where they come from, on which device and in which precision they run, how they sample."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from PIL import Image

from .config import UnlearnConfig
from .doodles import captions
from .doodles.draw import STYLES
from .errors import ModelNotFoundError, UnknownConceptError
from .processes import gathered, launched, share

DEFAULT_REAL_MODEL = "CompVis/stable-diffusion-v1-4"
INDEX = "model_index.json"


def data_dir() -> Path:
    """The folder of the shipped models: inside an installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    packaged = here / "data"
    return packaged if packaged.is_dir() else here.parent / "data"


def results_dir() -> Path:
    """The folder of what ``benchmarks/`` measured: inside an installed package, or in a checkout."""
    packaged = data_dir() / "results"
    return packaged if packaged.is_dir() else data_dir().parent / "benchmarks" / "results"


def default_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU; of several launched processes each has its own."""
    if state := launched():
        return state.device
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """16 bits on CUDA (bfloat16 where the hardware has it), 32 bits elsewhere.

    On MPS half precision gives black pictures in some versions, so it is never the default there.
    """
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_pipeline(
    model: str | Path = "doodle",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """Loads a text-to-image pipeline, ready to sample: Stable Diffusion 1.x or 2.x, or XL to look at.

    Args:
        model: ``"doodle"`` (shipped with this package), a local diffusers folder, or a hub id such as
            ``"CompVis/stable-diffusion-v1-4"``.
        device: default CUDA, else MPS, else CPU; under ``accelerate launch`` each process's own GPU.
        dtype: default 16 bits on CUDA, 32 bits elsewhere. A pipeline in float16 keeps its autoencoder in 32
            bits: that one overflows, and a black picture looks like a concept well forgotten.

    Raises ModelNotFoundError when a folder is missing, broken or of another kind, or the hub does not hand
    it out. Only safetensors are read: pickled weights are refused, and so is code that comes with a model.
    """
    device = torch.device(device) if device is not None else default_device()
    dtype = dtype or default_dtype(device)
    is_doodle = str(model) == "doodle"
    source = data_dir() / "doodle-sd" if is_doodle else Path(model)
    looks_local = (
        is_doodle or isinstance(model, Path) or source.exists() or str(model).startswith((".", "/", "~"))
    )
    if looks_local and not (source.expanduser() / INDEX).is_file():
        advice = (
            "Reinstall duge-lite, or make it with `python -m duge_lite.doodles.train`."
            if is_doodle
            else "Expected a folder written by `pipe.save_pretrained(folder)`."
        )
        raise ModelNotFoundError(f"no diffusers pipeline at {source}: it holds no model_index.json. {advice}")
    place = str(source.expanduser()) if looks_local else str(model)
    try:
        kind = _read_kind(Path(place) / INDEX if looks_local else Path(hf_hub_download(place, INDEX)), place)
        xl = kind is StableDiffusionXLPipeline
        unchecked = {} if xl else {"safety_checker": None, "requires_safety_checker": False}
        with warnings.catch_warnings():  # `torch_dtype` is the name that every diffusers below 1.0 knows
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            dtypes = {"default": dtype, "vae": torch.float32 if dtype == torch.float16 else dtype}
            pipe = kind.from_pretrained(place, torch_dtype=dtypes, use_safetensors=True, **unchecked)
        if len(pipe.tokenizer) < pipe.text_encoder.config.vocab_size:  # transformers makes up an empty one
            raise OSError("the tokenizer's vocabulary is missing or cut")
        if any(p.is_meta for p in (*pipe.unet.parameters(), *pipe.vae.parameters())):
            raise OSError("weights are missing")  # of a LoRA that was saved with its model, for example
    except ModelNotFoundError:
        raise
    except Exception as error:  # diffusers, the hub and safetensors each raise their own kinds
        damaged = f"the pipeline at {source} is incomplete or damaged"
        why = damaged if looks_local else f"could not load {place!r} from the hub"
        raise ModelNotFoundError(why + trouble(error, place)) from error
    if pipe.vae.dtype != dtype:  # diffusers hands it latents in the denoiser's precision
        first = pipe.vae.post_quant_conv
        first.register_forward_pre_hook(lambda conv, args: (args[0].to(conv.weight.dtype),))
    if not is_doodle:
        pipe.vae.enable_slicing()  # decodes picture by picture, which takes less memory and no more time
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def check_reads_one_text(unet: UNet2DConditionModel) -> None:
    """Raises ValueError for Stable Diffusion XL, which reads two texts and the picture's size beside them."""
    if unet.config.addition_embed_type is not None:
        raise ValueError(
            "Stable Diffusion XL can be looked at here (duge.trace) and not changed: "
            "load Stable Diffusion 1.x or 2.x to make it forget"
        )


def load_oracle(pipe: StableDiffusionPipeline, concept: str) -> StableDiffusionPipeline:
    """``pipe`` with a denoiser that was trained in a world without ``concept``: what forgetting aims at.

    The text encoder and the autoencoder are those of ``pipe``, not copies. Raises ModelNotFoundError when
    nobody trained such a denoiser.
    """
    card = model_card(pipe)
    folder = data_dir() / f"{card.name}-oracle-{concept.replace(' ', '-')}" / "unet"
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"no oracle without {concept!r} for {card.name}: only a world of one's own can be drawn "
            f'anew, as that of the doodles by `python -m duge_lite.doodles.train --without "{concept}"`'
        )
    with warnings.catch_warnings():  # as in load_pipeline
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        unet = UNet2DConditionModel.from_pretrained(folder, use_safetensors=True, torch_dtype=pipe.unet.dtype)
    parts = pipe.components | {"unet": unet.to(pipe.unet.device).eval()}
    oracle = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    oracle.set_progress_bar_config(disable=True)
    return oracle


def _read_kind(index: Path, place: str) -> type[StableDiffusionPipeline | StableDiffusionXLPipeline]:
    """What a model's ``index`` says it is. ModelNotFoundError for another kind, and for code of its own."""
    about = json.loads(index.read_text("utf-8"))
    kinds = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
    if str(about["_class_name"]) not in kinds:
        raise ModelNotFoundError(
            f"{place} holds a {about['_class_name']}: expected Stable Diffusion 1.x or 2.x, or XL to look at"
        )
    parts = {name: part[0] for name, part in about.items() if isinstance(part, list) and part[0]}
    missing = set(parts) - {"safety_checker"} - {folder.name for folder in index.parent.iterdir()}
    if missing and Path(place).is_dir():
        raise FileNotFoundError(f"it lacks {', '.join(sorted(missing))}")
    if code := [
        file for name, module in parts.items() if (file := index.parent / name / f"{module}.py").exists()
    ]:
        raise ModelNotFoundError(
            f"{place} brings code of its own ({code[0].parent.name}/{code[0].name}), which is never run: "
            "expected parts that diffusers and transformers know"
        )
    return kinds[about["_class_name"]]


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


@dataclass(frozen=True)
class ModelCard:
    """What a model knows and how it likes to be asked.

    Attributes:
        concepts: names that can be forgotten and judged.
        styles: style names; the first is the plain one, and a judge need not know the others.
        related: for each concept, the concepts that resemble it.
        plain: for each concept, its plain prompt.
        labels: for each concept, what the judge may call it; nothing for what the judge does not know.
        order: the concepts that a benchmark asks to go, in its order.
        guidance_scale, steps: the settings that evaluation samples with.
        sampling_steps: enough steps for memory pictures and previews.
        judge: the image classifier that names its pictures: "doodle" or a hub id.
        clip: the CLIP that scores how well a picture fits its prompt: "doodle" or a hub id.
        open_choice: whether the judge may say anything that it knows, or only what the card lists.
        batch_size: how many pictures are drawn at once.
        settings: of :class:`~duge_lite.config.UnlearnConfig`, what this model needs otherwise.
    """

    name: str
    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    related: dict[str, tuple[str, ...]]
    plain: dict[str, str]
    labels: dict[str, tuple[str, ...]]
    order: tuple[str, ...]
    guidance_scale: float
    steps: int
    sampling_steps: int
    judge: str
    clip: str
    open_choice: bool = False
    batch_size: int = 32
    settings: dict[str, object] = field(default_factory=dict)

    def config(self, **changes: object) -> UnlearnConfig:
        """Settings for this model to forget with, and the changes to them."""
        return UnlearnConfig(**(self.settings | changes))

    @classmethod
    def read(cls, name: str, file: str, judged_styles: tuple[str, ...], **settings: object) -> ModelCard:
        """A card whose concepts are the rows of ``file`` in ``data/``: see the data card."""
        rows = pd.read_csv(data_dir() / file, dtype={"order": "Int64"}).set_index("concept")

        def lists(column: str) -> dict[str, tuple[str, ...]]:
            return {c: tuple(text.split("|")) for c, text in rows[column].dropna().items()}

        order = tuple(rows.order.dropna().sort_values().index)
        plain, related, labels = rows.prompt.to_dict(), lists("related"), lists("judge_label")
        labels |= {style: (style,) for style in judged_styles}
        return cls(name, tuple(rows.index), STYLES, related, plain, labels, order, **settings)

    def subject(self, concept: str) -> str:
        """How a prompt names it: "an apple", "sunglasses", "the Eiffel Tower"."""
        plain = self.plain.get(concept, captions.prompt(concept))
        return plain.removeprefix(f"{captions.nameless()} of ")

    def prompt(self, concept: str, style: str | None = None) -> str:
        """The plain prompt for ``concept``: "a photo of an apple"; or the one in another ``style``."""
        return f"{captions.nameless(style or self.styles[0])} of {self.subject(concept)}"

    @property
    def judged(self) -> tuple[str, ...]:
        """The concepts that the judge has a label for, so that they can be counted."""
        return tuple(c for c in self.concepts if c in self.labels)

    @property
    def forgettable(self) -> tuple[str, ...]:
        """All that can be asked to go: the concepts, and every style but the plain one."""
        return self.concepts + self.styles[1:]

    def prompts(self, concept: str) -> list[str]:
        """The concept in every style, or the style with every concept: what unlearning sees."""
        if concept in self.styles:
            return [self.prompt(c, concept) for c in self.concepts]
        return [self.prompt(concept, style) for style in self.styles]

    def nameless(self, concept: str) -> list[str]:
        """:meth:`prompts` with the name left out: "a neon sign", or the plain prompt in place of a style."""
        if concept in self.styles:
            return [self.prompt(c) for c in self.concepts]
        return [captions.nameless(style) for style in self.styles]

    def paraphrases(self, concept: str) -> dict[str, list[str]]:
        """Other ways to ask, that unlearning never sees: by "phrasing", and by a "synonym" for an object.

        The doodle model's training held out these phrasings, too, and taught the synonyms: to no other model.
        """
        told = captions.HELD_OUT_TEMPLATES
        if concept in self.styles:
            subjects = map(self.subject, self.concepts)
            return {"phrasing": [text.format(s) for s in subjects for text in told[concept]]}
        ways = {"phrasing": [t.format(self.subject(concept)) for s in self.styles for t in told[s]]}
        if self.name == "doodle":
            ways["synonym"] = [self.prompt(captions.SYNONYMS[concept], style) for style in self.styles]
        return ways

    def check(self, concept: str) -> str:
        """``concept`` itself; raises UnknownConceptError when it is neither a concept nor a style."""
        if concept not in self.forgettable:
            raise UnknownConceptError(concept, self.forgettable)
        return concept


def model_card(pipe: StableDiffusionPipeline) -> ModelCard:
    """The card of ``pipe``: the doodle world's, or that of Stable Diffusion with the paper's concepts.

    The doodle model is known by its text width (128) and its limit of 24 tokens.
    """
    if pipe.unet.config.cross_attention_dim == 128 and pipe.tokenizer.model_max_length == 24:
        how = {"guidance_scale": 4.0, "steps": 20, "sampling_steps": 10}
        return ModelCard.read("doodle", "doodle-20.csv", STYLES, judge="doodle", clip="doodle", **how)
    how = {"guidance_scale": 8.0, "steps": 50, "sampling_steps": 25, "open_choice": True}
    how |= {"judge": "microsoft/resnet-50", "clip": "openai/clip-vit-large-patch14", "batch_size": 4}
    # Ours, untested on real weights: a request is to take minutes on a T4. benchmarks/gpu.py says what fits:
    # a lesson of 16 layers' outputs takes 23 MB of main memory in 16 bits, 46 MB in 32.
    sizes = {"batch_size": 2, "memory_batch_size": 2, "target_size": 8, "memory_size": 40, "lessons": 64}
    how["settings"] = sizes | {"iterations": 100, "lr": 2e-5}
    return ModelCard.read("stable-diffusion", "dec-imagenet-20.csv", (), **how)


def sample(
    pipe: StableDiffusionPipeline,
    prompts: str | Sequence[str],
    seed: int | Sequence[int] = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
    latents: bool = False,
) -> list[Image.Image] | torch.Tensor:
    """Pictures for ``prompts``; picture i starts from noise of seed ``seed + i``, or of its own ``seed[i]``.

    The noise does not depend on the batch size. Under ``accelerate launch`` every process must ask, draws its
    share and gets all the pictures (:mod:`duge_lite.processes`).

    Returns a list of PIL images, or with ``latents=True`` the scaled latents (n, 4, h, w) on the CPU.
    ``steps``, ``guidance_scale`` and ``batch_size`` default to those of the model's card.
    """
    card = model_card(pipe)
    batch_size = batch_size or card.batch_size
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = [int(seed) + i for i in range(len(texts))] if isinstance(seed, Integral) else list(seed)
    if len(seeds) != len(texts):
        raise ValueError(
            f"{len(texts)} prompts and {len(seeds)} seeds: expected one seed each, or one number"
        )
    out, mine = [], share(list(zip(texts, seeds, strict=True)))
    for start in range(0, len(mine), batch_size):
        part, own = zip(*mine[start : start + batch_size], strict=True)
        result = pipe(
            list(part),
            num_inference_steps=steps or card.steps,
            guidance_scale=card.guidance_scale if guidance_scale is None else guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(int(s)) for s in own],
            output_type="latent" if latents else "pil",
        ).images
        out += [result.cpu()] if latents else result
    out = gathered(out)
    return (torch.cat(out) if latents else out)[: len(texts)]
