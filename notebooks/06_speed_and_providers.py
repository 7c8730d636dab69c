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
# # Speed and providers
#
# How fast does an endpoint answer, how much load can it take, what does it do with each parameter, and what does a
# workload cost? Everything here runs against a server inside this notebook whose true timing is known: it sends an
# empty role chunk at once, thinks for 60 ms, then sends a chunk every 8 ms, and works on three requests at a time.
# Replace `endpoint` by `ml.Endpoint.openrouter(providers=["deepinfra"])`, with OPENROUTER_API_KEY set, to measure a
# real one.
#
# It needs no accelerator; against a real provider it costs what the provider charges for the tokens, which
# `max_dollars` caps.

# %%
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import mixlens as ml
from mixlens.endpoints.prices import cost
from mixlens.pricing.tradeoff import Candidate, candidates, frontier

THINKS_S, CHUNK_S, PLACES = 0.060, 0.008, 3


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server: `slower` stretches all its times."""

    def __init__(self, slower=1.0):
        self.slower, self.places = slower, threading.BoundedSemaphore(PLACES)
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = [" one", " two", " three", " four", " five", " six", " seven", " eight"]
        words = words[: body.get("max_tokens") or 8]
        for mark in body.get("stop", []):
            words = words[: next((i for i, word in enumerate(words) if mark in word), len(words))]
        usage = {"prompt_tokens": 20, "completion_tokens": len(words)}
        self.send_response(200)
        if not body["stream"]:
            message = {"message": {"role": "assistant", "content": "".join(words)}, "finish_reason": "stop"}
            content = json.dumps({"choices": [message], "usage": usage}).encode()
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        with self.server.places:
            time.sleep(self.server.slower * THINKS_S)
            for word in words:
                time.sleep(self.server.slower * CHUNK_S)
                self.event({"choices": [{"delta": {"content": word}}]})
        self.event({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": usage})

    def event(self, data):
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_):
        pass


server, slower = Server(), Server(slower=1.5)
endpoint = ml.Endpoint(server.url, model="mistralai/mixtral-8x7b-instruct")
work = ml.bench.Workload(prompt_tokens=32, output_tokens=8)
quiet = ml.bench.BenchSettings(progress=False)

# %% [markdown]
# ## One benchmark
#
# Every stream event is time-stamped before it is parsed, and every number is computed from these records. Time to first
# token ends at the first event that carries a token, which the role chunk does not.

# %%
bench = ml.benchmark(endpoint, concurrency=(1, 3, 6), requests=24, workload=work, settings=quiet)
print(*bench.remarks(), sep="\n")
bench.overview()

# %%
ml.show.latency_cdfs(bench)

# %% [markdown]
# The timeline shows why six at a time have to wait: a line without dots is a request that the server has answered with
# a role chunk but not started.

# %%
ml.show.token_timeline(bench, level="concurrency 6", most=18)

# %%
bench.events().query("level == 'concurrency 1' and phase == 'measured' and index == 0")

# %% [markdown]
# ## How much load it takes
#
# `load_sweep` doubles the concurrency until the power, tokens per second divided by the median seconds, has fallen
# twice. `knee` returns the load with the most power, and the share of bootstrap resamples in which it has the most.

# %%
swept = ml.bench.load_sweep(endpoint, most=16, requests=24, workload=work, settings=quiet)
found = ml.bench.knee(swept)
found.round(3)

# %%
ml.show.throughput_latency_curve(swept, metric="e2e_token_s")

# %%
best = found[found["knee"]].iloc[0]
print(
    f"The server works on {PLACES} requests at a time; the knee is at {best['level']}, "
    f"with the greatest power in {best['chosen_frac']:.0%} of resamples."
)

# %% [markdown]
# ## Two endpoints, in turns
#
# If two endpoints are measured one after the other, any drift between the measurements looks like a difference.
# `benchmark_together` lets them take turns on the same prompts, and `compare` pairs the requests.

# %%
both = ml.bench.benchmark_together(
    {"a": endpoint, "b": ml.Endpoint(slower.url, model=endpoint.model)}, requests=24, workload=work, settings=quiet
)
compared = ml.compare(both["a"], both["b"])
print(*compared.remarks, sep="\n")
compared.overview()

# %%
ttft = compared.table.query("metric == 'ttft_s' and statistic == 'p50'").iloc[0]
print(f"b is built to be 1.5 times as slow; measured: {ttft.ratio:.2f} [{ttft.ci_low:.2f}, {ttft.ci_high:.2f}]")

# %% [markdown]
# ## What it does with each parameter
#
# That a server accepts a parameter proves nothing. Each parameter is sent in a request where it must have a visible
# effect; this server honours `stop` and `stream` only.

# %%
probed = ml.bench.probe(endpoint)
probed.table.set_index("parameter")

# %% [markdown]
# ## Providers and cost
#
# What was measured stands beside what providers publish, each with its source and date. Statements of one provider that
# contradict each other are shown, not resolved. `ml.pricing.listed_prices(model)` adds what OpenRouter lists now.

# %%
table = ml.pricing.provider_table({"this notebook": bench}, model=endpoint.model, probes={"this notebook": probed})
columns = ["provider", "kind", "load", "output_tokens_per_s", "ttft_s", "input_usd_per_mtok", "output_usd_per_mtok"]
table[[*columns, "charged_usd_per_mtok", "quantization", "parameters", "n", "as_of", "contradicted"]].round(3)

# %% [markdown]
# `charged_usd_per_mtok` is what the usage of a provider says was billed, beside the list prices; this server bills
# nothing.

# %%
costs = cost(1000, 500, requests=100_000, months=3, growth=0.1, model=endpoint.model)
costs.pivot_table(index=["provider", "usd_per_request"], columns="month", values="usd").round(2)

# %% [markdown]
# This figure combines quality, cost and speed: MMLU (5-shot) of the base models as published, in the Mixtral paper for
# 8x7B and in Mistral's announcement for 8x22B; speeds as published; and prices of the workload above from the snapshot.
# Candidates without all three numbers are left out, as the figure states.

# %%
nan = float("nan")
usd = 1e6 * cost(1000, 500).drop_duplicates(["provider", "model"]).set_index(["provider", "model"])["usd"] / 1500
small, large = "mistralai/mixtral-8x7b-instruct", "mistralai/mixtral-8x22b-instruct"
speeds = ml.pricing.provider_table(model=small).set_index("provider")["output_tokens_per_s"].dropna()
mmlu = {small: (70.6, nan, nan), large: (77.75, nan, nan)}
published = [
    Candidate(
        f"{model[18:].removesuffix('-instruct')}, {who}",
        mmlu[model],
        price,
        (speeds.get(who, nan) if model == small else nan, nan, nan),
    )
    for (who, model), price in usd.items()
]
ml.show.quality_cost_speed(published, score="MMLU, 5-shot [%]")

# %% [markdown]
# With an evaluation and a benchmark of the same model, you need not type any numbers: `ml.show.quality_cost_speed([log,
# bench])` takes the score with its interval, the speed of every load, and the price in the snapshot for the address;
# `candidates` gives the same as a table. Below is the bundled model on the benchmark `demo`. Nobody sells it, so it has
# no price and would be left out of the figure.

# %%
model = ml.load("demo", verbose=False)
log = ml.evaluate(model, ["demo"], limit=40, settings=ml.evals.EvalSettings(progress=False))
local = ml.benchmark(
    model,
    concurrency=(1, 4),
    requests=4,
    workload=ml.bench.Workload(prompt_tokens=32, output_tokens=8),
    settings=ml.bench.LocalSettings(progress=False),
)
frontier(candidates([log, local])).drop(columns=["source"]).round(2)

# %% [markdown]
# Combining the score of one model with the speed of another is refused by name.

# %%
try:
    ml.show.quality_cost_speed([log, bench])
except ml.BadInput as error:
    print(error)

# %% [markdown]
# A benchmark is a run: `out=` keeps every request, and `ml.open` and `ml.report` read it. A cap in seconds or dollars
# ends it early and keeps what was measured on disk. Keys are read from the environment and never written anywhere.
