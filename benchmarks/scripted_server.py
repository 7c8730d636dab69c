"""What `mixlens bench` measures of an answer whose truth is known, on the wall clock, whole and split at every byte.

The server runs in a process of its own: comment at 0, role chunk at 50 ms, ten content chunks from 400 to 1300 ms,
usage of 29 tokens at 1500 ms.

python benchmarks/scripted_server.py --out benchmarks/results/scripted-server.json
python benchmarks/scripted_server.py --serve 8000        # only the server, for another tool beside it
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from measuring import header, write

sys.path.append(str(Path(__file__).parent.parent / "tests" / "bench"))
from bench_scripts import SCRIPTS

TRUTH = {"ttft_s": 0.4, "tpot_s": 0.9 / 28, "e2e_token_s": 1.3, "e2e_stream_s": 1.5}
PATHS = {"/chat/completions": "openai-chat", "/messages": "anthropic", "/completions": "openai-completions"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20, help="of each protocol, whole and split")
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--serve", type=int, metavar="PORT", help="serve, and measure nothing")
    parser.add_argument("--out", help="result file; printed when it is not given")
    options = parser.parse_args()
    if options.serve:
        server(options.serve, None)
        return
    measured_on = header()
    key = "sk-or-v1-" + "0123456789abcdef" * 4
    overhead = {"without a key": overhead_ms(None), "with a key": overhead_ms(key)}
    print(f"overhead of an event in ms: {overhead}")
    results = {}
    for size, name in ((None, "whole"), (1, "split at every byte")):
        with Served(size) as url:
            for protocol in SCRIPTS:
                results[f"{protocol}, {name}"] = found = measure(url, protocol, options)
                print(f"{protocol}, {name}: {found}")
    write(options.out, "scripted_server", measured_on, {"truth": TRUTH, "overhead": overhead, "results": results})


def measure(url: str, protocol: str, options: argparse.Namespace) -> dict[str, Any]:
    """Median of each metric, and the largest error of any request, in milliseconds."""
    from mixlens import Endpoint, benchmark
    from mixlens.bench import BenchSettings, Workload

    bench = benchmark(
        Endpoint(url, model="scripted", protocol=protocol),
        concurrency=options.concurrency,
        requests=options.requests,
        workload=Workload(prompt_tokens=16, output_tokens=64),
        settings=BenchSettings(progress=False),
    )
    rows = bench.requests().query("phase == 'measured' and outcome == 'ok'")
    found: dict[str, Any] = {"n": len(rows), "output_tokens": sorted({int(n) for n in rows["output_tokens"]})}
    for metric, true in TRUTH.items():
        found[f"{metric.removesuffix('_s')}_median_ms"] = round(1e3 * float(rows[metric].median()), 3)
        found[f"{metric.removesuffix('_s')}_largest_error_ms"] = round(
            1e3 * float(np.abs(rows[metric] - true).max()), 3
        )
    return found


def overhead_ms(key: str | None, *, events: int = 2_000, repeats: int = 15) -> dict[str, float]:
    """Processor time of reading one event of a stream into the record: parsed, decoded, masked and kept."""
    from mixlens.bench.events import StreamReader

    chunk = {"id": "chatcmpl-0123456789", "object": "chat.completion.chunk", "created": 1, "model": "mixtral"}
    deltas = ({"choices": [{"index": 0, "delta": {"content": f" word\n{i}"}}]} for i in range(events))
    pieces = [b"data: " + json.dumps(chunk | delta).encode() + b"\n\n" for delta in deltas]
    took = []
    for _ in range(repeats):
        reader, start = StreamReader("openai-chat", key), time.process_time()
        for at, piece in enumerate(pieces):
            reader.feed(piece, float(at))
        reader.close(float(events))
        took.append(1e3 * (time.process_time() - start) / events)
    return {"median": round(float(np.median(took)), 4), "largest": round(max(took), 4), "events": events * repeats}


class Served:
    """The server in a process of its own, while the context lasts."""

    def __init__(self, size: int | None) -> None:
        context = get_context("spawn")
        self._port: Any = context.Queue()
        self._process = context.Process(target=server, args=(0, size, self._port), daemon=True)

    def __enter__(self) -> str:
        self._process.start()
        return f"http://127.0.0.1:{self._port.get(timeout=60)}/v1"

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()


def server(port: int, size: int | None, ready: Any = None) -> None:
    """Serve until ended; pieces of `size` bytes, or whole events."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            content = b'{"object":"list","data":[{"id":"scripted","object":"model"}]}'
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            start = time.perf_counter()
            self.rfile.read(int(self.headers["Content-Length"]))
            protocol = next(name for path, name in PATHS.items() if self.path.endswith(path))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for at, piece in SCRIPTS[protocol]():
                time.sleep(max(start + at - time.perf_counter(), 0.0))
                for first in range(0, len(piece), size or len(piece)):
                    part = piece[first : first + (size or len(piece))]
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *_: object) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    if ready is not None:
        ready.put(made.server_address[1])
    made.serve_forever()


if __name__ == "__main__":
    main()
