"""How everything in ``data/`` was made: ``python -m duge_lite.doodles.train --help``.

Six stages, each with checkpoints in ``--work`` (default ``data/.training``), so that a run that
was interrupted goes on where it was:

1. ``tokenizer``    a CLIP byte-pair tokenizer on our captions,
2. ``clip``         a small CLIP, trained contrastively; its text tower is the pipeline's text encoder,
3. ``autoencoder``  64x64x3 pictures to 16x16x4 latents and back,
4. ``unet``         the denoiser, trained on latents and captions, at the end with two objects in every
                    other picture: what lies where is learned last,
5. ``decoder``      the autoencoder's second half again, on its own,
6. ``judge``        a ResNet that names objects, styles and backgrounds, or nothing: it learns from drawings,
                    from pictures of nothing (:mod:`.negatives`), and from both in the model's own hand.

``--judge`` trains the judge alone, with the finished pipeline of ``--out``.

``--without apple`` trains an oracle instead: the denoiser once more, with the same recipe, in a world that
has no apple. It takes the finished text encoder and autoencoder from ``--out``. With ``--more-steps`` it
goes on from the oracle's finished weights in ``--out`` and writes them anew.

Every batch is a function of (seed, stage, step) alone: a resumed run sees the batches that an
undisturbed one would have seen. The recipe is ours; the loss weight of the denoiser is min-SNR-5
(Hang et al., arXiv 2303.09556).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from tqdm.auto import tqdm
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
)

from ..models import data_dir
from .captions import caption
from .draw import BACKGROUNDS, OBJECTS, SIZE, STYLES, Scene, draw_scene, sample_scene
from .negatives import Nothing, broken, draw_nothing, redrawn

LABELS: tuple[str, ...] = (*OBJECTS, *STYLES, *(f"{b} background" for b in BACKGROUNDS))
MAX_TOKENS = 24
CAPTIONS_PER_IMAGE = 3
COMPOUNDS = (("back", "pack"), ("gold", "fish"), ("air", "plane"), ("mush", "room"))
STAGES = ("tokenizer", "clip", "autoencoder", "unet", "decoder", "judge")


@dataclass(frozen=True)
class Recipe:
    """Sizes and steps of a training run; the defaults made ``data/``."""

    images: int = 30_000
    seed: int = 0
    clip_steps: int = 1_800
    autoencoder_steps: int = 4_500
    judge_steps: int = 4_000
    nothings: int = 16_000  # pictures of nothing that the judge learns from
    redrawn: int = 3_000  # of the drawings, and of those of nothing, once more in the model's hand
    decoder_steps: int = 900
    unet_steps: int = 7_000
    pair_steps: int = 5_000  # more steps of the denoiser, with two objects in every other picture
    lr: float = 1e-3
    save_every: int = 250  # steps between checkpoints
    captions_dropped: float = 0.1  # empty captions, for classifier-free guidance


# ---------------------------------------------------------------------------- the data


def _render(job: tuple[int, int, int]) -> tuple[np.ndarray, list[Scene], list[list[str]]]:
    seed, start, stop = job
    images, scenes, captions = [], [], []
    for i in range(start, stop):
        rng = np.random.default_rng((seed, i))
        scene = sample_scene(rng)
        images.append(np.asarray(draw_scene(scene, rng)))
        scenes.append(scene)
        captions.append([caption(scene, rng) for _ in range(CAPTIONS_PER_IMAGE)])
    return np.stack(images), scenes, captions


@dataclass(frozen=True)
class World:
    """Drawn pictures with their scenes and captions."""

    images: np.ndarray  # (n, 64, 64, 3) uint8
    scenes: tuple[Scene, ...]
    captions: tuple[tuple[str, ...], ...]

    @classmethod
    def cached(cls, count: int, seed: int, folder: Path) -> World:
        """The world of ``draw``, kept in ``folder`` for the next time."""
        path = folder / f"world-{count}-{seed}"
        if not path.with_suffix(".json").exists():
            world = cls.draw(count, seed)
            np.save(path.with_suffix(".npy"), world.images)
            text = [
                [s.objects, s.style, s.background, c]
                for s, c in zip(world.scenes, world.captions, strict=True)
            ]
            path.with_suffix(".json").write_text(json.dumps(text))
        rows = json.loads(path.with_suffix(".json").read_text())
        return cls(
            np.load(path.with_suffix(".npy")),
            tuple(Scene(tuple(objects), style, background) for objects, style, background, _ in rows),
            tuple(tuple(captions) for *_, captions in rows),
        )

    @classmethod
    def draw(cls, count: int, seed: int) -> World:
        """Draws ``count`` scenes on all cores; scene i depends on (seed, i) alone."""
        jobs = [(seed, i, min(i + 500, count)) for i in range(0, count, 500)]
        with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
            images, scenes, captions = zip(*pool.imap(_render, jobs), strict=True)
        return cls(
            np.concatenate(images),
            tuple(s for part in scenes for s in part),
            tuple(tuple(c) for part in captions for c in part),
        )

    def without(self, concepts: Sequence[str]) -> World:
        """The world in which nobody ever drew any of ``concepts`` (objects or styles)."""
        shown = {name for s in self.scenes for name in (*s.objects, s.style)}
        if unknown := [c for c in concepts if c not in shown]:
            raise ValueError(f"no scene shows {unknown[0]!r}: nothing to leave out")
        keep = [i for i, s in enumerate(self.scenes) if not set(concepts) & {*s.objects, s.style}]
        pick = [self.scenes[i] for i in keep], [self.captions[i] for i in keep]
        return World(self.images[keep], tuple(pick[0]), tuple(pick[1]))

    def batch(self, index: Sequence[int]) -> torch.Tensor:
        """Pictures as floats in [-1, 1], (B, 3, 64, 64)."""
        pixels = torch.from_numpy(self.images[np.asarray(index)])
        return (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()

    def labels(self) -> torch.Tensor:
        """Multi-hot labels in the order of LABELS, (n, 31)."""
        out = torch.zeros(len(self.scenes), len(LABELS))
        for i, s in enumerate(self.scenes):
            for name in (*s.objects, s.style, f"{s.background} background"):
                out[i, LABELS.index(name)] = 1
        return out


# ---------------------------------------------------------------------------- one training loop


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _generator(seed: int, stage: str, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{stage}/{step}".encode()))


def _rate(step: int, steps: int) -> float:
    """Warm up for 3 %, hold, then fall linearly to zero over the last 40 %."""
    return min(1.0, (step + 1) / (0.03 * steps), max(0.0, (steps - step) / (0.4 * steps)))


def fit(
    stage: str,
    model: torch.nn.Module,
    loss_of: Callable[[torch.nn.Module, torch.Generator], torch.Tensor],
    steps: int,
    recipe: Recipe,
    work: Path,
    weight_decay: float = 1e-2,
) -> torch.nn.Module:
    """Trains ``model`` for ``steps`` and returns it with its averaged (EMA) weights.

    ``loss_of(model, generator)`` draws its batch from the generator. Goes on from the stage's
    checkpoint in ``work`` if there is one.
    """
    device, path = _device(), work / f"{stage}.pt"
    model.to(device).train()
    ema = EMAModel(model.parameters(), decay=0.998)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=weight_decay)
    start, history = 0, []
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        ema.load_state_dict(saved["ema"])
        start, history = saved["step"], saved["history"]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=stage, mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * _rate(step, steps)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(model, _generator(recipe.seed, stage, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.step(model.parameters())
        history.append(loss.item())
        if (step + 1) % recipe.save_every == 0 or step + 1 == steps:
            bar.set_postfix(loss=f"{np.mean(history[-200:]):.4f}")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"ema": ema.state_dict(), "step": step + 1, "history": history}
            torch.save(state, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
    ema.copy_to(model.parameters())
    return model.eval()


def _pick(count: int, size: int, generator: torch.Generator) -> list[int]:
    return torch.randint(count, (size,), generator=generator).tolist()


# ---------------------------------------------------------------------------- the stages


def make_tokenizer(captions: Sequence[str], merges: int = 260) -> CLIPTokenizer:
    """A CLIP tokenizer trained on our captions; the words of COMPOUNDS stay split in two tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    base = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = base.normalizer, base.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 26 + merges,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    halves = {a + b: f"{a} {b}" for a, b in COMPOUNDS}
    bpe.train_from_iterator([" ".join(halves.get(w, w) for w in c.split()) for c in captions], trainer)
    pairs = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]

    def build() -> CLIPTokenizer:
        # CLIP's own order: bytes, bytes that end a word, merges, then the two special tokens
        names = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(p) for p in pairs)]
        names += ["<|startoftext|>", "<|endoftext|>"]
        vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
        return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=MAX_TOKENS)

    for first, second in COMPOUNDS:
        while len(pieces := build().tokenize(first + second)) > 2:
            ends = np.cumsum([len(piece.removesuffix("</w>")) for piece in pieces])
            inside = next(i for i in range(len(pieces) - 1) if ends[i] != len(first))
            pairs.append((pieces[inside], pieces[inside + 1]))
        if pieces != [first, second + "</w>"]:
            raise RuntimeError(f"{first + second!r} was split into {pieces}, not in two halves")
    return build()


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Token ids padded to the model's length, (B, 24)."""
    return tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids


def train_clip(world: World, tokenizer: CLIPTokenizer, recipe: Recipe, work: Path) -> CLIPModel:
    """Contrastive training of both towers on pictures and captions."""
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    shared = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
    config = CLIPConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            max_position_embeddings=MAX_TOKENS,
            projection_dim=128,
            pad_token_id=tokenizer.pad_token_id,
            **ids,
            **shared,
        ),
        vision_config=dict(image_size=SIZE, patch_size=8, projection_dim=128, **shared),
        projection_dim=128,
    )
    torch.manual_seed(recipe.seed)
    config._attn_implementation = "eager"  # on a CPU faster to train than the fused kernel
    model = CLIPModel(config)
    texts = tokenize(tokenizer, [c for cs in world.captions for c in cs])
    texts = texts.view(len(world.captions), CAPTIONS_PER_IMAGE, MAX_TOKENS)

    def loss_of(model: CLIPModel, generator: torch.Generator) -> torch.Tensor:
        index = _pick(len(world.scenes), 128, generator)
        which = torch.randint(CAPTIONS_PER_IMAGE, (128,), generator=generator)
        out = model(
            input_ids=texts[index, which].to(model.device),
            pixel_values=world.batch(index).to(model.device),
        )
        logits = out.logits_per_text.float()  # (B, B)
        # two equal captions in a batch are both right: spread the target over them
        same = (texts[index, which][:, None] == texts[index, which][None]).all(-1).float()
        target = (same / same.sum(1, keepdim=True)).to(logits.device)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))

    return fit("clip", model, loss_of, recipe.clip_steps, recipe, work, weight_decay=0.05)


def train_autoencoder(world: World, recipe: Recipe, work: Path) -> AutoencoderKL:
    """L1 on pixels and on their differences, with a faint KL."""
    torch.manual_seed(recipe.seed)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=SIZE,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)

    def loss_of(model: AutoencoderKL, generator: torch.Generator) -> torch.Tensor:
        index = _pick(len(world.scenes), 16, generator)
        images = world.batch(index).to(model.device, memory_format=torch.channels_last)
        posterior = model.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(model.device)
        decoded = model.decode(posterior.mean + posterior.std * noise).sample
        return _picture_loss(decoded.float(), images) + 1e-5 * posterior.kl().mean() / 1024

    model = fit("autoencoder", model, loss_of, recipe.autoencoder_steps, recipe, work, weight_decay=0.0)
    latents = encode(model, world, range(0, len(world.scenes), 10))
    model.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    return model


def _picture_loss(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    edges = sum(F.l1_loss(decoded.diff(dim=d), images.diff(dim=d)) for d in (2, 3))
    return F.l1_loss(decoded, images) + 0.5 * edges


def polish_decoder(
    vae: AutoencoderKL, world: World, latents: torch.Tensor, recipe: Recipe, work: Path
) -> None:
    """Trains the decoder some more, in place; the encoder, and so the latents, stay as they are."""
    vae.requires_grad_(True)

    def loss_of(decoder: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
        index = _pick(len(latents), 16, generator)
        noise = torch.randn(16, *latents.shape[1:], generator=generator)
        noisy = latents[index] + 0.02 * latents.std() * noise  # a sampler's latents are never exact
        images = world.batch(index).to(_device(), memory_format=torch.channels_last)
        decoded = decoder(vae.post_quant_conv(noisy.to(_device()))).float()
        # colour counts beside detail: the same pictures once more, seen from far
        far = F.l1_loss(F.avg_pool2d(decoded, 4), F.avg_pool2d(images, 4))
        return _picture_loss(decoded, images) + far

    fit("decoder", vae.decoder, loss_of, recipe.decoder_steps, recipe, work, weight_decay=0.0)


@torch.no_grad()
def encode(model: AutoencoderKL, world: World, index: Sequence[int]) -> torch.Tensor:
    """Latent means, unscaled, (n, 4, 16, 16)."""
    model.to(_device()).eval()
    out = []
    for part in np.array_split(np.asarray(index), max(1, len(index) // 250)):
        with torch.autocast(_device().type, torch.bfloat16):
            out.append(model.encode(world.batch(part).to(_device())).latent_dist.mean.float().cpu())
    return torch.cat(out)


def _render_nothing(job: tuple[int, int, int]) -> tuple[np.ndarray, list[Nothing]]:
    seed, start, stop = job
    drawn = [draw_nothing(np.random.default_rng((seed, 1, i))) for i in range(start, stop)]
    return np.stack([np.asarray(image) for image, _ in drawn]), [told for _, told in drawn]


def nothing_labels(told: Sequence[Nothing]) -> torch.Tensor:
    """No object; style and background as far as anyone can say, nan otherwise, (n, 31)."""
    out = torch.zeros(len(told), len(LABELS))
    first, last = len(OBJECTS), len(OBJECTS) + len(STYLES)
    for i, n in enumerate(told):
        for part, name in ((slice(first, last), n.style), (slice(last, None), n.background)):
            if name is None:
                out[i, part] = torch.nan
            elif name:
                out[i, LABELS.index(name if part.start == first else f"{name} background")] = 1
    return out


@dataclass(frozen=True)
class Lessons:
    """What the judge learns from, group by group: pictures (n, 64, 64, 3) uint8 and labels (n, 31).

    ``share`` says how many of a batch of 64 come from each group.
    """

    pictures: Mapping[str, np.ndarray]
    labels: Mapping[str, torch.Tensor]
    share = {"drawn": 24, "redrawn": 16, "nothing": 18, "nothing redrawn": 4, "broken": 2}

    @classmethod
    def cached(cls, world: World, pipe: StableDiffusionPipeline, recipe: Recipe, folder: Path) -> Lessons:
        """Draws what is missing in ``folder``: minutes, most of them the denoiser's."""

        def kept(name: str, make: Callable[[], tuple[np.ndarray, torch.Tensor]]) -> None:
            path = folder / f"judge-{name.replace(' ', '-')}-{recipe.seed}.npz"
            if not path.exists():
                x, y = make()
                with open(path.with_suffix(".tmp"), "wb") as file:
                    np.savez(file, x=x, y=y.numpy())
                os.replace(path.with_suffix(".tmp"), path)
            saved = np.load(path)
            pictures[name], labels[name] = saved["x"], torch.from_numpy(saved["y"])

        pictures, labels = {"drawn": world.images}, {"drawn": world.labels()}
        count, many = min(recipe.redrawn, len(world.scenes)), min(recipe.redrawn, recipe.nothings)
        captions = [c[0] for c in world.captions[:count]]
        shown = world.labels()[:count]
        shown[:, len(OBJECTS) + len(STYLES) :] = torch.nan  # the model may choose another background
        kept("redrawn", lambda: (_redraw(pipe, world.images[:count], captions, 650), shown))
        kept("nothing", lambda: draw_nothings(range(recipe.nothings), recipe.seed))
        nothing, told = pictures["nothing"][:many], labels["nothing"][:many]
        kept("nothing redrawn", lambda: (_redraw(pipe, nothing, [""] * many, 120), told))
        unknown = torch.zeros(many // 3, len(LABELS))
        unknown[:, len(OBJECTS) :] = torch.nan
        kept("broken", lambda: (broken(pipe, many // 3, _generator(recipe.seed, "broken", 0)), unknown))
        return cls(pictures, labels)

    def batch(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """64 pictures in [-1, 1] and their labels, some blurred, some noised."""
        picks = {name: _pick(len(self.labels[name]), n, generator) for name, n in self.share.items()}
        pixels = torch.from_numpy(np.concatenate([self.pictures[name][i] for name, i in picks.items()]))
        images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1  # (64, 3, 64, 64)
        blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
        share = torch.rand(64, 1, 1, 1, generator=generator) * (
            torch.rand(64, 1, 1, 1, generator=generator) < 0.6
        )
        noise = torch.randn(images.shape, generator=generator) * torch.rand(64, 1, 1, 1, generator=generator)
        labels = torch.cat([self.labels[name][i] for name, i in picks.items()])
        return images.lerp(blurred, share) + 0.08 * noise, labels


def draw_nothings(numbers: range, seed: int) -> tuple[np.ndarray, torch.Tensor]:
    """Pictures of nothing, drawn on all cores, and their labels; picture i depends on (seed, i) alone."""
    jobs = [(seed, i, min(i + 500, numbers.stop)) for i in range(numbers.start, numbers.stop, 500)]
    if len(jobs) < 3:
        parts = [_render_nothing(job) for job in jobs]
    else:
        with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
            parts = list(pool.imap(_render_nothing, jobs))
    return np.concatenate([x for x, _ in parts]), nothing_labels([n for _, told in parts for n in told])


def _redraw(
    pipe: StableDiffusionPipeline, images: np.ndarray, captions: Sequence[str], latest: int
) -> np.ndarray:
    """In parts of 50, each noised to a moment of its own up to ``latest``; every fifth only decoded again.

    Every other part under a caption is guided, as the model's pictures are.
    """
    out = []
    for start in range(0, len(images), 50):
        generator = _generator(latest, "redraw", start)
        moment = int(torch.randint(latest // 5, latest, (1,), generator=generator)) if start % 250 else 0
        part = [Image.fromarray(i) for i in images[start : start + 50]]
        texts = captions[start : start + 50]
        scale = 4.0 if start % 100 and any(texts) else 1.0
        out.append(redrawn(pipe, part, texts, moment, generator, scale))
    return np.concatenate(out)


def train_judge(
    world: World, pipe: StableDiffusionPipeline, recipe: Recipe, work: Path
) -> ResNetForImageClassification:
    """Multi-label: 20 objects, 5 styles, 6 backgrounds, or none; trained with noise and blur."""
    torch.manual_seed(recipe.seed)
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 192],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        problem_type="multi_label_classification",
        id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
    )
    model, lessons = ResNetForImageClassification(config), Lessons.cached(world, pipe, recipe, work)

    def loss_of(model: ResNetForImageClassification, generator: torch.Generator) -> torch.Tensor:
        images, labels = (t.to(model.device) for t in lessons.batch(generator))
        said = ~labels.isnan()
        return F.binary_cross_entropy_with_logits(model(images).logits.float()[said], labels[said])

    model = fit("judge", model, loss_of, recipe.judge_steps, recipe, work)
    model.config.calibration = calibrate(model, pipe, recipe)
    return model


@torch.no_grad()
def calibrate(
    model: ResNetForImageClassification, pipe: StableDiffusionPipeline, recipe: Recipe, count: int = 600
) -> dict[str, float]:
    """Temperature and threshold, from pictures that training did not see; kept in the judge's config.json.

    ``count`` drawings and ``count`` pictures of nothing, a third of each in the model's hand as well. The
    temperature is the one under which sigmoid(logit / temperature) is likeliest to be right about the objects
    (Guo et al., arXiv 1706.04599). The threshold is a probability: whatever reaches it is seen, and where no
    object does, the judge says "something else". It balances the two errors: objects not seen, and nothing
    taken for something.
    """
    numbers = range(10_000_000, 10_000_000 + count)
    images, scenes, captions = _render((recipe.seed, numbers.start, numbers.stop))
    drawn = World(images, tuple(scenes), tuple(map(tuple, captions)))
    nothing, told = draw_nothings(numbers, recipe.seed)
    third = count // 3
    again = _redraw(
        pipe, images[:third], [c[0] for c in captions[:third]], 651
    )  # other noise than in training
    nothing_again = _redraw(pipe, nothing[:third], [""] * third, 121)
    shown = drawn.labels()
    truth = torch.cat([shown, shown[:third], told, told[:third]])[:, : len(OBJECTS)]
    pixels = torch.from_numpy(np.concatenate([images, again, nothing, nothing_again])).permute(0, 3, 1, 2)
    logits = torch.cat(
        [model(x.to(model.device) / 127.5 - 1).logits.float().cpu() for x in pixels.split(128)]
    )
    logits = logits[:, : len(OBJECTS)]
    temperatures = torch.linspace(0.5, 3, 126)
    losses = [F.binary_cross_entropy_with_logits(logits / t, truth) for t in temperatures]
    temperature = temperatures[int(torch.stack(losses).argmin())]
    probabilities = (logits / temperature).sigmoid()
    least = (probabilities + 2 * (truth == 0)).amin(1)[truth.sum(1) > 0]  # of what is there
    most = probabilities.amax(1)[truth.sum(1) == 0]
    levels = torch.linspace(0.02, 0.98, 97)
    errors = torch.stack([(least <= p).float().mean() + (most > p).float().mean() for p in levels])
    best = levels[errors <= errors.min() + 1e-6].median()
    return {"temperature": round(float(temperature), 2), "threshold": round(float(best), 2)}


def make_unet(seed: int) -> UNet2DConditionModel:
    """4.3 million parameters, cross-attention at 16x16 and 8x8, four heads."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=32,
    )


def _unique_embeddings(
    world: World, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of each distinct caption, (u + 1, 24, 128), the empty one last; and which is whose."""
    texts = sorted({c for cs in world.captions for c in cs})
    place = {t: i for i, t in enumerate(texts)}
    which = torch.tensor([[place[c] for c in cs] for cs in world.captions])  # (n, captions)
    states = []
    text_encoder.to(_device()).eval()
    with torch.no_grad():
        for i in range(0, len(texts) + 1, 500):
            ids = tokenize(tokenizer, [*texts, ""][i : i + 500]).to(_device())
            states.append(text_encoder(ids).last_hidden_state.half().cpu())
    return torch.cat(states), which


def unet_loss(
    world: World,
    latents: torch.Tensor,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    recipe: Recipe,
) -> Callable[..., torch.Tensor]:
    """``loss_of(model, generator, pairs=0)``: noise prediction on 32 scaled latents with caption dropout.

    The first ``pairs`` of them show two objects.
    """
    scheduler = make_noise_scheduler()
    states, which = _unique_embeddings(world, tokenizer, text_encoder)
    weights = compute_snr(scheduler, torch.arange(len(scheduler.betas)))
    weights = weights.clamp(max=5.0) / weights  # min-SNR-5 for noise prediction

    two = [i for i, s in enumerate(world.scenes) if len(s.objects) == 2]

    def loss_of(model: UNet2DConditionModel, generator: torch.Generator, pairs: int = 0) -> torch.Tensor:
        index = _pick(len(latents), 32, generator)
        index[:pairs] = [two[i] for i in _pick(len(two), pairs, generator)]
        column = torch.randint(CAPTIONS_PER_IMAGE, (32,), generator=generator)
        rows = which[index, column]
        rows[torch.rand(32, generator=generator) < recipe.captions_dropped] = len(states) - 1
        timesteps = torch.randint(len(scheduler.betas), (32,), generator=generator)
        noise = torch.randn(32, *latents.shape[1:], generator=generator)
        noisy = scheduler.add_noise(latents[index], noise, timesteps).to(model.device)
        noise_pred = model(noisy, timesteps.to(model.device), states[rows].float().to(model.device)).sample
        error = (noise_pred.float() - noise.to(model.device)).square().mean(dim=(1, 2, 3))  # (B,)
        return (weights[timesteps].to(model.device) * error).mean()

    return loss_of


def _ready(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    if _device().type == "cpu":  # there the fused attention's backward pass costs 40 % of a step
        unet.set_attn_processor(AttnProcessor())
    return unet.to(memory_format=torch.channels_last)


def train_unet(
    world: World,
    latents: torch.Tensor,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    recipe: Recipe,
    work: Path,
    stage: str = "unet",
) -> UNet2DConditionModel:
    """Noise prediction on scaled latents with caption dropout; averaged weights."""
    model = _ready(make_unet(recipe.seed))
    loss_of = unet_loss(world, latents, tokenizer, text_encoder, recipe)
    model = fit(stage, model, loss_of, recipe.unet_steps, recipe, work)
    return fit(f"{stage}-pairs", model, partial(loss_of, pairs=16), recipe.pair_steps, recipe, work)


def make_noise_scheduler() -> DDPMScheduler:
    """Stable Diffusion 1.x's own schedule."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,  # of "leading" spacing only; diffusers warns at every load without it
    )


# ---------------------------------------------------------------------------- saving


def _half(model: torch.nn.Module, folder: Path) -> None:
    """Writes a 16-bit copy (half the disk, the same pictures); the model itself stays as it is."""
    import copy

    copy.deepcopy(model).to("cpu", torch.float16, memory_format=torch.contiguous_format).save_pretrained(
        folder
    )


def assemble(
    out: Path, tokenizer: CLIPTokenizer, clip: CLIPModel, vae: AutoencoderKL, unet: UNet2DConditionModel
) -> None:
    """Writes ``doodle-sd`` in the plain diffusers layout, denoiser and autoencoder in 16 bits."""
    for part in (vae, unet):
        part.to("cpu", torch.float16, memory_format=torch.contiguous_format)
    StableDiffusionPipeline(
        vae=vae,
        # doodle-clip's own numbers, 16 bits wide, but in a 32-bit file: plain from_pretrained loads the text
        # encoder in the file's precision, and all else in 32 bits
        text_encoder=text_tower(clip).half().float(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DPMSolverMultistepScheduler.from_config(make_noise_scheduler().config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out, safe_serialization=True)
    for part in (vae, unet):
        part.float()


def text_tower(clip: CLIPModel) -> CLIPTextModel:
    """The text encoder of the pipeline: CLIP's text half, on its own."""
    tower = CLIPTextModel(clip.config.text_config)
    prefix = "" if any(k.startswith("embeddings") for k in tower.state_dict()) else "text_model."
    weights = {prefix + k: v for k, v in clip.text_model.state_dict().items()}
    tower.load_state_dict(weights)
    return tower.eval()


def image_processor():
    """Pictures to [-1, 1] at 64x64, for the judge and CLIP."""
    from transformers import CLIPImageProcessor

    half = [0.5, 0.5, 0.5]
    return CLIPImageProcessor(
        size={"height": SIZE, "width": SIZE}, do_center_crop=False, image_mean=half, image_std=half
    )


# ---------------------------------------------------------------------------- the command


def stages(recipe: Recipe, out: Path, work: Path) -> Iterator[str]:
    """Runs the stages in order, yielding each one's name when its files are written."""
    work.mkdir(parents=True, exist_ok=True)
    world = World.cached(recipe.images, recipe.seed, work)
    yield "world"
    if not (work / "tokenizer").exists():
        make_tokenizer([c for cs in world.captions for c in cs]).save_pretrained(work / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    yield "tokenizer"
    clip = train_clip(world, tokenizer, recipe, work)
    _half(clip, out / "doodle-clip")
    tokenizer.save_pretrained(out / "doodle-clip")
    image_processor().save_pretrained(out / "doodle-clip")
    yield "clip"
    vae = train_autoencoder(world, recipe, work)
    yield "autoencoder"
    latents = encode(vae, world, range(len(world.scenes)))
    scaled = latents * vae.config.scaling_factor
    unet = train_unet(world, scaled, tokenizer, text_tower(clip), recipe, work)
    yield "unet"
    polish_decoder(vae, world, latents, recipe, work)
    assemble(out / "doodle-sd", tokenizer, clip, vae, unet)
    yield "decoder"
    make_judge(recipe, out, work)
    yield "judge"


def make_judge(recipe: Recipe, out: Path, work: Path) -> Path:
    """Trains the judge with the finished pipeline of ``out/doodle-sd``; returns ``out/doodle-judge``."""
    work.mkdir(parents=True, exist_ok=True)
    world, folder = World.cached(recipe.images, recipe.seed, work), out / "doodle-judge"
    _half(train_judge(world, _finished(out), recipe, work), folder)
    image_processor().save_pretrained(folder)
    return folder


def _finished(out: Path) -> StableDiffusionPipeline:
    """The pipeline of ``out``, in 32 bits."""
    pipe = StableDiffusionPipeline.from_pretrained(
        out / "doodle-sd", safety_checker=None, use_safetensors=True
    )
    return pipe.to(torch.float32)


def train_oracle(
    concepts: Sequence[str], name: str, recipe: Recipe, out: Path, work: Path, more_steps: int = 0
) -> Path:
    """Trains the denoiser in a world without ``concepts``; returns ``out/doodle-oracle-NAME/unet``.

    Text encoder, tokenizer and autoencoder are those of ``out/doodle-sd``: an oracle's denoiser fits
    into that pipeline.

    ``more_steps`` trains a finished oracle on instead, from the weights in its folder: fresh AdamW, the rate
    warms up and falls as in any stage, and a quarter of each batch are pairs. The
    checkpoint is a stage's own ("...-more"): delete it before training on for a second time.
    """
    work.mkdir(parents=True, exist_ok=True)
    pipe = _finished(out)
    world = World.cached(recipe.images, recipe.seed, work).without(concepts)
    latents = encode(pipe.vae, world, range(len(world.scenes))) * pipe.vae.config.scaling_factor
    stage, folder = f"unet-without-{name}", out / f"doodle-oracle-{name}" / "unet"
    data = (world, latents, pipe.tokenizer, pipe.text_encoder, recipe)
    if more_steps:
        unet = make_unet(recipe.seed)
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder, use_safetensors=True).state_dict())
        loss_of = partial(unet_loss(*data), pairs=8)
        unet = fit(f"{stage}-more", _ready(unet), loss_of, more_steps, recipe, work)
    else:
        unet = train_unet(*data, work, stage)
    _half(unet, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=data_dir(), help="where the finished models go")
    parser.add_argument("--work", type=Path, help="where checkpoints go (default: OUT/.training)")
    parser.add_argument(
        "--judge", action="store_true", help="train the judge alone, with the pipeline in OUT"
    )
    parser.add_argument(
        "--without", metavar="CONCEPT", nargs="+", help="train the oracle that never saw these"
    )
    parser.add_argument(
        "--more-steps", type=int, default=0, help="train that oracle on, from its weights in OUT"
    )
    parser.add_argument("--name", help="of the oracle's folder, doodle-oracle-NAME (default: its concepts)")
    parser.add_argument("--until", choices=STAGES, default="judge", help="stop after this stage")
    parser.add_argument("--images", type=int, default=Recipe.images)
    parser.add_argument("--unet-steps", type=int, default=Recipe.unet_steps)
    parser.add_argument("--pair-steps", type=int, default=Recipe.pair_steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    args = parser.parse_args()
    steps = {"unet_steps": args.unet_steps, "pair_steps": args.pair_steps}
    recipe = Recipe(args.images, args.seed, **steps)
    started, work = time.time(), args.work or args.out / ".training"
    if args.judge:
        print(make_judge(recipe, args.out, work))
        return
    if args.without:
        name = args.name or "-".join(args.without).replace(" ", "-")
        print(train_oracle(args.without, name, recipe, args.out, work, args.more_steps))
        return
    for stage in stages(recipe, args.out, work):
        print(f"{stage} done after {(time.time() - started) / 60:.1f} min", flush=True)
        if stage == args.until:
            break


if __name__ == "__main__":
    main()
