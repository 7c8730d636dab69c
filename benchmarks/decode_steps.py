"""What each part of `decode_kernels.py` brings to a compiled decode step at batch 1, and what recording costs in it.

    python benchmarks/decode_steps.py --layers 32 --only "all, recording"

Weights are random, of 8x7B's width, in bfloat16, made on the card. Every variant decodes as many tokens after the same
prompt. The recording variant is one graph that always writes ids and weights: a flag on the device sends them to a
spare row, so that the same kernels compute the tokens with and without recording.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import torch
from decode_kernels import experts_forward, grouped_attention, router_forward
from decoding import random_model
from measuring import header, write
from recording import SHAPES
from transformers import AttentionInterface, StaticCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from mixlens.bench.hardware import Device, measure
from mixlens.bench.roofline import Sizes

# Name: experts implementation, attention, router, recording.
VARIANTS: dict[str, tuple[str, str, Any, bool]] = {
    "all, recording": ("gemv", "grouped", router_forward, True),
    "all": ("gemv", "grouped", router_forward, False),
    "as it is": ("batched_mm", "sdpa", MixtralTopKRouter.forward, False),
    "experts": ("gemv", "sdpa", MixtralTopKRouter.forward, False),
    "experts, router": ("gemv", "sdpa", router_forward, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--prompt", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--output", type=int, default=97, metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="after which no variant starts")
    parser.add_argument("--out", help="result file, written after every variant; printed when it is not given")
    options = parser.parse_args()
    ALL_EXPERTS_FUNCTIONS.register("gemv", experts_forward)
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", sdpa_mask)
    torch._inductor.config.coordinate_descent_tuning = True
    started, measured_on = time.perf_counter(), header(torch=torch)
    full = SHAPES["8x7b"]
    SHAPES["8x7b"] = replace(full, config={**full.config, "num_hidden_layers": options.layers})
    model = random_model("8x7b")
    device = Device(model)
    bandwidth = measure(device, model.dtype).bandwidth_bytes_per_s.estimate
    read = Sizes.of(model.config.to_dict()).read_a_token * model.dtype.itemsize
    settings = {**vars(options), "read_bytes_a_step": read, "bandwidth_bytes_per_s": bandwidth}
    results: dict[str, Any] = {}
    for name in options.only:
        if time.perf_counter() - started > options.budget:
            results[name] = "not measured: the budget was spent"
            continue
        results[name] = measured(model, device, VARIANTS[name], options)
        results[name]["tokens_per_s"] = round(1 / min(results[name]["step_s"]), 2)
        results[name]["share_of_the_roof"] = round(read / bandwidth / min(results[name]["step_s"]), 4)
        print(name, results[name], flush=True)
        if options.out:
            write(options.out, "decode-steps", measured_on, {"settings": settings, "results": results})
    if not options.out:
        write(None, "decode-steps", measured_on, {"settings": settings, "results": results})


def measured(model: Any, device: Device, variant: tuple[str, str, Any, bool], options: argparse.Namespace) -> dict:
    """Seconds a step of every repeat, and with recording on and off in turns where the variant records."""
    experts, attention, router, records = variant
    torch.compiler.reset()
    MixtralTopKRouter.forward = router
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, model.config.vocab_size, (1, options.prompt), generator=generator).to(device.main)
    cache = StaticCache(model.config, max_cache_len=options.prompt + options.output + 1)
    recording = Recording(model, device, options.output) if records else None

    def step(token: torch.Tensor) -> torch.Tensor:
        chosen = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
        if recording is not None:
            recording.write()
        return chosen

    compiled = torch.compile(step, fullgraph=True, dynamic=False, mode="max-autotune")

    def answer(steps: int) -> tuple[float, torch.Tensor]:
        cache.reset()
        model.set_experts_implementation("grouped_mm")
        model.set_attn_implementation("sdpa")
        token = model(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        if recording is not None:
            recording.clear()
        model.set_experts_implementation(experts)
        model.set_attn_implementation(attention)
        start, tokens = device.now(), []
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            token = compiled(token).clone()
            tokens.append(token)
        return (device.now() - start) / steps, torch.cat(tokens, 1)

    steps = options.output - 1
    try:
        with torch.inference_mode():
            begun = device.now()
            answer(4)
            found: dict[str, Any] = {"compile_s": round(device.now() - begun, 1)}
            if recording is None:
                found["step_s"] = [answer(steps)[0] for _ in range(options.repeats)]
                return found
            on, off, same = [], [], True
            for _ in range(options.repeats):
                recording.on.fill_(1)
                seconds, with_it = answer(steps)
                on.append(seconds)
                recording.on.fill_(0)
                seconds, without = answer(steps)
                off.append(seconds)
                same &= bool(torch.equal(with_it, without))
            return found | {"step_s": on, "step_s_without_recording": off, "same_tokens": same}
    finally:
        if recording is not None:
            recording.remove()


class Recording:
    """Ids and weights of every layer, stacked and written once a step by the graph itself, while `on` is 1."""

    def __init__(self, model: Any, device: Device, room: int) -> None:
        layers, k = model.config.num_hidden_layers, model.config.num_experts_per_tok
        self._room = room
        self.ids = torch.zeros((room + 1, layers, k), dtype=torch.uint8, device=device.main)
        self.weights = torch.zeros((room + 1, layers, k), device=device.main)
        self.count = torch.zeros((), dtype=torch.long, device=device.main)
        self.on = torch.ones((), dtype=torch.long, device=device.main)
        for buffer in (self.ids, self.weights, self.count, self.on):
            torch._dynamo.mark_static_address(buffer)
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._hooks = [layer.mlp.gate.register_forward_hook(self._keep) for layer in model.model.layers]

    def _keep(self, _gate: Any, _inputs: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        self._seen.append((output[2], output[1]))

    def write(self) -> None:
        where = torch.where(self.on > 0, self.count, self._room).view(1)
        self.ids.index_copy_(0, where, torch.stack([ids for ids, _ in self._seen], 1).to(torch.uint8))
        self.weights.index_copy_(0, where, torch.stack([weights for _, weights in self._seen], 1))
        self.count.add_(self.on)
        self._seen.clear()

    def clear(self) -> None:
        self._seen.clear()
        self.count.zero_()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


if __name__ == "__main__":
    main()
