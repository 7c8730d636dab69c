"""A model that is spread over a card and memory: the time of a forward and the peak on the card, recorded and not.

    python benchmarks/placing.py --shape 8x7b --layers 8 --on-card 4

Long prompts are also read in chunks, recorded in one trace, whose peak has to stay flat beside the cache's growth.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import dispatch_model
from decoding import random_model
from measuring import header, write
from recording import SHAPES
from transformers import DynamicCache

import mixlens as ml
from mixlens.bench.hardware import Device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--card", default="cuda:0", help='"cpu" to try it')
    parser.add_argument("--on-card", type=int, default=2, metavar="LAYERS")
    parser.add_argument("--prompt", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--chunk", type=int, default=32, metavar="TOKENS")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", help="result file; printed when it is not given")
    options = parser.parse_args()
    measured_on = header(torch=torch)
    model = random_model(options.shape)
    weights = ml.audit(model).bytes
    if options.card != "cpu":
        model = _spread(model.to("cpu"), options.card, options.on_card)
    device = Device(model)
    results: dict[str, Any] = {"weights_bytes": weights}
    with torch.inference_mode():
        for records in (False, True):
            seconds, peaks = [], []
            for _ in range(options.pairs + 1):
                device.reset_peak()
                start = device.now()
                peaks.append(_read(model, device, options, records))
                seconds.append(device.now() - start)
            results["recorded" if records else "bare"] = {"seconds": seconds[1:], "peak_bytes_by_chunk": peaks[-1]}
            write(options.out, "placing", measured_on, {"settings": vars(options), "results": results})


def _spread(model: Any, card: str, on_card: int) -> Any:
    """The first layers on the card, and the others in memory, from which accelerate brings them for each forward."""
    places: dict[str, Any] = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), card)
    for layer in range(model.config.num_hidden_layers):
        places[f"model.layers.{layer}"] = card if layer < on_card else "cpu"
    return dispatch_model(model, places, main_device=card)


def _read(model: Any, device: Device, options: argparse.Namespace, records: bool) -> list[int]:
    """Read the prompt in chunks; the peak of memory after each."""
    ids = torch.randint(3, model.config.vocab_size, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    cache, peaks = DynamicCache(config=model.config), []

    def chunks() -> None:
        for part in ids.split(options.chunk, 1):
            model(input_ids=part.to(device.main), past_key_values=cache, logits_to_keep=1)
            peaks.extend(device.peak().values())

    if records:
        with ml.Recorder(model, signals=()) as recorder:
            chunks()
            assert recorder.n_tokens == options.prompt
    else:
        chunks()
    return peaks


if __name__ == "__main__":
    main()
