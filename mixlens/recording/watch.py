"""Watch: a training run followed by what its routers make of one text, in any loop or in transformers' Trainer."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from mixlens.core.run_dir import RunWriter, now, versions
from mixlens.errors import BadInput, RunError
from mixlens.models.layout import without_prompt
from mixlens.models.provenance import describe
from mixlens.recording.corpus import Corpus, RecordSettings
from mixlens.recording.record import record
from mixlens.recording.recorder import PACKAGES
from mixlens.stats.saturation import checkpoint
from mixlens.trace.checkpoints import KIND, folder_of
from mixlens.trace.trace import Trace

SETTINGS = RecordSettings(progress=False)
_SIGNALS = ("router_logits", "logprob")


class Watch:
    """Follow a training run: every so many steps the model reads one text, and its routing is recorded.

    The text is the same each time, so that what changes is the model, and tokens can be compared one by one. Training
    itself is left as it is: weights come out bit for bit as without a Watch. Between checks nothing is done. Numbers of
    each check go to Weights & Biases where a run of it is active, and to TensorBoard where that is installed;
    `decisions.health` of ``watch.traces``, or ``ml.open(out)``, says whether routing collapses.

    Parameters
    ----------
    model : torch.nn.Module
        The model that is trained.
    probe : Iterable[Any]
        Documents, as for record; held out from training.
    every : int, optional
        Steps between checks. A check takes about as long as a training step on as many tokens, or half as long again
        (benchmarks/watching.py), so that 200 steps keep a probe of a batch's size below one per cent.
    out : str or os.PathLike, optional
        Run directory, with a trace of every check; None keeps them in memory. TensorBoard's files lie beside it, in a
        folder of the same name with -tensorboard. A training run that goes on after a stop goes on here, too.
    tokenizer : Any, optional
        None for the one that belongs to the model.
    settings : RecordSettings, optional
        How the probe is read.

    Raises
    ------
    BadInput
        For a probe that cannot be read, and `every` below 1.
    RunError
        If `out` holds something else, or checks of later steps than the one training begins at.

    Examples
    --------
    >>> import copy
    >>> trained = copy.deepcopy(model)
    >>> with ml.decisions.Watch(trained, documents[:2], every=10) as watch:
    ...     for _ in range(10):
    ...         watch.step()  # after optimizer.step()
    >>> list(watch.traces)
    [0, 10]
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Iterable[Any],
        *,
        every: int = 200,
        out: str | os.PathLike[str] | None = None,
        tokenizer: Any = None,
        settings: RecordSettings = SETTINGS,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise BadInput(
                f"Cannot watch training every {every} steps. Pass a number of steps from 1.",
                argument="every",
                value=every,
            )
        self.model = model
        self.every = every
        self.traces: dict[int, Trace] = {}
        self._probe = probe if isinstance(probe, str) else list(probe)
        self._settings = replace(settings, progress=False)
        self._tokenizer = tokenizer
        self._step = 0
        self._writer: RunWriter | None = None
        self._board: Any = None
        corpus = Corpus.of(without_prompt(model), self._probe, tokenizer, self._settings)
        if out is not None:
            plan = {**corpus.plan(), "model": describe(without_prompt(model))["name"], "every": every}
            self._writer = RunWriter(out, KIND, plan)
            if self._writer.complete:
                self._writer.close()
                raise RunError(
                    f"Cannot watch training into {out}: a training run was followed there to its end. Choose another "
                    "folder.",
                    argument="out",
                    value=str(out),
                )
            done = sorted(record["step"] for record in self._writer.done.values())
            self.traces = {step: Trace.open(Path(out) / folder_of(step)) for step in done}
            with suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(f"{Path(out)}-tensorboard")

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(finished=exception[0] is None)

    def start(self, step: int = 0) -> None:
        """Check the model that training begins with.

        Parameters
        ----------
        step : int, optional
            Where training begins: 0, or the step that it goes on from.
        """
        if self.traces and step < max(self.traces):
            raise RunError(
                f"Cannot watch training from step {step}: the folder has checks up to step {max(self.traces)}. Go on "
                "from there, or choose another folder.",
                argument="out",
                value=max(self.traces),
            )
        self._step = step
        self.check()

    def step(self) -> None:
        """Count a step of the optimizer, and check the model where one is due."""
        self._step += 1
        if self._step % self.every == 0:
            self.check()

    def check(self) -> None:
        """Record the probe now."""
        if self._step in self.traces:
            return
        model = without_prompt(self.model)
        trace = record(model, self._probe, signals=_SIGNALS, tokenizer=self._tokenizer, settings=self._settings)
        scalars = self._scalars(trace)
        if self._writer is not None:
            folder = self._writer.path / folder_of(self._step)
            shutil.rmtree(folder, ignore_errors=True)  # of a check that was stopped
            trace = trace.save(folder)
            self._writer.commit_shard(len(self.traces), {}, {"step": self._step, "scalars": scalars})
        self.traces[self._step] = trace
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, self._step)
        tracker = sys.modules.get("wandb")
        if tracker is not None and tracker.run is not None:
            tracker.log(scalars, step=self._step)

    def close(self, *, finished: bool = True) -> None:
        """End the watch; the run directory is complete where training is `finished`.

        Parameters
        ----------
        finished : bool, optional
            Whether training came to its end; else it may go on later, into the same folder.
        """
        if finished:
            self.check()
        if self._board is not None:
            self._board.close()
        if self._writer is not None and not self._writer.complete:
            if finished:
                meta = {
                    "created": now(),
                    "model": describe(without_prompt(self.model)),
                    "steps": list(self.traces),
                    "versions": versions(*PACKAGES),
                }
                runs = [self._writer.path / folder_of(step) for step in self.traces]
                self._writer.finish(meta, {}, runs=runs)
            self._writer.close()

    def callback(self) -> TrainerCallback:
        """Return a callback for transformers' Trainer, which starts, steps and closes this watch."""
        return _Callback(self)

    def _scalars(self, trace: Trace) -> dict[str, float]:
        """Numbers of one check by name; of each layer, and of the probe."""
        found = checkpoint(trace, next(iter(self.traces.values()), trace), trace)
        cells = found["estimate"].drop_sel(measure="saturation_last")  # it is the last
        numbers = {
            f"routing/{measure}/layer_{layer:02d}": float(cells.sel(measure=measure, layer=layer))
            for measure in cells.measure.values
            for layer in cells.layer.values
        }
        return {**numbers, "routing/drift": float(found["drift"])}


class _Callback(TrainerCallback):
    """Hands the Trainer's events on to a Watch, in the process that leads."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.watch.start(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.watch.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.watch.close()
