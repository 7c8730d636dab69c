"""decide: which form of a model to take, from the runs that measured its forms."""

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
    """What a form has to keep to in every column of a quantity.

    value   in the unit of the quantity; of a change, how far from the baseline
    change  None for a bound on the quantity itself; "difference", or "ratio" to the baseline
    """

    text: str
    columns: tuple[Column, ...]
    at_most: bool
    value: float
    change: Literal["difference", "ratio"] | None


@dataclass(frozen=True)
class Decision:
    """The forms of a model side by side, which of them keep to all limits, and which one to take.

    Parameters
    ----------
    model : str
        Name of the model.
    table : pandas.DataFrame
        One row for each form and measured column: form, quantity, setting, estimate, ci_low, ci_high, unit, n, run;
        and change, change_low, change_high from the baseline, paired where both runs read the same. Bounds are infinite
        where a run has too few samples for an interval.
    answers : pandas.DataFrame
        One row a form, one column a limit: "meets", "fails", "too uncertain to say", or "unmeasured"; and one column
        for the limits of each judgement: its verdict, "n/a" for forms that it was not about.
    qualifying : list[str]
        The forms that meet every limit.
    frontier : list[str]
        Those of them that no other qualifying form beats in `objectives`: at least as good in all, and better in one.
    objectives : list[str]
        One column for each of quality, size, speed and price that all qualifying forms were measured in, in the order
        that decides.
    recommended : str or None
        The qualifying form that is best in the first objective, then in the next.
    reason : str
        Why, in a sentence.
    remarks : list[str]
        What was passed over, and which numbers are uncertain.
    shown : pandas.DataFrame
        The forms as text.

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
            One row a form: every column with its interval and its change from the baseline, what it says to the limits,
            and whether it is on the frontier or recommended; "n/a" where it was not measured.
        """
        places = [self._place(form) for form in self.shown.index]
        return pd.concat([self.shown, self.answers.add_prefix("limit: ")], axis=1).assign(**{"": places})

    def title(self) -> str:
        """Return the decision in a sentence."""
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
    """Decide which form of a model to take: schemes, prunings or providers, by limits and what runs measured.

    Runs are of one form where the checksum of their weights agrees, or the endpoint. A limit is met where the whole
    95 % interval keeps to it; where the interval straddles the limit it is too uncertain to say. A form that was not
    measured does not meet a limit. Numbers share a column only where they were measured alike: on the same documents or
    samples, under the same load and on the same machine. A limit holds in every column of its quantity. A form that a
    judgement (`decisions.judge`) was about has to meet the limits of the judgement as well.

    Of the forms that meet every limit the recommended one is best in what has no limit: quality first, then size,
    speed and price, then in what has one, by the estimates.

    Parameters
    ----------
    runs : Sequence or Mapping
        Recordings, evaluations, benchmarks, impact and pareto runs and judgements, or their folders. A mapping names
        forms, as in ``{"6 experts": [log, bench], None: pareto}``; a name vouches that a form is an alternative
        although its model has another name, and a judgement's is that of the changed model. Runs under None name
        themselves.
    at_most, at_least : Mapping[str, float or str], optional
        Limits by quantity: weight_bytes, memory_bytes, ttft_s, tpot_s, usd_per_mtok, perplexity, kl, or the name of a
        benchmark. Text may have a unit, "24GB" or "500ms". A sign makes it a change from the baseline: "-1%" is one
        percentage point for a score, and one per cent of the baseline for other quantities.
    prefer : str, optional
        Quantity that decides between the forms that qualify.
    baseline : str, optional
        Form that changes are measured from; the first one of the runs by default.
    usd_per_hour : float or Mapping[str, float], optional
        What the machine of a benchmark costs an hour, all its GPUs together, in dollars: then usd_per_mtok is what a
        million tokens of the workload cost at the throughput that was measured, at the cheapest load and never idle.
        A mapping from the name of the machine or the address of the server where there are several.

    Returns
    -------
    Decision

    Raises
    ------
    BadInput
        For runs of several models or revisions, for a name given to other weights, for runs that do not tell their
        weights, and for limits on what no run measured.
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
            "Cannot decide: there are no runs. Pass evaluations, benchmarks or pareto runs.", argument="runs"
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
    """The quantity of each column, with its setting where it was measured in several."""
    columns = list(dict.fromkeys(column for form in forms for column in form.cells))
    quantities = [column.quantity for column in columns]
    several = {quantity for quantity in quantities if quantities.count(quantity) > 1}
    return {c: f"{c.quantity} ({c.setting})" if c.quantity in several else c.quantity for c in columns}


def _reason(
    order: Sequence[Form], columns: Sequence[Column], answers: pd.DataFrame, labels: Mapping[Column, str]
) -> str:
    """Why the first form is taken, or why none is."""
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
        return f"Take {best.name}: {of} it comes first, since no number is known of all."
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
    """How to read the table, which forms more data could admit, and which cannot be told from the recommended one."""
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
                f"Intervals of {labels[columns[0]]} overlap for {order[0].name} and {', '.join(alike)}: the choice "
                "between them is by the estimate."
            )


def _shown_forms(forms: Sequence[Form], baseline: Form, labels: Mapping[Column, str]) -> pd.DataFrame:
    rows = {form.name: {label: _cell_text(form, c, baseline) for c, label in labels.items()} for form in forms}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("form")


def _several(some: Any) -> Sequence[Any]:
    return some if isinstance(some, Sequence) and not isinstance(some, str) else [some]


def _opened(run: Any) -> Any:
    return open_any(run) if isinstance(run, str | os.PathLike) else run


def _columns(name: str, forms: Sequence[Form], argument: str) -> tuple[Column, ...]:
    """The columns that a name means: a quantity, a protocol, or a quantity with its setting."""
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
        raise BadInput(f"Cannot limit {name} to {given}: it is no number.", argument=argument, value=given)
    text += "" if how is None else " from the baseline"
    return Limit(text, columns, at_most, value, how)


def _read(name: str, given: str, column: Column, argument: str) -> tuple[float, Literal["difference", "ratio"] | None]:
    """The value of a limit written as text, in the unit of its column, and what it is a change of."""
    match, units = _VALUE.fullmatch(given), _UNITS.get(column.unit, {})
    sign, number, unit = match.groups() if match else ("", "", given)
    ratio = unit == "%" and bool(sign) and "%" not in units
    if match is None or not (unit in units or unit == "" or ratio):
        known = ", ".join(units) or "none"
        raise BadInput(
            f"Cannot limit {name} to {given!r}: it is no number with a unit of {name}, which are {known}. Write it as "
            "24GB, 500ms, 70%, or with a sign as a change from the baseline, -1%.",
            argument=argument,
            value=given,
        )
    value = float(f"{sign}{number}") * (0.01 if ratio else units.get(unit, 1))
    return value, ("ratio" if ratio else "difference" if sign else None)


def _answer(form: Form, limit: Limit, baseline: Form) -> Answer:
    """Whether a form keeps to a limit in all its columns; the worst of what they say."""
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
    """A column of each kind in which every form has a number, in the order in which they decide."""
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
    """Of one kind a limited column comes first, then scores of benchmarks, then the rest as they are listed."""
    names = list(QUANTITIES)
    return lambda column: (
        column not in limited,
        names.index(column.quantity) if column.quantity in names else -1,
    )


def _all_have(forms: Sequence[Form], column: Column) -> bool:
    return all(column in form.cells for form in forms)


def _costs(form: Form, columns: Sequence[Column]) -> tuple[float, ...]:
    """Estimates turned so that less is better."""
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
    """The number, and in parentheses how far a measured quality lies from the baseline."""
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
