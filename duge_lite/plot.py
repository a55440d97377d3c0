"""A matplotlib Figure that a notebook can show, and a screen reader can read."""

from __future__ import annotations

import base64
import io

from matplotlib.figure import Figure


class Plot(Figure):
    """A matplotlib Figure that shows itself in a notebook, with alternative text for who cannot see it.

    It needs no pyplot and no "current figure": nothing is global, and nothing is left open.
    """

    alt: str = ""

    def png(self) -> bytes:
        """The figure as PNG bytes, for widgets and files."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.06)
        return buffer.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        data = {"image/png": base64.b64encode(self.png()).decode(), "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt}}
