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
# # Your own model: record it in your own loop, keep the trace, and take it elsewhere
#
# You have a Mixtral of your own (fine-tuned, quantized, partly trained) and code that runs it. How do you get its
# routing without changing that code, and how do you read the result with other tools?
#
# Set `MODEL` to a folder or a name on the Hub; everything below works on the model object that you already hold.
#
# On 8x7B it takes 94 GB of accelerator memory in bfloat16, or 27 GB in nf4 (computed); recording adds at
# most 1 % to a decode step on an H200 (measured). See `docs/8x7b.md`.

# %%
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file
from transformers import AutoTokenizer

import mixlens as ml

MODEL = "demo"
model = ml.load(MODEL, verbose=False)  # or any MixtralForCausalLM that you made yourself
tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
type(model)

# %% [markdown]
# ## Round your own forward
#
# A `Recorder` listens to every forward inside its `with` block and leaves the output bit for bit the same. A batch of
# several rows needs its attention mask, so that padding is never counted.

# %%
texts = ["def area(radius):\n    return 3.14159 * radius ** 2", "The theorem follows from the lemma."]
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
with torch.no_grad():
    plain = model(**batch).logits
    with ml.Recorder(model, signals=["router_logits"]) as recorder:
        recorded = model(**batch).logits
assert torch.equal(plain, recorded)
mine = recorder.trace(pd.DataFrame({"domain": ["code", "mathematics"]}))
print(mine)
assert mine.n_tokens == int(batch["attention_mask"].sum())

# %% [markdown]
# ## Round your own generate
#
# `phase` separates prompt and answer. The last token has no routing, since no forward read it.

# %%
prompt = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
with ml.Recorder(model) as recorder:
    answer = model.generate(**prompt, max_new_tokens=30, do_sample=False)
generated = recorder.trace()
print(
    generated.select(phase="prompt").n_tokens,
    "tokens of the prompt,",
    generated.select(phase="generated").n_tokens,
    "generated",
)
assert generated.n_tokens == answer.shape[1] - 1

# %% [markdown]
# ## A corpus into a run directory
#
# With `out=`, a recording goes to disk shard by shard, and a run that was stopped resumes where it stopped. Columns of
# the documents are kept, and statistics can be grouped by them.

# %%
documents = ml.demo_documents()[:24]
trace = ml.record(
    model,
    documents,
    out="runs/own",
    signals=["router_logits", "logprob"],
    settings=ml.RecordSettings(progress=False),
)
sorted(path.name for path in Path("runs/own").iterdir())

# %% [markdown]
# ## Read it without mixlens
#
# Tables are Parquet and arrays are safetensors: pandas, Polars, DuckDB, Spark and the Hub read them as they are. The
# share of each expert among the first choices of layer 0, computed twice:

# %%
arrays = load_file("runs/own/routing-00000.safetensors")
tokens = pd.read_parquet("runs/own/tokens-00000.parquet")
sequences = pd.read_parquet("runs/own/sequences.parquet")
by_hand = np.bincount(arrays["expert_id"][:, 0, 0], minlength=trace.n_experts) / len(tokens)
by_mixlens = ml.stats.expert_share(trace, slot="first")["estimate"].sel(layer=int(trace.layers[0]))
pd.DataFrame({"by hand": by_hand, "mixlens": by_mixlens}).round(4)

# %%
assert np.allclose(by_hand, by_mixlens)
joined = tokens.merge(sequences, on="sequence")
joined.groupby("domain")["logprob"].mean().rename("mean log-probability (nat)").round(3).to_frame()

# %% [markdown]
# ## Other forms
#
# A trace converts to a long table for SQL or an xarray Dataset, and back. Routing that something else recorded, such as
# a server, becomes a trace with `Trace.from_arrays`, which every statistic and view accepts.

# %%
trace.to_parquet("long.parquet")
pd.read_parquet("long.parquet").head(4)

# %%
data = trace.to_xarray()
foreign = ml.Trace.from_arrays(data["expert_id"].values, n_experts=trace.n_experts)
agreement = ml.stats.expert_share(foreign)["estimate"].values - ml.stats.expert_share(trace)["estimate"].values
print("largest difference of a share:", float(np.abs(agreement).max()))
print(data.sizes)

# %% [markdown]
# ## Hand it on
#
# Share a view, a figure, a table, or everything as one file. Each opens without a kernel and without a network.

# %%
share = ml.stats.expert_share(trace, by="domain")
ml.view.share_heatmap(share).save("share.html")
ml.show.share_heatmap(share.isel(domain=0)).save("share.pdf")
Path("share.tex").write_text(ml.show.tables.to_latex(share.isel(layer=[0])))
ml.report(trace, "report.html")
{name: f"{Path(name).stat().st_size / 1e3:.0f} kB" for name in ("share.html", "share.pdf", "share.tex", "report.html")}

# %%
ml.view.tokens(trace, 0)
