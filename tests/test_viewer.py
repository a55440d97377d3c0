"""The viewer's HTML, the figures and the explorer's logic, without a browser (see test_browser.py)."""

import base64
import html.parser
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from duge_lite.attention import AttentionTrace, Token, read_tokens, trace
from duge_lite.explorer import attention_explorer, draw_attention
from duge_lite.viewer import compare, layer_label
from duge_lite.visualize_attention import (
    attention_difference,
    concentration,
    denoising,
    heads,
    token_shares,
    word_overlay,
    words_by_layer,
    words_by_step,
)

DOODLE_LAYERS = {
    "down_blocks.0.attentions.0": 16,
    "down_blocks.1.attentions.0": 8,
    "mid_block.attentions.0": 8,
    "up_blocks.0.attentions.0": 8,
    "up_blocks.0.attentions.1": 8,
    "up_blocks.1.attentions.0": 16,
    "up_blocks.1.attentions.1": 16,
}


def noise_trace(prompt, tokenizer, layers=None, steps=25, side=64, previews=False) -> AttentionTrace:
    """A trace of pure noise: the hardest to compress."""
    rng = np.random.default_rng(0)
    tokens, words, cut = read_tokens(tokenizer, prompt)
    maps = {}
    for name, size in (layers or DOODLE_LAYERS).items():
        h, w = (size, size) if isinstance(size, int) else size
        p = rng.random((steps, len(tokens), h, w), np.float32) ** 4
        maps[f"{name}.transformer_blocks.0.attn2"] = (p / p.sum(1, keepdims=True)).astype(np.float16)
    image = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
    return AttentionTrace(
        image, prompt, 0, 4.0, tuple(tokens), tuple(words), maps, tuple(range(steps, 0, -1)), cut,
        (image,) * steps if previews else (),
    )  # fmt: skip


class Reader(html.parser.HTMLParser):
    """Tags with attributes, and the text outside scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.scripts = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)
        else:
            self.text += data


def payload(page: str) -> dict:
    (line,) = re.findall(r"DATA = (\{.*\});", page)
    return json.loads(line)


def test_size_of_a_doodle_trace(tokenizer):
    prompt = "a photo of an apple next to an umbrella on a yellow background"
    one = noise_trace(prompt, tokenizer, previews=True)
    assert len(one._repr_html_()) <= 2_000_000
    assert len(compare(one, one)._repr_html_()) <= 2_000_000
    data = payload(one._repr_html_())
    assert len(data["views"][0]["steps"]) == 25 and data["notes"] == [], "nothing was left out"


@pytest.mark.slow
def test_size_of_a_stable_diffusion_trace_and_what_was_left_out(tokenizer):
    layers = {f"down_blocks.{i}.attentions.{j}": 64 >> i for i in range(3) for j in range(2)}
    layers |= {"mid_block.attentions.0": 8}
    layers |= {f"up_blocks.{i}.attentions.{j}": 8 << i for i in range(1, 4) for j in range(3)}
    page = noise_trace("a photo of an apple", tokenizer, layers, steps=50, side=512)._repr_html_()
    assert len(page) <= 2_000_000
    data = payload(page)
    view = data["views"][0]
    assert len(view["layers"]) == 17 and view["steps"][-1]["index"] == 50 and view["total"] == 50
    assert any("steps are shown" in note for note in data["notes"]) == (len(view["steps"]) < 50)
    assert any("Maps finer than" in note for note in data["notes"])


def test_numbers_survive_the_journey(tokenizer):
    """What the page holds is the trace, to one part in 255 of each word's largest share."""
    t = noise_trace("an apple and an apple", tokenizer, steps=3)
    view = payload(t._repr_html_())["views"][0]
    names = [(w["text"], w["nth"]) for w in view["words"] if w["kind"] == "word"]
    assert names == [("an", 0), ("apple", 0), ("and", 0), ("an", 1), ("apple", 1)]
    for layer in view["layers"]:  # the first is the mean of all
        sheet = Image.open(io.BytesIO(base64.b64decode(layer["sprite"].split(",")[1])))
        h, w = layer["h"], layer["w"]
        pixels = np.asarray(sheet).reshape(len(view["words"]), h, 3, w).transpose(2, 0, 1, 3)
        shares = pixels / 255 * np.array(layer["scale"])[:, None, None]  # (steps, G, h, w)
        part = t.layer(layer["name"])
        for g, (text, nth) in enumerate(names):
            for step in range(3):
                expected = part.step(step).word(text, nth)
                np.testing.assert_allclose(shares[step, g], expected, atol=layer["scale"][g] / 254)
        np.testing.assert_allclose(shares.sum(axis=1), 1, atol=0.02)


def test_nothing_is_fetched(tokenizer):
    page = noise_trace("a photo of an apple", tokenizer, steps=2)._repr_html_()
    reader = Reader(page)
    for _, attributes in reader.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:")
    without_svg = page.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.search(r"https?://|fetch\(|XMLHttpRequest|import\(|@import|url\(", without_svg)


NASTY = """</script><script>alert(1)</script> "quoted" '&amp;' <img src=x onerror=alert(2)> \u2028 é"""


def test_text_is_escaped(tokenizer):
    tokens = (Token("<start>", None, "start"), Token(NASTY, 0, span=(0, len(NASTY))))
    t = noise_trace("a", tokenizer, steps=2)
    t = replace(t, prompt=NASTY, words=(NASTY,), tokens=(*tokens, *t.tokens[2:]), cut=NASTY)
    for page in (t._repr_html_(), compare(t, t, labels=(NASTY, "<b>"))._repr_html_()):
        reader = Reader(page)
        assert len(reader.scripts) == 1 and [tag for tag, _ in reader.tags].count("script") == 1
        images = [attributes for tag, attributes in reader.tags if tag == "img"]
        assert all(a["src"].startswith("data:image/") and NASTY in a["alt"] for a in images)
        assert NASTY in reader.text
        assert payload(page)["views"][0]["words"][0]["text"] == NASTY
        assert "\u2028" not in reader.scripts[0]


def test_without_scripts_the_picture_remains(tokenizer):
    reader = Reader(noise_trace("a red apple", tokenizer, steps=2)._repr_html_())
    (image,) = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert image["alt"] == "picture drawn from: a red apple"
    assert "a red apple" in reader.text


def test_the_same_trace_gives_the_same_page(tokenizer):
    """Committed notebooks do not change when nothing did; different traces get different names."""
    a, b = (noise_trace(p, tokenizer, steps=2) for p in ("an apple", "an orange"))
    name = re.compile(r'data-duge="(\w+)"')
    assert a._repr_html_() == a._repr_html_()
    assert name.findall(a._repr_html_())[0] != name.findall(b._repr_html_())[0]


@pytest.mark.parametrize("prompt", ["", "apple " * 40])
def test_odd_prompts(tokenizer, prompt):
    view = payload(noise_trace(prompt, tokenizer, steps=1)._repr_html_())["views"][0]
    assert 0 <= view["start"] < len(view["words"])
    assert [w["kind"] for w in view["words"]][-2:] in (["end", "pad"], ["start", "end"])


def test_heads_and_other_shapes(tokenizer):
    flat = noise_trace("an apple", tokenizer, {"mid_block.attentions.0": (4, 8)}, steps=2)
    heads = replace(flat, maps={k: np.stack([v, v], axis=1) for k, v in flat.maps.items()})
    a, b = (payload(t._repr_html_())["views"][0]["layers"] for t in (flat, heads))
    assert a == b and (a[1]["h"], a[1]["w"]) == (4, 8)


def test_layers_of_one_block_are_averaged(tokenizer):
    t = noise_trace("an apple", tokenizer, {"mid_block.attentions.0": 4}, steps=1)
    ((name, maps),) = t.maps.items()
    zeros = np.zeros_like(maps)
    t = replace(t, maps={name: maps, name.replace("blocks.0", "blocks.1"): zeros})
    (_, layer) = payload(t._repr_html_())["views"][0]["layers"]
    expected = maps.astype(np.float32)[0, t.positions("apple")].max() / 2
    assert layer["scale"][1] == pytest.approx(expected, rel=1e-3)
    assert layer["label"] == "mid (4×4)"


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn2", "down 0.1"),
        ("mid_block.attentions.0.transformer_blocks.9.attn2", "mid"),
        ("up_blocks.3.attentions.2.transformer_blocks.0.attn2", "up 3.2"),
    ],
)
def test_layer_labels(name, label):
    assert layer_label(name) == label


# Figures


@pytest.fixture(scope="module")
def noise(tokenizer):
    return noise_trace("a photo of an apple next to an umbrella", tokenizer, steps=5, previews=True)


def heat_maps(figure) -> list:
    """The images of attention in a figure, without pictures and colour bars."""
    return [i for axes in figure.axes for i in axes.images if i.get_array().dtype == np.float32]


def test_word_overlay_shares_one_scale(noise):
    figure = word_overlay(noise, ["apple", "umbrella", "apple next"])
    maps = heat_maps(figure)
    largest = max(noise.word(w).max() for w in ("apple", "umbrella", "apple next"))
    assert len(maps) == 3 and {m.get_clim() for m in maps} == {(0, largest)}
    np.testing.assert_array_equal(maps[1].get_array(), noise.word("umbrella"))
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert "share of a place's attention" in labels
    assert "apple, most at the" in figure.alt and figure.png().startswith(b"\x89PNG")
    assert len(heat_maps(word_overlay(noise))) == len({w.lower() for w in noise.words})
    assert len(heat_maps(word_overlay(noise, "<start>"))) == 1


def test_alternative_text_says_where(noise):
    maps = {k: np.zeros_like(v) for k, v in noise.maps.items()}
    for m in maps.values():
        m[:, noise.positions("apple"), -1, 0] = 0.5
    assert "apple, most at the lower left (50.0%)" in word_overlay(replace(noise, maps=maps), "apple").alt


def test_words_by_step_and_by_layer(noise):
    maps = heat_maps(words_by_step(noise, ["apple", "umbrella"], columns=3))
    assert len(maps) == 6 and len({m.get_clim() for m in maps}) == 1
    for column, step in enumerate((0, 2, 4)):
        np.testing.assert_array_equal(maps[column].get_array(), noise.step(step).word("apple"))
    figure = words_by_layer(noise, "apple")
    maps = heat_maps(figure)
    assert [m.get_array().shape[0] for m in maps] == [16, 8, 8, 8, 8, 16, 16]
    assert figure.axes[0].get_title() == "down 0.0\n16×16"


def test_heads_figure(noise):
    by_head = replace(noise, maps={k: np.stack([v, v * 0], axis=1) for k, v in noise.maps.items()})
    maps = heat_maps(heads(by_head.at(16), "apple"))
    assert len(maps) == 6
    assert maps[0].get_array().max() > 0 and maps[1].get_array().max() == 0
    with pytest.raises(ValueError, match="heads=True"):
        heads(noise, "apple")


def test_difference_is_centred_on_zero(noise):
    fainter = replace(noise, maps={k: v * np.float16(0.25) for k, v in noise.maps.items()})
    figure = attention_difference(noise, fainter, "apple")
    before, after, change = heat_maps(figure)
    assert before.get_clim() == after.get_clim()
    low, high = change.get_clim()
    assert low == -high and high == pytest.approx(np.abs(change.get_array()).max())
    np.testing.assert_allclose(change.get_array(), -0.75 * noise.word("apple"), rtol=0.02)
    with pytest.raises(ValueError, match=r"\(16, 16\) and \(8, 8\)"):
        attention_difference(noise, noise.at(8), "apple")


def test_concentration_and_shares_show_the_numbers(noise):
    (axes,) = concentration(noise, ["apple", "umbrella"]).axes
    np.testing.assert_allclose(axes.lines[1].get_ydata(), noise.concentration("umbrella"))
    figure = token_shares(noise)
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    assert sum(widths) == pytest.approx(1, abs=0.01)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    pads = sum(t.kind == "pad" for t in noise.tokens)
    assert names[0] == "<start>" and names[-1] == f"<pad> × {pads}"


def test_denoising_moves(noise, tmp_path):
    film = denoising(noise, "apple", side=64)
    film.save(tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as gif:
        assert gif.n_frames == 5 and gif.info["loop"] == 0 and gif.size == (134, 86)
        first = np.asarray(gif.convert("RGB"))
        gif.seek(4)
        assert gif.info["duration"] == 2000
        assert not np.array_equal(np.asarray(gif.convert("RGB")), first)
    assert 'alt="“a photo of' in film._repr_html_()
    with pytest.raises(ValueError, match="previews=True"):
        denoising(replace(noise, previews=()), "apple")


def test_figures_of_an_empty_prompt(tokenizer):
    empty = noise_trace("", tokenizer, steps=2)
    with pytest.raises(ValueError, match="the prompt is empty"):
        word_overlay(empty)
    assert len(heat_maps(word_overlay(empty, ["<start>", "<pad>"]))) == 2


# The explorer


def test_explorer_draws(tiny_pipe):
    app = attention_explorer(tiny_pipe, prompt="a photo of an apple", seed=3)
    app.steps.value, app.guidance.value = 2, 2.0
    seen = []
    app.progress.observe(lambda change: seen.append((change["new"], app.prompt.disabled)), "value")
    app.button.click()
    assert app.error is None, app.error
    assert seen == [(1, True), (2, True)], "the bar moves while the controls are off"
    assert not any(control.disabled for control in app.controls)
    (shown,) = app.output.outputs
    expected = trace(tiny_pipe, "a photo of an apple", seed=3, steps=2, guidance_scale=2.0)
    assert np.array_equal(app.result.image, expected.image)
    assert shown["data"]["text/html"] == app.result._repr_html_()
    app.button.click()
    assert len(app.output.outputs) == 1, "a new picture replaces the old one"


def test_explorer_with_two_pipelines(tiny_pipe, tiny_master):
    app = attention_explorer(tiny_pipe, tiny_master, labels=("old", "new"))
    app.steps.value = 2
    app.draw()
    assert app.result.labels == ("old", "new") and app.progress.value == app.progress.max == 4
    assert app.prompt.value == "a photo of an apple next to an umbrella"


def test_explorer_says_errors_in_one_sentence(tiny_pipe, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of memory:\n <b>17 GB</b>")

    app = attention_explorer(tiny_pipe, seed=1)
    app.steps.value = 1
    with monkeypatch.context() as patch:
        patch.setattr(tiny_pipe.unet, "forward", broken)
        app.button.click()
    assert "RuntimeError: out of memory: &lt;b&gt;17 GB&lt;/b&gt;" in app.message.value
    assert isinstance(app.error, RuntimeError) and app.progress.bar_style == "danger"
    assert not any(control.disabled for control in app.controls)
    app.button.click()
    assert app.error is None and app.message.value == "" and app.progress.bar_style == ""
    assert app.result is not None


def test_draw_attention_is_a_plain_function(tiny_pipe):
    counted = []
    result = draw_attention(
        (tiny_pipe, tiny_pipe), ("a", "b"), "a sketch of a car", steps=2, on_step=lambda *n: counted.append(n)
    )
    assert counted == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert np.array_equal(result.traces[0].image, result.traces[1].image)
    assert len(result.traces[0].previews) == 2
