"""What experts matter for: heat maps of the change in loss, importance against use, and loss at every k."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm

from mixlens.errors import BadInput
from mixlens.show import wording
from mixlens.show.style import (
    COLUMN,
    DIVERGING,
    FAINT,
    INK,
    MARKERS,
    MUTED,
    PAGE,
    drawing,
    expert_colours,
    heading,
    percent,
    printable,
)

_FEW_POINTS = 40  # that carry their names


def importance(data: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Change in loss without each expert of each layer; a dot where the interval excludes no change.

    data    from expert_importance [layer, expert]; of one domain, data.sel(domain=...)
    """
    data = wording.only(data, "importance", "layer", "expert").transpose("layer", "expert")
    with drawing(ax, COLUMN, 0.9 + 0.16 * max(data.sizes["layer"], 8)) as ax:
        _cells(ax, data, data["estimate"].to_numpy(), _apart(data))
        step = -(-data.sizes["layer"] // 24)
        ax.set_yticks(np.arange(0, data.sizes["layer"], step) + 0.5, map(str, data["layer"].to_numpy()[::step]))
        ax.set_xticks(np.arange(data.sizes["expert"]) + 0.5, map(str, data["expert"].to_numpy()))
        ax.set_xlabel("expert")
        ax.set_ylabel("layer")
        _titled(ax, data, "Importance")
    return ax


def importance_by_domain(data: xr.Dataset, ax: Axes | None = None) -> Axes:
    """The same for every domain: a row a domain, a column an expert, layers side by side.

    data    from expert_importance(..., by="domain")  [domain, layer, expert]
    """
    group = next((str(d) for d in data["estimate"].dims if d not in ("layer", "expert")), "domain")
    data = wording.only(data, "importance_by_domain", group, "layer", "expert").transpose(group, "layer", "expert")
    rows, layers, experts = (data.sizes[dim] for dim in (group, "layer", "expert"))
    with drawing(ax, PAGE, 1.0 + 0.17 * max(rows, 4)) as ax:
        _cells(ax, data, data["estimate"].to_numpy().reshape(rows, -1), _apart(data).reshape(rows, -1))
        for edge in range(1, layers):
            ax.axvline(edge * experts, color=INK, linewidth=0.5)
        ax.set_yticks(np.arange(rows) + 0.5, [printable(name) for name in data[group].to_numpy()])
        step = -(-layers // 16)
        ax.set_xticks((np.arange(0, layers, step) + 0.5) * experts, map(str, data["layer"].to_numpy()[::step]))
        ax.set_xlabel(f"layer (in each, experts {data['expert'].to_numpy()[0]} to {data['expert'].to_numpy()[-1]})")
        _titled(ax, data, f"Importance by {group}")
    return ax


def importance_against_share(data: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Change in loss without an expert against how often it is chosen: one point a layer and expert.

    data    from expert_importance [layer, expert]; of one domain, data.sel(domain=...)
    """
    data = wording.only(data, "importance_against_share", "layer", "expert").transpose("layer", "expert")
    with drawing(ax, COLUMN, 2.6) as ax:
        share, estimate = data["share"].to_numpy(), data["estimate"].to_numpy()
        colours = expert_colours(data.sizes["layer"])
        for i, layer in enumerate(data["layer"].to_numpy()):
            ax.vlines(share[i], data["ci_low"][i], data["ci_high"][i], color=colours[i], linewidth=0.6, alpha=0.7)
            marker = MARKERS[i % len(MARKERS)]
            ax.plot(share[i], estimate[i], marker=marker, linestyle="", color=colours[i], label=f"layer {layer}")
        ax.axhline(0, color=INK, linewidth=0.6)
        ax.axvline(1 / data.sizes["expert"], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        ax.xaxis.set_major_formatter(percent)
        ax.set_xlabel("share of assignments")
        ax.set_ylabel(_label(data))
        if data.sizes["layer"] <= len(MARKERS):
            ax.legend(ncols=2, loc="best")
        if estimate.size <= _FEW_POINTS:
            for (i, j), value in np.ndenumerate(estimate):
                ax.annotate(str(data["expert"].to_numpy()[j]), (share[i, j], value), fontsize=5, xytext=(2, 2),
                            textcoords="offset points")  # fmt: skip
        note = f"{wording.sample(data)}; whiskers: {wording.level(data)} over documents; dashed: uniform share"
        selected = wording.chosen(data)
        heading(ax, "Importance against use" + (f", {selected}" if selected else ""), note)
    return ax


def contributions(
    data: xr.Dataset, ax: Axes | None = None, *, sequence: int | None = None, positions: tuple[int, int] = (0, 64)
) -> Axes:
    """What the chosen experts of each layer add to the logit of the next token, along a text.

    data       from expert_contributions  [token, layer, slot]; the slots of a layer are added up
    sequence   sequence number; the first one when not given
    positions  (first, stop) within the sequence

    Raises BadInput for a sequence or positions that are not there.
    """
    number = int(data["sequence"].to_numpy()[0]) if sequence is None else sequence
    place = data["position"].to_numpy()
    here = (data["sequence"].to_numpy() == number) & (place >= positions[0]) & (place < positions[1])
    if not here.any():
        numbers = ", ".join(map(str, np.unique(data["sequence"].to_numpy())[:8]))
        raise BadInput(
            f"Contributions in sequence {number}, positions {positions[0]} to {positions[1] - 1}, were to be drawn. "
            f"The data has sequences {numbers}. Give one of them, and positions within it."
        )
    part = data.isel(token=np.flatnonzero(here)).transpose("layer", "token", "slot")
    with drawing(ax, PAGE, 1.2 + 0.13 * max(part.sizes["layer"], 8)) as ax:
        values = part["logit"].sum("slot", skipna=False).to_numpy()
        _mesh(ax, values, "logit of the next token")
        pieces = [printable(piece).replace("\n", "↵") for piece in part["piece"].to_numpy()]
        size = min(6.0, 380 / len(pieces))
        ax.set_xticks(np.arange(len(pieces)) + 0.5, pieces, rotation=90, fontsize=size)
        step = -(-part.sizes["layer"] // 24)
        ax.set_yticks(np.arange(0, part.sizes["layer"], step) + 0.5, map(str, part["layer"].to_numpy()[::step]))
        ax.set_ylabel("layer")
        note = f"sequence {number}; column: the token read; direct effect on the token that came next; grey: none came"
        heading(ax, "Contribution of experts", note)
    return ax


def topk_curve(data: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Loss when every token chooses k experts, one line a domain; the model's own k is dashed.

    data    from topk_sweep  [*by, k]
    """
    series = list(wording.groups(data, "k"))
    with drawing(ax, COLUMN, 2.4 if len(series) < 5 else 3.2) as ax:
        colours, step = expert_colours(len(series)), 0.4 / max(len(series), 8)
        for i, (name, part) in enumerate(series):
            at = part["k"].to_numpy() + (i - (len(series) - 1) / 2) * step
            marker = MARKERS[i % len(MARKERS)]
            ax.plot(at, part["estimate"], color=colours[i], marker=marker, label=printable(name) or "all documents")
            ax.vlines(at, part["ci_low"], part["ci_high"], color=colours[i], linewidth=1)
        ax.axvline(int(data.attrs["own_k"]), color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        ax.set_xticks(data["k"].to_numpy())
        ax.set_xlabel("experts a token chooses, k")
        ax.set_ylabel("loss, nats a token")
        if len(series) > 1:
            ax.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.22))
        note = f"{wording.sample(data)}; whiskers: {wording.level(data)} over documents; dashed: the model's own k"
        heading(ax, "Loss by number of experts", note)
    return ax


def _apart(data: xr.Dataset) -> np.ndarray:
    return ((data["ci_low"] > 0) | (data["ci_high"] < 0)).to_numpy()


def _cells(ax: Axes, data: xr.Dataset, values: np.ndarray, apart: np.ndarray) -> None:
    _mesh(ax, values, _label(data))
    row, column = np.nonzero(apart)
    ax.plot(column + 0.5, row + 0.5, marker=".", markersize=2, linestyle="", color=INK)


def _mesh(ax: Axes, values: np.ndarray, label: str) -> None:
    finite = np.abs(values[np.isfinite(values)])
    limit = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    ax.set_facecolor(FAINT)
    mesh = ax.pcolormesh(
        np.ma.masked_invalid(values), cmap=DIVERGING, norm=CenteredNorm(0, limit), edgecolors="white", linewidth=0.3
    )
    ax.invert_yaxis()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    figure = ax.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(mesh, ax=ax, fraction=0.05, pad=0.02, aspect=25)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(labelsize=6, length=2, width=0.5)
    bar.set_label(label, fontsize=7)


def _label(data: xr.Dataset) -> str:
    if data.attrs["unit"] == "nats":
        return "change in loss, nats a token"
    return printable(f"change in {str(data.attrs['metric']).rsplit('.', 1)[-1]}, a token")


def _titled(ax: Axes, data: xr.Dataset, title: str) -> None:
    how = {"reroute": "never chosen", "zero": "output zero", "mean": "output its mean"}.get(str(data.attrs["how"]), "")
    selected = wording.chosen(data)
    note = f"{wording.sample(data)}; each expert in turn: {how}; dot: {wording.level(data)} excludes 0"
    heading(ax, f"{title}, {selected}" if selected else title, note)
