"""What tokens attend to and which rows a cache holds: read off masks and caches, or refused where they contradict."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from fuzz_drivers import padded, truth
from helpers.refusals import refused
from tiny import tiny_mixtral
from transformers import DynamicCache, StaticCache

import mixlens as ml
from mixlens.errors import RecordingError


@pytest.fixture(scope="module")
def model():
    return tiny_mixtral(num_hidden_layers=2)


def texts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 128, n).tolist() for n in lengths]


def added(allowed, value: float = torch.finfo(torch.float32).min) -> torch.Tensor:
    """A mask of four dimensions, as it is added to scores."""
    allowed = torch.as_tensor(allowed).bool()
    while allowed.ndim < 4:
        allowed = allowed[None]
    return torch.zeros(allowed.shape).masked_fill(~allowed, value)


def causal(n: int) -> torch.Tensor:
    return torch.ones(n, n).tril()


def places(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def assert_recorded(model, recorder, rows, starts=None):
    """The rows are recorded from `starts` on, routed as each is alone."""
    trace = recorder.trace()
    number = trace.read("sequence")
    for n, (row, start) in enumerate(zip(rows, starts or [0] * len(rows), strict=True)):
        assert trace.read("token_id")[number == n].tolist() == row[start:]
        assert trace.read("position")[number == n].tolist() == list(range(start, len(row)))
        alone = truth(model, row, n, len(row))
        clear = alone["clear"][start:].all(1).cumprod().astype(bool)
        assert np.array_equal(trace.read("expert_id")[number == n][clear], alone["expert_id"][start:][clear])
    assert number.max() == len(rows) - 1


def changed(mask: torch.Tensor, *cells: tuple[int, int]) -> torch.Tensor:
    for row, column in cells:
        mask[..., row, column] = 1 - mask[..., row, column]
    return mask


def blocks(*lengths: int) -> torch.Tensor:
    return torch.block_diag(*map(causal, lengths))


CONTRADICTIONS = {
    "a token looks ahead instead of back": changed(causal(5), (2, 1), (2, 3)),
    "heads differ": torch.stack([causal(5), changed(causal(5), (4, 0))])[None],
    "a prompt that sees all of itself": changed(causal(5), (0, 1), (0, 2), (1, 2)),
    "padding that sees itself alone": changed(causal(5), (2, 0), (3, 0), (4, 0), (1, 0)),
}


@pytest.mark.parametrize("mask", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_mask_that_is_not_causal_within_each_document_is_refused(model, mask):
    with torch.no_grad(), refused(RecordingError, "attention_mask"), ml.Recorder(model):
        model(torch.tensor(texts(5)), attention_mask=added(mask))


@pytest.mark.parametrize(
    "shape", [(5,), (1, 5), (2, 4), (2, 5, 5), (3, 1, 5, 5), (2, 1, 4, 5), "int", {"full_attention": None}]
)
def test_a_mask_of_another_shape_is_refused(model, shape):
    mask = torch.ones(2, 1, 5, 5, dtype=torch.long) if shape == "int" else shape
    mask = torch.ones(shape) if isinstance(shape, tuple) else mask
    with torch.no_grad(), refused(RecordingError, "attention_mask"), ml.Recorder(model):
        model(torch.tensor(texts(5, 5)), attention_mask=mask)


@pytest.mark.parametrize("sees", [[1, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
def test_a_step_that_sees_other_columns_than_were_recorded_is_refused(model, sees):
    """Some of its document are hidden from it, or it sees the documents before."""
    first = added(causal(7) if not all(sees) else blocks(4, 3))
    with torch.no_grad(), refused(RecordingError, "attention_mask"), ml.Recorder(model):
        cache = DynamicCache(config=model.config)
        model(torch.tensor(texts(7)), attention_mask=first, past_key_values=cache)
        model(torch.tensor([[5]]), attention_mask=added([[sees]]), past_key_values=cache)


@pytest.mark.parametrize("value", [-1e4, -1e9, float("-inf")])
def test_padding_of_a_mask_of_four_dimensions_is_no_token_however_it_is_masked(model, value):
    rows = texts(6, 3)
    ids, mask = padded(rows, "left")
    allowed = causal(6)[None, None].bool() & mask[:, None, None].bool()
    allowed[1, :, :3, 3:] = True  # something, or scores of padding are NaN, and so are all that follow
    with torch.no_grad(), ml.Recorder(model) as recorder:
        model(ids, attention_mask=added(allowed, value), position_ids=places(mask))
    assert_recorded(model, recorder, rows)


@pytest.mark.parametrize("kind", ["static", "four dimensions"])
def test_a_padded_cache_that_was_filled_before_counts_no_padding_under_any_mask(model, kind):
    rows = texts(5, 9)
    ids, mask = padded(rows, "left")
    cache = StaticCache(model.config, max_cache_len=20) if kind == "static" else DynamicCache(config=model.config)
    more = torch.tensor([[9, 3], [8, 4]])
    whole = torch.cat([mask, torch.ones_like(more)], 1)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache, position_ids=places(mask))
        with ml.Recorder(model) as recorder:
            if kind == "static":
                model.generate(torch.cat([ids, more], 1), attention_mask=whole, past_key_values=cache, max_new_tokens=1)
            else:
                allowed = causal(11)[None, None, 9:].bool() & whole[:, None, None].bool()
                model(more, attention_mask=added(allowed), past_key_values=cache, position_ids=places(whole)[:, 9:])
    read = [row + new for row, new in zip(rows, more.tolist(), strict=True)]
    assert_recorded(model, recorder, read, [5, 9])


def test_a_document_goes_on_after_others_in_its_row(model):
    rows = texts(4, 3)
    with torch.no_grad(), ml.Recorder(model) as recorder:
        cache = DynamicCache(config=model.config)
        model(torch.tensor([rows[0] + rows[1]]), attention_mask=added(blocks(4, 3)), past_key_values=cache)
        model(torch.tensor([[5]]), attention_mask=added([[[0] * 4 + [1] * 4]]), past_key_values=cache)
    assert_recorded(model, recorder, [rows[0], [*rows[1], 5]])


@pytest.mark.parametrize("drive", ["packed", "generate"])
def test_a_window_of_attention_begins_no_document(drive):
    model, rows = tiny_mixtral(num_hidden_layers=2, sliding_window=4), texts(9, 3, 6)
    with torch.no_grad(), ml.Recorder(model) as recorder:
        if drive == "packed":
            at = torch.tensor([[*range(9), *range(3), *range(6)]])
            model(torch.tensor([[*rows[0], *rows[1], *rows[2]]]), position_ids=at, use_cache=False)
        else:
            rows = model.generate(torch.tensor(rows[:1]), max_new_tokens=6, do_sample=False, eos_token_id=None)
            rows = rows[:, :-1].tolist()
    assert_recorded(model, recorder, rows)


# ---------------------------------------------------------------------- caches


class Alike(DynamicCache):
    """Equal to every other, and without a hash."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True


class Slots:
    """A cache of one's own, which takes no weak references."""

    __slots__ = ("inner",)

    def __init__(self, config):
        self.inner = DynamicCache(config=config)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_caches_are_told_apart_by_what_they_are(model):
    rows = texts(6, 6)
    with torch.no_grad(), ml.Recorder(model) as recorder:
        caches = [Alike(config=model.config) for _ in rows]
        for part in (slice(0, 4), slice(4, None)):
            for row, cache in zip(rows, caches, strict=True):
                model(torch.tensor([row[part]]), past_key_values=cache)
    assert_recorded(model, recorder, rows)
    with torch.no_grad(), refused(RecordingError, "past_key_values", "Slots"), ml.Recorder(model):
        model(torch.tensor(rows[:1]), past_key_values=Slots(model.config))


@pytest.mark.parametrize("how", ["repeated", "copied", "picked"])
def test_rows_that_come_from_one_prefix_go_on_from_where_it_ended(model, how):
    (row, other), new = texts(6, 6), [[7], [8]]
    batch = [row, other] if how == "picked" else [row]
    with torch.no_grad(), ml.Recorder(model) as recorder:
        cache = DynamicCache(config=model.config)
        model(torch.tensor(batch), attention_mask=torch.ones(len(batch), 6), past_key_values=cache)
        if how == "repeated":
            cache.batch_repeat_interleave(2)
        elif how == "picked":
            cache.batch_select_indices(torch.tensor([0]))
        copies = [copy.deepcopy(cache), cache] if how == "copied" else [cache]
        new = new if how == "repeated" else new[:1]
        for one in copies:
            model(torch.tensor(new), attention_mask=torch.ones(len(new), 7), past_key_values=one)
    after = {"repeated": [row, [*row, 7], [*row, 8]], "copied": [[*row, 7], [*row, 7]], "picked": [*batch, [*row, 7]]}
    starts = {"repeated": [0, 6, 6], "copied": [0, 6], "picked": [0, 0, 6]}
    assert_recorded(model, recorder, after[how], starts[how])


def rewritten(cache):
    for layer in cache.layers:
        layer.keys.copy_(layer.keys.flip(0))
        layer.values.copy_(layer.values.flip(0))


CHANGES = {
    "written to": (rewritten, 2, "past_key_values"),
    "values of one layer written to": (lambda cache: cache.layers[1].values.zero_(), 2, "past_key_values"),
    "rows in another order": (lambda cache: cache.batch_select_indices(torch.tensor([1, 0])), 2, "past_key_values"),
    "a padded row picked, without its mask": (
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        1,
        "attention_mask",
    ),
}


@pytest.mark.parametrize(("change", "rows", "named"), CHANGES.values(), ids=CHANGES)
def test_a_cache_that_was_changed_between_two_forwards_is_refused(model, change, rows, named):
    ids, mask = padded(texts(6, 3), "left")
    cache = StaticCache(model.config, max_cache_len=20) if change is rewritten else DynamicCache(config=model.config)
    given = {} if rows == 1 else {"attention_mask": torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)}
    with torch.no_grad(), refused(RecordingError, named), ml.Recorder(model):
        model(ids, attention_mask=mask, past_key_values=cache, position_ids=places(mask))
        change(cache)
        model(torch.tensor([[5]] * rows), past_key_values=cache, **given)


@pytest.mark.parametrize("recorder", [ml.Recorder, lambda model: ml.CompiledRecorder(model, tokens=40)])
def test_a_packed_row_whose_documents_see_one_another_is_refused_by_every_recorder(model, recorder):
    rows = texts(5, 4)
    with torch.no_grad(), refused(RecordingError, "position_ids"), recorder(model) as recording:
        model(input_ids=torch.tensor([rows[0] + rows[1]]), position_ids=torch.tensor([[*range(5), *range(4)]]))
        recording.trace()
