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
# # Quantization: do the experts compute something else, or do other experts compute?
#
# A quantized mixture of experts can lose quality in two ways. Its weights are rounded, so every expert computes
# something slightly different. And because hidden states are then slightly different, routers send tokens to other
# experts. Which of the two is it? This notebook separates them by running each model with the routing of the other.
#
# Everything runs offline on the small trained Mixtral that comes with mixlens. For another model change the next cell,
# such as `MODEL = "mistralai/Mixtral-8x7B-v0.1"`, `SCHEME = "nf4"` and documents of your own. Two models are in memory
# at a time: the original and one that is quantized. Layers that do not fit on an accelerator go to main memory, then to
# disk.
#
# On 8x7B the original and one scheme are in memory together: 94 GB in bfloat16 and, for nf4, 27 GB more (computed), and
# at least four forwards of every document. See `docs/8x7b.md`.

# %%
import tempfile
from pathlib import Path

import pandas as pd
import torch

import mixlens as ml

MODEL = "demo"
SCHEME = "hqq3-g32"
SCHEMES = [SCHEME, "hqq2-g32"]
DOCUMENTS = ml.demo_documents()[::3]
SETTINGS = ml.RecordSettings(max_length=64, overlong="truncate", progress=False)
OUT = Path(tempfile.mkdtemp())

original = ml.load(MODEL, verbose=False)
quantized = ml.load(MODEL, quantization=SCHEME, verbose=False)

# %% [markdown]
# ## First: is it quantized at all?
#
# Since transformers 5 the usual way of loading in 4 bits leaves the experts as they were. The audit counts the bytes of
# every tensor.

# %%
ml.audit(quantized)

# %% [markdown]
# ## What the two models do with the same tokens
#
# The original and the quantized model read the same documents. Where do tokens choose different experts, and how does
# that accumulate with depth?

# %%
signals = ["router_logits", "logprob", "top_logprobs"]
runs = {"original": original, "quantized": quantized}
for name, model in runs.items():
    ml.record(model, DOCUMENTS, out=OUT / name, signals=signals, settings=SETTINGS)
compared = ml.compare(OUT / "original", OUT / "quantized")
compared

# %%
ml.show.flips_by_layer(compared.flips())

# %% [markdown]
# Is a flip a mistake, or a tie that any rounding decides? The margin is how far the weakest expert chosen was ahead of
# the best one left out, in logits of the original's router.

# %%
margins = compared.flips_by_margin()
ml.show.flips_by_margin(margins)

# %%
flipped = (margins.estimate * margins.n).fillna(0)
close = margins.margin <= 0.5
print(
    f"{float(flipped.where(close, 0).sum() / flipped.sum()):.0%} of all flips are at margins below 0.5 logits, where "
    f"{float(margins.n.where(close, 0).sum() / margins.n.sum()):.0%} of all choices are."
)
flips = compared.flips().isel(layer=slice(1, None))  # before the first layer nothing flips
after, without, more = (flips.sel(measure=name) for name in ("after_flip", "without_flip", "more_after"))
print(
    f"A token that has flipped before flips in {float(after.estimate.mean()):.0%} of later layers, one that has not in "
    f"{float(without.estimate.mean()):.0%}; in {int((more.survives & (more.estimate > 0)).sum())} of "
    f"{more.sizes['layer']} layers it is told to flip more often."
)

# %% [markdown]
# ## The split: changed routing, and everything else
#
# Four readings of the same tokens: each model with its own routing, and each with the experts that the other chose,
# forced in every layer. Going from the original to the quantized model with the routing last, or with the routing
# first, divides the change in two ways; their mean is the Shapley value of each part. Everything that is not routing
# comes from rounded weights and from the arithmetic of another kind of layer. Intervals are of paired differences over
# the same documents.

# %%
impact = ml.experiments.measure_impact(original, quantized, DOCUMENTS, settings=SETTINGS)
impact

# %%
split = impact.split()
ml.show.quality_split(split, quantity="kl")

# %%
ml.show.quality_split(split, quantity="loss")


# %%
def told(quantity: str, part: str) -> str:
    cell = split.sel(quantity=quantity, order="mean", part=part)
    return f"{float(cell.estimate):.4f} [{float(cell.ci_low):.4f}, {float(cell.ci_high):.4f}]"


mean = split.sel(order="mean")
share = mean.estimate.sel(part="routing") / mean.estimate.sel(part="total")
routing = mean.sel(quantity="loss", part="routing")
print(
    f"Of the KL divergence of {told('kl', 'total')} nats per token, {told('kl', impact.rest)} comes from {impact.rest} "
    "and "
    f"{told('kl', 'routing')} from other routing ({float(share.sel(quantity='kl')):.0%})."
)
print(
    f"Of the change in loss of {told('loss', 'total')} nats per token, other routing causes {told('loss', 'routing')}, "
    f"which {'differs' if bool(routing.survives) else 'does not differ'} significantly from zero "
    f"(q = {float(routing.q):.2g})."
)

# %% [markdown]
# By domain; there are only one or two documents of each, so no interval can be given:

# %%
by_domain = impact.split(by="domain").sel(quantity="kl", order="mean")
pd.DataFrame(
    {
        "KL": by_domain.estimate.sel(part="total").to_series(),
        "from other routing": by_domain.estimate.sel(part="routing").to_series(),
        "low": by_domain.ci_low.sel(part="routing").to_series(),
        "high": by_domain.ci_high.sel(part="routing").to_series(),
        "documents": by_domain.n_documents.to_series(),
    }
).round(4)

# %% [markdown]
# ## Which experts suffer most?
#
# Every expert of both models gets the input that it had in the original model. The map shows the relative error of its
# output.

# %%
experts = impact.experts()
ml.show.expert_errors(experts)

# %%
flat = experts.estimate.stack(cell=("layer", "expert"))
worst = flat.cell[int(flat.values.argmax())].item()
worst = experts.sel(layer=worst[0], expert=worst[1])
print(
    f"The largest error is that of expert {worst.expert.item()} in layer {worst.layer.item()}, "
    f"{float(worst.estimate):.0%} [{float(worst.ci_low):.0%}, {float(worst.ci_high):.0%}] of its output, n = "
    f"{int(worst.n):,} tokens; the median expert has {float(experts.estimate.median()):.0%}."
)

# %% [markdown]
# ## What is a bit worth?
#
# This compares several schemes in one resumable run: quality against true bytes, and speed on this machine. A scheme is
# on the dashed line if no other has both fewer bytes and less divergence.

# %%
if original.dtype != torch.bfloat16:
    SCHEMES = ["bfloat16", *SCHEMES]
del original, quantized, runs, model  # the next call loads its own
few = ml.demo_documents()[::6] if MODEL == "demo" else DOCUMENTS
front = ml.experiments.measure_pareto(
    MODEL, few, schemes=SCHEMES, out=OUT / "pareto", settings=SETTINGS, speed=ml.experiments.Speed(2, 16, 4)
)
front.overview().T

# %%
ml.show.pareto(front)

# %% [markdown]
# ## Is the split the same for every scheme?
#
# The pareto run also measured the split: the part of the divergence that comes from changed routing, from the mildest
# scheme to the harshest.

# %%
kl, by_routing = front.of("kl"), front.of("kl_from_routing")
changed = kl[kl.estimate > 0].sort_values("estimate").index
part = (by_routing.estimate / kl.estimate)[changed]
pd.DataFrame(
    {
        "KL": kl.estimate[changed],
        "from routing": by_routing.estimate[changed],
        "low": by_routing.ci_low[changed],
        "high": by_routing.ci_high[changed],
        "share of it": part,
        "shared experts": front.of("overlap").estimate[changed],
    }
).round(4)

# %% [markdown]
# ## The answer

# %%
of_kl = float(share.sel(quantity="kl"))
parts = {"its experts compute something else": impact.rest, "other experts compute": "routing"}
cells = {cause: mean.sel(quantity="kl", part=part) for cause, part in parts.items()}
most, least = sorted(cells, key=lambda cause: -float(cells[cause].estimate))
told_apart = float(cells[most].ci_low) > float(cells[least].ci_high)
cause = f"mostly because {most}" if told_apart else "for both reasons, which the intervals do not tell apart"
flipped = float(flips.estimate.sel(measure="so_far").isel(layer=-1))
mildest, harshest = changed[0], changed[-1]
print(
    f"{SCHEME}: {flipped:.0%} of tokens choose other experts in some layer; changed routing brings {of_kl:.0%} of the "
    f"divergence. It differs from the original {cause}."
)
print(
    f"Changed routing was measured to bring {part[mildest]:.0%} of it under {mildest}, the mildest rounding, and "
    f"{part[harshest]:.0%} under {harshest}, the harshest: quotients without an interval, n = "
    f"{front.meta['documents']} documents."
)
smallest = front.front()[0]
print(
    f"Not beaten in both bytes and divergence: {', '.join(front.front())}. The smallest, {smallest}, takes "
    f"{front.of('expert_bits').estimate[smallest]:.1f} bits an expert weight, scales included."
)
