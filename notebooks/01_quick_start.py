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
# # Quick start: what do the experts of a Mixtral do?
#
# A few cells take you from a model to an answer with error bars. Everything runs offline on the small trained Mixtral
# that comes with mixlens; set `MODEL` to `"mistralai/Mixtral-8x7B-v0.1"` to run the same cells on the real one, which
# spreads over the accelerators that are there.
#
# On 8x7B it takes 94 GB of accelerator memory in bfloat16, or 27 GB in nf4 (computed), and one forward
# of every document. See `docs/8x7b.md`.

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
# whiskers are 95 % intervals over documents.

# %%
share = ml.stats.expert_share(trace, by="domain")
ml.show.expert_share_grid(share)

# %% [markdown]
# Which measured share is furthest above uniform, and where? The largest of hundreds looks larger than it is because it
# was picked; notebook 02 asks which shares differ. More generally, how many bits does the choice of an expert reveal
# about the domain, and how many would shuffled labels reveal?

# %%
cells = share.stack(cell=("domain", "layer", "expert"))
most = cells.isel(cell=int(cells["estimate"].values.argmax()))
domain, layer, expert = most["cell"].item()
print(
    f"Furthest above uniform ({share.attrs['uniform']:.1%}): in layer {layer} expert {expert} takes "
    f"{float(most['estimate']):.1%} [{float(most['ci_low']):.1%}, {float(most['ci_high']):.1%}] of the assignments of "
    f"{domain}; n = {int(most['n']):,} tokens of {int(most['n_documents'])} documents."
)

# %%
information = ml.stats.domain_information(trace)
ml.show.domain_information(information)

# %%
excess = information.sel(measure="excess")
above = int(excess["survives"].sum())
top = excess.isel(layer=int(excess["estimate"].values.argmax()))
print(
    f"Above chance in {above} of {excess.sizes['layer']} layers, most in layer {int(top['layer'])}: "
    f"{float(top['estimate']):.3f} bits [{float(top['ci_low']):.3f}, {float(top['ci_high']):.3f}], "
    f"n = {int(top['n']):,} tokens."
)

# %% [markdown]
# ## Do consecutive tokens go to the same expert?
#
# Table 5 of the paper asks this of Mixtral-8x7B. Here is the answer for this model in the same form, with intervals:
# the percentage of consecutive tokens with the same first choice.

# %%
repetition = ml.stats.repetition(trace, by="domain").sel(choice="first")
ends = repetition.isel(layer=[0, -1])
table = (100 * ends[["estimate", "ci_low", "ci_high"]]).to_dataframe().drop(columns="choice").round(1).unstack("layer")
table["n", ""] = repetition["n"].to_series()
table

# %%
whole = ml.stats.repetition(trace).sel(choice="first")
uniform = float(whole.attrs["uniform"][0])
over = int((whole["survives"] & (whole["estimate"] > uniform)).sum())
print(
    f"Uniform routing gives {uniform:.1%}; of all documents together, {over} of {whole.sizes['layer']} layers are "
    f"significantly above it. The {int(repetition['n_documents'].min())} documents of a domain are too few for that."
)

# %% [markdown]
# ## One text, token by token
#
# The first document of the domain found above, in the layer found above. The thick underline is the first choice, the
# thin one the second. Where scripts may run, the view is live: move the layer, hover a token, pick an expert.

# %%
document = int(trace.sequences.index[trace.sequences["domain"] == domain][0])
ml.view.tokens(trace, sequence=document, layer=layer)

# %% [markdown]
# ## Hand it on
#
# `ml.report(trace, "report.html")` writes all of this, and more, into one file that opens offline. With `ml.record(...,
# out="runs/pile")` the trace is kept on disk, and a run that was stopped resumes where it stopped.
