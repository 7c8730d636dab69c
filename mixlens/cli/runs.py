"""The commands `record`, `stats`, `contrast`, `report`, `info`, `compare` and `demo`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mixlens.cli.app import Result, app
from mixlens.cli.options import Integers, Loading, Output, Reading, Signals
from mixlens.cli.tables import check_csv, rows_of, statistic
from mixlens.core.run_dir import check_out
from mixlens.errors import BadInput, RunError

Statistic = Literal[
    "expert_share",
    "load_balance",
    "load_entropy",
    "routing_entropy",
    "router_confidence",
    "repetition",
    "coactivation",
    "transitions",
    "position_profile",
    "domain_specialization",
    "domain_information",
    "domain_distance",
    "vocabulary_specialization",
    "predictability",
]


@app.command
def record(
    model: str,
    documents: list[str],
    /,
    *,
    out: str,
    signals: Signals = ("router_logits", "logprob"),
    dry_run: bool = False,
    like: str | None = None,
    reading: Reading = Reading(),
    loading: Loading = Loading(),
    output: Output = Output(),
) -> Result:
    """Record the routing of a corpus into a run directory.

    Parameters
    ----------
    model
        Hub id, folder, or "demo".
    documents
        Files of JSON, JSON Lines, CSV, TSV, Parquet, Arrow or text, folders, - for standard input, or owner/name on the
        Hub.
    out
        Run directory. An interrupted run there is resumed.
    signals
        router_logits, logprob, top_logprobs, or sites such as moe_out.
    dry_run
        Load no weights and write nothing; print numbers of tokens and batches, and the bytes on disk and of weights.
    like
        With --dry-run: an earlier recording of the model on this machine, to estimate the time from.
    """
    if like is not None and not dry_run:
        raise BadInput(
            "Cannot use --like: it applies only with --dry-run, which estimates the time from an earlier recording. "
            "Add --dry-run, or leave it out.",
            argument="--like",
            value=like,
        )
    check_out(out, "trace")
    texts = reading.documents(documents)
    from mixlens.recording.corpus import RecordSettings
    from mixlens.recording.record import record

    settings = reading.settings(RecordSettings(), output)
    if dry_run:
        return _dry_run(model, texts, out, signals, settings, loading, like)
    trace = record(loading.load(model, output), texts, out=out, signals=signals, settings=settings)
    return Result({"run": out, **trace.meta["counts"], "signals": [*trace.signals, *trace.sites]})


def _dry_run(
    model: str, texts: Any, out: str, signals: Any, settings: Any, loading: Loading, like: str | None
) -> Result:
    import shutil

    import torch

    from mixlens.recording.corpus import default_batch_tokens
    from mixlens.recording.estimate import estimate
    from mixlens.trace.trace import Trace

    made = loading.skeleton(model)
    on_cpu = loading.device_map == "cpu" or not torch.accelerator.is_available()
    settings = replace(settings, batch_tokens=settings.batch_tokens or default_batch_tokens(on_cpu=on_cpu))
    found = estimate(made, texts, signals=signals, settings=settings, like=None if like is None else Trace.open(like))
    there = next(folder for folder in (Path(out), *Path(out).absolute().parents) if folder.exists())
    found["free_bytes"] = shutil.disk_usage(there).free
    if found["disk_bytes"] > found["free_bytes"]:
        raise RunError(
            f"Cannot record into {out}: the run takes up to {found['disk_bytes']:,} bytes, but only "
            f"{found['free_bytes']:,} are free. Choose another disk, or fewer signals.",
            argument="out",
            value=found["disk_bytes"],
        )
    lines = [f"{name:<16}  {'n/a' if value is None else format(value, ',.0f')}" for name, value in found.items()]
    notes = ["disk_bytes: at most; weight_bytes: without quantization; seconds: from the rate of --like, if given."]
    return Result({"dry_run": True, **found}, "\n".join([*lines, *notes]))


@app.command
def stats(
    run: str,
    name: Statistic,
    /,
    *,
    by: str | None = None,
    cluster: str | None = None,
    layers: Integers | None = None,
    csv: str | None = None,
    output: Output = Output(),
) -> Result:
    """Print a statistic of a run with intervals and n.

    Parameters
    ----------
    run
        Run directory.
    name
        Name of the statistic.
    by
        Column of the sequences to group by, such as domain.
    cluster
        Column whose values are independent if documents are not, such as author.
    layers
        Only these layers.
    csv
        Write the table to this file instead of printing it.
    """
    from mixlens import stats
    from mixlens.trace.trace import Trace

    check_csv(csv)
    trace = Trace.open(run)
    if layers:
        trace = trace.select(layers=list(layers))
    return statistic(getattr(stats, name)(trace, cluster=cluster, **({"by": by} if by else {})), csv=csv)


@app.command
def contrast(
    run: str,
    name: Statistic,
    /,
    *,
    by: str,
    a: str,
    b: str | None = None,
    cluster: str | None = None,
    layers: Integers | None = None,
    csv: str | None = None,
    out: str | None = None,
    output: Output = Output(),
) -> Result:
    """Test where a statistic differs between two conditions, corrected for multiple comparisons.

    Parameters
    ----------
    run
        Run directory.
    name
        Name of the statistic.
    by
        Column of the documents that defines the conditions.
    a
        Value of the first condition.
    b
        Value of the second condition. By default all other documents.
    cluster
        Column whose values are independent if documents are not, such as author.
    layers
        Only these layers.
    csv
        Write the table to this file instead of printing it.
    out
        HTML file for figure, table and methods.
    """
    from mixlens import stats
    from mixlens.reports.report import check_path, report
    from mixlens.trace.trace import Trace

    check_csv(csv)
    if out is not None:
        check_path(out)
    trace = Trace.open(run)
    if layers:
        trace = trace.select(layers=list(layers))
    values = {str(value): value for value in trace.sequences[by].unique()} if by in trace.sequences else {}
    first, second = values.get(a, a), None if b is None else values.get(b, b)
    found = stats.contrast(trace, getattr(stats, name), by=by, a=first, b=second, cluster=cluster)
    if out is not None:
        report(found, out)
    return statistic(found, csv=csv)


@app.command
def report(
    runs: list[str],
    /,
    *,
    out: str = "report.html",
    names: list[str] | None = None,
    by: str | None = None,
    output: Output = Output(),
) -> Result:
    """Write an HTML report about one or more runs.

    Parameters
    ----------
    runs
        Run directories.
    out
        File to write.
    names
        A name for each run, instead of the name of its folder.
    by
        Column of the documents to group recordings by. By default domain, or else a column with few values.
    """
    from mixlens.reports.report import report

    return Result({"report": str(report(runs if len(runs) > 1 else runs[0], out, names=names, by=by))})


@app.command
def info(run: str | None = None, /, *, verify: bool = False, output: Output = Output()) -> Result:
    """Describe a run, or the installed versions.

    Parameters
    ----------
    run
        Run directory. By default versions and devices are shown.
    verify
        Check every file of the run against its checksum.
    """
    from mixlens.core.run_dir import open_run, versions

    if run is None:
        import torch

        installed = versions("mixlens", "torch", "transformers", "accelerate", "datasets", "safetensors")
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Result({**installed, "devices": names or ["cpu"]})
    opened = open_run(run)
    if verify and (faults := opened.verify()):
        raise RunError(
            f"The run {run} is damaged: {len(faults)} of its {len(opened.meta['files'])} files are faulty: "
            f"{'; '.join(faults)}. Restore them from a copy, or record again into a new folder.",
            argument="path",
            value=len(faults),
        )
    names = ("kind", "created", "model", "counts", "signals", "sites", "versions")
    held = {key: opened.meta[key] for key in names if key in opened.meta}
    return Result({**held, "files": len(opened.meta["files"]), **({"verified": True} if verify else {})})


@app.command
def compare(a: str, b: str, /, *, output: Output = Output()) -> Result:
    """Compare two runs of the same kind.

    Parameters
    ----------
    a
        Run directory.
    b
        Run directory with the same tokens, samples or load.
    """
    from mixlens.comparison import Comparison, compare

    found = compare(a, b)
    if isinstance(found, Comparison):
        rows = rows_of(found.overview().rename_axis("what").reset_index())
        data: dict[str, Any] = {"runs": list(found.names), "rows": rows, "missing": found.missing()}
    else:
        data = {"runs": [a, b], "rows": rows_of(found.table)}
    return Result(data, repr(found))


@app.command
def demo(*, out: str = "out/demo", output: Output = Output()) -> Result:
    """Record the bundled model on the bundled samples and write a report.

    Parameters
    ----------
    out
        Folder for the run and report.html.
    """
    from mixlens.models.demo import DEMO, demo_documents
    from mixlens.models.load import load
    from mixlens.models.provenance import describe
    from mixlens.recording.corpus import RecordSettings
    from mixlens.recording.record import record
    from mixlens.reports.report import report

    folder = Path(out)
    check_out(folder / "run", "trace")
    model = load(DEMO, verbose=output.progress)
    # Named after the weights, so that a newer demo model does not collide with an older run.
    run = folder / f"run-{str(describe(model)['router_sha256'])[:8]}"
    trace = record(model, demo_documents(), out=run, settings=replace(RecordSettings(), progress=output.progress))
    path = report(trace, folder / "report.html")
    return Result({"run": str(run), "report": str(path), **trace.meta["counts"]})
