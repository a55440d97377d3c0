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
from unittest.mock import Mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported
# Two workers of one thread each beat one of two on models this small. Kernels and processes inherit it.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
os.environ.setdefault("MPLBACKEND", "Agg")

import fake_hub
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from hypothesis import settings

import duge_lite as duge
from duge_lite.doodles import train
from duge_lite.doodles.captions import SYNONYMS, caption
from duge_lite.doodles.draw import sample_scene
from duge_lite.models import Pictures, encode_prompts

settings.register_profile("here", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("here")
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)

MEMORY = ("a photo of an orange", "a sketch of a tree", "a photo of a car", "a neon sign of a harp",
          "a mosaic", "")  # fmt: skip
EXACT = duge.UnlearnConfig(num_inference_steps=2, places=8, instead="star")
"""The exact solver on few moments; nothing has to be compared to know what is asked instead."""
GRADIENT = duge.UnlearnConfig(solver="gradient", iterations=2, batch_size=2, memory_batch_size=2,
                              target_size=2, lessons=4, lambda_prior=1.0, instead="star")  # fmt: skip
"""The gradient solver for two small steps."""


def weights(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in pipe.unet.named_parameters()}


def changed(pipe: StableDiffusionPipeline, before: dict[str, torch.Tensor]) -> set[str]:
    now = weights(pipe)
    return {name for name, value in before.items() if not torch.equal(now[name], value)}


def interrupted(pipe, kind: type[BaseException], when: int):
    """A context in which the denoiser raises ``kind`` the ``when``-th time that it is asked."""
    raised = itertools.chain([None] * (when - 1), [kind], itertools.repeat(None))
    return pipe.unet.register_forward_pre_hook(Mock(side_effect=raised))


def quick_card(pipe) -> duge.ModelCard:
    """Its own card, but pictures for the gradient solver are drawn in two steps."""
    return dataclasses.replace(duge.model_card(pipe), sampling_steps=2)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a tensor."""
    return max(float((one[n] - other[n]).norm() / other[n].norm().clamp(min=1e-6)) for n in other)


def with_own_unet(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    own = copy.copy(pipe)
    own.unet = copy.deepcopy(pipe.unet)
    return own


@pytest.fixture(scope="session")
def captions_of_the_world() -> list[str]:
    """A few hundred captions, as training reads them."""
    rng = np.random.default_rng(0)
    return [caption(sample_scene(rng), rng) for _ in range(600)]


@pytest.fixture(scope="session")
def tokenizer(captions_of_the_world):
    """The doodle world's tokenizer, trained on a few hundred captions and every synonym."""
    return train.make_tokenizer([*captions_of_the_world, *SYNONYMS.values()])


@pytest.fixture(scope="session")
def tiny_master(tokenizer) -> StableDiffusionPipeline:
    """The tiny pipeline itself: look, do not touch. For tests that change nothing."""
    scheduler = DPMSolverMultistepScheduler.from_config(train.make_noise_scheduler().config)
    return fake_hub.pipeline(
        tokenizer, scheduler, levels=3, mid_block_add_attention=False,
        unet=dict(sample_size=16, block_out_channels=(32, 32), down_block_types=("CrossAttnDownBlock2D",) * 2,
                  up_block_types=("CrossAttnUpBlock2D",) * 2, cross_attention_dim=128, attention_head_dim=4,
                  norm_num_groups=8),
        text=dict(hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
                  max_position_embeddings=train.MAX_TOKENS),
    )  # fmt: skip


@pytest.fixture
def tiny_pipe(tiny_master) -> StableDiffusionPipeline:
    """Random weights, the shape of the doodle model, a UNet that is this test's own."""
    return with_own_unet(tiny_master)


def family(kind: str, tokenizer):
    """Random weights in the shape of "sd1", "v" (predicts velocities, as 2.x does) or "sdxl" (two encoders).

    They read any word, so their card is that of Stable Diffusion.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 77
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    unet = dict(down_block_types=down, up_block_types=up, cross_attention_dim=32)
    if kind == "sdxl":
        unet = dict(down_block_types=down[::-1], up_block_types=up[::-1], cross_attention_dim=2 * 32)
        unet |= dict(addition_embed_type="text_time", addition_time_embed_dim=8, use_linear_projection=True)
        unet |= dict(projection_class_embeddings_input_dim=6 * 8 + 32)
    predicts = "v_prediction" if kind == "v" else "epsilon"
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type=predicts)
    unet |= dict(sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=2)
    text = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return fake_hub.pipeline(tokenizer, scheduler, unet, text | dict(projection_dim=32))


@pytest.fixture(scope="session")
def tiny_memory(tiny_master) -> Pictures:
    """Four memory pictures made of noise: the loop does not care what they show."""
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    return Pictures(latents, encode_prompts(tiny_master, MEMORY[:4]), MEMORY[:4])


@pytest.fixture(scope="session")
def tiny_judge() -> duge.Judge:
    return duge.Judge(fake_hub.judge(train.LABELS), train.image_processor())


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Path:
    """A folder for HF_HOME that holds Stable Diffusion 1.4, its judge and its CLIP; all of them tiny."""
    return fake_hub.write_hub(tmp_path_factory.mktemp("huggingface"))


@pytest.fixture(scope="session")
def doodle_master() -> StableDiffusionPipeline:
    """The shipped model: look, do not touch. For tests that change nothing."""
    return duge.load_pipeline("doodle", device="cpu", dtype=torch.float32)


@pytest.fixture
def doodle_pipe(doodle_master) -> StableDiffusionPipeline:
    """The shipped model with a UNet that is this test's own."""
    return with_own_unet(doodle_master)


BOTH = pytest.mark.parametrize(
    "config", [EXACT, pytest.param(GRADIENT, marks=pytest.mark.slow)], ids=["exact", "gradient"]
)


@pytest.fixture
def fresh(tiny_master):
    """A new process's pipeline, each time that it is called."""
    return lambda: with_own_unet(tiny_master)


def forget(pipe, what="apple", config=EXACT, memory=MEMORY, card=None, directory=None, **changes):
    """``what`` goes; ``changes`` are of the settings."""
    config, card = dataclasses.replace(config, **changes), card or quick_card(pipe)
    return duge.unlearn(pipe, what, config, memory, progress=False, card=card, directory=directory)


def footprint(pipe) -> list:
    """All of the denoiser but its weights: flags, precision, gradients, processors, mode, hooks."""
    unet = pipe.unet
    flags = [(n, p.requires_grad, p.dtype, p.grad) for n, p in unet.named_parameters()]
    hooks = [m for m in unet.modules() if m._forward_pre_hooks or m._forward_hooks]
    return [flags, dict(unet.attn_processors), unet.training, hooks]


@contextmanager
def undone(pipe, kind: type[BaseException], match: str | None = None) -> Iterator[None]:
    """``kind`` is raised, and the denoiser is as it was, weights and all."""
    before, state = weights(pipe), footprint(pipe)
    with pytest.raises(kind, match=match):
        yield
    assert not changed(pipe, before) and footprint(pipe) == state


def random64(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def refused(error: type[BaseException], told: str, call, *args, **options) -> None:
    """The call raises ``error``, and says ``told`` (a pattern)."""
    with pytest.raises(error, match=told):
        call(*args, **options)


@pytest.fixture(scope="module")
def chromium():
    """A real Chromium; what needs one is skipped where there is none."""
    from shutil import which

    from playwright.sync_api import sync_playwright

    if not (path := which("chromium") or which("chromium-browser") or which("google-chrome")):
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
