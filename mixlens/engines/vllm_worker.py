"""A vLLM worker that records the routing of every token. vLLM imports it by name in its worker processes.

Taps are attached when the weights are loaded, before anything is compiled or captured as a graph. They write only to
buffers of fixed size, so compiled code and graphs record too.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.layer import MoERunner  # pyright: ignore[reportMissingImports]
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker  # pyright: ignore[reportMissingImports]
else:
    from vllm.v1.worker.gpu_worker import Worker  # pyright: ignore[reportMissingImports]


class RecordingWorker(Worker):
    """Records expert ids and router logits of every layer, with the request and position of each row."""

    def load_model(self, **options: Any) -> None:
        super().load_model(**options)
        runners = [module for module in self.get_model().modules() if isinstance(module, MoERunner)]
        n_tokens = self.vllm_config.scheduler_config.max_num_batched_tokens
        device = next(self.get_model().parameters()).device
        shape = n_tokens, len(runners)
        self._ids = torch.full((*shape, runners[0].router.top_k), -1, dtype=torch.int32, device=device)
        self._logits = torch.zeros((*shape, runners[0].router.global_num_experts), device=device)
        self._parts: dict[str, list[tuple[int, int, bytes, bytes]]] = {}
        for layer, runner in enumerate(runners):
            _tap(runner.router, self._ids[:, layer], self._logits[:, layer])

    def execute_model(self, scheduler_output: Any) -> Any:
        n = scheduler_output.total_num_scheduled_tokens
        self._ids[:n].fill_(-1)
        output = super().execute_model(scheduler_output)
        if n and self.rank == 0:
            self._keep(n, scheduler_output.num_scheduled_tokens)
        return output

    def _keep(self, n: int, scheduled: dict[str, int]) -> None:
        """Return the rows of this step, in the order of the runner's batch."""
        ids, logits = self._ids[:n].cpu(), self._logits[:n].cpu()
        if (ids < 0).any():
            raise RuntimeError("mixlens cannot record this model: a layer routed where its router was not asked")
        runner = self.model_runner
        batch = getattr(getattr(runner, "execute_model_state", None), "input_batch", None)
        if batch is not None and hasattr(batch, "num_computed_tokens_np"):  # vLLM's second model runner
            computed = batch.num_computed_tokens_np
        else:
            batch = runner.input_batch
            computed = batch.num_computed_tokens_cpu
        row = 0
        for request, first in zip(list(batch.req_ids), computed, strict=False):
            count = scheduled[request]
            rows = slice(row, row + count)
            part = (int(first), count, ids[rows].numpy().tobytes(), logits[rows].numpy().tobytes())
            self._parts.setdefault(request, []).append(part)
            row += count

    def mixlens_take(self) -> dict[str, list[tuple[int, int, bytes, bytes]]]:
        """Return recordings since the previous call: for each request (first position, rows, ids, logits)."""
        taken, self._parts = self._parts, {}
        return taken


def _tap(router: Any, ids: torch.Tensor, logits: torch.Tensor) -> None:
    inner = router.select_experts

    def select_experts(*args: Any, router_logits: torch.Tensor, **options: Any) -> Any:
        logits[: router_logits.shape[0]].copy_(router_logits)
        return inner(*args, router_logits=router_logits, **options)

    def capture(chosen: torch.Tensor) -> None:
        ids[: chosen.shape[0]].copy_(chosen)

    router.select_experts = select_experts
    router.set_capture_fn(capture)
