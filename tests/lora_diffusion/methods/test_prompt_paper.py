"""P-tuning beside a slow, direct writing of the paper's forward pass: one position after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch.nn import functional as F

import lora_diffusion as ld
from tests.lora_diffusion.methods.prompt_tokenizers import bert_tokenizer, gpt2_tokenizer, llama_tokenizer

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
WORDS = ["Paris", "Anna", "Rome lives", "Oslo in France"]


def setting(family: str) -> tuple[Any, Any]:
    """(model, tokenizer)."""
    torch.manual_seed(0)
    if family == "bert":
        tokenizer = bert_tokenizer()
        return tf.BertForMaskedLM(tf.BertConfig(vocab_size=len(tokenizer), **SIZES)).eval(), tokenizer
    if family == "roberta":
        tokenizer = gpt2_tokenizer(roberta=True)
        config = tf.RobertaConfig(vocab_size=len(tokenizer), pad_token_id=1, **SIZES)
        return tf.RobertaForMaskedLM(config).eval(), tokenizer
    if family == "gpt2":
        tokenizer = gpt2_tokenizer()
        config = tf.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=40)
        return tf.GPT2LMHeadModel(config).eval(), tokenizer
    tokenizer = llama_tokenizer()
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=len(tokenizer), **SIZES)).eval(), tokenizer


def slow_lstm(x: list[torch.Tensor], tensors: dict[str, torch.Tensor], layer: int, end: str) -> list[torch.Tensor]:
    """One direction of one layer; the gates are i, f, g, o."""
    w_x, w_h = tensors[f"lstm_head.weight_ih_l{layer}{end}"], tensors[f"lstm_head.weight_hh_l{layer}{end}"]
    bias = tensors[f"lstm_head.bias_ih_l{layer}{end}"] + tensors[f"lstm_head.bias_hh_l{layer}{end}"]
    h = c = torch.zeros(w_h.shape[1])
    made = []
    for step in x:
        i, f, g, o = (w_x @ step + w_h @ h + bias).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        made.append(h)
    return made


def slow_rows(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """h_i = MLP([→h_i : ←h_i]), equation 5 of the paper, or MLP(e_i)."""
    x = list(tensors["embedding.weight"])
    layer = 0
    while f"lstm_head.weight_ih_l{layer}" in tensors:
        there = slow_lstm(x, tensors, layer, "")
        back = slow_lstm(x[::-1], tensors, layer, "_reverse")[::-1]
        x = [torch.cat(pair) for pair in zip(there, back)]
        layer += 1
    linear = sorted({name.split(".")[1] for name in tensors if name.startswith("mlp_head")})
    for number in linear:
        weight, bias = tensors[f"mlp_head.{number}.weight"], tensors[f"mlp_head.{number}.bias"]
        x = [weight @ step + bias for step in x]
        if number != linear[-1]:
            x = [step.clamp(min=0) for step in x]
    return x


def slow_logits(model: Any, ids: torch.Tensor, mask: torch.Tensor, rows: list[torch.Tensor], first: int) -> Any:
    """The model on embeddings in which every virtual token is put in by hand."""
    table = model.get_input_embeddings().weight
    embeds = torch.zeros(*ids.shape, table.shape[1])
    for row in range(ids.shape[0]):
        for column in range(ids.shape[1]):
            number = int(ids[row, column])
            embeds[row, column] = rows[number - first] if number >= first else table[number]
    return model(inputs_embeds=embeds, attention_mask=mask).logits


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return torch.tensor([row + [1] * (width - len(row)) for row in rows]), mask


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
@pytest.mark.parametrize(
    ("encoder", "shape"), [("LSTM", "lama"), ("LSTM", "few-shot"), ("MLP", "few-shot"), ("MLP", "peft")]
)
def test_the_papers_forward(family: str, encoder: str, shape: str) -> None:
    model, tokenizer = setting(family)
    counts = (3, 2, 4) if family in ("bert", "roberta") else (3, 2)
    config = ld.PromptEncoderConfig(template=counts, encoder_reparameterization_type=encoder, encoder_shape=shape)
    template = config.parsed
    assert template is not None
    ld.add_adapter(model, config, generator=torch.Generator().manual_seed(1))
    ids = ld.prompt_ids(model)
    assert min(ids) >= model.config.vocab_size
    encoded = [template.encode_row(tokenizer, {"x": words}, ids) for words in WORDS]
    batch, mask = padded([row.ids for row in encoded])
    places = torch.tensor([row.answer for row in encoded])
    answers = torch.tensor([4, 5, 6, 7])

    ours = model(input_ids=batch, attention_mask=mask).logits
    loss = F.cross_entropy(ours[torch.arange(4), places], answers)
    loss.backward()
    parameters = ld.adapter_parameters(model)["model"]
    assert all(parameter.grad is not None and bool(parameter.grad.abs().sum() > 0) for parameter in parameters)
    assert all(p.grad is None for p in model.parameters() if not any(p is q for q in parameters))

    tensors = {n: t.requires_grad_(True) for n, t in ld.get_adapter(model).methods["model"]["p_tuning"].tensors.items()}
    ld.unload(model)
    theirs = slow_logits(model, batch, mask, slow_rows(tensors), ids[0])
    seen = mask.bool()
    torch.testing.assert_close(ours[seen], theirs[seen], rtol=0, atol=1e-6)
    F.cross_entropy(theirs[torch.arange(4), places], answers).backward()
    for parameter, tensor in zip(parameters, tensors.values()):
        assert parameter.grad is not None and tensor.grad is not None
        torch.testing.assert_close(parameter.grad, tensor.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_answer_is_at_the_evaluated_position(family: str) -> None:
    """The loss is that of the mask, or of the token after the last: not of one before it."""
    model, tokenizer = setting(family)
    counts = (1, 1, 1) if family == "bert" else (1, 1)
    template = ld.PromptTemplate.parse(counts)
    ld.add_adapter(model, ld.PromptEncoderConfig(template=counts))
    row = template.encode_row(tokenizer, {"x": "Paris"}, ld.prompt_ids(model))
    if family == "bert":
        assert row.ids[row.answer] == tokenizer.mask_token_id
        return
    with torch.no_grad():
        logits = model(torch.tensor([row.ids])).logits[0, row.answer]
        after = ld.prompted_generate(model, {"input_ids": torch.tensor([row.ids])}, max_new_tokens=1, do_sample=False)
    assert int(after[0, -1]) == int(logits.argmax())


def test_fixed_random_values_give_the_same_encoder() -> None:
    """A generator decides the initial values, whatever the global one says."""
    first, second = (setting("bert")[0] for _ in range(2))
    for seed, model in enumerate((first, second)):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        ld.add_adapter(model, ld.PromptEncoderConfig(template=(3, 3, 3)), generator=torch.Generator().manual_seed(5))
        assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(ld.adapter_parameters(first)["model"], ld.adapter_parameters(second)["model"]):
        assert torch.equal(a, b)


def test_initial_values_are_pytorchs() -> None:
    """An embedding's are normal, those of other layers uniform up to one over the root of their width."""
    model = setting("bert")[0]
    ld.add_adapter(model, ld.PromptEncoderConfig(template="{P:400} {x}"))
    tensors = ld.get_adapter(model).methods["model"]["p_tuning"].tensors
    assert 0.9 < float(tensors["embedding.weight"].std()) < 1.1
    for name, fan in (("lstm_head.weight_hh_l0", 8), ("mlp_head.0.weight", 16)):
        limit = fan**-0.5
        assert 0.9 * limit < float(tensors[name].abs().max()) <= limit
