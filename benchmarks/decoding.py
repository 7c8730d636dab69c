"""How fast a Mixtral of random weights reads and writes, with routing recorded inside the compiled graph and without.

    python benchmarks/decoding.py --shape 8x7b --out benchmarks/results/decoding-8x7b.json

Decode runs in a static cache through one compiled graph, greedily, every token's id going straight into the next step;
prefill runs as transformers' own forward. Recording on and off take turns, call by call, so that both meet the same
machine. Beside them stand the bytes that each step must read, given the experts that it chose, and what the device was
measured to do.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from measuring import header, interleaved, write
from recording import SHAPES
from transformers import AutoModelForCausalLM, MixtralConfig, StaticCache

import mixlens as ml
from mixlens.bench.bytes_and_flops import sizes_of, weights_of
from mixlens.bench.hardware import Device, measure
from mixlens.bench.roofline import Machine, Sizes, Weights


@dataclass(frozen=True)
class Settings:
    """Lengths of prompt and answer, how often each is measured, and how decode is compiled."""

    prompt: int
    output: int
    pairs: int
    backend: str
    mode: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--experts", nargs="+", default=["batched_mm", "grouped_mm"], help="of decode, in turn")
    parser.add_argument("--prompt", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--output", type=int, default=256, metavar="TOKENS")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--backend", default="inductor", help="of torch.compile; eager to try the script quickly")
    parser.add_argument("--mode", default="max-autotune", help="of inductor")
    parser.add_argument("--out", help="result file; printed when it is not given")
    options = parser.parse_args()
    settings = Settings(options.prompt, options.output, options.pairs, options.backend, options.mode)
    measured_on = header(torch=torch)
    model = random_model(options.shape)
    device = Device(model)
    # One column at a time, a product of matrices is a sum, into which inductor fuses the choice of the experts' weights
    # that batched_mm would otherwise copy first.
    torch._inductor.config.coordinate_descent_tuning = True
    torch.set_float32_matmul_precision("high")
    machine, sizes = measure(device, model.dtype), Sizes.of(model.config.to_dict())
    weights = weights_of(model)
    results: dict[str, Any] = {"decode": {}, "prefill": {}}
    described = {
        "shape": options.shape,
        "dtype": str(model.dtype),
        "parameters": sizes.total,
        "read_a_token": sizes.read_a_token,
        **asdict(settings),
    }

    def save() -> None:
        content = {"settings": described, "machine": asdict(machine), "results": results}
        write(options.out, "decoding", measured_on, content)

    with torch.inference_mode():
        for rows, experts in product(options.batch, options.experts):
            name = f"batch {rows}, {experts}"
            results["decode"][name] = decode(model, device, (rows, experts), settings, (machine, weights))
            print(name, results["decode"][name]["tokens_per_s_recording"], "tok/s with recording", flush=True)
            if options.out:  # after each, so that a long measurement can be stopped
                save()
        for rows in options.batch:
            results["prefill"][f"batch {rows}"] = prefill(model, device, rows, settings, machine)
            print("prefill", rows, results["prefill"][f"batch {rows}"]["tokens_per_s_recording"], "tok/s", flush=True)
    save()


def random_model(shape: str) -> Any:
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
    return model.eval()


class Decoding:
    """A prompt in a static cache and the compiled step that goes on from it; `recorder` records both."""

    def __init__(self, model: Any, device: Device, rows: int, settings: Settings) -> None:
        self.model, self.settings = model, settings
        generator = torch.Generator().manual_seed(rows)
        ids = torch.randint(3, model.config.vocab_size, (rows, settings.prompt), generator=generator)
        self.ids = ids.to(device.main)
        self.cache = StaticCache(model.config, max_cache_len=settings.prompt + settings.output)
        options = {"mode": settings.mode} if settings.backend == "inductor" else {}
        self._step = torch.compile(self._next, fullgraph=True, dynamic=False, backend=settings.backend, **options)

    def _next(self, token: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=token, past_key_values=self.cache).logits[:, -1:].argmax(-1)

    def start(self) -> None:
        """The prompt is read; not part of what is timed."""
        self.cache.reset()
        logits = self.model(input_ids=self.ids, past_key_values=self.cache, logits_to_keep=1).logits
        self.token = logits.argmax(-1)

    def run(self) -> torch.Tensor:
        """The rest of the answer, one step after the other; tokens [rows, steps]."""
        tokens = []
        for _ in range(self.settings.output - 1):
            torch.compiler.cudagraph_mark_step_begin()
            self.token = self._step(self.token).clone()
            tokens.append(self.token)
        return torch.cat(tokens, 1)


def decode(
    model: Any, device: Device, load: tuple[int, str], settings: Settings, known: tuple[Machine, Weights]
) -> dict[str, Any]:
    """A whole answer with recording on and off in interleaved pairs, and both against the roofline."""
    rows, experts = load
    machine, weights = known
    before = model.config._experts_implementation
    decoding = Decoding(model, device, rows, settings)
    answers: dict[bool, torch.Tensor] = {}
    try:
        # No row is padded: each has one token in every forward that is recorded.
        with ml.CompiledRecorder(model, tokens=rows * settings.output, signals=(), lengths=[1] * rows) as recorder:

            def prepare(recording: bool) -> None:
                recorder.paused = True
                model.set_experts_implementation(before)
                decoding.start()
                model.set_experts_implementation(experts)
                recorder.clear()
                recorder.paused = not recording

            def answer(recording: bool) -> None:
                answers[recording] = decoding.run()

            off, on = partial(answer, False), partial(answer, True)
            pairs = interleaved(off, on, pairs=settings.pairs, settle=device.now, prepare=prepare)
            if recorder.paused:  # the last of the pairs was without
                prepare(True)
                on()
            expert_id = recorder.trace().read("expert_id")
    finally:
        model.set_experts_implementation(before)
    steps = settings.output - 1
    by_step = expert_id.reshape(rows, steps, *expert_id.shape[1:]).swapaxes(0, 1)
    reads = [weights.read(ids) for ids in by_step]
    sizes, value_bytes = sizes_of(model), model.dtype.itemsize
    kept = [rows * value_bytes * sizes.kept(settings.prompt + step + 1) for step in range(steps)]
    read = float(np.mean([of_weights + of_cache for (of_weights, _), of_cache in zip(reads, kept, strict=True)]))
    roof = machine.bandwidth_bytes_per_s.estimate / read * rows
    speeds = {name: rows * steps / pairs[f"{name}_s"] for name in ("bare", "other")}
    return {
        "tokens_per_s": round(speeds["bare"], 3),
        "tokens_per_s_recording": round(speeds["other"], 3),
        "roof_tokens_per_s": round(roof, 3),
        "mbu_frac_recording": round(speeds["other"] / roof, 4),
        "read_bytes_a_step": round(read),
        "experts_a_layer": round(float(np.mean([n for _, n in reads])) / weights.expert_bytes.shape[0], 3),
        "same_tokens": bool(torch.equal(answers[False], answers[True])),
        "recording": pairs,
    }


def prefill(model: Any, device: Device, rows: int, settings: Settings, machine: Machine) -> dict[str, Any]:
    """A prompt read with recording on and off in interleaved pairs, and its share of the measured matrix throughput."""
    decoding = Decoding(model, device, rows, settings)
    room = rows * settings.prompt
    with ml.CompiledRecorder(model, tokens=room, signals=(), lengths=[settings.prompt] * rows) as recorder:

        def prepare(recording: bool) -> None:
            recorder.clear()
            recorder.paused = not recording

        pairs = interleaved(
            partial(decoding.start), decoding.start, pairs=settings.pairs, settle=device.now, prepare=prepare
        )
        recorder.clear()
    flops = Sizes.of(model.config.to_dict()).flops([settings.prompt] * rows)
    return {
        "tokens_per_s": round(rows * settings.prompt / pairs["bare_s"], 2),
        "tokens_per_s_recording": round(rows * settings.prompt / pairs["other_s"], 2),
        "mfu_frac_recording": round(flops / pairs["other_s"] / machine.matmul_flops_per_s.estimate, 4),
        "recording": pairs,
    }


if __name__ == "__main__":
    main()
