"""A matplotlib Figure that a notebook can show, and a screen reader can read."""

from __future__ import annotations

import base64
import io

from matplotlib.figure import Figure
from PIL import Image


class Plot(Figure):
    """A matplotlib Figure that shows itself in a notebook, with alternative text for who cannot see it.

    It needs no pyplot and no "current figure": nothing is global, and nothing is left open.
    """

    alt: str = ""
    colors: int | None = None
    """How many the PNG has, at most 256; None for all. Grids of noisy pictures take a third of the bytes."""

    def png(self) -> bytes:
        """The figure as PNG bytes, for widgets and files."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.06)
        if self.colors is not None:
            image = Image.open(buffer).convert("RGB").quantize(self.colors, dither=Image.Dither.NONE)
            image.save(buffer := io.BytesIO(), format="png", optimize=True)
        return buffer.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        data = {"image/png": base64.b64encode(self.png()).decode(), "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt}}
