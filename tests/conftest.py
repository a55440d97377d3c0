"""What several test files share: a tiny pipeline with random weights, and the shipped doodle model.

Nothing here reaches the network, and every test gets a UNet of its own, so that no test can leave
trained weights, processors or gradients behind for the next.
"""

import copy
import dataclasses
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported
# Two workers of one thread each beat one of two on models this small. Kernels and processes inherit it.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
os.environ.setdefault("MPLBACKEND", "Agg")

import fake_hub
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from hypothesis import settings
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    ResNetConfig,
    ResNetForImageClassification,
)

import duge_lite as duge
from duge_lite.doodles import train
from duge_lite.doodles.captions import SYNONYMS, caption
from duge_lite.doodles.draw import sample_scene
from duge_lite.models import Pictures, encode_prompts

settings.register_profile("here", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("here")
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)

MEMORY = (
    "a photo of an orange", "a sketch of a tree", "a photo of a car", "a neon sign of a harp", "a mosaic", "",
)  # fmt: skip
EXACT = duge.UnlearnConfig(num_inference_steps=2, places=8, instead="star")
"""The exact solver on few moments; nothing has to be compared to know what is asked instead."""
GRADIENT = duge.UnlearnConfig(
    solver="gradient", iterations=2, batch_size=2, memory_batch_size=2, target_size=2, lessons=4,
    lambda_prior=1.0, instead="star",
)  # fmt: skip
"""The gradient solver for two small steps."""


def weights(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in pipe.unet.named_parameters()}


def changed(pipe: StableDiffusionPipeline, before: dict[str, torch.Tensor]) -> set[str]:
    now = weights(pipe)
    return {name for name, value in before.items() if not torch.equal(now[name], value)}


@contextmanager
def interrupted(pipe, kind: type[BaseException], when: int) -> Iterator[None]:
    """The denoiser raises ``kind`` the ``when``-th time that it is asked."""
    passes = itertools.count(1)

    def stop(*_) -> None:
        if next(passes) == when:
            raise kind

    with pipe.unet.register_forward_pre_hook(stop):
        yield


def quick_card(pipe) -> duge.ModelCard:
    """Its own card, but pictures for the gradient solver are drawn in two steps."""
    return dataclasses.replace(duge.model_card(pipe), sampling_steps=2)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a tensor."""
    return max(float((one[n] - other[n]).norm() / other[n].norm().clamp(min=1e-6)) for n in other)


def with_own_unet(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    parts = {**pipe.components, "unet": copy.deepcopy(pipe.unet)}
    own = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    return own


def sampled_captions(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [caption(sample_scene(rng), rng) for _ in range(count)]


@pytest.fixture(scope="session")
def captions_of_the_world() -> list[str]:
    """A few hundred captions, as training reads them."""
    return sampled_captions(600)


@pytest.fixture(scope="session")
def tokenizer(captions_of_the_world):
    """The doodle world's tokenizer, trained on a few hundred captions and every synonym."""
    return train.make_tokenizer([*captions_of_the_world, *SYNONYMS.values()])


@pytest.fixture(scope="session")
def tiny_master(tokenizer) -> StableDiffusionPipeline:
    """The tiny pipeline itself: look, do not touch. For tests that change nothing."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=train.MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DPMSolverMultistepScheduler.from_config(train.make_noise_scheduler().config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def tiny_pipe(tiny_master) -> StableDiffusionPipeline:
    """Random weights, the shape of the doodle model, a UNet that is this test's own."""
    return with_own_unet(tiny_master)


def family(kind: str, tokenizer) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """Random weights in the shape of "sd1", "v" (predicts velocities, as 2.x does) or "sdxl" (two encoders).

    They read any word, so their card is that of Stable Diffusion.
    """
    torch.manual_seed(0)
    text, xl, tokenizer = 32, kind == "sdxl", copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 77
    read = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=text, intermediate_size=text, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=text, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    blocks = [("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")]
    added = {}
    if xl:
        blocks = [part[::-1] for part in blocks]
        added = dict(addition_embed_type="text_time", addition_time_embed_dim=8)
        added |= dict(projection_class_embeddings_input_dim=6 * 8 + text, use_linear_projection=True)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), down_block_types=blocks[0], up_block_types=blocks[1],
        layers_per_block=1, norm_num_groups=8, attention_head_dim=2,
        cross_attention_dim=2 * text if xl else text, **added,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4, norm_num_groups=4, sample_size=64,
    )  # fmt: skip
    predicts = "v_prediction" if kind == "v" else "epsilon"
    parts = dict(vae=vae, unet=unet.eval(), tokenizer=tokenizer, text_encoder=CLIPTextModel(read).eval())
    parts["scheduler"] = DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type=predicts)
    if xl:
        second = CLIPTextModelWithProjection(read).eval()
        pipe = StableDiffusionXLPipeline(
            **parts, tokenizer_2=tokenizer, text_encoder_2=second, add_watermarker=False
        )
    else:
        unchecked = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipe = StableDiffusionPipeline(**parts, **unchecked)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_memory(tiny_master) -> Pictures:
    """Four memory pictures made of noise: the loop does not care what they show."""
    prompts = ("a photo of an orange", "a sketch of a tree", "a photo of a car", "a photo of a harp")
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    return Pictures(latents, encode_prompts(tiny_master, prompts), prompts)


@pytest.fixture(scope="session")
def tiny_judge() -> duge.Judge:
    """A judge with random weights: right about nothing, but always of the same opinion."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(train.LABELS)),
        label2id={name: i for i, name in enumerate(train.LABELS)},
    )
    return duge.Judge(ResNetForImageClassification(config).eval(), train.image_processor())


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Path:
    """A folder for HF_HOME that holds Stable Diffusion 1.4, its judge and its CLIP; all of them tiny."""
    folder = tmp_path_factory.mktemp("huggingface")
    fake_hub.write_hub(folder)
    return folder


@pytest.fixture(scope="session")
def doodle_master() -> StableDiffusionPipeline:
    """The shipped model: look, do not touch. For tests that change nothing."""
    return duge.load_pipeline("doodle", device="cpu", dtype=torch.float32)


@pytest.fixture
def doodle_pipe(doodle_master) -> StableDiffusionPipeline:
    """The shipped model with a UNet that is this test's own."""
    return with_own_unet(doodle_master)
