"""The trainable parameters of the lecture's GLUE and E2E tables (those of the LoRA paper, tables 2 and 3), counted.

    python examples/lecture/parameters.py            prints both tables
    python examples/lecture/parameters.py --write    puts them into this folder's README.md

Every count is the number of parameters that `add_adapter` hands to an optimizer, on the real architecture's shapes. The
task's head is left out, as in the paper (microsoft/LoRA, issue 16).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from architectures import build
from torch import nn

import lora_diffusion as ld

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- parameters.py: begin -->", "<!-- parameters.py: end -->"

WHOLE = "printed is the model's nominal size, in whole millions or hundreds of them"
TENTH = "printed is what 0.1 % of the model would be; "
SIXTY_FOUR = "the usual width; printed in whole millions (r = 60 would give {})"


@dataclass(frozen=True)
class Row:
    """One line of a table. printed: the paper's digits. setting: what was chosen, in words. reason: why the count has
    other digits than the paper, or what had to be deduced; "" where nothing is to be said."""

    model: str
    method: str
    printed: str
    config: Any
    setting: str
    reason: str = ""


def _houlsby(size: int) -> ld.BottleneckConfig:
    return ld.BottleneckConfig(placement="houlsby", bottleneck_size=size)


def _pfeiffer(size: int, drop: int = 0) -> ld.BottleneckConfig:
    return ld.BottleneckConfig(placement="pfeiffer", bottleneck_size=size, leave_out=range(drop))


def _lin(size: int) -> ld.BottleneckConfig:
    return ld.BottleneckConfig(placement="lin", bottleneck_size=size)


def _lora(rank: int) -> ld.LoraConfig:
    """On the queries and values, by all names that the models have for them. GPT-2 has them in one matrix with the
    keys, where one A of rank r and a B of three widths count as much as two A and two B of one width."""
    return ld.LoraConfig(r=rank, target_modules=["query", "value", "query_proj", "value_proj", "c_attn"])


FULL = ld.FullConfig()

GLUE = (
    Row("RoBERTa base", "FT", "125.0M", FULL, "all, with the pooler", WHOLE),
    Row("RoBERTa base", "BitFit", "0.1M", ld.BitFitConfig(), "all biases"),
    Row("RoBERTa base", "Adpt^D", "0.3M", _pfeiffer(48, drop=8), "r = 48, none in the first 8 of 12 blocks",
        "deduced from the count; one adapter of r = 192 shared by all blocks would print the same"),
    Row("RoBERTa base", "Adpt^D", "0.9M", _pfeiffer(48), "r = 48, none left out",
        "deduced from the count"),
    Row("RoBERTa base", "LoRA", "0.3M", _lora(8), "r = 8 on W_q, W_v"),
    Row("RoBERTa large", "FT", "355.0M", FULL, "all, with the pooler", WHOLE),
    Row("RoBERTa large", "LoRA", "0.8M", _lora(8), "r = 8 on W_q, W_v"),
    Row("RoBERTa large", "Adpt^P", "3.0M", _pfeiffer(64), "r = 64", SIXTY_FOUR.format("3.0M")),
    Row("RoBERTa large", "Adpt^P", "0.8M", _pfeiffer(16), "r = 16"),
    Row("RoBERTa large", "Adpt^H", "6.0M", _houlsby(64), "r = 64", SIXTY_FOUR.format("6.0M")),
    Row("RoBERTa large", "Adpt^H", "0.8M", _houlsby(8), "r = 8"),
    Row("RoBERTa large", "LoRA", "0.8M", _lora(8), "r = 8 on W_q, W_v; the paper's second run of it"),
    Row("DeBERTa XXL", "FT", "1500.0M", FULL, "all", WHOLE),
    Row("DeBERTa XXL", "LoRA", "4.7M", _lora(16), "r = 16 on W_q, W_v"),
)  # fmt: skip

E2E = (
    Row("GPT-2 medium", "FT", "354.92M", FULL, "all, head tied to the embedding",
        "354.82 is what its configuration gives: probably a slip in print, as GPT-2 large's count is exact"),
    Row("GPT-2 medium", "Adapter^L", "0.37M", _lin(6), "r = 6", "r deduced from the count"),
    Row("GPT-2 medium", "Adapter^L", "11.09M", _lin(224), "r = 224", "r deduced from the count"),
    Row("GPT-2 medium", "Adapter^H", "11.09M", _houlsby(112), "r = 112",
        "Adapter^L's count, printed again: no r gives it; 112, half of Adapter^L's 224 twice as often, comes nearest"),
    Row("GPT-2 medium", "FT-Top2", "25.19M", ld.TopLayersConfig(num_layers=2), "the last two blocks"),
    Row("GPT-2 medium", "PreLayer", "0.35M", ld.PreLayerConfig(prefix_length=14), "14 virtual tokens in 24 layers",
        TENTH + "14 tokens come nearest"),
    Row("GPT-2 medium", "LoRA", "0.35M", _lora(4), "r = 4 on W_q, W_v",
        TENTH + "the setting of the paper's table 11 counts this (microsoft/LoRA, issue 172)"),
    Row("GPT-2 large", "FT", "774.03M", FULL, "all, head tied to the embedding"),
    Row("GPT-2 large", "Adapter^L", "0.88M", _lin(8), "r = 8", "r deduced from the count"),
    Row("GPT-2 large", "Adapter^L", "23.00M", _lin(248), "r = 248", "r deduced from the count"),
    Row("GPT-2 large", "PreLayer", "0.77M", ld.PreLayerConfig(prefix_length=17), "17 virtual tokens in 36 layers",
        TENTH + "17 tokens come nearest"),
    Row("GPT-2 large", "LoRA", "0.77M", _lora(4), "r = 4 on W_q, W_v", TENTH + "r = 4 counts this"),
)  # fmt: skip


def count(model: nn.Module, config: Any) -> int:
    """How many parameters learn with this config; the model is what it was afterwards."""
    ld.add_adapter(model, config)
    parameters = [p for several in ld.adapter_parameters(model).values() for p in several]
    ld.unload(model)
    return sum(parameter.numel() for parameter in parameters)


def counts(rows: tuple[Row, ...]) -> list[int]:
    """One count a row."""
    models: dict[str, nn.Module] = {}
    found = []
    for row in rows:
        model = models.setdefault(row.model, models.get(row.model) or build(row.model))
        found.append(count(model, row.config))
    return found


def agrees(row: Row, counted: int) -> bool:
    """Whether a count has the paper's digits, rounded as there."""
    digits = len(row.printed.rstrip("M").partition(".")[2])
    return f"{counted / 1e6:.{digits}f}M" == row.printed


def table(title: str, rows: tuple[Row, ...]) -> str:
    """A Markdown table: the lecture's figure, ours, exactly, and what there is to say."""
    lines = [f"**{title}**", ""]
    lines += ["| model | method | lecture | counted | exactly | setting | remark |", "|---|---|--:|--:|--:|---|---|"]
    for row, counted in zip(rows, counts(rows)):
        digits = len(row.printed.rstrip("M").partition(".")[2])
        shown = f"{counted / 1e6:.{digits}f}M"
        ours = shown if agrees(row, counted) else f"**{shown}**"
        lines.append(
            f"| {row.model} | {row.method} | {row.printed} | {ours} | {counted:,} | {row.setting} | {row.reason} |"
        )
    return "\n".join(lines)


def tables() -> str:
    return f"{table('GLUE', GLUE)}\n\n{table('E2E', E2E)}"


def with_tables(readme: str, made: str) -> str:
    """The README with new tables between its two marks."""
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    made = tables()
    if parser.parse_args().write:
        README.write_text(with_tables(README.read_text(encoding="utf-8"), made), encoding="utf-8")
    else:
        print(made)


if __name__ == "__main__":
    main()
