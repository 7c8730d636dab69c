"""Contexts of 32k and 64k tokens are read in chunks, and routed as a single forward would."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import tiny_mixtral

from mixlens import RecordSettings, record


class Numbers:
    """A tokenizer of numbers, so that long documents cost nothing to make."""

    name_or_path = "numbers"

    def __call__(self, text: str) -> dict[str, list[int]]:
        seed, count = map(int, text.split())
        return {"input_ids": np.random.default_rng(seed).integers(3, 128, count).tolist()}


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "tokens", "layers"), [("8x7b", 32_768, 2), ("8x22b", 65_536, 1)])
def test_a_long_document_is_read_in_chunks(shape, tokens, layers):
    model = tiny_mixtral(shape, max_position_embeddings=tokens, num_hidden_layers=layers, num_attention_heads=1)
    documents = [f"0 {tokens}", "1 50"]

    def read(batch_tokens: int):
        settings = RecordSettings(batch_tokens=batch_tokens, progress=False)
        return record(model, documents, tokenizer=Numbers(), settings=settings)

    chunked, other = read(4096), read(8192)
    assert chunked.sequences["length"].tolist() == [tokens, 50]
    np.testing.assert_allclose(chunked.read("router_logits"), other.read("router_logits"), atol=5e-3)
    ranked = np.sort(chunked.read("router_logits"), -1)[..., ::-1]
    clear = ((ranked[..., 0] - ranked[..., 1]) > 0.02) & ((ranked[..., 1] - ranked[..., 2]) > 0.02)
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(chunked.read("expert_id")[clear], other.read("expert_id")[clear])
    np.testing.assert_allclose(chunked.read("logprob")[1:], other.read("logprob")[1:], atol=1e-2)
