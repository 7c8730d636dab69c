"""Watching training: weights come out as without it, numbers are those of the traces, a collapse is told from none."""

from __future__ import annotations

import copy
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import Letters, tiny_mixtral
from transformers import Trainer, TrainingArguments

import mixlens as ml
from mixlens.errors import BadInput, RunError
from mixlens.stats.verdicts import DO, DO_NOT, UNKNOWN

PROBE = [f"a probe of {number} words that are held out" for number in range(14)]
IDS = torch.randint(3, 120, (4, 24), generator=torch.Generator().manual_seed(0))


def train(model, steps: int, after_step=lambda: None) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        after_step()
    return model.state_dict()


def test_weights_come_out_bit_for_bit_as_without_a_watch(tmp_path):
    model = tiny_mixtral(router_jitter_noise=0.1, attention_dropout=0.1)
    watched = copy.deepcopy(model)
    torch.manual_seed(1)
    wanted = train(model, 6)
    torch.manual_seed(1)
    with ml.decisions.Watch(watched, PROBE, every=2, tokenizer=Letters(), out=tmp_path / "run") as watch:
        found = train(watched, 6, watch.step)
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    assert watched.training
    assert list(watch.traces) == [0, 2, 4, 6]


def test_numbers_are_those_of_the_traces_and_the_run_opens(tmp_path):
    model = tiny_mixtral()
    with ml.decisions.Watch(model, PROBE, every=3, tokenizer=Letters(), out=tmp_path / "run") as watch:
        train(model, 4, watch.step)
    found = ml.open(tmp_path / "run")
    assert found.checkpoint.values.tolist() == [0, 3, 4]  # the last one at the end of training
    first, last = (ml.open(tmp_path / "run" / f"step-0000000{step}") for step in (0, 4))
    np.testing.assert_array_equal(last.read("expert_id"), watch.traces[4].read("expert_id"))
    ids = last.read("expert_id")
    for layer in range(4):
        cell = found.sel(checkpoint=4, layer=layer)["estimate"]
        counts = np.bincount(ids[:, layer].ravel(), minlength=8)
        share = counts[counts > 0] / counts.sum()
        assert float(cell.sel(measure="load_entropy")) == pytest.approx(-(share * np.log2(share)).sum())
        assert float(cell.sel(measure="dead")) == (counts == 0).sum()
        assert float(cell.sel(measure="max_over_mean")) == pytest.approx(counts.max() / counts.mean())
        pairs = zip(first.read("expert_id")[:, layer], ids[:, layer], strict=True)
        kept = np.mean([len({*a} & {*b}) / 2 for a, b in pairs])
        assert float(cell.sel(measure="saturation_first")) == pytest.approx(kept)
        assert float(cell.sel(measure="saturation_last")) == 1
    drift = np.nanmean(first.read("logprob") - last.read("logprob"))
    assert float(found.drift.sel(checkpoint=4)) == pytest.approx(drift, abs=1e-5)
    np.testing.assert_array_equal(ml.decisions.health(watch.traces)["estimate"].values, found["estimate"].values)


def test_a_stopped_training_goes_on_and_another_is_refused(tmp_path):
    model = tiny_mixtral()
    said = {"every": 2, "tokenizer": Letters(), "out": tmp_path / "run"}
    watch = ml.decisions.Watch(model, PROBE, **said)
    watch.start()
    train(model, 4, watch.step)
    watch.close(finished=False)
    with pytest.raises(RunError):
        ml.open(tmp_path / "run")
    again = ml.decisions.Watch(model, PROBE, **said)
    with pytest.raises(RunError):
        again.start(0)
    again.start(4)
    train(model, 2, again.step)
    again.close()
    assert ml.open(tmp_path / "run").checkpoint.values.tolist() == [0, 2, 4, 6]
    for wrong in (said, said | {"every": 3}):
        with pytest.raises(RunError):
            ml.decisions.Watch(model, PROBE, **wrong)
    with pytest.raises(BadInput):
        ml.decisions.Watch(model, PROBE, every=0)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": IDS[row], "labels": IDS[row]}


def test_the_trainer_of_transformers_is_followed_and_trackers_get_every_number(tmp_path, monkeypatch):
    boards, logged = [], []
    wandb = ModuleType("wandb")
    wandb.run, wandb.log = object(), lambda numbers, step: logged.append((step, numbers))
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    class Board(SimpleNamespace):
        def __init__(self, folder: str) -> None:
            super().__init__(folder=folder, scalars=[], closed=False)
            boards.append(self)

        def add_scalar(self, *scalar) -> None:
            self.scalars.append(scalar)

        def close(self) -> None:
            self.closed = True

    tensorboard = ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = Board
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    model = tiny_mixtral()
    watch = ml.decisions.Watch(model, PROBE, every=2, tokenizer=Letters(), out=tmp_path / "run")
    options = {"max_steps": 4, "per_device_train_batch_size": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), save_strategy="no", **options)
    Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[watch.callback()]).train()
    assert ml.open(tmp_path / "run").checkpoint.values.tolist() == [0, 2, 4]
    assert [step for step, _ in logged] == [0, 2, 4]
    [board] = boards
    assert board.closed
    assert board.folder == f"{tmp_path / 'run'}-tensorboard"
    said = {step: {name: value for name, value, at in board.scalars if at == step} for step in (0, 2, 4)}
    assert said == dict(logged)
    entropy = ml.stats.load_entropy(watch.traces[4])["estimate"].values
    assert [said[4][f"routing/load_entropy/layer_{layer:02d}"] for layer in range(4)] == entropy.tolist()
    json.dumps(said)


def traces_of(seed: int, *, spread: tuple[float, float], documents: int = 20):
    """Two recordings of the same documents, whose experts are drawn from shares that are even or one-sided."""
    rng = np.random.default_rng(seed)
    length, layers = 30, 2
    sequence = np.repeat(np.arange(documents), length)
    tokens = {"sequence": sequence, "position": np.tile(np.arange(length), documents), "token_id": sequence * 0 + 5}
    found = []
    for sharpness in spread:
        logits = rng.gumbel(size=(len(sequence), layers, 8)) + sharpness * np.arange(8)
        ids = np.argsort(-logits, axis=-1)[..., :2]
        logprob = np.where(tokens["position"] == 0, np.nan, -1.0)
        more = {"tokens": tokens | {"logprob": logprob}, "router_logits": logits}
        found.append(ml.Trace.from_arrays(ids, n_experts=8, **more))
    return dict(enumerate(found))


@pytest.mark.parametrize(
    ("spread", "limit", "wanted"), [((0, 3), 0.5, DO_NOT), ((0, 0), 0.5, DO), ((1, 1), 0.0, UNKNOWN)]
)
def test_a_collapse_is_told_from_none(spread, limit, wanted):
    assert ml.decisions.health(traces_of(0, spread=spread), limit_bits=limit).attrs["verdict"] == wanted


def test_few_documents_say_nothing():
    assert ml.decisions.health(traces_of(0, spread=(0, 3), documents=5)).attrs["verdict"] == UNKNOWN


def without_a_verdict(draws: int) -> int:
    """Of two recordings of random routing, neither more even than the other."""
    found = [ml.decisions.health(traces_of(seed, spread=(0.3, 0.3)), limit_bits=0.0) for seed in range(draws)]
    return sum(one.attrs["verdict"] == UNKNOWN for one in found)


def test_random_routing_gives_no_verdict():
    assert without_a_verdict(10) >= 9


@pytest.mark.slow
def test_random_routing_gives_no_verdict_in_a_hundred_draws():
    assert without_a_verdict(100) >= 95


def test_saturation_is_the_mean_overlap_with_both_ends():
    traces = list(traces_of(3, spread=(0.2, 0.9)).values())
    middle = next(iter(traces_of(4, spread=(0.5, 0.5)).values()))
    series = {"start": traces[0], "middle": middle, "end": traces[1]}
    data = ml.stats.saturation(series)
    for against, end in (("first", "start"), ("last", "end")):
        for name, trace in series.items():
            ids, ends = trace.read("expert_id"), series[end].read("expert_id")
            for layer in range(2):
                cell = data.sel(against=against, checkpoint=name, layer=layer)
                pairs = list(zip(ids[:, layer].tolist(), ends[:, layer].tolist(), strict=True))
                shared = np.mean([len({*a} & {*b}) / 2 for a, b in pairs])
                same = np.mean([a[0] == b[0] for a, b in pairs])
                np.testing.assert_allclose(cell["estimate"].sel(measure=["overlap", "top1"]).values, [shared, same])
    exact = data.sel(against="last", checkpoint="end")
    assert (exact["ci_low"] == 1).all()
    assert (exact["ci_high"] == 1).all()
    wanted = ml.stats.agreement(middle, traces[1]).sel(measure=["top1", "overlap"])["ci_low"]
    np.testing.assert_array_equal(data["ci_low"].sel(against="last", checkpoint="middle").values, wanted.values)
    assert data.attrs["uniform"] == [1 / 8, 2 / 8]
    with pytest.raises(BadInput):
        ml.stats.saturation([middle])
