"""The book, built from the notebooks as committed, and read in a real Chromium with no network."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

pytest.importorskip("myst_nb", reason="the book needs the extra `book` (pip install -e '.[book]')")

from bs4 import BeautifulSoup  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]

ROOT = Path(__file__).parents[1]
EXPLORABLES = sorted((ROOT / "docs" / "explorables").glob("*.html"))
SEEN = ["index", "notebooks/01_a_picture_out_of_noise", "docs/glossary", "docs/live"]


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    """The built book; fails on any warning of the build."""
    folder = tmp_path_factory.mktemp("book")
    command = [sys.executable, "-m", "sphinx", "-q", "-c", "docs", "-d", str(folder / "trees")]
    done = subprocess.run([*command, ".", str(folder / "html")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if re.search("WARNING|ERROR", line)] == []
    return folder / "html"


@pytest.fixture(scope="module")
def pages(book) -> dict[Path, BeautifulSoup]:
    paths = [path for path in book.rglob("*.html") if "_static" not in path.parts]  # the theme's templates
    return {path: BeautifulSoup(path.read_text("utf-8"), "html.parser") for path in paths}


def test_every_notebook_is_a_chapter_with_a_card_on_the_first_page_and_folded_plumbing(book, pages):
    chapters = {path.stem: pages[path] for path in (book / "notebooks").glob("*.html")}
    cards = pages[book / "docs" / "index.html"].select(".chapter")
    assert chapters.keys() == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert len(cards) == len(chapters) and all(card.find("a") for card in cards)
    for name, page in chapters.items():
        assert any("%pip install" in cell.text for cell in page.select("details.hide")), name
        assert not page.select("details[open]") and page.select("strong.whose.ours"), name
        assert "|---" not in page.text, f"{name}: a table of an output is drawn as one"


def test_no_internal_link_is_broken(pages):
    ids = {path: {tag["id"] for tag in page.find_all(id=True)} for path, page in pages.items()}
    for path, page in pages.items():
        for tag in page.find_all(["a", "img", "link", "script"]):
            link = tag.get("href") or tag.get("src") or ""
            if link and not re.match(r"[a-z]+:|//", link):
                address, anchor = urldefrag(link)
                target = (path.parent / unquote(address.split("?")[0])).resolve() if address else path
                assert target.exists(), (path.name, link)
                assert not anchor or target not in ids or anchor in ids[target], (path.name, link)


def test_every_picture_has_an_alternative_text_and_nothing_is_fetched(pages):
    for path, page in pages.items():
        assert [str(img)[:200] for img in page.find_all("img") if not img.get("alt")] == [], path.name
        loaded = [tag.get("src", "") for tag in page.find_all(["img", "script", "iframe"])]
        loaded += [tag["href"] for tag in page.find_all("link", rel="stylesheet")]
        assert [address for address in loaded if re.match("(https?:)?//", address)] == [], path.name


def test_the_size_is_kept(book):
    sizes = {path: path.stat().st_size for path in book.rglob("*") if path.is_file()}
    live = sum(size for path, size in sizes.items() if path.parent == book / "docs" / "live")
    assert 10_000_000 < live <= 30_000_000, "the model in docs/live.md"
    assert sum(sizes.values()) - live <= 25_000_000


@pytest.fixture
def opened(chromium):
    """Opens pages without a network; none fetches anything, complains, or is wider than its window."""
    pages, faults = [], []

    def open_page(path: Path, width: int, scheme: str = "light", silent: bool = False):
        window = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
        pages.append(page := chromium.new_page(offline=True, **window))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda m: (silent or m.type == "error") and faults.append(m.text))
        page.on("request", lambda r: r.url.startswith(("data:", "file:")) or faults.append(r.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for page in pages:
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"], page.url
        page.close()
    assert [fault for fault in faults if "ERR_FILE_NOT_FOUND" not in fault] == []


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", SEEN)
def test_pages_in_a_browser_without_a_network(opened, book, name, width):
    page = opened(book / f"{name}.html", width)
    page.locator("article h1").first.wait_for(timeout=60_000)
    if "notebooks" in name:
        box = page.locator("div.math math").first.bounding_box()
        assert box["width"] > 50 and box["height"] > 15, "a formula is drawn"
        cell = page.locator("details.hide").first
        cell.locator("summary").click()
        assert cell.locator("pre").first.is_visible()


def play(page, host) -> int:
    """Moves every control by mouse and by keys; returns how often the sentence changed."""

    def state() -> tuple[str, tuple[str, ...]]:
        alts = host.locator("section img").evaluate_all("images => images.map(i => i.alt)")
        assert all(alts)
        return host.locator("output").inner_text(), tuple(alts)

    seen = [state()]
    for slider in host.locator("input[type=range]").all():
        box = slider.bounding_box()
        page.mouse.click(box["x"] + box["width"] * 0.7, box["y"] + box["height"] / 2)
        seen.append(state())
        for key in ("End", "Home", "ArrowRight"):
            slider.press(key)
            seen.append(state())
        assert slider.get_attribute("aria-valuetext")
    for group in host.get_by_role("radiogroup").all():
        group.get_by_role("radio").last.check()
        seen.append(state())
        page.keyboard.press("ArrowLeft")
        seen.append(state())
        assert group.get_by_role("radio").nth(-2).is_checked()
    assert len({alts for _, alts in seen}) > 1, "what is told to who cannot see follows the state"
    return sum(before[0] != after[0] for before, after in pairwise(seen))


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1000, "light"), (400, "dark")])
@pytest.mark.parametrize("path", EXPLORABLES, ids=lambda path: path.stem)
def test_an_explorable_by_mouse_and_keys(opened, path, width, scheme):
    page = opened(path, width, scheme, silent=True)
    assert play(page, page.locator("[data-duge-slides]")) >= 2


@pytest.mark.browser
def test_all_explorables_on_their_page(opened, book):
    page = opened(book / "docs" / "explorables.html", 400)
    hosts = page.locator("[data-duge-slides]")
    hosts.last.locator("section").wait_for(timeout=60_000)
    assert hosts.count() == len(EXPLORABLES) == 5
    assert min(play(page, host) for host in hosts.all()) >= 2
