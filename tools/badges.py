"""Stamp the setup cells of the notebooks with the address of the repository.

python tools/badges.py

The address stands in one place, ``Repository`` in pyproject.toml's urls. Once it is there, every notebook
gets an "Open in Colab" badge and installs the package from it; until then, from an uploaded wheel.
"""

import re
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
COLAB = "https://colab.research.google.com/github/{owner}/blob/main/notebooks/{name}"
LEAVES = "installs it alone and leaves\nColab's own packages as they are. Everywhere else it only imports."
UPLOADED = f"On Colab: upload `duge_lite-*.whl` (made by `make wheel`) first. This cell {LEAVES}"
CLONED = f"[![Open in Colab]({BADGE})]({COLAB})\n\nOn Colab this cell fetches the package, {LEAVES}"


def repository() -> str | None:
    """The address in pyproject.toml, None while there is none."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    return urls.get("Repository")


def setup_text(address: str | None, name: str) -> str:
    """What the cell above the setup cell of notebook ``name`` says."""
    if not address:
        return f"## Setup\n\n{UPLOADED}"
    owner = re.sub(r"(\.git)?/?$", "", address.removeprefix("https://github.com/"))
    return "## Setup\n\n" + CLONED.format(owner=owner, name=name)


def stamp(notebook: nbformat.NotebookNode, address: str | None, name: str) -> nbformat.NotebookNode:
    """The notebook with its setup cells as they should be for ``address``; raises ValueError without any."""
    source = f"git+{address}" if address else "duge_lite-*.whl"
    heads = [i for i, cell in enumerate(notebook.cells) if cell.source.startswith("## Setup")]
    if not heads or "%pip install" not in notebook.cells[heads[0] + 1].source:
        raise ValueError(f"{name} has no '## Setup' cell with an installing cell below it")
    text, code = notebook.cells[heads[0]], notebook.cells[heads[0] + 1]
    text.source = setup_text(address, name)
    code.source = re.sub(r"(%pip install -q --no-deps) .*", lambda m: f"{m[1]} {source}", code.source)
    return notebook


if __name__ == "__main__":
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        nbformat.write(stamp(nbformat.read(path, as_version=4), repository(), path.name), path)
