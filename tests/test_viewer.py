"""The viewer's HTML, without a browser (see test_browser.py)."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bs4 import BeautifulSoup
from conftest import refused
from PIL import Image

from duge_lite.attention import AttentionTrace, Token, read_tokens
from duge_lite.viewer import Slides, compare, explorable, layer_label

# How fine the maps of each attention block are.
DOODLE_LAYERS = {f"down_blocks.{i}.attentions.0": 16 >> i for i in range(2)} | {"mid_block.attentions.0": 8}
DOODLE_LAYERS |= {f"up_blocks.{i}.attentions.{j}": 8 << i for i in range(2) for j in range(2)}
DIFFUSION_LAYERS = {f"down_blocks.{i}.attentions.{j}": 64 >> i for i in range(3) for j in range(2)}
DIFFUSION_LAYERS |= {"mid_block.attentions.0": 8}
DIFFUSION_LAYERS |= {f"up_blocks.{i}.attentions.{j}": 8 << i for i in range(1, 4) for j in range(3)}
ROOT = Path(__file__).parents[1]
NASTY = """</script><script>alert(1)</script> "quoted" '&amp;' <img src=x onerror=alert(2)> \u2028 é"""


def noise_trace(prompt, tokenizer, layers=DOODLE_LAYERS, steps=25, side=64, previews=False) -> AttentionTrace:
    """A trace of pure noise: the hardest to compress."""
    rng = np.random.default_rng(0)
    tokens, words, cut = read_tokens(tokenizer, prompt)
    maps = {}
    for name, size in layers.items():
        p = rng.random((steps, len(tokens), *np.broadcast_to(size, 2)), np.float32) ** 4
        maps[f"{name}.transformer_blocks.0.attn2"] = (p / p.sum(1, keepdims=True)).astype(np.float16)[:, None]
    image = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
    times, halfway = tuple(range(steps, 0, -1)), (image,) * steps if previews else ()
    return AttentionTrace(image, prompt, tuple(tokens), tuple(words), maps, times, cut, halfway)


def payload(page: str) -> dict:
    """What the script of a page is given."""
    (line,) = re.findall(r"DATA = (\{.*\});", page)
    return json.loads(line)


def view_of(trace: AttentionTrace) -> dict:
    return payload(trace._repr_html_())["views"][0]


def read(page: str) -> BeautifulSoup:
    """The page, whose ``text`` leaves out its script."""
    return BeautifulSoup(page, "html.parser")


@pytest.mark.parametrize(
    ("layers", "steps", "side"),
    [(DOODLE_LAYERS, 25, 64), pytest.param(DIFFUSION_LAYERS, 50, 512, marks=pytest.mark.slow)],
)
def test_a_page_is_small_fetches_nothing_and_says_what_was_left_out(tokenizer, layers, steps, side):
    prompt = "a photo of an apple next to an umbrella on a yellow background"
    t = noise_trace(prompt, tokenizer, layers, steps, side, previews=True)
    for page in (t._repr_html_(), compare(t, t)._repr_html_()):
        assert len(page) <= 2_000_000
        for tag in read(page)():
            links = (tag.get(name, "data:") for name in ("src", "href", "srcset", "data", "action"))
            assert all(link.startswith("data:") for link in links)
        assert not re.search(r"https?://|fetch\(|XMLHttpRequest|import\(|@import|url\(", page)
    data, view = payload(t._repr_html_()), view_of(t)
    assert len(view["layers"]) == len(layers) + 1 and view["steps"][-1] == view["total"] == steps
    assert any("steps are shown" in note for note in data["notes"]) == (len(view["steps"]) < steps)
    assert any("Maps finer than" in note for note in data["notes"]) == (max(layers.values()) > 16)


def test_numbers_survive_the_journey(tokenizer):
    """What the page holds is the trace, to one part in 255 of each word's largest share."""
    t = noise_trace("an apple and an apple", tokenizer, steps=3)
    view = view_of(t)
    names = [(w["text"], w["nth"]) for w in view["words"] if w["kind"] == "word"]
    assert names == [("an", 0), ("apple", 0), ("and", 0), ("an", 1), ("apple", 1)]
    for layer in view["layers"]:  # the first is the mean of all
        sheet = Image.open(io.BytesIO(base64.b64decode(layer["sprite"].split(",")[1])))
        h, w = layer["h"], layer["w"]
        pixels = np.asarray(sheet).reshape(len(view["words"]), h, 3, w).transpose(2, 0, 1, 3)
        shares = pixels / 255 * np.array(layer["scale"])[:, None, None]  # (steps, G, h, w)
        part = t.layer(layer["name"])
        for step, g in np.ndindex(3, len(names)):
            expected = part.step(step).share([i for i, token in enumerate(t.tokens) if token.word == g])
            np.testing.assert_allclose(shares[step, g], expected, atol=layer["scale"][g] / 254)
        np.testing.assert_allclose(shares.sum(axis=1), 1, atol=0.02)


def test_text_is_escaped(tokenizer):
    tokens = (Token("<start>", None, "start"), Token(NASTY, 0))
    t = noise_trace("a", tokenizer, steps=2)
    t = replace(t, prompt=NASTY, words=(NASTY,), tokens=(*tokens, *t.tokens[2:]), cut=NASTY)
    for page in (t._repr_html_(), compare(t, t, labels=(NASTY, "<b>"))._repr_html_()):
        soup, told = read(page), f"picture drawn from: {NASTY}"
        (script,) = soup("script")
        assert all(image["src"].startswith("data:image/") for image in soup("img"))
        assert [image["alt"] for image in soup("img")] in ([told], [f"{NASTY} {told}", f"<b> {told}"])
        assert NASTY in soup.text, "what remains without scripts"
        assert payload(page)["views"][0]["words"][0]["text"] == NASTY and "\u2028" not in script.string


def test_the_same_trace_gives_the_same_page(tokenizer):
    """Committed notebooks do not change when nothing did; different traces get different names."""
    a, b = (noise_trace(p, tokenizer, steps=2)._repr_html_ for p in ("an apple", "an orange"))
    assert a() == a() and read(a()).div["data-duge"] != read(b()).div["data-duge"]


@pytest.mark.parametrize("prompt", ["", "apple " * 40])
def test_odd_prompts(tokenizer, prompt):
    view = view_of(noise_trace(prompt, tokenizer, steps=1))
    assert 0 <= view["start"] < len(view["words"])
    assert [w["kind"] for w in view["words"]][-2:] in (["end", "pad"], ["start", "end"])


def test_layers_of_one_block_and_heads_are_averaged(tokenizer):
    t = noise_trace("an apple", tokenizer, {"mid_block.attentions.0": (4, 8)}, steps=2)
    ((name, maps),) = t.maps.items()
    flat = view_of(t)["layers"]
    assert view_of(replace(t, maps={name: np.concatenate([maps, maps], axis=1)}))["layers"] == flat
    assert (flat[1]["label"], flat[1]["h"], flat[1]["w"]) == ("mid (4×8)", 4, 8)
    more = replace(t, maps={name: maps, name.replace("blocks.0", "blocks.1"): 0 * maps})
    (_, layer) = view_of(more)["layers"]
    assert layer["scale"] == pytest.approx([s / 2 for s in flat[1]["scale"]], rel=1e-3)
    assert layer_label("down_blocks.0.attentions.1.transformer_blocks.0.attn2") == "down 0.1"
    assert layer_label("mid_block.attentions.0.transformer_blocks.9.attn2") == "mid"


def test_slides_travel_with_all_states():
    """Without scripts the first remains, with its label; text is escaped; equal pictures travel once."""
    page = Slides([b"one", b"two", b"one"], [NASTY, "second", "third"], "A <b>title</b>").data
    data, soup = payload(page), read(page)
    assert soup.img["alt"] == NASTY and base64.b64decode(soup.img["src"].split(",")[1]) == b"one"
    assert "A <b>title</b>" in soup.text and len(soup("img")) == len(soup("script")) == 1
    assert [row[0][1][0][1] for row in data["frames"]] == [0, 1, 0] and len(data["pictures"]) == 2
    assert data["controls"] == [{"name": "A <b>title</b>", "words": False, "start": 0, "values": [""] * 3}]


def test_slides_have_a_state_for_each_choice():
    rows = [{"head": [(f"picture {i}", b"RIFF" + bytes([i]), i / 6)]} for i in range(6)]
    controls = {"method": ("a", "b"), "weight": (0.1, 1.0, 1e4)}
    page = Slides(rows, [f"state {i}" for i in range(6)], "Title", controls, start=4).data
    data, soup = payload(page), read(page)
    told = [(c["words"], c["start"], c["values"]) for c in data["controls"]]
    assert told == [(True, 1, ["a", "b"]), (False, 1, ["0.1", "1", "10000"])]
    assert data["frames"][4] == [["head", [["picture 4", 4, 4 / 6]]]] and "state 4" in soup.text
    assert [image["alt"] for image in soup("img")] == ["head: picture 4"]
    assert data["pictures"][0].startswith("data:image/webp")
    refused(ValueError, "6 pictures, 5 labels", Slides, rows, ["x"] * 5, "Title", controls)


def test_an_explorable_can_be_shown():
    refused(ValueError, "expected one of .*prior", explorable, "nothing")
    script = (ROOT / "duge_lite/slides.js").read_text("utf-8")  # all hold the one of today
    for page in (explorable(path.stem).data for path in ROOT.glob("docs/explorables/*.html")):
        assert page.startswith("<div data-duge-slides=") and script in page
