"""What an importance map costs, in plain forwards: every expert of every layer of a random model of about 200M.

    python benchmarks/importance_map.py --out benchmarks/results/importance-map.json

Measured are the map of all L x E ablations against L x E plain forwards that score the same tokens, in turns, in
wall-clock and in processor time (which others on the machine disturb less); and a forward under an edit of every layer
against the bare one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from measuring import header, interleaved, write
from transformers import MixtralConfig, MixtralForCausalLM

import mixlens as ml
from mixlens.experiments.ablator import Ablator
from mixlens.recording.logprobs import score

# 8x7B in small: its ratios of inner to hidden width, of heads to hidden, and nearly of vocabulary to body.
CONFIG = {
    "num_hidden_layers": 16,
    "hidden_size": 384,
    "intermediate_size": 1344,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
    "sliding_window": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="result file; left out: print")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the batch (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=128, help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=3, help="maps measured (default: %(default)s)")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settle = torch.cuda.synchronize if device == "cuda" else lambda: None
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**CONFIG)).eval().to(device)
    model.set_experts_implementation("grouped_mm")
    layers, experts = CONFIG["num_hidden_layers"], model.config.num_local_experts
    ids = torch.randint(3, CONFIG["vocab_size"], (arguments.tokens // arguments.columns, arguments.columns))
    sequences = [row.numpy() for row in ids]
    target = torch.roll(ids, -1, dims=1).flatten()
    ids = ids.to(device)
    ablator = Ablator(model, list(range(layers)), how="reroute")

    @torch.inference_mode()
    def plain() -> np.ndarray:
        return score(model.lm_head, model.model(ids).last_hidden_state.flatten(0, 1), target, top=False)["logprob"]

    def edited() -> None:
        with ml.edit(model, ml.edits.forbid(None, 5)):
            plain()

    def all_ablations() -> None:
        ablator.measure(sequences, arguments.tokens)

    def all_forwards() -> None:
        for _ in range(layers * experts):
            plain()

    measured_on = header(torch=torch)
    chosen = ablator.measure(sequences, arguments.tokens).chosen.sum(0) > 0
    results = {
        "model": {**CONFIG, "parameters": sum(p.numel() for p in model.parameters()), "dtype": "float32"},
        "batch": {"tokens": arguments.tokens, "columns": arguments.columns},
        "plain_forwards": layers * experts,
        "experts_that_some_token_chose": int(chosen.sum()),
        "map_against_plain_forwards": in_turns(all_forwards, all_ablations, arguments.pairs, settle),
        "edit_against_bare_forward": interleaved(plain, edited, pairs=20, settle=settle),
    }
    write(arguments.out, "importance_map", measured_on, results)


def in_turns(bare: Callable[[], None], other: Callable[[], None], pairs: int, settle: Callable[[], Any]) -> dict:
    """Ratios of every pair, and the pairs' seconds as [bare, other], in wall-clock and in processor time."""

    def times(run: Callable[[], None]) -> tuple[float, float]:
        settle()
        wall, processor = perf_counter(), process_time()
        run()
        settle()
        return perf_counter() - wall, process_time() - processor

    measured = np.array([[times(bare), times(other)] for _ in range(pairs)])  # [pair, run, clock]
    ratio = measured[:, 1] / measured[:, 0]
    return {
        "pairs": pairs,
        "ratio_wall": ratio[:, 0].round(4).tolist(),
        "ratio_processor": ratio[:, 1].round(4).tolist(),
        "median_ratio_processor": round(float(np.median(ratio[:, 1])), 4),
        "wall_s": measured[:, :, 0].round(2).tolist(),
        "processor_s": measured[:, :, 1].round(2).tolist(),
    }


if __name__ == "__main__":
    main()
