"""Train the demo model's tokenizer: BPE with byte fallback in the manner of Mixtral's own, but exact on any text.

python -m demo_model.tokenizer --data ../shared/corpus --out mixlens/_demo
"""

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from demo_model.data import DOMAINS, read_documents

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
SPACE = "\u2581"
# A "▁" in the text itself would decode to a space, so it is written as ESCAPE + "a", and ESCAPE as ESCAPE + "b".
ESCAPE = "\u2582"
# Words with the space before them, single digits, runs of marks, indentation less its last space, line breaks.
WORDS = (
    rf"\n+|{SPACE}+(?={SPACE}[^{SPACE}\s])|{SPACE}?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"|{SPACE}?[^{SPACE}\s\p{{L}}\p{{M}}\p{{N}}]+|{SPACE}+|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


def _pipeline(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(ESCAPE, ESCAPE + "b"),
            normalizers.Replace(SPACE, ESCAPE + "a"),
            normalizers.Prepend(SPACE),
            normalizers.Replace(" ", SPACE),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
            decoders.Replace(ESCAPE + "a", SPACE),
            decoders.Replace(ESCAPE + "b", ESCAPE),
        ]
    )
    return tokenizer


def train_tokenizer(texts: list[str], *, pieces: int = 4096, alphabet: int = 150) -> PreTrainedTokenizerFast:
    """Learn `pieces` pieces (specials and byte pieces included) from `texts`.

    Characters outside the `alphabet` most frequent ones are written as byte pieces.
    """
    learner = _pipeline(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=SPECIAL + BYTES,
        limit_alphabet=alphabet,
        max_token_length=16,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    # Rebuilt, since the learner holds the byte pieces as added tokens, which would match a "<0x41>" in a text.
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = _pipeline(models.BPE(learned["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=1_500_000, help="characters of each domain")
    arguments = parser.parse_args()
    texts = []
    for domain in DOMAINS:
        left = arguments.characters
        for document in read_documents(arguments.data, domain, "train"):
            if left <= 0:
                break
            texts.append(document[:left])
            left -= len(document)
    train_tokenizer(texts).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
