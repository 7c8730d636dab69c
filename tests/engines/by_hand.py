"""vLLM beside transformers on the bundled model, by hand and before a release: `make engines`.

Needs vLLM in the interpreter that runs it. Every configuration runs in a process of its own. With float32 all sets of
experts are to be equal where the margin exceeds rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

PREFILL = {"dtype": "float32", "enforce_eager": True, "max_model_len": 4096}
CONFIGURATIONS = {
    "float32, eager": PREFILL,
    "float32, compiled": {"dtype": "float32", "max_model_len": 4096},
    "float32, chunks of 64": {**PREFILL, "max_num_batched_tokens": 64, "enable_chunked_prefill": True},
    "float32, prefix cache": {**PREFILL, "enable_prefix_caching": True, "block_size": 32},
    "float32, tensor parallel 2": {**PREFILL, "tensor_parallel_size": 2},
    "bfloat16, eager": {**PREFILL, "dtype": "bfloat16"},
}


def measure(name: str, documents: int) -> dict[str, object]:
    """Sets of experts that are equal, in prompts and in what is generated after them."""
    import numpy as np
    import torch

    import mixlens as ml

    arguments = CONFIGURATIONS[name]
    model = ml.load("demo", dtype=arguments["dtype"], verbose=False)
    texts, quiet = ml.demo_documents()[:documents], ml.RecordSettings(progress=False)
    here = ml.record(model, texts, settings=quiet)
    found: dict[str, object] = {"configuration": name, "documents": documents}
    with ml.engines.vllm("demo", **arguments) as engine:
        started = time.perf_counter()
        there = ml.record(engine, texts, settings=quiet)
        found["record_s"] = time.perf_counter() - started
        ours, theirs = here.read("expert_id"), there.read("expert_id")
        same = (np.sort(ours, -1) == np.sort(theirs, -1)).all(-1)
        logits = np.sort(here.read("router_logits"), -1)
        margin = logits[..., -there.top_k] - logits[..., -there.top_k - 1]
        found |= {"sets": same.size, "equal": int(same.sum()), "widest_margin": float(margin[~same].max(initial=0))}
        token_id, sequence = here.read("token_id"), here.read("sequence")
        prompts = [token_id[sequence == number][:160].tolist() for number in range(documents)]
        params = engine.params(max_tokens=64, temperature=0, ignore_eos=True, detokenize=False)
        for turn in ("generated", "generated_again"):
            outputs, rows = engine.generate(prompts, params)
            equal = sets = 0
            for output, row, prompt in zip(outputs, rows, prompts, strict=True):
                ids = [*prompt, *output.outputs[0].token_ids[:-1]]
                with ml.Recorder(model, signals=[]) as recorder, torch.no_grad():
                    model(torch.tensor([ids]))
                own = recorder.trace().read("expert_id")
                equal += int((np.sort(own, -1) == np.sort(row.ids, -1)).all(-1).sum())
                sets += own.shape[0] * own.shape[1]
            found[turn] = {"sets": sets, "equal": equal, "cached": sum(o.num_cached_tokens or 0 for o in outputs)}
        settings = ml.evals.EvalSettings(progress=False, routing=True)
        log, own = (ml.evaluate(one, "demo_0shot::agreement", limit=8, settings=settings) for one in (engine, model))
        pairs = [(mine["metrics"], theirs["metrics"]) for mine, theirs in zip(own.records, log.records, strict=True)]
        found["evaluation"] = {
            "samples": len(pairs),
            "same_scores": sum(a == b for a, b in pairs),
            "routing": bool(np.array_equal(_kept(log, ml), _kept(own, ml))),
        }
    return found


def _kept(log, ml):
    """Expert ids of the rows that stand for a sample, in the order of samples and choices."""
    import numpy as np

    frame = log.routing.sequences
    order = frame.sort_values(["sample_id", "choice"]).index
    ids, sequence = np.sort(log.routing.read("expert_id"), -1), log.routing.read("sequence")
    return np.concatenate([ids[sequence == number] for number in order])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--only", help=f"one of {', '.join(CONFIGURATIONS)}")
    asked = parser.parse_args()
    if asked.only:
        print(json.dumps(measure(asked.only, asked.documents)))
        return
    for name, arguments in CONFIGURATIONS.items():
        several = "tensor_parallel_size" in arguments
        bound = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if several else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        given = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", **bound, **os.environ}
        command = [sys.executable, __file__, "--only", name, "--documents", str(asked.documents)]
        done = subprocess.run(command, env=given, capture_output=True, text=True)
        print(
            done.stdout.strip().splitlines()[-1] if done.returncode == 0 else f"{name}: {done.stderr[-2000:]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
