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
# # Do experts specialise by domain? Section 5 of the Mixtral paper, redone
#
# The paper ([arXiv 2401.04088](https://arxiv.org/abs/2401.04088)) asks three questions of Mixtral-8x7B on the Pile: is
# any expert chosen more often in one domain than in another (Figure 7), what does routing look like token by token
# (Figure 8), and do consecutive tokens go to the same expert (Table 5)? It gives no intervals. This notebook asks the
# same three questions with intervals over documents, for any Mixtral and any documents.
#
# Set `MODEL` to `"mistralai/Mixtral-8x7B-v0.1"` and `DOCUMENTS` to a `datasets.Dataset` with columns `text` and
# `domain` to ask them of the real one.
#
# On 8x7B it takes 94 GB of accelerator memory in bfloat16, or 27 GB in nf4 (computed), and one forward
# of every document; a recording with router logits is 0.66 GB a million tokens. See `docs/8x7b.md`.

# %%
import numpy as np
import pandas as pd

import mixlens as ml

MODEL = "demo"
DOCUMENTS = ml.demo_documents()
LAYERS = None  # three layers to draw; None for the first, the middle and the last
model = ml.load(MODEL, verbose=False)
trace = ml.record(model, DOCUMENTS, signals=["router_logits", "logprob"], settings=ml.RecordSettings(progress=False))
LAYERS = LAYERS or [int(trace.layers[i]) for i in (0, (trace.n_layers - 1) // 2, -1)]  # 0, 15, 31 of 32, as the paper
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
# The same as a live view, for every layer and domain at once: select a cell, and the view below follows.

# %%
ml.view.share_heatmap(share)

# %%
ml.view.expert_share(share)

# %% [markdown]
# **Is the difference between domains more than chance?** How many bits does the choice of an expert reveal about the
# domain, and how many would it reveal if domains were assigned to documents at random?

# %%
information = ml.stats.domain_information(trace)
ml.show.domain_information(information)

# %%
excess = information.sel(measure="excess")
most = int(excess["layer"][int(excess["estimate"].argmax("layer"))])
print(
    f"Above chance in {int(excess['survives'].sum())} of {excess.sizes['layer']} layers, most in layer {most}: "
    f"{float(excess['estimate'].sel(layer=most)):.3f} bits "
    f"[{float(excess['ci_low'].sel(layer=most)):.3f}, {float(excess['ci_high'].sel(layer=most)):.3f}]."
)

# %% [markdown]
# **In which cells?** There are hundreds of cells, so one counts only if it survives control for their number. With the
# five documents per domain that come with mixlens, no single share can differ significantly from uniform routing,
# however far it is from it: five documents cannot give a p below 2^-4. Twenty per domain could. A few documents can
# show whether one domain differs from all others together, since those are many:

# %%
named = set(trace.sequences["domain"])
DOMAIN = next((name for name in ("mathematics", "DM Mathematics") if name in named), sorted(named)[0])
contrast = ml.stats.contrast(trace, ml.stats.expert_share, by="domain", a=DOMAIN)
print(
    f"{int(share['survives'].sum())} of {share.attrs['cells']} shares by domain differ significantly from uniform "
    f"routing ({int(share['n_documents'].min())} documents per domain). {int(contrast['survives'].sum())} of "
    f"{contrast.attrs['cells']} shares differ between {DOMAIN} and the other domains."
)
ml.show.contrast(contrast)

# %% [markdown]
# The paper sees no obvious pattern by topic in Mixtral-8x7B, except for DM Mathematics. The lines above give the answer
# for this model, with its uncertainty; a small model trained on few domains need not agree with a large one. The paper
# publishes no table for its figure, so there are no numbers to compare with.

# %% [markdown]
# ## Figure 8: what does routing look like along a text?
#
# Each token is underlined by its experts: thick the first choice, thin the second. The paper shows code, mathematics
# and a story, and observes that indentation in code goes to the same experts, above all in the first and the last
# layer. Move the layer; pick an expert, and step through the tokens where it is strongest; colour by surprise or by the
# router's entropy.

# %%
domains = trace.sequences["domain"]
known = ("github", "Github", "mathematics", "DM Mathematics", "gutenberg", "Gutenberg")
wanted = [d for d in known if d in set(domains)] or list(domains.unique()[:3])
examples = [int(domains.index[domains == d][0]) for d in wanted]
ml.view.tokens(trace, examples, layer=LAYERS[0])

# %% [markdown]
# A few tokens in all layers at once:

# %%
ml.view.strip(trace, examples[0])

# %% [markdown]
# **Does indentation behave that way here?** The table shows which expert is most often the first choice of tokens that
# consist of white space, and of all tokens of the same domain, and how often. Each expert is picked on the same tokens
# on which it is counted.

# %%
code = trace.select(where={"domain": wanted[0]})
kinds = np.unique(code.read("token_id"))
blank = [int(kind) for kind, piece in zip(kinds, code.pieces(kinds), strict=True) if piece and not piece.strip()]
rows = {}
for name, part in {"white space": code.select(tokens=blank), "all tokens": code}.items():
    first = ml.stats.expert_share(part, slot="first")
    for layer in LAYERS:
        cell = first.sel(layer=layer)
        cell = cell.isel(expert=int(cell["estimate"].values.argmax()))
        told = f"{float(cell['estimate']):.1%} [{float(cell['ci_low']):.1%}, {float(cell['ci_high']):.1%}]"
        rows[name, layer] = {"expert": int(cell["expert"]), "how often": told, "n": int(cell["n"])}
pd.DataFrame(rows).T.rename_axis([wanted[0], "layer"])

# %% [markdown]
# The same for every token type that occurs at least ten times: the share of its occurrences that choose its most
# frequent expert, first or second. Uniform routing would give 25 %, and somewhat more for rare types.

# %%
ml.show.by_layer(ml.stats.vocabulary_specialization(trace))

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

# %% [markdown]
# The numbers, next to the paper's for the domains that it has. In a model of 32 layers they are for the same layers. In
# any other model they are for its first, middle and last layer, and are not a replication.

# %%
PILE = {
    "arxiv": "ArXiv",
    "mathematics": "DM Mathematics",
    "github": "Github",
    "gutenberg": "Gutenberg",
    "philosophy": "PhilPapers",
    "pubmed": "PubMed Abstracts",
    "stackexchange": "StackExchange",
    "wikipedia": "Wikipedia (en)",
}  # the domain of the Pile that ours is likest; a domain that bears the Pile's own name is its own
published = ml.stats.table5()
inside, compared, peaks = 0, 0, {"paper": 0, "here": 0}
rows = {}
for choice in ("first", "either"):
    for domain in repetition["domain"].values:
        here = repetition.sel(choice=choice, domain=domain, layer=LAYERS)
        theirs = PILE.get(domain, domain)
        paper = (
            published["estimate"].sel(choice=choice, domain=theirs).values if theirs in published["domain"] else None
        )
        row = rows[choice, domain] = {}
        for i, layer in enumerate(LAYERS):
            e, low, high = (100 * float(here[name][i]) for name in ("estimate", "ci_low", "ci_high"))
            row[f"layer {layer}", "here"] = f"{e:.1f} [{low:.1f}, {high:.1f}]"
            row[f"layer {layer}", "paper"] = "" if paper is None else f"{100 * paper[i]:.1f}"
            if paper is not None:
                inside, compared = inside + (low <= 100 * paper[i] <= high), compared + 1
        row["n", ""] = int(here["n"])
        if paper is not None and choice == "first":
            peaks["paper"] += int(paper.argmax() == 1)
            peaks["here"] += int(here["estimate"].values.argmax() == 1)
pd.DataFrame(rows).T

# %%
same = trace.n_layers == 32 and LAYERS == published["layer"].values.tolist()
print(
    f"{inside} of the paper's {compared} figures lie in the interval beside them: "
    + ("the same layers." if same else f"another model, {trace.n_layers} layers for 32, so no replication is claimed.")
)
print(
    f"The middle layer repeats its first choice most in {peaks['here']} of the {compared // 6} domains here, "
    f"in {peaks['paper']} of them in the paper."
)
levels = dict(zip(["first", "either"], repetition.attrs["uniform"], strict=True))
whole = ml.stats.repetition(trace)
for choice, level in levels.items():
    part = whole.sel(choice=choice)
    above = part["survives"] & (part["estimate"] > level)
    mean = repetition["estimate"].sel(choice=choice).mean("domain")
    told = ", ".join(f"layer {layer}: {100 * float(mean.sel(layer=layer)):.1f} %" for layer in LAYERS)
    print(
        f"{choice}: uniform routing gives {100 * level:.1f} %; of all documents together, {int(above.sum())} of "
        f"{above.size} layers are significantly above it. Mean over domains: {told}."
    )

# %% [markdown]
# ## Is it the token, or the context?
#
# Where a token's identity decides its expert, repetition follows from the text. How well does the token alone predict
# the first choice in held-out documents, and what does the previous token add?

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
