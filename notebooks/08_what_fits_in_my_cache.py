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
# # What fits in my cache?
#
# The question: fast memory holds half of the experts of every layer, and the others are loaded over a link. Which four
# of eight should it hold, and how fast can the model decode then?
#
# **The answer for the bundled model:** do not choose four experts by how often they are used. On the text on which they
# are counted, they cover 55 % of the choices; on other documents, there is no evidence that they cover more than any
# other four. Instead, keep the experts that were used last, or used most since they were loaded: they cover 77 and 79 %
# of the choices, with half the loads of a cache for two. No policy that loads on demand can cover more than 85 %.
# Loading ahead covers 90 %, but moves a third more bytes, so it is slower where the link is the limit. Rates are
# predicted from bytes; none was measured.
#
# Set `MODEL`, `DOCUMENTS` and `LINK` for your own. Use text like that which the model will generate.
#
# On 8x7B it takes 94 GB of accelerator memory in bfloat16, or 27 GB in nf4 (computed), and one forward
# of every document. The inputs of all layers' experts are 262 kB a token on disk (computed), so that a few thousand
# tokens are enough to record with `moe_in`. See `docs/8x7b.md`.

# %%
import pandas as pd

import mixlens as ml

MODEL = "demo"
DOCUMENTS = ml.demo_documents()
LINK = 1e9  # bytes per second
model = ml.load(MODEL, verbose=False)
settings = ml.RecordSettings(progress=False)
trace = ml.record(model, DOCUMENTS, signals=["moe_in"], settings=settings)
trace

# %% [markdown]
# ## Is there anything to keep?
#
# With random routing, four consecutive tokens would read 5.47 of 8 experts in every layer. In this text they read
# fewer, so an expert that was used is likely to be used again. Four tokens from four documents have little in common.

# %%
rows = {}
for name, step in {"four consecutive tokens": {"window": 4}, "a batch of four documents": {"batch": 4}}.items():
    found = ml.decisions.distinct_experts(trace, **step)
    rows[name] = {
        "formula": found.attrs["formula"],
        "random tokens": float(found["random_tokens"].mean()),
        "experts read": float(found["estimate"].mean()),
        "fewer than random tokens": found.attrs["gain"],
        "from": found.attrs["gain_low"],
        "to": found.attrs["gain_high"],
        "plan with fewer": found.attrs["verdict"],
    }
pd.DataFrame(rows).T

# %% [markdown]
# ## The four experts used most
#
# They are chosen on one half of the documents. `in_sample` chooses and judges them on all documents, which flatters
# them.

# %%
fixed = ml.decisions.cache(trace, slots=4, policy="fixed").isel(slots=0)
pd.Series(
    {
        "on the documents they are fitted on": float(fixed["in_sample"]),
        "on other documents": float(fixed["estimate"]),
        "from": float(fixed["ci_low"]),
        "to": float(fixed["ci_high"]),
        "any four": float(fixed["chance"]),
        "verdict": fixed.attrs["verdict"],
    }
)

# %% [markdown]
# ## Policies
#
# Hits are the share of chosen experts that are there; loads are experts loaded a token, in all eight layers. The
# verdict compares hits with those of the fixed set on documents that it was not fitted on. `optimum` knows the future
# and is a bound, not a policy.

# %%
policies = ("fixed", "lru", "lfu", "least-stale", "prefetch", "optimum")
caches = {
    name: ml.decisions.cache(trace, slots=4, policy=name, model=model, link_bytes_per_s=LINK) for name in policies
}
pd.DataFrame(
    {
        name: {
            "hits": float(found["estimate"].item()),
            "from": float(found["ci_low"].item()),
            "to": float(found["ci_high"].item()),
            "loads a token": float(found["loads"].item()),
            "tokens per second, predicted": round(float(found["tokens_per_s"].item())),
            "verdict": found.attrs["verdict"],
        }
        for name, found in caches.items()
    }
).T

# %% [markdown]
# `prefetch` covers more than the optimum because it loads experts before they are needed. Some of these loads are in
# vain, so it is slower than `lru` over a link that is always busy; it helps where computing takes longer than loading.
#
# ## How many slots does it take?

# %%
sizes = {name: ml.decisions.cache(trace, policy=name) for name in ("lru", "lfu", "optimum")}
pd.DataFrame({name: found["estimate"].to_series() for name, found in sizes.items()}).assign(
    **{"fixed, other documents": sizes["lru"]["fixed"].to_series(), "any": sizes["lru"]["chance"].to_series()}
).round(3)

# %% [markdown]
# The layers differ: where a layer's experts are used in longer runs, fewer slots do.

# %%
caches["lru"][["by_layer", "by_layer_low", "by_layer_high"]].isel(slots=0, drop=True).to_dataframe().round(3)

# %% [markdown]
# ## And if the experts are on several devices?
#
# A step is as slow as its busiest device. On four devices, DeepSeek's balancer looks better than experts in order and,
# with four copies, better than copies placed at random, but by so little that other documents may reverse it.

# %%
pd.DataFrame(
    {
        f"{copies} copies": {
            "busiest device over the mean": float(found["estimate"].sel(placement="eplb")),
            "compared with": found.attrs["against"],
            "whose busiest is": float(found["estimate"].sel(placement=found.attrs["against"])),
            "verdict": found.attrs["verdict"],
        }
        for copies in (0, 4)
        for found in [ml.decisions.placement(trace, ranks=4, redundant=copies)]
    }
)
