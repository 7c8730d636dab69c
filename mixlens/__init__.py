"""mixlens: see what every expert of a Mixtral model does.

Names are loaded when they are first used, so that importing mixlens is fast and imports neither torch nor pandas.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mixlens.notebook import register as _register_displays

if TYPE_CHECKING:
    from mixlens import show, stats, view
    from mixlens.bench.bench import Bench
    from mixlens.bench.configurations import benchmark_configurations
    from mixlens.bench.interleaved import benchmark_together
    from mixlens.bench.knee import knee, load_sweep
    from mixlens.bench.local import LocalSettings
    from mixlens.bench.metrics import Limits
    from mixlens.bench.prompts import Workload
    from mixlens.bench.run import BenchSettings, benchmark
    from mixlens.comparison import Comparison, compare
    from mixlens.endpoints.endpoint import Endpoint
    from mixlens.endpoints.probe import probe
    from mixlens.errors import BadInput, EndpointError, MissingSignal, MixlensError, ModelError, RunError
    from mixlens.evals.log import Log
    from mixlens.evals.routing import flipped_routing, sample_share
    from mixlens.evals.runner import EvalSettings, evaluate
    from mixlens.experiments.contributions import measure_contributions, expert_outputs
    from mixlens.experiments.impact import measure_impact
    from mixlens.experiments.importance import Ablation, expert_importance, measure_importance
    from mixlens.experiments.pareto import Speed, pareto
    from mixlens.experiments.similarity import measure_similarity
    from mixlens.experiments.topk import measure_topk, topk_sweep
    from mixlens.explore import Explorer
    from mixlens.interventions import edits
    from mixlens.interventions.edits import edit
    from mixlens.models.demo import demo_documents
    from mixlens.models.load import load
    from mixlens.models.provenance import Audit, audit
    from mixlens.pricing.providers import listed_prices, provider_table
    from mixlens.recording.compiled import CompiledRecorder
    from mixlens.recording.corpus import RecordSettings
    from mixlens.recording.record import record
    from mixlens.recording.recorder import Recorder
    from mixlens.reports.report import report
    from mixlens.trace.signals import Site
    from mixlens.trace.trace import Trace, concat

    open = Trace.open

__version__ = "0.1.0"

_HOME = {
    "Ablation": "mixlens.experiments.importance",
    "Audit": "mixlens.models.provenance",
    "BadInput": "mixlens.errors",
    "Bench": "mixlens.bench.bench",
    "BenchSettings": "mixlens.bench.run",
    "Comparison": "mixlens.comparison",
    "CompiledRecorder": "mixlens.recording.compiled",
    "Endpoint": "mixlens.endpoints.endpoint",
    "Explorer": "mixlens.explore",
    "EvalSettings": "mixlens.evals.runner",
    "EndpointError": "mixlens.errors",
    "Limits": "mixlens.bench.metrics",
    "LocalSettings": "mixlens.bench.local",
    "Log": "mixlens.evals.log",
    "MissingSignal": "mixlens.errors",
    "MixlensError": "mixlens.errors",
    "ModelError": "mixlens.errors",
    "RunError": "mixlens.errors",
    "RecordSettings": "mixlens.recording.corpus",
    "Recorder": "mixlens.recording.recorder",
    "Site": "mixlens.trace.signals",
    "Speed": "mixlens.experiments.pareto",
    "Trace": "mixlens.trace.trace",
    "Workload": "mixlens.bench.prompts",
    "audit": "mixlens.models.provenance",
    "benchmark": "mixlens.bench.run",
    "benchmark_configurations": "mixlens.bench.configurations",
    "benchmark_together": "mixlens.bench.interleaved",
    "compare": "mixlens.comparison",
    "concat": "mixlens.trace.trace",
    "demo_documents": "mixlens.models.demo",
    "edit": "mixlens.interventions.edits",
    "evaluate": "mixlens.evals.runner",
    "measure_contributions": "mixlens.experiments.contributions",
    "expert_importance": "mixlens.experiments.importance",
    "expert_outputs": "mixlens.experiments.contributions",
    "measure_similarity": "mixlens.experiments.similarity",
    "knee": "mixlens.bench.knee",
    "listed_prices": "mixlens.pricing.providers",
    "flipped_routing": "mixlens.evals.routing",
    "load": "mixlens.models.load",
    "load_sweep": "mixlens.bench.knee",
    "measure_importance": "mixlens.experiments.importance",
    "measure_topk": "mixlens.experiments.topk",
    "open": "mixlens.registry",
    "pareto": "mixlens.experiments.pareto",
    "measure_impact": "mixlens.experiments.impact",
    "probe": "mixlens.endpoints.probe",
    "provider_table": "mixlens.pricing.providers",
    "record": "mixlens.recording.record",
    "report": "mixlens.reports.report",
    "sample_share": "mixlens.evals.routing",
    "topk_sweep": "mixlens.experiments.topk",
    "view": "mixlens.show",
}
_MODULES = {"edits": "mixlens.interventions.edits", "show": "mixlens.show", "stats": "mixlens.stats"}

__all__ = [
    "Ablation",
    "Audit",
    "BadInput",
    "Bench",
    "BenchSettings",
    "Comparison",
    "CompiledRecorder",
    "Endpoint",
    "EndpointError",
    "EvalSettings",
    "Explorer",
    "Limits",
    "LocalSettings",
    "Log",
    "MissingSignal",
    "MixlensError",
    "ModelError",
    "RecordSettings",
    "Recorder",
    "RunError",
    "Site",
    "Speed",
    "Trace",
    "Workload",
    "audit",
    "benchmark",
    "benchmark_configurations",
    "benchmark_together",
    "compare",
    "concat",
    "demo_documents",
    "edit",
    "edits",
    "evaluate",
    "measure_contributions",
    "expert_importance",
    "expert_outputs",
    "measure_similarity",
    "flipped_routing",
    "knee",
    "listed_prices",
    "load",
    "load_sweep",
    "measure_importance",
    "measure_topk",
    "open",
    "pareto",
    "probe",
    "provider_table",
    "measure_impact",
    "record",
    "report",
    "sample_share",
    "show",
    "stats",
    "topk_sweep",
    "view",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME and name not in _MODULES:
        raise AttributeError(f"module 'mixlens' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = import_module(_MODULES[name]) if name in _MODULES else getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


_register_displays()
