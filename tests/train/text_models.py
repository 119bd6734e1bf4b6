"""Tiny tokenizers and models of the real classes: trained on a few sentences, and of random weights."""

from __future__ import annotations

import functools
import json
import string
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

SENTENCES = (
    "Where does Anna live ? Anna lives in Paris .",
    "Tom lives in Rome . The dog of Tom sleeps in the garden .",
    "What colour is the sky ? The sky is blue , the grass is green .",
    "Say yes no blue green red Paris Rome Oslo entailment contradiction",
    "name : Blue Spice | Type : coffee shop | area : city centre",
)
ALPHABET = sorted({char for text in SENTENCES for char in text} | set(string.printable) - set(string.whitespace))
FAMILIES = ("bert", "roberta", "deberta", "gpt2", "llama", "t5")


@functools.cache
def tokenizer(family: str) -> Any:
    """A tokenizer of the family's own class. Shared: change nothing in it."""
    return {"bert": _bert, "roberta": _roberta, "deberta": _deberta, "gpt2": _gpt2, "llama": _llama, "t5": _t5}[
        family
    ]()


def model(family: str, task: str, **settings: Any) -> Any:
    """A model of the family, hidden size 32, two layers, in evaluation mode; the same weights every time.

    task: the end of the class's name, "ForMaskedLM".
    """
    torch.manual_seed(0)
    size = len(tokenizer(family))
    config = {
        "bert": lambda: tf.BertConfig(**_SMALL, vocab_size=size, max_position_embeddings=128, **settings),
        "roberta": lambda: tf.RobertaConfig(
            **_SMALL, vocab_size=size, max_position_embeddings=130, type_vocab_size=1,
            **{"pad_token_id": 1, **settings},
        ),
        "deberta": lambda: tf.DebertaV2Config(
            **_SMALL, vocab_size=size, max_position_embeddings=128, relative_attention=True,
            pos_att_type=["p2c", "c2p"], type_vocab_size=0, position_biased_input=False, **settings,
        ),
        "gpt2": lambda: tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=size,
                                      **{"n_positions": 128, "bos_token_id": None, "eos_token_id": None, **settings}),
        "llama": lambda: tf.LlamaConfig(
            **_SMALL, num_key_value_heads=2, vocab_size=size,
            **{"max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, **settings},
        ),
        "t5": lambda: tf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=size,
                                  decoder_start_token_id=0, dropout_rate=0.0, **settings),
    }[family]()  # fmt: skip
    name = {"bert": "Bert", "roberta": "Roberta", "deberta": "DebertaV2", "gpt2": "GPT2", "llama": "Llama", "t5": "T5"}
    kind = "LMHeadModel" if (family, task) == ("gpt2", "ForCausalLM") else task
    return getattr(tf, f"{name[family]}{kind}")(config).eval()


_SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip


def _bert() -> Any:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        SENTENCES,
        trainers.WordPieceTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=ALPHABET, show_progress=False
        ),
    )
    return tf.BertTokenizer(vocab=made.get_vocab())


def _byte_level(special: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return made.get_vocab(), _merges(made)


def _merges(made: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(made.to_str())["model"]["merges"]]


def _gpt2() -> Any:
    vocab, merges = _byte_level(["<|endoftext|>"])
    return tf.GPT2Tokenizer(vocab=vocab, merges=merges)


def _roberta() -> Any:
    vocab, merges = _byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return tf.RobertaTokenizer(vocab=vocab, merges=merges)


def _llama() -> Any:
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = [*ALPHABET, "▁", "\n"]
    made.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return tf.LlamaTokenizer(vocab=made.get_vocab(), merges=_merges(made), add_bos_token=True)


def _unigram(special: list[str]) -> list[tuple[str, float]]:
    words = sorted({word for text in SENTENCES for word in text.split()})
    pieces = [f"▁{word}" for word in words] + [piece for piece in ["▁", *ALPHABET] if piece != " "]
    return [(token, 0.0) for token in special] + [
        (piece, -1.0 - n / 100) for n, piece in enumerate(dict.fromkeys(pieces))
    ]


def _deberta() -> Any:
    return tf.DebertaV2Tokenizer(vocab=_unigram(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]), unk_id=3)


def _t5() -> Any:
    return tf.T5Tokenizer(vocab=_unigram(["<pad>", "</s>", "<unk>"]), extra_ids=2)
