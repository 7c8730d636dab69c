"""Figure of a contrast between two conditions; cells without a significant difference are grey."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from mixlens.errors import BadInput
from mixlens.plot.checks import takes
from mixlens.plot.heatmap import column_ticks, map_height, map_width, mesh, row_ticks, scale_note
from mixlens.plot.messages import message
from mixlens.plot.style import drawing, heading, printable

_WORDS = {"expert_share": "expert share", "routing_entropy": "routing entropy [bits]", "load_balance": "load balance"}


@takes("stats.contrast", "estimate", "layer", "survives", "q")
def contrast(data: xr.Dataset, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw the difference between two groups in every cell that survives correction for multiple comparisons.

    Parameters
    ----------
    data : xarray.Dataset
        From `stats.contrast`, [layer] or [layer, expert]. Select one measure with `data.sel(measure=...)`.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on. By default a new figure in paper style.
    title : str, optional
        Title. By default the message, where one was computed, or what is drawn.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadInput
        If `data` is not such a Dataset, or has more than one dimension beside layer.

    Examples
    --------
    >>> found = ml.stats.contrast(trace, ml.stats.expert_share, by="domain", a="github")
    >>> ml.show.contrast(found).get_ylabel()
    'layer'
    """
    others = [str(dim) for dim in data["estimate"].dims if dim != "layer"]
    if len(others) > 1:
        raise BadInput(
            f"Cannot draw a contrast over {', '.join(others)}: a figure shows one of them besides the layer. Select "
            f"a value of the other, as in data.sel({others[-1]}=...).",
            argument="data",
            value=others,
        )
    data = data.transpose("layer", *others)
    shape = (data.sizes["layer"], -1)
    estimate, survives = (data[name].to_numpy().reshape(shape) for name in ("estimate", "survives"))
    of, told = data.attrs["of"], int(survives.sum())
    with drawing(ax, map_width(estimate.shape[1]), 1.1 + map_height(shape[0])) as ax:
        unit = mesh(ax, np.where(survives, estimate, np.nan), f"difference in {_WORDS.get(of, of)}")
        row_ticks(ax, data["layer"].to_numpy())
        ax.set_ylabel("layer")
        column_ticks(ax, data[others[0]].to_numpy() if others else [""])
        ax.set_xlabel(printable(others[0]) if others else "")
        pairs = ", paired" if data.attrs["paired"] else ""
        note = (
            f"{data.attrs['a']} ({data.attrs['n_a']} documents) less {data.attrs['b']} ({data.attrs['n_b']}{pairs}); "
            f"{told} of {data.attrs['cells']:,} cells survive at a false discovery rate of "
            f"{1 - data.attrs['level']:.2g}; the others are grey"
        )
        parts = (note, scale_note(np.where(survives, estimate, np.nan)), unit)
        heading(ax, title or message(data), "; ".join(filter(None, parts)))
    return ax
