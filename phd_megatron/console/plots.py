"""The one place where matplotlib is set up: it draws into files, and the same figure gives the same file.

matplotlib is imported when something is drawn, and never before.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from phd_megatron.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (
    "#4c72b0",
    "#dd8452",
    "#55a868",
    "#c44e52",
    "#8172b3",
    "#937860",
    "#da8bc3",
    "#8c8c8c",
    "#ccb974",
    "#64b5cd",
)
_LINES = ("-", "--", ":")


def pyplot(font_size: float | None = None, salt: str = "phd-megatron") -> ModuleType:
    """``matplotlib.pyplot``, without a window.

    Args:
        font_size: in points, of text that does not say its own; None leaves it alone.
        salt: of the identifiers in an SVG file, which are random without one.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib, which is not installed; pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    matplotlib.rcParams.update({"svg.hashsalt": salt, "svg.fonttype": "none"})
    if font_size is not None:
        matplotlib.rcParams["font.size"] = font_size
    module: ModuleType = found
    return module


def line_style(number: int) -> dict[str, str]:
    """Colour and line of the group with this number."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": _LINES[number // len(COLOURS) % len(_LINES)]}


def tidy(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Labels, a faint grid, and no frame at the top and to the right."""
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
