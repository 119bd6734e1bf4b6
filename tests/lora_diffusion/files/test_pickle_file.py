"""Pickles: what is opened, what is refused, and that nothing in one is ever run."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_diffusion as ld
from lora_diffusion.files.pickle_file import PickleFile
from lora_diffusion.files.pickled import read_pickled_adapter

REAL = Path(__file__).parents[4] / "shared" / "data" / "adapters" / "loralib_roberta_base_mnli.bin"
G = torch.Generator().manual_seed(0)


class Call:
    """Pickles to a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def rebuilt(
    source: Path, target: Path, change: Any = lambda name, data: data, method: int = zipfile.ZIP_STORED
) -> Path:
    """The zip `source` again, its entries changed by `change(name, bytes)`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return target


def refused(path: Path, words: str) -> None:
    with pytest.raises(ld.AdapterFormatError, match=words) as caught:
        PickleFile(path)
    assert str(caught.value).isprintable()
    assert str(path) in str(caught.value)


def test_named_tensors(tmp_path: Path) -> None:
    """Names, dtypes and shapes at once, values as they were saved: views, parameters, half precision."""
    base = torch.randn(6, 4, generator=G)
    value = OrderedDict(
        {"m.weight": base.T, "m.half": base[1:3, ::2].half(), "m.bias": torch.nn.Parameter(base[0].clone())}
    )
    source = PickleFile(saved(tmp_path / "a.bin", value))
    assert {name: (info.dtype, info.shape) for name, info in source.tensors.items()} == {
        "m.weight": ("F32", (4, 6)),
        "m.half": ("F16", (2, 2)),
        "m.bias": ("F32", (4,)),
    }
    values = source.read(["m.weight", "m.half", "m.bias"])
    assert all(torch.equal(values[name], value[name]) for name in value)
    assert not any(tensor.requires_grad for tensor in values.values())
    assert values["m.weight"].is_contiguous()


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict"])
def test_nested_with_plain_values(tmp_path: Path, key: str) -> None:
    source = PickleFile(
        saved(tmp_path / "a.ckpt", {key: {"m.x": torch.ones(2)}, "epoch": 3, "name": "dog", "best": None})
    )
    assert list(source.tensors) == ["m.x"]
    assert source.metadata == {"epoch": "3", "name": "dog", "best": "None"}


@pytest.mark.parametrize(
    ("name", "component", "expected"),
    [("a.pt", None, "unet"), ("a.text_encoder.pt", None, "text_encoder"), ("a.pt", "text_encoder", "text_encoder")],
)
def test_bare_lists(tmp_path: Path, name: str, component: str | None, expected: str) -> None:
    path = saved(tmp_path / name, [torch.ones(4, 2), torch.ones(2, 4), torch.ones(4, 2), torch.ones(2, 4)])
    names = list(PickleFile(path, component).tensors)
    assert names == [f"{expected}:0:up", f"{expected}:0:down", f"{expected}:1:up", f"{expected}:1:down"]


def test_words(tmp_path: Path) -> None:
    """A `.ti.pt` of cloneofsimo's, which is a `learned_embeds.bin` of diffusers' too."""
    vector = torch.randn(8, generator=G)
    adapter = read_pickled_adapter(saved(tmp_path / "a.ti.pt", {"<s1>": vector, "sks": vector + 1}))
    assert torch.equal(adapter.tokens["<s1>"]["text_encoder"], vector[None])
    assert torch.equal(adapter.tokens["sks"]["text_encoder"], vector[None] + 1)
    assert adapter.layer_count() == 0
    module = PickleFile(saved(tmp_path / "b.bin", {"bias": vector, "weight": vector}))
    assert module.metadata == {}


def test_code_is_not_run(tmp_path: Path) -> None:
    """A pickle that would create a file: one error, no file; with plain pickle it does create it."""
    proof = tmp_path / "proof"
    evil = Call(os.system, f"touch {proof}")
    for name, value in (("bare.bin", evil), ("inside.bin", {"m.x": torch.ones(2), "m.y": evil})):
        refused(saved(tmp_path / name, value), r"wants to use posix\.system, .* nothing was run")
    (tmp_path / "old.bin").write_bytes(pickle.dumps(evil, protocol=2))
    refused(tmp_path / "old.bin", "before 1.6")
    protocol4 = rebuilt(
        tmp_path / "bare.bin", tmp_path / "new.bin",
        lambda name, data: pickle.dumps(evil, protocol=4) if name.endswith("data.pkl") else data,
    )  # fmt: skip
    refused(protocol4, "STACK_GLOBAL")
    assert not proof.exists()
    pickle.loads((tmp_path / "old.bin").read_bytes())
    assert proof.exists(), "the attack works where it is not stopped"


@pytest.mark.parametrize(
    "value",
    [
        Call(bytearray, 10**13),
        Call(
            torch._utils._rebuild_qtensor,
            None,
            0,
            (10**6,) * 3,
            (1, 1, 1),
            (torch.per_tensor_affine, 1.0, 0),
            False,
            {},
        ),
        Call(print, "hello"),
        torch.nn.Linear(2, 2),
    ],
)
def test_other_objects(tmp_path: Path, value: Any) -> None:
    """Things that torch's own list of harmless names lets allocate as much as they like, and modules saved whole."""
    refused(saved(tmp_path / "a.pt", {"m.x": value}), "wants to use .* nothing was run")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "an empty table"),
        (torch.ones(2), "a Tensor, where named tensors belong"),
        ([], "up, down"),
        ([torch.ones(2, 2)] * 3, "up, down"),
        ([torch.ones(2, 2), 1], "up, down"),
        ({"m.x": torch.ones(2), "lr": 0.1}, "a float under lr"),
        ({"model": {"m.x": torch.ones(2)}, "optimizer": {"state": {}}}, "a dict beside its model"),
        ({"m.x": torch.ones(2, dtype=torch.int64)}, "stores m.x as torch.int64"),
        ({"a\x1b[31m": torch.ones(2)}, "unusable name"),
        ({"a" * 600: torch.ones(2)}, "unusable name"),
        ({3: torch.ones(2)}, "unusable name"),
        ({"m.x": torch.ones(1, 1, 1, 1, 1, 1)}, "unusual form"),
        ({"m.x": torch.zeros(1).expand(10**9)}, "larger than the file"),
        ({"m.x": torch.zeros(1).expand(10**9, 10**9)}, "larger than the file"),
        ({f"m.{n}": torch.zeros(1).expand(2000) for n in range(20)}, "larger than the file"),
    ],
)
def test_refused_contents(tmp_path: Path, value: Any, words: str) -> None:
    refused(saved(tmp_path / "a.bin", value), words)


def test_nan_is_refused_on_read(tmp_path: Path) -> None:
    source = PickleFile(saved(tmp_path / "a.bin", {"m.x": torch.tensor([1.0, float("nan")])}))
    with pytest.raises(ld.AdapterFormatError, match=r"m\.x holds NaN"):
        source.read(["m.x"])


def test_refused_containers(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.bin", {"m.x": torch.arange(3.0)})
    data = good.read_bytes()
    rewritten = rebuilt(good, tmp_path / "rewritten.bin")
    assert torch.equal(PickleFile(rewritten).read(["m.x"])["m.x"], torch.arange(3.0)), "a plain rebuilt zip is fine"

    refused(tmp_path / "absent.bin", "does not exist")
    refused(tmp_path, "no regular file")
    os.mkfifo(tmp_path / "pipe.bin")
    refused(tmp_path / "pipe.bin", "no regular file")
    refused(saved(tmp_path / "old.bin", {"m.x": torch.ones(2)}, _use_new_zipfile_serialization=False), "before 1.6")
    for name, content, words in (
        ("empty.bin", b"", "no zip"),
        ("text.bin", b"hello", "no zip"),
        ("cut.bin", data[:-30], "cut off"),
        ("more.bin", data + b"x", "cut off, or carries something behind"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, words)
    refused(rebuilt(good, tmp_path / "packed.bin", method=zipfile.ZIP_DEFLATED), "compressed")
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as archive:
        archive.writestr("word/document.xml", "x")
    refused(tmp_path / "other.bin", "a zip of something else")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "twice.bin", "w") as archive:
        archive.writestr("archive/data.pkl", "x")
        archive.writestr("archive/data.pkl", "y")
    refused(tmp_path / "twice.bin", "twice")


def test_entries_that_overlap(tmp_path: Path) -> None:
    """The directory of a zip bomb: many entries over the same bytes."""
    path = tmp_path / "bomb.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", "x" * 1000)
        for n in range(9):
            info = zipfile.ZipInfo(f"archive/data/{n}")
            info.header_offset, info.file_size, info.compress_size, info.CRC = 0, 1000, 1000, 0
            archive.filelist.append(info)
            archive.NameToInfo[info.filename] = info
        archive._didModify = True
    refused(path, "claim to be larger than the file")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x03tq\x07Q", b"J\xff\xff\xff\x7ftq\x07Q"),  # a storage of 2 ** 31 - 1 numbers, with 3 in the file
        (b"QK\x00K\x03\x85", b"QK\x00J\xff\xff\xff\x7f\x85"),  # a tensor of as many
        (b"QK\x00K\x03\x85", b"QJ\xff\xff\xff\x7fK\x03\x85"),  # a tensor that starts behind the end
        (b"QK\x00K\x03\x85", b"QJ\xff\xff\xff\xffK\x03\x85"),  # … or before the beginning
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009"),  # a storage that is not there
        (b"\x80\x02}", b"\x80\x02\xff}"),  # an instruction that does not exist
        (b"}q\x00", b"}q\x00R"),  # a call of nothing
    ],
)
def test_broken_pickles(tmp_path: Path, old: bytes, new: bytes) -> None:
    """Claims that the file does not keep end in one error, not in memory that is not ours."""
    good = saved(tmp_path / "good.bin", {"m.x": torch.arange(3.0)})

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        assert data.count(old) == 1, "the bytes to change are where they are thought to be"
        return data.replace(old, new)

    path = rebuilt(good, tmp_path / "broken.bin", change)
    if b"tq" in old:  # the claim about the storage alone is harmless: the tensor in it is as large as it was
        assert torch.equal(PickleFile(path).read(["m.x"])["m.x"], torch.arange(3.0))
    else:
        refused(path, "damaged")


def test_options(tmp_path: Path) -> None:
    """alpha goes to loralib's files only, and components are two."""
    path = saved(tmp_path / "a.ti.pt", {"<s1>": torch.ones(8)})
    with pytest.raises(ld.ConfigError, match="scales of its own"):
        read_pickled_adapter(path, alpha=8)
    with pytest.raises(ld.ConfigError, match="'unet' or 'text_encoder'"):
        read_pickled_adapter(path, component="vae")
    with pytest.raises(ld.AdapterFormatError, match="a pickle by its name"):
        ld.read_adapter(path)


def test_a_file_saved_on_cuda() -> None:
    if not REAL.exists():
        pytest.skip("the real adapters are not here")
    with zipfile.ZipFile(REAL) as archive:
        assert b"cuda:0" in archive.read("archive/data.pkl")
    source = PickleFile(REAL)
    values = source.read(list(source.tensors))
    assert len(values) == 52
    assert {value.device.type for value in values.values()} == {"cpu"}
