"""mixlens: see what every expert of a Mixtral model does.

Names are loaded when they are first used, so that importing mixlens is fast and imports neither torch nor pandas.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mixlens.notebook import register as _register_displays

if TYPE_CHECKING:
    from mixlens import show, stats
    from mixlens.bench.bench import Bench
    from mixlens.bench.configurations import benchmark_configurations
    from mixlens.bench.knee import knee, load_sweep
    from mixlens.bench.local import LocalSettings
    from mixlens.bench.metrics import Limits
    from mixlens.bench.probe import probe
    from mixlens.bench.prompts import Workload
    from mixlens.bench.providers import listed_prices, provider_table
    from mixlens.bench.run import BenchSettings, benchmark
    from mixlens.bench.together import benchmark_together
    from mixlens.comparing import Comparison, compare
    from mixlens.contributions import expert_contributions, expert_outputs
    from mixlens.errors import BadInput, EndpointError, MissingSignal, MixlensError, ModelError, RunError
    from mixlens.evals.log import Log
    from mixlens.evals.routing import flipped_routing, sample_share
    from mixlens.evals.runner import EvalSettings, evaluate
    from mixlens.explore import Explorer
    from mixlens.impact import quantization_impact
    from mixlens.importance import Ablation, expert_importance, measure_importance
    from mixlens.models.audit import Audit, audit
    from mixlens.models.demo import demo_documents
    from mixlens.models.endpoint import Endpoint
    from mixlens.models.load import load
    from mixlens.models.similarity import expert_similarity
    from mixlens.schemes import Speed, pareto
    from mixlens.show import view
    from mixlens.show.report import report
    from mixlens.sweep import measure_topk, topk_sweep
    from mixlens.traces import edits
    from mixlens.traces.compiled import CompiledRecorder
    from mixlens.traces.edits import edit
    from mixlens.traces.record import RecordSettings, record
    from mixlens.traces.recorder import Recorder
    from mixlens.traces.signals import Site
    from mixlens.traces.trace import Trace, concat

    open = Trace.open

__version__ = "0.1.0"

_HOME = {
    "Ablation": "mixlens.importance",
    "Audit": "mixlens.models.audit",
    "BadInput": "mixlens.errors",
    "Bench": "mixlens.bench.bench",
    "BenchSettings": "mixlens.bench.run",
    "Comparison": "mixlens.comparing",
    "CompiledRecorder": "mixlens.traces.compiled",
    "Endpoint": "mixlens.models.endpoint",
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
    "RecordSettings": "mixlens.traces.record",
    "Recorder": "mixlens.traces.recorder",
    "Site": "mixlens.traces.signals",
    "Speed": "mixlens.schemes",
    "Trace": "mixlens.traces.trace",
    "Workload": "mixlens.bench.prompts",
    "audit": "mixlens.models.audit",
    "benchmark": "mixlens.bench.run",
    "benchmark_configurations": "mixlens.bench.configurations",
    "benchmark_together": "mixlens.bench.together",
    "compare": "mixlens.comparing",
    "concat": "mixlens.traces.trace",
    "demo_documents": "mixlens.models.demo",
    "edit": "mixlens.traces.edits",
    "evaluate": "mixlens.evals.runner",
    "expert_contributions": "mixlens.contributions",
    "expert_importance": "mixlens.importance",
    "expert_outputs": "mixlens.contributions",
    "expert_similarity": "mixlens.models.similarity",
    "knee": "mixlens.bench.knee",
    "listed_prices": "mixlens.bench.providers",
    "flipped_routing": "mixlens.evals.routing",
    "load": "mixlens.models.load",
    "load_sweep": "mixlens.bench.knee",
    "measure_importance": "mixlens.importance",
    "measure_topk": "mixlens.sweep",
    "open": "mixlens.kinds",
    "pareto": "mixlens.schemes",
    "quantization_impact": "mixlens.impact",
    "probe": "mixlens.bench.probe",
    "provider_table": "mixlens.bench.providers",
    "record": "mixlens.traces.record",
    "report": "mixlens.show.report",
    "sample_share": "mixlens.evals.routing",
    "topk_sweep": "mixlens.sweep",
    "view": "mixlens.show",
}
_MODULES = {"edits": "mixlens.traces.edits", "show": "mixlens.show", "stats": "mixlens.stats"}

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
    "expert_contributions",
    "expert_importance",
    "expert_outputs",
    "expert_similarity",
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
    "quantization_impact",
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
