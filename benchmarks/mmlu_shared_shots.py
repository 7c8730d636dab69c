"""MMLU 5-shot on a random Mixtral of about 200M parameters in fp32: mixlens beside stock lm-eval, answer by answer.

    python benchmarks/mmlu_shared_shots.py DATA --out benchmarks/results/mmlu-shared-shots.json

DATA is the folder that holds mmlu in its original format. Both ask the same questions of the same task file. Stock
reads the five shots again for every question; mixlens reads them once a subject. Wall-clock and processor time of the
forwards and of everything round them; imports, the making of the model and the preflight are outside.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from measuring import header, write
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from mixlens.evals.backends import LocalBackend
from mixlens.evals.lm_eval_grading import Job, grade, key_of, load_tasks
from mixlens.evals.model import repeats_of
from mixlens.evals.runner import EvalSettings
from mixlens.evals.scoring import near_ties
from mixlens.models.demo import demo_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--subjects", nargs="*", default=["anatomy", "virology"])
    parser.add_argument("--limit", type=int, default=24, help="questions of each subject (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", help="result file; printed when it is not given")
    options = parser.parse_args()
    measured_on = header(torch=torch)
    tokenizer, model = AutoTokenizer.from_pretrained(demo_path()), random_mixtral()
    job = Job(tuple(f"mmlu_5shot::{subject}" for subject in options.subjects), root=options.data, limit=options.limit)
    warm(model)
    samples, ours_took = timed(lambda: shared(model, tokenizer, job, options.batch_size))
    ours = {(s["task"], s["sample_id"]): np.array(s["logprobs"]) for s in samples}
    theirs, theirs_took = timed(lambda: stock(model, tokenizer, job, options.batch_size))
    differing = [
        {"sample": list(key), "stock": theirs[key].tolist(), "mixlens": ours[key].tolist()}
        for key in theirs
        if theirs[key].argmax() != ours[key].argmax()
    ]
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "questions": len(theirs),
        "batch_size": options.batch_size,
        "stock_s": theirs_took[0],
        "mixlens_s": ours_took[0],
        "speedup": theirs_took[0] / ours_took[0],
        "stock_processor_s": theirs_took[1],
        "mixlens_processor_s": ours_took[1],
        "speedup_processor": theirs_took[1] / ours_took[1],
        "largest_difference": max(float(np.abs(theirs[key] - ours[key]).max()) for key in theirs),
        "answers_that_differ": differing,
        "nearer_than_1e-4": near_ties(pd.DataFrame(samples)).to_dict("records"),
    }
    write(options.out, "MMLU 5-shot with shared shots", measured_on, result)


def random_mixtral() -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=8192,
    )
    return MixtralForCausalLM(config).eval()


def warm(model: Any) -> None:
    with torch.inference_mode():
        model(torch.arange(3, 200)[None])


def timed(work: Any) -> tuple[Any, tuple[float, float]]:
    wall, processor = time.perf_counter(), time.process_time()
    found = work()
    return found, (round(time.perf_counter() - wall, 2), round(time.process_time() - processor, 2))


def shared(model: Any, tokenizer: Any, job: Job, batch_size: int) -> list[dict[str, Any]]:
    """Every question as a sample of a Log, by mixlens."""
    backend = LocalBackend(model, EvalSettings(batch_size=batch_size, tokenizer=tokenizer))
    loaded = load_tasks(job)
    requests = loaded.build(job)
    repeats, answers = repeats_of(requests), {}
    for batch in backend.batches("loglikelihood", requests):
        given = backend.answer("loglikelihood", requests, batch, repeats)
        answers |= {key_of(requests[n], 0): answer for n, answer in zip(batch.requests, given, strict=True)}
    return grade(job, loaded, answers)["samples"]


def stock(model: Any, tokenizer: Any, job: Job, batch_size: int) -> dict[tuple[str, int], np.ndarray]:
    """Log-probabilities of the choices of every question, by lm-eval's own HFLM."""
    lm: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=True)
    found: Any = simple_evaluate(lm, tasks=list(load_tasks(job).tasks.values()), limit=job.limit)
    return {
        (task, sample["doc_id"]): np.array([answer[0][0] for answer in sample["resps"]])
        for task, samples in found["samples"].items()
        for sample in samples
    }


if __name__ == "__main__":
    main()
