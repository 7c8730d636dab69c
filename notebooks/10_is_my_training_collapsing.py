# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Is my training collapsing?
#
# The question: while a mixture of experts is fine-tuned, do its routers go on using all experts?
#
# **The answer for two short runs on the bundled model:** with the auxiliary loss turned off, layer 1 collapses within
# 30 steps: its load entropy falls by 1.15 of 3 bits, and by at least 0.98, so the verdict on continuing is "do not".
# With the auxiliary loss on, there is no evidence that any layer loses more than half a bit, but not enough evidence
# that none does: "not enough evidence".
#
# In your own loop call `watch.step()` after `optimizer.step()`; with transformers' Trainer pass
# `callbacks=[watch.callback()]`.
#
# On 8x7B it takes 94 GB of accelerator memory in bfloat16, or 27 GB in nf4 (computed), before training; gradients are
# 93 GB more, and Adam's two moments in float32 374 GB (computed). Watching adds a forward of the probe every `EVERY`
# steps. See `docs/8x7b.md`.

# %%
import copy

import matplotlib.pyplot as plt
import pandas as pd
import torch
from transformers import AutoTokenizer

import mixlens as ml

STEPS, EVERY, ROUTER_RATE, RATE = 30, 15, 0.1, 1e-3

torch.manual_seed(0)
model = ml.load("demo", verbose=False)
tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
documents = ml.demo_documents()
probe = documents[::4]
training = [document["text"] for number, document in enumerate(documents) if number % 4]
ids = torch.cat([torch.tensor(tokenizer(text)["input_ids"]) for text in training])
rows = ids[: len(ids) // 64 * 64].view(-1, 64)
len(probe), len(rows)

# %% [markdown]
# ## Two runs that differ in the auxiliary loss
#
# The auxiliary loss is computed for each layer and averaged over layers. The one in transformers pools the layers, and
# cannot see layers that collapse onto different experts. To keep the runs to half a minute, the routers learn at 100
# times the rate of the other weights; at equal rates they stayed balanced over 60 steps with and without an auxiliary
# loss.


# %%
def balance(router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Switch loss, E * sum_e f_e P_e, of each layer, on average over layers; k where experts are used alike."""
    losses = []
    for logits in router_logits:
        chosen = torch.nn.functional.one_hot(logits.topk(2).indices, logits.shape[-1]).sum(1).float().mean(0)
        losses.append(logits.shape[-1] * (chosen * logits.softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()


def fine_tuned(auxiliary: float) -> ml.decisions.Watch:
    """Train a copy of the model under a watch; the batches are the same in every run."""
    trained = copy.deepcopy(model).train()
    trained.router_aux_loss_coef = 0.0
    routers = [weight for name, weight in trained.named_parameters() if ".gate." in name]
    others = [weight for name, weight in trained.named_parameters() if ".gate." not in name]
    groups = [{"params": routers, "lr": ROUTER_RATE}, {"params": others, "lr": RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    draw = torch.Generator().manual_seed(0)
    with ml.decisions.Watch(trained, probe, every=EVERY) as watch:
        for _ in range(STEPS):
            batch = rows[torch.randint(len(rows), (4,), generator=draw)]
            output = trained(batch, labels=batch, output_router_logits=True)
            (output.loss + auxiliary * balance(output.router_logits)).backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.step()
    return watch


watches = {"auxiliary loss on": fine_tuned(1.0), "auxiliary loss off": fine_tuned(0.0)}

# %%
health = {name: ml.decisions.health(watch.traces) for name, watch in watches.items()}
pd.DataFrame(
    {
        name: {
            "load entropy at first, worst layer": found["estimate"].sel(measure="load_entropy")[0].min().item(),
            "load entropy at last, worst layer": found["estimate"].sel(measure="load_entropy")[-1].min().item(),
            "dead experts at the end, all layers": found["estimate"].sel(measure="dead")[-1].sum().item(),
            "choices left of the start [share]": found["estimate"].sel(measure="saturation_first")[-1].mean().item(),
            "loss of the probe, change [nats]": found["drift"][-1].item(),
            "verdict on going on": found.attrs["verdict"],
        }
        for name, found in health.items()
    }
)

# %% [markdown]
# ## Layer by layer
#
# The change in entropy from the first check to the last, with paired intervals that hold for all layers at once.

# %%
pd.DataFrame(
    {
        name: [
            f"{change:+.2f} [{low:+.2f}, {high:+.2f}]"
            for change, low, high in zip(
                found.change.values, found.change_low.values, found.change_high.values, strict=True
            )
        ]
        for name, found in health.items()
    }
).rename_axis("layer")

# %%
figure, panes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
for pane, (name, found) in zip(panes, health.items(), strict=True):
    entropy = found["estimate"].sel(measure="load_entropy")
    for layer in entropy.layer.values:
        pane.plot(entropy.checkpoint, entropy.sel(layer=layer), marker="o", label=f"layer {layer}")
    pane.axhline(3, linestyle="--", color="0.5")
    pane.set_title(name)
    pane.set_xlabel("step")
panes[0].set_ylabel("load entropy [bits], 3 is even")
panes[1].legend(fontsize=7, ncols=2)
figure.tight_layout()
