"""Runs copies of the notebooks that do little: every cell, few pictures, few steps, hardly any learning.

Numbers that are known by name are cut, wherever they stand; what is not known is run as it is, only slower.
"""

import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"

# At most so many, where a cell says `images=10` or `"images": 10`.
IN_CELLS = {"images": 1, "copies": 1, "count": 8}
# At most so many in every config, whoever made it; and steps of a picture, at most: when somebody follows
# them, so that there is a first and a second half; else.
SMALL = {
    "IN_CONFIGS": {"iterations": 2, "lessons": 4, "memory_size": 4, "target_size": 4},
    "FOLLOWED": 8,
    "STEPS": 2,
}
FULL = {"IN_CONFIGS": {}, "FOLLOWED": 1000, "STEPS": 1000}

FIRST = """
import functools, diffusers, duge_lite

def _told(call):
    @functools.wraps(call)
    def run(self, *args, num_inference_steps=50, **options):
        _drew.add(duge_lite.model_card(self).name)
        most = FOLLOWED if options.get("callback_on_step_end") else STEPS
        return call(self, *args, num_inference_steps=min(num_inference_steps, most), **options)
    return run

def _small(check):
    def run(self):
        for name, most in IN_CONFIGS.items():
            now = getattr(self, name)  # None: as many as there are
            object.__setattr__(self, name, most if now is None else min(now, most))
        check(self)
    return run

_drew = set()
diffusers.StableDiffusionPipeline.__call__ = _told(diffusers.StableDiffusionPipeline.__call__)
duge_lite.UnlearnConfig.__post_init__ = _small(duge_lite.UnlearnConfig.__post_init__)
"""


def cut(source: str) -> str:
    """A cell's source with its numbers of pictures cut."""
    for name, most in IN_CELLS.items():
        number = re.compile(rf"""(\b{name}["']?\s*[=:]\s*)(\d+)""")
        source = number.sub(lambda found, most=most: found[1] + str(min(int(found[2]), most)), source)
    return source


def run(number: str, small: bool = True, last: str = "", **environment: str) -> nbformat.NotebookNode:
    """Executes a copy of a notebook, in a kernel with these variables; cells keep their outputs.

    At its end it prints which models drew, and runs the source ``last``. ``metadata.error`` is the name and
    the text of what stopped it, if anything did.
    """
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source, cell.outputs = cut(cell.source) if small else cell.source, []
    sizes = "".join(f"{name} = {value}\n" for name, value in (SMALL if small else FULL).items())
    notebook.cells.insert(0, nbformat.v4.new_code_cell(sizes + FIRST))
    notebook.cells.append(nbformat.v4.new_code_cell(f"print('drawn by', *_drew)\n{last}"))
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOKS)}})
    try:
        client.execute(env={**os.environ, **environment})
    except CellExecutionError as error:
        notebook.metadata.error = (error.ename, error.evalue)
    return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
    """All that its cells wrote to stdout."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    return "".join(out.text for out in outputs if out.output_type == "stream" and out.name == "stdout")
