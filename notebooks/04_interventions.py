# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Interventions: which experts matter, and for what?
#
# Utilization says where tokens go, not what an expert is for. Here experts are taken out, and the loss says what that
# costs. Everything runs offline on the small trained Mixtral that comes with mixlens.

# %%
import pandas as pd
import torch
from transformers import AutoTokenizer

import mixlens as ml

model = ml.load("demo", verbose=False)
tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
documents = ml.demo_documents()
settings = ml.RecordSettings(max_length=128, overlong="truncate", shard_tokens=4096, progress=False)

# %% [markdown]
# ## An edit is a context manager
#
# Round anybody's forward or generate. A Recorder, inside or outside, sees what the model then used: the forbidden
# expert is gone, and the weights of those chosen in its place sum to one.

# %%
inputs = tokenizer(documents[0]["text"][:400], return_tensors="pt")
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
# Each expert of each layer in turn is never chosen; the number is the change in loss on the same tokens. Hidden states
# below the edited layer are kept, so that the map costs a fraction of one forward for every expert. Dots mark changes
# whose 95 % interval, from a bootstrap over documents, excludes zero. A few experts cost far more than the rest, so
# colours are linear near zero and logarithmic beyond, as the figure says.

# %%
measured = ml.measure_importance(model, documents, settings=settings)
importance = ml.stats.expert_importance(measured, by="domain")
ml.show.importance_by_domain(importance)

# %% [markdown]
# ## The expert that mathematics over-uses: does it matter most to mathematics?
#
# In every layer, the expert whose share in mathematics exceeds its mean share in the other domains most. It is picked
# by use alone, never by importance, and all layers are shown. `rank` is the place of mathematics among the domains by
# the loss that the expert's absence costs: 1 says that it matters most to mathematics.

# %%
others = importance.drop_sel(domain="mathematics")
over_use = importance.share.sel(domain="mathematics") - others.share.mean("domain")
rows = []
for layer in importance.layer.values:
    expert = int(over_use.sel(layer=layer).values.argmax())
    cell = importance.sel(layer=layer, expert=expert)
    mathematics = cell.sel(domain="mathematics")
    rows.append(
        {
            "layer": layer,
            "expert": expert,
            "share in mathematics": float(mathematics.share),
            "share elsewhere": float(cell.share.drop_sel(domain="mathematics").mean()),
            "change in loss": float(mathematics.estimate),
            "low": float(mathematics.ci_low),
            "high": float(mathematics.ci_high),
            "largest elsewhere": float(cell.estimate.drop_sel(domain="mathematics").max()),
            "rank": int((cell.estimate > mathematics.estimate).sum()) + 1,
        }
    )
favourites = pd.DataFrame(rows).set_index("layer")
favourites.round(3)

# %% [markdown]
# What the table says, in words made from its numbers:

# %%
first = favourites["rank"] == 1
clear = favourites["low"] > 0
strongest = favourites["change in loss"].idxmax()
best = favourites.loc[strongest]
elsewhere = importance.sel(layer=strongest, expert=int(best["expert"])).drop_sel(domain="mathematics")
runner_up = elsewhere.isel(domain=int(elsewhere.estimate.values.argmax()))
print(
    f"In {first.sum()} of {len(favourites)} layers the expert that mathematics over-uses matters most to mathematics; "
    f"in {(first & clear).sum()} of them the interval excludes zero."
)
print(
    f"It costs most in layer {strongest}: without expert {best['expert']:.0f} mathematics loses "
    f"{best['change in loss']:.3f} [{best['low']:.3f}, {best['high']:.3f}] nats a token; next comes "
    f"{runner_up.domain.item()} with {float(runner_up.estimate):.3f} "
    f"[{float(runner_up.ci_low):.3f}, {float(runner_up.ci_high):.3f}]."
)

# %% [markdown]
# Use and importance need not go together. A point far to the right and near zero is an expert that mathematics uses
# much and can spare, for its work is taken over by the next best.

# %%
ml.show.importance_against_share(importance.sel(domain="mathematics"))

# %% [markdown]
# ## How many experts does a token need?
#
# The model was trained with two. The same documents with each token choosing one to eight:

# %%
sweep = ml.stats.topk_sweep(ml.measure_topk(model, documents, settings=settings))
ml.show.topk_curve(sweep)

# %% [markdown]
# The weights of those chosen are renormalised for every k; how much of the weight stays with the strongest:

# %%
ml.show.topk_routing(sweep)

# %% [markdown]
# ## What experts contribute
#
# Importance asks what the model does without an expert. Direct logit attribution asks what a chosen expert itself adds
# to the logit of the token that came next, through the last norm and the unembedding, without what later layers make
# of it. Means over the tokens that chose the expert, and then the same along one text.

# %%
contributions = ml.expert_contributions(model, documents, settings=settings)
contribution = ml.stats.expert_contribution(contributions)
ml.show.contribution(contribution)

# %%
ml.show.contributions(contributions, sequence=0, positions=(0, 48))

# %% [markdown]
# Do the two agree? Rank correlation over all experts between what an expert adds and what its absence costs:

# %%
whole = ml.stats.expert_importance(measured)
pairs = pd.DataFrame({"added": contribution.estimate.values.ravel(), "cost": whole.estimate.values.ravel()}).dropna()
round(float(pairs["added"].corr(pairs["cost"], method="spearman")), 2)

# %% [markdown]
# ## Patching
#
# Activations of one run put into another: here the residual stream of a French sentence, layer by layer, at the last
# position of a German one. How far does that carry the prediction? After the last layer it must be all the way.

# %%
french, german = (
    tokenizer(text, return_tensors="pt")["input_ids"]
    for text in ("La ville est située dans le nord de la", "Die Stadt liegt im Norden der")
)
with torch.no_grad(), ml.Recorder(model, signals=["resid_post"]) as recorder:
    target = model(french).logits[0, -1].softmax(-1)
    source = recorder.trace().activations("resid_post").isel(token=-1)
    distance = {"none": float((model(german).logits[0, -1].softmax(-1) - target).abs().sum() / 2)}
last = ml.edits.Where(positions=german.shape[1] - 1)
for layer in importance.layer.values.tolist():
    patch = ml.edits.patch("resid_post", source.sel(layer=layer).values.astype("float32"), layer=layer, where=last)
    with torch.no_grad(), ml.edit(model, patch):
        distance[f"layer {layer}"] = float((model(german).logits[0, -1].softmax(-1) - target).abs().sum() / 2)
pd.Series(distance, name="total variation distance to the French prediction").round(3)
