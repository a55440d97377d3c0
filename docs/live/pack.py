"""What the page "Draw in this page" (docs/live.md) loads, made from data/ when the book is built.

    python docs/live/pack.py FOLDER

``model.js`` holds the pipeline's weights (text encoder, denoiser, the decoder's half of the autoencoder: the
16 bits of data/) and its tokenizer; ``book.js`` the picture book, which is all that forgetting needs: what
each cross-attention layer saw while the base model drew every prompt of the memory, at fewer places than the
library looks at (`PLACES`), in 8 bits. A page that was opened from a folder may not fetch files, but may
load scripts; so each is a script that holds base64.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from continual import TWELVE  # noqa: E402

MODEL = ROOT / "data" / "doodle-sd"
PLACES = 8
"""Per layer and moment; the library's default is 32. With 5 moments, each in two halves, 80 a prompt."""


def parts():
    """(prefix of the names, file, which of its weights)."""
    yield "text.", MODEL / "text_encoder" / "model.safetensors", ("",)
    yield "unet.", MODEL / "unet" / "diffusion_pytorch_model.safetensors", ("",)
    yield "vae.", MODEL / "vae" / "diffusion_pytorch_model.safetensors", ("decoder.", "post_quant_conv.")


def weights() -> dict:
    """All weights that drawing needs, in 16 bits; Python computes with the same numbers."""
    from safetensors.torch import load_file

    return {
        prefix + name: value.half()
        for prefix, path, kept in parts()
        for name, value in load_file(path).items()
        if name.startswith(kept)
    }


def words() -> list[str]:
    """All that stood in a caption of the training: other words mean nothing to the model."""
    from duge_lite.doodles import captions
    from duge_lite.doodles.draw import BACKGROUNDS

    texts = [t for templates in captions.TEMPLATES.values() for t in templates]
    texts += [*captions.SYNONYMS, *captions.SYNONYMS.values(), *captions._PAIR, *captions._GROUND, "a an"]
    return sorted(set(re.findall(r"[a-z]+", " ".join([*texts, *BACKGROUNDS]))))


def tokenizer() -> dict:
    model = json.loads((MODEL / "tokenizer" / "tokenizer.json").read_text("utf-8"))["model"]
    return {"vocab": model["vocab"], "merges": model["merges"], "words": words()}


def picture_book() -> tuple[dict, dict]:
    """What forgetting has to know, and the hidden states: per layer (prompts, channels, rows) in 8 bits."""
    import torch

    import duge_lite as duge
    from duge_lite.solver import PictureBook

    pipe = duge.load_pipeline(device="cpu")
    card, config = duge.model_card(pipe), duge.UnlearnConfig(places=PLACES)
    book = PictureBook(pipe, card, config)
    book.draw(pipe, book.memory)
    seen = {}
    for layer in book.layers:
        states = torch.stack([book.seen[prompt][layer] for prompt in book.memory]).float().mT
        scale = states.abs().amax((0, 2)) / 127
        seen[layer] = (states / scale[None, :, None]).round().to(torch.int8).contiguous()
        seen[f"{layer} scale"] = scale
    concepts = {}
    for name in card.forgettable:
        concept = card.concept(name)
        concepts[name] = {
            "asks": concept.prompts,
            "instead": concept.instead or None,
            "nearest": list(() if concept.instead else book.ranking(pipe, concept).index),
            "named": [prompt for prompt in book.memory if concept.named_in(prompt)],
        }
    about = {
        "prompts": book.memory,
        "layers": list(book.layers),
        "concepts": concepts,
        "eta": config.eta,
        "ridge": config.weights[2],
    }
    return about, seen


EXAMPLES = (
    "a photo of an apple",
    "a neon sign of an apple",
    "an apple next to an umbrella",
    "a watercolor painting of a mushroom",
)
SETS = {
    "nothing": (),
    "the apple": ("apple",),
    "the twelve of the benchmark": TWELVE,
}


def fill(page: str) -> str:
    """The source of the page with its buttons, boxes and words."""
    from duge_lite.concepts import ModelCard

    card = ModelCard.read("doodle", "doodle-20.csv")
    box = '<label><input type="checkbox" name="gone" value="{0}">{0}</label>'
    parts = {
        "examples": [f'<button type="button" data-prompt="{text}">{text}</button>' for text in EXAMPLES],
        "sets": [
            f'<button type="button" data-set="{",".join(names)}">{title}</button>'
            for title, names in SETS.items()
        ],
        "concepts": [box.format(name) for name in card.forgettable],
        "words": [", ".join(words())],
    }
    for name, tags in parts.items():
        page = page.replace(f"<!-- {name} -->", "\n".join(tags))
    return page


def script(name: str, about: dict, tensors: dict) -> str:
    from safetensors.torch import save

    data = base64.b64encode(save(tensors)).decode()
    return f"window.dugeLive = window.dugeLive || {{}};\nwindow.dugeLive.{name} = {json.dumps(about)};\n" + (
        f'window.dugeLive.{name}.data = "{data}";\n'
    )


def digest() -> str:
    """Of all that the two files depend on."""
    sources = [path for _, path, _ in parts()] + [Path(__file__), MODEL / "tokenizer" / "tokenizer.json"]
    rooms = ("attention", "concepts", "models", "solver")
    sources += [ROOT / "duge_lite" / f"{name}.py" for name in rooms]
    sources += sorted((ROOT / "duge_lite" / "doodles").glob("*.py"))
    return hashlib.sha1(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def write(folder: Path) -> None:
    """The page's scripts into ``folder``; what was made before from the same sources lies in build/live/."""
    kept = ROOT / "build" / "live" / digest()
    if not kept.is_dir():
        draft = kept.with_suffix(".part")
        shutil.rmtree(kept.parent, ignore_errors=True)  # of other sources
        draft.mkdir(parents=True)
        (draft / "model.js").write_text(script("model", tokenizer(), weights()), "utf-8")
        (draft / "book.js").write_text(script("book", *picture_book()), "utf-8")
        draft.rename(kept)
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*kept.iterdir(), *HERE.glob("*.js"), *HERE.glob("*.css")):
        shutil.copy(path, folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
