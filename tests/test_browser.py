"""The viewer, the sliders, the explorer and the studio in a real Chromium: JupyterLab and a plain page.

Skipped where Chromium is missing.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_notebook, new_output
from playwright.sync_api import TimeoutError as TooLate
from test_viewer import noise_trace

from duge_lite.attention import AttentionTrace
from duge_lite.doodles import draw
from duge_lite.viewer import Slides, compare

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.xdist_group("browser"),  # one browser and one server for all
]

ROOT = Path(__file__).parents[1]
PROMPT = "an apple next to an apple and an umbrella"


@pytest.fixture
def page(chromium):
    """A fresh page; the test fails when a script on it does, or opens a dialog."""
    page = chromium.new_page(viewport={"width": 1100, "height": 1300})
    page.set_default_timeout(300_000)  # milliseconds; a machine may be busy with other things
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
    yield page
    page.close()
    assert faults == []


def blobs(tokenizer, prompt: str = PROMPT, **places: float) -> AttentionTrace:
    """A trace in which each named word looks at one place on the diagonal, more sharply from step to step."""
    t = noise_trace(prompt, tokenizer, steps=5, previews=True)
    sharper = np.linspace(0.06, 0.3, 5).reshape(-1, 1, 1, 1, 1)
    for maps in t.maps.values():
        y, x = (np.mgrid[0 : maps.shape[-2], 0 : maps.shape[-1]] + 0.5) / maps.shape[-1]
        maps[:] = 0.01
        for word, at in places.items():
            maps[:, :, t.positions(word)] += sharper * np.exp(-((y - at) ** 2 + (x - at) ** 2) / 0.02)
        maps[:, :, 0] = 1 - maps[:, :, 1:].astype(np.float32).sum(axis=2)
    return t


def open_page(page, body: str, background: str = "white", first: str = "section.viewer"):
    """A plain page with ``body``; waits for ``first`` on it, and returns all like it."""
    page.set_content(f'<!doctype html><meta charset="utf-8"><body style="background: {background}">{body}')
    page.locator(first).first.wait_for()
    return page.locator(first)


def brightness(canvas, at: float) -> int:
    """Of what the canvas shows at a place on the diagonal, given in parts of its size."""
    script = "(c, at) => [...c.getContext('2d').getImageData(at * c.width, at * c.height, 1, 1).data]"
    return sum(canvas.evaluate(script, at)[:3])


# ---------------------------------------------------------------------------- a plain page


def test_hovering_and_focusing_light_a_word_up(page, tokenizer):
    t = blobs(tokenizer, apple=0.25, umbrella=0.75)
    viewer = open_page(page, t._repr_html_())
    canvas, chips = viewer.locator("figure canvas"), viewer.get_by_role("button")
    viewer.get_by_label("Opacity", exact=True).fill("100")
    chips.filter(has_text="umbrella").hover()
    assert brightness(canvas, 0.75) > 2 * brightness(canvas, 0.25)
    assert "Where “umbrella” looks" in canvas.get_attribute("aria-label")
    chips.filter(has_text="apple").first.focus()
    page.mouse.move(1, 1)
    assert brightness(canvas, 0.25) > 2 * brightness(canvas, 0.75)
    # over the picture, the words tell what that place looks at
    canvas.hover(position={"x": 290, "y": 290})  # of 400
    shown = (chips.locator(part).all_inner_texts() for part in (".share", ".text"))
    numbers = {word: float(share.split()[0]) for share, word in zip(*shown, strict=True) if share}
    assert max(numbers, key=numbers.get) == "umbrella"
    # start, end and padding on request; the mouse leaves the picture
    start = viewer.locator(".chip.start")
    assert not start.is_visible()
    viewer.get_by_label("start, end, padding").check()
    assert start.is_visible() and viewer.locator(".chip.pad").is_visible()
    shown = float(start.locator(".share").inner_text().split()[0]) / 100
    assert abs(shown - t.kinds()["start"]) < 0.006


def test_everything_by_keyboard(page, tokenizer):
    t = blobs(tokenizer, apple=0.25, umbrella=0.75)
    viewer = open_page(page, compare(t, t)._repr_html_())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.shadowRoot.activeElement.innerText").split()[0] in t.words
    page.keyboard.press("Home")
    pressed = viewer.locator(".chip[aria-pressed=true] .text")
    seen = [pressed.inner_text()]
    for _ in range(len(t.words) - 1):
        page.keyboard.press("ArrowRight")
        seen.append(pressed.inner_text())
    assert seen == list(t.words), "both apples can be reached"
    step = viewer.get_by_label("Step", exact=True)
    for key, value in ((".", "1"), (".", "2"), (",", "1")):
        page.keyboard.press(key)
        assert step.input_value() == value
    assert step.get_attribute("aria-valuetext") == "step 1 of 5"
    page.keyboard.press("]")
    assert viewer.get_by_label("Layer", exact=True).get_attribute("aria-valuetext") == "down 0.0 (16×16)"
    for visible in ([True, True], [True, False], [False, True]):
        assert [figure.is_visible() for figure in viewer.locator("figure").all()] == visible
        page.keyboard.press("c")
    page.keyboard.press("p")
    page.wait_for_function("e => e.value === '5'", arg=step.element_handle())
    viewer.get_by_role("button", name="Play the steps").wait_for()  # it stops at the end
    assert step.input_value() == "5"


def test_a_vanished_word_stays_dark_on_the_common_scale(page, tokenizer):
    before, after = blobs(tokenizer, apple=0.25), blobs(tokenizer, umbrella=0.75)
    viewer = open_page(page, compare(before, after)._repr_html_())
    viewer.get_by_label("Opacity", exact=True).fill("100")
    viewer.locator(".chip").filter(has_text="apple").first.focus()
    first, second = (viewer.locator("figure canvas").nth(i) for i in (0, 1))
    assert brightness(first, 0.25) > 3 * brightness(second, 0.25)


def test_two_viewers_on_one_page_do_not_disturb_each_other(page, tokenizer):
    a, b = blobs(tokenizer, apple=0.2), blobs(tokenizer, "<script>alert(1)</script>")
    body = a._repr_html_() + b._repr_html_() + a._repr_html_()  # the first one twice
    viewers = open_page(page, body, background="#111")
    viewers.nth(2).wait_for()
    assert viewers.count() == 3
    viewers.nth(0).get_by_label("Step", exact=True).fill("3")
    steps = [viewers.nth(i).get_by_label("Step", exact=True).input_value() for i in range(3)]
    assert steps == ["3", "0", "0"] and "dark" in viewers.nth(1).get_attribute("class")
    shown = viewers.nth(1).locator(".chip.word .text").all_inner_texts()
    assert shown == list(b.words), "the prompt is shown as text; a dialog would fail the test"


def test_a_viewer_that_leaves_the_page_goes_quiet_and_one_that_comes_back_follows(page, tokenizer):
    page.evaluate(
        """() => { window.awake = new Set(); const p = MutationObserver.prototype, {observe, disconnect} = p;
        p.observe = function (...a) { awake.add(this); observe.apply(this, a); };
        p.disconnect = function () { awake.delete(this); disconnect.call(this); }; }"""
    )
    viewer = open_page(page, blobs(tokenizer, apple=0.2)._repr_html_())
    assert page.evaluate("awake.size") == 1
    page.evaluate("window.host = document.querySelector('[data-duge]'); window.host.remove()")
    assert page.evaluate("awake.size") == 0, "what has gone would be kept alive by what it watches"
    page.evaluate("document.body.style.background = '#111'; document.body.append(window.host)")
    assert page.evaluate("awake.size") == 1 and "dark" in viewer.get_attribute("class")
    for color, dark in (("white", False), ("#111", True)):
        page.evaluate(f"document.body.style.background = '{color}'")
        page.wait_for_function(f"e => e.classList.contains('dark') == {dark:d}", arg=viewer.element_handle())


def test_slides_by_keyboard(page):
    frames = [draw(name) for name in ("apple", "harp", "star")]
    three = Slides(frames, ["an apple", "then a harp", 'a "star"'], "Three").data
    images = open_page(page, three * 2, first="[data-duge-slides] section img")
    slider = page.get_by_label("Three").first
    for text in ("then a harp", 'a "star"'):
        slider.press("ArrowRight")
        assert slider.get_attribute("aria-valuetext") == text
    shown = [image.get_attribute("alt") for image in images.all() if image.is_visible()]
    assert shown == ['a "star"', "an apple"], "two on one page do not disturb each other"
    assert page.locator("output").first.inner_text() == 'a "star"'


def test_in_exported_html(page, tokenizer):
    shown = {"text/html": blobs(tokenizer, apple=0.25)._repr_html_(), "text/plain": "x"}
    cell = new_code_cell("trace", execution_count=1, outputs=[new_output("execute_result", shown)])
    body, _ = HTMLExporter().from_notebook_node(new_notebook(cells=[cell]))
    page.route("https://**", lambda route: route.abort())  # MathJax and the like: we need none of it
    viewer = open_page(page, body)
    viewer.get_by_label("Step", exact=True).fill("5")
    assert "step 5 of 5" in viewer.locator("canvas[role=img]").get_attribute("aria-label")


# ---------------------------------------------------------------------------- JupyterLab

CELLS = [
    "import duge_lite as duge\npipe = duge.load_pipeline('tiny')",
    "app = duge.widgets.attention_explorer(pipe, prompt='a photo of an apple')\n"
    "app.controls['num_inference_steps'].value = 4\napp",
    "duge.trace(pipe, 'an apple next to an umbrella', num_inference_steps=4)",
    "pipe.unet = None  # from here on, drawing fails",
    "from duge_lite.viewer import Slides\nfrom IPython.display import HTML, display\n"
    "display(Slides([b'', b''], ['$5 and $6', ''], '$5 and $6'), HTML('<p>Mathematics: $5 and $6</p>'))",
    "base = {n: p.clone() for n, p in pipe.unet.named_parameters()}\n"
    "how = duge.UnlearnConfig(num_inference_steps=1, places=4, memory_size=4)\n"
    "duge.widgets.unlearning_studio(pipe, how)",
    "print('the same:', all(p.equal(base[n]) for n, p in pipe.unet.named_parameters()))",
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory, tiny_master):
    """The address of a notebook in a real JupyterLab, on a folder with a tiny model."""
    folder, home = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("home")
    tiny_master.save_pretrained(folder / "tiny")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = new_notebook(cells=list(map(new_code_cell, CELLS)), metadata=kernel)
    nbformat.write(notebook, folder / "here.ipynb")
    log, own = home / "log.txt", ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    how = {"env": os.environ | {"PYTHONPATH": str(ROOT)} | dict.fromkeys(own, str(home)), "cwd": folder}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--IdentityProvider.token=", "--LabApp.news_url=None", "--LabApp.expose_app_in_browser=True"]
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, **how) as server:
        try:
            while not (address := re.search(r"http://127\S+/lab", log.read_text())):
                assert server.poll() is None, log.read_text()
                time.sleep(0.5)
            yield f"{address[0]}/tree/here.ipynb?reset"
        finally:
            server.terminate()


def run_cell(page, cells, index: int):
    """Runs a cell and waits for its end. JupyterLab drops keys that come too early: then they come again."""
    prompt = cells.nth(index).locator(".jp-InputArea-prompt").first
    arg = [prompt.element_handle(), prompt.inner_text()]
    for _ in range(10):
        cells.nth(index).locator(".jp-InputArea-editor").click()
        page.keyboard.press("Control+Enter")
        try:
            page.wait_for_function("([e, old]) => e.innerText !== old", arg=arg, timeout=15_000)
        except TooLate:
            continue
        page.wait_for_function("([e, old]) => /\\d/.test(e.innerText)", arg=arg)
        assert "Traceback" not in cells.nth(index).inner_text(), cells.nth(index).inner_text()
        return cells.nth(index).locator(".jp-OutputArea-output")
    raise AssertionError(f"JupyterLab did not run cell {index}")


@pytest.fixture
def cells(page, lab):
    """The notebook's cells, when its kernel waits: a cell that is run before is silently not run."""
    page.goto(lab)
    cells = page.locator(".jp-Notebook .jp-CodeCell")
    cells.first.wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    run_cell(page, cells, 0)
    return cells


def test_the_explorer_and_the_viewer_in_jupyterlab(page, cells):
    count = cells.count()
    run_cell(page, cells, 1)
    draw = page.get_by_role("button", name="Draw")
    draw.click()
    cells.nth(1).locator("section.viewer").wait_for()

    # the viewer by itself, as the value of a cell; its keys are its own and not the notebook's
    run_cell(page, cells, 2)
    viewer = cells.nth(2).locator("section.viewer")
    viewer.locator(".chip").first.click()
    pressed = viewer.locator(".chip[aria-pressed=true] .text")
    before = pressed.inner_text()
    for key in ("ArrowRight", "ArrowDown", ".", "c", "b", "a", "x", "d", "d", "m"):
        page.keyboard.press(key)
    assert pressed.inner_text() != before
    assert viewer.get_by_label("Step", exact=True).input_value() == "1"
    now = cells.count(), page.locator(".jp-MarkdownCell").count()
    assert now == (count, 0), "a key reached the notebook"

    # dark theme, at once
    assert "dark" not in viewer.get_attribute("class")
    page.evaluate("document.body.style.setProperty('--jp-layout-color0', '#111')")
    page.evaluate("document.body.setAttribute('data-jp-theme-light', 'false')")
    page.wait_for_function("e => e.classList.contains('dark')", arg=viewer.element_handle())

    # a failing model is one sentence in the widget, and the picture stays
    run_cell(page, cells, 3)
    draw.click()
    alert = cells.nth(1).get_by_role("alert")
    assert "NoneType" in alert.inner_text() and "\n" not in alert.inner_text().strip()
    assert cells.nth(1).locator("section.viewer").is_visible()

    # a dollar sign in our text is no mathematics, as it would be in any other output
    run_cell(page, cells, 4)
    cells.nth(4).locator("mjx-container").wait_for()
    assert cells.nth(4).locator("[data-duge-slides] .row span").first.inner_text() == "$5 and $6"


def test_the_studio_in_jupyterlab(page, cells):
    run_cell(page, cells, 5)
    app = cells.nth(5).locator(".jp-Cell-outputArea")
    app.get_by_text("Choose what is to go.").wait_for()

    # choosing forgets and shows it; moving a slider solves again and shows the same seeds anew
    app.locator("select").select_option("apple")
    app.get_by_text(re.compile("“apple”: the judge sees it in . of 3 pictures")).wait_for()
    alt, shown = (app.locator("img").get_attribute(name) for name in ("alt", "src"))
    assert "“apple”: the judge sees it in" in alt
    app.locator(".noUi-handle").nth(3).press("ArrowRight")
    another = "([app, old]) => app.querySelector('img')?.src !== old"
    page.wait_for_function(another, arg=[app.element_handle(), shown])
    assert run_cell(page, cells, 6).last.inner_text().strip() == "the same: False"

    # undo, twice
    app.get_by_role("button", name="Undo").dblclick()
    app.get_by_text("the model is as it was").wait_for()
    assert run_cell(page, cells, 6).last.inner_text().strip() == "the same: True"
