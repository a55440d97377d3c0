"""Cross-attention out of any diffusers UNet: recorded, reduced, named by word, and edited.

:func:`record_attention` and :func:`edit_attention` are the only things that touch a UNet: they replace
the processors of the ``attn2`` modules, one by one, and put back what was there. :func:`trace` samples a
picture under the first and returns an :class:`AttentionTrace`, a small value that is cut down in steps::

    trace = duge.trace(pipe, "a photo of an apple next to an umbrella", seed=1)
    trace.step(-1).at(16).word("apple")  # (16, 16): the share of attention that "apple" gets

Everything here is ours; the layer's arithmetic follows diffusers' own ``AttnProcessor``, and the idea to
scale one word's attention is that of prompt-to-prompt (Hertz et al., arXiv 2208.01626).
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from .errors import NoCrossAttentionError, WordNotInPromptError
from .models import model_card

Size = tuple[int, int]


class TraceFileError(ValueError):
    """A file that holds no readable trace: damaged, of another version, or not ours."""


# ---------------------------------------------------------------------------- the layers


def cross_attention_layers(unet: torch.nn.Module) -> dict[str, Attention]:
    """The cross-attention modules (``attn2``) by name, in the order of the forward pass.

    Raises NoCrossAttentionError when there are none.
    """
    layers = {
        name: module
        for name, module in unet.named_modules()
        if name.split(".")[-1] == "attn2" and isinstance(module, Attention) and module.is_cross_attention
    }
    if not layers:
        raise NoCrossAttentionError(
            f"{type(unet).__name__} has no cross-attention (no `attn2` module that reads a text): "
            "use a text-to-image UNet such as UNet2DConditionModel with CrossAttn blocks"
        )
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}

    def place(item: tuple[str, Attention]) -> int:
        return next((order[part] for part in item[0].split(".") if part in order), 3)

    return dict(sorted(layers.items(), key=place))  # a stable sort


def latent_size(unet: torch.nn.Module) -> Size:
    """The (H, W) of the latents that ``unet`` was made for."""
    side = unet.config.sample_size
    return (side, side) if isinstance(side, int) else tuple(side)


def layer_size(positions: int, size: Size) -> Size:
    """Height and width of a layer that sees ``positions`` places of a latent of ``size`` (H, W).

    Halves the latent, rounding up as a stride-2 convolution does, until the count fits.
    """
    h, w = size
    while h * w > positions and (h, w) != (1, 1):
        h, w = (h + 1) // 2, (w + 1) // 2
    if h * w != positions:
        raise ValueError(
            f"{positions} positions do not come from halving a latent of {size[0]}x{size[1]}: "
            "pass the latent's own (height, width) as `size`"
        )
    return h, w


# ---------------------------------------------------------------------------- the processor

Sink = Callable[[Tensor, Tensor], None]  # (maps (B, heads, H*W, T), output (B, H*W, C))
Edit = Callable[[Tensor], Tensor]  # scores before the softmax (B, heads, H*W, T) -> the same shape


class _ExplicitAttention:
    """An attention processor with the softmax spelled out, so that it can be seen and changed.

    Processors of ours that sit on top of each other form a chain through ``before``: the topmost ``sink``
    receives, every ``edit`` applies. One that was closed while another lay on top of it counts no more.
    """

    def __init__(self, before: object, sink: Sink | None = None, edit: Edit | None = None) -> None:
        self.before, self.sink, self.edit = before, sink, edit
        self.open = True

    def chain(self) -> list[_ExplicitAttention]:
        below = self.before.chain() if isinstance(self.before, _ExplicitAttention) else []
        return [self, *below] if self.open else below

    def foreign(self) -> object:
        """The processor that was there before any of ours."""
        below = self.before
        return below.foreign() if isinstance(below, _ExplicitAttention) else below

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args,
        **kwargs,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (B, H*W, C)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)  # (B, T, D)

        query = attn.to_q(hidden_states)
        # A layer keeps stale fused weights after `unfuse`: what counts is who would have run here.
        if type(self.foreign()).__name__.startswith("Fused"):
            key, value = attn.to_kv(context).chunk(2, dim=-1)
        else:
            key, value = attn.to_k(context), attn.to_v(context)
        query, key, value = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value)
        )  # (B, heads, H*W or T, C / heads)
        if getattr(attn, "norm_q", None) is not None:
            query = attn.norm_q(query)
        if getattr(attn, "norm_k", None) is not None:
            key = attn.norm_k(key)

        # In 32 bits, as the fused kernel does inside: 16-bit scores overflow in some models.
        with torch.autocast(query.device.type, enabled=False):
            scores = (query.float() * attn.scale) @ key.float().transpose(-1, -2)
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, key.shape[-2], query.shape[0])
            scores = scores + mask.unflatten(0, (-1, attn.heads))
        chain = self.chain()
        for processor in chain:
            scores = scores if processor.edit is None else processor.edit(scores)
        probs = scores.softmax(dim=-1)  # (B, heads, H*W, T)
        hidden_states = (probs.to(value.dtype) @ value).transpose(1, 2).flatten(2)  # (B, H*W, C)
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states.to(residual.dtype)))
        sink = next((p.sink for p in chain if p.sink is not None), None)
        if sink is not None:
            sink(probs, hidden_states)

        if image_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


@contextmanager
def _installed(
    layers: Mapping[str, Attention], sinks: Mapping[str, Sink] | None = None, edit: Edit | None = None
) -> Iterator[None]:
    """Our processor in every one of ``layers``; on the way out, whatever was there before."""
    mine: dict[str, _ExplicitAttention] = {}
    try:
        for name, layer in layers.items():
            mine[name] = _ExplicitAttention(layer.processor, sinks and sinks[name], edit)
            _warn_of_strangers(name, mine[name].foreign())
            layer.set_processor(mine[name])
        yield
    finally:
        for name, processor in mine.items():
            processor.open = False
            on_top = layers[name].processor
            if on_top is not processor and getattr(on_top, "open", False):
                continue  # a context that was opened later is still at work: it will clean up
            before = processor.before
            while isinstance(before, _ExplicitAttention) and not before.open:
                before = before.before
            layers[name].set_processor(before)


def _warn_of_strangers(name: str, processor: object) -> None:
    """A processor of diffusers without weights computes plain attention, as ours does; another may not."""
    plain = type(processor).__module__.startswith("diffusers.")
    if not plain or isinstance(processor, torch.nn.Module):
        warnings.warn(
            f"{name} has a processor of its own ({type(processor).__name__}): inside this block plain "
            "attention takes its place, so pictures may differ; afterwards it is put back",
            stacklevel=6,  # past two context managers: the caller's own `with`
        )


# ---------------------------------------------------------------------------- recording


@dataclass
class AttentionRecorder:
    """What the cross-attention layers did in the last forward pass.

    Attributes:
        layers: layer names in forward order.
        size: (H, W) of the latents.
        probs: per layer the softmax maps (B, heads, H*W, T); their last axis sums to 1.
        outputs: per layer what it wrote, after ``to_out`` (B, H*W, C).
        sizes: per layer (H, W).
    """

    layers: tuple[str, ...]
    size: Size
    probs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, Size] = field(default_factory=dict)
    stopped: bool = False

    def clear(self) -> None:
        self.probs.clear()
        self.outputs.clear()

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
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[AttentionRecorder]:
    """Records the cross-attention of every forward pass made inside the ``with`` block.

    Gradients flow through what is recorded unless the pass runs under ``torch.no_grad()``; with gradient
    checkpointing call ``backward`` inside the block. On the way out the processors that were there before
    are put back, also after an error. Contexts nest: the inner one records while it lasts.

    Args:
        unet: any diffusers UNet with ``attn2`` modules.
        size: (H, W) of the latents; default ``unet.config.sample_size``.
        probs: keep the softmax maps, (B, heads, H*W, T).
        outputs: keep what each layer writes, (B, H*W, C).
        reduce: applied to the maps before they are kept, e.g. a mean over heads.

    Raises NoCrossAttentionError when the UNet has no cross-attention, ValueError when ``size`` does not
    fit what the layers see.
    """
    layers = cross_attention_layers(unet)
    recorder = AttentionRecorder(tuple(layers), size or latent_size(unet))

    def sink_of(name: str) -> Sink:
        def sink(p: Tensor, out: Tensor) -> None:
            if recorder.stopped:
                return
            if name not in recorder.sizes or math.prod(recorder.sizes[name]) != p.shape[2]:
                recorder.sizes[name] = layer_size(p.shape[2], recorder.size)
            if probs:
                recorder.probs[name] = p if reduce is None else reduce(p)
            if outputs:
                recorder.outputs[name] = out

        return sink

    with _installed(layers, sinks={name: sink_of(name) for name in layers}):
        yield recorder


@contextmanager
def edit_attention(pipe: DiffusionPipeline, prompt: str, scales: Mapping[str, float]) -> Iterator[None]:
    """Turns words of ``prompt`` up or down in every cross-attention layer while the block lasts::

        with duge.edit_attention(pipe, prompt, {"umbrella": 0.0}):
            picture = duge.sample(pipe, prompt, seed=1)[0]

    A word's weight before the softmax's division is multiplied by its scale (0 removes the word, 1 changes
    nothing), so the shares still sum to 1. Only the conditional half of guidance is edited. It composes with
    :func:`trace`, which then shows the edited maps.

    Args:
        pipe: the pipeline that will draw, inside the block and from the same prompt.
        prompt: tells at which positions the words stand.
        scales: a factor >= 0 for a word or phrase (every occurrence), or for "<start>", "<end>", "<pad>".

    Raises WordNotInPromptError, or ValueError for a factor that is negative or leaves nothing to look at.
    """
    tokens, words, _ = read_tokens(pipe.tokenizer, prompt)
    factors = torch.ones(len(tokens))  # (T,)
    for word, scale in scales.items():
        if not 0 <= scale < math.inf:
            raise ValueError(f"scale {scale} for {word!r}: expected 0 (remove) or more; 1 changes nothing")
        factors[find_positions(prompt, tokens, words, word)] = scale
    if not factors.any():
        raise ValueError("every position has scale 0: leave at least one, such as '<start>', to look at")
    bias = factors.log()  # added before the softmax, it multiplies after the exponential

    def edit(scores: Tensor) -> Tensor:
        shift = bias.to(scores.device).expand(scores.shape[0], 1, 1, -1)  # (B, 1, 1, T)
        if pipe.do_classifier_free_guidance:
            unconditional = torch.arange(len(shift), device=shift.device) < len(shift) // 2
            shift = shift.masked_fill(unconditional[:, None, None, None], 0.0)
        return scores + shift

    with _installed(cross_attention_layers(pipe.unet), edit=edit):
        yield


# ---------------------------------------------------------------------------- words and tokens


@dataclass(frozen=True)
class Token:
    """One position of the prompt.

    Attributes:
        text: the piece of text it stands for ("back" of "backpack"); "<start>", "<end>" or "<pad>".
        word: index of the word it belongs to, None for the special positions.
        kind: "word", "start", "end" or "pad".
        span: where the piece begins and ends in the prompt (in Unicode's NFC form); None if special.
    """

    text: str
    word: int | None
    kind: str = "word"
    span: tuple[int, int] | None = None


def read_tokens(tokenizer, prompt: str) -> tuple[list[Token], list[str], str]:
    """Tokens as the pipeline sees them (padded), the words among them, and the text that was cut off.

    A word is what CLIP's tokenizer takes for one: a run of letters, one digit, or a run of anything else
    (so ``bow-tie!!`` is ``bow``, ``-``, ``tie``, ``!!``). Words keep the prompt's own spelling.
    """
    prompt = unicodedata.normalize("NFC", prompt)
    read = tokenizer(
        prompt, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False
    )
    pieces = tokenizer.convert_ids_to_tokens(read.input_ids)
    spans = [tuple(span) for span in read.offset_mapping]
    whole = set(tokenizer.get_added_vocab())  # tokens such as <|endoftext|> are words by themselves
    room = tokenizer.model_max_length - 2
    tokens: list[Token] = []
    starts: list[int] = []  # of the words, in the prompt
    ended, stop = True, 0
    for piece, (start, end) in zip(pieces[:room], spans[:room], strict=True):
        if ended and start >= stop:  # a character never belongs to two words
            starts.append(start)
        tokens.append(Token(prompt[start:end] or piece, len(starts) - 1, span=(start, end)))
        ended, stop = piece.endswith("</w>") or piece in whole, end
    words = [
        prompt[start : max(t.span[1] for t in tokens if t.word == word)] for word, start in enumerate(starts)
    ]
    cut = prompt[spans[room][0] :] if len(pieces) > room else ""
    tokens = [Token("<start>", None, "start"), *tokens, Token("<end>", None, "end")]
    tokens += [Token("<pad>", None, "pad")] * (tokenizer.model_max_length - len(tokens))
    return tokens, words, cut


def find_positions(
    prompt: str,
    tokens: Sequence[Token],
    words: Sequence[str],
    word: str,
    occurrence: int | None = None,
) -> list[int]:
    """Token positions of a word or phrase: :meth:`AttentionTrace.positions` without a trace."""
    prompt = unicodedata.normalize("NFC", prompt)
    chunks = unicodedata.normalize("NFC", word).split()
    pattern = r"\s+".join(map(re.escape, chunks)) or r"(?!)"  # nothing is found by an empty word

    def glued(left: int, right: int) -> bool:
        """Whether a cut between two neighbouring tokens would go through a word's letters."""
        a, b = tokens[left], tokens[right]
        letters = a.span and b.span and (prompt[a.span[1] - 1] + prompt[b.span[0]]).isalnum()
        return bool(letters and a.word == b.word)

    found: list[list[int]] = []
    for match in re.finditer(pattern, prompt, re.IGNORECASE):
        start, stop = match.span()
        at = [i for i, t in enumerate(tokens) if t.span and t.span[0] < stop and t.span[1] > start]
        if (
            at
            and tokens[at[0]].span[0] == start
            and max(tokens[i].span[1] for i in at) == stop
            and not glued(at[0] - 1, at[0])
            and not glued(at[-1], at[-1] + 1)
        ):
            found.append(at)
    if not found and word in ("<start>", "<end>", "<pad>"):
        found = [[i for i, t in enumerate(tokens) if t.text == word and t.kind != "word"]]
    if not found or not found[0]:
        raise WordNotInPromptError(word, words)
    if occurrence is None:
        return sorted({i for positions in found for i in positions})
    if not -len(found) <= occurrence < len(found):
        raise WordNotInPromptError(f"{word} (occurrence {occurrence}, counted from 0)", words)
    return found[occurrence]


# ---------------------------------------------------------------------------- the trace

FORMAT = "duge_lite.AttentionTrace"
VERSION = 1


@dataclass(frozen=True, eq=False, repr=False)
class AttentionTrace:
    """One picture and where each word looked while it was drawn.

    Attributes:
        image: the finished picture.
        prompt, seed, guidance_scale: how it was made.
        tokens: one Token per position.
        words: the prompt's words; ``Token.word`` counts into it.
        maps: per layer an array (steps, T, h, w), or (steps, heads, T, h, w) with ``heads=True``, float16:
            the share of attention that position (h, w) gives to each token; sums to 1 over T.
        timesteps: the scheduler's timestep of each step.
        cut: what the tokenizer's limit cut off the prompt ("" if nothing).
        previews: with ``previews=True`` the half-finished picture after each step.
    """

    image: Image.Image
    prompt: str
    seed: int
    guidance_scale: float
    tokens: tuple[Token, ...]
    words: tuple[str, ...]
    maps: Mapping[str, np.ndarray]
    timesteps: tuple[int, ...]
    cut: str = ""
    previews: tuple[Image.Image, ...] = ()

    def __repr__(self) -> str:
        return (
            f"<AttentionTrace of {self.prompt!r}: {len(self.words)} words, {len(self.timesteps)} steps, "
            f"{len(self.maps)} layers at {self.resolutions}>"
        )

    def _repr_html_(self) -> str:
        from .viewer import viewer_html  # the viewer is built on this module

        return viewer_html(self)

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.maps)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The larger sides of the layers' maps, finest first."""
        return tuple(sorted({max(v.shape[-2:]) for v in self.maps.values()}, reverse=True))

    @property
    def has_heads(self) -> bool:
        return next(iter(self.maps.values())).ndim == 5

    def layer(self, name: str) -> AttentionTrace:
        """Only the layers whose name contains ``name``: "mid", "down", "up_blocks.1", a full name."""
        found = {k: v for k, v in self.maps.items() if name in k}
        if not found:
            raise KeyError(f"no layer is called {name!r}; the layers are: {', '.join(self.layers)}")
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
        """Token positions of ``word`` (or of a phrase such as "bow tie", or "<start>", "<end>", "<pad>").

        ``occurrence`` picks the first (0), second (1) ... of a repeated word; None takes all of them.
        Raises WordNotInPromptError when the prompt does not hold it.
        """
        return find_positions(self.prompt, self.tokens, self.words, word, occurrence)

    def word(self, word: str, occurrence: int | None = None) -> np.ndarray:
        """Where ``word`` looks: the share of attention it gets, (h, w), float32.

        Sub-tokens (and the words of a phrase) are added up; then the mean is taken over heads, steps
        and layers, small layers enlarged to the largest one's size.
        """
        return self.share(self.positions(word, occurrence))

    def share(self, positions: Sequence[int]) -> np.ndarray:
        """The share of attention that the token ``positions`` get together, (h, w), mean over all else."""
        size = max((v.shape[-2:] for v in self.maps.values()), key=math.prod)
        total = np.zeros(size, dtype=np.float32)
        for maps in self.maps.values():
            one = maps[..., list(positions), :, :].astype(np.float32).sum(axis=-3)
            total += _enlarge(one.reshape(-1, *one.shape[-2:]).mean(axis=0), size)
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
        shares = self.shares()
        return {
            kind: float(sum(s for s, t in zip(shares, self.tokens, strict=True) if t.kind == kind))
            for kind in ("start", "word", "end", "pad")
        }

    def concentration(self, word: str, occurrence: int | None = None) -> np.ndarray:
        """How narrowly ``word`` looks at each step, (steps,): 0 is evenly everywhere, 1 a single place.

        One minus the entropy of the word's map over places, divided by the largest possible entropy.
        """
        positions = self.positions(word, occurrence)
        out = []
        for i in range(len(self.timesteps)):
            p = self.step(i).share(positions).astype(np.float64).ravel()
            p = p / max(p.sum(), 1e-12)
            entropy = -(p * np.log(p.clip(1e-12))).sum()
            out.append(1 - entropy / math.log(p.size) if p.size > 1 else 0.0)
        return np.array(out)

    def save(self, path: str | Path) -> None:
        """Writes everything to one safetensors file; the text lies in its header, as JSON."""
        arrays = {f"maps/{i}": np.ascontiguousarray(v) for i, v in enumerate(self.maps.values())}
        arrays["image"] = np.asarray(self.image.convert("RGB")).copy()
        if self.previews:
            arrays["previews"] = np.stack([np.asarray(p.convert("RGB")) for p in self.previews])
        text = {
            "version": VERSION,
            "layers": self.layers,
            "tokens": [asdict(token) for token in self.tokens],
            **{k: getattr(self, k) for k in ("prompt", "seed", "guidance_scale", "words")},
            **{k: getattr(self, k) for k in ("timesteps", "cut")},
        }
        save_file(arrays, path, metadata={FORMAT: json.dumps(text)})

    @classmethod
    def load(cls, path: str | Path) -> AttentionTrace:
        """Reads what :meth:`save` wrote. Raises TraceFileError for any other file; never unpickles."""
        with open(path, "rb") as file:
            head = file.read(2)
        if head[:1] == b"\x80" or head == b"PK":
            raise TraceFileError(
                f"{path} is a pickle, which could run any code when opened: "
                "only files written by AttentionTrace.save are read"
            )
        try:
            with safe_open(path, framework="numpy") as file:
                text = json.loads((file.metadata() or {}).get(FORMAT, "null"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise TraceFileError(
                f"{path} is damaged or cut short ({error}): make the trace again and save it"
            ) from error
        version = text.get("version") if isinstance(text, dict) else None
        if version != VERSION:
            what = f"a trace of version {version}" if version else "no attention trace"
            raise TraceFileError(
                f"{path} holds {what}; this duge-lite reads version {VERSION}: "
                "use the duge-lite that wrote it, or make the trace again"
            )
        try:
            tokens = [Token(**{**t, "span": t["span"] and tuple(t["span"])}) for t in text["tokens"]]
            maps = {name: arrays[f"maps/{i}"] for i, name in enumerate(text["layers"])}
            return cls(
                image=Image.fromarray(arrays["image"]),
                tokens=tuple(tokens),
                words=tuple(text["words"]),
                maps=maps,
                timesteps=tuple(text["timesteps"]),
                previews=tuple(Image.fromarray(p) for p in arrays.get("previews", ())),
                **{k: text[k] for k in ("prompt", "seed", "guidance_scale", "cut")},
            )
        except (KeyError, TypeError) as error:
            raise TraceFileError(f"{path} lacks {error}: make the trace again and save it") from error


def _enlarge(array: np.ndarray, size: Size) -> np.ndarray:
    if array.shape == tuple(size):
        return array
    grown = F.interpolate(torch.from_numpy(array)[None, None], size=tuple(size), mode="bilinear")
    return grown[0, 0].numpy()


# ---------------------------------------------------------------------------- tracing


@torch.no_grad()
def trace(
    pipe: DiffusionPipeline,
    prompt: str | Sequence[str],
    seed: int | Sequence[int] = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    heads: bool = False,
    height: int | None = None,
    width: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
    previews: bool = False,
    **options,
) -> AttentionTrace | list[AttentionTrace]:
    """Samples a picture and keeps the attention of the conditional half of guidance.

    The picture is the one that the pipeline draws without tracing. Maps are averaged over heads as they
    come and stored in 16 bits on the CPU.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or XL pipeline.
        prompt: one text; a list of texts gives a list of traces, drawn in one batch.
        seed: of the starting noise; text i of a list starts from ``seed + i``, or from its own ``seed[i]``.
        steps, guidance_scale: default to the model card's.
        heads: keep the heads apart.
        height, width: in pixels; default the size that the model was made for.
        on_step: called as ``on_step(done, steps)`` after every step.
        previews: also decode the half-finished picture after every step.
        options: passed on to the pipeline, such as ``negative_prompt``.

    Warns when the tokenizer cuts a prompt. Raises NoCrossAttentionError, or ValueError for a number of
    steps, a size or a list of seeds that does not fit.
    """
    card = model_card(pipe)
    steps = card.steps if steps is None else steps
    guidance_scale = card.guidance_scale if guidance_scale is None else guidance_scale
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    seeds = [seed + i for i in range(len(texts))] if isinstance(seed, int) else list(seed)
    if steps < 1:
        raise ValueError(f"steps = {steps}: expected at least 1")
    if not texts or len(seeds) != len(texts):
        raise ValueError(f"{len(texts)} prompts and {len(seeds)} seeds: expected one seed each, or one")
    if "num_images_per_prompt" in options:
        raise ValueError("a trace holds one picture: for more, pass a list of prompts")
    factor = pipe.vae_scale_factor
    made_for = latent_size(pipe.unet)
    pixels = (height or made_for[0] * factor, width or made_for[1] * factor)
    if pixels[0] % factor or pixels[1] % factor:
        raise ValueError(f"{pixels[0]}x{pixels[1]} pixels: expected multiples of {factor}")
    if previews and pipe.vae.dtype == torch.float16 and getattr(pipe.vae.config, "force_upcast", False):
        raise ValueError("this model's decoder overflows in float16: load it in another dtype for previews")
    read = [read_tokens(pipe.tokenizer, text) for text in texts]
    for _, _, cut in read:
        if cut:
            limit = pipe.tokenizer.model_max_length
            message = f"the prompt is longer than {limit} tokens; the model never reads: {cut!r}"
            warnings.warn(message, stacklevel=3)  # past no_grad's wrapper

    kept: dict[str, np.ndarray] = {}  # (N, steps, [heads,] T, h, w) each
    timesteps: list[int] = []
    pictures: list[list[Image.Image]] = []

    def reduce(probs: Tensor) -> Tensor:
        guided = pipe.do_classifier_free_guidance  # the pipeline's own word: [unconditional, conditional]
        conditional = probs[len(probs) // 2 :] if guided else probs  # (N, heads, H*W, T)
        return (conditional if heads else conditional.mean(dim=1)).half()

    def step_done(_, index: int, timestep: Tensor, tensors: dict) -> dict:
        total = pipe.num_timesteps
        for name, maps in recorder.probs.items():
            grid = maps.transpose(-1, -2).unflatten(-1, recorder.sizes[name]).cpu().numpy()
            if name not in kept:
                kept[name] = np.empty((len(texts), total, *grid.shape[1:]), np.float16)
            kept[name][:, index] = grid
        recorder.clear()
        timesteps.append(int(timestep))
        if previews:
            latents = tensors["latents"].to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
            pictures.append(pipe.image_processor.postprocess(pipe.vae.decode(latents).sample))
        if on_step is not None:
            on_step(index + 1, total)
        return tensors

    size = (pixels[0] // factor, pixels[1] // factor)
    with record_attention(pipe.unet, size=size, reduce=reduce) as recorder:
        images = pipe(
            prompt if isinstance(prompt, str) else texts,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(s) for s in seeds],
            height=pixels[0],
            width=pixels[1],
            callback_on_step_end=step_done,
            **options,
        ).images
    traces = [
        AttentionTrace(
            image=images[i],
            prompt=text,
            seed=seeds[i],
            guidance_scale=guidance_scale,
            tokens=tuple(tokens),
            words=tuple(words),
            maps={name: maps[i] for name, maps in kept.items()},
            timesteps=tuple(timesteps),
            cut=cut,
            previews=tuple(row[i] for row in pictures),
        )
        for i, (text, (tokens, words, cut)) in enumerate(zip(texts, read, strict=True))
    ]
    return traces[0] if isinstance(prompt, str) else traces
