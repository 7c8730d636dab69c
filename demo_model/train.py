"""Train the demo model: transformers' own MixtralForCausalLM, on an accelerator when there is one, else on the CPU.

    python -m demo_model.train --data ../shared/corpus --out out/demo_model --tokens 40e6
    python -m demo_model.train --data ../shared/corpus --out out/demo_model --tokens 40e6 --resume

The learning rate warms up, stays, and falls to zero over the last part of `--tokens`; sequences grow from 128 to 4,096.
Until the fall begins a resumed run may be given another `--tokens`.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from demo_model.data import DOMAINS, read_documents, tokenize_corpus, training_batch
from demo_model.evaluate import bits_per_byte
from demo_model.kernels import compile_elementwise, cross_entropy
from demo_model.muon import Muon

CONFIG = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
    "sliding_window": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "router_aux_loss_coef": 0.02,
}
WARM_UP = 500_000  # tokens
FALL = 0.28  # share of the tokens over which the learning rate falls to zero
# From this share of the tokens on: sequence length, sequences a step.
STAGES = ((0.0, 128, 72), (0.3, 256, 36), (0.68, 1024, 12), (0.86, 4096, 4))
LEARNING_RATE = {"muon": 0.02, "embed": 6e-3, "other": 3e-3}
LOG_EVERY, SAVE_EVERY, VALIDATE_EVERY = 50, 50, 500


class RouterLoss:
    """The Switch loss of every layer: experts * sum(share of tokens * mean probability), 1 when balanced.

    transformers' own pools the layers, so that single ones may collapse. The shares are a running mean over steps:
    a step of few long sequences, all of a domain or two, need not be balanced in itself.
    """

    def __init__(self, model: MixtralForCausalLM):
        config = model.config
        self.shares = torch.full((config.num_hidden_layers, config.num_local_experts), 1 / config.num_local_experts)
        self.counts = torch.zeros_like(self.shares)
        self._layers: list[tuple[Tensor, Tensor]] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: tuple, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        if module.training:
            self._layers.append((outputs[0], outputs[2]))

    def __call__(self) -> Tensor:
        """Sum over the layers of the forward just done."""
        experts = self.shares.shape[1]
        counts = [torch.bincount(ids.flatten(), minlength=experts) for _, ids in self._layers]
        counts = torch.stack(counts).cpu().float()
        mean = torch.stack([logits.float().softmax(-1).mean(0) for logits, _ in self._layers])
        self._layers.clear()
        self.counts += counts
        self.shares.lerp_(counts / counts.sum(1, keepdim=True), 0.1)
        return experts * (self.shares.to(mean.device) * mean).sum()

    def worst_load(self) -> list[float]:
        """Load of the most used expert over the mean load, by layer, since the last call."""
        worst = (self.counts.amax(1) / self.counts.mean(1)).tolist()
        self.counts.zero_()
        return [round(value, 3) for value in worst]


class Optimizer:
    """Muon for the matrices of attention and experts, AdamW for the rest, on float32 copies of bfloat16 weights."""

    def __init__(self, model: MixtralForCausalLM):
        self.pairs = [(p, p.detach().float().clone()) for p in model.parameters()]
        matrices, embed, other = [], [], []
        for (name, parameter), (_, master) in zip(model.named_parameters(), self.pairs, strict=True):
            if "proj" in name:
                rows = parameter.shape[-2] // (2 if "gate_up" in name else 1)
                matrices.append((master, rows))
            else:
                (embed if "embed" in name else other).append(master)
        groups = [{"params": embed, "lr": LEARNING_RATE["embed"]}, {"params": other, "lr": LEARNING_RATE["other"]}]
        self.parts = [
            Muon(matrices, lr=LEARNING_RATE["muon"], momentum=0.95, weight_decay=0.05),
            torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True),
        ]
        self._peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def step(self, scale: float) -> None:
        """One update with every learning rate at `scale` times its peak."""
        for parameter, master in self.pairs:
            master.grad = parameter.grad.float()
            parameter.grad = None
        for part, peaks in zip(self.parts, self._peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
            part.step()
        with torch.no_grad():
            for parameter, master in self.pairs:
                parameter.copy_(master)

    def tensors(self) -> dict[str, Tensor]:
        """The float32 weights and the running means, by name and number of the weight."""
        named = {}
        for number, (_, master) in enumerate(self.pairs):
            state = next((part.state[master] for part in self.parts if master in part.state), {})
            named |= {f"{number}.weight": master} | {f"{number}.{name}": value for name, value in state.items()}
        return named

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors()` of another run gave."""
        owner = {id(p): part for part in self.parts for group in part.param_groups for p in group["params"]}
        for number, (parameter, master) in enumerate(self.pairs):
            saved = {name.split(".")[1]: value for name, value in tensors.items() if name.startswith(f"{number}.")}
            with torch.no_grad():
                parameter.copy_(master.copy_(saved.pop("weight")))
            owner[id(master)].state[master] = saved


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def learning_rate_scale(tokens: int, total: float) -> float:
    """1 between the warm-up and the fall."""
    return min(1.0, (tokens + 1) / min(WARM_UP, total / 10), max(0.0, (total - tokens) / (FALL * total)))


def stage(tokens: int, total: float) -> tuple[int, int]:
    """Sequence length and sequences a step."""
    return next((length, rows) for share, length, rows in reversed(STAGES) if tokens >= share * total)


def save(path: Path, optimizer: Optimizer, router_loss: RouterLoss, progress: Progress) -> None:
    """Replace a checkpoint in one go, so that a run killed here keeps the one before."""
    tensors = optimizer.tensors() | {"shares": router_loss.shares, "seconds": torch.tensor(progress.seconds)}
    tensors |= {"step": torch.tensor(progress.step), "tokens": torch.tensor(progress.tokens)}
    save_file(tensors, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)


def resume(path: Path, optimizer: Optimizer, router_loss: RouterLoss, device: torch.device) -> Progress:
    """Put a checkpoint's state back; how far it was."""
    tensors = load_file(path)
    router_loss.shares = tensors.pop("shares")
    progress = Progress(*(tensors.pop(name).item() for name in ("step", "tokens", "seconds")))
    optimizer.load({name: value.to(device) for name, value in tensors.items()})
    return progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="corpus folder, <domain>/{train,validation}.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint, log.jsonl and export/ go here")
    parser.add_argument("--tokenizer", type=Path, default=Path("mixlens/_demo"))
    parser.add_argument("--tokens", type=float, required=True, help="tokens of the whole schedule")
    parser.add_argument("--steps", type=int, help="stop after so many steps in all")
    parser.add_argument("--init", type=Path, help="start from these weights")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    streams = tokenize_corpus(options.data, tokenizer, options.out / "tokens")
    validation = {d: list(read_documents(options.data, d, "validation"))[:8] for d in DOMAINS}
    if options.init:
        model = MixtralForCausalLM.from_pretrained(options.init, dtype=torch.bfloat16)
    else:
        model = MixtralForCausalLM(MixtralConfig(**CONFIG)).bfloat16()
    model.to(device).train()
    experts = "sorted" if device.type == "cpu" else "grouped_mm"
    model.set_experts_implementation(experts)
    router_loss, optimizer, progress = RouterLoss(model), Optimizer(model), Progress()
    checkpoint, log_path = options.out / "checkpoint.safetensors", options.out / "log.jsonl"
    if options.resume:
        progress = resume(checkpoint, optimizer, router_loss, device)
    lines = log_path.read_text("utf-8").splitlines() if options.resume else []
    log_path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= progress.step), "utf-8")
    backbone = model.model
    if not options.no_compile:
        compile_elementwise()
        backbone = torch.compile(model.model, dynamic=False)

    begun, losses = time.monotonic() - progress.seconds, []
    while progress.tokens < options.tokens and progress.step != options.steps:
        length, rows = stage(progress.tokens, options.tokens)
        ids = training_batch(streams, seed=options.seed, step=progress.step, sequences=rows, length=length)
        ids = torch.from_numpy(ids).to(device)
        hidden = backbone(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        loss = cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, ids[:, 1:].flatten())
        balance = router_loss()
        (loss + model.config.router_aux_loss_coef * balance).backward()
        scale = learning_rate_scale(progress.tokens, options.tokens)
        optimizer.step(scale)
        losses.append(loss.item())
        progress.step += 1
        progress.tokens += rows * length
        progress.seconds = time.monotonic() - begun
        done = progress.tokens >= options.tokens or progress.step == options.steps
        if progress.step % LOG_EVERY == 0 or done:
            line = {
                "step": progress.step,
                "tokens": progress.tokens,
                "seconds": round(progress.seconds, 1),
                "length": length,
                "lr_scale": round(scale, 4),
                "loss": round(sum(losses) / len(losses), 4),
                "router_loss": round(balance.item(), 4),
                "max_over_mean": router_loss.worst_load(),
            }
            if progress.step % VALIDATE_EVERY == 0 or done:
                # Documents are of any length: not for compiled kernels, which would be compiled for each.
                model.eval().set_experts_implementation("eager")
                by_domain = [bits_per_byte(model, tokenizer, texts) for texts in validation.values()]
                line["validation_bits_per_byte"] = round(sum(by_domain) / len(by_domain), 4)
                model.train().set_experts_implementation(experts)
            losses.clear()
            with open(log_path, "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        if progress.step % SAVE_EVERY == 0 or done:
            save(checkpoint, optimizer, router_loss, progress)
            model.save_pretrained(options.out / "export")
    tokenizer.save_pretrained(options.out / "export")


if __name__ == "__main__":
    main()
