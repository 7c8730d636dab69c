"""mixlens: see what every expert of a Mixtral model does.

Names are imported when they are first used, so that importing mixlens is fast and loads neither torch nor pandas.
"""

import warnings
from typing import Any

from mixlens.core.lazy import exports
from mixlens.notebook import register as _register_displays

__version__ = "0.1.0"

_get, __dir__, __all__ = exports(__name__, __file__)

# Names used before 0.1 and where they are now. They keep working for one release.
_MOVED = {
    **dict.fromkeys(("Bench", "BenchSettings", "Limits", "LocalSettings", "Workload", "knee", "load_sweep"), "bench"),
    **dict.fromkeys(("benchmark_configurations", "benchmark_together", "probe"), "bench"),
    **dict.fromkeys(("EvalSettings", "Log", "flipped_routing", "sample_share"), "evals"),
    **dict.fromkeys(("Ablation", "Speed", "expert_outputs", "measure_importance", "measure_topk"), "experiments"),
    **dict.fromkeys(("listed_prices", "provider_table"), "pricing"),
    "Audit": "models.provenance",
    "expert_contributions": "experiments.measure_contributions",
    "expert_similarity": "experiments.measure_similarity",
    "pareto": "experiments.measure_pareto",
    "quantization_impact": "experiments.measure_impact",
    "expert_importance": "experiments.importance",
    "topk_sweep": "experiments.topk",
}
_IN_TWO_STEPS = {
    "expert_importance": "ml.stats.expert_importance(ml.experiments.measure_importance(...))",
    "topk_sweep": "ml.stats.topk_sweep(ml.experiments.measure_topk(...))",
}


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        value = globals()[name] = _get(name)
        return value
    place = _MOVED[name]
    now = place if place.rpartition(".")[2].startswith("measure_") else f"{place}.{name}"
    warnings.warn(
        f"ml.{name} is deprecated and goes with mixlens 0.2; use {_IN_TWO_STEPS.get(name, f'ml.{now}')}.",
        DeprecationWarning,
        stacklevel=2,
    )
    module, _, attribute = now.rpartition(".")
    return _resolve(f"mixlens.{module}", attribute)


def _resolve(module: str, attribute: str) -> Any:
    from importlib import import_module

    return getattr(import_module(module), attribute)


_register_displays()
