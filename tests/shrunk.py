"""Runs copies of the notebooks that do little: every cell, few pictures, few steps, hardly any learning.

Numbers that are known by name are cut, wherever they stand; what is not known is run as it is, only slower.
"""

import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"

# At most so many, where a cell says `images=10` or `"images": 10`.
IN_CELLS = {"images": 1, "copies": 1, "count": 8}
NUMBER = re.compile(rf"""(\b({"|".join(IN_CELLS)})["']?\s*[=:]\s*)(\d+)""")
# At most so many in every config, whoever made it; and steps of a picture, at most: when somebody follows
# them, so that there is a first and a second half; else.
SMALL = {"iterations": 2, "lessons": 4, "memory_size": 4, "target_size": 4}, 8, 2
FULL = {}, 1000, 1000

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


def run(number: str, small: bool = True, last: str = "", **environment: str) -> list[str]:
    """Executes a copy of a notebook, in a kernel with these variables, and returns the lines that it printed.

    At its end it prints which models drew, and runs the source ``last``. Raises what stops it, and an
    AssertionError when a cell shows an error and goes on.
    """
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells if small else ():
        cell.source = NUMBER.sub(lambda n: f"{n[1]}{min(int(n[3]), IN_CELLS[n[2]])}", cell.source)
    first = f"IN_CONFIGS, FOLLOWED, STEPS = {SMALL if small else FULL}{FIRST}"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    notebook.cells.append(nbformat.v4.new_code_cell(f"print('drawn by', *_drew)\n{last}"))
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOKS)}})
    client.execute(env=os.environ | environment)
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    printed = "".join(out.text for out in outputs if out.output_type == "stream" and out.name == "stdout")
    assert "Traceback" not in printed and 'role="alert"' not in str(notebook.cells)
    return printed.splitlines()
