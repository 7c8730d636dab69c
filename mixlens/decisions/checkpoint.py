"""save: write a model as a checkpoint that plain transformers loads, with a model card."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from mixlens.core.files import check_space, disk_errors, sync
from mixlens.core.run_dir import now, versions
from mixlens.decisions.pruning import RECORD, WithMeans, refuse_edited
from mixlens.errors import BadInput, ModelError, RunError, visible
from mixlens.models.hub import tokenizer_beside
from mixlens.models.layout import moe_layers, refuse_sharded, top_k, unwrapped
from mixlens.models.load import progress_bar
from mixlens.models.provenance import audit, describe, weights_checksum
from mixlens.stats.judgement import Judgement


def save(model: nn.Module, folder: str | os.PathLike[str], *, judgement: Judgement | None = None) -> Path:
    """Save a model as safetensors with the Hub's parameter names for its family, its tokenizer and a model card.

    ``AutoModelForCausalLM.from_pretrained(folder)`` and ``ml.load(folder, quantization=...)`` then give the same model.
    The folder is written completely or not at all.

    Parameters
    ----------
    model : torch.nn.Module
        A model made by `prune`, or any other model that is not quantized.
    folder : str or os.PathLike
        A new or empty folder.
    judgement : Judgement, optional
        Result of `judge` for this model, for the card.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ModelError
        If the model is quantized, sharded, offloaded or under edits, or has means in place of experts, which no
        checkpoint of its family supports.
    BadInput
        If the judgement is of another model.
    RunError
        If the folder is not empty, or cannot be written.

    Examples
    --------
    >>> smaller = ml.decisions.prune(model, {layer: range(6) for layer in range(8)})
    >>> folder = ml.decisions.save(smaller, tmp / "six-experts")
    >>> ml.load(folder, verbose=False).config.num_local_experts
    6
    """
    inner: Any = unwrapped(model)
    _refuse(inner)
    if judgement is not None and judgement.meta["after"]["weights_checksum"] != weights_checksum(inner):
        raise BadInput(
            "Cannot save the model with this judgement: it is of other weights. Judge this model, or leave "
            "judgement= out.",
            argument="judgement",
            value=judgement.meta["after"]["name"],
        )
    path = Path(folder)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise RunError(
            f"Cannot save a model to {path}: the folder is not empty. Choose a new folder.",
            argument="folder",
            value=str(path),
        )
    check_space(path, audit(inner).bytes)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=".mixlens-") as work, progress_bar(shown=False):
            whole = Path(work) / "model"
            inner.save_pretrained(whole)
            with suppress(OSError, ValueError):  # the model has no tokenizer
                tokenizer_beside(inner).save_pretrained(whole)
            (whole / "README.md").write_text(visible(_card(inner, judgement)), "utf-8")
            sync(sorted(whole.iterdir()))
            if path.exists():
                path.rmdir()
            os.replace(whole, path)
            sync([path.parent])
    return path


def _refuse(model: Any) -> None:
    refuse_sharded(model, "save the model")
    refuse_edited(model, "save")
    if any(isinstance(layer.moe.experts, WithMeans) for layer in moe_layers(model)):
        raise ModelError(
            "Cannot save a model with means in place of experts: checkpoints of its family do not support them. "
            "Prune without means=.",
            argument="means",
            value=type(model).__name__,
        )
    held = sorted(set(audit(model).table["scheme"]) - {"float32", "bfloat16", "float16"})
    if held or any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(
            f"Cannot save this model: its weights are {', '.join(held) or 'offloaded'}. Prune and save the original, "
            "loaded whole and without quantization; quantize when you load it again.",
            argument="quantization",
            value=held,
        )


def _card(model: Any, judgement: Judgement | None) -> str:
    made, described = getattr(model.config, RECORD, None), describe(model)
    name = described["name"] if made is None else made["from"]
    on_hub = name.count("/") == 1 and not Path(name).exists()
    front = ["library_name: transformers", *([f"base_model: {name}"] if on_hub else []), "tags:", "- moe", "- mixlens"]
    used = ", ".join(f"{package} {version}" for package, version in versions("transformers", "torch").items())
    lines = [
        *("---", *front, *(["- pruned"] if made else []), "---", ""),
        f"# {name}" + (", with fewer experts" if made else ""),
        "",
        f"Saved by mixlens on {now()[:10]} (with {used}), {described['parameters']:,} parameters in "
        f"{described['dtype']}. The licence is that of {name}.",
        "",
    ]
    if made is not None:
        at, kept = f" at {made['revision']}" if made["revision"] else "", len(next(iter(made["kept"].values())))
        lines += [
            f"Made from {name}{at}: each layer keeps {kept} of {made['experts']} experts, of which a token chooses "
            f"{max(top_k(model).values())}. `{RECORD}` in config.json has the numbers that they had there, by layer.",
            "",
        ]
    lines += ["```python", "from transformers import AutoModelForCausalLM", ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")', "```", "", "## What it lost", ""]
    if judgement is None:
        return "\n".join([*lines, "Not measured. `mixlens.decisions.judge` compares it with the original.", ""])
    rows = judgement.overview().astype(str).apply(lambda column: column.str.replace("|", " "))
    table = [list(rows.columns), ["---"] * len(rows.columns), *rows.to_numpy().tolist()]
    lines += [judgement.reason, "", *(f"| {' | '.join(row)} |" for row in table)]
    return "\n".join([*lines, "", *judgement.remarks(), ""])
