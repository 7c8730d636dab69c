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
# # Do experts specialise by domain? Section 5 of the Mixtral paper, redone
#
# The paper ([arXiv 2401.04088](https://arxiv.org/abs/2401.04088)) asks three questions of Mixtral-8x7B on the Pile: is
# any expert chosen more often in one domain than in another (Figure 7), what does routing look like token by token
# (Figure 8), and do consecutive tokens go to the same expert (Table 5)? It gives no intervals. Here are the same three
# questions with intervals from a bootstrap over documents, on any Mixtral and any documents.
#
# Set `MODEL` to `"mistralai/Mixtral-8x7B-v0.1"` and `DOCUMENTS` to a `datasets.Dataset` with columns `text` and
# `domain` to ask them of the real one.

# %%
import numpy as np

import mixlens as ml

MODEL = "demo"
DOCUMENTS = ml.demo_documents()
LAYERS = None  # three layers to draw; None for the first, the middle and the last
model = ml.load(MODEL, verbose=False)
trace = ml.record(model, DOCUMENTS, signals=["router_logits", "logprob"], settings=ml.RecordSettings(progress=False))
LAYERS = LAYERS or [int(trace.layers[i]) for i in (0, trace.n_layers // 2, -1)]
print(trace)

# %% [markdown]
# ## Figure 7: how often is each expert chosen in each domain?
#
# The share of assignments that go to each expert, first and second choice together, so that 12.5 % of assignments is
# 25 % of tokens where two of eight experts are chosen. Dashed: what uniform routing would give.

# %%
share = ml.stats.expert_share(trace, by="domain")
ml.show.expert_share_grid(share, layers=LAYERS)

# %% [markdown]
# The same, live, for every layer and domain at once: choose a cell, and the view below it follows.

# %%
ml.view.share_heatmap(share)

# %%
ml.view.expert_share(share)

# %% [markdown]
# **Is the difference between domains more than chance?** How many bits does a choice of expert tell about the domain,
# and how many would it tell if the domains were dealt out to the documents at random?

# %%
information = ml.stats.domain_information(trace)
ml.show.information(information)

# %%
excess = information.sel(measure="excess")
apart = [int(layer) for layer in excess["layer"] if float(excess["ci_low"].sel(layer=layer)) > 0]
most = int(excess["layer"][int(excess["estimate"].argmax("layer"))])
uniform = float(share.attrs["uniform"])
beyond = (share["ci_low"] > uniform) | (share["ci_high"] < uniform)
print(
    f"Above chance in {len(apart)} of {excess.sizes['layer']} layers, most in layer {most}: "
    f"{float(excess['estimate'].sel(layer=most)):.3f} bits "
    f"[{float(excess['ci_low'].sel(layer=most)):.3f}, {float(excess['ci_high'].sel(layer=most)):.3f}]."
)
print(f"{int(beyond.sum())} of {beyond.size} shares of an expert in a domain have an interval that excludes uniform.")

# %% [markdown]
# Of Mixtral-8x7B the paper says that it sees no obvious pattern by topic, DM Mathematics aside. What the two lines
# above say of this model is the answer with its uncertainty; a small model that was trained on few domains need not
# agree with a large one.

# %% [markdown]
# ## Figure 8: what does routing look like along a text?
#
# Each token is underlined by its experts: thick the first choice, thin the second. The paper sees that syntax, such as
# indentation in code or a keyword, goes to the same expert. Move the layer; pick an expert, and step through the tokens
# where it is strongest; colour by surprise or by the router's entropy.

# %%
domains = trace.sequences["domain"]
wanted = [d for d in ("github", "python", "mathematics", "arxiv") if d in set(domains)][:3] or list(
    domains.unique()[:3]
)
examples = [int(domains.index[domains == d][0]) for d in wanted]
ml.view.tokens(trace, examples, layer=LAYERS[0])

# %% [markdown]
# A few tokens in all layers at once:

# %%
ml.view.strip(trace, examples[0])

# %% [markdown]
# ## Table 5: do consecutive tokens go to the same expert?
#
# The share of consecutive tokens with the same first choice, and with an expert in common among both choices.
# Diamonds are the paper's figures of Mixtral-8x7B, at the same relative depth.

# %%
repetition = ml.stats.repetition(trace, by="domain")
ml.show.repetition(repetition, choice="first", published=ml.stats.table5())

# %%
ml.show.repetition(repetition, choice="either", published=ml.stats.table5())

# %%
table = repetition[["estimate", "ci_low", "ci_high", "n"]].sel(layer=LAYERS).to_dataframe()
table["per cent"] = [
    f"{100 * e:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    for e, low, high in zip(table["estimate"], table["ci_low"], table["ci_high"], strict=True)
]
table["per cent"].unstack(["choice", "layer"])

# %%
levels = dict(zip(["first", "either"], repetition.attrs["uniform"], strict=True))
for choice, level in levels.items():
    part = repetition.sel(choice=choice, layer=LAYERS)
    above = part["ci_low"] > level
    mean = part["estimate"].mean("domain")
    told = ", ".join(f"layer {layer}: {100 * float(mean.sel(layer=layer)):.1f} %" for layer in LAYERS)
    print(
        f"{choice}: uniform routing gives {100 * level:.1f} %; the interval lies above it in {int(above.sum())} of "
        f"{above.size} cells. Mean over domains: {told}."
    )

# %% [markdown]
# ## Is it the token, or the context?
#
# Repetition follows from the text where a token's identity decides its expert. How well is the first choice of a token
# in a held-out document predicted from the token alone, and what does the token before it add?

# %%
predictability = ml.stats.predictability(trace)
ml.show.by_layer(predictability)

# %% [markdown]
# ## For the paper
#
# Every figure is made on matplotlib axes and saved as vectors; every statistic has its table.

# %%
ml.show.expert_share_grid(share, layers=LAYERS).save("figure_7.pdf")
one = share.sel(layer=LAYERS[-1], domain=wanted)
print(ml.show.tables.to_latex(one))
assert np.isfinite(one["estimate"]).all()
