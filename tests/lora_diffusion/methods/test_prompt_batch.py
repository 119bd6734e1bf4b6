"""Prompts in front of batches, and generating from them, beside PEFT and beside slow ways of doing the same."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as tf

import lora_diffusion as ld

IDS = torch.randint(3, 99, (2, 6), generator=torch.Generator().manual_seed(2))
MASK = torch.ones_like(IDS)
TASKS = {"gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "bloom": "CAUSAL_LM", "bert": "SEQ_CLS", "roberta": "SEQ_CLS",
         "deberta": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}  # fmt: skip
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "vocab_size": 99, "max_position_embeddings": 64}  # fmt: skip


def pair(model: Any, task: str, **fields: Any) -> tuple[Any, Any]:
    """(ours, PEFT's), with the same prompt of three tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            copy.deepcopy(model), peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3, **fields)
        ).eval()
    ld.add_adapter(model, ld.PromptTuningConfig(num_virtual_tokens=3))
    with torch.no_grad():
        ld.adapter_parameters(model)["model"][0].copy_(theirs.prompt_encoder["default"].embedding.weight[:3])
    return model, theirs


def right_padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = IDS.clone(), MASK.clone()
    ids[1, 4:], mask[1, 4:] = 2, 0
    return ids, mask


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = IDS.clone(), MASK.clone()
    ids[1, :2], mask[1, :2] = 2, 0
    return ids, mask


class TestBesidePeft:
    @pytest.mark.parametrize("family", TASKS)
    def test_the_same_logits_and_loss(self, family: str, text_model: Callable[[str], Any]) -> None:
        ours, theirs = pair(text_model(family), TASKS[family])
        labels = torch.tensor([1, 0]) if TASKS[family] == "SEQ_CLS" else IDS
        batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
        with torch.no_grad():
            wanted, found = theirs(**batch), ours(**ld.prepend_prompt(ours, batch))
        assert found.logits.shape == wanted.logits.shape
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
    def test_with_padding(self, family: str, text_model: Callable[[str], Any]) -> None:
        ours, theirs = pair(text_model(family), TASKS[family])
        ids, mask = right_padded()
        batch = {"input_ids": ids, "attention_mask": mask}
        with torch.no_grad():
            wanted, found = theirs(**batch).logits, ours(**ld.prepend_prompt(ours, batch)).logits
        seen = torch.cat([MASK[:, :3], mask], dim=1).bool() if TASKS[family] == "CAUSAL_LM" else ...
        torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-5, atol=1e-6)

    def test_token_types(self) -> None:
        torch.manual_seed(0)
        ours, theirs = pair(tf.BertForTokenClassification(tf.BertConfig(**SIZES)).eval(), "TOKEN_CLS")
        types = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
        batch = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": types}
        with torch.no_grad():
            wanted = theirs(**batch).logits  # with labels it fails: they stay as short as they were
            found = ours(**ld.prepend_prompt(ours, {**batch, "labels": IDS % 2}))
        torch.testing.assert_close(found.logits, wanted, rtol=1e-5, atol=1e-6)
        loss = torch.nn.functional.cross_entropy(wanted[:, 3:].flatten(0, 1), (IDS % 2).flatten())
        torch.testing.assert_close(found.loss, loss, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
    @pytest.mark.parametrize(
        "options", [{}, {"repetition_penalty": 1.7}, {"num_beams": 3}, {"no_repeat_ngram_size": 2}]
    )
    def test_the_same_generated_tokens(
        self, family: str, options: dict[str, Any], text_model: Callable[[str], Any]
    ) -> None:
        ours, theirs = pair(text_model(family), TASKS[family])
        batch = {"input_ids": IDS, "attention_mask": MASK}
        wanted = theirs.generate(**batch, max_new_tokens=8, do_sample=False, **options)
        found = ld.prompted_generate(ours, batch, max_new_tokens=8, do_sample=False, **options)
        assert torch.equal(found, wanted)
        if family != "t5":
            assert torch.equal(found[:, :6], IDS)


class TestRows:
    """Different prompts, or none, in one batch: each row as if it were alone."""

    @pytest.fixture
    def three(self, text_model: Callable[[str], Any]) -> Callable[[str], Any]:
        def build(family: str) -> Any:
            model = text_model(family)
            for k, name in enumerate(("one", "two", "three")):
                g = torch.Generator().manual_seed(k)
                ld.add_adapter(model, ld.PromptTuningConfig(num_virtual_tokens=k + 1), name, generator=g)
            return model

        return build

    @pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "t5"])
    @pytest.mark.parametrize("padding", ["none", "right", "left"])
    def test_each_as_if_alone(self, family: str, padding: str, three: Callable[[str], Any]) -> None:
        model = three(family)
        names = ["three", None]
        ids, mask = {"none": (IDS, MASK), "right": right_padded(), "left": left_padded()}[padding]
        if family == "roberta":
            ids = ids.masked_fill(mask == 0, 1)
        labels = torch.tensor([1, 0]) if TASKS[family] == "SEQ_CLS" else ids.masked_fill(mask == 0, -100)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        made = ld.prepend_prompt(model, batch, names)
        assert made["input_ids"].shape == (2, 9) and made["attention_mask"].sum(dim=1).tolist() == [
            9,
            int(mask[1].sum()),
        ]
        if TASKS[family] != "SEQ_CLS":
            made["labels"] = labels
        if TASKS[family] == "CAUSAL_LM":
            made = ld.prepend_prompt(model, batch, names)
            # positions by the mask, as generation has them, so that padding in front moves nothing
            made["position_ids"] = (made["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            mixed = model(**made).logits
        for row, name in enumerate(names):
            alone = {key: value[row : row + 1] for key, value in batch.items()}
            kept = alone["attention_mask"][0].bool()
            alone.update({key: alone[key][:, kept] for key in ("input_ids", "attention_mask")})
            if TASKS[family] == "CAUSAL_LM":
                alone["labels"] = alone["labels"][:, kept]
            with torch.no_grad():
                wanted = model(**ld.prepend_prompt(model, alone, [name])).logits[0]
            if TASKS[family] == "CAUSAL_LM":
                found = mixed[row][made["attention_mask"][row].bool()]
            elif family in ("bert", "roberta") and padding == "left":
                continue  # positions of these count from the first column, whatever the mask
            else:
                found = mixed[row]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    def test_labels_move_with_their_tokens(self, three: Callable[[str], Any]) -> None:
        model = three("gpt2")
        made = ld.prepend_prompt(model, {"input_ids": IDS, "labels": IDS}, ["one", "three"])
        assert made["labels"][0].tolist() == [-100, *IDS[0].tolist(), -100, -100]
        assert made["labels"][1].tolist() == [-100] * 3 + IDS[1].tolist()
        assert made["attention_mask"].tolist() == [[1] * 7 + [0] * 2, [1] * 9]

    def test_left_padding_goes_on_the_left(self, three: Callable[[str], Any]) -> None:
        model = three("gpt2")
        ids, mask = left_padded()
        made = ld.prepend_prompt(model, {"input_ids": ids, "attention_mask": mask}, ["one", "three"])
        assert made["attention_mask"].tolist() == [[0, 0] + [1] * 7, [1, 1, 1, 0, 0] + [1] * 4]
        assert torch.equal(made["input_ids"][:, 3:], ids)

    def test_the_active_ones_in_their_order(self, three: Callable[[str], Any]) -> None:
        model = three("gpt2")
        ld.set_adapters(model, ["three", "one"])
        made = ld.prepend_prompt(model, {"input_ids": IDS})
        assert made["input_ids"][0, :4].tolist() == [*ld.prompt_ids(model, "one"), *ld.prompt_ids(model, "three")]
        assert "attention_mask" not in made

    def test_adapters_per_sample(self, three: Callable[[str], Any]) -> None:
        model = three("gpt2")
        names = ["two", None]
        wanted = ld.prepend_prompt(model, {"input_ids": IDS}, names)
        with ld.adapters_per_sample(model, names):
            found = ld.prepend_prompt(model, {"input_ids": IDS})
            doubled = ld.prepend_prompt(model, {"input_ids": IDS.repeat_interleave(2, dim=0)})
            with pytest.raises(ld.ConfigError, match="has 2 rows, the batch has 3"):
                ld.prepend_prompt(model, {"input_ids": IDS[[0, 1, 0]]})
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert torch.equal(doubled["input_ids"], wanted["input_ids"].repeat_interleave(2, dim=0))
        assert len(ld.prepend_prompt(model, {"input_ids": IDS})["input_ids"][0]) == 12

    def test_positions_and_spans(self, three: Callable[[str], Any]) -> None:
        model = three("bert")
        batch = {
            "input_ids": IDS,
            "position_ids": torch.arange(6).unsqueeze(0),
            "start_positions": torch.tensor([2, 6]),
            "end_positions": torch.tensor([5, -100]),
        }
        made = ld.prepend_prompt(model, batch, ["one", "two"])
        assert made["position_ids"].tolist() == [[*range(7), 0], [*range(8)]]
        assert made["start_positions"].tolist() == [3, 8]  # 6 is beyond the row, and stays beyond
        assert made["end_positions"].tolist() == [6, -100]

    @pytest.mark.parametrize("family", ["gpt2", "llama"])
    def test_generating_a_mixed_batch(self, family: str, three: Callable[[str], Any]) -> None:
        """Each row's tokens are those of a slow loop over that row alone, without a cache."""
        model = three(family)
        names = ["three", None]
        found = ld.prompted_generate(
            model, {"input_ids": IDS, "attention_mask": MASK}, names, max_new_tokens=5, do_sample=False, eos_token_id=-1
        )
        for row, name in enumerate(names):
            ids = torch.tensor([[*(ld.prompt_ids(model, name) if name else []), *IDS[row].tolist()]])
            for _ in range(5):
                with torch.no_grad():
                    ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            assert found[row].tolist() == [*IDS[row].tolist(), *ids[0, -5:].tolist()]


class TestGenerating:
    def test_virtual_tokens_in_the_middle(self, text_model: Callable[[str], Any]) -> None:
        """As a template puts them: the answer holds none of their ids, in rows of different lengths."""
        model = text_model("llama")
        ld.add_adapter(model, ld.PromptEncoderConfig(template="{P:2} {x} {P}"))
        p = ld.prompt_ids(model)
        rows = [[*p[:2], 5, 6, 7, p[2]], [2, *p[:2], 8, 9, p[2]]]
        batch = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor([[1] * 6, [0, *[1] * 5]])}
        found = ld.prompted_generate(
            model, batch, max_new_tokens=4, do_sample=False, repetition_penalty=1.3, eos_token_id=-1
        )
        assert found[:, :3].tolist() == [[5, 6, 7], [2, 8, 9]] and int(found.max()) < 99
        ids = torch.tensor([rows[0]])
        for _ in range(4):
            with torch.no_grad():
                logits = model(ids).logits[0, -1]
            seen = [n for n in ids[0].tolist() if n < 99]
            scores = logits.clone()
            scores[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.3, logits[seen] * 1.3)
            ids = torch.cat([ids, scores.argmax().view(1, 1)], dim=1)
        assert found[0, 3:].tolist() == ids[0, 6:].tolist()

    def test_limits_count_real_tokens(self, text_model: Callable[[str], Any]) -> None:
        model = text_model("gpt2")
        ld.add_adapter(model, ld.PromptTuningConfig(num_virtual_tokens=3))
        batch = {"input_ids": IDS, "attention_mask": MASK}
        assert ld.prompted_generate(model, batch, max_length=10, eos_token_id=-1).shape == (2, 10)
        with pytest.raises(ld.ConfigError, match="leaves no room after 6 tokens"):
            ld.prompted_generate(model, batch, max_length=6)

    def test_without_a_prompt_it_is_generate(self, text_model: Callable[[str], Any]) -> None:
        model = text_model("gpt2")
        batch = {"input_ids": IDS, "attention_mask": MASK}
        wanted = model.generate(**batch, max_new_tokens=4, do_sample=False)
        assert torch.equal(ld.prompted_generate(model, batch, max_new_tokens=4, do_sample=False), wanted)
        ld.add_adapter(model, ld.PromptTuningConfig(num_virtual_tokens=3))
        with ld.disable_adapters(model):
            assert torch.equal(ld.prompted_generate(model, batch, max_new_tokens=4, do_sample=False), wanted)


class TestMistakes:
    @pytest.mark.parametrize(
        ("batch", "names", "words"),
        [
            ({"attention_mask": MASK}, None, "no input_ids"),
            ({"input_ids": IDS[0]}, None, "no input_ids of shape"),
            ({"input_ids": IDS, "attention_mask": MASK[:, None, None]}, None, "attention_mask has shape"),
            ({"input_ids": IDS, "special_tokens_mask": MASK}, None, "'special_tokens_mask' for every token"),
            ({"input_ids": IDS}, ["prompt"], "1 names for 2 rows"),
            ({"input_ids": IDS}, "lora", "'lora' has no virtual tokens"),
            ({"input_ids": IDS}, "nobody", "no adapter 'nobody'"),
            ({"input_ids": IDS}, "template", "stands where its template"),
            ({"input_ids": IDS.repeat(1, 11)[:, :62]}, None, "65 tokens long, and the model takes 64"),
        ],
    )
    def test_one_clear_line(
        self, batch: dict[str, Any], names: Any, words: str, text_model: Callable[[str], Any]
    ) -> None:
        model = text_model("gpt2")
        ld.add_adapter(model, ld.LoraConfig(r=2), "lora")
        ld.add_adapter(model, ld.PromptTuningConfig(num_virtual_tokens=3), "prompt")
        ld.add_adapter(model, ld.PromptEncoderConfig(template="{P} {x} {P}"), "template")
        with pytest.raises(ld.ConfigError, match=words) as caught:
            ld.prepend_prompt(model, batch, names)
        assert "\n" not in str(caught.value)

    def test_robertas_positions_begin_later(self, text_model: Callable[[str], Any]) -> None:
        model = text_model("roberta")
        ld.add_adapter(model, ld.PromptTuningConfig(num_virtual_tokens=3))
        ids = IDS.repeat(1, 11)
        assert ld.prepend_prompt(model, {"input_ids": ids[:, :59]})["input_ids"].shape == (2, 62)
        with pytest.raises(ld.ConfigError, match="the model takes 62"):
            ld.prepend_prompt(model, {"input_ids": ids[:, :60]})

    def test_a_prompt_with_a_template_is_left_to_it(self, text_model: Callable[[str], Any]) -> None:
        model = text_model("gpt2")
        ld.add_adapter(model, ld.PromptEncoderConfig(template="{P} {x} {P}"))
        assert ld.prepend_prompt(model, {"input_ids": IDS})["input_ids"] is IDS
