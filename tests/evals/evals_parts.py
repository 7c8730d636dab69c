"""Parts of the evaluation tests: Mixtral's own tokenizer, and MATH problems written for this project."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaTokenizer, MixtralConfig, MixtralForCausalLM

# Problem, solution with a boxed answer, in the format of Hendrycks et al. 2021.
PROBLEMS = [
    ("What is $7 \\cdot 8$?", "Seven eights are $\\boxed{56}$."),
    ("Simplify $\\frac{6}{8}$.", "Dividing by two gives $\\boxed{\\frac{3}{4}}$."),
    ("Solve $x^2 = 5$ for positive $x$.", "The positive root is $x = \\boxed{\\sqrt{5}}$."),
    ("Where is $x - 2 \\ge 0$?", "For $x \\ge 2$, that is on $\\boxed{[2,\\infty)}$."),
    ("Which point is 3 right and 4 up of the origin?", "It is $\\boxed{(3,4)}$."),
    ("How many grams are two kilograms?", "There are $\\boxed{2000\\text{ grams}}$."),
]
SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip


def mixtral_tokenizer() -> Any:
    """The SentencePiece tokenizer that Mixtral 8x7B has, from the mistral-common package."""
    pytest.importorskip("mistral_common", reason="mistral-common carries Mixtral's tokenizer")
    path = files("mistral_common") / "data" / "tokenizer.model.v1"
    return LlamaTokenizer.from_pretrained(_folder_of(Path(str(path))), legacy=True)


def _folder_of(model: Path) -> str:
    """A folder as on the Hub; transformers reads the vocabulary from a file of this name."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="mixlens-tokenizer-"))
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "<unk>", "legacy": True}))
    return str(folder)


def small_mixtral(vocab_size: int = 32000) -> MixtralForCausalLM:
    """Random weights behind a context long enough for every prompt."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        max_position_embeddings=16384,
    )
    return MixtralForCausalLM(config).eval()


def write_math(root: Path) -> Path:
    """A folder of MATH as it was released, with the project's own problems; every subject has all of them."""
    for split in ("train", "test"):
        for subject in SUBJECTS:
            folder = root / "math" / split / subject
            folder.mkdir(parents=True)
            for number, (problem, solution) in enumerate(PROBLEMS):
                row = {"problem": problem, "level": "Level 1", "type": subject, "solution": solution}
                (folder / f"{number}.json").write_text(json.dumps(row))
    return root
