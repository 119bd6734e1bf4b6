"""Which examples are in which micro-batch: a function of the seed and the number of the batch, and of nothing else.

So nothing of it has to be saved for an exact resume, and processes that share a step need not tell each other what they
take: of W processes, that of rank r asks for the positions W·n + r.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lora_diffusion.errors import ConfigError, DatasetError
from train.randomness import Draws
from train.text_packing import Packed, collate_packed
from train.text_tasks.task import Batch, Example, Task

CHUNK = 50  # groups of batches that are sorted by length together


class Batches:
    """The endless stream of a run's micro-batches.

    Without length groups the run's sample number k is the same however samples are grouped; every pass over the
    examples is shuffled anew, and passes flow into each other.

    Args:
        task: makes batches of examples.
        examples: those to train on, or packs of them.
        batch_size: examples (or packs) in a micro-batch.
        seed: of the run.
        group: how many micro-batches make a step: accumulation × processes.
        by_length: batches of one step hold examples of similar length, so that little is padding. The stream is cut
            into chunks, sorted within them, and the steps of a chunk are shuffled; every example comes up as often as
            without.
        multiple: the padded length is a multiple of it.

    Raises:
        ConfigError: a size below 1. DatasetError: no examples.
    """

    def __init__(
        self,
        task: Task,
        examples: Sequence[Example] | Sequence[Packed],
        *,
        batch_size: int,
        seed: int,
        group: int = 1,
        by_length: bool = False,
        multiple: int = 1,
    ) -> None:
        if min(batch_size, group, multiple) < 1:
            raise ConfigError(f"batch_size={batch_size}, group={group}, multiple={multiple}: each must be at least 1")
        if not examples:
            raise DatasetError("there is no example to train on")
        self.task, self.examples = task, examples
        self.batch_size, self.group, self.by_length, self.multiple = batch_size, group, by_length, multiple
        self._draws = Draws(seed)
        self._pass: tuple[int, list[int]] = (-1, [])
        self._chunk: tuple[int, list[int]] = (-1, [])
        step = batch_size * group
        self._chunk_size = step * max(1, min(CHUNK, len(examples) // step))

    def sample(self, number: int) -> int:
        """Which example is the run's sample `number` (0, 1, …) before any grouping by length."""
        epoch, place = divmod(number, len(self.examples))
        if self._pass[0] != epoch:
            order = torch.randperm(len(self.examples), generator=self._draws.at("text/order", epoch))
            self._pass = (epoch, order.tolist())
        return self._pass[1][place]

    def indices(self, position: int) -> list[int]:
        """The examples of micro-batch `position`, counted from 0 over the whole run and all processes."""
        first = position * self.batch_size
        if not self.by_length:
            return [self.sample(number) for number in range(first, first + self.batch_size)]
        number, start = divmod(first, self._chunk_size)
        if self._chunk[0] != number:
            self._chunk = (number, self._sorted_chunk(number))
        return self._chunk[1][start : start + self.batch_size]

    def batch(self, position: int) -> Batch:
        """Its tensors, on the CPU."""
        found = [self.examples[index] for index in self.indices(position)]
        packs = [one for one in found if isinstance(one, Packed)]
        if packs:
            return collate_packed(packs, self.task, multiple=self.multiple)
        return self.task.collate([one for one in found if isinstance(one, Example)], multiple=self.multiple)

    def share(self, position: int) -> float:
        """What the mean loss of this micro-batch is to be multiplied by, so that the mean over the micro-batches of its
        step is the mean over all positions that the step counts.

        Without it a token counts the more, the fewer there are in its micro-batch.
        """
        first = position // self.group * self.group
        own = self._counted(position)
        total = sum(self._counted(each) for each in range(first, first + self.group))
        return own * self.group / total

    @property
    def steps_per_pass(self) -> int:
        """Steps in which every example comes up about once; the last one may reach into the next pass."""
        return -(-len(self.examples) // (self.batch_size * self.group))

    def padding(self, batches: int) -> float:
        """The share of padding in the first micro-batches of the run."""
        full = held = 0
        for position in range(batches):
            lengths = [self.examples[index].length for index in self.indices(position)]
            longest = max(lengths) + -max(lengths) % self.multiple
            full, held = full + longest * len(lengths), held + sum(lengths)
        return 1 - held / full

    def _counted(self, position: int) -> int:
        return sum(self.examples[index].counted for index in self.indices(position))

    def _sorted_chunk(self, number: int) -> list[int]:
        first = number * self._chunk_size
        order = [self.sample(each) for each in range(first, first + self._chunk_size)]
        order.sort(key=lambda index: -self.examples[index].length)  # stable: equal lengths stay shuffled
        step = self.batch_size * self.group
        groups = [order[start : start + step] for start in range(0, len(order), step)]
        places = torch.randperm(len(groups), generator=self._draws.at("text/groups", number)).tolist()
        # within a step, batches take turns, so that no process always has the longest
        return [index for place in places for index in self._dealt(groups[place])]

    def _dealt(self, indices: list[int]) -> list[int]:
        return [index for turn in range(self.group) for index in indices[turn :: self.group]]


def in_order(examples: Sequence[Example], batch_size: int) -> Iterator[list[int]]:
    """Every example once, for evaluation: batches of indices by falling length, so that the first needs the most
    memory."""
    order = sorted(range(len(examples)), key=lambda index: -examples[index].length)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
