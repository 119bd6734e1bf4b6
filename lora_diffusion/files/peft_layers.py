"""What PEFT's folders need to know of a layer that its factors do not say: whether it is an embedding, or a Conv1D.

Both are told by the last word of the module's path, as language models call them. Where a folder that was read says
otherwise, `Adapter.metadata` keeps that under PEFT_KEY: {"embeddings": {path: bool}, "fan_in_fan_out": bool}.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

PEFT_KEY = "peft"

_EMBEDDING = re.compile(r"(?:\w+_)?embeddings?|embed_(?:tokens|positions|in)|w[tp]e|shared|relative_attention_bias")
_CONV1D = re.compile(r"c_attn|c_proj|c_fc|q_attn")


def is_embedding(path: str, metadata: Mapping[str, Any] | None = None) -> bool:
    known = _kept(metadata).get("embeddings")
    if isinstance(known, Mapping) and isinstance(known.get(path), bool):
        return bool(known[path])
    return _EMBEDDING.fullmatch(path.rpartition(".")[2]) is not None


def is_conv1d(paths: Iterable[str], metadata: Mapping[str, Any] | None = None) -> bool:
    """Whether the layers are transformers' Conv1D: PEFT's `fan_in_fan_out`, which it warns of and corrects."""
    words = {path.rpartition(".")[2] for path in paths if not is_embedding(path, metadata)}
    known = _kept(metadata).get("fan_in_fan_out")
    return known if isinstance(known, bool) else bool(words) and all(_CONV1D.fullmatch(word) for word in words)


def _kept(metadata: Mapping[str, Any] | None) -> Mapping[str, Any]:
    kept = (metadata or {}).get(PEFT_KEY)
    return kept if isinstance(kept, Mapping) else {}
