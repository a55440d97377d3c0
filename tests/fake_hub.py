"""Tiny models of random weights, always the same ones; and a hub on disk, with the real files' names.

What the code could trip over is real on the hub: CLIP's vocabulary and 77 tokens, text of 768 numbers, four
levels of the denoiser with eight heads, an ImageNet judge of a thousand labels.
"""

import gzip
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from duge_lite.concepts import ModelCard
from duge_lite.models import DEFAULT_REAL_MODEL

JUDGE, CLIP = "microsoft/resnet-50", "openai/clip-vit-large-patch14"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def pipeline(
    tokenizer: CLIPTokenizer, scheduler: object, unet: dict, vae: dict, text: dict
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """Of these settings; with two text encoders, for XL, where the denoiser asks for more than text."""
    torch.manual_seed(0)
    levels = len(vae["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * levels}
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    read = CLIPTextConfig(**{"vocab_size": len(tokenizer)} | ids | text)
    parts = {
        "unet": UNet2DConditionModel(layers_per_block=1, **unet).eval(),
        "vae": AutoencoderKL(norm_num_groups=4, sample_size=64, **blocks, **vae).eval(),
        "text_encoder": CLIPTextModel(read).eval(),
        "tokenizer": tokenizer,
        "scheduler": scheduler,
    }
    if "addition_embed_type" in unet:
        second = {"tokenizer_2": tokenizer, "text_encoder_2": CLIPTextModelWithProjection(read).eval()}
        pipe = StableDiffusionXLPipeline(**parts, **second, add_watermarker=False)
    else:
        unchecked = {"safety_checker": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(**parts, **unchecked, feature_extractor=CLIPImageProcessor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def judge(labels: Sequence[str]) -> ResNetForImageClassification:
    """Right about nothing, but always of the same opinion."""
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, **names)).eval()


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """The tokenizer of Stable Diffusion, from the file of merges that the package `clip` ships."""
    (folder,) = importlib.util.find_spec("clip").submodule_search_locations
    text = gzip.decompress((Path(folder) / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = [tuple(line.split()) for line in text.split("\n")[1 : 49152 - 256 - 2 + 1]]
    letters = list(bytes_to_unicode().values())
    names = [*letters, *(c + "</w>" for c in letters), *map("".join, merges)]
    vocab = {name: i for i, name in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def stable_diffusion() -> StableDiffusionPipeline:
    """Stable Diffusion 1.4 as its config files describe it, but narrow, and for pictures of 64 pixels."""
    return pipeline(
        clip_tokenizer(),
        PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
            set_alpha_to_one=False, steps_offset=1,
        ),
        unet=dict(
            sample_size=8, block_out_channels=(8, 8, 16, 16), cross_attention_dim=768, attention_head_dim=8,
            norm_num_groups=4,
        ),
        vae=dict(block_out_channels=(8,) * 4),
        text=TEXT | dict(hidden_size=768, num_hidden_layers=1, num_attention_heads=12, projection_dim=768),
    )  # fmt: skip


TEXT = dict(vocab_size=49408, intermediate_size=16, bos_token_id=0, eos_token_id=2, pad_token_id=1)
"""What its config says, whatever the tokenizer says."""


def _snapshot(home: Path, name: str) -> Path:
    """Where the hub's client looks for ``name`` when it is offline."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return folder


def write_hub(home: Path) -> None:
    """Fills ``home``, a value for HF_HOME, with Stable Diffusion 1.4 and its card's judge and CLIP."""
    stable_diffusion().to(torch.float16).save_pretrained(_snapshot(home, DEFAULT_REAL_MODEL))
    card = ModelCard.read("stable-diffusion", "dec-imagenet-20.csv")
    labels = [label for names in card.labels.values() for label in names]  # by their real names
    folder = _snapshot(home, JUDGE)
    judge([*labels, *(f"filler {i}" for i in range(1000 - len(labels)))]).save_pretrained(folder)
    ConvNextImageProcessorPil(crop_pct=0.875, size={"shortest_edge": 224}).save_pretrained(folder)
    narrow = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision = narrow | dict(patch_size=56)
    folder = _snapshot(home, CLIP)
    CLIPModel(CLIPConfig(text_config=TEXT | narrow, vision_config=vision, projection_dim=16)).save_pretrained(
        folder
    )
    CLIPImageProcessor().save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
