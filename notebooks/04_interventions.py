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
# # Interventions: which experts matter, and for what?
#
# Utilisation shows where tokens go, not what an expert is for. This notebook removes experts and measures the loss that
# this costs. Everything runs offline on the small trained Mixtral that comes with mixlens; set `MODEL`, `DOCUMENTS` and
# `DOMAIN` for another. A map of all experts takes a forward pass of the layers above each of them, 256 passes for 8x7B.
# Keep documents few and short there, or map some layers only, with `ml.experiments.Ablation(layers=[...])`.
#
# On 8x7B it takes 94 GB of accelerator memory in bfloat16, or 27 GB in nf4 (computed). Every expert that is removed
# costs one more pass over all documents. See `docs/8x7b.md`.

# %%
import numpy as np
import pandas as pd
import torch
from transformers import AutoTokenizer

import mixlens as ml

MODEL = "demo"
DOCUMENTS = ml.demo_documents()
DOMAIN = "mathematics"
model = ml.load(MODEL, verbose=False)
tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
documents = DOCUMENTS
settings = ml.RecordSettings(max_length=64, overlong="truncate", shard_tokens=4096, progress=False)

# %% [markdown]
# ## An edit is a context manager
#
# It goes around any forward or generate. A Recorder, inside or outside, sees what the edited model used: the forbidden
# expert is gone, and the weights of the experts chosen instead sum to one.

# %%
inputs = tokenizer(documents[0]["text"][:400], return_tensors="pt").to(model.device)
with torch.no_grad(), ml.Recorder(model) as plain:
    model(**inputs)
with torch.no_grad(), ml.Recorder(model) as edited, ml.edit(model, ml.edits.forbid(3, 5), ml.edits.temperature(0.5)):
    model(**inputs)
pd.DataFrame(
    {
        name: {
            "tokens that chose expert 5 in layer 3": int((recorder.trace().read("expert_id")[:, 3] == 5).sum()),
            "smallest sum of weights": float(recorder.trace().read("weight").sum(-1).min()),
            "mean loss": float(-pd.Series(recorder.trace().read("logprob")).mean()),
        }
        for name, recorder in {"plain": plain, "edited": edited}.items()
    }
).round(4)

# %% [markdown]
# ## A map of all experts, by domain
#
# Each expert of each layer in turn is forbidden; the number is the change in loss on the same tokens. Hidden states
# below the edited layer are kept, so each expert costs only a fraction of a forward pass. A few experts cost far more
# than the rest, so the colours are linear near zero and logarithmic beyond. Dots mark changes that survive control for
# the number of cells. The five documents of a domain are too few for any to survive, but all 60 together are enough:
# first comes the map over all documents, then the one by domain, for exploration.

# %%
measured = ml.experiments.measure_importance(model, documents, settings=settings)
whole = ml.stats.expert_importance(measured)
ml.show.expert_importance(whole)

# %%
importance = ml.stats.expert_importance(measured, by="domain")
ml.show.importance_by_domain(importance)

# %% [markdown]
# ## The expert that a domain over-uses: does it matter most to that domain?
#
# `DOMAIN` is mathematics unless you chose another. In every layer, the expert whose share in it exceeds its mean share
# in the other domains most. It is picked by use alone, never by importance, and all layers are shown. `rank` orders the
# domains by the loss that the expert's absence costs them: rank 1 means that it matters most to `DOMAIN`.

# %%
others = importance.drop_sel(domain=DOMAIN)
over_use = importance.share.sel(domain=DOMAIN) - others.share.mean("domain")
rows = []
for layer in importance.layer.values:
    expert = int(over_use.sel(layer=layer).values.argmax())
    cell = importance.sel(layer=layer, expert=expert)
    own, elsewhere = cell.sel(domain=DOMAIN), cell.drop_sel(domain=DOMAIN)
    rows.append(
        {
            "layer": layer,
            "expert": expert,
            "share there": float(own.share),
            "share elsewhere": float(elsewhere.share.mean()),
            "change in loss": float(own.estimate),
            "low": float(own.ci_low),
            "high": float(own.ci_high),
            "largest elsewhere": float(elsewhere.estimate.max()),
            "rank": int((cell.estimate > own.estimate).sum()) + 1,
            "survives": bool(own.survives),
        }
    )
favourites = pd.DataFrame(rows).set_index("layer")
favourites.round(3)

# %% [markdown]
# A summary computed from the table:

# %%
first = favourites["rank"] == 1
strongest = favourites["change in loss"].idxmax()
best = favourites.loc[strongest]
elsewhere = importance.sel(layer=strongest, expert=int(best["expert"])).drop_sel(domain=DOMAIN)
runner_up = elsewhere.isel(domain=int(elsewhere.estimate.values.argmax()))
print(
    f"In {first.sum()} of {len(favourites)} layers the expert that {DOMAIN} over-uses is measured to matter most to "
    f"{DOMAIN}; with {int(importance.n_documents.sel(domain=DOMAIN))} documents of it, in "
    f"{(first & favourites['survives']).sum()} of them the change is significant."
)
print(
    f"It costs most in layer {strongest}: without expert {best['expert']:.0f} {DOMAIN} loses "
    f"{best['change in loss']:.3f} [{best['low']:.3f}, {best['high']:.3f}] nats per token; next comes "
    f"{runner_up.domain.item()} with {float(runner_up.estimate):.3f} "
    f"[{float(runner_up.ci_low):.3f}, {float(runner_up.ci_high):.3f}]."
)

# %% [markdown]
# Use and importance need not go together. A point far to the right and near zero is an expert that the domain uses
# often but can do without.

# %%
ml.show.importance_against_share(importance.sel(domain=DOMAIN))

# %% [markdown]
# ## How many experts does a token need?
#
# Mixtral is trained with two. Here each token of the same documents chooses one to eight:

# %%
sweep = ml.stats.topk_sweep(ml.experiments.measure_topk(model, documents, settings=settings))
ml.show.topk_sweep(sweep)

# %%
least = int(sweep.k[int(sweep.estimate.values.argmin())])
told = ", ".join(
    f"{k}: {float(sweep.change.sel(k=k)):+.3f} [{float(sweep.change_low.sel(k=k)):+.3f}, "
    f"{float(sweep.change_high.sel(k=k)):+.3f}]"
    for k in sweep.k.values
    if k != model.config.num_experts_per_tok
)
print(
    f"The loss is least with {least} experts a token; n = {int(sweep.n):,} tokens. Change against the model's own k, "
    f"in nats per token: {told}."
)

# %% [markdown]
# The weights of the chosen experts are renormalised for every k. How much weight does the strongest keep?

# %%
ml.show.topk_routing(sweep)

# %% [markdown]
# ## What experts contribute
#
# Importance asks what the model does without an expert. Direct logit attribution asks what a chosen expert itself adds
# to the logit of the token that came next, through the last norm and the unembedding, without what later layers make of
# it. The figures show means over the tokens that chose the expert, then the contributions along one text.

# %%
contributions = ml.experiments.measure_contributions(model, documents, settings=settings)
contribution = ml.stats.expert_contribution(contributions)
ml.show.expert_contribution(contribution)

# %%
ml.show.contributions(contributions, sequence=0, positions=(0, 48))

# %% [markdown]
# Do the two agree? The rank correlation over all experts between what an expert adds and what its absence costs, with
# an interval from a bootstrap over experts:

# %%
pairs = pd.DataFrame({"added": contribution.estimate.values.ravel(), "cost": whole.estimate.values.ravel()}).dropna()
draws = np.random.default_rng(0).integers(len(pairs), size=(1000, len(pairs)))
correlation = pairs["added"].corr(pairs["cost"], method="spearman")
low, high = np.quantile([pairs.iloc[d].corr(method="spearman").iloc[0, 1] for d in draws], [0.025, 0.975])
print(f"Spearman's rho {correlation:.2f} [{low:.2f}, {high:.2f}], n = {len(pairs)} experts.")

# %% [markdown]
# ## Patching
#
# Patching puts activations of one run into another: here the residual stream of a French sentence, layer by layer, at
# the last position of a German one. How much of the prediction does it carry over? After the last layer, all of it. One
# pair of sentences shows how it is done; it is not a finding.

# %%
french, german = (
    tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    for text in ("La ville est située dans le nord de la", "Die Stadt liegt im Norden der")
)


def predicted(ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits[0, -1].float().softmax(-1)


with ml.Recorder(model, signals=["resid_post"]) as recorder:
    target = predicted(french)
source = recorder.trace().activations("resid_post").isel(token=-1)
distance = {"none": float((predicted(german) - target).abs().sum() / 2)}
last = ml.edits.Where(positions=german.shape[1] - 1)
for layer in importance.layer.values.tolist():
    patch = ml.edits.patch("resid_post", source.sel(layer=layer).values.astype("float32"), layer=layer, where=last)
    with ml.edit(model, patch):
        distance[f"layer {layer}"] = float((predicted(german) - target).abs().sum() / 2)
assert distance[f"layer {layer}"] < 0.01
pd.Series(distance, name="total variation distance to the French prediction").round(3)
