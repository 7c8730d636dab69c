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
# # Quick start: what do the experts of a Mixtral do?
#
# Five cells take you from a model to an answer with error bars. Everything runs offline on the small trained Mixtral
# that comes with mixlens; set `MODEL` to `"mistralai/Mixtral-8x7B-v0.1"` to run the same cells on the real one.

# %%
import mixlens as ml

MODEL = "demo"
model = ml.load(MODEL, verbose=False)
trace = ml.record(model, ml.demo_documents(), settings=ml.RecordSettings(progress=False))
print(trace)

# %% [markdown]
# A trace is one flat axis of tokens, in the order of the documents, without padding. The documents' own columns came
# along; here there is a domain for each.

# %%
trace.sequences.groupby("domain")["length"].agg(["count", "sum"]).rename(
    columns={"count": "documents", "sum": "tokens"}
)

# %% [markdown]
# ## Which experts serve which domain?
#
# The share of each expert by domain, in the first, a middle and the last layer. This is the form of Figure 7 of the
# Mixtral paper ([arXiv 2401.04088](https://arxiv.org/abs/2401.04088)). The dashed line is what uniform routing gives;
# whiskers are 95 % intervals from a bootstrap over documents.

# %%
share = ml.stats.expert_share(trace, by="domain")
ml.show.expert_share_grid(share)

# %% [markdown]
# Some experts have a domain of their own. How much does an expert's choice say about the domain, in bits, and how much
# of that would shuffled labels say as well?

# %%
information = ml.stats.domain_information(trace)
ml.show.information(information)

# %% [markdown]
# ## Do consecutive tokens go to the same expert?
#
# Table 5 of the paper asks this of Mixtral-8x7B. The answer for this model, with intervals, in the same form:

# %%
repetition = ml.stats.repetition(trace, by="domain").sel(choice="first")
table = repetition[["estimate", "ci_low", "ci_high"]].isel(layer=[0, -1]).to_dataframe().drop(columns="choice")
(100 * table).round(1).unstack("layer")

# %% [markdown]
# ## One text, token by token
#
# The thick underline is the first choice, the thin one the second. Where scripts may run, the view is live: move the
# layer, hover a token, pick an expert.

# %%
mathematics = int(trace.sequences.index[trace.sequences["domain"] == "mathematics"][0])
ml.view.tokens(trace, sequence=mathematics)

# %% [markdown]
# ## Hand it on
#
# `ml.report(trace, "report.html")` writes all of this, and more, into one file that opens offline. With
# `ml.record(..., out="runs/pile")` the trace is kept on disk, and a run that was stopped goes on where it stopped.
