"""Cross-attention out of any diffusers UNet: recorded, reduced, named by word, and edited::

    trace = duge.trace(pipe, "a photo of an apple next to an umbrella", seed=1)
    trace.step(-1).at(16).word("apple")  # (16, 16): the share of attention that "apple" gets

Only ``attn2`` modules get another processor, one by one, and what was there comes back. All of it is ours,
but for scaling one word's attention (prompt-to-prompt, Hertz et al., arXiv 2208.01626) and watching a
pipeline at work (DAAM, Tang et al., arXiv 2210.04885).
"""

from __future__ import annotations

import inspect
import math
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from types import EllipsisType

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor
from PIL import Image
from torch import Tensor

from .concepts import model_card
from .errors import NoCrossAttentionError, WordNotInPromptError

Size = tuple[int, int]


def cross_attention_layers(unet: torch.nn.Module) -> dict[str, Attention]:
    """The cross-attention modules (``attn2``) by name, in forward order; NoCrossAttentionError if none."""
    found = {name: part for name, part in unet.named_modules() if name.split(".")[-1] == "attn2"}
    layers = {n: part for n, part in found.items() if isinstance(part, Attention) and part.is_cross_attention}
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


# ---- the processor
Sink = Callable[[Attention, Tensor, Tensor, Tensor], None]  # layer, queries, maps (B, heads, H*W, T), output
Edit = Callable[[Tensor], Tensor]  # scores before the softmax (B, heads, H*W, T) -> the same shape


def attention_scores(layer: Attention, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """Before the softmax, (B, heads, H*W, T), in 32 bits: 16-bit scores overflow in some models."""
    with torch.autocast(query.device.type, enabled=False):
        scores = layer.scale * query.float() @ key.float().transpose(-1, -2)
    return (scores if mask is None else scores + mask).unflatten(0, (-1, layer.heads))


class _Shown:
    """A layer as diffusers' AttnProcessor sees it, but for the one step that we look into."""

    def __init__(self, layer: Attention, edits: Sequence[Edit]) -> None:
        self.layer, self.edits = layer, edits

    def __getattr__(self, name: str) -> object:
        return getattr(self.layer, name)

    def get_attention_scores(self, query: Tensor, key: Tensor, attention_mask: Tensor | None) -> Tensor:
        scores = attention_scores(self.layer, query, key, attention_mask)
        for edit in self.edits:
            scores = edit(scores)
        self.query, self.probs = query, scores.softmax(dim=-1)
        return self.probs.flatten(0, 1).to(query.dtype)


class _Watched(AttnProcessor):
    """Plain attention with guests (sink, edit): the last one that listens is told, every edit applies."""

    def __init__(self, before: object) -> None:
        self.before, self.guests = before, []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        shown = _Shown(attn, [edit for _, edit in self.guests if edit])
        out = super().__call__(shown, hidden_states, encoder_hidden_states, attention_mask, temb)
        for sink in [sink for sink, _ in self.guests if sink][-1:]:
            sink(attn, shown.query, shown.probs, out)
        return out


@contextmanager
def _watching(unet: torch.nn.Module, sink: Sink | None = None, edit: Edit | None = None) -> Iterator[None]:
    """A guest in every layer; when the last guest goes, the processor that was there comes back."""
    guest, mine = (sink, edit), []
    try:
        for name, layer in cross_attention_layers(unet).items():
            old = layer.processor
            if not isinstance(old, _Watched):
                if not type(old).__module__.startswith("diffusers.") or isinstance(old, torch.nn.Module):
                    who = f"{name} has a processor of its own ({type(old).__name__})"
                    what = "inside this block plain attention takes its place, so pictures may differ"
                    warnings.warn(f"{who}: {what}", stacklevel=5)  # past two managers: the caller's `with`
                layer.set_processor(_Watched(old))
            layer.processor.guests.append(guest)
            mine.append((layer, layer.processor))
        yield
    finally:
        for layer, watched in mine:
            watched.guests.remove(guest)
            if not watched.guests:
                layer.set_processor(watched.before)


# ---- recording


@dataclass
class AttentionRecorder:
    """What the cross-attention layers did in the last forward pass, by layer name in forward order."""

    layers: tuple[str, ...]
    size: Size | None = None  # (H, W) of the latents
    probs: dict[str, Tensor] = field(default_factory=dict)  # (B, heads, H*W, T), the last axis sums to 1
    outputs: dict[str, Tensor] = field(default_factory=dict)  # after `to_out` (B, H*W, C)
    also: dict[str, Tensor] = field(default_factory=dict)  # the maps of another text at the same queries
    sizes: dict[str, Size] = field(default_factory=dict)  # (H, W) of each layer
    stopped: bool = False

    def clear(self) -> None:
        for part in (self.probs, self.outputs, self.also):
            part.clear()

    def stop(self) -> None:
        """Lets go of everything, and records no more: gradient checkpointing runs the layers again."""
        self.clear()
        self.stopped = True


@contextmanager
def record_attention(
    unet: torch.nn.Module,
    size: Size | None = None,
    probs: bool = True,
    outputs: bool = False,
    reduce: Callable[[Tensor], Tensor] = lambda maps: maps,
    also: Tensor | None = None,
) -> Iterator[AttentionRecorder]:
    """Records the cross-attention of every forward pass made inside the ``with`` block.

    Gradients flow through what is recorded unless the pass runs under ``torch.no_grad()``; with gradient
    checkpointing call ``backward`` inside the block. Contexts nest: the inner one records while it lasts.
    ``size`` is that of the latents, by default of what the UNet is given; ``probs`` and ``outputs`` say what
    is kept, ``reduce`` is applied to maps before, e.g. a mean over heads; ``also`` is another encoded text
    (1, T, D), whose maps at the same queries are kept, too. Raises NoCrossAttentionError when there is
    nothing to record, ValueError when ``size`` does not fit what the layers see.
    """
    names = {layer: name for name, layer in cross_attention_layers(unet).items()}
    recorder = AttentionRecorder(tuple(names.values()), size)

    def measure(_, args: tuple, kwargs: dict) -> None:
        recorder.size = size or tuple((args[0] if args else kwargs["sample"]).shape[-2:])

    def sink(layer: Attention, query: Tensor, maps: Tensor, out: Tensor) -> None:
        if recorder.stopped:
            return
        name = names[layer]
        recorder.sizes[name] = layer_size(maps.shape[2], recorder.size)
        if probs:
            recorder.probs[name] = reduce(maps)
        if outputs:
            recorder.outputs[name] = out
        if also is not None:
            key = layer.head_to_batch_dim(layer.to_k(also.expand(len(maps), -1, -1)))
            recorder.also[name] = reduce(attention_scores(layer, query, key).softmax(dim=-1))

    hook = unet.register_forward_pre_hook(measure, with_kwargs=True)
    try:
        with _watching(unet, sink):
            yield recorder
    finally:
        hook.remove()


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
    bias = factors.log()  # added before the softmax, it multiplies after the exponential

    def edit(scores: Tensor) -> Tensor:
        shift = bias.to(scores.device).repeat(len(scores), 1)  # (B, T)
        if pipe.do_classifier_free_guidance:
            shift[: len(shift) // 2] = 0
        return scores + shift[:, None, None]

    with _watching(pipe.unet, edit=edit):
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
    for piece, of, (start, stop) in zip(read.tokens(), read.word_ids(), read.offset_mapping, strict=True):
        if len(tokens) > room:
            break
        if of != last and (not spans or start >= spans[-1][1]):  # a character belongs to one word only
            spans.append((start, stop))
        last, spans[-1] = of, (spans[-1][0], max(stop, spans[-1][1]))
        tokens.append(Token(prompt[start:stop] or piece, len(spans) - 1))
    cut = prompt[read.offset_mapping[room][0] :] if len(read.input_ids) > room else ""
    tokens.append(Token("<end>", None, "end"))
    tokens += [Token("<pad>", None, "pad")] * (tokenizer.model_max_length - len(tokens))
    return tokens, [prompt[start:stop] for start, stop in spans], cut


def find_positions(
    tokens: Sequence[Token], words: Sequence[str], word: str, occurrence: int | None = None
) -> list[int]:
    """Token positions of a word or phrase: :meth:`AttentionTrace.positions` without a trace."""
    wanted = "".join(unicodedata.normalize("NFC", word).split()).casefold()
    known = ["".join(w.split()).casefold() for w in words]
    every = [range(i, j) for i in range(len(words)) for j in range(i + 1, len(words) + 1)]
    places = [part for part in every if "".join(known[part.start : part.stop]) == wanted]
    found = [[i for i, t in enumerate(tokens) if t.word in part] for part in places]
    if not found and word in ("<start>", "<end>", "<pad>"):
        found = [[i for i, t in enumerate(tokens) if t.text == word]]
    if not found or not found[0]:
        raise WordNotInPromptError(word, words)
    if occurrence is None:
        return sorted({i for positions in found for i in positions})
    if not -len(found) <= occurrence < len(found):
        raise WordNotInPromptError(f"{word} (occurrence {occurrence}, counted from 0)", words)
    return found[occurrence]


# ---- the trace


@dataclass(eq=False, repr=False)
class AttentionTrace:
    """One picture and where each word looked while it was drawn.

    ``maps`` holds per layer an array (steps, T, h, w), or (steps, heads, T, h, w) with ``heads=True``, in
    float16: the share of attention that place (h, w) gives to each token; it sums to 1 over T.
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

    @property
    def has_heads(self) -> bool:
        return any(v.ndim == 5 for v in self.maps.values())

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
            maps={k: v[chosen] for k, v in self.maps.items()},
            timesteps=tuple(self.timesteps[i] for i in chosen),
            previews=tuple(self.previews[i] for i in chosen) if self.previews else (),
        )

    def head(self, index: int) -> AttentionTrace:
        """Only one head of every layer."""
        if not self.has_heads:
            raise ValueError("this trace holds the mean over heads: make it with trace(..., heads=True)")
        fewest = min(v.shape[1] for v in self.maps.values())
        if not 0 <= index < fewest:
            raise IndexError(f"head {index}: choose from 0 to {fewest - 1}, which every layer has")
        return replace(self, maps={k: v[:, index] for k, v in self.maps.items()})

    def positions(self, word: str, occurrence: int | None = None) -> list[int]:
        """Token positions of a word, of a phrase such as "bow tie", or of "<start>", "<end>", "<pad>".

        ``occurrence`` picks the first (0), second (1) ... of a repeated word; otherwise it is all of them.
        Raises WordNotInPromptError.
        """
        return find_positions(self.tokens, self.words, word, occurrence)

    def word(self, word: str, occurrence: int | None = None) -> np.ndarray:
        """Where ``word`` looks: the share of attention that its tokens get together, (h, w), float32."""
        return self.share(self.positions(word, occurrence))

    def share(self, positions: Sequence[int]) -> np.ndarray:
        """What the token ``positions`` get together, (h, w): the mean over heads, steps and layers.

        Maps of small layers are enlarged to the largest one's size.
        """
        size = max((v.shape[-2:] for v in self.maps.values()), key=math.prod)
        total = np.zeros(size, dtype=np.float32)
        for maps in self.maps.values():
            one = maps[..., list(positions), :, :].astype(np.float32).sum(axis=-3)
            mean = torch.from_numpy(one.reshape(-1, *one.shape[-2:]).mean(axis=0))
            total += F.interpolate(mean[None, None], size=size, mode="bilinear")[0, 0].numpy()
        return total / len(self.maps)

    def shares(self) -> np.ndarray:
        """The share of all attention that each token gets, (T,); sums to 1."""
        means = [
            np.moveaxis(maps, -3, 0).astype(np.float32).reshape(len(self.tokens), -1).mean(axis=1)
            for maps in self.maps.values()
        ]
        return np.mean(means, axis=0)

    def kinds(self) -> dict[str, float]:
        """The share of all attention that goes to words and to the start, end and padding positions."""
        total = dict.fromkeys(("start", "word", "end", "pad"), 0.0)
        for share, token in zip(self.shares(), self.tokens, strict=True):
            total[token.kind] += float(share)
        return total

    def concentration(self, word: str, occurrence: int | None = None) -> np.ndarray:
        """How narrowly ``word`` looks at each step, (steps,): 0 is evenly everywhere, 1 a single place.

        One minus the entropy over places, divided by the largest possible one.
        """
        positions = self.positions(word, occurrence)
        maps = np.stack([self.step(i).share(positions).ravel() for i in range(len(self.timesteps))])
        p = maps.astype(np.float64) / maps.sum(axis=1, keepdims=True).clip(1e-12)
        entropy = -(p * np.log(p.clip(1e-12))).sum(axis=1)
        return 1 - entropy / math.log(max(maps.shape[1], 2))


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
    found, kept, other, times = AttentionTrace(), {}, {}, []
    once = dict(device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    with torch.no_grad():
        text = None if also is None else pipe.encode_prompt(also, **once)[0]

    def begin(_, *args, **kwargs) -> None:
        asked = inspect.signature(type(pipe).encode_prompt).bind(pipe, *args, **kwargs).arguments
        found.prompt = asked["prompt"][0] if len(asked["prompt"] or "") == 1 else asked["prompt"]
        if not isinstance(found.prompt, str) or asked.get("num_images_per_prompt", 1) != 1:
            raise TypeError(f"a trace holds one picture of one text: got the prompt {found.prompt!r:.60}")
        for part in (kept, other, times):
            part.clear()

    def finished(images: Sequence, *_, **__) -> None:
        found.image = images[0]

    def reduce(probs: Tensor) -> Tensor:  # (N, heads, H*W, T), guided: [unconditional, conditional]
        asked = probs[len(probs) // 2 :] if pipe.do_classifier_free_guidance else probs
        return (asked if heads else asked.mean(dim=1))[0].half().transpose(-1, -2)

    def step_done(_, args: tuple, kwargs: dict, __) -> None:
        times.append(int(args[1] if len(args) > 1 else kwargs["timestep"]))
        for maps, into in ((recorder.probs, kept), (recorder.also, other)):
            for name, one in maps.items():
                into.setdefault(name, []).append(one.unflatten(-1, recorder.sizes[name]).cpu().numpy())
        recorder.clear()

    with (
        record_attention(pipe.unet, reduce=reduce, also=text) as recorder,
        _heard(pipe, "encode_prompt", begin),
        _heard(pipe.image_processor, "postprocess", finished),
    ):
        hook = pipe.unet.register_forward_hook(step_done, with_kwargs=True)
        try:
            yield found
        finally:
            hook.remove()
    if not times:
        raise ValueError("nothing was drawn: call this pipeline inside the block, with a prompt")
    if also is not None:
        found.also = AttentionTrace(found.image, also)
    for trace, maps in ((found, kept), (found.also, other))[: 2 if also is not None else 1]:
        tokens, words, trace.cut = read_tokens(pipe.tokenizer, trace.prompt)
        trace.tokens, trace.words, trace.timesteps = tuple(tokens), tuple(words), tuple(times)
        trace.maps = {name: np.stack(maps.pop(name)) for name in list(maps)}  # each is let go when it is done
        if trace.cut:
            limit = f"longer than {pipe.tokenizer.model_max_length} tokens"
            warnings.warn(f"the prompt is {limit}; the model never reads: {trace.cut!r}", stacklevel=depth)


def trace(
    pipe: DiffusionPipeline,
    prompt: str | EllipsisType = ...,
    seed: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    *,
    heads: bool = False,
    also: str | None = None,
    image: Image.Image | None = None,
    previews: bool = False,
    **options,
) -> AttentionTrace | AbstractContextManager[AttentionTrace]:
    """Draws the picture that ``pipe`` draws anyway, and keeps the attention of guidance's conditional half.

    Without a prompt it is a context for a pipeline call of one's own; ``heads`` and ``also`` are all that it
    takes, and the trace is filled when the block ends::

        with duge.trace(pipe) as maps:
            picture = pipe("a photo of an apple").images[0]

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or XL pipeline.
        prompt: one text.
        seed: of the starting noise, by default 0; or pass a ``generator``.
        num_inference_steps, guidance_scale: default to the model card's.
        heads: keep the heads apart; otherwise their mean is kept, in 16 bits on the CPU.
        also: another text, whose words need not be in the prompt: the maps that its keys give at the same
            queries are in ``trace.also``.
        image: look at this picture instead of drawing one: with the noise of each of ``timesteps`` (by
            default 750, 500 and 250) it goes through the UNet once, without guidance.
        previews: also decode the half-finished picture after every step.
        options: of the pipeline, such as ``negative_prompt``, ``generator``, ``height`` and ``width``.

    Warns when the tokenizer cuts the prompt. Raises NoCrossAttentionError; TypeError or ValueError for what
    is no argument of the pipeline, or no sensible one.
    """
    if not isinstance(pipe, DiffusionPipeline) or not hasattr(pipe, "unet"):
        raise TypeError(f"pipe = {pipe!r:.60}: expected a pipeline with a UNet, as load_pipeline() gives")
    sizes = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    settings = {k: v for k, v in (sizes | {"seed": seed}).items() if v is not None} | options
    if prompt is ...:
        if settings or previews or image is not None:
            raise TypeError("without a prompt, trace takes heads and also: the rest goes to your own call")
        return _traced(pipe, heads, also)
    if image is not None and (previews or sizes.keys() & settings.keys()):
        raise TypeError("a picture that exists is looked at, not drawn: it takes timesteps, and no guidance")
    _check(pipe, prompt, settings)
    card = model_card(pipe)
    settings.setdefault("num_inference_steps", card.num_inference_steps)
    settings.setdefault("guidance_scale", card.guidance_scale)
    settings.setdefault("generator", torch.Generator("cpu").manual_seed(int(settings.pop("seed", 0))))
    pictures: list[Image.Image] = []

    def step_done(_, index: int, timestep: Tensor, tensors: dict) -> dict:
        latents = tensors["latents"].to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
        pictures.extend(pipe.image_processor.postprocess(pipe.vae.decode(latents).sample))
        return tensors

    if previews:
        settings["callback_on_step_end"] = step_done
    looking = nullcontext({}) if image is None else _looking_at(pipe, image, settings)
    with looking as instead, _traced(pipe, heads, also, depth=4) as found:
        drawn = pipe(prompt, **settings | instead).images
        found.image, found.previews = drawn[0] if image is None else image, tuple(pictures)
    return found


@contextmanager
def _looking_at(pipe: DiffusionPipeline, image: Image.Image, settings: dict) -> Iterator[dict]:
    """Whatever ``pipe`` draws in the block, its UNet sees ``image`` with the noise of that moment."""
    pixels = pipe.image_processor.preprocess(image).to(pipe._execution_device, pipe.vae.dtype)
    with torch.no_grad():
        clean = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=settings["generator"]).to(clean)
    before, pipe.scheduler = pipe.scheduler, DDPMScheduler.from_config(pipe.scheduler.config)

    def show(_, args: tuple) -> tuple:
        sample, timestep, *rest = args
        return pipe.scheduler.add_noise(clean, noise, timestep.reshape(1)).to(sample), timestep, *rest

    hook = pipe.unet.register_forward_pre_hook(show)
    moments = sorted(map(int, settings.get("timesteps") or (750, 500, 250)), reverse=True)
    size = {"height": pixels.shape[-2], "width": pixels.shape[-1]}
    try:
        yield size | {"timesteps": moments, "guidance_scale": 1.0, "output_type": "latent"}
    finally:
        hook.remove()
        pipe.scheduler = before


def _check(pipe: DiffusionPipeline, prompt: object, settings: Mapping[str, object]) -> None:
    """One sentence for each thing that the pipeline would ignore, replace or stumble over much later."""
    known = [*inspect.signature(type(pipe).__call__).parameters, "seed"]
    for name in settings:
        if name not in known or name == "kwargs":
            near = next((k for k in known if {*name.split("_")} <= {*k.split("_")}), None)
            hint = f": did you mean {near}?" if near else ""
            raise TypeError(f"trace got {name!r}, which {type(pipe).__name__} does not take{hint}")
    if not isinstance(prompt, str):
        raise TypeError(f"prompt = {prompt!r}: expected one text")
    if "seed" in settings and "generator" in settings:
        raise TypeError("trace got a seed and a generator: expected one of them")
    side = math.lcm(8, pipe.vae_scale_factor)
    units = {"seed": None, "num_inference_steps": 1, "height": side, "width": side, "guidance_scale": 0}
    for name in [name for name in units if name in settings]:
        value, unit = settings[name], units[name]
        if isinstance(value, bool) or not isinstance(value, Integral if unit != 0 else Real):
            raise TypeError(f"{name} = {value!r}: expected a {'whole ' if unit != 0 else ''}number")
        if unit is not None and (not unit <= value < math.inf or (unit and value % unit)):
            what = "a multiple of" if unit > 1 else "at least"
            raise ValueError(f"{name} = {value}: expected {what} {unit}")
