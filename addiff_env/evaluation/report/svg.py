"""Figures as inline SVG, in colours that follow the page's."""

from __future__ import annotations

import io
import re

import matplotlib.pyplot as plt
from markupsafe import Markup
from matplotlib.figure import Figure

from addiff_env.env.trajectories import ACCENT, INK
from addiff_env.evaluation.report.figures import ACTION_COLORS, FAMILIES, GRID, RULE

DARK = {  # what each colour of the plots becomes on a dark page
    INK: "#e4e7ec",
    GRID: "#3d4452",
    ACCENT: "#ff8c57",
    RULE: "#a9b2bf",
    **dict(zip(FAMILIES, ("#6cb4ff", "#69d07c", "#b197fc", "#ff86ad", "#4fd0e4", "#e3bf3c"), strict=True)),
    **dict(zip(ACTION_COLORS, ("#6ea8ec", "#98a1b0", "#ff8c42"), strict=True)),
}


def css_variable(color: str) -> str:
    """The style sheet's name of a plot's colour."""
    return f"--plot-{color.removeprefix('#')}"


def inline_svg(figure: Figure, name: str) -> Markup:
    """A figure as inline SVG: colours follow the page, ids start with ``name``, nothing refers to another file."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style[^>]*>.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for color in DARK:
        text = text.replace(color, f"var({css_variable(color)})")
    text = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', text, count=1)
    return Markup(text)  # noqa: S704 (matplotlib escapes text)


_METADATA = ("Creator", "Date", "Format", "Type")
