"""The commands `eval` and `data`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from mixlens.cli.app import Result, app
from mixlens.cli.options import Loading, Output, Positive, Whole
from mixlens.cli.tables import check_csv, rows_of, written
from mixlens.core.run_dir import check_out
from mixlens.endpoints.protocols import WireProtocol
from mixlens.errors import BadInput, ModelError, RunError


@app.command(name="eval")
def evaluate(
    model: str | None = None,
    tasks: list[str] | None = None,
    /,
    *,
    list: bool = False,
    protocol: str | None = None,
    out: str | None = None,
    data: str | None = None,
    data_revision: Annotated[list[str] | None, Parameter(metavar="NAME=REVISION")] = None,
    limit: Positive | None = None,
    batch_size: Positive = 8,
    seed: Whole = 0,
    shots_seed: Whole = 1234,
    verify_prompts: bool = False,
    backend: Literal["transformers", "vllm"] = "transformers",
    vllm_args: Annotated[str | None, Parameter(metavar="NAME=VALUE,...")] = None,
    url: str | None = None,
    url_protocol: WireProtocol = "openai-completions",
    key_env: str | None = None,
    csv: str | None = None,
    loading: Loading = Loading(),
    output: Output = Output(),
) -> Result:
    """Score a model on benchmarks under fixed protocols.

    Parameters
    ----------
    model
        Hub id, folder, "demo", or the name of the model at --url.
    tasks
        Benchmarks, protocols, suites, or tasks of lm-eval.
    list
        List the protocols and suites, and exit.
    protocol
        Suite or protocol that defines how a benchmark is run.
    out
        Run directory. An interrupted run there is resumed. By default out/eval-DATE-TIME.
    data
        Folder with benchmarks in their original formats. By default they are loaded from the Hub.
    data_revision
        Branch, tag or commit of a data set on the Hub.
    limit
        Only the first N documents of every task.
    batch_size
        Rows per forward pass.
    seed
        Seed of sampled answers.
    shots_seed
        Seed of few-shot examples that a task draws; 1234 gives those of lm-eval.
    verify_prompts
        Show the full first prompt of every task before the first request.
    backend
        Library that runs the model.
    vllm_args
        Arguments for --backend vllm, as in tensor_parallel_size=2.
    url
        Address of an endpoint, such as http://127.0.0.1:8000/v1.
    url_protocol
        Protocol of the endpoint.
    key_env
        Environment variable with the key of the endpoint.
    csv
        Also write the scores to this file.
    """
    from mixlens.evals.protocols import check_tasks, protocol_names, suites

    if list:
        return Result({"protocols": protocol_names(), "suites": {k: sorted(v.values()) for k, v in suites().items()}})
    if model is None or not tasks:
        raise BadInput(
            "Cannot evaluate: model or tasks are missing. Pass both, as in mixlens eval demo mmlu, or --list.",
            argument="model",
        )
    _check_server(url, key_env, backend, vllm_args)
    folder = out or f"out/eval-{datetime.now():%Y%m%d-%H%M%S}"
    check_out(folder, "eval")
    check_csv(csv)
    check_tasks(tasks, protocol)  # before lm-eval and torch are imported, which takes seconds

    from mixlens.evals.published import beside
    from mixlens.evals.runner import EvalSettings, job_of, run

    settings = EvalSettings(
        batch_size=batch_size,
        seed=seed,
        shots_seed=shots_seed,
        verify_prompts=verify_prompts,
        revisions=_revisions(data_revision or []),
        progress=output.progress,
    )
    job = job_of(tasks, protocol=protocol, data=data, limit=limit, settings=settings)
    if url is not None:
        target = partial(_endpoint, url, model, url_protocol, key_env)
    elif backend == "vllm":
        target = partial(_vllm, model, loading, vllm_args)
    else:
        target = partial(loading.load, model, output)
    log = run(target, job, folder, settings)
    if csv is not None:
        written(log.scores, csv)
    published = beside(log)
    text = str(log)
    if published["published"].notna().any():
        shown = published[["benchmark", "protocol", "score", "published", "comparable", "why_not", "source"]]
        text += f"\n\n{shown.to_string(index=False, float_format=lambda value: f'{value:.1f}')}"
    return Result(
        {
            "run": folder,
            "scores": rows_of(log.scores),
            "published": rows_of(published),
            "remarks": log.remarks(),
            "preflight": log.meta.get("preflight", []),
        },
        f"{text}\nrun: {folder}",
    )


data = App("data", help="Verify a folder of benchmark data.")
app.command(data)


@data.command
def verify(folder: str, /, *, output: Output = Output()) -> Result:
    """Check the files of a folder against the released ones.

    Parameters
    ----------
    folder
        Folder with benchmarks in their original formats.
    """
    from mixlens.evals.verify import verify

    table = verify(Path(folder))
    wrong = table[table["fault"] != ""]
    if len(wrong):
        faults = "; ".join(f"{row.file}: {row.fault}" for row in wrong.itertuples())
        raise RunError(
            f"The benchmark data in {folder} is damaged: {len(wrong)} of {len(table)} files are faulty: {faults}. "
            "Download the files again from their source.",
            argument="data",
            value=len(wrong),
        )
    return Result({"folder": folder, "files": rows_of(table)}, table.drop(columns="fault").to_string(index=False))


def _check_server(url: str | None, key_env: str | None, backend: str, vllm_args: str | None) -> None:
    """Raise BadInput for an option of an endpoint or of vLLM without --url or --backend vllm."""
    for option, value, needs, there in (
        ("--key-env", key_env, "--url", url is not None),
        ("--vllm-args", vllm_args, "--backend vllm", backend == "vllm"),
    ):
        if value is not None and not there:
            raise BadInput(
                f"Cannot use {option} {value}: it applies only with {needs}. Add {needs}, or leave it out.",
                argument=option,
                value=value,
            )


def _revisions(given: Sequence[str]) -> dict[str, str]:
    pairs = [one.partition("=") for one in given]
    if wrong := [one for one, (name, _, revision) in zip(given, pairs, strict=True) if not (name and revision)]:
        raise BadInput(
            f"Cannot use --data-revision {wrong[0]}: the data set or the revision is missing. Write it as in "
            "--data-revision openai/gsm8k=main.",
            argument="--data-revision",
            value=wrong[0],
        )
    return {name: revision for name, _, revision in pairs}


def _endpoint(url: str, model: str, protocol: str, key_env: str | None) -> Any:
    from mixlens.endpoints.endpoint import Endpoint

    return Endpoint(url, model=model, protocol=protocol, key_env=key_env)


def _vllm(model: str, loading: Loading, vllm_args: str | None) -> Any:
    """Start lm-eval's vLLM model, turning any exception of vLLM into a ModelError."""
    from mixlens.models.demo import DEMO, demo_path

    cannot = f"Cannot evaluate {model} with vLLM"
    if loading.quantization or loading.device_map:
        raise BadInput(
            f"{cannot}: --quantization and --device-map belong to transformers. Use vLLM's own options, as in "
            "--vllm-args quantization=awq,tensor_parallel_size=2.",
            argument="--vllm-args",
        )
    pretrained = demo_path() if model == DEMO else model
    given = {"pretrained": pretrained, "revision": loading.revision, "dtype": loading.dtype}
    words = [f"{name}={value}" for name, value in given.items() if value]
    try:
        from lm_eval.models.vllm_causallms import VLLM

        return VLLM.create_from_arg_string(",".join([*words, *filter(None, [vllm_args])]))
    except ImportError as error:
        raise BadInput(
            f"{cannot}: it cannot be imported ({error}). Install vllm, or leave out --backend.",
            argument="--backend",
            value="vllm",
        ) from error
    except Exception as error:
        raise ModelError(
            f"{cannot}: it did not start ({type(error).__name__}: {str(error).strip()[:300]}). See its output above, "
            "and pass the arguments that it needs with --vllm-args.",
            argument="--backend",
            value="vllm",
        ) from error
