"""Comparison of tasks with those of stock lm-eval under the same name: differences in prompts and shots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixlens.evals.protocols import Protocol

# Default of lm_eval.simple_evaluate for shots that a task draws.
STOCK_SHOTS_SEED = 1234
_ALWAYS = (
    "output_type",
    "test_split",
    "num_fewshot",
    "description",
    "doc_to_text",
    "doc_to_choice",
    "generation_kwargs",
)
_WITH_SHOTS = ("fewshot_split", "fewshot_config", "doc_to_target", "target_delimiter", "fewshot_delimiter")
_DEFAULTS = {"target_delimiter": " ", "fewshot_delimiter": "\n\n", "description": "", "num_fewshot": 0}


def stock_remarks(
    names: Sequence[str], tasks: Mapping[str, Any], chosen: Mapping[str, Protocol | None], seed: int
) -> list[str]:
    """Return sentences on names with another meaning in lm-eval, and on shots that it would draw differently.

    names   names as passed by the user
    tasks   evaluated lm-eval tasks by name
    chosen  protocol of each task; None for a task from lm-eval itself
    seed    seed of the shots that tasks draw
    """
    drawn = [name for name, task in tasks.items() if chosen[name] is None and _draws(task)]
    found = list(_other_names(names, [p for p in chosen.values() if p is not None]))
    if drawn and seed != STOCK_SHOTS_SEED:
        found.append(
            f"Shots of {', '.join(drawn[:5])}{' ...' if len(drawn) > 5 else ''} are drawn with seed {seed}; lm-eval "
            f"draws with {STOCK_SHOTS_SEED}, and so asks other prompts."
        )
    return found


def _draws(task: Any) -> bool:
    """Check whether a task draws its shots at random."""
    config = task.config.fewshot_config
    sampler = config.get("sampler", "default") if isinstance(config, dict) else "default"
    return bool(task.get_config("num_fewshot")) and sampler != "first_n"


def _other_names(names: Sequence[str], protocols: Sequence[Protocol]) -> Iterator[str]:
    by_benchmark = {str(p.about["benchmark"]): p for p in protocols}
    for name in dict.fromkeys(name.partition("::")[0] for name in names):
        protocol = by_benchmark.get(name)
        if protocol is None or (file := _stock_file(name)) is None:
            continue
        differing = _differing(protocol.config, _config(file))
        if differing:
            yield (
                f"{name} is {protocol.name} here. lm-eval's own task of that name has another "
                f"{', '.join(differing)}; scores of the two are not of one protocol."
            )


def _stock_file(name: str) -> Path | None:
    import lm_eval.tasks

    folder = Path(str(lm_eval.tasks.__file__)).parent
    found = sorted(folder.glob(f"*/{name}.yaml")) or sorted(folder.glob(f"{name}/default/_default_template_yaml"))
    return found[0] if found else None


def _config(file: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(file, resolve_func=False)


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return differing keys that affect prompts and answers; keys of shots only if there are shots."""
    shots = any(config.get("num_fewshot") for config in (ours, theirs))
    return [key for key in _ALWAYS + _WITH_SHOTS * shots if _value(ours, key) != _value(theirs, key)]


def _value(config: Mapping[str, Any], key: str) -> str:
    value = config.get(key)
    if key == "fewshot_split":  # the default of lm-eval
        value = value or config.get("training_split") or config.get("validation_split")
    return str(_DEFAULTS.get(key) if value is None else value)
