"""Tiny tokenizers of the kinds that language models have, made on the spot."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ["Paris lives in France .", "the Question : Answer is Rome", "Anna lives in Oslo ?", "a b c d e f g"] * 3


def bert_tokenizer() -> Any:
    """Word pieces, [CLS] … [SEP]; spaces say nothing."""
    words = sorted({word.lower() for text in TEXTS for word in text.split()})
    letters = [f"##{chr(code)}" for code in range(97, 123)] + [chr(code) for code in range(97, 123)]
    vocabulary = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters, ".", "?", ":", "x"])
    made = Tokenizer(models.WordPiece({word: n for n, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocabulary_id(made, "[CLS]")), ("[SEP]", vocabulary_id(made, "[SEP]"))],
    )
    return wrapped(
        made, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", pad_token="[PAD]"
    )


def gpt2_tokenizer(*, roberta: bool = False) -> Any:
    """Byte-level pairs, a space belongs to the word after it; RoBERTa's has <s> … </s> and a mask."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if roberta else ["<|endoftext|>"]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [f" {text}" for text in TEXTS] + TEXTS,
        trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if not roberta:
        return wrapped(made, eos_token="<|endoftext|>", bos_token="<|endoftext|>", unk_token="<|endoftext|>")
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return wrapped(made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>", pad_token="<pad>")


def llama_tokenizer() -> Any:
    """Pairs with a space put in front of every text, and <s> before it."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def vocabulary_id(made: Tokenizer, token: str) -> int:
    number = made.token_to_id(token)
    assert number is not None
    return number


def wrapped(made: Tokenizer, **special: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)
