"""Forms of one model, such as quantization schemes, prunings and providers, with the measurements of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from itertools import groupby
from typing import Any, Literal

import numpy as np

from mixlens.bench.bench import Bench
from mixlens.bench.local_tables import compiled_at, in_a_loop
from mixlens.core.run_dir import open_run
from mixlens.endpoints.endpoint import canonical
from mixlens.endpoints.prices import provider_at
from mixlens.errors import BadInput
from mixlens.evals.log import Log
from mixlens.evals.paired import compare_logs
from mixlens.evals.scoring import primary_rows
from mixlens.models.quantization.linears import SCHEMES
from mixlens.pricing.per_mtok import hourly_of, listed, place, rented
from mixlens.stats.impact import Impact
from mixlens.stats.judgement import SCORE, TEXT, Judgement
from mixlens.stats.next_tokens import next_tokens
from mixlens.stats.pareto import WEIGHTS, Pareto
from mixlens.stats.verdicts import DO
from mixlens.trace.trace import Trace

Kind = Literal["quality", "size", "speed", "price"]
KINDS: tuple[Kind, ...] = ("quality", "size", "speed", "price")
Measured = Trace | Log | Bench | Impact | Pareto | Judgement
# Kind, whether more is better, and unit of each quantity; benchmark scores have columns of their own.
QUANTITIES: dict[str, tuple[Kind, bool, str]] = {
    "kl": ("quality", False, "nats"),
    "loss_difference": ("quality", False, "nats"),
    "perplexity": ("quality", False, ""),
    "same_top": ("quality", True, "fraction"),
    "worst_loss_change": ("quality", False, "nats"),
    "worst_score_change": ("quality", True, "fraction"),
    "weight_bytes": ("size", False, "bytes"),
    "memory_bytes": ("size", False, "bytes"),
    "tpot_s": ("speed", False, "s"),
    "ttft_s": ("speed", False, "s"),
    "e2e_token_s": ("speed", False, "s"),
    "output_tokens_per_s": ("speed", True, "tokens/s"),
    "usd_per_mtok": ("price", False, "$/Mtok"),
}
_SPEEDS = ("ttft_s", "tpot_s", "e2e_token_s", "output_tokens_per_s")
_PRECISIONS = {*SCHEMES, "float32", "bfloat16", "float16"}


@dataclass(frozen=True)
class Column:
    """A quantity and its setting. Only measurements under the same setting share a column.

    setting  corpus, protocol and samples, or load and machine; "" if the quantity depends on none
    """

    quantity: str
    kind: Kind
    more_is_better: bool
    unit: str
    setting: str = ""

    @staticmethod
    def of(quantity: str, setting: str = "") -> Column:
        return Column(quantity, *QUANTITIES[quantity], setting)


@dataclass(frozen=True)
class Cell:
    """One quantity that a run measured for one form.

    low, high  bounds of the interval; minus and plus infinity if unknown
    n          number of samples, tokens, calls or price statements
    run        run that measured it
    data       the evaluation or trace, for paired differences
    change     difference from the original if the run measured it: estimate, low, high
    """

    column: Column
    estimate: float
    low: float
    high: float
    n: int
    run: str
    data: Log | Trace | None = None
    change: tuple[float, float, float] | None = None


@dataclass
class Form:
    """One way to run the model: a set of weights, or a server that holds them.

    held    metadata of the model from its runs
    run     first of its runs
    judged  verdict of each judgement of the form, by the limits of the judgement
    """

    name: str
    held: Mapping[str, Any]
    run: str
    cells: dict[Column, Cell] = field(default_factory=dict)
    judged: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """Measurements of one form in one run, with remarks on what was left out."""

    run: str
    held: Mapping[str, Any]
    cells: tuple[Cell, ...]
    name: str
    judged: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Key that identifies the form. Raises BadInput if the run does not identify its weights."""
        if endpoint := self.held.get("endpoint"):
            return endpoint["url"], endpoint["model"], str(endpoint.get("extra") or {})
        if not self.held.get("weights_checksum"):
            raise BadInput(
                f"Cannot tell which weights {self.run} is of: it has no checksum of them. Measure it again with out=, "
                "which writes the checksum.",
                argument="runs",
                value=self.run,
            )
        return (self.held["weights_checksum"], *(str(WEIGHTS[what](self.held)) for what in ("adapters", "edits")))


def forms_of(
    claims: Sequence[tuple[str | None, Measured]], usd_per_hour: float | Mapping[str, float] | None = None
) -> tuple[list[Form], list[str]]:
    """Group the measurements of runs by form of the model, and return remarks on what was left out.

    Two runs measure the same form if their weight checksum, adapters and edits are equal; for endpoints, if address,
    model and provider are equal.

    claims  runs, each with the name of its form, or None to identify the form by its weights. A name asserts that the
            form is an alternative, whatever the run calls its model; it is rejected if the weights are another form's.
    usd_per_hour  prices of the benchmarks' machines, as in hourly_of

    Raises BadInput for runs of several models or revisions, for runs that do not identify their weights, and for names
    that contradict the weights.
    """
    benches = [part for _, run in claims if isinstance(run, Bench) for part in run.configurations().values()]
    hourly = hourly_of(benches, usd_per_hour)
    forms: dict[tuple[Any, ...], Form] = {}
    remarks: list[str] = []
    named = [(name, part) for name, run in claims for part in _parts(run, name, hourly)]
    for claimed, part in sorted(named, key=lambda one: one[0] is not None):  # runs without a given name come first
        form = forms.get(part.key)
        if claimed is not None:
            _check_claim(claimed, part, form, forms.values())
        elif form is None:
            _check_model(part, forms.values())
        if form is None:
            form = forms[part.key] = Form(claimed or part.name, part.held, part.run)
        form.judged |= part.judged
        remarks += part.remarks
        for cell in part.cells:
            if cell.column not in form.cells:
                form.cells[cell.column] = cell
            elif cell.column.quantity != "weight_bytes":
                remarks.append(
                    f"{cell.column.quantity} of {form.name} was also measured by {cell.run}; "
                    f"{form.cells[cell.column].run} counts, which comes first."
                )
    return list(_told_apart(forms.values())), remarks


def change(cell: Cell, base: Cell) -> tuple[float, float, float]:
    """Compute the difference between a cell and the cell of the baseline: estimate, low, high.

    The difference is paired over samples, documents or tokens if both runs read the same ones. Otherwise the estimates
    are independent, and their intervals are combined as in Zou and Donner 2008 (doi:10.1002/sim.3095).
    """
    if cell is base:
        return 0.0, 0.0, 0.0
    if isinstance(cell.data, Log) and isinstance(base.data, Log):
        table = compare_logs(base.data, cell.data).table
        row = table[table["protocol"] == cell.column.setting.partition(",")[0]].iloc[0]
        return _bounded(row["difference"], row["ci_low"], row["ci_high"])
    if isinstance(cell.data, Trace) and isinstance(base.data, Trace):
        ratio = next_tokens(base.data, cell.data).sel(measure="perplexity_ratio")
        return _scaled(base.estimate, *(float(ratio[name]) for name in ("estimate", "ci_low", "ci_high")))
    if cell.change is not None and cell.run == base.run:
        return cell.change
    difference = cell.estimate - base.estimate
    return (
        difference,
        difference - np.hypot(cell.estimate - cell.low, base.high - base.estimate),
        difference + np.hypot(cell.high - cell.estimate, base.estimate - base.low),
    )


def _parts(run: Any, name: str | None, hourly: Mapping[str, float]) -> Iterator[_Part]:
    if isinstance(run, Pareto) and name is None:
        yield from _of_pareto(run)
    elif isinstance(run, Impact) and name is None:
        yield from _of_impact(run)
    elif isinstance(run, Judgement):
        yield from _of_judgement(run, alone=name is not None)
    elif isinstance(run, Log):
        yield _part(run, run.meta["model"], _scores(run))
    elif isinstance(run, Bench):
        for part in run.configurations().values():
            made = _part(run, part.meta["model"] | _endpoint(part), _speeds(part, _called(run), hourly))
            yield replace(made, remarks=_passed_over(made.name, _called(run)) if _any_loop(part) else ())
    elif isinstance(run, Trace):
        settings = run.meta.get("settings", {})
        yield _part(run, settings.get("model", {}) | {"edits": settings.get("edits")}, _perplexity(run))
    else:
        several = name is not None and isinstance(run, Pareto | Impact)
        raise BadInput(
            f"Cannot decide by {_called(run)}: "
            + (
                f"it holds several forms, but was given the name {name!r}. Leave out the name."
                if several
                else "it is not a recording, evaluation, benchmark, impact or Pareto run, or judgement. Pass one."
            ),
            argument="runs",
            value=_called(run),
        )


def _part(run: Any, held: Mapping[str, Any], cells: Iterable[Cell]) -> _Part:
    if endpoint := held.get("endpoint"):
        return _Part(_called(run), held, tuple(cells), f"{_tail(endpoint['model'])} at {provider_at(endpoint['url'])}")
    weighed = _exact("weight_bytes", _bytes(held), _called(run))
    return _Part(_called(run), held, (*weighed, *cells), _label(held))


def _of_pareto(run: Pareto) -> Iterator[_Part]:
    plan = {} if run.path is None else open_run(run.path, check=False).plan
    speed = plan.get("speed", {})
    load = f"batch 1, {speed.get('prompt_tokens')} + {speed.get('output_tokens')} tokens, {run.meta['machine']}"
    settings = dict.fromkeys(("ttft_s", "tpot_s"), load) | {"weight_bytes": ""}
    original = run.schemes[0]
    for scheme in run.schemes:
        rows = run.table[run.table["scheme"] == scheme].replace({"quantity": {"bytes": "weight_bytes"}})
        by_quantity = {row["quantity"]: row for row in rows.to_dict("records")}
        ratio = np.exp(_numbers(by_quantity["loss_difference"])) if "loss_difference" in by_quantity else None
        cells = []
        loops = in_a_loop(run.meta["schemes"][scheme])
        for quantity, row in by_quantity.items():
            if quantity not in QUANTITIES or (quantity in _SPEEDS and loops):
                continue
            column = Column.of(quantity, settings.get(quantity, _corpus(plan)))
            exact = run.exact(scheme, "bytes" if quantity == "weight_bytes" else quantity)
            low, high = (row["estimate"],) * 2 if exact else (row["ci_low"], row["ci_high"])
            cell = Cell(column, *_bounded(row["estimate"], low, high), int(row["n"]), _called(run))
            if quantity == "perplexity" and ratio is not None and scheme != original:
                cell = replace(cell, change=_scaled(row["estimate"] / ratio[0], *ratio))
            cells.append(cell)
        timed = loops and not by_quantity.keys().isdisjoint(_SPEEDS)
        remarks = _passed_over(scheme, _called(run)) if timed else ()
        yield _Part(_called(run), run.meta["schemes"][scheme], tuple(cells), scheme, remarks=remarks)


def _of_impact(run: Impact) -> Iterator[_Part]:
    quality, setting, called = run.quality(), _corpus({} if run.path is None else open_run(run.path).plan), _called(run)

    def cell(quantity: str, measure: str) -> Cell:
        found = quality.sel(measure=measure)
        return Cell(Column.of(quantity, setting), *_of_dataset(found), int(found.n), called)

    exact = {"loss_difference": 0.0, "kl": 0.0, "same_top": 1.0}
    first = [Cell(Column.of(q, setting), value, value, value, int(quality.n), called) for q, value in exact.items()]
    ratio = _of_dataset(quality.sel(measure="perplexity_ratio"))
    perplexity = replace(
        cell("perplexity", "perplexity_b"), change=_scaled(float(quality.estimate.sel(measure="perplexity_a")), *ratio)
    )
    yield _part(run, run.meta["model"], [cell("perplexity", "perplexity_a"), *first])
    yield _part(run, run.meta["other"], [perplexity, *(cell(quantity, quantity) for quantity in exact)])


def _of_judgement(run: Judgement, *, alone: bool) -> Iterator[_Part]:
    """Yield the changed model with its worst losses, and before it the original unless `alone` is set."""
    before, after = ({**run.meta[side], "endpoint": None} for side in ("before", "after"))
    text = f"judged by {', '.join(f'{kind} within {limit:g}' for kind, limit in sorted(run.limits.items()))}"
    sides: list[list[Cell]] = [[], []]
    for kind, quantity in ((TEXT, "worst_loss_change"), (SCORE, "worst_score_change")):
        rows = run.table[run.table["kind"] == kind]
        if len(rows):
            row = rows.to_dict("records")[0]  # the worst
            read = run.meta["documents"] if kind == TEXT else {"input_sha256": sorted(rows["group"])}
            column = Column.of(quantity, f"worst of {len(rows)}, {_corpus(read)}")
            sides[0].append(Cell(column, 0.0, 0.0, 0.0, int(row["n"]), _called(run)))
            sides[1].append(Cell(column, *_bounded(*_numbers(row)), int(row["n"]), _called(run)))
    experts = [held.get("experts") for held in (before, after)]
    if not alone:
        yield replace(_part(run, before, sides[0]), judged={text: DO})
    part = _part(run, after, sides[1])
    name = part.name if experts[0] == experts[1] else f"{part.name}, {experts[1]} of {experts[0]} experts"
    yield replace(part, name=name, judged={text: run.verdict})


def _scores(log: Log) -> Iterator[Cell]:
    """Yield the primary metric of every benchmark and protocol, with one column per set of samples."""
    by_task = {str(task): frame for task, frame in log.samples.groupby("task")}
    for row in primary_rows(log.scores, log.meta["tasks"]):
        members = [name for name, about in log.meta["tasks"].items() if about["protocol"] == row["protocol"]]
        asked = sorted(hash_ for name in members for hash_ in by_task[name]["doc_hash"])
        how = log.meta["tasks"][members[0]]["metrics"][row["metric"]]
        samples = f"{row['protocol']}, {len(asked):,} samples {sha256(''.join(asked).encode()).hexdigest()[:6]}"
        whole = how["aggregation"] in ("mean", "nanmean") and 0 <= row["score"] <= 1
        unit = "fraction" if whole else ""
        column = Column(str(row["benchmark"]), "quality", bool(how.get("higher_is_better", True)), unit, samples)
        yield Cell(
            column, *_bounded(row["score"], row["ci_low"], row["ci_high"]), int(row["n"]), _called(log), data=log
        )


def _speeds(bench: Bench, called: str, hourly: Mapping[str, float]) -> Iterator[Cell]:
    local = bench.meta.get("local", {})

    def where(level: str) -> list[str]:
        how = [name for name in ("recording", "static_cache") if local.get(name)]
        how += ["compiled"] if compiled_at(level, local) else []
        return [*how, bench.meta["machine"]["name"]] if "machine" in bench.meta else []

    medians = bench.table().query("statistic == 'p50'")
    for row in medians[medians["metric"].isin(_SPEEDS)].to_dict("records"):
        column = Column.of(row["metric"], ", ".join([row["level"], *where(row["level"])]))
        if row["estimate"] == row["estimate"] and not _loops(bench, row["level"]):
            yield Cell(column, *_bounded(row["estimate"], row["ci_low"], row["ci_high"]), int(row["n"]), called)
    for level, peaks in groupby(bench.peak_memory().itertuples(index=False, name=None), key=lambda row: row[0]):
        _, memory, held, n = next(peaks)  # device memory comes before process memory
        setting = ", ".join([level, memory.removeprefix("peak_").removesuffix("_bytes"), *where(level)])
        yield from _exact("memory_bytes", held, called, setting, n)
    yield from _price(bench, called, hourly)


def _any_loop(bench: Bench) -> bool:
    return any(_loops(bench, record.level) for record in bench.records)


def _loops(bench: Bench, level: str) -> bool:
    return in_a_loop(bench.meta.get("model", {})) and not compiled_at(level, bench.meta.get("local", {}))


def _passed_over(name: str, run: str) -> tuple[str, ...]:
    return (f"Speeds of {name} in {run} do not count: its experts ran in a Python loop, which determined the speed.",)


def _price(bench: Bench, called: str, hourly: Mapping[str, float]) -> Iterator[Cell]:
    """Yield the cost per million tokens of the workload, from the hourly price of its machine or the list price."""
    usd_per_hour = hourly.get(place(bench))
    if usd_per_hour is not None and _any_loop(bench):  # a price by the hour depends on the speed, which is invalid
        return
    price = listed(bench) if usd_per_hour is None else rented(bench, usd_per_hour)
    if price is not None:
        column = Column.of("usd_per_mtok", price.workload)
        yield Cell(column, price.usd, price.low, price.high, price.n, f"{called}, {price.source}")


def _perplexity(trace: Trace) -> Iterator[Cell]:
    if "logprob" in trace.signals:
        found = next_tokens(trace, trace).sel(measure="perplexity_a")
        column = Column.of("perplexity", _corpus(trace.meta.get("settings", {})))
        yield Cell(column, *_of_dataset(found), int(found.n), _called(trace), data=trace)


def _exact(quantity: str, value: float | None, run: str, setting: str = "", n: int = 1) -> Iterator[Cell]:
    if value is not None:
        yield Cell(Column.of(quantity, setting), float(value), float(value), float(value), n, run)


def _corpus(plan: Mapping[str, Any]) -> str:
    """Describe the documents and how they were read."""
    told = [plan.get(name) for name in ("input_sha256", "tokenizer_sha256", "max_length", "overlong")]
    return f"{plan.get('documents')} documents {sha256(str(told).encode()).hexdigest()[:6]}"


def _check_model(part: _Part, forms: Iterable[Form]) -> None:
    """Raise BadInput if a form is of another model or revision than earlier forms, or has almost the same weights.

    Forms that differ in nothing but the checksum were meant as one form.
    """
    for form in forms:
        at_server = "endpoint" in part.held or "endpoint" in form.held
        differs = [what for what in WEIGHTS if _said(what, form.held) != _said(what, part.held)]
        alike = differs == ["checksum of the weights"] and _bytes(form.held) == _bytes(part.held)
        wrong = [what for what in differs if what == "model" or (what == "revision" and not at_server)]
        if wrong or (alike and form.run != part.run):
            what = (wrong or differs)[0]
            raise BadInput(
                f"Cannot decide between forms of one model: {what} of {part.run} is "
                f"{_said(what, part.held) or 'unknown'}, and {_said(what, form.held) or 'unknown'} where {form.name} "
                f"was measured in {form.run}. Leave one out, or name alternatives, as in NAME=RUN.",
                argument="runs",
                value=what,
            )


def _check_claim(claimed: str, part: _Part, form: Form | None, forms: Iterable[Form]) -> None:
    """Raise BadInput if a run is given the name of a form but has the weights of another."""
    called = next((one for one in forms if one.name == claimed), None)
    if called is not None and called is not form:
        differs = [what for what in WEIGHTS if _said(what, called.held) != _said(what, part.held)]
        what = differs[0] if differs else "the server"
        raise BadInput(
            f"Cannot take {part.run} for {claimed}: {what} is {_said(what, part.held) or 'unknown'}, and "
            f"{_said(what, called.held) or 'unknown'} where {claimed} was measured. Measure the model as it was loaded "
            "there, or give the run the name of its own form.",
            argument="runs",
            value=what,
        )
    label = str(WEIGHTS["quantization"](part.held) or "")
    held_as = claimed.partition("-")[0]
    if (form is not None and form.name != claimed) or (held_as in _PRECISIONS and label and held_as != label):
        own = label if form is None else form.name
        raise BadInput(
            f"Cannot take {part.run} for {claimed}: its weights are those of {own}. Call it {own}, or leave out the "
            "name.",
            argument="runs",
            value="quantization",
        )


def _said(what: str, held: Mapping[str, Any]) -> Any:
    if what not in WEIGHTS:
        return str(held.get("endpoint", ""))
    said = WEIGHTS[what](held)
    return canonical(str(said)).lower() if what == "model" and said is not None else said


def _told_apart(forms: Iterable[Form]) -> Iterator[Form]:
    """Yield the forms, and append an identifier of the weights to names that occur more than once."""
    known = list(forms)
    names = [form.name for form in known]
    for form in known:
        if names.count(form.name) > 1:
            form.name += f" ({str(form.held.get('weights_checksum') or form.held.get('endpoint'))[:8]})"
        yield form


def _bytes(held: Mapping[str, Any]) -> int | None:
    return (held.get("audit") or {}).get("bytes")


def _label(held: Mapping[str, Any]) -> str:
    name = str(WEIGHTS["quantization"](held) or _tail(str(held.get("name", "model"))))
    return ", ".join([name, *map(str, WEIGHTS["edits"](held))])


def _endpoint(bench: Bench) -> dict[str, Any]:
    return {"endpoint": bench.meta["endpoint"]} if "endpoint" in bench.meta else {}


def _tail(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]


def _called(run: Any) -> str:
    path = getattr(run, "path", None)
    return str(path) if path is not None else f"a {type(run).__name__} in memory"


def _numbers(row: Mapping[Any, Any]) -> np.ndarray:
    return np.array([row[name] for name in ("estimate", "ci_low", "ci_high")], float)


def _of_dataset(cell: Any) -> tuple[float, float, float]:
    return _bounded(*(float(cell[name]) for name in ("estimate", "ci_low", "ci_high")))


def _bounded(estimate: float, low: float, high: float) -> tuple[float, float, float]:
    """Return estimate and bounds, with infinity for an unknown bound."""
    return float(estimate), -np.inf if low != low else float(low), np.inf if high != high else float(high)


def _scaled(base: float, ratio: float, low: float, high: float) -> tuple[float, float, float]:
    """Convert a ratio to a baseline into a difference in units of the baseline."""
    return _bounded(base * (ratio - 1), base * (low - 1), base * (high - 1))
