"""The corpus as token ids: one memory-mapped file a domain, and batches drawn evenly from the twelve."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

DOMAINS = (
    "wikipedia",
    "gutenberg",
    "philosophy",
    "pubmed",
    "arxiv",
    "github",
    "mathematics",
    "stackexchange",
    "french",
    "german",
    "spanish",
    "italian",
)


def read_documents(corpus: Path, domain: str, split: str) -> Iterator[str]:
    """The texts of one domain and split, in the order of the file."""
    with gzip.open(corpus / domain / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def tokenize_corpus(corpus: Path, tokenizer: PreTrainedTokenizerBase, cache: Path) -> dict[str, np.ndarray]:
    """Token ids of every domain's training documents end to end, each document behind its <s>; cached as uint16."""
    streams = {}
    cache.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        path = cache / f"{domain}.u16"
        if not path.exists():
            encoded = tokenizer(list(read_documents(corpus, domain, "train")))["input_ids"]
            np.concatenate([np.asarray(ids, dtype=np.uint16) for ids in encoded]).tofile(path)
        streams[domain] = np.memmap(path, dtype=np.uint16, mode="r")
    return streams


def training_batch(streams: dict[str, np.ndarray], *, seed: int, step: int, sequences: int, length: int) -> np.ndarray:
    """Token ids [sequences, length + 1] at random places of each domain in turn.

    A function of seed and step alone, so that a resumed run sees what an uninterrupted one would have seen.
    """
    random = np.random.default_rng([seed, step])
    domains = [list(streams)[(step * sequences + row) % len(streams)] for row in range(sequences)]
    batch = np.empty((sequences, length + 1), dtype=np.int64)
    for row, domain in enumerate(domains):
        start = random.integers(len(streams[domain]) - length)
        batch[row] = streams[domain][start : start + length + 1]
    return batch
