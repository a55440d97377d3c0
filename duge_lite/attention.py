"""Cross-attention out of any diffusers UNet: recorded, reduced, named by word, and edited::

    trace = duge.trace(pipe, "a photo of an apple next to an umbrella", seed=1)
    trace.step(-1).at(16).word("apple")  # (16, 16): the share of attention that "apple" gets

Hooks on the ``attn2`` modules see what these are given: the model, its attention processors and arithmetic
stay as they are, and pictures are the same to the bit. All of it is ours, but for scaling one word's
attention (prompt-to-prompt, Hertz et al., arXiv 2208.01626) and its maps by word (DAAM, Tang et al., arXiv
2210.04885).
"""

from __future__ import annotations

import inspect
import math
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import EllipsisType

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.models.attention_processor import Attention
from PIL import Image
from torch import Tensor

from .errors import NoCrossAttentionError, WordNotInPromptError
from .models import check_pipeline, sample

Size = tuple[int, int]


def cross_attention_layers(unet: torch.nn.Module) -> dict[str, Attention]:
    """The cross-attention modules (``attn2``) by name, in forward order; NoCrossAttentionError if none."""
    parts = {n: p for n, p in unet.named_modules() if n.endswith("attn2") and isinstance(p, Attention)}
    layers = {name: part for name, part in parts.items() if part.is_cross_attention}
    if not layers:
        message = "has no cross-attention: expected a UNet with `attn2` modules that read a text"
        raise NoCrossAttentionError(f"{type(unet).__name__} {message}")
    return dict(sorted(layers.items(), key=lambda item: ("up_" in item[0], "mid_" in item[0])))


def layer_size(positions: int, size: Size) -> Size:
    """(H, W) of a layer with ``positions`` places: halves the latent's as a stride-2 convolution does."""
    h, w = size
    while h * w > positions and (h, w) != (1, 1):
        h, w = (h + 1) // 2, (w + 1) // 2
    if h * w != positions:
        raise ValueError(f"{positions} positions do not come from halving a latent of {size[0]}x{size[1]}")
    return h, w


def attention_maps(layer: Attention, hidden: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
    """Where each head looks, by the layer's own Q and K: (B, heads, H*W, T), the last axis sums to 1.

    ``hidden`` (B, H*W, C), ``text`` (B, T, D); ``mask`` (B, 1, T) is added before the softmax. In 32 bits, as
    16-bit scores overflow in some models. What a processor of one's own makes of them is not seen.
    """
    query, key = (
        project(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for project, x in ((layer.to_q, hidden), (layer.to_k, text))
    )
    with torch.autocast(query.device.type, enabled=False):
        scores = layer.scale * query.float() @ key.float().mT
    return (scores if mask is None else scores + mask[:, None]).softmax(dim=-1)


def mean_map(layers: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of ``layers`` (n, m, h, w), each enlarged to the largest one's size."""
    size = max((maps.shape[-2:] for maps in layers), key=math.prod)
    return np.mean(
        [F.interpolate(torch.from_numpy(x), size, mode="bilinear").numpy() for x in layers], axis=0
    )


# ---- recording


@dataclass
class AttentionRecorder:
    """What the cross-attention layers did in the last forward pass, by layer name in forward order."""

    probs: dict[str, Tensor] = field(default_factory=dict)  # (B, heads, H*W, T), the last axis sums to 1
    outputs: dict[str, Tensor] = field(default_factory=dict)  # after `to_out` (B, H*W, C)
    stopped: bool = False

    def stop(self) -> None:
        """Lets go of everything, and keeps no more: gradient checkpointing runs the layers again."""
        self.probs.clear()
        self.outputs.clear()
        self.stopped = True


@contextmanager
def record_attention(
    unet: torch.nn.Module, probs: bool = True, outputs: bool = False
) -> Iterator[AttentionRecorder]:
    """Records the cross-attention of every forward pass made inside the ``with`` block.

    ``probs`` and ``outputs`` say what is kept. Gradients flow through it unless the pass runs under
    ``torch.no_grad()``; with gradient checkpointing call ``backward`` inside the block. Raises
    NoCrossAttentionError when there is nothing to record.
    """
    recorder = AttentionRecorder()

    def keep(name: str, layer: Attention, args: tuple, kwargs: dict, output: Tensor) -> None:
        if probs:  # also when it is stopped: checkpointing wants the same again
            text, mask = kwargs["encoder_hidden_states"], kwargs.get("attention_mask")
            maps = attention_maps(layer, args[0], text, mask)
        if probs and not recorder.stopped:
            recorder.probs[name] = maps
        if outputs and not recorder.stopped:
            recorder.outputs[name] = output

    with ExitStack() as hooks:
        for name, layer in cross_attention_layers(unet).items():
            hooks.callback(layer.register_forward_hook(partial(keep, name), with_kwargs=True).remove)
        yield recorder


@contextmanager
def edit_attention(pipe: DiffusionPipeline, prompt: str, scales: Mapping[str, float]) -> Iterator[None]:
    """Turns words of ``prompt`` up or down in every cross-attention layer while the block lasts::

        with duge.edit_attention(pipe, prompt, {"umbrella": 0.0}):
            picture = duge.sample(pipe, prompt, seed=1)[0]

    The weight of a word or phrase, or of "<start>", "<end>", "<pad>", is multiplied by its scale before the
    softmax divides (0 removes it), so the shares still sum to 1. Only the conditional half of guidance is
    edited. :func:`trace` shows edited maps. Raises WordNotInPromptError, or ValueError for a scale that is
    negative or leaves nothing to look at.
    """
    tokens, words, _ = read_tokens(pipe.tokenizer, prompt)
    factors = torch.ones(len(tokens))  # (T,)
    for word, scale in scales.items():
        if not 0 <= scale < math.inf:
            raise ValueError(f"scale {scale} for {word!r}: expected 0 (remove) or more; 1 changes nothing")
        factors[find_positions(tokens, words, word)] = scale
    if not factors.any():
        raise ValueError("every position has scale 0: leave at least one, such as '<start>', to look at")

    def edit(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        text = kwargs["encoder_hidden_states"]
        # As a mask it is added before the softmax, and multiplies after the exponential.
        mask = factors.log().to(text).repeat(len(text), 1, 1)  # (B, 1, T)
        if pipe.do_classifier_free_guidance:
            mask[: len(mask) // 2] = 0
        if (before := kwargs.get("attention_mask")) is not None:
            mask = mask + before
        return args, kwargs | {"attention_mask": mask}

    with ExitStack() as hooks:
        for layer in cross_attention_layers(pipe.unet).values():
            hooks.callback(layer.register_forward_pre_hook(edit, with_kwargs=True).remove)
        yield


# ---- words and tokens


@dataclass(frozen=True)
class Token:
    """One position of the prompt."""

    text: str  # the piece that it stands for ("back" of "backpack"); "<start>", "<end>" or "<pad>"
    word: int | None  # which word it belongs to, None for the special positions
    kind: str = "word"  # or "start", "end", "pad"


def read_tokens(tokenizer, prompt: str) -> tuple[list[Token], list[str], str]:
    """Tokens as the pipeline sees them (padded), the words among them, and the text that was cut off.

    A word is what the tokenizer takes for one: for CLIP's a run of letters, one digit, or a run of anything
    else (so ``bow-tie!!`` is ``bow``, ``-``, ``tie``, ``!!``). Words keep the prompt's own spelling.
    """
    prompt = unicodedata.normalize("NFC", prompt)
    read = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    room, last = tokenizer.model_max_length - 2, None
    tokens, spans = [Token("<start>", None, "start")], []
    pieces = list(zip(read.tokens(), read.word_ids(), read.offset_mapping, strict=True))
    for piece, of, (start, stop) in pieces[:room]:
        if of != last and (not spans or start >= spans[-1][1]):  # a character belongs to one word only
            spans.append((start, stop))
        last, spans[-1] = of, (spans[-1][0], max(stop, spans[-1][1]))
        tokens.append(Token(prompt[start:stop] or piece, len(spans) - 1))
    cut = prompt[pieces[room][2][0] :] if len(pieces) > room else ""
    tokens.append(Token("<end>", None, "end"))
    tokens += [Token("<pad>", None, "pad")] * (tokenizer.model_max_length - len(tokens))
    return tokens, [prompt[start:stop] for start, stop in spans], cut


def find_positions(tokens: Sequence[Token], words: Sequence[str], word: str) -> list[int]:
    """Token positions of a word wherever it stands, of a phrase, or of "<start>", "<end>", "<pad>"."""
    wanted = "".join(unicodedata.normalize("NFC", word).split()).casefold()
    known = ["".join(w.split()).casefold() for w in words]
    parts = [range(i, j) for i in range(len(words)) for j in range(i + 1, len(words) + 1)]
    inside = {k for part in parts if "".join(known[part.start : part.stop]) == wanted for k in part}
    special = not inside and word in ("<start>", "<end>", "<pad>")
    found = [i for i, t in enumerate(tokens) if t.word in inside or (special and t.text == word)]
    if not found:
        raise WordNotInPromptError(word, words)
    return found


# ---- the trace


@dataclass(eq=False, repr=False)
class AttentionTrace:
    """One picture and where each word looked while it was drawn.

    ``maps`` holds per layer an array (steps, heads, T, h, w) in float16, heads being 1 where their mean was
    kept: the share of attention that place (h, w) gives to each token; it sums to 1 over T.
    """

    image: Image.Image | None = None
    prompt: str = ""
    tokens: tuple[Token, ...] = ()  # one per position
    words: tuple[str, ...] = ()  # the prompt's; Token.word counts into it
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)
    timesteps: tuple[int, ...] = ()  # the scheduler's, of each step
    cut: str = ""  # what the tokenizer's limit cut off the prompt
    previews: tuple[Image.Image, ...] = ()  # the half-finished picture after each step
    also: AttentionTrace | None = None  # of another text's words in the same picture

    def __repr__(self) -> str:
        return (
            f"<AttentionTrace of {self.prompt!r}: {len(self.words)} words, {len(self.timesteps)} steps, "
            f"{len(self.maps)} layers at {self.resolutions}>"
        )

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.maps)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The larger sides of the layers' maps, finest first."""
        return tuple(sorted({max(v.shape[-2:]) for v in self.maps.values()}, reverse=True))

    def layer(self, *names: str) -> AttentionTrace:
        """Only the layers whose name contains one of ``names``: "mid", "down", "up_blocks.1", a full name."""
        found = {k: v for k, v in self.maps.items() if any(name in k for name in names)}
        if not found:
            raise KeyError(f"no layer is called {', '.join(names)}; the layers are: {', '.join(self.layers)}")
        return replace(self, maps=found)

    def at(self, resolution: int) -> AttentionTrace:
        """Only the layers whose larger side has ``resolution`` positions."""
        found = {k: v for k, v in self.maps.items() if max(v.shape[-2:]) == resolution}
        if not found:
            raise KeyError(f"no layer works at resolution {resolution}; there are: {self.resolutions}")
        return replace(self, maps=found)

    def step(self, index: int | slice) -> AttentionTrace:
        """Only one step (0 is the noisiest, -1 the last) or a slice of them."""
        count = len(self.timesteps)
        chosen = list(range(count)[index]) if isinstance(index, slice) else [index]
        if not chosen or not all(-count <= i < count for i in chosen):
            raise IndexError(f"step {index} of a trace with {count} steps: choose from 0 to {count - 1}")
        return replace(
            self,
            maps={name: maps[chosen] for name, maps in self.maps.items()},
            timesteps=tuple(self.timesteps[i] for i in chosen),
            previews=tuple(self.previews[i] for i in chosen) if self.previews else (),
        )

    def head(self, index: int) -> AttentionTrace:
        """Only one head of every layer, of a trace that was made with ``heads=True``."""
        fewest = min(v.shape[1] for v in self.maps.values())
        if not 0 <= index < fewest:
            known = f"choose from 0 to {fewest - 1}; trace(..., heads=True) keeps heads apart"
            raise IndexError(f"head {index}: {known}")
        return replace(self, maps={k: v[:, index : index + 1] for k, v in self.maps.items()})

    def positions(self, word: str) -> list[int]:
        """As :func:`find_positions`; raises WordNotInPromptError."""
        return find_positions(self.tokens, self.words, word)

    def word(self, word: str) -> np.ndarray:
        """Where ``word`` looks: the share of attention that its tokens get together, (h, w), float32.

        A repeated word is all of its places; a phrase such as "bow tie" is one. Raises WordNotInPromptError.
        """
        return self.share(self.positions(word))

    def share(self, positions: Sequence[int]) -> np.ndarray:
        """What the token ``positions`` get together, (h, w): the mean over heads, steps and layers."""
        every = (maps[:, :, list(positions)].astype(np.float32) for maps in self.maps.values())
        return mean_map([maps.sum(axis=2).mean(axis=(0, 1), keepdims=True) for maps in every])[0, 0]

    def shares(self) -> np.ndarray:
        """The share of all attention that each token gets, (T,); sums to 1."""
        return np.mean([v.astype(np.float32).mean(axis=(0, 1, 3, 4)) for v in self.maps.values()], axis=0)

    def kinds(self) -> dict[str, float]:
        """The share of all attention that goes to words and to the start, end and padding positions."""
        total = dict.fromkeys(("start", "word", "end", "pad"), 0.0)
        for share, token in zip(self.shares(), self.tokens, strict=True):
            total[token.kind] += float(share)
        return total

    def concentration(self, word: str) -> np.ndarray:
        """How narrowly ``word`` looks at each step, (steps,): 0 is evenly everywhere, 1 a single place.

        One minus the entropy over places, divided by the largest possible one.
        """
        every = range(len(self.timesteps))
        maps = np.stack([self.step(i).word(word).ravel() for i in every]).astype(np.float64)
        p = maps / maps.sum(axis=1, keepdims=True).clip(1e-12)
        return 1 + (p * np.log(p.clip(1e-12))).sum(axis=1) / math.log(max(maps.shape[1], 2))


# ---- tracing


@contextmanager
def _heard(part: object, method: str, listen: Callable[..., None]) -> Iterator[None]:
    """Tells ``listen(result, *args, **kwargs)`` of every call of this one object's method."""
    own, call = vars(part).get(method), getattr(part, method)

    def heard(*args, **kwargs):
        result = call(*args, **kwargs)
        listen(result, *args, **kwargs)
        return result

    setattr(part, method, heard)
    try:
        yield
    finally:
        delattr(part, method) if own is None else setattr(part, method, own)


@contextmanager
def _traced(
    pipe: DiffusionPipeline, heads: bool = False, also: str | None = None, depth: int = 3
) -> Iterator[AttentionTrace]:
    """Fills the trace of the last picture that ``pipe`` draws in the block, when the block ends."""
    found, size, times = AttentionTrace(), [], []
    layers = cross_attention_layers(pipe.unet)
    kept, other = ({name: [] for name in layers} for _ in range(2))  # the prompt's maps, and those of `also`
    once = dict(device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    with torch.no_grad():
        text = None if also is None else pipe.encode_prompt(also, **once)[0]  # (1, T, D)

    def begin(_, *args, **kwargs) -> None:
        asked = inspect.signature(type(pipe).encode_prompt).bind(pipe, *args, **kwargs).arguments
        prompt = asked["prompt"]
        found.prompt = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
        if not isinstance(found.prompt, str) or asked.get("num_images_per_prompt", 1) != 1:
            raise TypeError(f"a trace holds one picture of one text: got the prompt {found.prompt!r:.60}")
        for part in (times, *kept.values(), *other.values()):
            part.clear()

    def finished(images: Sequence, *_, **__) -> None:
        found.image = images[0]

    def step(_, args: tuple, kwargs: dict) -> None:
        size[:] = (args[0] if args else kwargs["sample"]).shape[-2:]
        times.append(int(args[1] if len(args) > 1 else kwargs["timestep"]))

    def look(name: str, layer: Attention, args: tuple, kwargs: dict, _: Tensor) -> None:
        one = slice(-1, None)  # of guidance's two halves the conditional one stands last
        hidden, mask = args[0][one], kwargs.get("attention_mask")
        read = [(kept, kwargs["encoder_hidden_states"][one], mask if mask is None else mask[one])]
        read += [] if text is None else [(other, text, None)]
        for into, words, mask in read:
            (maps,) = attention_maps(layer, hidden, words, mask).mT  # (heads, T, H*W)
            maps = (maps if heads else maps.mean(dim=0, keepdim=True)).half()
            into[name].append(maps.unflatten(-1, layer_size(maps.shape[-1], tuple(size))).cpu().numpy())

    with ExitStack() as hooks:
        hooks.callback(pipe.unet.register_forward_pre_hook(step, with_kwargs=True).remove)
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(partial(look, name), with_kwargs=True).remove)
        hooks.enter_context(_heard(pipe, "encode_prompt", begin))
        hooks.enter_context(_heard(pipe.image_processor, "postprocess", finished))
        yield found
    if not times:
        raise ValueError("nothing was drawn: call this pipeline inside the block, with a prompt")
    if also is not None:
        found.also = AttentionTrace(found.image, also)
    for trace, maps in [(found, kept), (found.also, other)][: 1 if also is None else 2]:
        tokens, words, trace.cut = read_tokens(pipe.tokenizer, trace.prompt)
        trace.tokens, trace.words, trace.timesteps = tuple(tokens), tuple(words), tuple(times)
        trace.maps = {name: np.stack(maps.pop(name)) for name in list(maps)}  # each is let go when it is done
        if trace.cut:
            limit = f"longer than {pipe.tokenizer.model_max_length} tokens"
            warnings.warn(f"the prompt is {limit}; the model never reads: {trace.cut!r}", stacklevel=depth)


def trace(
    pipe: DiffusionPipeline, prompt: str | EllipsisType = ..., seed: int = 0,
    num_inference_steps: int | None = None, guidance_scale: float | None = None, *, heads: bool = False,
    also: str | None = None, image: Image.Image | None = None, previews: bool = False, **options,
) -> AttentionTrace | AbstractContextManager[AttentionTrace]:  # fmt: skip
    """Draws the picture that ``pipe`` draws anyway, and keeps the attention of guidance's conditional half.

    Without a prompt it is a context for a pipeline call of one's own; ``heads`` and ``also`` are all that it
    takes, and the trace is filled when the block ends::

        with duge.trace(pipe) as maps:
            picture = pipe("a photo of an apple").images[0]

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or XL pipeline.
        prompt: one text.
        seed, num_inference_steps, guidance_scale: as :func:`~duge_lite.models.sample` takes them.
        heads: keep the heads apart; otherwise their mean is kept, in 16 bits on the CPU.
        also: another text, whose words need not be in the prompt: the maps that its keys give at the same
            queries are in ``trace.also``.
        image: look at this picture instead of drawing one: with the noise of each of ``timesteps`` (by
            default 750, 500 and 250) it goes through the UNet once, without guidance.
        previews: also decode the half-finished picture after every step.
        options: ``sample``'s, such as ``negative_prompt``, ``height`` and ``width``.

    Warns when the tokenizer cuts the prompt. Raises NoCrossAttentionError; TypeError or ValueError for what
    ``sample`` does not take.
    """
    check_pipeline(pipe)
    how = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    drawing = previews or any(value is not None for value in how.values())
    if prompt is ...:
        if drawing or seed or options or image is not None:
            raise TypeError("without a prompt, trace takes heads and also: the rest goes to your own call")
        return _traced(pipe, heads, also)
    if image is not None and drawing:
        raise TypeError("a picture that exists is looked at, not drawn: it takes timesteps, and no guidance")
    pictures: list[Image.Image] = []

    def step_done(_, index: int, timestep: Tensor, tensors: dict) -> dict:
        latents = tensors["latents"].to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
        pictures.extend(pipe.image_processor.postprocess(pipe.vae.decode(latents).sample))
        return tensors

    if previews:
        options["callback_on_step_end"] = step_done
    looking = nullcontext({}) if image is None else _looking_at(pipe, image, seed, **options)
    with looking as instead, _traced(pipe, heads, also, depth=4) as found:
        (drawn,) = sample(pipe, prompt, seed, **how | options | instead)
        found.image, found.previews = drawn if image is None else image, tuple(pictures)
    return found


@contextmanager
def _looking_at(
    pipe: DiffusionPipeline, image: Image.Image, seed: int, timesteps: Sequence[int] = (), **_
) -> Iterator[dict]:
    """Whatever ``pipe`` draws in the block, its UNet sees ``image`` with the noise of that moment."""
    pixels = pipe.image_processor.preprocess(image).to(pipe._execution_device, pipe.vae.dtype)
    with torch.no_grad():
        clean = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(int(seed))).to(clean)
    before, pipe.scheduler = pipe.scheduler, DDPMScheduler.from_config(pipe.scheduler.config)

    def show(_, args: tuple) -> tuple:
        latents, timestep, *rest = args
        return pipe.scheduler.add_noise(clean, noise, timestep.reshape(1)).to(latents), timestep, *rest

    hook = pipe.unet.register_forward_pre_hook(show)
    moments = sorted(map(int, timesteps or (750, 500, 250)), reverse=True)
    size = {"height": pixels.shape[-2], "width": pixels.shape[-1]}
    try:
        yield size | {"timesteps": moments, "guidance_scale": 1.0, "output_type": "latent"}
    finally:
        hook.remove()
        pipe.scheduler = before
