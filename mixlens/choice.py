"""Choose a form of a model (scheme, pruning or provider) from the runs that measured it."""

from __future__ import annotations

import html
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from mixlens.core.text import MISSING
from mixlens.errors import BadInput, visible
from mixlens.pricing.forms import KINDS, QUANTITIES, Cell, Column, Form, Kind, Measured, change, forms_of
from mixlens.registry import open as open_any
from mixlens.stats.verdicts import DO, DO_NOT, UNKNOWN

RunOrPath = Measured | str | os.PathLike[str]
Answer = Literal["meets", "fails", "too uncertain to say", "unmeasured", "n/a"]
_OF_VERDICT: dict[str, Answer] = {DO: "meets", DO_NOT: "fails", UNKNOWN: "too uncertain to say"}
_UNITS = {
    "bytes": {"B": 1, **{f"{p}B": 1000**n for n, p in enumerate("kMGT", 1)}}
    | {f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)},
    "s": {"ms": 1e-3, "s": 1.0},
    "fraction": {"%": 0.01},
}
_SHOWN_IN = {"bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")), "s": ((1.0, "s"), (1e-3, "ms"))}
_NOT_MET = {
    "fails": "fail a limit",
    "too uncertain to say": "are too uncertain to say",
    "unmeasured": "are unmeasured in one",
}
_VALUE = re.compile(r"\s*([+-]?)\s*(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)\s*([A-Za-z%]*)\s*")


@dataclass(frozen=True)
class Limit:
    """Bound that a form must satisfy in every column of a quantity.

    value   in the unit of the quantity; for a change, the distance from the baseline
    change  None for a bound on the quantity itself; "difference", or "ratio" to the baseline
    """

    text: str
    columns: tuple[Column, ...]
    at_most: bool
    value: float
    change: Literal["difference", "ratio"] | None


@dataclass(frozen=True)
class Decision:
    """Comparison of the forms of a model under limits, with a recommendation.

    Parameters
    ----------
    model : str
        Name of the model.
    table : pandas.DataFrame
        One row for each form and measured column: form, quantity, setting, estimate, ci_low, ci_high, unit, n, run;
        and change, change_low, change_high from the baseline, paired where both runs read the same input. Bounds are
        infinite where a run has too few samples for an interval.
    answers : pandas.DataFrame
        One row per form, one column per limit: "meets", "fails", "too uncertain to say", or "unmeasured"; and one
        column per judgement with its verdict, "n/a" for forms that it does not cover.
    qualifying : list[str]
        Forms that meet every limit.
    frontier : list[str]
        Qualifying forms that no other one dominates in `objectives` (at least as good in all and better in one).
    objectives : list[str]
        One column each for quality, size, speed and price, if all qualifying forms were measured in it, in order of
        priority.
    recommended : str or None
        The qualifying form that is best in the first objective, then in the next.
    reason : str
        Why, in one sentence.
    remarks : list[str]
        Runs and columns that were left out, and numbers that are uncertain.
    shown : pandas.DataFrame
        Forms as text.

    Examples
    --------
    >>> ml.decide(["runs/schemes"], at_most={"kl": 0.05}).recommended  # doctest: +SKIP
    'nf4'
    """

    model: str
    table: pd.DataFrame
    answers: pd.DataFrame
    qualifying: list[str]
    frontier: list[str]
    objectives: list[str]
    recommended: str | None
    reason: str
    remarks: list[str]
    shown: pd.DataFrame

    kind = "decision"

    def overview(self) -> pd.DataFrame:
        """Return the forms as text.

        Returns
        -------
        pandas.DataFrame
            One row per form: every column with its interval and its change from the baseline, its answer to each limit,
            and whether it is recommended or on the frontier; "n/a" where it was not measured.
        """
        places = [self._place(form) for form in self.shown.index]
        return pd.concat([self.shown, self.answers.add_prefix("limit: ")], axis=1).assign(**{"": places})

    def title(self) -> str:
        """Return the decision as one sentence."""
        return f"{self.model}: {self.reason}"

    def _place(self, form: str) -> str:
        if form == self.recommended:
            return "recommended"
        return "on the frontier" if form in self.frontier else "qualifies" if form in self.qualifying else ""

    def __repr__(self) -> str:
        return visible("\n".join([self.overview().T.to_string(), "", self.title(), *self.remarks]))

    def _repr_html_(self) -> str:
        said = "".join(f"<div>{html.escape(visible(remark))}</div>" for remark in self.remarks)
        table = self.overview().T.to_html(escape=True, border=0)
        return f"<div class='mixlens-decision'><p><b>{html.escape(visible(self.title()))}</b></p>{table}{said}</div>"


def decide(
    runs: Sequence[RunOrPath] | Mapping[str | None, RunOrPath | Sequence[RunOrPath]],
    *,
    at_most: Mapping[str, float | str] | None = None,
    at_least: Mapping[str, float | str] | None = None,
    prefer: str | None = None,
    baseline: str | None = None,
    usd_per_hour: float | Mapping[str, float] | None = None,
) -> Decision:
    """Choose a form of a model (scheme, pruning or provider) by limits on measured quantities.

    Runs belong to one form if their weights have the same checksum, or if they use the same endpoint. A form meets a
    limit if the whole 95 % interval satisfies it; if the interval straddles the limit, the answer is "too uncertain to
    say". An unmeasured form does not meet a limit. Numbers share a column only if they were measured alike: on the same
    documents or samples, or under the same load on the same machine. A limit applies to every column of its quantity.
    Forms that a judgement (`decisions.judge`) covers must meet its limits too.

    Among the forms that meet every limit, the recommended one has the best estimates in the quantities without a limit
    (quality first, then size, speed and price), then in those with one.

    Parameters
    ----------
    runs : Sequence or Mapping
        Recordings, evaluations, benchmarks, impact and pareto runs and judgements, or their folders. A mapping names
        forms, as in ``{"6 experts": [log, bench], None: pareto}``. Naming a form declares it an alternative even if its
        model has another name; the name of a judgement is that of the changed model. Runs under None keep their own
        names.
    at_most, at_least : Mapping[str, float or str], optional
        Limits by quantity: weight_bytes, memory_bytes, ttft_s, tpot_s, usd_per_mtok, perplexity, kl, or the name of a
        benchmark. Text may have a unit, "24GB" or "500ms". A sign makes it a change from the baseline: "-1%" is one
        percentage point for a score, and one per cent of the baseline for other quantities.
    prefer : str, optional
        Quantity that ranks the qualifying forms first.
    baseline : str, optional
        Form that changes are measured from; by default the first one of the runs.
    usd_per_hour : float or Mapping[str, float], optional
        Hourly cost in dollars of the machine of a benchmark, all its GPUs together. usd_per_mtok is then the cost of a
        million tokens of the workload at the measured throughput, at the cheapest load and with no idle time. Pass a
        mapping from the name of the machine or the address of the server if there are several.

    Returns
    -------
    Decision

    Raises
    ------
    BadInput
        If the runs belong to several models or revisions, a name is used for different weights, a run does not identify
        its weights, or no run measured a limited quantity.
    RunError
        If a run cannot be opened.

    Examples
    --------
    >>> found = ml.decide(
    ...     ["runs/schemes", "runs/mmlu-nf4", "runs/mmlu-bf16"],
    ...     at_most={"memory_bytes": "24GB"},
    ...     at_least={"mmlu": "-1%"},
    ... )  # doctest: +SKIP
    >>> found.recommended  # doctest: +SKIP
    'nf4'
    """
    given = runs if isinstance(runs, Mapping) else {None: runs}
    claims = [(name, _opened(run)) for name, some in given.items() for run in _several(some)]
    if not claims:
        raise BadInput(
            "Cannot decide: no runs were given. Pass evaluations, benchmarks or pareto runs.", argument="runs"
        )
    forms, remarks = forms_of(claims, usd_per_hour)
    names = [form.name for form in forms]
    if baseline is not None and baseline not in names:
        raise BadInput(
            f"Cannot measure changes from {baseline!r}: the forms are {', '.join(names)}. Pass one of them.",
            argument="baseline",
            value=baseline,
        )
    base = forms[names.index(baseline)] if baseline is not None else forms[0]
    limits = [
        _limit(name, value, forms, most)
        for bounds, most in ((at_most, True), (at_least, False))
        for name, value in (bounds or {}).items()
    ]
    preferred = _columns(prefer, forms, "prefer")[0] if prefer is not None else None
    return _decided(forms, limits, base, preferred, remarks)


def _decided(
    forms: Sequence[Form], limits: Sequence[Limit], baseline: Form, prefer: Column | None, remarks: Sequence[str]
) -> Decision:
    judgements = list(dict.fromkeys(text for form in forms for text in form.judged))
    found = {
        form.name: [
            *(_answer(form, limit, baseline) for limit in limits),
            *(_OF_VERDICT[form.judged[text]] if text in form.judged else MISSING for text in judgements),
        ]
        for form in forms
    }
    texts = [*(limit.text for limit in limits), *judgements]
    answers = pd.DataFrame.from_dict(found, orient="index", columns=texts)
    answers.index.name = "form"
    kept = [form for form in forms if all(answer in ("meets", MISSING) for answer in found[form.name])]
    columns = _objectives(kept, limits, prefer)
    costs = {form.name: _costs(form, columns) for form in kept}
    order = sorted(kept, key=lambda form: costs[form.name])
    labels = _labels(forms)
    return Decision(
        model=str(baseline.held.get("name") or baseline.name),
        table=_table(forms, baseline),
        answers=answers,
        qualifying=[form.name for form in kept],
        frontier=[form.name for form in kept if not any(_beats(cost, costs[form.name]) for cost in costs.values())],
        objectives=[labels[column] for column in columns],
        recommended=order[0].name if order else None,
        reason=_reason(order, columns, answers, labels),
        remarks=[*remarks, *_remarks(order, columns, answers, baseline, labels)],
        shown=_shown_forms(forms, baseline, labels),
    )


def _labels(forms: Sequence[Form]) -> dict[Column, str]:
    """Label each column by its quantity, with the setting if the quantity was measured in several."""
    columns = list(dict.fromkeys(column for form in forms for column in form.cells))
    quantities = [column.quantity for column in columns]
    several = {quantity for quantity in quantities if quantities.count(quantity) > 1}
    return {c: f"{c.quantity} ({c.setting})" if c.quantity in several else c.quantity for c in columns}


def _reason(
    order: Sequence[Form], columns: Sequence[Column], answers: pd.DataFrame, labels: Mapping[Column, str]
) -> str:
    """Explain why the first form is recommended, or why none is."""
    if not order:
        counts = {answer: int((answers == answer).any(axis=1).sum()) for answer in _NOT_MET}
        told = ", ".join(f"{n} {words}" for answer, words in _NOT_MET.items() if (n := counts[answer]))
        return f"No form can be recommended: of {len(answers)}, {told}."
    best, limited = order[0], len(answers.columns) > 0
    if len(order) == 1:
        why = "that meets every limit" if limited else "there is"
        return f"Take {best.name}: the only one of {len(answers)} forms {why}."
    of = f"of the {len(order)} of {len(answers)} forms that meet every limit"
    of = of if limited else f"of {len(order)} forms, without any limit,"
    if not columns:
        return f"Take {best.name}: {of} it comes first, since no number is known for all of them."
    column = next((c for c in columns if best.cells[c].estimate != order[1].cells[c].estimate), columns[0])
    how = "highest" if column.more_is_better else "lowest"
    numbers = f"{_number(best, column)}; next {order[1].name} with {_number(order[1], column)}"
    return f"Take {best.name}: {of} it has the {how} {labels[column]} ({numbers})."


def _remarks(
    order: Sequence[Form],
    columns: Sequence[Column],
    answers: pd.DataFrame,
    baseline: Form,
    labels: Mapping[Column, str],
) -> Iterator[str]:
    """Explain the table, list the forms that more data could admit, and those tied with the recommended one."""
    yield f"In parentheses: change from {baseline.name}, paired where both runs read the same."
    for answer, words in (("too uncertain to say", "More samples would tell"), ("unmeasured", "Measure it")):
        for text in answers.columns:
            if names := list(answers.index[answers[text] == answer]):
                yield f"{text}: {answer} for {', '.join(names)}. {words}."
    if order and columns:
        best = order[0].cells[columns[0]]
        others = {form.name: form.cells[columns[0]] for form in order[1:]}
        alike = [name for name, cell in others.items() if cell.low <= best.high and best.low <= cell.high]
        if alike and best.low < best.high:
            yield (
                f"Intervals of {labels[columns[0]]} overlap for {order[0].name} and {', '.join(alike)}: the choice is "
                "by the estimate."
            )


def _shown_forms(forms: Sequence[Form], baseline: Form, labels: Mapping[Column, str]) -> pd.DataFrame:
    rows = {form.name: {label: _cell_text(form, c, baseline) for c, label in labels.items()} for form in forms}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("form")


def _several(some: Any) -> Sequence[Any]:
    return some if isinstance(some, Sequence) and not isinstance(some, str) else [some]


def _opened(run: Any) -> Any:
    return open_any(run) if isinstance(run, str | os.PathLike) else run


def _columns(name: str, forms: Sequence[Form], argument: str) -> tuple[Column, ...]:
    """Return the columns that match a quantity, a protocol, or a quantity with its setting."""
    known = list(dict.fromkeys(column for form in forms for column in form.cells))
    found = [
        column
        for column in known
        if name in (column.quantity, column.setting.partition(",")[0], f"{column.quantity} ({column.setting})")
    ]
    if not found:
        raise BadInput(
            f"Cannot decide by {name!r}: none of the runs measured it. They measured "
            f"{', '.join(dict.fromkeys(column.quantity for column in known))}. Name one of these, or add a run that "
            "measures it.",
            argument=argument,
            value=name,
        )
    return tuple(found)


def _limit(name: str, given: float | str, forms: Sequence[Form], at_most: bool) -> Limit:
    argument = "at_most" if at_most else "at_least"
    columns = _columns(name, forms, argument)
    text = f"{name} {'at most' if at_most else 'at least'} {given}"
    if not isinstance(given, str):
        value, how = float(given), None
    else:
        value, how = _read(name, given, columns[0], argument)
    if math.isnan(value):
        raise BadInput(f"Cannot limit {name} to {given}: it is not a number.", argument=argument, value=given)
    text += "" if how is None else " from the baseline"
    return Limit(text, columns, at_most, value, how)


def _read(name: str, given: str, column: Column, argument: str) -> tuple[float, Literal["difference", "ratio"] | None]:
    """Parse a limit written as text: its value in the unit of the column, and the kind of change."""
    match, units = _VALUE.fullmatch(given), _UNITS.get(column.unit, {})
    sign, number, unit = match.groups() if match else ("", "", given)
    ratio = unit == "%" and bool(sign) and "%" not in units
    if match is None or not (unit in units or unit == "" or ratio):
        known = ", ".join(units) or "none"
        raise BadInput(
            f"Cannot limit {name} to {given!r}: it is not a number with a unit of {name} ({known}). Write it as "
            "24GB, 500ms, 70%, or with a sign as a change from the baseline, -1%.",
            argument=argument,
            value=given,
        )
    value = float(f"{sign}{number}") * (0.01 if ratio else units.get(unit, 1))
    return value, ("ratio" if ratio else "difference" if sign else None)


def _answer(form: Form, limit: Limit, baseline: Form) -> Answer:
    """Return the worst answer of a form to a limit over all columns of the limit."""
    answers: list[Answer] = []
    for column in limit.columns:
        cell, base = form.cells.get(column), baseline.cells.get(column)
        if cell is None or (limit.change is not None and base is None):
            answers.append("unmeasured")
            continue
        low, high, bound = cell.low, cell.high, limit.value
        if limit.change is not None and base is not None:
            _, low, high = change(cell, base)
            bound = bound * abs(base.estimate) if limit.change == "ratio" else bound
        within, beyond = (high <= bound, low > bound) if limit.at_most else (low >= bound, high < bound)
        answers.append("meets" if within else "fails" if beyond else "too uncertain to say")
    order: tuple[Answer, ...] = ("fails", "unmeasured", "too uncertain to say")
    for answer in order:
        if answer in answers:
            return answer
    return "meets"


def _objectives(forms: Sequence[Form], limits: Sequence[Limit], prefer: Column | None) -> list[Column]:
    """Return one column of each kind in which every form has a number, in order of priority."""
    limited = [column for limit in limits for column in limit.columns]
    known = [column for column in dict.fromkeys(c for form in forms for c in form.cells) if _all_have(forms, column)]
    found: dict[Kind, Column] = {}
    for kind in KINDS:
        own = [column for column in known if column.kind == kind]
        if own:
            found[kind] = min(own, key=_rank(limited))
    order = sorted(found.values(), key=lambda column: column in limited)
    return [*([prefer] if prefer in known else []), *(column for column in order if column != prefer)]


def _rank(limited: Sequence[Column]) -> Callable[[Column], tuple[bool, int]]:
    """Sort key for columns of one kind: limited ones first, then benchmark scores, then the order of QUANTITIES."""
    names = list(QUANTITIES)
    return lambda column: (
        column not in limited,
        names.index(column.quantity) if column.quantity in names else -1,
    )


def _all_have(forms: Sequence[Form], column: Column) -> bool:
    return all(column in form.cells for form in forms)


def _costs(form: Form, columns: Sequence[Column]) -> tuple[float, ...]:
    """Return the estimates with signs chosen so that less is better."""
    return tuple(
        -form.cells[column].estimate if column.more_is_better else form.cells[column].estimate for column in columns
    )


def _beats(other: tuple[float, ...], own: tuple[float, ...]) -> bool:
    return other != own and all(one <= two for one, two in zip(other, own, strict=True))


def _table(forms: Sequence[Form], baseline: Form) -> pd.DataFrame:
    rows = [
        {
            "form": form.name,
            "quantity": column.quantity,
            "setting": column.setting,
            "estimate": cell.estimate,
            "ci_low": cell.low,
            "ci_high": cell.high,
            "unit": column.unit,
            "n": cell.n,
            "run": cell.run,
            **dict(zip(("change", "change_low", "change_high"), _changed(cell, baseline), strict=True)),
            "baseline": baseline.name,
        }
        for form in forms
        for column, cell in form.cells.items()
    ]
    return pd.DataFrame(rows)


def _changed(cell: Cell, baseline: Form) -> tuple[float, float, float]:
    base = baseline.cells.get(cell.column)
    return (math.nan, math.nan, math.nan) if base is None else change(cell, base)


def _cell_text(form: Form, column: Column, baseline: Form) -> str:
    """Format the number and, for a quality, its change from the baseline in parentheses."""
    if column not in form.cells:
        return MISSING
    text, base = _number(form, column), baseline.cells.get(column)
    if column.kind != "quality" or form is baseline or base is None or base.low == base.high:
        return text
    moved, low, high = change(form.cells[column], base)
    return f"{text} ({moved:+.3g} [{_shown(low)}, {_shown(high)}])"


def _number(form: Form, column: Column) -> str:
    cell = form.cells[column]
    scales = _SHOWN_IN.get(column.unit, ((1.0, column.unit),))
    factor, unit = next((scale for scale in scales if abs(cell.estimate) >= scale[0]), scales[-1])
    text = f"{cell.estimate / factor:.4g}"
    if cell.low != cell.high:
        text += f" [{_shown(cell.low / factor)}, {_shown(cell.high / factor)}]"
    return text if unit == "fraction" else f"{text} {unit}".rstrip()


def _shown(value: float) -> str:
    return f"{value:.4g}" if np.isfinite(value) else "unknown"
