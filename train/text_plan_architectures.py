"""Well-known text models as data, so that a plan needs no file: where they differ from their configs' defaults.

Sources: their published config.json files. What has no bearing on memory (names of labels, how generating ends) is left
out; sizes, kinds of layers, and whether embedding and head are one are not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TextArchitecture:
    """A text model.

    Attributes:
        kind: transformers' model_type.
        config: as of config.json.
        task: what it is trained for where nothing else is said.
        own_head: its files hold an output head beside the embedding, although its config class ties the two (T5 1.1 and
            mT5): transformers keeps both when it loads such files, and so does a plan.
    """

    kind: str
    task: str
    config: dict[str, Any] = field(default_factory=dict)
    own_head: bool = False


def _gpt2(width: int, layers: int, heads: int) -> TextArchitecture:
    return TextArchitecture("gpt2", "causal-lm", {"n_embd": width, "n_layer": layers, "n_head": heads})


def _llama(
    kind: str, vocabulary: int, width: int, inner: int, layers: int, heads: int, kv_heads: int, *, tied: bool,
    positions: int, epsilon: float,
) -> TextArchitecture:  # fmt: skip
    sizes = {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied,
        "max_position_embeddings": positions, "rms_norm_eps": epsilon,
    }  # fmt: skip
    return TextArchitecture(kind, "causal-lm", sizes)


_ROBERTA: dict[str, Any] = {
    "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip
_LARGE: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
}  # fmt: skip
_GATED: dict[str, Any] = {"d_kv": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_T0_3B = TextArchitecture(
    "t5", "seq2seq-lm", {**_GATED, "vocab_size": 32128, "d_model": 2048, "d_ff": 5120, "num_heads": 32}, own_head=True
)
_MT5_XXL = TextArchitecture(
    "mt5", "seq2seq-lm", {**_GATED, "d_model": 4096, "d_ff": 10240, "num_heads": 64}, own_head=True
)
_BLOOM_7B1 = TextArchitecture("bloom", "causal-lm", {"hidden_size": 4096, "n_layer": 30, "n_head": 32})

TEXT_ARCHITECTURES: dict[str, TextArchitecture] = {
    "bert-base": TextArchitecture("bert", "sequence-classification"),
    "bert-large": TextArchitecture("bert", "sequence-classification", _LARGE),
    "roberta-base": TextArchitecture("roberta", "sequence-classification", _ROBERTA),
    "roberta-large": TextArchitecture("roberta", "sequence-classification", {**_ROBERTA, **_LARGE}),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "t5-3b": TextArchitecture(
        "t5", "seq2seq-lm",
        {"vocab_size": 32128, "d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_layers": 24, "num_heads": 32},
    ),
    "t0-3b": _T0_3B,  # T5 1.1's XL, adapted to language modelling and then to prompts
    "mt5-large": TextArchitecture(
        "mt5", "seq2seq-lm", {**_GATED, "d_model": 1024, "d_ff": 2816, "num_heads": 16}, own_head=True
    ),
    "mt5-xxl": _MT5_XXL,
    "mt0-xxl": _MT5_XXL,
    "bloom-7b1": _BLOOM_7B1,
    "bloomz-7b1": _BLOOM_7B1,
    "llama-3.2-1b": _llama(
        "llama", 128256, 2048, 8192, 16, 32, 8, tied=True, positions=131072, epsilon=1e-5
    ),
    "llama-3.2-3b": _llama(
        "llama", 128256, 3072, 8192, 28, 24, 8, tied=True, positions=131072, epsilon=1e-5
    ),
    "llama-3.1-8b": _llama(
        "llama", 128256, 4096, 14336, 32, 32, 8, tied=False, positions=131072, epsilon=1e-5
    ),
    "qwen2.5-0.5b": _llama("qwen2", 151936, 896, 4864, 24, 14, 2, tied=True, positions=32768, epsilon=1e-6),
    "qwen2.5-1.5b": _llama("qwen2", 151936, 1536, 8960, 28, 12, 2, tied=True, positions=131072, epsilon=1e-6),
    "qwen2.5-7b": _llama("qwen2", 152064, 3584, 18944, 28, 28, 4, tied=False, positions=131072, epsilon=1e-6),
    "mistral-7b": _llama("mistral", 32000, 4096, 14336, 32, 32, 8, tied=False, positions=32768, epsilon=1e-5),
}  # fmt: skip
