"""Explorer: a notebook cell to prompt a model, watch its routing, record and evaluate."""

from __future__ import annotations

import html
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ipywidgets
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from mixlens import stats, view
from mixlens.errors import BadInput, MixlensError
from mixlens.evals.log import Log
from mixlens.evals.runner import EvalSettings, evaluate
from mixlens.live.tokens import packed_tokens
from mixlens.live.widget import ViewWidget
from mixlens.models.layout import input_device, moe_layers
from mixlens.recording.corpus import RecordSettings, tokenizer_of, vocabulary_of
from mixlens.recording.documents import Documents
from mixlens.recording.record import record
from mixlens.recording.recorder import Recorder
from mixlens.trace.trace import Trace, concat

_OWN = "own text"
_PROMPT_CHARACTERS = 300
_SHOWN_EVERY = 4  # tokens between two updates of the view while generating
_COLUMNS = ("task", "metric", "average", "score", "ci_low", "ci_high", "n", "protocol")
_BOOTSTRAP = stats.Bootstrap(replicates=200)
_ROW = {"flex_flow": "row wrap", "align_items": "center"}
_GRID = {"grid_template_columns": "repeat(3, max-content)"}
_CELLS = "<style>.mixlens-scores td, .mixlens-scores th {padding: 2px 10px; text-align: left; line-height: 1.4}</style>"


class _Stopped(Exception):
    """Raised inside a forward pass after the stop button was pressed."""


class Explorer(ipywidgets.VBox):
    """Notebook widgets for a loaded model: prompt, live routing, recording and evaluation, with a stop button.

    Work runs in a thread, so the notebook stays responsive and "stop" takes effect at the next forward pass. Partial
    results are kept: tokens and documents in `trace`; an evaluation resumes if it is started again next.

    Parameters
    ----------
    model : torch.nn.Module
        From `load`, or any Mixtral of transformers.
    documents : iterable, optional
        As in `record`. "record" reads them, alternating between domains, and each domain offers one as a prompt.
    tokenizer : optional
        Tokenizer of the model by default.
    data : str or pathlib.Path, optional
        Folder with benchmarks in their original formats, as in `evaluate`. By default they are loaded from the Hub.

    Attributes
    ----------
    trace : Trace or None
        The last recording, or the routing of the last generated text.
    evaluation : Log or None
        The last finished evaluation.

    Raises
    ------
    BadInput
        If `record` would refuse the documents, or the model has no tokenizer.

    Examples
    --------
    >>> explorer = ml.Explorer(model, documents)
    >>> explorer.prompt.value, explorer.new_tokens.value = "The proof is by induction.", 4
    >>> explorer.buttons["generate"].click()
    >>> explorer.wait()
    >>> explorer.trace.n_tokens > 4
    True
    """

    def __init__(
        self,
        model: torch.nn.Module,
        documents: Iterable[Any] | None = None,
        *,
        tokenizer: Any = None,
        data: str | Path | None = None,
    ) -> None:
        moe_layers(model)
        self.model: Any = model
        given = [] if documents is None else Documents(documents, "text")
        self.documents = _in_turn([{"id": d.id, "text": d.text, **d.columns} for d in given])
        self.tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model)
        self.data = data
        self._vocabulary = vocabulary_of(self.tokenizer)
        self.trace: Trace | None = None
        self.evaluation: Log | None = None
        self._kept = tempfile.TemporaryDirectory(prefix="mixlens-explorer-")  # evaluations; deleted with the explorer
        self._unfinished: dict[Any, Path] = {}
        self._stopping = threading.Event()
        self._worker: threading.Thread | None = None
        self._make_controls()
        rows = [
            [self.domain, self.new_tokens, self.buttons["generate"]],
            [self.n_documents, ipywidgets.Label(), self.buttons["record"]],
            [self.tasks, self.limit, self.buttons["evaluate"]],
        ]
        controls = ipywidgets.GridBox([control for row in rows for control in row], layout=_GRID)
        running = ipywidgets.HBox([self.buttons["stop"], self.progress, self.status], layout=_ROW)
        super().__init__([self.prompt, controls, running, self.text, self.maps, self.scores, self.samples])

    # ------------------------------------------------------------------ controls

    def _make_controls(self) -> None:
        self.prompt = ipywidgets.Textarea(description="prompt", layout={"width": "auto"}, rows=3)
        self.domain = ipywidgets.Dropdown(description="domain", options=[_OWN, *self._domains()])
        self.new_tokens = ipywidgets.BoundedIntText(60, min=1, max=4096, description="new tokens")
        self.n_documents = ipywidgets.BoundedIntText(
            min(24, len(self.documents)), min=0, max=len(self.documents), description="documents"
        )
        self.tasks = ipywidgets.Text(placeholder="mmlu_5shot, gsm8k_5shot ...", description="tasks")
        self.limit = ipywidgets.BoundedIntText(8, min=1, max=10**6, description="samples")
        self.progress = ipywidgets.IntProgress(layout={"width": "300px"})
        self.status = ipywidgets.HTML()
        self.scores = ipywidgets.HTML()
        self.text, self.maps, self.samples = (ipywidgets.VBox() for _ in range(3))
        works = {"generate": self._generate, "record": self._record, "evaluate": self._evaluate}
        self.buttons = {name: ipywidgets.Button(description=name) for name in (*works, "stop")}
        for name, work in works.items():
            self.buttons[name].on_click(lambda _, work=work: self.start(work))
        self.buttons["stop"].on_click(lambda _: self._stopping.set())
        self.buttons["stop"].disabled = True
        self.domain.observe(self._choose_domain, "value")

    def _domains(self) -> list[str]:
        return list(dict.fromkeys(str(d["domain"]) for d in self.documents if "domain" in d))

    def _choose_domain(self, change: Mapping[str, Any]) -> None:
        """Put the start of a document of the domain into the prompt, and select the domain in the maps."""
        if change["new"] == _OWN:
            return
        first = next(d for d in self.documents if str(d.get("domain")) == change["new"])
        self.prompt.value = str(first["text"])[:_PROMPT_CHARACTERS]
        for shown in self.maps.children[:1]:  # the first map passes it on to the others
            shown.asked = {"domain": change["new"]}

    # ------------------------------------------------------------------ running

    def start(self, work: Callable[[], str]) -> None:
        """Run `work` in a thread; do nothing while other work is running.

        Parameters
        ----------
        work : callable
            A function without arguments that returns the text for the status line.

        Examples
        --------
        >>> explorer = ml.Explorer(model)
        >>> explorer.start(lambda: "Done.")
        >>> explorer.wait()
        >>> explorer.status.value
        'Done.'
        """
        if self._worker is not None and self._worker.is_alive():
            return
        self._stopping.clear()
        self._worker = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._worker.start()

    def wait(self) -> None:
        """Wait until the running work is done or stopped.

        Meant for scripts and tests, because a notebook that waits does not react to buttons.

        Examples
        --------
        >>> explorer = ml.Explorer(model)
        >>> explorer.wait()  # returns at once: nothing is running
        """
        if self._worker is not None:
            self._worker.join()

    def _run(self, work: Callable[[], str]) -> None:
        self._busy(True)
        self._say("Running ...")
        try:
            self._say(work())
        except MixlensError as error:
            self._say(str(error))
        except Exception as error:  # nobody would see a thread's traceback
            self._say(f"{type(error).__name__}: {error}")
        finally:
            self._busy(False)

    def _busy(self, busy: bool) -> None:
        for name, button in self.buttons.items():
            button.disabled = busy != (name == "stop")

    def _say(self, text: str) -> None:
        self.status.value = html.escape(text)

    def _reach(self, done: int, total: int) -> None:
        """Move the progress bar, unless "stop" was pressed."""
        if self._stopping.is_set():
            raise _Stopped
        self.progress.max, self.progress.value = total, done

    @contextmanager
    def _stoppable(self, forwards: int | None = None):
        """Make forward passes of the model raise after "stop" was pressed; `forwards` of them fill the progress bar."""
        self.progress.value = 0

        def heed(*_: Any) -> None:
            value, total = self.progress.value, self.progress.max
            self._reach(*((value, total) if forwards is None else (min(value + 1, forwards), forwards)))

        first = moe_layers(self.model)[0]  # runs in every forward, even in those that bypass the model's own
        handle = first.decoder.register_forward_pre_hook(heed)
        try:
            yield
        finally:
            handle.remove()

    # ------------------------------------------------------------------ actions

    def _generate(self) -> str:
        inputs = self.tokenizer(self.prompt.value, return_tensors="pt").to(input_device(self.model))
        n_prompt = inputs["input_ids"].shape[1]
        if not n_prompt:
            raise BadInput(
                "Cannot generate text: the prompt has no tokens. Type a prompt, or choose a domain.",
                argument="prompt",
            )
        with Recorder(self.model, signals=["router_logits"]) as recorder:
            watch = StoppingCriteriaList([_Watch(lambda n: self._stream(recorder, n - n_prompt))])
            ended = "Generated"
            try:
                with self._stoppable(self.new_tokens.value):
                    self.model.generate(
                        **inputs, max_new_tokens=self.new_tokens.value, do_sample=False, stopping_criteria=watch
                    )
            except _Stopped:
                ended = "Stopped after"
            finally:  # keep what was recorded, however generation ended
                self._show_tokens(recorder)
            return f"{ended} {max(recorder.n_tokens - n_prompt, 0)} recorded tokens after {n_prompt} of the prompt."

    def _stream(self, recorder: Recorder, n_new: int) -> None:
        """Show every fourth token, and fewer as the text grows, because each update redraws all tokens."""
        if n_new % max(_SHOWN_EVERY, 1 << max(n_new.bit_length() - 4, 0)) == 0:
            self._show_tokens(recorder)

    def _show_tokens(self, recorder: Recorder) -> None:
        if not recorder.n_tokens:
            return
        self.trace = recorder.trace()
        self.trace._vocabulary = self._vocabulary
        packed = packed_tokens(self.trace, [0], int(self.trace.layers[self.trace.n_layers // 2]))
        _put(self.text, {"tokens": packed})

    def _record(self) -> str:
        kept = self.documents[: self.n_documents.value]
        parts: list[Trace] = []
        settings = RecordSettings(progress=False, overlong="truncate")
        ended = "Recorded"
        try:
            with self._stoppable(len(kept)):
                for document in kept:
                    parts.append(record(self.model, [document], tokenizer=self.tokenizer, settings=settings))
        except _Stopped:
            ended = "Stopped after"
        finally:
            if parts:
                self._show_maps(concat(parts))
        tokens = f", {sum(part.n_tokens for part in parts):,} tokens" if parts else ""
        return f"{ended} {len(parts)} of {len(kept)} documents{tokens}."

    def _show_maps(self, trace: Trace) -> None:
        self.trace = trace
        by = "domain" if "domain" in trace.sequences else None
        share = stats.expert_share(trace, by=by, bootstrap=_BOOTSTRAP)
        _put(self.maps, {made.kind: made.packed for made in (view.share_heatmap(share), view.expert_share(share))})

    def _evaluate(self) -> str:
        tasks, limit = tuple(filter(None, re.split(r"[,\s]+", self.tasks.value))), self.limit.value
        stopped, self._unfinished = self._unfinished, {}
        folder = stopped.get((tasks, limit)) or Path(tempfile.mkdtemp(dir=self._kept.name)) / "run"
        settings = EvalSettings(tokenizer=self.tokenizer, routing=True, progress=self._reach)
        try:
            with self._stoppable():
                log = evaluate(self.model, tasks, limit=limit, data=self.data, out=folder, settings=settings)
        except _Stopped:
            self._unfinished = {(tasks, limit): folder}
            return f"Stopped after {self.progress.value:,} requests, which are kept. Evaluate again to resume."
        self.evaluation = log
        columns = [name for name in _COLUMNS if name in log.scores]
        table = log.scores[columns].to_html(index=False, border=0, float_format="{:.3f}".format)
        self.scores.value = f"{_CELLS}<div class='mixlens-scores'>{table}</div>"
        _put(self.samples, {"samples": view.samples(log).packed})
        return f"Evaluated {len(log.samples):,} samples."


def _in_turn(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Order documents round-robin by domain: the first of every domain, then the second of each, and so on."""
    seen: Counter[Any] = Counter()

    def turn(document: Mapping[str, Any]) -> int:
        seen[document.get("domain")] += 1
        return seen[document.get("domain")]

    return sorted(documents, key=turn)


def _put(box: ipywidgets.Box, packed: Mapping[str, str]) -> None:
    """Show views in a box, by kind; a view that exists takes the new data and keeps its layer and expert."""
    there = {shown.kind: shown for shown in box.children}
    for kind in packed.keys() & there.keys():
        there[kind].packed = packed[kind]
    box.children = [there.get(kind) or ViewWidget(kind=kind, packed=data) for kind, data in packed.items()]


class _Watch(StoppingCriteria):
    """Report the number of tokens after every step of generate, without ever stopping it."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        self._tell(int(input_ids.shape[1]))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
