"""What several benchmarks share: a Stable Diffusion with random weights, a clock, a workbench to learn on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from duge_lite.config import UnlearnConfig
from duge_lite.lessons import (
    DUGE,
    Lessons,
    Noised,
    Objective,
    Pictures,
    ask_about_concept,
    ask_about_memory,
    passed,
    watching,
)
from duge_lite.losses import prior_preservation_loss, regularization_loss
from duge_lite.models import data_dir
from duge_lite.unlearning import batch_losses, trainable_parameters, training


def stable_diffusion(
    device: torch.device | str, dtype: torch.dtype = torch.float32, tiny: bool = False
) -> StableDiffusionPipeline:
    """Stable Diffusion 1.4 with random weights, made without the hub; ``tiny``: a narrow one."""
    width, places = (64, 1000) if tiny else (768, 49408)
    unet = dict(sample_size=16 if tiny else 64, cross_attention_dim=width)
    vae = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    if tiny:
        unet |= dict(block_out_channels=(32, 64, 64, 64), layers_per_block=1)
        vae |= dict(block_out_channels=(32,) * 4)
    else:
        vae |= dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    tokenizer = CLIPTokenizer.from_pretrained(data_dir() / "doodle-sd" / "tokenizer")
    tokenizer.model_max_length = 77
    text = CLIPTextConfig(
        vocab_size=places,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=1 if tiny else 12,
        num_attention_heads=width // 64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.device("meta"):  # spares the large one its initialization
        denoiser = UNet2DConditionModel(**unet)
    denoiser = denoiser.to_empty(device=device).to(dtype).eval()
    with torch.no_grad():
        for p in denoiser.parameters():
            p.uniform_(-0.02, 0.02)
    with torch.device(device):
        encoder, autoencoder = CLIPTextModel(text).to(dtype).eval(), AutoencoderKL(**vae).eval()
    pipe = StableDiffusionPipeline(
        vae=autoencoder.to(torch.float32 if dtype == torch.float16 else dtype),  # as load_pipeline() does
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """How long ``action`` takes, the GPU's part included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@dataclass
class Workbench:
    """A UNet that learns from random pictures, one iteration at a time, in several ways."""

    unet: UNet2DConditionModel
    config: UnlearnConfig
    about: Noised
    kept: Noised
    other: Tensor  # (n, T, D)
    trained: dict[str, torch.nn.Parameter]
    anchor: dict[str, Tensor]
    mixed: torch.autocast

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-6)
        self.generator = torch.Generator().manual_seed(0)
        self.lessons, self.memory = self.ask()

    def ask(self) -> tuple[Lessons, Lessons]:
        """The reference's answers, as :func:`duge_lite.unlearning.unlearn_steps` asks for them, once."""
        with self.mixed:
            lessons = ask_about_concept(self.unet, self.about, self.other, DUGE, self.config)
            return lessons, ask_about_memory(self.unet, self.kept, self.config)

    def draw(self) -> tuple[Lessons, Lessons]:
        sizes = (self.config.batch_size, self.config.memory_batch_size)
        parts = zip((self.lessons, self.memory), sizes, strict=True)
        return tuple(part.batch(size, self.generator, self.unet.device) for part, size in parts)

    def learn(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()

    def plain(self) -> None:
        """Fine-tuning: the noise is to be told, for as many pictures."""
        parts, names = self.draw(), ("noisy", "timesteps", "encoder_hidden_states")
        inputs = [torch.cat([getattr(part, n) for part in parts]) for n in names]
        with self.mixed:
            loss = prior_preservation_loss(self.unet(*inputs).sample, inputs[0])
        self.learn(loss)

    def iteration(
        self,
        objective: Objective = DUGE,
        regularize: bool = True,
        parts: tuple[Lessons, Lessons] | None = None,
    ) -> None:
        """Unlearning, as :func:`duge_lite.unlearning.unlearn_steps` does it."""
        with watching(self.unet, objective, self.config, self.about.noisy.shape[-2:]) as record:
            with self.mixed:
                forget, prior = batch_losses(self.unet, *(parts or self.draw()), objective, record)
            loss = forget + 100 * prior
            if regularize:
                loss = loss + 10 * regularization_loss(self.trained, self.anchor)
            self.learn(loss)

    def two_unets(self, frozen: UNet2DConditionModel) -> None:
        """The same with a frozen copy of the UNet, which is asked at every iteration."""
        (forget, keep), names = self.draw(), ("noisy", "timesteps", "encoder_hidden_states")
        size = len(forget.noisy)
        inputs = [torch.cat([getattr(part, n) for part in (forget, forget, keep)]) for n in names]
        inputs[2][size : 2 * size] = self.other[:1].to(inputs[2])
        look = watching(frozen, DUGE, self.config, self.about.noisy.shape[-2:])
        with torch.no_grad(), self.mixed, look as record:
            answer = frozen(*inputs).sample
        concept, instead = (passed(answer, record, s) for s in (slice(size), slice(size, 2 * size)))
        forget = replace(forget, wanted=DUGE.target(concept, instead, answer, self.config))
        self.iteration(parts=(forget, replace(keep, wanted=(answer[2 * size :],))))


@contextmanager
def workbench(unet: UNet2DConditionModel, config: UnlearnConfig, tokens: int = 77) -> Iterator[Workbench]:
    """As many lessons as a batch holds; what is trained is in 32 bits inside, as in the library's loop."""
    size, side, generator = config.batch_size, unet.config.sample_size, torch.Generator().manual_seed(0)
    precision = unet.dtype
    mixed = torch.autocast(
        unet.device.type, precision, enabled=precision != torch.float32, cache_enabled=False
    )
    text = torch.randn(size, tokens, unet.config.cross_attention_dim)
    pictures = Pictures(torch.randn(size, 4, side, side), text, ("x",) * size)
    about, kept = (Noised.of(pictures, size, DDIMScheduler(), generator) for _ in range(2))
    trained = trainable_parameters(unet, config)
    with training(unet, trained):
        anchor = {n: p.detach().half() for n, p in trained.items()}
        yield Workbench(unet, config, about, kept, text, trained, anchor, mixed)
