"""What users get who say nothing: they decide numbers, money and time, so a change is one that the changelog tells."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import pytest

import mixlens as ml
from mixlens.stats import Bootstrap

SETTINGS: dict[Any, dict[str, Any]] = {
    Bootstrap: {"level": 0.95, "replicates": 1000, "seed": 0},
    ml.RecordSettings: {
        "text": "text", "max_length": None, "overlong": "error", "batch_tokens": None, "progress": True,
    },
    ml.evals.EvalSettings: {
        "batch_size": 8, "max_length": None, "max_new_tokens": 1024, "seed": 0, "share_prefix": True, "routing": False,
        "progress": True,
    },
    ml.bench.BenchSettings: {
        "warmup": 1, "arrivals": "poisson", "max_seconds": 600.0, "max_dollars": None, "price": None, "progress": True,
    },
    type(ml.bench.BenchSettings().timeouts): {"connect_s": 10.0, "stall_s": 60.0, "total_s": 600.0},
    ml.bench.LocalSettings: {
        "warmup": 1, "experts": None, "static_cache": False, "compiled": None, "recording": True, "max_seconds": 600.0,
        "progress": True,
    },
    ml.bench.Workload: {"prompt_tokens": 256, "output_tokens": 128, "prompts": None, "count_tokens": None, "seed": 0},
    ml.experiments.Speed: {"calls": 8, "prompt_tokens": 64, "output_tokens": 32},
    ml.experiments.Ablation: {"how": "reroute", "means": None, "metric": None, "layers": None},
    ml.Endpoint: {"protocol": "openai-chat", "key_env": None, "context": None},
    ml.Site: {"layers": None, "dtype": "float16", "tokens": "all"},
    ml.bench.Limits: {"ttft_s": None, "tpot_s": None, "e2e_token_s": None},
}  # fmt: skip
FUNCTIONS: dict[Any, dict[str, Any]] = {
    ml.Recorder: {"signals": ("router_logits", "logprob"), "lengths": None},
    ml.record: {"out": None, "signals": ("router_logits", "logprob")},
    ml.benchmark: {"concurrency": None, "rate": None, "requests": 32},
    ml.bench.benchmark_together: {"concurrency": None, "rate": None, "requests": 32},
    ml.bench.benchmark_configurations: {"requests": 8},
    ml.bench.load_sweep: {"most": 64, "requests": 32},
    ml.evaluate: {"protocol": None, "limit": None},
    ml.bench.probe: {"max_tokens": 24},
    ml.experiments.measure_impact: {"force_weights": False},
    ml.Endpoint.complete: {"retries": None},
    ml.stats.similarity_and_coactivation: {"permutations": 2000, "seed": 0},
    ml.stats.transitions: {"gap": 1},
    ml.stats.repetition: {"by": None},
    ml.stats.expert_share: {"slot": "any"},
    ml.stats.domain_specialization: {"by": "domain"},
    ml.stats.vocabulary_specialization: {"min_count": 10},
    ml.stats.flips_by_margin: {"pooled": True},
}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.__name__)
def test_settings(settings):
    assert is_dataclass(settings)
    found = {field.name: field.default for field in fields(settings) if field.default is not MISSING}
    assert found.items() >= SETTINGS[settings].items()


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)
def test_functions(function):
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in FUNCTIONS[function]} == FUNCTIONS[function]
