"""How fast a Mixtral of random weights writes and reads, compiled and not, with routing recorded and without.

    python benchmarks/decoding.py --shape 8x7b --out benchmarks/results/decoding-8x7b.json

Decode is greedy, in a static cache, every token's id going straight into the next step; each path is what
`ml.compiled_decoding` compiles, what `torch.compile` makes of the model as it is, or transformers' own step. Recording
on and off take turns, call by call, through one graph. Beside them stand the bytes that each step must read, given the
experts that it chose, and the bandwidth of the device, measured again before every pair. Every result is written as it
comes; none begins once the budget is spent.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from measuring import header, interleaved, write
from recording import SHAPES
from transformers import AutoModelForCausalLM, MixtralConfig, StaticCache

import mixlens as ml
from mixlens.bench.bytes_and_flops import Work
from mixlens.bench.hardware import Device, measure, rate
from mixlens.bench.roofline import Machine
from mixlens.models.decoding import compile_config, one_graph

PATHS = ("compiled", "torch.compile", "eager")


def main() -> None:
    options = _options()
    started, measured_on = time.perf_counter(), header(torch=torch)
    results: dict[str, Any] = {"decode": {}, "prefill": {}}
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    for scheme in options.quantization:
        model = random_model(options.shape, scheme)
        device = Device(model)
        machine, work = measure(device, model.dtype), Work(model)
        settings |= {"parameters": work.sizes.total, "dtype": str(model.dtype)}
        loads = [
            (f"batch {rows}", partial(decode, rows=rows, path=path), path)
            for rows in options.batch
            for path in options.paths
        ]
        loads += [(f"{tokens} tokens", partial(prefill, tokens=tokens), "") for tokens in options.prefill]
        for load, measured, path in loads:
            name = ", ".join(filter(None, [load, path, scheme if scheme != "none" else ""]))
            kind = "decode" if path else "prefill"
            if time.perf_counter() - started > options.budget:
                results[kind][name] = {"skipped": "the budget was spent"}
            else:
                try:
                    with torch.inference_mode():
                        results[kind][name] = measured(model, device, machine, work, options)
                except Exception as error:  # what follows is still measured
                    results[kind][name] = {
                        "skipped": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
                    }
            print(name, {key: value for key, value in results[kind][name].items() if key != "recording"}, flush=True)
            if options.out:
                write(
                    options.out,
                    "decoding",
                    measured_on,
                    {"settings": settings, "machine": asdict(machine), "results": results},
                )
        del model
    if not options.out:
        write(None, "decoding", measured_on, {"settings": settings, "results": results})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="the shape's own where left out")
    parser.add_argument("--layers", type=int, help="fewer than the shape has, where all do not fit")
    parser.add_argument("--device", help="the shape's own where left out")
    parser.add_argument("--quantization", nargs="+", default=["none"], help="schemes in turn; made on the CPU")
    parser.add_argument("--batch", type=int, nargs="*", default=[1])
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--prefill", type=int, nargs="*", default=[], metavar="TOKENS")
    parser.add_argument("--prompt", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--output", type=int, default=97, metavar="TOKENS")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--out", help="result file; printed when it is not given")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    SHAPES[options.shape] = replace(
        shape,
        config=shape.config | ({"num_hidden_layers": options.layers} if options.layers else {}),
        dtype=getattr(torch, options.dtype) if options.dtype else shape.dtype,
        device=options.device or shape.device,
    )
    return options


def random_model(shape: str, scheme: str = "none") -> Any:
    """The shape with random weights, made layer by layer where it runs: never a second copy, nor one in float32."""
    plain = SHAPES[shape]
    config = MixtralConfig(**plain.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=plain.dtype)
    torch.manual_seed(0)
    for module in model.modules():
        own = list(module.parameters(recurse=False)) + list(module.buffers(recurse=False))
        if own:
            module.to_empty(device=plain.device, recurse=False)
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 1:
                torch.nn.init.ones_(parameter)
            else:
                torch.nn.init.normal_(parameter, std=0.02)
    # Not a weight: computed from the config, and lost on the meta device.
    rotary = model.model.rotary_emb
    with torch.device(plain.device):
        model.model.rotary_emb = type(rotary)(config)
    model.set_experts_implementation("grouped_mm")
    if scheme == "none":
        return model.eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return ml.load(folder, quantization=scheme, dtype=plain.dtype, device_map=plain.device, verbose=False)


class Decoding:
    """A prompt in a static cache and the step that goes on from it, by one path."""

    def __init__(self, model: Any, device: Device, rows: int, path: str, options: argparse.Namespace) -> None:
        self.model, self._steps = model, options.output - 1
        generator = torch.Generator().manual_seed(rows)
        self.ids = torch.randint(3, model.config.vocab_size, (rows, options.prompt), generator=generator).to(
            device.main
        )
        self._cache = StaticCache(model.config, max_cache_len=options.prompt + options.output)
        compiling: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        if path == "compiled":
            compiling = compile_config().to_dict()
        elif device.main.type == "cuda":
            compiling["mode"] = "reduce-overhead"
        self._step = self._next if path == "eager" else torch.compile(self._next, **compiling)

    def _next(self, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.model(input_ids=token, past_key_values=self._cache).logits[:, -1:]
        return logits.argmax(-1), logits

    def start(self) -> None:
        """The prompt is read; not part of what is timed."""
        self._cache.reset()
        self._token = self.model(input_ids=self.ids, past_key_values=self._cache, logits_to_keep=1).logits.argmax(-1)

    def run(self, *, keep: bool = False) -> list[torch.Tensor]:
        """The rest of the answer, one step after the other; the logits of each where they are to be kept."""
        kept = []
        for _ in range(self._steps):
            torch.compiler.cudagraph_mark_step_begin()
            token, logits = self._step(self._token)
            self._token = token.clone()
            if keep:
                kept.append(logits.clone())
        return kept


@contextmanager
def _as_path(model: Any, path: str) -> Iterator[None]:
    before = model.config._experts_implementation
    if path == "torch.compile":
        model.set_experts_implementation("batched_mm")
    try:
        with one_graph(model) if path == "compiled" else nullcontext():
            yield
    finally:
        model.set_experts_implementation(before)


def decode(
    model: Any, device: Device, machine: Machine, work: Work, options: argparse.Namespace, *, rows: int, path: str
) -> dict[str, Any]:
    """A whole answer with recording on and off in interleaved pairs, and the share of the bandwidth beside each."""
    steps, bandwidth = options.output - 1, []
    # No row is padded: each has one token in every forward that is recorded.
    recording = ml.CompiledRecorder(model, tokens=rows * options.output, signals=(), lengths=[1] * rows)
    with _as_path(model, path), recording as recorder:
        decoding = Decoding(model, device, rows, path, options)

        def prepare(on: bool) -> None:
            recorder.paused = True
            decoding.start()
            recorder.clear()
            recorder.paused = not on

        def start(on: bool) -> None:
            bandwidth.append(_bandwidth(device, machine))
            prepare(on)

        prepare(False)
        begun = device.now()
        decoding.run()
        cold = device.now() - begun
        pairs = interleaved(decoding.run, partial(decoding.run), pairs=options.pairs, settle=device.now, prepare=start)
        answers = []
        for on in (False, True):
            prepare(on)
            answers.append(torch.stack(decoding.run(keep=True)))
        expert_id = recorder.columns()["expert_id"]
    reads = [work.weights.read(ids) for ids in expert_id.reshape(steps, rows, *expert_id.shape[1:])]
    kept = [rows * work.cached_bytes(options.prompt + step + 1) for step in range(steps)]
    read = float(np.mean([weights + cache for (weights, _), cache in zip(reads, kept, strict=True)]))
    times = np.array(pairs["bare_and_other_s"]) / steps
    beside = np.array(bandwidth).reshape(-1, 2)[1:]  # of every pair, in the order in which its two were run
    share = read / times.max(1) / beside.mean(1)
    return {
        "step_s": float(np.median(times[:, 0])),
        "step_s_recording": float(np.median(times[:, 1])),
        "tokens_per_s_recording": round(rows / float(np.median(times[:, 1])), 2),
        "read_bytes_a_step": round(read),
        "experts_a_layer": round(float(np.mean([n for _, n in reads])) / len(work.weights.expert_bytes), 3),
        "bandwidth_bytes_per_s": float(np.median(beside)),
        "share_of_bandwidth": round(float(np.median(read / times[:, 0] / beside.mean(1))), 4),
        "share_of_bandwidth_recording": round(float(np.median(read / times[:, 1] / beside.mean(1))), 4),
        "lowest_share_of_a_pair": round(float(share.min()), 4),
        "first_call_beyond_a_later_one_s": round(cold - float(np.median(times[:, 0])) * steps, 2),
        "logits_identical": bool(torch.equal(*answers)),
        "recording": pairs,
    }


def _bandwidth(device: Device, machine: Machine) -> float:
    """Bytes a second that the device reads now, as the sum of a large array."""
    values = torch.ones((128 if device.main.type == "cpu" else 512) << 20, device=device.main)
    return rate(values.sum, values.nbytes, device.now, 1, "sum").estimate


def prefill(
    model: Any, device: Device, machine: Machine, work: Work, options: argparse.Namespace, *, tokens: int
) -> dict[str, Any]:
    """A prompt read with recording on and off in interleaved pairs, and its share of the measured matrix throughput."""
    ids = torch.randint(3, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))
    run = partial(model, input_ids=ids.to(device.main), logits_to_keep=1)
    with ml.CompiledRecorder(model, tokens=tokens, signals=(), lengths=[tokens]) as recorder:

        def prepare(on: bool) -> None:
            recorder.clear()
            recorder.paused = not on

        pairs = interleaved(run, partial(run), pairs=options.pairs, settle=device.now, prepare=prepare)
        prepare(True)
        run()
        read, _ = work.weights.read(recorder.columns()["expert_id"])
    floor_s = max(
        read / machine.bandwidth_bytes_per_s.estimate,
        work.sizes.flops([tokens]) / machine.matmul_flops_per_s.estimate,
    )
    return {
        "tokens_per_s": round(tokens / pairs["bare_s"], 2),
        "tokens_per_s_recording": round(tokens / pairs["other_s"], 2),
        "share_of_the_roof_recording": round(floor_s / pairs["other_s"], 4),
        "recording": pairs,
    }


if __name__ == "__main__":
    main()
