"""What recording costs: the model's forward with it against the bare forward, in interleaved pairs.

    python benchmarks/recording.py --shape mid --out benchmarks/results/recording-mid.json

Measured are (a) a Recorder round `model(**batch)`, its trace saved to a new folder, against the bare call; and
(b) `ml.record` into a new run directory, tokenization included, against the decoder's forwards on the same batches.
Beside them, with --others, what one would use otherwise, against the bare call: transformers' own
`output_router_logits=True`, nnsight, and TransformerLens. These three keep tensors in memory and write nothing.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from measuring import header, interleaved, write
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedTokenizerFast

import mixlens as ml
from mixlens.models.demo import demo_path


@dataclass(frozen=True)
class Shape:
    """A model, the batch of (a), and how many of the sample documents (b) records."""

    config: dict[str, Any]
    rows: int
    columns: int
    documents: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


def _config(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 32_000,
        "max_position_embeddings": 32_768,
        "sliding_window": None,
    }


SHAPES = {
    "tiny": Shape(_config(4, 64, 128, 4, 1), 4, 64, 4),
    "mid": Shape(_config(32, 256, 896, 8, 2), 4, 512, 8),
    "8x7b": Shape(_config(32, 4096, 14_336, 32, 8), 8, 2048, 60, torch.bfloat16, "cuda"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--others", type=int, default=0, metavar="PAIRS", help="also measure what one would use else")
    parser.add_argument("--out", help="result file; printed when it is not given")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    measured_on = header(torch=torch)
    model = random_model(shape)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(demo_path() / "tokenizer.json"))
    batch = batch_of_text(tokenizer, shape)
    settle = torch.cuda.synchronize if shape.device == "cuda" else lambda: None
    settings = {
        "shape": options.shape,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(shape.dtype),
        "config": shape.config,
        "batch": [shape.rows, shape.columns],
        "documents_of_record": shape.documents,
    }
    results: dict[str, Any] = {}
    skipped: dict[str, str] = {}

    def save() -> None:
        write(options.out, "recording", measured_on, {"settings": settings, "results": results, "skipped": skipped})

    def measure(name: str, bare: Callable[[], Any], other: Callable[[], Any], pairs: int) -> None:
        found = results[name] = interleaved(bare, other, pairs=pairs, settle=settle)
        interval = f"[{found['ci_low']:.4f}, {found['ci_high']:.4f}]"
        print(f"{name:40} {found['ratio']:.4f} {interval}, bare {found['bare_s']} s", flush=True)
        if options.out:  # after each, so that a long measurement can be stopped
            save()

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        folders = (Path(folder) / str(number) for number in count())
        bare = partial(model, **batch)
        measure("Recorder and save", bare, partial(recorder, model, batch, folders), options.pairs)
        measure("record", *recording_of(model, tokenizer, shape.documents, folders), options.pairs)
        for name, prepare in OTHERS.items() if options.others else ():
            try:
                other = prepare(model, tokenizer, batch)
            except ImportError as error:
                skipped[name] = f"not installed ({error})"
                print(f"{name} skipped: {skipped[name]}")
            else:
                measure(name, bare, other, options.others)
    save()


def random_model(shape: Shape) -> Any:
    """A Mixtral with random weights, made where it runs, with the experts implementation that ml.load picks."""
    torch.manual_seed(0)
    with torch.device(shape.device):
        model = AutoModelForCausalLM.from_config(MixtralConfig(**shape.config), dtype=shape.dtype)
    model.set_experts_implementation("grouped_mm")
    return model.eval()


def batch_of_text(tokenizer: Any, shape: Shape) -> dict[str, torch.Tensor]:
    ids = list(chain.from_iterable(tokenizer(document["text"])["input_ids"] for document in ml.demo_documents()))
    block = torch.tensor(ids[: shape.rows * shape.columns], device=shape.device).reshape(shape.rows, shape.columns)
    return {"input_ids": block, "attention_mask": torch.ones_like(block)}


def recorder(model: Any, batch: dict[str, torch.Tensor], folders: Iterator[Path]) -> None:
    with ml.Recorder(model, signals=()) as rec:
        model(**batch)
    rec.trace().save(next(folders))


def recording_of(
    model: Any, tokenizer: Any, n_documents: int, folders: Iterator[Path]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The decoder's forwards bare, on the batches that a first recording makes; and that recording."""
    documents = ml.demo_documents()[:n_documents]
    batches: list[torch.Tensor] = []

    def record() -> None:
        settings = ml.RecordSettings(progress=False)
        ml.record(model, documents, out=next(folders), tokenizer=tokenizer, signals=(), settings=settings)

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        batches.append(kwargs["input_ids"])

    handle = model.model.register_forward_pre_hook(note, with_kwargs=True)
    record()
    handle.remove()

    def forwards() -> None:
        for ids in batches:
            model.model(input_ids=ids, use_cache=False)

    return forwards, record


def twin(model: Any) -> Any:
    """The same weights in modules of its own, for a library that changes the modules it is given."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def output_router_logits(model: Any, _tokenizer: Any, batch: dict[str, torch.Tensor]) -> Callable[[], Any]:
    return partial(model, **batch, output_router_logits=True)


def nnsight_saves_gates(model: Any, _tokenizer: Any, batch: dict[str, torch.Tensor]) -> Callable[[], Any]:
    import nnsight

    wrapped = nnsight.NNsight(twin(model))

    def run() -> Any:
        with wrapped.trace(**batch):
            gates = [layer.mlp.gate.output for layer in wrapped.model.layers].save()
        return gates

    return run


def transformer_lens_caches_router(model: Any, tokenizer: Any, batch: dict[str, torch.Tensor]) -> Callable[[], Any]:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        "mistralai/Mixtral-8x7B-v0.1", hf_model=twin(model), tokenizer=tokenizer, dtype=model.dtype
    )
    router = ("gate.hook_expert_indices", "gate.hook_expert_weights")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return lambda: bridge.run_with_cache(ids, attention_mask=mask, names_filter=lambda name: name.endswith(router))


OTHERS = {
    "output_router_logits=True": output_router_logits,
    "nnsight, output of every gate": nnsight_saves_gates,
    "TransformerLens, cache of the router": transformer_lens_caches_router,
}

if __name__ == "__main__":
    main()
