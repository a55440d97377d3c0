"""A hub on disk: the folders that `from_pretrained` finds, with the real files' names and shapes of text.

Widths are tiny and weights random. What the code could trip over is real: CLIP's vocabulary and 77 tokens,
text of 768 numbers, four levels of the denoiser with eight heads, an ImageNet judge of a thousand labels.
"""

import gzip
import importlib.util
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from duge_lite.models import DEFAULT_REAL_MODEL, data_dir

JUDGE, CLIP = "microsoft/resnet-50", "openai/clip-vit-large-patch14"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def bytes_of_clip() -> list[str]:
    """The printable stand-ins of the 256 bytes, in the order of CLIP's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """The tokenizer of Stable Diffusion, from the file of merges that the package `clip` ships."""
    (folder,) = importlib.util.find_spec("clip").submodule_search_locations
    text = gzip.decompress((Path(folder) / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = [tuple(line.split()) for line in text.split("\n")[1 : 49152 - 256 - 2 + 1]]
    names = [*bytes_of_clip(), *(c + "</w>" for c in bytes_of_clip()), *map("".join, merges)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {name: i for i, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def stable_diffusion() -> StableDiffusionPipeline:
    """Stable Diffusion 1.4 as its config files describe it, but narrow, and for pictures of 64 pixels."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=12,
        projection_dim=768,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        cross_attention_dim=768,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(),
    )


def imagenet_labels() -> list[str]:
    """A thousand labels: those that the card of Stable Diffusion counts on, by their real names."""
    column = pd.read_csv(data_dir() / "dec-imagenet-20.csv").judge_label.dropna()
    known = [label for cell in column for label in cell.split("|")]
    return known + [f"filler {i}" for i in range(1000 - len(known))]


def _snapshot(home: Path, name: str) -> Path:
    """Where the hub's client looks for ``name`` when it is offline."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return folder


def write_hub(home: Path) -> Path:
    """Fills ``home``, a value for HF_HOME, with Stable Diffusion 1.4 and its card's judge and CLIP.

    Returns the folder of Stable Diffusion.
    """
    model = _snapshot(home, DEFAULT_REAL_MODEL)
    stable_diffusion().to(torch.float16).save_pretrained(model)
    labels = dict(enumerate(imagenet_labels()))
    judge = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        id2label=labels,
        label2id={name: i for i, name in labels.items()},
    )
    folder = _snapshot(home, JUDGE)
    ResNetForImageClassification(judge).save_pretrained(folder)
    ConvNextImageProcessorPil(crop_pct=0.875, size={"shortest_edge": 224}).save_pretrained(folder)
    narrow = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = narrow | dict(vocab_size=49408, bos_token_id=0, eos_token_id=2, pad_token_id=1)
    config = CLIPConfig(text_config=text, vision_config=narrow | dict(patch_size=56), projection_dim=16)
    folder = _snapshot(home, CLIP)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return model
