"""The book: the notebooks as committed, never executed here, and the pages of this folder. `make book`

The source folder is the whole repository, so that a relative link means the same in Jupyter, on a web page
of the repository, and here. Nothing is fetched: formulas become MathML, which browsers draw themselves.
"""

import json
import re
import sys
import tomllib
from pathlib import Path

from docutils import nodes
from latex2mathml import converter

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "docs" / "live")]
import badges  # noqa: E402
import pack  # noqa: E402

from duge_lite.viewer import explorable  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
ADDRESS = badges.repository()

project = "duge-lite"
author = copyright = PROJECT["authors"][0]["name"]
release = PROJECT["version"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md", "notebooks/*.ipynb", "data/README.md",
    "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md",
]  # fmt: skip
exclude_patterns = [".*", "build", "dist", "runs", "**/.ipynb_checkpoints"]
myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_block"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_output_stderr = "remove"  # warnings of other people's packages
nb_render_markdown_format = "myst"  # with tables
nb_mime_priority_overrides = [("html", "text/html", 0)]
autodoc_default_options = {"members": True, "member-order": "bysource", "exclude-members": "set"}
autodoc_typehints = "none"  # docstrings say shapes and units
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "sphinx_book_theme"
html_title = "Forgetting, seen"
html_context = {"default_mode": "auto"}
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_sourcelink_suffix = ""
html_theme_options = {
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "use_download_button": True,
    "use_repository_button": bool(ADDRESS),
    **({"repository_url": ADDRESS, "launch_buttons": {"colab_url": "https://colab.research.google.com"}}
       if ADDRESS else {}),
}  # fmt: skip


def first_page(notebook: Path) -> tuple[str, str, str, str]:
    """Title, question, picture (with its alternative text) and minutes of a chapter, from its first cell."""
    text = "".join(json.loads(notebook.read_text("utf-8"))["cells"][0]["source"])
    title = re.search(r"^# (.+)$", text, re.M)[1]
    question = re.search(r"^\*([^*\n](?:.|\n(?!\n))+?)\*$", text, re.M)
    picture = re.search(r"!\[.*?\]\(.*?\)", text)
    minutes = re.search(r"^\| \*\*Time\*\* \| (.+?)(;.*)? \|$", text, re.M)
    found = ((question, 1), (picture, 0), (minutes, 1))
    return title, *(match[group] if match else "" for match, group in found)


def chapters() -> str:
    """The chapters as Markdown, a picture and a question each."""
    cards = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        title, question, picture, minutes = first_page(path)
        link = f"../notebooks/{path.name}"
        parts = [f"[{picture}]({link})" if picture else "", f"**[{title}]({link})**", question, minutes]
        cards.append(":::{container} chapter\n" + "\n\n".join(filter(None, parts)) + "\n:::")
    return "::::{container} chapters\n" + "\n".join(cards) + "\n::::"


def fold_plumbing(text: str) -> str:
    """A notebook with its setup and its hidden cells folded, and the alternative texts of its figures."""
    notebook, setup = json.loads(text), False
    for cell in notebook["cells"]:
        source, metadata = "".join(cell["source"]), cell["metadata"]
        if cell["cell_type"] != "code":
            setup = source.startswith("## Setup")
            continue
        if setup or metadata.get("jupyter", {}).get("source_hidden"):
            metadata.setdefault("tags", []).append("hide-input")
        texts = [out.get("metadata", {}).get("image/png", {}).get("alt", "") for out in cell["outputs"]]
        if alt := " ".join(filter(None, texts)):
            metadata["mystnb"] = {"image": {"alt": alt}}
        setup = False
    return json.dumps(notebook)


def read_source(app, docname: str, content: list[str]) -> None:
    if docname.startswith("notebooks/"):
        content[0] = fold_plumbing(content[0])
    if docname == "docs/explorables":
        content[0] = re.sub("<!-- explorable (.+) -->", lambda m: raw(explorable(m[1]).data), content[0])
    if docname == root_doc:
        content[0] = content[0].replace("<!-- chapters -->", chapters())
    if docname == "docs/live":
        content[0] = pack.fill(content[0])


def raw(text: str) -> str:
    """HTML as it is; no line of it can end the fence."""
    return f"``````{{raw}} html\n{text}\n``````"


def anchor(term: str) -> str:
    return "term-" + nodes.make_id(term)


def glossary() -> dict[str, str]:
    """What each name of docs/glossary.md means: ``- **name** or **other name**, symbol: meaning``."""
    text = (ROOT / "docs" / "glossary.md").read_text("utf-8")
    entries = re.findall(r"^- (\*\*.+?): (.+?)(?=\n- |\n\n|\Z)", text, re.M | re.S)
    return {
        name.lower(): " ".join(re.sub(r"[*`$\\]", "", meaning).split())
        for head, meaning in entries
        for name in re.findall(r"\*\*(.+?)\*\*", head)
    }


def link_terms(app, doctree, docname: str) -> None:
    """A name of the glossary in bold or italics shows its meaning on hover, and leads there."""
    terms = app.duge_glossary
    home = docname == "docs/glossary"
    for node in list(doctree.findall(lambda n: isinstance(n, nodes.strong | nodes.emphasis))):
        name = node.astext().lower()
        name = name if name in terms else name.removesuffix("s")
        if name not in terms or isinstance(node.parent, nodes.reference):
            continue
        if home:
            if isinstance(node, nodes.strong):
                node["ids"].append(anchor(name))
            continue
        address = app.builder.get_relative_uri(docname, "docs/glossary") + "#" + anchor(name)
        link = nodes.reference("", "", refuri=address, internal=True, classes=["term"], reftitle=terms[name])
        node.replace_self(link)
        link += node


def mark_sources(app, doctree, docname: str) -> None:
    """**The paper's:**, **Ours:** and **Others':** become badges."""
    for node in doctree.findall(nodes.strong):
        if match := re.fullmatch("(The papers?'s?|Ours|Others').*:", node.astext().replace("\u2019", "'")):
            node["classes"] += ["whose", re.sub("[^a-z]", "", match[1].lower().removeprefix("the "))[:5]]


def mathml(tex: str, display: str) -> str:
    text = converter.convert(tex, display=display)
    # what stands over an arrow: browsers know no mpadded that adds to a width
    return re.sub("<mpadded[^>]*>(.*?)<mspace[^>]*/></mpadded>", r'<mrow class="over">\1</mrow>', text)


def inline_math(writer, node) -> None:
    writer.body.append(f'<span class="math">{mathml(node.astext(), "inline")}</span>')
    raise nodes.SkipNode


def block_math(writer, node) -> None:
    writer.body.append(f'<div class="math" role="math">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def add_front_door(app, exception) -> None:
    if exception is None and app.builder.format == "html":
        target = app.builder.get_target_uri(root_doc)
        refresh = f'<meta http-equiv="refresh" content="0; url={target}">'
        head = f'<meta charset="utf-8">{refresh}<title>{project}</title>'
        page = f'<!doctype html><html lang="en">{head}<a href="{target}">{project}</a></html>\n'
        (Path(app.outdir) / "index.html").write_text(page, "utf-8")


def add_live_page(app, exception) -> None:
    """The model and the program of docs/live.md, beside it."""
    if exception is None and app.builder.format == "html":
        pack.write(Path(app.outdir) / "docs" / "live")


def setup(app) -> None:
    app.duge_glossary = glossary()
    app.add_html_math_renderer(
        "mathml", inline_renderers=(inline_math, None), block_renderers=(block_math, None)
    )
    app.connect("source-read", read_source)
    app.connect("doctree-resolved", link_terms)
    app.connect("doctree-resolved", mark_sources)
    app.connect("build-finished", add_front_door)
    app.connect("build-finished", add_live_page)
