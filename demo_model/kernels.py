"""The two parts of a step that plain modules make slow on a CPU: the experts, and the loss over the vocabulary.

Both compute what transformers' modules compute, forward and backward, with fewer passes over memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


def _swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, with both in one tensor."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _swiglu_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    """Gradient of `_swiglu` with respect to its argument."""
    half = gate_up.shape[-1] // 2
    gate, up, grad = gate_up[:, :half].float(), gate_up[:, half:].float(), grad.float()
    sigmoid = torch.sigmoid(gate)
    result = torch.empty_like(gate_up)  # written in halves: inductor's code for torch.cat is half as fast
    result[:, :half] = (grad * up * sigmoid * (1 + gate * (1 - sigmoid))).to(result.dtype)
    result[:, half:] = (grad * gate * sigmoid).to(result.dtype)
    return result


def _cross_entropy_chunk(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of some rows, and its gradient with respect to their logits."""
    scores = logits.float()
    top = scores.amax(dim=-1, keepdim=True)
    exponent = torch.exp(scores - top)
    total = exponent.sum(dim=-1, keepdim=True)
    loss = (total.log() + top - scores.gather(1, target[:, None])).sum()
    hit = torch.arange(scores.shape[1], device=scores.device)[None] == target[:, None]
    return loss, (exponent / total - hit.float()).to(logits.dtype)


_elementwise = {"swiglu": _swiglu, "swiglu_backward": _swiglu_backward, "cross_entropy_chunk": _cross_entropy_chunk}


def compile_elementwise() -> None:
    """Let inductor fuse the elementwise parts from now on."""
    for name, function in _elementwise.items():
        _elementwise[name] = torch.compile(function)


def _blocks(ids: Tensor, experts: int) -> list[tuple[int, int]]:
    ends = torch.bincount(ids.flatten(), minlength=experts).cumsum(0).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@torch.library.custom_op("demo_model::experts", mutates_args=())
def _experts(
    hidden: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens sorted by expert, so that each expert multiplies one contiguous block."""
    tokens, top_k = ids.shape
    order = ids.flatten().argsort(stable=True)
    rows = hidden[order // top_k]
    inner = rows.new_empty(len(rows), gate_up.shape[1])
    blocks = _blocks(ids, len(gate_up))
    for expert, (start, end) in enumerate(blocks):
        torch.mm(rows[start:end], gate_up[expert].t(), out=inner[start:end])
    active = _elementwise["swiglu"](inner)
    out = torch.empty_like(rows)
    for expert, (start, end) in enumerate(blocks):
        torch.mm(active[start:end], down[expert].t(), out=out[start:end])
    result = (out[order.argsort()].view(tokens, top_k, -1) * weights.to(out.dtype)[..., None]).sum(1)
    return result, order, inner, active, out


@_experts.register_fake
def _(hidden, ids, weights, gate_up, down):
    pairs = ids.numel()
    return (
        torch.empty_like(hidden),
        ids.new_empty(pairs),
        hidden.new_empty(pairs, gate_up.shape[1]),
        hidden.new_empty(pairs, down.shape[2]),
        hidden.new_empty(pairs, hidden.shape[1]),
    )


@torch.library.custom_op("demo_model::experts_backward", mutates_args=())
def _experts_backward(
    grad: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor,
    order: Tensor, inner: Tensor, active: Tensor, out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, top_k = ids.shape
    blocks, back = _blocks(ids, len(gate_up)), order.argsort()
    grad, rows = grad[order // top_k], hidden[order // top_k]
    grad_weights = (grad * out).sum(-1, dtype=torch.float32)[back].view(tokens, top_k)
    grad = grad * weights.flatten()[order].to(grad.dtype)[:, None]
    grad_active, grad_rows = torch.empty_like(active), torch.empty_like(rows)
    grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
    for expert, (start, end) in enumerate(blocks):
        torch.mm(grad[start:end], down[expert], out=grad_active[start:end])
        torch.mm(grad[start:end].t(), active[start:end], out=grad_down[expert])
    grad_inner = _elementwise["swiglu_backward"](inner, grad_active)
    for expert, (start, end) in enumerate(blocks):
        torch.mm(grad_inner[start:end], gate_up[expert], out=grad_rows[start:end])
        torch.mm(grad_inner[start:end].t(), rows[start:end], out=grad_gate_up[expert])
    grad_hidden = grad_rows[back].view(tokens, top_k, -1).sum(1)
    return grad_hidden, grad_weights.to(weights.dtype), grad_gate_up, grad_down


@_experts_backward.register_fake
def _(grad, hidden, ids, weights, gate_up, down, order, inner, active, out):
    return torch.empty_like(hidden), torch.empty_like(weights), torch.empty_like(gate_up), torch.empty_like(down)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])


def _backward(ctx, grad, *unused):
    grad_hidden, grad_weights, grad_gate_up, grad_down = _experts_backward(grad.contiguous(), *ctx.saved_tensors)
    return grad_hidden, None, grad_weights, grad_gate_up, grad_down


_experts.register_autograd(_backward, setup_context=_keep)


def sorted_experts(module: torch.nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """An experts implementation for transformers: `model.set_experts_implementation("sorted")`."""
    return _experts(hidden, ids, weights, module.gate_up_proj, module.down_proj)[0]


ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are made on the way forward, so that no more than one chunk of logits is ever held."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, target: Tensor, chunk: int) -> Tensor:
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=torch.float32)
        for start in range(0, len(target), chunk):
            part = hidden[start : start + chunk]
            logits = part @ head.t()
            part_loss, grad_logits = _elementwise["cross_entropy_chunk"](logits, target[start : start + chunk])
            loss += part_loss
            torch.mm(grad_logits, head, out=grad_hidden[start : start + chunk])
            grad_head += grad_logits.t() @ part
        ctx.save_for_backward(grad_hidden.div_(len(target)), grad_head.div_(len(target)).to(head.dtype))
        return loss / len(target)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad, grad_head * grad, None, None


def cross_entropy(hidden: Tensor, head: Tensor, target: Tensor, *, chunk: int = 512) -> Tensor:
    """Mean next-token loss in nats of `hidden` [T, H] under the output matrix `head` [V, H]."""
    return _ChunkedCrossEntropy.apply(hidden, head, target, chunk)
