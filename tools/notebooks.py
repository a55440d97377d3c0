"""Clean executed notebooks for committing: keep the outputs, drop what changes at every run.

python tools/notebooks.py notebooks/*.ipynb
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from PIL import Image

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def pack(png: str) -> str:
    """The same pixels in fewer bytes, as base64."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").save(buffer, "PNG", optimize=True)
    return min(png, base64.b64encode(buffer.getvalue()).decode(), key=len)


def clean(notebook):
    notebook.metadata.pop("widgets", None)
    notebook.metadata.kernelspec = KERNEL
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        for key in ("execution", "ExecuteTime", "collapsed", "scrolled", "trusted"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            # A widget is dead without its kernel, and web pages show an error in its place.
            cell.outputs = [out for out in cell.outputs if WIDGET_VIEW not in out.get("data", {})]
            for data in (out.data for out in cell.outputs if "image/png" in out.get("data", {})):
                data["image/png"] = pack(data["image/png"])
    return notebook


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        nbformat.write(clean(nbformat.read(path, as_version=4)), path)
