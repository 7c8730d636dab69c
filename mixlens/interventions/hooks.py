"""Editing: the hooks that carry out the edits round a model, and that are gone with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn

from mixlens.core.text import numbered
from mixlens.errors import BadInput, RecordingError
from mixlens.interventions.activations import PATCHED_EXPERTS, Output, Patch, forget_replaced, hook_experts, hook_site
from mixlens.interventions.eager import eagerly
from mixlens.interventions.forward_tracker import ForwardTracker
from mixlens.interventions.places import Call
from mixlens.interventions.replay import Replay, check_experts, possible_layers
from mixlens.interventions.routing import Forbid, Force, Reroute, Rescale, Routing, TopK
from mixlens.interventions.transforms import recomputing, refuse_batched
from mixlens.interventions.where import Where
from mixlens.models.layout import (
    MoeLayer,
    config_of,
    is_part,
    moe_layers,
    n_experts,
    refuse_sharded,
    refuse_without_experts,
    refuse_without_rule,
    top_k,
    unwrapped,
    widths_of,
)

Edit = Forbid | Force | Reroute | Rescale | TopK | Replay | Output | Patch
_ATTRIBUTE = "_mixlens_editing"


class Active:
    """One edit at work: which tokens of the running forward it means, and whether it has met any."""

    def __init__(self, edit: Edit, layers: Sequence[int]) -> None:
        self.edit: Any = edit
        self.layers = frozenset(layers if edit.layers is None else edit.layers)
        self.matched = False
        self.ran: Counter[int] = Counter()  # runs of each layer, and
        self.fired: Counter[int] = Counter()  # of the module in it that the edit hooks
        self.index: np.ndarray | None = None  # [T], for edits that bring something for every token
        self._locator = edit.locator() if isinstance(edit, Replay | Patch) else edit.where
        self.tracker: ForwardTracker | None = None
        self._rows: dict[torch.device | None, torch.Tensor] = {}

    @property
    def everywhere(self) -> bool:
        return isinstance(self._locator, Where) and self._locator.everywhere

    def locate(self, placed: Any) -> None:
        mask, index = self._locator.locate(placed)
        self.matched |= bool(mask.any())
        self.index = None if index is None else index.reshape(-1)
        self._rows = {None: torch.from_numpy(mask.reshape(-1))}

    def rows_on(self, device: torch.device) -> torch.Tensor | None:
        """bool [T] on a device; None stands for all tokens."""
        if self.everywhere:
            self.matched = True
            return None
        if self.tracker is None or not (self.tracker.following or recomputing()):
            raise RecordingError(
                f"{self.edit!r} cannot tell its tokens: a layer ran outside a forward of the decoder, or in one that "
                "had begun before. Call the model itself inside the block.",
                argument="where",
                value=self.edit,
            )
        if device not in self._rows:
            self._rows[device] = self._rows[None].to(device)
        return self._rows[device]


class Editing:
    """All edits round one model, in the order they were entered: one hook a gate, experts module or site."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = moe_layers(model)
        self.active: list[Active] = []
        self._handles: list[Any] = []
        self._tracker: ForwardTracker | None = None
        self._eager: ExitStack | None = None

    @property
    def n_rows(self) -> int:
        return 0 if self._tracker is None else self._tracker.n_sequences

    def enter(self, edits: Sequence[Edit]) -> list[Active]:
        """Put the edits to work after those that are; checks them first, with those that are.

        Raises BadInput for an unknown layer or expert, for shapes that do not fit, and where too few experts are left.
        """
        new = [Active(edit, [layer.index for layer in self.layers]) for edit in edits]
        for one in new:
            _check(one, self.model, self.layers)
        count, choices = n_experts(self.model), top_k(self.model)
        for layer in self.layers:
            _check_choices(layer.index, [*self.active, *new], count, choices[layer.index])
        self.active = [*self.active, *new]
        try:
            self._install()
        except BaseException:
            self.leave(new)
            raise
        return new

    def leave(self, edits: list[Active]) -> None:
        self.active = [one for one in self.active if not any(one is gone for gone in edits)]
        self._install()

    def __deepcopy__(self, _memo: dict[int, Any]) -> None:
        """A copy of the model has no edits round it."""

    def _install(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for layer in self.layers:
            forget_replaced(layer.experts)
        following = any(not one.everywhere for one in self.active)
        if following and self._tracker is None:
            self._tracker = ForwardTracker(self.model, "An edit", before=self._before, strict=False)
            self._tracker.open()
        elif not following and self._tracker is not None:
            self._tracker.close()
            self._tracker = None
        for one in self.active:
            one.tracker = self._tracker
        for layer in self.layers:
            stages: dict[str, list[Active]] = {}
            for one in self.active:
                if layer.index in one.layers:
                    stages.setdefault(_stage(one.edit), []).append(one)
            for stage, edits in stages.items():
                if stage == "gate":
                    self._handles.append(_hook_gate(layer, edits))
                    self._watch(layer, layer.gate, edits)
                elif stage == "experts":
                    self._handles += hook_experts(layer, edits)
                    self._watch(layer, layer.experts, edits)
                else:
                    self._handles.append(hook_site(layer, stage, edits))
        if self._tracker is not None:
            self._tracker.hook_first()
        if self.active and self._eager is None:
            self._eager = ExitStack()
            self._eager.enter_context(eagerly())
        elif not self.active and self._eager is not None:
            self._eager.close()
            self._eager = None

    def _watch(self, layer: Any, module: nn.Module, edits: list[Active]) -> None:
        """Note for each edit that a layer ran, and that the module on which the edit hangs did."""

        def ran(*_: Any) -> None:
            for one in edits:
                one.ran[layer.index] += 1

        def fired(*_: Any) -> None:
            for one in edits:
                one.fired[layer.index] += 1

        self._handles += [module.register_forward_hook(fired), layer.decoder.register_forward_hook(ran)]

    def _before(self, call: Call) -> None:
        assert self._tracker is not None
        placed = self._tracker.place(call)
        for one in self.active:
            if not one.everywhere:
                one.locate(placed)


def check_fired(edits: Sequence[Active]) -> None:
    """Raises RecordingError for an edit of layers that ran without the module that it hooks."""
    for one in edits:
        if missing := sorted(one.ran - one.fired):
            raise RecordingError(
                f"{one.edit!r} did nothing in layers {missing}: they ran without calling the module that it hooks, "
                "which was replaced, or whose code is called by other means. Enter the edit after replacing modules, "
                "and let layers call their modules.",
                argument="layers",
                value=missing,
            )


def editing_of(model: nn.Module) -> Editing:
    """The Editing of this model, made when there is none."""
    model = unwrapped(model)
    if not hasattr(model, "__dict__"):
        moe_layers(model)  # which says that this is no model
    if vars(model).get(_ATTRIBUTE) is None:
        setattr(model, _ATTRIBUTE, Editing(model))
    return vars(model)[_ATTRIBUTE]


def release(model: nn.Module) -> None:
    """Leave nothing on a model that has no edits round it any more."""
    if not editing_of(model).active:
        delattr(unwrapped(model), _ATTRIBUTE)


def edits_of(model: nn.Module) -> list[str]:
    """The edits round this model, each as text, in the order they work."""
    editing = vars(unwrapped(model)).get(_ATTRIBUTE)
    return [] if editing is None else [repr(one.edit) for one in editing.active]


def weights_are_given(model: nn.Module) -> bool:
    """Whether an edit round this model brings weights, which need not sum to one."""
    editing = vars(unwrapped(model)).get(_ATTRIBUTE)
    edits = [] if editing is None else [one.edit for one in editing.active]
    return any((isinstance(e, Force) and e.weight is not None) or (isinstance(e, Replay) and e.weights) for e in edits)


def top_k_of(model: nn.Module) -> dict[int, int]:
    """{layer: experts a token chooses}, with the edits round this model."""
    editing, choices = vars(unwrapped(model)).get(_ATTRIBUTE), top_k(model)
    for one in () if editing is None else editing.active:
        if isinstance(one.edit, TopK):
            choices |= dict.fromkeys(one.layers, one.edit.k)
    return choices


def about_choices(model: nn.Module) -> dict[str, Any]:
    """What the meta of a measurement, which keeps no ids, says of how many experts a token chooses."""
    each = list(top_k_of(model).values())
    return {"top_k": max(each), **({"layer_top_k": each} if len(set(each)) > 1 else {})}


def refuse_rows(model: nn.Module) -> None:
    """Raises BadInput when an edit means rows of a batch, for a reader that makes its own batches."""
    editing = vars(unwrapped(model)).get(_ATTRIBUTE)
    for edit in () if editing is None else (one.edit for one in editing.active):
        numbered = isinstance(edit, Patch) and edit.sequences is not None and (edit.sequences >= 0).any()
        if edit.where.rows is not None or numbered:
            raise BadInput(
                f"Cannot read documents under {edit!r}, which selects rows of a batch: documents are batched by "
                "length, so rows do not belong to them. Run the model yourself, with a Recorder inside the edit.",
                argument="where",
                value=edit,
            )


def refuse_partial(model: nn.Module) -> None:
    """Raises BadInput when an edit means single tokens or the residual stream, for who runs layers one by one."""
    editing = vars(unwrapped(model)).get(_ATTRIBUTE)
    for one in () if editing is None else editing.active:
        if not one.everywhere or _stage(one.edit) in ("resid_pre", "resid_post"):
            raise BadInput(
                f"Cannot ablate every expert under {one.edit!r}, which selects single tokens or edits the residual "
                "stream: layers run one by one from stored hidden states, which would miss it. Ablate under edits of "
                "all tokens, or run the model yourself under both edits.",
                argument="edit",
                value=one.edit,
            )


def _stage(edit: Edit) -> str:
    if isinstance(edit, Patch):
        return "experts" if edit.site in PATCHED_EXPERTS else edit.site
    return "experts" if isinstance(edit, Output) else "gate"


def _hook_gate(layer: MoeLayer, edits: list[Active]) -> Any:
    careful = sum(isinstance(one.edit, Forbid | Force | Reroute | Replay | TopK) for one in edits) > 1
    rule = layer.rule
    assert rule is not None
    checked = False

    def hook(module: nn.Module, _args: Any, output: Any) -> Any:
        nonlocal checked
        if not is_part(module, layer.gate):
            return output
        logits, weights, ids = layer.read(output)
        refuse_batched("An edit", logits)
        if not checked and not rule.agrees(logits, weights, ids):
            refuse_without_rule(layer, f"edit by {edits[0].edit!r}", checked=True)
        checked = True
        routing = Routing(logits, weights, ids, rule)
        for one in edits:
            one.edit.apply(routing, layer.index, one.rows_on(logits.device), one.index)
        if careful:
            routing.check()
        return layer.write(output, *routing.result())

    return layer.gate.register_forward_hook(hook, prepend=True)


def _check(one: Active, model: nn.Module, layers: list[MoeLayer]) -> None:
    edit, count = one.edit, n_experts(model)
    known = [layer.index for layer in layers]
    beyond = sorted(one.layers - set(known))
    if beyond or not one.layers:
        raise BadInput(
            f"Cannot edit layers {beyond or '(none)'}: the model has experts in layers {numbered(known)}. Pass "
            "numbers among them.",
            argument="layers",
            value=beyond,
        )
    unknown = sorted(expert for expert in getattr(edit, "experts", None) or () if not 0 <= expert < count)
    if unknown:
        raise BadInput(
            f"Cannot edit experts {unknown}: the model has experts 0 to {count - 1}. Pass numbers among them.",
            argument="experts",
            value=unknown,
        )
    if isinstance(edit, TopK) and not 1 <= edit.k <= count:
        raise BadInput(
            f"Cannot route every token to {edit.k} experts: the model has {count} per layer. Pass a number from 1 to "
            f"{count}.",
            argument="top_k",
            value=edit.k,
        )
    meant = [layer for layer in layers if layer.index in one.layers]
    if _stage(edit) == "experts":
        refuse_sharded(model, f"edit experts by {edit!r}")
        for layer in meant:
            inside = isinstance(edit, Patch) and edit.site == "expert_neurons"
            refuse_without_experts(layer, f"edit experts by {edit!r}", inside=inside)
    elif _stage(edit) == "gate":
        for layer in meant:
            if layer.rule is None:
                refuse_without_rule(layer, f"edit by {edit!r}")
    if isinstance(edit, Replay):
        possible_layers(edit.trace, edit.layers, known)
        check_experts(edit.trace, count, top_k_of(model), one.layers)
    if isinstance(edit, Patch | Output):
        choices = top_k_of(model)
        for layer in meant:
            hidden, neurons = int(config_of(model).hidden_size), 0
            if _stage(edit) == "experts" and layer.routed:
                hidden, neurons = widths_of(layer)
            hidden = 1 if isinstance(edit, Patch) and edit.site == "shared_gate" else hidden
            edit.check(hidden, neurons, choices[layer.index])


def _check_choices(layer: int, edits: list[Active], count: int, k: int) -> None:
    """Raise where edits that hold for every token forbid too many experts of a layer, or force too many."""
    banned: set[int] = set()
    forced: set[int] = set()
    for edit in (one.edit for one in edits if layer in one.layers):
        banned_there = forced_there = 0
        if isinstance(edit, TopK):
            k = edit.k
        elif isinstance(edit, Forbid | Force):
            own, other = (banned, forced) if isinstance(edit, Forbid) else (forced, banned)
            if edit.where.everywhere:
                own |= set(edit.experts)
                other -= set(edit.experts)
            elif isinstance(edit, Forbid):
                banned_there = len(set(edit.experts))
            else:
                forced_there = len(set(edit.experts))
        gone, kept = max(banned_there, len(banned)), max(forced_there, len(forced))
        if count - gone < k:
            raise BadInput(
                f"Cannot forbid {gone} of {count} experts in layer {layer}: {count - gone} would remain, and every "
                f"token chooses {k}. Forbid fewer, or lower top_k first.",
                argument="forbid",
                value=gone,
            )
        if kept > k:
            raise BadInput(
                f"Cannot force {kept} experts in layer {layer}: every token chooses {k}. Force fewer, or raise top_k "
                "first.",
                argument="force",
                value=kept,
            )
