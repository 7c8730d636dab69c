"""Explorer: type a prompt, watch its routing as it is generated, record and evaluate, all from one notebook cell."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ipywidgets
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from mixlens import stats
from mixlens.errors import MixlensError
from mixlens.evals.log import Log
from mixlens.evals.runner import EvalSettings, evaluate
from mixlens.models.layout import input_device, moe_layers
from mixlens.show import view
from mixlens.show.view.text import packed_tokens
from mixlens.show.view.widget import ViewWidget
from mixlens.traces.record import RecordSettings, record, tokenizer_of, vocabulary_of
from mixlens.traces.recorder import Recorder
from mixlens.traces.trace import Trace, concat

_OWN = "own text"
_PROMPT_CHARACTERS = 300
_SHOWN_EVERY = 4  # tokens between two updates of the view while generating
_COLUMNS = ("task", "metric", "score", "ci_low", "ci_high", "n", "protocol")
_BOOTSTRAP = stats.Bootstrap(replicates=200)


class _Stopped(Exception):
    """Raised inside a forward when the stop button was pressed."""


class Explorer(ipywidgets.VBox):
    """Widgets round a loaded model: prompt, live routing, recording and evaluation with progress and a stop button.

    model      from `load`, or any Mixtral of transformers
    documents  mappings with text and domain: starts of prompts by domain, and what "record" reads; none by default
    tokenizer  None for the one that belongs to the model

    `trace` is what was last generated or recorded, `evaluation` what was last evaluated; None before. Work runs in a
    thread, so that the notebook stays free and "stop" is heard at the next forward.
    """

    def __init__(
        self, model: torch.nn.Module, documents: Iterable[Mapping[str, Any]] = (), *, tokenizer: Any = None
    ) -> None:
        self.model: Any = model
        self.documents = list(documents)
        self.tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model)
        self._vocabulary = vocabulary_of(self.tokenizer)
        self.trace: Trace | None = None
        self.evaluation: Log | None = None
        self._stopping = threading.Event()
        self._worker: threading.Thread | None = None
        self._make_controls()
        super().__init__([self._generating(), self.text, self._recording(), self.maps, self._evaluating(), self.scores])

    # ------------------------------------------------------------------ controls

    def _make_controls(self) -> None:
        self.prompt = ipywidgets.Textarea(description="prompt", layout={"width": "100%"}, rows=3)
        self.domain = ipywidgets.Dropdown(description="domain", options=[_OWN, *self._domains()])
        self.new_tokens = ipywidgets.BoundedIntText(60, min=1, max=4096, description="new tokens")
        self.n_documents = ipywidgets.BoundedIntText(
            min(24, len(self.documents)), min=0, max=len(self.documents), description="documents"
        )
        self.tasks = ipywidgets.Text(placeholder="mmlu, gsm8k ...", description="tasks")
        self.limit = ipywidgets.BoundedIntText(8, min=1, max=10**6, description="samples")
        self.progress = ipywidgets.IntProgress(layout={"width": "160px"})
        self.status = ipywidgets.HTML()
        self.text, self.maps, self.scores = (ipywidgets.VBox() for _ in range(3))
        self.buttons = {
            name: ipywidgets.Button(description=name) for name in ("generate", "record", "evaluate", "stop")
        }
        self.buttons["stop"].disabled = True
        self.buttons["generate"].on_click(lambda _: self.start(self._generate))
        self.buttons["record"].on_click(lambda _: self.start(self._record))
        self.buttons["evaluate"].on_click(lambda _: self.start(self._evaluate))
        self.buttons["stop"].on_click(lambda _: self._stopping.set())
        self.domain.observe(self._take_prompt, "value")

    def _generating(self) -> ipywidgets.Widget:
        row = [self.domain, self.new_tokens, self.buttons["generate"], self.buttons["stop"], self.progress, self.status]
        return ipywidgets.VBox([self.prompt, ipywidgets.HBox(row, layout={"flex_flow": "row wrap"})])

    def _recording(self) -> ipywidgets.Widget:
        return ipywidgets.HBox([self.n_documents, self.buttons["record"]])

    def _evaluating(self) -> ipywidgets.Widget:
        return ipywidgets.HBox([self.tasks, self.limit, self.buttons["evaluate"]])

    def _domains(self) -> list[str]:
        return list(dict.fromkeys(str(d["domain"]) for d in self.documents if "domain" in d))

    def _take_prompt(self, change: Mapping[str, Any]) -> None:
        if change["new"] != _OWN:
            first = next(d for d in self.documents if str(d.get("domain")) == change["new"])
            self.prompt.value = str(first["text"])[:_PROMPT_CHARACTERS]

    # ------------------------------------------------------------------ running

    def start(self, work: Callable[[], str]) -> None:
        """Run `work` in a thread; nothing happens while something runs."""
        if self._worker is not None and self._worker.is_alive():
            return
        self._stopping.clear()
        self._worker = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._worker.start()

    def wait(self) -> None:
        """Until what runs is done or stopped; for scripts and tests, since a notebook that waits hears no button."""
        if self._worker is not None:
            self._worker.join()

    def _run(self, work: Callable[[], str]) -> None:
        self._busy(True)
        try:
            self._say(work())
        except _Stopped:
            self._say("Stopped.")
        except MixlensError as error:
            self._say(str(error))
        except Exception as error:  # a thread's traceback would reach nobody
            self._say(f"{type(error).__name__}: {error}")
        finally:
            self._busy(False)

    def _busy(self, busy: bool) -> None:
        for name, button in self.buttons.items():
            button.disabled = busy != (name == "stop")

    def _say(self, text: str) -> None:
        self.status.value = html.escape(text)

    @contextmanager
    def _stoppable(self, *, count: int):
        """Forwards of the model raise when "stop" was pressed, and move the progress bar towards `count`."""
        self.progress.value, self.progress.max = 0, count

        def check(*_: Any) -> None:
            if self._stopping.is_set():
                raise _Stopped
            self.progress.value = min(self.progress.value + 1, self.progress.max)

        first = moe_layers(self.model)[0]  # part of every forward, also of those that pass by the model's own
        handle = first.decoder.register_forward_pre_hook(check)
        try:
            yield
        finally:
            handle.remove()

    # ------------------------------------------------------------------ what it does

    def _generate(self) -> str:
        inputs = self.tokenizer(self.prompt.value, return_tensors="pt").to(input_device(self.model))
        n_prompt = inputs["input_ids"].shape[1]
        with self._stoppable(count=self.new_tokens.value), Recorder(self.model, signals=["router_logits"]) as recorder:
            watch = StoppingCriteriaList([_Watch(lambda n: self._show_tokens(recorder.trace(), n - n_prompt))])
            try:
                self.model.generate(
                    **inputs, max_new_tokens=self.new_tokens.value, do_sample=False, stopping_criteria=watch
                )
                ended = "Generated"
            except _Stopped:
                ended = "Stopped after"
            self.trace = recorder.trace()
        self._show_tokens(self.trace, 0)
        return (
            f"{ended} {self.trace.select(phase='generated').n_tokens} recorded tokens after {n_prompt} of the prompt."
        )

    def _show_tokens(self, trace: Trace, n_new: int) -> None:
        if n_new % _SHOWN_EVERY:
            return
        trace._vocabulary = self._vocabulary
        packed = packed_tokens(trace, [0], int(trace.layers[trace.n_layers // 2]))
        if self.text.children:
            self.text.children[0].packed = packed
        else:
            self.text.children = (ViewWidget(kind="tokens", packed=packed),)

    def _record(self) -> str:
        kept = [{"id": n, **document} for n, document in enumerate(self.documents[: self.n_documents.value])]
        parts: list[Trace] = []
        settings = RecordSettings(progress=False, overlong="truncate")
        ended = "Recorded"
        try:
            with self._stoppable(count=len(kept)):
                for document in kept:
                    parts.append(record(self.model, [document], tokenizer=self.tokenizer, settings=settings))
        except _Stopped:
            ended = "Stopped after"
        if not parts:
            return f"{ended} 0 documents."
        self.trace = concat(parts)
        by = "domain" if "domain" in self.trace.sequences else None
        share = stats.expert_share(self.trace, by=by, bootstrap=_BOOTSTRAP)
        self.maps.children = (view.share_heatmap(share).widget(), view.expert_share(share).widget())
        return f"{ended} {len(parts)} of {len(kept)} documents, {self.trace.n_tokens:,} tokens."

    def _evaluate(self) -> str:
        names: Sequence[str] = [name.strip() for name in self.tasks.value.split(",") if name.strip()]
        with self._stoppable(count=self.limit.value * max(1, len(names))):
            log = evaluate(self.model, names, limit=self.limit.value, settings=EvalSettings(progress=False))
        self.evaluation = log
        columns = [name for name in _COLUMNS if name in log.scores]
        table = ipywidgets.HTML(log.scores[columns].to_html(index=False, float_format="{:.3f}".format))
        self.scores.children = (table, view.samples(log).widget())
        return f"Evaluated {len(log.samples)} samples."


class _Watch(StoppingCriteria):
    """Tells how many tokens there are after every step of generate; never stops it."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self._tell(int(input_ids.shape[1]))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
