"""Pictures of what was predicted and measured, all in one hand: PNG files, the same for the same numbers.

This file does not know what is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tllm.core.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart by nearly everybody, and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PREDICTED: Mapping[str, Any] = {"linestyle": "--", "linewidth": 1.2}
MEASURED: Mapping[str, Any] = {"linestyle": "-", "marker": "o", "markersize": 4, "linewidth": 1.4}
LIMIT: Mapping[str, Any] = {"linestyle": ":", "color": "#777777", "linewidth": 1.2}

_SIZE_INCHES = (6.4, 3.8)
_DOTS_PER_INCH = 120


@contextmanager
def figure(
    path: Path, *, title: str, x_label: str, y_label: str, x_log: bool = False, y_log: bool = False
) -> Iterator[Axes]:
    """Axes to draw on; when the context is left the picture is at `path`, which must end in .png. Lines with labels
    get a legend. Raises ConfigError where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("Pictures need matplotlib. Install it with: pip install 'tllm[lab]'") from error
    drawing = Figure(figsize=_SIZE_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.add_subplot()
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if x_log:
        axes.set_xscale("log")
    if y_log:
        axes.set_yscale("log")
    axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9, framealpha=0.85, edgecolor="none")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, format="png", metadata={"Software": None})
