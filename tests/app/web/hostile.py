"""Hostile inputs, and what the app does with each: `python -m tests.app.web.hostile` writes `docs/hostile.md`.

Each case is put to a fresh workspace. A case that is refused has to be so by an error that is meant for people; where
something is taken, the case says what was made of it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from app.web.job_checks import checked
from app.web.library import Library
from app.web.limits import PUBLIC, Limits
from app.web.places import Workspace
from app.web.uploads import check_photos, write_captions
from lora_diffusion.errors import LoraDiffusionError

DOCS = Path(__file__).parents[3] / "docs" / "hostile.md"
SCRIPT = "<script>alert(1)</script>"
LONG = "x" * 10_000


@dataclass
class Room:
    """A workspace and, beside it, a place where the attacker's files lie."""

    root: Path

    def __post_init__(self) -> None:
        self.files, self.workspace = self.root / "files", Workspace(self.root / "app")
        self.files.mkdir()
        self.library = Library(self.workspace, Limits())

    def file(self, name: str, content: bytes = b"") -> Path:
        path = self.files / name
        path.write_bytes(content)
        return path

    def sparse(self, name: str, size: int) -> Path:
        """A file of `size` bytes that takes no room."""
        path = self.file(name)
        os.truncate(path, size)
        return path

    def link(self, name: str, to: str | Path) -> Path:
        path = self.files / name
        path.symlink_to(to)
        return path

    def pipe(self, name: str) -> Path:
        os.mkfifo(self.files / name)
        return self.files / name


@dataclass(frozen=True)
class Case:
    """One input. `refused`: what has to become of it. `send` returns what was made of it, in words."""

    where: str
    what: str
    refused: bool
    send: Callable[[Room], str]


class Refused(Exception):
    """A file that a report says is not taken."""


def outcome(case: Case, room: Room) -> tuple[bool, str]:
    """(whether it was refused, the words)."""
    try:
        return False, case.send(room)
    except (LoraDiffusionError, Refused) as problem:
        return True, str(problem)


# Photos


def photo(path: str | Path, limits: Limits | None = None) -> Callable[[Room], str]:
    return lambda room: _photo(room, path, limits)


def _photo(room: Room, path: str | Path, limits: Limits | None = None) -> str:
    report = check_photos([path], 64, limits or Limits(), room.workspace)
    for name, reason in report.refused:
        raise Refused(f"{name}: {reason}")
    (kept,) = report.kept
    said = "".join(f"; {warning}" for warning in kept.warnings)
    return f"taken: {kept.width}×{kept.height} pixels as {kept.path.name}{said}"


def made(name: str, content: bytes) -> Callable[[Room], str]:
    return lambda room: _photo(room, room.file(name, content))


def encoded(format: str, image: Image.Image | None = None, **settings: Any) -> bytes:
    stream = io.BytesIO()
    (image or Image.effect_noise((96, 96), 90).convert("RGB")).save(stream, format, **settings)
    return stream.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says it is of this size; its pixels are not there."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks, (b"IDAT", zlib.compress(b""))]
    body = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in [*parts, (b"IEND", b"")]]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def zip_bomb() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", b"\0" * 50_000_000)
    return stream.getvalue()


def text_bomb() -> bytes:
    return png(96, 96, (b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 50_000_000)))


def gps() -> bytes:
    exif = Image.Exif()
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)
    return encoded("JPEG", exif=exif)


def many_photos(room: Room) -> str:
    paths = [room.file(f"{number}.png", encoded("PNG")) for number in range(3)]
    report = check_photos(paths, 64, dataclasses.replace(Limits(), images=2), room.workspace)
    raise Refused(f"{len(report.kept)} are taken, {report.refused[0][0]}: {report.refused[0][1]}")


def caption(name: str, text: str) -> Callable[[Room], str]:
    def send(room: Room) -> str:
        report = check_photos([room.file("dog.png", encoded("PNG"))], 64, Limits(), room.workspace)
        assert report.folder is not None
        write_captions(report.folder, {name or report.kept[0].path.name: text})
        return f"taken as the text {report.kept[0].path.with_suffix('.txt').read_text().strip()!a}"

    return send


def caption_file(content: bytes, size: int = 0) -> Callable[[Room], str]:
    def send(room: Room) -> str:
        text = room.file("dog.txt", content)
        os.truncate(text, size or len(content))
        report = check_photos([room.file("dog.png", encoded("PNG")), text], 64, Limits(), room.workspace)
        raise Refused(next(warning for warning in report.warnings if "not used" in warning))

    return send


PHOTOS = [
    ("a path that climbs, ../../etc/passwd", True, photo("../../../../../../etc/passwd")),
    ("an absolute path, /etc/passwd", True, photo("/etc/passwd")),
    ("a device, /dev/zero", True, photo("/dev/zero")),
    ("a name with NUL in it", True, photo("dog\0.png")),
    ("a name of 10,000 characters", True, photo(LONG + ".png")),
    ("an address of the web", True, photo("http://169.254.169.254/latest/meta-data")),
    ("a link to /etc/passwd, named dog.png", True, lambda room: _photo(room, room.link("dog.png", "/etc/passwd"))),
    ("a link to a photo elsewhere", True,
     lambda room: _photo(room, room.link("dog.png", room.file("own.png", encoded("PNG"))))),
    ("a pipe, which nobody writes to", True, lambda room: _photo(room, room.pipe("dog.png"))),
    ("a folder, named dog.png", True, lambda room: _photo(room, room.files)),
    ("a name that is HTML", False, made("<img src=x onerror=alert(1)>.png", encoded("PNG"))),
    ("a name with control characters and text from right to left", False,
     made("a\x1b[31m\u202egnp.exe\n.png", encoded("PNG"))),
    ("a PNG of 30,000×30,000 pixels, 100 bytes long", True, made("dog.png", png(30_000, 30_000))),
    ("a PNG of 2,147,483,647 pixels a side", True, made("dog.png", png(2**31 - 1, 2**31 - 1))),
    ("a strip of 1,000,000×8 pixels", True, made("dog.png", png(1_000_000, 8))),
    ("a PNG without pixels", True, made("dog.png", png(96, 96))),
    ("a PNG of one pixel", True, made("dog.png", encoded("PNG", Image.new("RGB", (1, 1))))),
    ("a PNG whose comment unpacks to 50 MB", True, lambda room: _photo(room, room.file("dog.png", text_bomb()))),
    ("a photo with the place where it was taken", False, lambda room: _photo(room, room.file("dog.jpg", gps()))),
    ("an animated GIF", False, made("dog.gif", encoded(
        "GIF", Image.new("P", (96, 96)), save_all=True, append_images=[Image.new("P", (96, 96), n) for n in range(1, 9)]
    ))),
    ("a TIFF of NaN", False, made("dog.tif", encoded("TIFF", Image.fromarray(np.full((96, 96), np.nan, np.float32))))),
    ("a video, named dog.jpg", True, made("dog.jpg", b"\0\0\0\x20ftypisom" + b"\0" * 5000)),
    ("a video, named dog.mp4", True, made("dog.mp4", b"\0\0\0\x20ftypisom" + b"\0" * 5000)),
    ("an SVG with a script in it", True, made("dog.svg", f"<svg>{SCRIPT}</svg>".encode())),
    ("an SVG, named dog.png", True, made("dog.png", f"<svg>{SCRIPT}</svg>".encode())),
    ("PostScript, which other programs run, named dog.jpg", True,
     made("dog.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 96\n(%pipe%id) (w) file\n")),
    ("a zip bomb, named dog.png", True, lambda room: _photo(room, room.file("dog.png", zip_bomb()))),
    ("half a JPEG", True, lambda room: _photo(room, room.file("dog.jpg", encoded("JPEG")[:1500]))),
    ("an empty file", True, made("dog.png", b"")),
    ("a file of 10 GB", True, lambda room: _photo(room, room.sparse("dog.png", 10**10))),
    ("more photos than are allowed", True, many_photos),
    ("a caption for a file elsewhere, ../../x.png", True, caption("../../x.png", "a dog")),
    ("a caption of 10,000 characters", True, caption("", LONG)),
    ("a caption with a script and control characters", False, caption("", f"{SCRIPT}\0\x1b[31m\r\ndog")),
    ("a caption file of 10 GB", True, caption_file(b"a dog", 10**10)),
    ("a caption file that is no text", True, caption_file(b"\xff\xfe\x00\x01")),
]  # fmt: skip


# Adapter files


def tensors(**named: torch.Tensor) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    header, data = {}, b""
    words = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
    for name, value in named.items():
        raw = value.contiguous().numpy().tobytes()
        header[name] = {"dtype": words[value.dtype], "shape": list(value.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}  # fmt: skip
        data += raw
    return header, data


def container(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


A, B = "unet.mid_block.to_q.lora_A.weight", "unet.mid_block.to_q.lora_B.weight"
PAIR = {A: torch.ones(2, 8), B: torch.ones(6, 2)}


def sound(metadata: dict[str, Any] | None = None) -> bytes:
    header, data = tensors(**PAIR)
    return container({"__metadata__": {key: str(value) for key, value in (metadata or {}).items()}, **header}, data)


def own(**metadata: Any) -> bytes:
    return sound({"lora_diffusion": json.dumps({"version": 1, "metadata": metadata})})


def changed(**fields: Any) -> bytes:
    """A file whose first tensor has another entry in the header."""
    header, data = tensors(**PAIR)
    header[A] = {**header[A], **fields}
    return container(header, data)


def adapter(content: bytes, file: str = "dog.safetensors", **settings: Any) -> Callable[[Room], str]:
    return lambda room: _import(room, room.file(file, content), **settings)


def _import(room: Room, path: str | Path, **settings: Any) -> str:
    record, report = room.library.import_file(path, **settings)
    shown = [("made for", record.base), ("in the prompt", ", ".join(record.trigger_words)), ("steps", record.steps)]
    parts = "".join(f"; {name} {str(value)[:60]!a}" for name, value in shown if value)
    notes = "".join(f"; note: {note}" for note in record.notes)
    assert all(line.isprintable() and len(line) <= 400 for line in report.split("\n"))
    return f"taken as {record.id}, rank {record.rank}{parts}{notes}"


class Malicious:
    """A pickle that leaves a trace when it is opened."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(tempfile.gettempdir()) / "a-pickle-was-run"),)


def archive() -> bytes:
    stream = io.BytesIO()
    torch.save({"x": torch.ones(2)}, stream)
    return stream.getvalue()


def kronecker() -> bytes:
    """A few kilobytes for a weight of 2³⁰ numbers."""
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    header, data = tensors(**{
        f"{layer}.lokr_w1": torch.ones(32, 32), f"{layer}.lokr_w2_a": torch.ones(1024, 1),
        f"{layer}.lokr_w2_b": torch.ones(1, 1024), f"{layer}.alpha": torch.tensor(1.0),
    })  # fmt: skip
    return container(header, data)


def many_tensors() -> bytes:
    one = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return container({f"unet.{number}": one for number in range(60_000)})


def foreign_model(room: Room) -> str:
    record, _ = Library(room.workspace, PUBLIC).import_file(
        room.file("dog.safetensors", sound()), model="/etc", owner="anna"
    )
    return record.id


NAMES = {
    "../../evil": "../../evil", "/etc/cron.d/evil": "/etc/cron.d/evil", "..": "..", ".hidden": ".hidden",
    "with NUL in it": "a\0b", "of 10,000 characters": LONG, "con, a device of Windows": "con", "$(id)": "$(id)",
    "that is a script": SCRIPT,
}  # fmt: skip
ADAPTERS = [
    *((f"the name {shown}", True, adapter(sound(), name=name)) for shown, name in NAMES.items()),
    ("a name that is taken", True, lambda room: _import(room, _import(room, room.file("dog.safetensors", sound()))
                                                        and room.files / "dog.safetensors", name="DOG")),
    ("a path that climbs, ../../etc/passwd", True, lambda room: _import(room, "../../../../../../etc/passwd")),
    ("an address of the web", True, lambda room: _import(room, "https://example.org/dog.safetensors")),
    ("a link to /etc/passwd", True, lambda room: _import(room, room.link("dog.safetensors", "/etc/passwd"))),
    ("a pipe, which nobody writes to", True, lambda room: _import(room, room.pipe("dog.safetensors"))),
    ("a folder", True, lambda room: _import(room, room.workspace.root / "adapters.safetensors")),
    ("a pickle that runs a command, evil.pt", True, adapter(pickle.dumps(Malicious()), "evil.pt")),
    ("the same, named evil.safetensors", True, adapter(pickle.dumps(Malicious()), "evil.safetensors")),
    ("a file of torch.save, named dog.safetensors", True, adapter(archive())),
    ("a zip bomb, named dog.safetensors", True, lambda room: _import(room, room.file("dog.safetensors", zip_bomb()))),
    ("another kind of file, dog.gguf", True, adapter(b"GGUF" + bytes(100), "dog.gguf")),
    ("an empty file", True, adapter(b"")),
    ("a file of 10 GB", True, lambda room: _import(room, room.sparse("dog.safetensors", 10**10))),
    ("a header that says it has 2⁶³ bytes", True, adapter(container({}, length=2**63))),
    ("a header of 17 MB", True, adapter(container(b"{" + b" " * 17 * 2**20 + b"}"))),
    ("a header of 100,000 brackets", True, adapter(container(b"[" * 100_000 + b"]" * 100_000))),
    ("a header with a number of 100,000 digits", True, adapter(changed(data_offsets=[0, 1]).replace(
        b"[0, 1]", b"[0, " + b"9" * 100_000 + b"]"))),
    ("a header that is no JSON", True, adapter(container(b"\xff\xfe{}"))),
    ("60,000 tensors", True, lambda room: _import(room, room.file("dog.safetensors", many_tensors()))),
    ("a shape of 10¹² numbers", True, adapter(changed(shape=[10**6, 10**6]))),
    ("a shape of 10¹² numbers, with offsets to match", True,
     adapter(changed(shape=[10**6, 10**6], data_offsets=[0, 4 * 10**12]))),
    ("a shape with a negative side", True, adapter(changed(shape=[-2, -8]))),
    ("a shape of fractions", True, adapter(changed(shape=[2.5, 8]))),
    ("tensors that overlap", True, adapter(changed(data_offsets=[16, 80]))),
    ("a tensor of a kind that does not exist", True, adapter(changed(dtype="X99"))),
    ("a tensor named ../../evil", True, adapter(container(*tensors(**{"../../evil": torch.ones(2)})))),
    ("a tensor's name with control characters", True, adapter(container(*tensors(**{"a\x1b[31m": torch.ones(2)})))),
    ("NaN", True, adapter(container(*tensors(**{**PAIR, A: torch.full((2, 8), torch.nan)})))),
    ("infinity", True, adapter(container(*tensors(**{**PAIR, A: torch.full((2, 8), torch.inf)})))),
    ("halves that do not fit each other", True, adapter(container(*tensors(**{**PAIR, B: torch.ones(6, 3)})))),
    ("half of a pair", True, adapter(container(*tensors(**{A: torch.ones(2, 8)})))),
    ("a few kilobytes for a weight of 2³⁰ numbers (LoKr)", True, adapter(kronecker())),
    ("a checkpoint of something else", True, adapter(container(*tensors(**{"model.weight": torch.ones(8, 8)})))),
    ("a script as its base model and trigger word", False, adapter(own(base_model=SCRIPT, trigger_words=[SCRIPT]))),
    ("control characters as its base model", False, adapter(own(base_model="a\x1b[2J\u202e\r\nb"))),
    ("a base model that is no text, and 10²⁰⁰ steps", False, adapter(own(base_model={"a": [1]}, steps=10**200))),
    ("100,000 trigger words of 100 characters", False,
     lambda room: _import(room, room.file("dog.safetensors", own(trigger_words=[f"{n:0>100}" for n in range(10**5)])))),
    ("a description of its own that is no table", False, adapter(sound({"lora_diffusion": "[" * 50_000}))),
    ("tags of kohya's that are no table", False, adapter(sound({"ss_tag_frequency": '{"a": {"b": {"c": NaN}}}'}))),
    ("a folder of the server's as the model to compare with, on a page for all", True, foreign_model),
]  # fmt: skip


# The library


def library(call: Callable[[Library], Any]) -> Callable[[Room], str]:
    """A call to a library with the adapter `dog`."""

    def send(room: Room) -> str:
        room.library.import_file(room.file("dog.safetensors", sound()), "dog")
        return f"{call(room.library)}"

    return send


def planted(room: Room) -> str:
    """Links that somebody has put into the workspace."""
    (room.workspace.adapters / "a.safetensors").symlink_to("/etc/passwd")
    (room.workspace.adapters / "b.safetensors").symlink_to(room.file("own.safetensors", sound()))
    (room.workspace.runs / "c").symlink_to(room.files)
    raise Refused(f"not shown: {len(room.library.records())} of 3 adapters")


def deleted_twice(room: Room) -> str:
    room.library.import_file(room.file("dog.safetensors", sound()), "dog")
    token = room.library.delete("dog")
    room.library.undo(token)
    return ", ".join(room.library.undo(token))


LIBRARY = [
    *((f"the adapter {shown}", True, library(lambda one, id=id: one.record(id))) for shown, id in (
        ("../../etc/passwd", "../../etc/passwd"), ("runs/../../x", "runs/../../x"), ("with NUL in it", "a\0b"),
        ("of 10,000 characters", LONG), ("that is no text", {"a": 1}),
    )),
    ("a new name, ../../evil", True, library(lambda one: one.rename("dog", "../../evil"))),
    ("a new name of 10,000 characters", True, library(lambda one: one.rename("dog", LONG))),
    ("links to other files, planted in the folder", True, planted),
    ("a run to add, ../../etc", True, library(lambda one: one.add_run("../../etc"))),
    ("a sum of one million adapters", True, library(lambda one: one.combine(["dog"] * 17, [1.0] * 17))),
    ("a weight that is NaN", True, library(lambda one: one.combine(["dog", "dog"], [1.0, float("nan")]))),
    ("a weight of 10³⁰⁰", True, library(lambda one: one.combine(["dog", "dog"], [1.0, 1e300]))),
    ("a rank of 10¹²", True, library(lambda one: one.resize("dog", 10**12))),
    ("a rank of -1", True, library(lambda one: one.resize("dog", -1))),
    ("a share of NaN", True, library(lambda one: one.resize("dog", energy=float("nan")))),
    ("the format ../../evil", True, library(lambda one: one.convert("dog", "../../evil"))),
    ("the repository ../../x", True, library(lambda one: one.push("dog", "../../x", "hf_x"))),
    ("the repository https://evil.example/x", True,
     library(lambda one: one.push("dog", "https://evil.example/x", "hf_x"))),
    ("a token with a line break in it", True, library(lambda one: one.push("dog", "me/dog", "hf_x\r\nHost: evil"))),
    ("undo of ../adapters", True, library(lambda one: one.undo("../adapters"))),
    ("undo of one deletion twice", True, deleted_twice),
]  # fmt: skip


# Settings of a training, from a page that anybody can open


def settings(recipe: str = "dreambooth", **changes: Any) -> Callable[[Room], str]:
    def send(room: Room) -> str:
        report = check_photos([room.file("dog.png", encoded("PNG"))], 64, PUBLIC, room.workspace)
        base = {"pretrained_model_name_or_path": "pocket", "instance_data_dir": str(report.folder),
                "instance_prompt": "a photo of sks dog", "max_train_steps": 10}  # fmt: skip
        values = checked(recipe, {**base, **changes}, room.workspace, PUBLIC)
        return f"taken: {', '.join(f'{name} {values[name]!a}' for name in changes if name in values) or 'and left out'}"

    return send


SETTINGS = [
    ("10¹⁸ steps", True, settings(max_train_steps=10**18)),
    ("a number of 10,000 digits", True, settings(max_train_steps=10**9999)),
    ("-1 steps", True, settings(max_train_steps=-1)),
    ("a learning rate of NaN", True, settings(learning_rate=float("nan"))),
    ("a learning rate of infinity", True, settings(learning_rate=float("inf"))),
    ("a rank of 10⁹", True, settings(rank=10**9)),
    ("pictures of 10⁶ pixels a side", True, settings(resolution=10**6)),
    ("a prompt of 100,000 characters", True, settings(instance_prompt="x" * 100_000)),
    ("a prompt with NUL in it", True, settings(instance_prompt="a\0b")),
    ("photos in /etc", True, settings(instance_data_dir="/etc")),
    ("photos in uploads/../../..", True, settings(instance_data_dir="uploads/../../../etc")),
    ("a model of somebody's", True, settings(pretrained_model_name_or_path="evil/model")),
    ("a regex that takes for ever", True, settings(target_modules="(a+)+$")),
    ("an upload to the hub", True, settings(push_to_hub=True)),
    ("a setting that does not exist", True, settings(__class__="x")),
    ("a recipe that does not exist", True, settings(recipe="os.system")),
]  # fmt: skip

TABLES = {"Photos": PHOTOS, "Adapter files": ADAPTERS, "The library": LIBRARY, "Settings of a training": SETTINGS}
CASES = [Case(where, *case) for where, cases in TABLES.items() for case in cases]
_HEAD = """# Hostile inputs

What the app is sent here, and what it does with it. `tests/app/web/test_hostile.py` sends all of it again, and looks
that nothing is written outside the app's folder, nothing of the server is told, and nothing takes long or much memory.
`python -m tests.app.web.hostile` writes this page.
"""


def row(case: Case, refused: bool, said: str) -> str:
    said = said if len(said) <= 220 else said[:219] + "…"
    cells = (case.what, "refused" if refused else "taken", said.removeprefix("taken: ").removeprefix("taken "))
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def page() -> str:
    lines = [_HEAD]
    for where in TABLES:
        lines += [f"## {where}", "", "| sent | got | in words |", "|---|---|---|"]
        for case in (one for one in CASES if one.where == where):
            with tempfile.TemporaryDirectory() as place:
                lines.append(row(case, *outcome(case, Room(Path(place)))))
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    DOCS.write_text(page(), encoding="utf-8")
