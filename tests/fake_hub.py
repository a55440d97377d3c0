"""Tiny models of random weights, always the same ones; and a hub on disk, with the real files' names.

What the code could trip over is real on the hub: CLIP's vocabulary and 77 tokens, text of 768 numbers, four
levels of the denoiser with eight heads, an ImageNet judge of a thousand labels.
"""

import gzip
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from duge_lite.concepts import ModelCard
from duge_lite.models import DEFAULT_REAL_MODEL

JUDGE, CLIP = "microsoft/resnet-50", "openai/clip-vit-large-patch14"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def pipeline(tokenizer, scheduler, unet: dict, text: dict, levels: int = 4, **vae: bool):
    """Of these settings; with two text encoders, for XL, where the denoiser asks for more than text."""
    torch.manual_seed(0)
    vae |= dict(down_block_types=("DownEncoderBlock2D",) * levels, block_out_channels=(8,) * levels)
    vae |= dict(up_block_types=("UpDecoderBlock2D",) * levels, norm_num_groups=4, sample_size=64)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    read = transformers.CLIPTextConfig(**{"vocab_size": len(tokenizer)} | ids | text)
    parts = {"unet": diffusers.UNet2DConditionModel(layers_per_block=1, **unet).eval()}
    parts |= {"vae": diffusers.AutoencoderKL(**vae).eval(), "tokenizer": tokenizer, "scheduler": scheduler}
    parts |= {"text_encoder": transformers.CLIPTextModel(read).eval()}
    if "addition_embed_type" in unet:
        second = transformers.CLIPTextModelWithProjection(read).eval()
        two = {"tokenizer_2": tokenizer, "text_encoder_2": second}
        pipe = StableDiffusionXLPipeline(**parts, **two, add_watermarker=False)
    else:
        parts |= {"safety_checker": None, "feature_extractor": transformers.CLIPImageProcessor()}
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def judge(labels: Sequence[str]) -> transformers.ResNetForImageClassification:
    """Right about nothing, but always of the same opinion."""
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, **names)).eval()


@cache
def clip_tokenizer() -> transformers.CLIPTokenizer:
    """The tokenizer of Stable Diffusion, from the file of merges that the package `clip` ships."""
    (folder,) = importlib.util.find_spec("clip").submodule_search_locations
    text = gzip.decompress((Path(folder) / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = [tuple(line.split()) for line in text.split("\n")[1 : 49152 - 256 - 2 + 1]]
    letters = list(bytes_to_unicode().values())
    names = [*letters, *(c + "</w>" for c in letters), *map("".join, merges)]
    vocab = {name: i for i, name in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


TEXT = dict(vocab_size=49408, intermediate_size=16, bos_token_id=0, eos_token_id=2, pad_token_id=1)
"""What its config says, whatever the tokenizer says."""


def stable_diffusion() -> StableDiffusionPipeline:
    """Stable Diffusion 1.4 as its config files describe it, but narrow, and for pictures of 64 pixels."""
    noise = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    scheduler = diffusers.PNDMScheduler(**noise, skip_prk_steps=True, set_alpha_to_one=False)
    unet = dict(sample_size=8, block_out_channels=(8, 8, 16, 16), norm_num_groups=4)
    unet |= dict(cross_attention_dim=768, attention_head_dim=8)
    text = TEXT | dict(hidden_size=768, num_hidden_layers=1, num_attention_heads=12, projection_dim=768)
    return pipeline(clip_tokenizer(), scheduler, unet, text)


def write_hub(home: Path) -> Path:
    """Fills ``home``, a value for HF_HOME, with Stable Diffusion 1.4 and its card's judge and CLIP."""
    card = ModelCard.read("stable-diffusion", "dec-imagenet-20.csv")
    labels = [label for names in card.labels.values() for label in names]  # by their real names
    labels += [f"filler {i}" for i in range(1000 - len(labels))]
    crop = ConvNextImageProcessorPil(crop_pct=0.875, size={"shortest_edge": 224})
    narrow = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    texts, vision = TEXT | narrow, narrow | dict(patch_size=56)
    clip = transformers.CLIPConfig(text_config=texts, vision_config=vision, projection_dim=16)
    models = {
        DEFAULT_REAL_MODEL: [stable_diffusion().to(torch.float16)],
        JUDGE: [judge(labels), crop],
        CLIP: [transformers.CLIPModel(clip), transformers.CLIPImageProcessor(), clip_tokenizer()],
    }
    for name, parts in models.items():  # where the hub's client looks for it when it is offline
        repository = home / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        for part in parts:
            part.save_pretrained(repository / "snapshots" / COMMIT)
    return home
