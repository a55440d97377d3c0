"""The course with the packages that Colab brings: `make colab` installs them beside ours and says where."""

import os

import pytest
import shrunk
from test_package import COLAB

FOLDER = os.environ.get("DUGE_COLAB")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(FOLDER is None, reason="`make colab` runs it")]

VERSIONS = ["ipywidgets", "ipython", "transformers", "diffusers", "numpy"]


@pytest.mark.parametrize("number", ["00", "02", "03", "05"])
def test_a_notebook_runs_to_its_end(number):
    paths = [FOLDER, *filter(None, [os.environ.get("PYTHONPATH")])]
    last = f"import importlib.metadata as m; print([m.version(name) for name in {VERSIONS}])"
    *_, drew, versions = shrunk.run(number, last=last, PYTHONPATH=os.pathsep.join(paths))
    assert versions == str([COLAB[name] for name in VERSIONS]), "not Colab's packages"
    assert drew.endswith("doodle")
