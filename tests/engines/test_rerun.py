"""A trace beside what a model here makes of its tokens: the split against its definition, and faults explained."""

import numpy as np
import pytest
import torch
from helpers.refusals import refused

import mixlens as ml
from mixlens.engines.check import explained

QUIET = ml.RecordSettings(progress=False, max_length=80, overlong="truncate")
PARTS = ["ids", "weights", "rest"]


@pytest.fixture(scope="module")
def rounded():
    return ml.load("demo", dtype="bfloat16", verbose=False)


@pytest.fixture(scope="module")
def there(rounded):
    """What an engine that computes in bfloat16 routes."""
    return ml.record(rounded, ml.demo_documents()[:12], settings=QUIET)


@pytest.fixture(scope="module")
def compared(there, demo):
    return ml.compare(there, demo, sample=9)


def logprobs(model, ids):
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return scores[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].double().numpy()


def test_the_split_is_of_losses_with_routing_put_in_and_sums_to_the_whole(compared, there, demo):
    split = compared.split()
    sums = split["estimate"].sel(part=PARTS).sum("part")
    assert abs(sums - split["estimate"].sel(part="total")).max() < 1e-6
    trace, apart = compared.a, {part: [] for part in ("total", "with_ids", "rest")}
    for number in trace.sequences.index:
        one = trace.select(where=trace.sequences.index.to_series() == number)
        ids, theirs = one.read("token_id").tolist(), one.read("logprob")[1:]
        apart["total"].append(theirs - logprobs(demo, ids))
        with ml.edit(demo, ml.edits.replay(one)):
            apart["with_ids"].append(theirs - logprobs(demo, ids))
        with ml.edit(demo, ml.edits.replay(one, weights=True)):
            apart["rest"].append(theirs - logprobs(demo, ids))
    for quantity, of in (("loss", lambda x: x), ("k3", lambda x: np.exp(-x) - 1 + x)):
        total, ids, rest = (of(np.concatenate(values)).mean() for values in apart.values())
        expected = {"ids": total - ids, "weights": ids - rest, "rest": rest, "total": total}
        for part, value in expected.items():
            assert split["estimate"].sel(quantity=quantity, part=part).item() == pytest.approx(value, abs=2e-6), part
    assert split["n"].item() == trace.n_tokens - len(trace.sequences)
    assert (split["ci_low"] < split["ci_high"]).all()


def test_the_split_closes_for_quantized_weights_too(there):
    pytest.importorskip("bitsandbytes")
    packed = ml.load("demo", quantization="nf4", dtype="bfloat16", verbose=False)
    split = ml.compare(there, packed, sample=3).split()["estimate"]
    assert abs(split.sel(part=PARTS).sum("part") - split.sel(part="total")).max() < 1e-6
    assert split.sel(quantity="k3", part="total") > 0


def test_likelihoods_against_loops(compared):
    a, b = compared.a.read("logprob").astype(float), compared.b.read("logprob").astype(float)
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x == x and y == y]
    found = compared.likelihoods()["estimate"]
    assert found.sel(measure="log_ratio").item() == pytest.approx(np.mean([x - y for x, y in pairs]), abs=1e-9)
    terms = [np.exp(y - x) - 1 - (y - x) for x, y in pairs]
    assert found.sel(measure="k3").item() == pytest.approx(np.mean(terms), abs=1e-9)
    assert found.sel(measure="extreme").item() == np.mean([abs(x - y) > np.log(2) for x, y in pairs])


def test_shares_of_routers_and_tokens_against_loops(compared):
    a, b = (np.sort(trace.read("expert_id"), -1) for trace in (compared.a, compared.b))
    differ = (a != b).any(-1)
    assert differ.any()
    overview = compared.overview()["estimate"].to_numpy()
    assert overview[0] == pytest.approx(differ.mean())
    assert overview[1] == pytest.approx(differ.any(1).mean())
    assert compared.fault is None


def test_a_sample_is_whole_documents(there, demo):
    sample = ml.compare(there, demo, sample=2).a
    assert sample.sequences["document_id"].nunique() == 2
    wanted = there.select(where=there.sequences["document_id"].isin(sample.sequences["document_id"]))
    assert np.array_equal(sample.read("token_id"), wanted.read("token_id"))


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda ids: (ids + 3) % 8, "physical_ids"),
        (lambda ids: np.roll(ids, 1, axis=1), "layers"),
        (lambda ids: np.roll(ids, 1, axis=0), "last_token"),
    ],
)
def test_faults_that_no_ids_show_are_explained(there, spoil, name):
    ids, position = there.read("expert_id").astype(int), there.read("position")
    assert explained(ids, ids, position) is None
    assert explained(spoil(ids), ids, position)[0] == name


def test_routing_at_random_is_not_explained(there):
    ids = there.read("expert_id").astype(int)
    random = np.random.default_rng(0).permuted(np.tile(np.arange(8), (*ids.shape[:2], 1)), axis=-1)[..., :2]
    assert explained(random, ids, there.read("position")) is None


def test_a_trace_without_weights_has_no_split(there, demo):
    bare = ml.Trace.from_arrays(
        there.read("expert_id"),
        n_experts=8,
        tokens={name: there.read(name) for name in ("sequence", "token_id")},
        sequences=there.sequences[["document_id"]],
    )
    compared = ml.compare(bare, demo, sample=2)
    assert len(compared.overview()) == 2
    with refused(ml.MissingSignal, "logprob"):
        compared.split()


def test_a_model_of_another_shape_and_tokens_that_are_missing_are_refused(there, demo):
    with refused(ml.BadInput, "layers"):
        ml.compare(there.select(layers=[0, 1]), demo)
    with refused(ml.BadInput, "trace"):
        ml.compare(there.select(positions=(5, 20)), demo)
    with refused(ml.BadInput, "sample", 2):
        ml.compare(there, there, sample=2)
