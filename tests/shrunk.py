"""Runs copies of the notebooks that do little: every cell, few pictures, few steps, hardly any learning.

Numbers that are known by name are cut, wherever they stand; what is not known is run as it is, only slower.
The `assert`s are off, as they claim what only a trained model, asked in full, does. (PYTHONOPTIMIZE=1 would
switch them off as well, and compile all of torch anew.)
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
# At most so many in every config, whoever made it.
IN_CONFIGS = {"iterations": 2, "lessons": 4, "memory_size": 4, "target_size": 4}
# Steps of a picture, at most: when somebody follows them, so that there is a first and a second half; else.
FOLLOWED, STEPS = 8, 2

WITHOUT_ASSERTS = """
import ast

class _WithoutAsserts(ast.NodeTransformer):
    def visit_Assert(self, node):
        return ast.copy_location(ast.Pass(), node)

get_ipython().ast_transformers.append(_WithoutAsserts())
"""
COUNTED = """
import functools, diffusers, duge_lite

def _counted(call):
    @functools.wraps(call)
    def run(self, *args, num_inference_steps=50, **options):
        most = FOLLOWED if options.get("callback_on_step_end") else STEPS
        _drawn.append((duge_lite.model_card(self).name, num_inference_steps > most))
        return call(self, *args, num_inference_steps=min(num_inference_steps, most), **options)
    return run

def _small(check):
    def run(self):
        for name, most in IN_CONFIGS.items():
            if hasattr(self, name):
                now = getattr(self, name)  # None: as many as there are
                object.__setattr__(self, name, most if now is None else min(now, most))
        check(self)
    return run

_drawn = []
diffusers.StableDiffusionPipeline.__call__ = _counted(diffusers.StableDiffusionPipeline.__call__)
if hasattr(duge_lite, "UnlearnConfig"):
    duge_lite.UnlearnConfig.__post_init__ = _small(duge_lite.UnlearnConfig.__post_init__)
"""
LAST = "print(len(_drawn), 'calls,', sum(cut for _, cut in _drawn), 'cut short:', *{m for m, _ in _drawn})"


def cut(source: str) -> str:
    """A cell's source with its numbers of pictures cut."""
    for name, most in IN_CELLS.items():
        number = re.compile(rf"""(\b{name}["']?\s*[=:]\s*)(\d+)""")
        source = number.sub(lambda found, most=most: found[1] + str(min(int(found[2]), most)), source)
    return source


def run(number: str, small: bool = True, last: str = "", **environment: str) -> nbformat.NotebookNode:
    """Executes a copy of a notebook, in a kernel with these variables; cells keep their outputs.

    At its end it prints how often it drew, and with what, and runs the source ``last``. ``metadata.error`` is
    the name and the text of what stopped it, if anything did.
    """
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    notebook = nbformat.read(path, as_version=4)
    sizes = {"FOLLOWED": FOLLOWED, "STEPS": STEPS, "IN_CONFIGS": IN_CONFIGS}
    if not small:
        sizes = {"FOLLOWED": 1000, "STEPS": 1000, "IN_CONFIGS": {}}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source, cell.outputs = cut(cell.source) if small else cell.source, []
    numbers = "".join(f"{name} = {value}\n" for name, value in sizes.items())
    notebook.cells.insert(0, nbformat.v4.new_code_cell(WITHOUT_ASSERTS + numbers + COUNTED))
    notebook.cells.append(nbformat.v4.new_code_cell(f"{LAST}\n{last}"))
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
