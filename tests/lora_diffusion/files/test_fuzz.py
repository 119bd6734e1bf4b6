"""Mutated adapter files of every dialect: our error or a sound adapter, nothing else, and the target as it was.

Every case takes a sound file, damages it, and gives it to `load_adapter`. What may come of it is an adapter that fits
(the damage was to values, say), or one LoraDiffusionError of one line. No tensor may be allocated that is more than
twice the file. `LORA_DIFFUSION_FUZZ_CASES` sets how many cases there are; the number tried is printed at the end.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_diffusion as ld
from lora_diffusion.files.registry import DIALECTS

from .conftest import FUZZED

CASES = int(os.environ.get("LORA_DIFFUSION_FUZZ_CASES", "3000"))
TARGETS = ["to_q", "q_proj"]
HUGE = (2**31, 2**40, 2**47, 2**63, 2**64, 10**30, -1, 0, 1, 2, 3)


class Pipe(nn.Module):
    """One attention of a UNet and one of a text encoder, under the paths of Stable Diffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = _nested({_ATTN.format("to_q"): nn.Linear(12, 8), _ATTN.format("to_out.0"): nn.Linear(8, 12)})
        self.text_encoder = _nested({_CLIP.format("q_proj"): nn.Linear(8, 8)})


_ATTN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.{}"
_CLIP = "text_model.encoder.layers.0.self_attn.{}"


def _nested(leaves: dict[str, nn.Module]) -> nn.Module:
    root = nn.Module()
    for path, leaf in leaves.items():
        parent = root
        *above, last = path.split(".")
        for name in above:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, leaf)
    return root


class Target:
    """What `load_adapter` takes for a pipeline: components as attributes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        whole = Pipe()
        self.unet, self.text_encoder = whole.unet, whole.text_encoder

    def digest(self) -> str:
        found = hashlib.sha256()
        for module in (self.unet, self.text_encoder):
            for name, part in module.named_modules():
                found.update(f"{name} {type(part).__qualname__} {sorted(part.__dict__)}".encode())
            for name, value in module.state_dict().items():
                found.update(name.encode() + value.numpy().tobytes())
        return found.hexdigest()


def _half(rank: int = 2, wide: int = 12, out: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(rank)
    return torch.randn(rank, wide, generator=g), torch.randn(out, rank, generator=g)


def sound_files() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]]:
    """{kind: (tensors, metadata)}: a small file of every dialect and kind of layer."""
    a, b = _half()
    c, d = _half(2, 8, 8)
    unet, kohya = _ATTN.format("to_q"), "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    te, kohya_te = _CLIP.format("q_proj"), "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    old = _ATTN.format("processor.to_{}_lora")
    described = {"unet.r": 2, "unet.lora_alpha": 4, "unet.target_modules": ["to_q"], "unet.rank_pattern": {},
                 "unet.alpha_pattern": {"to_q": 3}}  # fmt: skip
    own = {"version": 1, "config": {"unet": {"r": 2}}, "metadata": {"steps": 3}, "base": {"unet": {"values": {}}}}
    square = torch.ones(4, 6), torch.ones(2, 2)
    return {
        "diffusers": (
            {f"unet.{unet}.lora_A.weight": a, f"unet.{unet}.lora_B.weight": b,
             f"text_encoder.{te}.lora_linear_layer.down.weight": c, f"text_encoder.{te}.lora_linear_layer.up.weight": d,
             f"unet.{unet}.lora_magnitude_vector": torch.ones(8), "lora_tokens.<s1>.text_encoder": torch.ones(1, 8)},
            {"lora_adapter_metadata": json.dumps(described), "lora_diffusion": json.dumps(own), "format": "pt"},
        ),
        "attn-processor": (
            {f"{old.format('q')}.down.weight": a, f"{old.format('q')}.up.weight": b,
             f"{old.format('out')}.down.weight": _half(2, 8, 12)[0],
             f"{old.format('out')}.up.weight": _half(2, 8, 12)[1]},
            {"format": "pt"},
        ),
        "kohya": (
            {f"{kohya}.lora_down.weight": a, f"{kohya}.lora_up.weight": b, f"{kohya}.alpha": torch.tensor(1.0),
             f"{kohya}.dora_scale": torch.ones(8, 1),
             f"{kohya_te}.lora_down.weight": c, f"{kohya_te}.lora_up.weight": d},
            {"ss_network_dim": "2", "ss_tag_frequency": '{"x": {"dog": 3}}', "sshs_model_hash": "0" * 64},
        ),
        "loha": (
            {f"{kohya}.hada_w1_a": b, f"{kohya}.hada_w1_b": a, f"{kohya}.hada_w2_a": b, f"{kohya}.hada_w2_b": a,
             f"{kohya}.alpha": torch.tensor(1.0)},
            {},
        ),
        "lokr": ({f"{kohya}.lokr_w1": square[1], f"{kohya}.lokr_w2": square[0]}, {}),
        "lokr, factored": (
            {f"{kohya}.lokr_w1": square[1], f"{kohya}.lokr_w2_a": torch.ones(4, 2),
             f"{kohya}.lokr_w2_b": torch.ones(2, 6), f"{kohya}.alpha": torch.tensor(1.0)},
            {},
        ),
        "diff": ({f"{kohya}.diff": torch.ones(8, 12)}, {}),
        "tucker": (
            {f"{kohya}.lora_down.weight": torch.ones(2, 12, 1, 1), f"{kohya}.lora_up.weight": torch.ones(8, 2, 1, 1),
             f"{kohya}.lora_mid.weight": torch.ones(2, 2, 1, 1)},
            {},
        ),
        "onetrainer": (
            {f"{kohya}.lora_down.weight": a, f"{kohya}.lora_up.weight": b, "bundle_emb.dog.clip_l": torch.ones(2, 8)},
            {},
        ),
        "cloneofsimo": (
            {f"text_encoder:{k}:{side}": torch.ones((1, 768) if side == "down" else (768, 1))
             for k in range(4) for side in ("up", "down")} | {"<s1>": torch.ones(768)},
            {"text_encoder": '["CLIPAttention"]', "text_encoder:0:rank": "1", "<s1>": "<embed>"},
        ),
        "peft": (
            {f"base_model.model.{unet}.lora_A.weight": a, f"base_model.model.{unet}.lora_B.weight": b},
            {"format": "pt"},
        ),
        "textual inversion": ({"emb_params": torch.ones(2, 8)}, {}),
        "loralib": ({f"{unet}.lora_A": a, f"{unet}.lora_B": b, "score.weight": torch.ones(3, 8)}, {}),
    }  # fmt: skip


def packed(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[dict[str, Any], bytes]:
    """(header, data section) as safetensors lays them out."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return header, data


class Damage:
    """One way of damaging a file, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def __call__(self, header: dict[str, Any], data: bytes) -> bytes:
        header = copy.deepcopy(header)
        names = [name for name in header if name != "__metadata__"]
        kind = self.draw.choice(["bytes", "cut", "longer", "shape", "reshaped", "dtype", "offsets", "rename", "drop",
                                 "swap", "metadata", "value", "length", "json", "nothing"])  # fmt: skip
        if kind == "reshaped":  # sound as a container, wrong as an adapter
            return self._reshaped(header, data, names)
        entry = header[self.draw.choice(names)]
        if kind == "shape":
            self._number(entry["shape"])
        elif kind == "dtype":
            entry["dtype"] = self.draw.choice(["F16", "BF16", "I64", "F8_E4M3", "BOOL", "F64", "", None, 5, ["F32"]])
        elif kind == "offsets":
            self._number(entry["data_offsets"])
        elif kind == "rename":
            self._rename(header, self.draw.choice(names))
        elif kind == "drop":
            del header[self.draw.choice(names)]
        elif kind == "swap":
            one, other = self.draw.choice(names), self.draw.choice(names)
            header[one], header[other] = header[other], header[one]
        elif kind == "metadata":
            self._metadata(header)
        elif kind == "value":
            data = self._overwritten(data, b"\x00\x00\xc0\x7f")  # a NaN
        return self._bytes(kind, json.dumps(header).encode(), data)

    def _bytes(self, kind: str, text: bytes, data: bytes) -> bytes:
        length = len(text)
        if kind == "length":
            length = self.draw.choice(
                [0, 1, length + 1, length - 1, 2**32, 2**63, 2**64 - 1, self.draw.randrange(2**20)]
            )
        elif kind == "json":
            text = self.draw.choice([b"[]", b"null", b"{", b'{"a":' * 5000, text + b"}", text.replace(b"{", b"[", 1),
                                     text.replace(b":", b"\xff", 1), b'{"__metadata__": 3}'])  # fmt: skip
            length = len(text)
        whole = length.to_bytes(8, "little") + text + data
        if kind == "bytes":
            for _ in range(self.draw.choice([1, 1, 2, 8, 64])):
                whole = self._overwritten(whole, bytes([self.draw.randrange(256)]))
        elif kind == "cut":
            whole = whole[: self.draw.randrange(len(whole))]
        elif kind == "longer":
            whole += self.draw.randbytes(self.draw.choice([1, 8, 1000]))
        return whole

    def _reshaped(self, header: dict[str, Any], data: bytes, names: list[str]) -> bytes:
        """Another shape for one tensor, of the bytes that belong to it."""
        chosen, parts = self.draw.choice(names), {}
        for name in names:
            start, end = header[name]["data_offsets"]
            parts[name] = torch.frombuffer(bytearray(data[start:end]), dtype=torch.float32).view(header[name]["shape"])
        shape = [self.draw.choice([0, 1, 2, 3, 8, 12, 200]) for _ in range(self.draw.randrange(6))]
        parts[chosen] = torch.ones(shape) if torch.Size(shape).numel() < 10**5 else torch.ones(1)
        header, data = packed(parts, header.get("__metadata__", {}))
        return self._bytes("", json.dumps(header).encode(), data)

    def _number(self, numbers: list[Any]) -> None:
        if numbers and self.draw.random() < 0.8:
            numbers[self.draw.randrange(len(numbers))] = self.draw.choice([*HUGE, None, "1", 1.5, [], True])
        elif self.draw.random() < 0.5:
            numbers.append(self.draw.choice(HUGE))
        elif numbers:
            numbers.pop()

    def _rename(self, header: dict[str, Any], name: str) -> None:
        place = self.draw.randrange(len(name))
        new = self.draw.choice(["", "\x1b[31m", "x" * 600, name + ".x", name[:place] + name[place + 1 :],
                                name[:place] + self.draw.choice("._:0aé\n") + name[place:], name.upper(),
                                "../../etc", name.replace("0", "99999999999999999999", 1)])  # fmt: skip
        header[new] = header.pop(name)

    def _metadata(self, header: dict[str, Any]) -> None:
        metadata = header.setdefault("__metadata__", {})
        key = self.draw.choice([*metadata, "lora_adapter_metadata", "lora_diffusion", "unet", "ss_tag_frequency"])
        metadata[key] = self.draw.choice(
            ["", "{", "[]", "null", "3", '"x"', "{" * 3000, '{"unet.lora_alpha": 1e400}', '{"unet.alpha_pattern": 3}',
             '{"unet.alpha_pattern": {"(a+)+$": 1}}', '{"unet.lora_alpha": "x"}',
             '{"version": [], "config": {"unet": 7}}',
             '{"version": 1, "base": {"unet": {"values": {"x": [1]}}}}', '["Attention", 7]', '["' + "A" * 5000 + '"]',
             "\x1b[2J", 5, None, '{"x": 7}', '{"x": {"dog": "many"}}', "9" * 5000]
        )  # fmt: skip

    def _overwritten(self, data: bytes, new: bytes) -> bytes:
        if len(data) <= len(new):
            return new
        place = self.draw.randrange(len(data) - len(new))
        return data[:place] + new + data[place + len(new) :]


class Largest(TorchDispatchMode):
    """The bytes of the largest storage that any operation gave back."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor):
                self.bytes = max(self.bytes, one.untyped_storage().nbytes())
        return result


@pytest.fixture
def tally(pytestconfig: pytest.Config) -> Counter[str]:
    return pytestconfig.stash.setdefault(FUZZED, Counter())


SOUND = sound_files()


@pytest.mark.parametrize("kind", SOUND)
def test_mutated_files(kind: str, tmp_path: Path, tally: Counter[str]) -> None:
    path = tmp_path / "adapter_model.safetensors"
    if kind == "peft":
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    target, header_and_data = Target(), packed(*SOUND[kind])
    before = target.digest()
    refused = 0
    for strict in (True, False):  # what is imported at the first call is no allocation of a file's
        path.write_bytes(Damage(0)._bytes("", json.dumps(header_and_data[0]).encode(), header_and_data[1]))
        with contextlib.suppress(ld.LoraDiffusionError):
            ld.delete_adapter(target, ld.load_adapter(target, path, strict=strict).name)
    tracemalloc.start()
    for seed in range(CASES // len(SOUND)):
        raw = Damage(seed)(*header_and_data)
        path.write_bytes(raw)
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        with Largest() as largest:
            try:
                report = ld.load_adapter(target, path, strict=bool(seed % 2))
            except ld.LoraDiffusionError as error:
                refused += 1
                assert "\n" not in str(error) and str(error).isprintable(), repr(str(error))
                report = None
        grown = tracemalloc.get_traced_memory()[1] - held
        assert grown < 2 * len(raw) + 2**21, f"case {seed}: {grown:,} bytes of objects for a file of {len(raw):,}"
        assert largest.bytes <= max(2 * len(raw), 4096), f"case {seed}: a tensor of {largest.bytes:,} bytes"
        if report is not None:
            ld.delete_adapter(target, report.name)
        assert target.digest() == before, f"case {seed} left its marks"
    tracemalloc.stop()
    tally.update(refused=refused, loaded=CASES // len(SOUND) - refused)
    assert refused, "mutations that never hurt are none"


def test_every_dialect_is_there() -> None:
    assert {dialect.NAME for dialect in DIALECTS} <= {*SOUND, "lycoris"}


@pytest.mark.parametrize("kind", SOUND)
def test_the_files_are_sound(kind: str, tmp_path: Path) -> None:
    """Undamaged they are read: what is refused above is refused for its damage."""
    path = tmp_path / "adapter_model.safetensors"
    header, data = packed(*SOUND[kind])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    adapter = ld.read_adapter(path)
    assert adapter.layer_count() >= 1 or adapter.tokens
