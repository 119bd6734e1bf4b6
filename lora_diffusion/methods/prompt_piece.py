"""A prompt of virtual tokens in a model, whatever its vectors come from.

The ids of its tokens lie above those of the embedding's table, and the embedding answers them wherever they stand in an
input (`layers/virtual_tokens.py`): masks, labels, attention and head of the model are left alone. Whether the prompt is
active only matters to `prepend_prompt`, which then puts it in front.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import AdapterMismatchError, ConfigError
from ..layers.virtual_tokens import VirtualPart, VirtualTokens, add_part, check_can_take_part, remove_part
from .piece import Piece
from .prompt_tuning_config import PromptConfig


class PromptPiece(Piece):
    """hosts: the embeddings that answer for the prompt: the model's, or an encoder's and a decoder's.

    part: its vectors. acting: whether `prepend_prompt` puts it in front. in_rows: of which rows it does, where rows
        differ; else None.
    """

    config: PromptConfig

    def __init__(self, config: PromptConfig, name: str, hosts: Sequence[Any], part: VirtualPart) -> None:
        super().__init__(config, name)
        self.hosts = list(hosts)
        self.in_rows: list[bool] | None = None
        first = max([embedding_end(host) for host in hosts])
        part.ids = list(range(first, first + config.rows))
        part.acting = False
        self._put_in(part)

    @property
    def key(self) -> str:
        """The name of the part in its hosts."""
        return f"{self.kind}_{self.name}"

    @property
    def part(self) -> VirtualPart:
        part: VirtualPart = self.hosts[0]._modules[self.key]
        return part

    @property
    def acting(self) -> bool:
        return self.part.acting

    @property
    def ids(self) -> list[int]:
        """Of the tokens in the model's input."""
        return self.part.ids[: self.config.tokens]

    def modules(self) -> Iterator[nn.Module]:
        yield self.part

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.part.named_parameters())

    def check_weight(self, weight: float) -> None:
        if weight not in (0.0, 1.0):
            raise ConfigError(f"weight {weight:g} for {self.name!r} ({self.kind}): a prompt is there or not, 1 or 0")

    def act(self, weight: float) -> None:
        self.part.acting = bool(weight)

    def act_in_rows(self, weights: Sequence[float] | None) -> None:
        self.in_rows = None if weights is None else [bool(weight) for weight in weights]

    def replace(self, part: VirtualPart, config: PromptConfig) -> None:
        """Let another part answer for the same ids."""
        part.ids, part.acting = self.part.ids, self.part.acting
        self.config = config
        self._put_in(part)

    def remove(self) -> None:
        for host in self.hosts:
            remove_part(host, self.key)
            if isinstance(host, VirtualTokens):
                host.arrange()

    def _put_in(self, part: VirtualPart) -> None:
        for host in self.hosts:
            add_part(host, self.key, part.train(host.training))
            host.arrange()


def prompt_hosts(component: nn.Module, config: PromptConfig) -> list[Any]:
    """The embeddings that a prompt goes beside: one, or the encoder's and the decoder's.

    Raises AdapterMismatchError for a model without a token embedding, or one that cannot take a prompt.
    """
    paths = _embeddings(component, config)
    for path, embedding in paths.items():
        check_can_take_part(path, embedding, "a prompt")
        if isinstance(embedding, VirtualTokens) and embedding.all_vectors():
            raise AdapterMismatchError(
                f"{path} has learned words, and cannot carry a prompt as well: their ids could be one"
            )
        dim = embedding.weight.shape[1]
        if config.token_dim not in (None, dim):
            raise AdapterMismatchError(
                f"token_dim={config.token_dim}, and {path} is {dim} wide: the prompt is for another model"
            )
    return list(paths.values())


def embedding_end(embedding: Any) -> int:
    """The lowest id that an embedding does not answer."""
    return embedding.next_id() if isinstance(embedding, VirtualTokens) else int(embedding.num_embeddings)


def _embeddings(component: nn.Module, config: PromptConfig) -> dict[str, Any]:
    """{path: embedding}: of an encoder-decoder model both, as some of them show the decoder the encoder's input.

    transformers gives T5's encoder and decoder modules of their own, which share a weight.
    """
    names = {id(module): path for path, module in component.named_modules()}
    both = getattr(getattr(component, "config", None), "is_encoder_decoder", False)
    try:
        owners = [component.get_encoder(), component.get_decoder()] if both else [component]
        found = [owner.get_input_embeddings() for owner in owners]
    except (AttributeError, NotImplementedError):
        found = [None]
    for embedding in found:
        if not isinstance(embedding, nn.Embedding):
            raise AdapterMismatchError(
                f"this {type(component).__name__} has no token embedding that a prompt could go beside (virtual tokens "
                "are for transformers' language models)"
            )
    return {names.get(id(embedding), "the token embedding"): embedding for embedding in found}
