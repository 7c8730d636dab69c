"""The commands mixlens eval and mixlens data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from mixlens.errors import BadInput, ModelError, RunError


def add_commands(add: Callable[[str, Callable[..., Any], str], argparse.ArgumentParser]) -> None:
    """Declare both; `add` makes the parser of a command from its name, what runs it, and what it does."""
    run = add("eval", _eval, "score a model on benchmarks, by protocol")
    run.add_argument("model", nargs="?", help='Hub id, folder, "demo", or the name that --url knows it by')
    run.add_argument("tasks", nargs="*", help="benchmarks, protocols, suites, or tasks of lm-eval")
    run.add_argument("--list", action="store_true", help="name the protocols and suites, and end")
    run.add_argument("--protocol", help="suite or protocol that says how a benchmark is asked")
    run.add_argument("--out", help="run directory; a stopped one goes on (default: out/eval-DATE-TIME)")
    run.add_argument("--data", metavar="DIR", help="benchmarks in their original formats (default: from the Hub)")
    pinned = "branch, tag or commit of a data set on the Hub"
    run.add_argument("--data-revision", action="append", default=[], metavar="NAME=REVISION", help=pinned)
    run.add_argument("--limit", type=int, metavar="N", help="only the first N documents of every task")
    run.add_argument("--batch-size", type=int, default=8, help="rows of a forward (default: %(default)s)")
    run.add_argument("--seed", type=int, default=0, help="of sampled answers (default: %(default)s)")
    run.add_argument("--device-map", help='as in accelerate, such as "auto" or "cpu"')
    run.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    run.add_argument("--quantization", help="scheme, such as nf4")
    run.add_argument("--revision", help="branch, tag or commit on the Hub")
    run.add_argument(
        "--backend", choices=("transformers", "vllm"), default="transformers", help="(default: %(default)s)"
    )
    run.add_argument("--vllm-args", metavar="NAME=VALUE,...", help="for --backend vllm, as in tensor_parallel_size=2")
    run.add_argument("--url", help="address of an endpoint, as in http://127.0.0.1:8000/v1")
    run.add_argument("--url-protocol", default="openai-completions", help="of the endpoint (default: %(default)s)")
    run.add_argument("--key-env", metavar="NAME", help="environment variable that holds the endpoint's key")

    data = add("data", _data, "verify a folder of benchmark data")
    data.add_argument("action", choices=("verify",))
    data.add_argument("folder", metavar="DIR")


def _eval(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from mixlens.evals.protocols import protocol_names, suites

    if arguments.list:
        return {"protocols": protocol_names(), "suites": {k: sorted(v.values()) for k, v in suites().items()}}
    if arguments.model is None or not arguments.tasks:
        raise BadInput(
            "An evaluation was asked for. Model or tasks are missing. Give both, as in mixlens eval demo mmlu, "
            "or --list.",
            argument="model",
        )
    from mixlens.evals.references import beside
    from mixlens.evals.runner import EvalSettings, job_of, run

    out = arguments.out or f"out/eval-{datetime.now():%Y%m%d-%H%M%S}"
    settings = EvalSettings(
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        revisions=_revisions(arguments.data_revision),
        progress=not arguments.json,
    )
    chosen = {name: getattr(arguments, name) for name in ("protocol", "data", "limit")}
    log = run(partial(_model, arguments), job_of(arguments.tasks, **chosen, settings=settings), out, settings)
    published = beside(log)
    if arguments.json:
        tables = {"scores": log.scores, "published": published}
        return {"run": out, **{name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}}
    print(log)
    if published["published"].notna().any():
        shown = published[["benchmark", "protocol", "score", "published", "comparable", "why_not", "source"]]
        print(f"\n{shown.to_string(index=False, float_format=lambda value: f'{value:.1f}')}")
    print(f"run: {out}")
    return None


def _revisions(given: list[str]) -> dict[str, str]:
    pairs = [one.partition("=") for one in given]
    if wrong := [one for one, (name, _, revision) in zip(given, pairs, strict=True) if not (name and revision)]:
        raise BadInput(
            f"--data-revision {wrong[0]} was given. It names no data set or no revision. Write it as in "
            "--data-revision openai/gsm8k=main.",
            argument="--data-revision",
            value=wrong[0],
        )
    return {name: revision for name, _, revision in pairs}


def _model(arguments: argparse.Namespace) -> Any:
    if arguments.url is not None:
        from mixlens.endpoints.endpoint import Endpoint

        return Endpoint(
            arguments.url, model=arguments.model, protocol=arguments.url_protocol, key_env=arguments.key_env
        )
    if arguments.backend == "vllm":
        return _vllm(arguments)
    from mixlens.models.load import load

    quantized = {"quantization": arguments.quantization} if arguments.quantization else {}
    return load(
        arguments.model,
        device_map=arguments.device_map,
        dtype=arguments.dtype,
        revision=arguments.revision,
        verbose=not arguments.json,
        **quantized,
    )


def _vllm(arguments: argparse.Namespace) -> Any:
    """lm-eval's own vLLM model. It can raise anything, from far inside, when it cannot start."""
    from mixlens.models.demo import DEMO, demo_path

    asked = f"{arguments.model} was to be evaluated by vLLM"
    if arguments.quantization or arguments.device_map:
        raise BadInput(
            f"{asked}. --quantization and --device-map are of transformers. Say it in vLLM's words, as in "
            "--vllm-args quantization=awq,tensor_parallel_size=2.",
            argument="--vllm-args",
        )
    pretrained = demo_path() if arguments.model == DEMO else arguments.model
    given = {"pretrained": pretrained, "revision": arguments.revision, "dtype": arguments.dtype}
    words = [f"{name}={value}" for name, value in given.items() if value]
    try:
        from lm_eval.models.vllm_causallms import VLLM

        return VLLM.create_from_arg_string(",".join([*words, *filter(None, [arguments.vllm_args])]))
    except ImportError as error:
        raise BadInput(
            f"{asked}. It cannot be imported ({error}). Install vllm, or leave --backend out.",
            argument="--backend",
            value="vllm",
        ) from error
    except Exception as error:
        raise ModelError(
            f"{asked}. It did not start: {type(error).__name__}: {str(error).strip()[:300]}. See what it printed "
            "above, and give what it needs by --vllm-args.",
            argument="--backend",
            value="vllm",
        ) from error


def _data(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from mixlens.evals.verify import verify

    table = verify(Path(arguments.folder))
    wrong = table[table["fault"] != ""]
    if len(wrong):
        told = "; ".join(f"{row.file}: {row.fault}" for row in wrong.itertuples())
        raise RunError(
            f"Benchmark data in {arguments.folder} was to be verified. {len(wrong)} of {len(table)} are at fault: "
            f"{told}. Get the files again from where they were released.",
            argument="data",
            value=len(wrong),
        )
    if arguments.json:
        return {"folder": arguments.folder, "files": json.loads(table.to_json(orient="records"))}
    print(table.drop(columns="fault").to_string(index=False))
    return None
