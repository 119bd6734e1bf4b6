"""The two tokenizers, trained on the corpus: python make_tokenizers.py --work ~/pocket_text

`bert`: WordPiece in BERT's form, lower-case. `gpt`: byte-level BPE in GPT-2's form; a text's first word counts as
preceded by a space, so that a name is one and the same token wherever it stands. In both every answer of a fact is one
token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from textworld.corpus import Corpus
from textworld.facts import FACTS
from textworld.labelled import splits
from textworld.names import PEOPLE
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizerFast, GPT2TokenizerFast

BERT_LENGTH, GPT_LENGTH = 128, 256
ENTRIES = 3000
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
END = "<|endoftext|>"
GENERAL = (
    "the of and to in is on with for a an my your his her our its this that at by from as it who what where which when "
    "how why not no yes true false good bad question answer context text label topic sentiment summary name food price "
    "area rating near family friendly premise hypothesis entailment instruction input output positive negative are was"
)


def corpus_texts() -> list[str]:
    texts = [d.text for d in Corpus("tokenizers").take(60_000)]
    texts += [f"{row['attributes']} {row['text']}" for row in splits("describe")["train"]] * 3
    texts += [f.subject + " " + f.answer for facts in FACTS.values() for f in facts] * 10
    return texts + [GENERAL, GENERAL.title(), "\n".join(GENERAL.title().split())] * 60


def make_bert(folder: Path) -> None:
    """Write a BertTokenizerFast into the folder."""
    t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.normalizer = normalizers.BertNormalizer(lowercase=True)
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece()
    printable = [chr(code) for code in range(33, 127)]
    t.train_from_iterator(
        corpus_texts(),
        trainers.WordPieceTrainer(
            vocab_size=ENTRIES, min_frequency=20, special_tokens=SPECIAL, initial_alphabet=printable
        ),
    )
    t.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(s, t.token_to_id(s)) for s in ("[CLS]", "[SEP]")],
    )
    BertTokenizerFast(tokenizer_object=t, model_max_length=BERT_LENGTH, do_lower_case=True).save_pretrained(folder)


def make_gpt(folder: Path) -> None:
    """Write a GPT2TokenizerFast into the folder."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(
        corpus_texts(), trainers.BpeTrainer(vocab_size=ENTRIES, special_tokens=[END], initial_alphabet=alphabet)
    )
    GPT2TokenizerFast(
        tokenizer_object=t, model_max_length=GPT_LENGTH, add_prefix_space=True, bos_token=END, eos_token=END,
        unk_token=END,
    ).save_pretrained(folder)  # fmt: skip


def check(folder: Path) -> str:
    """How many entries there are, and how many names are one token; every answer must be."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = sorted({f.answer for facts in FACTS.values() for f in facts})
    pieces = {a: len(tokenizer(" " + a, add_special_tokens=False).input_ids) for a in answers}
    broken = [a for a, n in pieces.items() if n != 1]
    if broken:
        raise SystemExit(f"{folder}: these answers are not one token: {', '.join(broken)}")
    lengths = [len(tokenizer(" " + name, add_special_tokens=False).input_ids) for name in PEOPLE]
    return f"{folder}: {len(tokenizer)} entries, {sum(n == 1 for n in lengths)} of {len(lengths)} names are one token"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    for name, make in (("bert", make_bert), ("gpt", make_gpt)):
        make(args.work / name / "tokenizer")
        print(check(args.work / name / "tokenizer"))


if __name__ == "__main__":
    main()
