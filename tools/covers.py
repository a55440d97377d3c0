"""Take chapters' pictures out of their executed notebooks: a figure is told by the beginning of its alt text.

python tools/covers.py
"""

import base64
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
COVERS = {
    "growing.png": ("01_a_picture_out_of_noise", "The large shapes come first"),
    "instead.png": ("03_forget_one_concept", "“umbrella” is to go"),
    "race.png": ("07_who_forgets_best", "Forgetting"),
    "own-concept.png": ("08_take_it_to_stable_diffusion", "The doodle model: “car” before"),
    "minimum.png": ("04_three_losses_one_equation", "Every direction from the solution"),
    "erosion.png": ("05_forget_many_concepts", "Naive: things change"),
    "finished.png": ("06_is_it_really_gone", "Noised apples"),
}


def figure(notebook: str, alt: str) -> bytes:
    """The PNG whose alt text begins with ``alt``; LookupError when there is none."""
    cells = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
    for data in (out.get("data", {}) for cell in cells for out in cell.get("outputs", ())):
        if "image/png" in data and data.get("text/plain", "").startswith(alt):
            return base64.b64decode(data["image/png"])
    raise LookupError(f"{notebook} has no figure whose alt text begins with {alt!r}: run `make notebooks`")


if __name__ == "__main__":
    for name, where in COVERS.items():
        (ROOT / "data" / name).write_bytes(figure(*where))
