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
# # Should I prune it?
#
# The question: can one of eight experts go in every layer, or two, if no kind of text may lose more than 0.05 nats a
# token?
#
# **The answer for the bundled model: no.** Without the expert of each layer that REAP ranks lowest, the loss on
# held-out text rises by 0.11 nats per token, and by at least 0.06; without two experts, prose alone loses at least
# 0.08. Choosing by the measured loss instead of REAP is no better on text that it was not measured on, and neither is
# replacing experts by their mean outputs. If you allow 0.3 nats, one expert of eight can go: then the worst group is
# within the limit.
#
# Set `MODEL`, `DOCUMENTS`, `GROUP` and `LIMITS` for your own. Experts are chosen on one part of the documents and
# judged on the other; a group needs about ten documents there.
#
# On 8x7B it takes 94 GB of accelerator memory in bfloat16, or 27 GB in nf4 (computed), and a copy without one expert
# of eight 79 GB more in bfloat16 (computed). The loss without each of 256 experts takes the forwards of the layers
# above it. See `docs/8x7b.md`.

# %%
import tempfile
from pathlib import Path

import pandas as pd

import mixlens as ml

MODEL = "demo"
GROUP = {
    "languages": ["french", "german", "italian", "spanish"],
    "prose": ["gutenberg", "philosophy", "pubmed", "wikipedia"],
    "formal": ["arxiv", "github", "mathematics", "stackexchange"],
}
LIMITS = {"loss": 0.05}

settings = ml.RecordSettings(progress=False, max_length=160, overlong="truncate")
group_of = {domain: group for group, domains in GROUP.items() for domain in domains}
documents = [document | {"group": group_of[document["domain"]]} for document in ml.demo_documents()]
choosing = [document["text"] for number, document in enumerate(documents) if number % 5 < 2]
judging = [document for number, document in enumerate(documents) if number % 5 >= 2]

model = ml.load(MODEL, verbose=False)
pd.Series([document["group"] for document in judging]).value_counts()

# %% [markdown]
# ## Which experts matter least?
#
# One recording says how often each expert is chosen, and how much it puts out, with its weight (REAP) and without.
# Measuring the loss without each expert takes longer; the other scores are substitutes for it.

# %%
trace = ml.record(model, choosing, signals=["expert_norm"], settings=settings)
measured = ml.experiments.measure_importance(model, choosing[::2], settings=settings)
saliency = ml.stats.saliency(trace, importance=measured)
ranks = saliency["estimate"].to_dataframe()["estimate"].unstack("measure")
ranks.corr("spearman").round(2)

# %%
weakest = ranks["reap"].groupby("layer").idxmin()
ranks.loc[weakest].round(3)

# %% [markdown]
# ## Take them out, and judge on text that nothing was chosen by
#
# `prune` takes the experts and their rows of the router out of a copy, which shares every other weight with the model.

# %%
judged = {}
for name, measure, keep in (("reap, 7 of 8", "reap", 7), ("reap, 6 of 8", "reap", 6), ("loss, 7 of 8", "loss", 7)):
    kept = ml.decisions.strongest(saliency["estimate"].sel(measure=measure), keep)
    pruned = ml.decisions.prune(model, kept)
    judged[name] = ml.decisions.judge(model, pruned, documents=judging, limits=LIMITS, by="group", settings=settings)
judged["reap, 7 of 8"]

# %%
pd.DataFrame(
    {
        name: {row["group"]: f"{row['estimate']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]" for row in rows}
        | {"verdict": found.verdict}
        for name, found in judged.items()
        for rows in [found.table.to_dict("records")]
    }
)

# %% [markdown]
# The verdict depends on what you allow, which you can change without measuring again:

# %%
{limit: judged["reap, 7 of 8"].within({"loss": limit}).verdict for limit in (0.02, 0.05, 0.1, 0.2, 0.3)}

# %% [markdown]
# ## Would their mean output do in their place?
#
# With `means=`, a removed expert outputs its mean and routing stays as it was. Such a model runs here, but cannot be
# saved as a checkpoint of the family.

# %%
means = ml.experiments.expert_outputs(model, choosing, settings=settings)["mean"]
kept = ml.decisions.strongest(saliency["estimate"].sel(measure="reap"), 7)
stand_ins = ml.decisions.prune(model, kept, means=means)
ml.decisions.judge(model, stand_ins, documents=judging, limits=LIMITS, by="group", settings=settings)

# %% [markdown]
# ## A checkpoint, all the same
#
# `save` writes a checkpoint that plain transformers and `ml.load` read, with a card that says what was lost; here into
# a folder that is deleted with the notebook.

# %%
with tempfile.TemporaryDirectory() as folder:
    saved = ml.decisions.save(pruned, Path(folder) / "seven-experts", judgement=judged["loss, 7 of 8"])
    print(sorted(path.name for path in saved.iterdir()))
    print((saved / "README.md").read_text("utf-8")[:900])
