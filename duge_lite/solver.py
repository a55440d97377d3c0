r"""Forgetting, solved: with the attention maps kept, the three losses are a linear system (ours).

A cross-attention layer writes, at a place p of the picture, ``o_p = O f_p + b``. Here f_p is what its heads
say (C numbers): ``V_h z_p`` of each head, and z_p is the text as that head hears it, the token vectors
averaged with its attention. As long as only the output matrix O learns, the three losses are sums of squares
of one unknown,

.. math:: \lambda_U E|O f - O_0 f^*|^2 + \lambda_{pr} E|O f - O_0 f|^2 + \lambda_R |O - O_0|^2

over places of pictures of what goes (f* is what the heads would say if they were asked for something else)
and of what stays. The minimum is one C x C solve per layer::

    O = O0 (X + r) (S + r)^-1,   S = mean f f^T,   X = mean f* f^T,   f* = f for what stays

The means of several requests add up, so that their order cannot matter. The layer is linear in its values V
as well, with z in the place of f, a D x D solve per head: ``solve="values"``. That forgets too, but a learned
word finds its way around it; every word has to pass through O.

The hidden states behind f are taken while the reference draws: :class:`PictureBook` keeps them. What is to
stay and what may go later are the same pictures; a request only changes what is wanted of some of them.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .attention import attention_maps, cross_attention_layers
from .concepts import Concept, ModelCard, UnlearnConfig, wishes
from .errors import DivergedError
from .losses import attention_target
from .models import (
    Pictures,
    copied,
    draw_pictures,
    encode_prompts,
    from_main,
    gathered,
    share,
    swapped,
    with_bar,
    written,
)


def fingerprints(pipe: DiffusionPipeline) -> tuple[str, str, str]:
    """Tell one model's weights from another's: as they are, and as they will be in either kind of 16 bits.

    Each is a digest of up to 256 numbers of every tensor that text goes through.
    """
    digests = hashlib.sha1(), hashlib.sha1(), hashlib.sha1()
    for part in ("unet", "text_encoder", "text_encoder_2"):
        if (module := getattr(pipe, part, None)) is None:
            continue
        for name, p in module.named_parameters():
            some = p.detach().flatten()[:: max(1, p.numel() // 256)].cpu()
            for digest, dtype in zip(digests, (p.dtype, torch.float16, torch.bfloat16), strict=True):
                digest.update(f"{part}.{name} {tuple(p.shape)}".encode())
                digest.update(some.to(dtype).float().numpy().tobytes())
    return tuple(digest.hexdigest() for digest in digests)


def cross_attention_weights(unet: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The weights of all cross-attention layers, by name."""
    return {name: p for name, p in unet.named_parameters() if ".attn2." in name}


def heard(attn: Attention, hidden: Tensor, text: Tensor, solve: str) -> Tensor:
    """What the solved matrix reads at ``hidden`` (P, R, C) of ``text`` (P, T, D).

    For the output matrix what the heads say, (P, 1, R, C); for the values the text as each head hears it,
    (P, heads, R, D).
    """
    own = attn.to_q.weight
    maps = attention_maps(attn, hidden.to(own), text.to(own))  # (P, heads, R, T)
    if solve == "values":
        return maps @ text[:, None].float()
    values = (text.float() @ attn.to_v.weight.float().mT).unflatten(-1, (attn.heads, -1))  # first: few
    return (maps @ values.transpose(1, 2)).transpose(1, 2).flatten(2)[:, None]


def solved_matrix(attn: Attention, solve: str) -> Tensor:
    """The matrix that is solved for: (heads, C / heads, D) of the values, (1, C, C) of the output."""
    if solve == "values":
        return attn.to_v.weight.unflatten(0, (attn.heads, -1))
    return attn.to_out[0].weight[None]


def _exact(x: Tensor) -> Tensor:
    """As many bits as the device has: 64, or 32 on MPS."""
    return x.float() if x.device.type == "mps" else x.double()


class Sums:
    """Means over places and prompts, (heads, F, F): ``heard`` f f^T, ``wanted`` f* f^T, ``size`` f* f*^T."""

    def __init__(self, said: Tensor, instead: Tensor | None = None) -> None:
        """``said`` (P, heads, R, F) is f; ``instead`` (P, heads, R, F) is f*, None for what is to stay."""
        f = _exact(said).transpose(0, 1).flatten(1, 2)  # (heads, P * R, F)
        self.heard = self.wanted = self.size = f.mT @ f / f.shape[1]
        if instead is not None:
            g = _exact(instead).transpose(0, 1).flatten(1, 2)
            self.wanted, self.size = g.mT @ f / f.shape[1], g.mT @ g / f.shape[1]

    def loss(self, matrix: Tensor, reference: Tensor) -> float:
        """Mean ``|W f - W0 f*|^2`` over places and channels; both (heads, channels, F)."""
        own = torch.einsum("hcd,hde,hce->", matrix, self.heard, matrix)
        both = torch.einsum("hcd,hde,hce->", reference, self.wanted, matrix)
        wanted = torch.einsum("hcd,hde,hce->", reference, self.size, reference)
        return max(0.0, float(own - 2 * both + wanted)) / matrix.shape[:2].numel()


def solve_matrix(reference: Tensor, heard: Tensor, wanted: Tensor, ridge: float | Tensor) -> Tensor:
    """W = W0 (X + r I) (S + r I)^-1; S ``heard``, X ``wanted``: (heads, F, F); W0: (heads, channels, F).

    Where S has no inverse (no ridge, little heard) the least change that fits is taken.
    """
    eye = torch.eye(heard.shape[-1], dtype=heard.dtype, device=heard.device)
    left = heard + ridge * eye
    change = reference @ (wanted - heard)  # of W, times S + r
    solved, info = torch.linalg.solve_ex(left, change, left=False)
    # without a ridge the elimination can pass over a pivot that is rounding alone
    if info.any() or not torch.as_tensor(ridge).all():
        solved = change @ torch.linalg.pinv(left, hermitian=True)
    return reference + solved


class PictureBook:
    """What the cross-attention layers saw while the reference drew, prompt by prompt.

    Attributes:
        memory: prompts of what is to stay, until it goes.
        seen: for each prompt that was drawn, by layer: hidden states (R, C) in 16 bits, from ``places``
            places at each of ``steps`` moments, of both halves of guidance.
        reference: the cross-attention weights of the base model, by name, in main memory.
        base: the base model's fingerprint.
        gone_at: what is gone, by the fingerprints of all weights that the book knows.
    """

    def __init__(
        self, pipe: DiffusionPipeline, card: ModelCard, config: UnlearnConfig,
        memory: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        self.card, self.settings = card, _settings(card, config, memory)
        _, self.memory, self.steps, self.places, self.seed = self.settings
        self.layers = cross_attention_layers(pipe.unet)
        self.reference = copied(cross_attention_weights(pipe.unet))
        self.gone_at: dict[str, tuple[Concept, ...]] = dict.fromkeys(fingerprints(pipe), ())
        self.base = next(iter(self.gone_at))
        self.seen: dict[str, dict[str, Tensor]] = {}
        self._rankings: dict[Concept, pd.Series] = {}
        self._latents: dict[str, Tensor] = {}
        self._on_disk: tuple[Path, int] | None = None  # how many prompts of it

    @classmethod
    def of(
        cls, pipe: DiffusionPipeline, card: ModelCard, config: UnlearnConfig,
        memory: Sequence[str] | None = None, directory: str | Path | None = None,
    ) -> tuple[PictureBook, tuple[Concept, ...]]:  # fmt: skip
        """The book of ``pipe``, and what is gone: the one that knows its weights, or a new one.

        A new one takes what it finds in ``directory``, if it was drawn by this model with these settings.
        """
        old = cls.known(pipe)
        gone = old.gone(pipe) if old else ()
        if old and (old.settings, old.card) == (_settings(card, config, memory), card):
            return old, gone
        with old.at_base(pipe) if old else nullcontext():
            new = cls(pipe, card, config, memory)
        new.gone_at |= old.gone_at if old else {}
        if directory is not None:
            new._read(Path(directory) / BOOK)
        _BOOKS[pipe.unet] = new
        return new, gone

    @staticmethod
    def known(pipe: DiffusionPipeline) -> PictureBook | None:
        """The book of ``pipe``, if its weights are ones that the book knows."""
        book = _BOOKS.get(pipe.unet)
        return book if book is not None and fingerprints(pipe)[0] in book.gone_at else None

    def gone(self, pipe: DiffusionPipeline) -> tuple[Concept, ...]:
        """What the pipeline has forgotten by now, by the weights that it has."""
        return self.gone_at[fingerprints(pipe)[0]]

    def remember(self, pipe: DiffusionPipeline, gone: Sequence[Concept]) -> None:
        """That with the weights of now ``gone`` is gone; from known weights nothing went."""
        for now in fingerprints(pipe):
            self.gone_at.setdefault(now, tuple(gone))

    def at_base(self, pipe: DiffusionPipeline) -> AbstractContextManager[None]:
        """The pipeline as it was before anything went."""
        return swapped(cross_attention_weights(pipe.unet), self.reference)

    def pictures(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Pictures:
        """What the reference draws for ``prompts``; each is drawn once."""
        if missing := [p for p in dict.fromkeys(prompts) if p not in self._latents]:
            with self.at_base(pipe):
                drawn = draw_pictures(pipe, missing, self._seeds(missing), self.card)
            self._latents |= dict(zip(missing, drawn.latents, strict=True))
        latents = torch.stack([self._latents[p] for p in prompts])
        return Pictures(latents, encode_prompts(pipe, prompts), tuple(prompts))

    @torch.no_grad()
    def draw(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> None:
        """Lets the reference draw what the book does not hold yet; several processes share it."""
        if not (missing := [p for p in dict.fromkeys(prompts) if p not in self.seen]):
            return
        mine, found, size = share(missing), [], self.card.batch_size
        with self.at_base(pipe):
            for i in with_bar(range(0, len(mine), size), "drawing"):
                found += self._draw(pipe, mine[i : i + size])
        self.seen |= dict(gathered(found))

    def _draw(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[tuple[str, dict[str, Tensor]]]:
        rows: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        pick = torch.Generator().manual_seed(self.seed)  # the same places for every prompt

        def look(name: str, attn: Attention, args: tuple, kwargs: dict) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]  # (2 B or B, H*W, C)
            places = torch.randperm(hidden.shape[1], generator=pick)[: self.places]
            halves = hidden[:, places.to(hidden.device)].half().cpu().unflatten(0, (-1, len(prompts)))
            rows[name].append(halves.transpose(0, 1).flatten(1, 2))  # (B, halves * places, C)

        with ExitStack() as hooks:
            for name, attn in self.layers.items():
                hooks.enter_context(attn.register_forward_pre_hook(partial(look, name), with_kwargs=True))
            pipe(
                list(prompts),
                num_inference_steps=self.steps,
                guidance_scale=self.card.guidance_scale,
                generator=[torch.Generator().manual_seed(s) for s in self._seeds(prompts)],
                output_type="latent",
            )
        with torch.autocast("cpu", enabled=False):  # a caller's, in another kind of 16 bits
            drawn = {name: torch.cat(parts, dim=1) for name, parts in rows.items()}  # (B, R, C)
        return [(p, {n: x[i].clone() for n, x in drawn.items()}) for i, p in enumerate(prompts)]

    def _seeds(self, prompts: Sequence[str]) -> list[int]:
        """Of the prompt, not of the request: what is drawn does not depend on what else is."""
        return [zlib.crc32(f"{self.seed} {p}".encode()) for p in prompts]

    def _rows(self, layer: str, prompts: Sequence[str]) -> Tensor:
        """(P, R, C), on the layer's device."""
        rows = torch.stack([self.seen[p][layer] for p in prompts])
        return rows.to(self.layers[layer].to_v.weight)

    @torch.no_grad()
    def ranking(self, pipe: DiffusionPipeline, concept: Concept) -> pd.Series:
        """How far each of the card's concepts is from ``concept``: the nearest first.

        The squared distance of what the heads say at the concept's pictures when they are asked for the other
        one, as a share of what they say; mean over layers (ours, after LACU, arXiv 2512.02657, which compares
        predictions of noise).
        """
        if concept in self._rankings:
            return self._rankings[concept]
        self.draw(pipe, concept.prompts)
        device, others = pipe.unet.device, [c for c in self.card.concepts if c != concept.name]
        own = encode_prompts(pipe, concept.prompts).to(device)
        texts = {o: encode_prompts(pipe, concept.pair(self.card.prompts(o))).to(device) for o in others}
        far = dict.fromkeys(others, 0.0)
        with self.at_base(pipe), torch.autocast(device.type, enabled=False):
            for name, attn in self.layers.items():
                hidden = self._rows(name, concept.prompts)
                said = heard(attn, hidden, own, "output")
                for other, text in texts.items():
                    off = heard(attn, hidden, text, "output") - said
                    far[other] += float(off.square().sum() / said.square().sum()) / len(self.layers)
        self._rankings[concept] = pd.Series(far, dtype=float).sort_values(kind="stable")
        return self._rankings[concept]

    def wishes(self, pipe: DiffusionPipeline, gone: Sequence[Concept]) -> tuple[dict[str, str], list[str]]:
        """What is wanted of every prompt that asks for something ``gone``; and the prompts that are to stay.

        Raises ValueError when nothing is left to draw instead, or to remember.
        """
        names = {c.name for c in gone}

        def nearest(concept: Concept) -> Sequence[str]:
            kept = [c for c in self.ranking(pipe, concept).index if c not in names]
            if not kept:
                raise ValueError('every concept is to go: say what is asked instead, or instead="nameless"')
            return concept.pair(self.card.prompts(kept[0]))

        ends = wishes(gone, lambda concept: concept.instead or nearest(concept))
        keep = [p for p in self.memory if p not in ends and not any(c.named_in(p) for c in gone)]
        if not keep:
            raise ValueError("every picture of the memory shows what is to go: nothing is left to stay")
        return ends, keep

    @torch.no_grad()
    def solve(
        self, pipe: DiffusionPipeline, gone: Sequence[Concept], config: UnlearnConfig
    ) -> tuple[dict[str, Tensor], pd.DataFrame]:
        """The minimum of the three losses: the new cross-attention weights by name, and each layer's losses.

        Every prompt counts the same: the loss of what goes is weighed with its share of the prompts, that of
        what stays with its own. With ``lambda_silence`` the layer is to take the same step at the same places
        under the empty prompt. The last column, ``change``, is the norm of the change as a share of the
        matrix's own. Raises DivergedError for hidden states that are not finite.
        """
        ends, keep = self.wishes(pipe, gone)
        self.draw(pipe, [*ends, *keep])
        lambda_attention, lambda_prior, ridge = config.weights
        lambda_attention *= len(ends) / (len(ends) + len(keep))
        lambda_prior *= len(keep) / (len(ends) + len(keep))
        prompts = list(ends), list(ends.values()), keep, [""]
        asked, instead, stay, empty = (encode_prompts(pipe, part).to(pipe.unet.device) for part in prompts)
        weights, rows = dict(self.reference), {}
        matrix = "to_v" if config.solve == "values" else "to_out.0"
        with self.at_base(pipe), torch.autocast(pipe.unet.device.type, enabled=False):
            for name, attn in self.layers.items():
                old, hidden = _exact(solved_matrix(attn, config.solve)), self._rows(name, list(ends))
                own, other = (heard(attn, hidden, text, config.solve) for text in (asked, instead))
                went = Sums(own, attention_target(own, other, config.eta))
                kept = Sums(heard(attn, self._rows(name, keep), stay, config.solve))
                read = lambda_prior * kept.heard + lambda_attention * went.heard
                wanted = lambda_prior * kept.heard + lambda_attention * went.wanted
                if silence := lambda_attention * config.lambda_silence:
                    untold = heard(attn, hidden, empty, config.solve)
                    alike = Sums(untold, untold + other - own)
                    read, wanted = read + silence * alike.heard, wanted + silence * alike.wanted
                if not torch.isfinite(read + wanted).all():
                    raise DivergedError(f"what {name} hears is not finite; the weights are as they were")
                size = read.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]  # of what is read
                new = solve_matrix(old, read, wanted, ridge * size)
                weights[f"{name}.{matrix}.weight"] = new.flatten(0, 1).cpu()  # 64 bits: not on the device
                rows[name] = {
                    "attention before": went.loss(old, old),
                    "attention after": went.loss(new, old),
                    "prior before": kept.loss(old, old),
                    "prior after": kept.loss(new, old),
                    "regularization before": 0.0,
                    "regularization after": float((new - old).square().mean()),
                    "change": float((new - old).norm() / old.norm()),
                }
        return weights, pd.DataFrame(rows).T.rename_axis("layer")

    def write(self, directory: str | Path) -> None:
        """Keeps the hidden states on disk; the main process writes. Raises OSError when the disk is full."""
        from_main(lambda: self._write(Path(directory) / BOOK))

    def _write(self, path: Path) -> None:
        if self._on_disk == (path, len(self.seen)):
            return
        tensors = {f"{i} {n}": x for i, rows in enumerate(self.seen.values()) for n, x in rows.items()}
        prompts = json.dumps(list(self.seen))
        with written(path) as draft:
            about = {"prompts": prompts, "digest": self._digest(prompts, tensors)}
            save_file(tensors, draft, metadata=about)
        self._on_disk = path, len(self.seen)

    def _read(self, path: Path) -> None:
        """Takes what is on disk, if it was drawn by this model with these settings, and is whole."""
        try:
            with safe_open(path, "pt") as file:
                about, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if about["digest"] != self._digest(about["prompts"], tensors):
                return
        except Exception:  # none, or damaged, of which safetensors has kinds of its own: it is only a cache
            return
        for i, prompt in enumerate(json.loads(about["prompts"])):
            self.seen[prompt] = {name: tensors[f"{i} {name}"] for name in self.layers}
        self._on_disk = path, len(self.seen)

    def _digest(self, prompts: str, tensors: Mapping[str, Tensor]) -> str:
        """Of the model, the settings and every bit of what was seen."""
        digest = hashlib.sha1(f"{self.base} {self.settings} {prompts}".encode())
        for name in sorted(tensors):
            digest.update(tensors[name].contiguous().numpy())
        return digest.hexdigest()


def _settings(card: ModelCard, config: UnlearnConfig, memory: Sequence[str] | None) -> tuple:
    """What makes one book differ from another of the same model. ValueError for an unfit ``memory``."""
    prompts = tuple(card.memory_prompts(config.memory_size, config.seed) if memory is None else memory)
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"memory = {memory!r}: expected prompts of what is to stay, at least one")
    about_card = (card.name, card.guidance_scale)
    return about_card, prompts, config.num_inference_steps, config.places, config.seed


BOOK = "book.safetensors"
_BOOKS: WeakKeyDictionary[torch.nn.Module, PictureBook] = WeakKeyDictionary()
"""One book per denoiser, for as long as it lives."""
