"""Measure the demo model on documents it has not seen, and what its experts have specialized in.

python -m demo_model.evaluate --data ../shared/corpus --model mixlens/_demo --out demo_model/evaluation.json
"""

import argparse
import json
import lzma
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import xarray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerBase

import mixlens as ml
from demo_model.data import DOMAINS, read_documents

PROMPT_CHARACTERS, NEW_TOKENS, ABLATION_DOCUMENTS = 200, 120, 6
POSITION_EDGES = (0, 64, 128, 256, 512, 1024, 1536, 2048, 2560, 3072, 3584, 4096)


@torch.no_grad()
def token_bits(model: MixtralForCausalLM, ids: list[int]) -> Tensor:
    """Bits of every token but the first, given those before it."""
    row = torch.tensor([ids], device=model.device)
    logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits, row[0, 1:], reduction="none") / math.log(2)


def bits_per_byte(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> float:
    """Bits of all documents over their UTF-8 bytes, each document read by itself behind <s>."""
    bits = sum(token_bits(model, tokenizer(document)["input_ids"]).sum().item() for document in documents)
    return bits / sum(len(document.encode()) for document in documents)


def xz_bits_per_byte(documents: list[str]) -> float:
    """What `xz -9e` needs for the documents joined."""
    data = "".join(documents).encode()
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def bits_by_position(model: MixtralForCausalLM, streams: dict[str, np.ndarray], length: int = 4096) -> dict:
    """Mean bits a token by position, over windows of consecutive documents of one domain each.

    What stands at a position differs from bin to bin, so the last quarter is also read with only a quarter before it:
    the same tokens at earlier positions. The difference, over windows, is what the positions cost.
    """
    windows = [
        stream[start : start + length].tolist()
        for stream in streams.values()
        for start in range(0, len(stream) - length + 1, length)
    ]
    bits = torch.stack([token_bits(model, window) for window in windows])
    quarter = length // 4
    early = torch.stack([token_bits(model, window[length // 2 :])[-quarter:].mean() for window in windows])
    cost = bits[:, -quarter:].mean(1) - early
    bins = list(pairwise(POSITION_EDGES))
    return {
        "windows": len(windows),
        "bins": bins,
        "bits_per_token": [round(bits[:, a:b].mean().item(), 4) for a, b in bins],
        "last_quarter_whole_less_half_window": round(cost.mean().item(), 4),
        "standard_error": round((cost.std() / len(windows) ** 0.5).item(), 4),
    }


@contextmanager
def without_expert(model: MixtralForCausalLM, layer: int, expert: int) -> Iterator[None]:
    """Forbid one expert: its tokens go to the next best, and the weights are made to sum to 1 again."""

    def forbid(module: torch.nn.Module, inputs: tuple, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits = outputs[0].clone()
        logits[:, expert] = -torch.inf
        weights, ids = logits.float().softmax(-1).topk(module.top_k, dim=-1)
        return outputs[0], weights / weights.sum(-1, keepdim=True), ids

    handle = model.model.layers[layer].mlp.gate.register_forward_hook(forbid)
    try:
        yield
    finally:
        handle.remove()


def measure(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, corpus: Path) -> dict:
    """Bits per byte of every domain's validation documents beside xz, and bits a token by position."""
    domains, streams = {}, {}
    for domain in DOMAINS:
        documents = list(read_documents(corpus, domain, "validation"))
        domains[domain] = {
            "documents": len(documents),
            "bytes": sum(len(document.encode()) for document in documents),
            "bits_per_byte": round(bits_per_byte(model, tokenizer, documents), 4),
            "xz_bits_per_byte": round(xz_bits_per_byte(documents), 4),
        }
        streams[domain] = np.concatenate(tokenizer(documents)["input_ids"])
    mean = np.mean([domain["bits_per_byte"] for domain in domains.values()])
    return {
        "mean_bits_per_byte": round(float(mean), 4),
        "domains": domains,
        "by_position": bits_by_position(model, streams),
    }


def information(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: list[dict]) -> dict:
    """mixlens's own statistics of the routing of `documents`, by layer, with 95 % intervals over documents."""
    trace = ml.record(model, documents, tokenizer=tokenizer)
    result = {"documents": len(documents), "tokens": trace.n_tokens}
    for statistic, measure in (
        (ml.stats.load_balance(trace), "max_over_mean"),
        (ml.stats.domain_information(trace), "mutual_information"),
        (ml.stats.domain_information(trace), "excess"),
    ):
        part = statistic.sel(measure=measure)
        result[measure] = {name: part[name].values.round(4).tolist() for name in ("estimate", "ci_low", "ci_high")}
    share = ml.stats.expert_share(trace, by="domain")
    result["least_used_share"] = share["estimate"].mean("domain").min("expert").values.round(4).tolist()
    return result | {"share": share["estimate"].sel(domain=list(DOMAINS))}


def ablation(
    model: MixtralForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: dict[str, list[str]],
    share: xarray.DataArray,
) -> dict:
    """What it costs each domain, in bits per byte, to cut the expert that one uses most beyond the others' mean."""
    before = {domain: bits_per_byte(model, tokenizer, texts[domain]) for domain in DOMAINS}
    beyond = (share - (share.sum("domain") - share) / (len(DOMAINS) - 1)).values
    result = {}
    for row, domain in enumerate(DOMAINS):
        layer, expert = np.unravel_index(beyond[row].argmax(), beyond[row].shape)
        with without_expert(model, layer, expert):
            rise = {d: bits_per_byte(model, tokenizer, texts[d]) - before[d] for d in DOMAINS}
        others = [value for name, value in rise.items() if name != domain]
        result[domain] = {
            "layer": int(layer),
            "expert": int(expert),
            "share": round(float(share.values[row, layer, expert]), 4),
            "rise": round(rise[domain], 4),
            "mean_rise_of_others": round(float(np.mean(others)), 4),
            "highest_rise_of_others": round(max(others), 4),
        }
    return result


@torch.no_grad()
def write(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, temperature: float = 0.8) -> str:
    """The first words of `text`, an arrow, and how the model goes on."""
    start = text[:PROMPT_CHARACTERS].rsplit(" ", 1)[0]
    torch.manual_seed(0)
    ids = model.generate(
        **tokenizer(start, return_tensors="pt"),
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.bos_token_id,  # where the next document would begin
    )
    return f"{start} ⟶{tokenizer.decode(ids[0], skip_special_tokens=True)[len(start) :]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder of weights, tokenizer and samples.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3, help="untrained models to compare the routing with")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    samples = [json.loads(line) for line in (options.model / "samples.jsonl").read_text("utf-8").splitlines()]
    validation = {domain: list(read_documents(options.data, domain, "validation")) for domain in DOMAINS}
    documents = [{"domain": domain, "text": text} for domain, texts in validation.items() for text in texts]

    result = measure(model, tokenizer, options.data)
    result["samples_bits_per_byte"] = round(bits_per_byte(model, tokenizer, [s["text"] for s in samples]), 4)
    trained = information(model, tokenizer, documents)
    some = {domain: texts[:ABLATION_DOCUMENTS] for domain, texts in validation.items()}
    result["ablation"] = ablation(model, tokenizer, some, trained.pop("share"))
    result["routing"] = {"trained": trained}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        fresh = MixtralForCausalLM(MixtralConfig(**model.config.to_diff_dict())).eval()
        untrained = information(fresh, tokenizer, documents)
        untrained.pop("share")
        result["routing"][f"untrained, seed {seed}"] = untrained
    first = {sample["domain"]: sample["text"] for sample in reversed(samples)}
    result["written"] = {domain: write(model, tokenizer, first[domain]) for domain in DOMAINS}
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
