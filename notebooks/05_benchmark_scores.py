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
# # Does a model score worse with one expert a token, or is that noise? Benchmark scores that can be compared
#
# A score without its protocol cannot be compared. This notebook evaluates a model by protocol, with an interval for
# every score and every sample stored, and compares two runs sample by sample. Everything runs offline on the small
# trained Mixtral that comes with mixlens, and on a benchmark of six small tasks that it can pass. For another model set
# `MODEL` and `PUBLISHED` to `"mistralai/Mixtral-8x7B-v0.1"`, `TASKS` to benchmarks such as `["mmlu", "gsm8k"]`, and
# `PROTOCOL` to `"mixtral-paper"`; `LIMIT` takes the first questions of each task, 30 here so that the notebook runs in
# a minute; `None` takes all.
#
# On 8x7B it takes 94 GB of accelerator memory in bfloat16, or 27 GB in nf4 (computed), and the forwards
# of every question with its shots. See `docs/8x7b.md`.

# %%
import pandas as pd

import mixlens as ml
from mixlens.evals.protocols import suites
from mixlens.evals.published import beside, references
from mixlens.evals.routing import sample_share

MODEL, TASKS, PROTOCOL, LIMIT = "demo", "demo", None, 30
PUBLISHED = "mistralai/Mixtral-8x7B-v0.1"  # whose published scores are compared
model = ml.load(MODEL, verbose=False)
settings = ml.evals.EvalSettings(progress=False, routing=True)

# %% [markdown]
# ## Why the protocol matters
#
# Here are two published scores of ARC-Challenge for the same weights. Every figure comes with its source, and where
# sources disagree both are shown.

# %%
references(PUBLISHED, benchmark="arc_challenge")[["protocol", "score", "n", "source", "page"]]

# %% [markdown]
# A suite maps each benchmark to one protocol, and one protocol is one task file.

# %%
pd.Series(suites()["mixtral-paper"], name="protocol in mixtral-paper").to_frame()

# %% [markdown]
# ## Evaluate
#
# Before the model is asked, a preflight checks that prompts begin with one BOS and fit, that decoding gives back what
# was encoded, and that the graders pass gold answers. With `out=`, a stopped evaluation resumes where it stopped. The
# folder opens again with `ml.open`, and holds lm-eval's own JSON as well as the samples. If you pass a name instead of
# a model, as in `ml.evaluate("mistralai/Mixtral-8x7B-v0.1", "mmlu_5shot", out=...)`, the model is loaded and evaluated
# in a process of its own.

# %%
log = ml.evaluate(model, TASKS, protocol=PROTOCOL, limit=LIMIT, settings=settings, out="runs/two-experts")
log.scores[["task", "average", "score", "ci_low", "ci_high", "n", "interval"]].round(3)

# %%
ml.show.scores(log, subjects=True)

# %% [markdown]
# Each sample is a row: prompt, answer, log-probabilities of the choices, and whether it was right.

# %%
log.samples[["task", "sample_id", "prompt", "target", "response", "correct"]].groupby("task").head(1)

# %% [markdown]
# ## Beside published scores
#
# A published score is comparable only if its source states every part of the protocol (shots, split, metric, number of
# questions) and all of them agree. If they do not, or if nothing has been published, the table says why.

# %%
beside(log, model=PUBLISHED)[["benchmark", "protocol", "score", "comparable", "why_not"]].round(1)

# %% [markdown]
# ## Is the difference noise?
#
# Evaluate the same questions with one expert fewer for every token. The two runs are joined by sample, which gives the
# answers that flipped, the exact McNemar test, and a paired interval of the difference. One sentence says whether the
# data distinguish the two runs.

# %%
with ml.edit(model, ml.edits.top_k(1)):
    ablated = ml.evaluate(model, TASKS, protocol=PROTOCOL, limit=LIMIT, settings=settings, out="runs/one-expert")
compared = ml.compare(log, ablated)
compared

# %%
ml.show.paired_differences(compared)

# %%
compared.flips[["task", "sample_id", "change", "prompt", "target"]].head(6)

# %% [markdown]
# ## Which experts the questions use
#
# Routing was recorded while the model answered, and is joined by sample. Shots that samples share would be counted
# once, separately.

# %%
ml.show.expert_share(sample_share(log, by="group").isel(layer=[-1]))
