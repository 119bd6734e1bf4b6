"""The library: what is on disk is on the page, nothing is written over, what is deleted comes back."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import lora_diffusion as ld
from app.web import adapter_memory
from app.web.adapter_facts import facts_of, header_facts
from app.web.library import Library
from app.web.limits import PUBLIC, Limits
from app.web.places import Workspace
from lora_diffusion.adapter import Prompt
from lora_diffusion.errors import AdapterFormatError, AdapterMismatchError, ConfigError, LoraDiffusionError

REAL = Path(__file__).parents[3].parent / "shared" / "data" / "adapters"
LIMITS = Limits()
Make = Callable[..., Path]


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(Workspace(tmp_path / "app"), LIMITS)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make("dog")` → a file beside the workspace with an adapter of rank 4."""

    def call(name: str = "dog", seed: int = 0, component: str = "unet", r: int = 4, **metadata: Any) -> Path:
        draw = torch.Generator().manual_seed(seed)
        layers = {
            f"down_blocks.0.attentions.{n}.to_q": ld.LowRank(
                torch.randn(r, 8, generator=draw), torch.randn(6, r, generator=draw)
            )
            for n in range(2)
        }
        if component == "model":
            layers = {f"transformer.h.{n}.attn": layer for n, layer in enumerate(layers.values())}
        path = tmp_path / f"{name}.safetensors"
        told = {"base_model": "pocket", "trigger_words": ["sks"], "steps": 300, **metadata}
        ld.write_adapter(ld.Adapter({component: layers}), path, metadata=told)
        return path

    return call


@pytest.fixture
def run_folder(library: Library, make: Make) -> Path:
    """A finished run with two previews."""
    folder = library.workspace.runs / "first-run"
    (folder / "samples").mkdir(parents=True)
    shutil.copy(make("learned", 5), folder / "adapter.safetensors")
    for name, colour in (("step-000100-0", "red"), ("step-000200-0", "green"), ("step-000200-1", "blue")):
        Image.new("RGB", (8, 8), colour).save(folder / "samples" / f"{name}.png")
    return folder


class TestRecords:
    def test_an_empty_library(self, library: Library) -> None:
        assert library.records() == []

    def test_what_a_card_shows(self, library: Library, make: Make) -> None:
        record, _ = library.import_file(make(), "dog")
        assert library.records() == [record] == [library.record("dog")]
        assert (record.id, record.name, record.kind, record.base) == ("dog", "dog", "pictures", "pocket")
        assert (record.trigger_words, record.rank, record.steps, record.parts) == (("sks",), 4, 300, ("unet",))
        assert (record.intact, record.hash_state, record.problem) == (True, "intact", None)
        assert record.size_bytes == record.path.stat().st_size and abs(record.made - time.time()) < 60

    def test_text(self, library: Library, make: Make) -> None:
        record, report = library.import_file(make(component="model"), model="pocket-bert")
        assert (record.kind, record.parts, record.methods) == ("text", ("model",), ("LoRA",))
        assert "on pocket-bert: it does not fit, 0 of 2 layers" in report

    def test_other_methods(self, library: Library, tmp_path: Path) -> None:
        prompt = Prompt("P_TUNING", torch.ones(4, 8), {"base_model_name_or_path": "somebody/gpt"})
        ld.write_adapter(ld.Adapter({}, prompts={"model": prompt}), tmp_path / "folder", "peft")
        with pytest.raises(AdapterFormatError, match=r"make one file of the whole folder with `lora-diffusion convert"):
            library.import_file(tmp_path / "folder" / "adapter_model.safetensors")
        path = tmp_path / "word.safetensors"
        ld.write_adapter(ld.Adapter({}, tokens={"<s>": {"text_encoder": torch.ones(1, 8)}}), path)
        record, report = library.import_file(path)
        assert (record.kind, record.trigger_words, record.methods) == ("pictures", ("<s>",), ("word",))
        assert "word: <s>" in report

    def test_a_changed_file(self, library: Library, make: Make) -> None:
        record, _ = library.import_file(make(), "dog")
        data = bytearray(record.path.read_bytes())
        data[-3] ^= 1
        record.path.write_bytes(data)
        os.utime(record.path, ns=(1, 1))
        record = library.record("dog")
        assert record.intact is False and "changed" in record.hash_state

    def test_a_broken_file_is_shown_as_that(self, library: Library) -> None:
        (library.workspace.adapters / "junk.safetensors").write_bytes(b"\0" * 100)
        (record,) = library.records()
        assert record.problem is not None and record.hash_state == "cannot be read"
        assert str(library.workspace.root) not in record.problem

    def test_runs(self, library: Library, run_folder: Path) -> None:
        (record,) = library.records()
        assert (record.id, record.name, record.run, record.steps) == ("runs/first-run", "first-run", "first-run", 300)
        assert record.preview == run_folder / "samples" / "step-000200-0.png"
        (library.workspace.runs / "unfinished").mkdir()
        assert len(library.records()) == 1

    def test_two_hundred_in_a_second(self, library: Library, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        source = make(settings={"note": "x" * 5000})
        for number in range(200):
            os.link(source, library.workspace.adapters / f"dog-{number:03}.safetensors")
        start = time.monotonic()
        assert len(library.records()) == 200
        assert time.monotonic() - start < 1
        while any(one.hash_state == "not checked yet" for one in library.records()):
            assert time.monotonic() - start < 30
        monkeypatch.setattr(adapter_memory, "header_facts", None)  # from now on nothing is read again
        monkeypatch.setattr(adapter_memory, "verified", None)
        start = time.monotonic()
        records = library.records()
        assert time.monotonic() - start < 0.5
        assert {(one.intact, one.rank) for one in records} == {(True, 4)}
        assert Library(library.workspace, LIMITS).records() == records  # a new start knows it, too
        (library.workspace.adapters / ".seen.json").write_text('{"fields": 1, "files": []}')
        assert len(Library(library.workspace, LIMITS).records(seconds=0)) == 200

    def test_time_is_limited_and_nothing_is_lost(
        self, library: Library, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(4):
            shutil.copy(make(), library.workspace.adapters / f"dog-{number}.safetensors")

        def slow(path: Path) -> Any:
            time.sleep(0.1)
            return header_facts(path)

        monkeypatch.setattr(adapter_memory, "header_facts", slow)
        first = library.records(seconds=0.15)
        assert [one.rank for one in first].count(None) == 2
        assert any("not read yet" in one.notes[0] for one in first if one.rank is None)
        assert [one.rank for one in library.records(seconds=5)] == [4] * 4

    @pytest.mark.skipif(not REAL.is_dir(), reason="the real adapters are not here")
    def test_headers_tell_what_whole_files_do(self) -> None:
        for path in sorted(REAL.rglob("*.safetensors")):
            whole = facts_of(ld.read_adapter(path))
            assert dataclasses.replace(header_facts(path), hashed=False) == whole
            assert whole.rank and whole.kind == ("text" if "gpt2" in str(path) else "pictures")

    def test_links_are_no_adapters(self, library: Library, make: Make) -> None:
        (library.workspace.adapters / "link.safetensors").symlink_to(make())
        folder = make().parent / "elsewhere"
        folder.mkdir()
        shutil.copy(make(), folder / "adapter.safetensors")
        (library.workspace.runs / "link").symlink_to(folder)
        (library.workspace.runs / "run").mkdir()
        (library.workspace.runs / "run" / "adapter.safetensors").symlink_to(make())
        assert library.records() == []

    @pytest.mark.parametrize("id", ["", "..", "../x", "/etc/passwd", "runs/../x", "a\0b", "x" * 10_000, None, 3])
    def test_ids_are_looked_up(self, id: Any, library: Library, make: Make) -> None:
        library.import_file(make(), "dog")
        with pytest.raises(ConfigError, match="there is no adapter") as caught:
            library.record(id)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 200


class TestImport:
    def test_the_report(self, library: Library, make: Make) -> None:
        _, report = library.import_file(make(), "dog")
        for words in ("2 layers in the dialect diffusers", "unet: 2 layers, rank 4", "made for pocket",
                      "in the prompt: sks", "hash intact"):  # fmt: skip
            assert words in report

    def test_against_a_model(self, library: Library, make: Make, tiny_pipeline: Any, tiny_pipeline_dir: Path) -> None:
        ld.add_adapter(tiny_pipeline, ld.LoraConfig(r=4, init_lora_weights=False), "a", components=("unet",))
        path = make().parent / "fits.safetensors"
        ld.save_adapter(tiny_pipeline, path, "a")
        _, report = library.import_file(path, model=str(tiny_pipeline_dir))
        assert "every layer fits, 32 of 32 layers" in report and "the base in hand" in report
        _, report = library.import_file(path, model="pocket")
        assert "on pocket: it does not fit, 0 of 32 layers" in report
        _, report = library.import_file(path, model="/nowhere/secret")
        assert "cannot be said before that model is here" in report

    def test_a_file_does_not_choose_what_is_opened(self, library: Library, make: Make, tmp_path: Path) -> None:
        for number, base in enumerate(("/etc", str(tmp_path), "..", "a/../../b")):
            record, _ = library.import_file(make(f"a{number}", base_model=base))
            assert "on " not in library.report(record.id)
        record, _ = library.import_file(make())
        assert "on pocket: it does not fit, 0 of 2 layers" in library.report(record.id)
        assert "cannot be said" in library.report(record.id, str(tmp_path))

    def test_names(self, library: Library, make: Make) -> None:
        path = make("My dog (v2)!")
        assert [library.import_file(path)[0].id for _ in range(3)] == ["My-dog-v2", "My-dog-v2-2", "My-dog-v2-3"]
        with pytest.raises(ConfigError, match="already"):
            library.import_file(path, "my-DOG-v2")
        with pytest.raises(ConfigError, match="at most 52"):
            library.import_file(path, "x" * 60)
        before = sorted(library.workspace.root.rglob("*"))
        for name in ("../out", "a/b", ".hidden", "a\0b", "con", "x" * 10_000):
            with pytest.raises(ConfigError):
                library.import_file(path, name)
        assert sorted(library.workspace.root.rglob("*")) == before

    def test_pickles(self, library: Library, tmp_path: Path) -> None:
        for name in ("a.bin", "a.pt", "a.ckpt", "b.safetensors"):
            torch.save({"x": torch.ones(2)}, tmp_path / name)
            with pytest.raises(AdapterFormatError, match=r"run its author's code.*`lora-diffusion convert`"):
                library.import_file(tmp_path / name)
        assert list(library.workspace.adapters.iterdir()) == []

    def test_a_failure_leaves_nothing(self, library: Library, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        small = Library(library.workspace, dataclasses.replace(LIMITS, adapter_bytes=100))
        with pytest.raises(AdapterFormatError, match="the limit is"):
            small.import_file(make())
        path = make()
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(AdapterFormatError, match=r"dog\.safetensors is cut off") as caught:
            library.import_file(path)
        assert str(library.workspace.root) not in str(caught.value) and ".new-" not in str(caught.value)
        assert list(library.workspace.adapters.iterdir()) == []

    def test_at_once(self, library: Library, make: Make) -> None:
        path = make()
        threads = [threading.Thread(target=library.import_file, args=(path,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {one.id for one in library.records()} == {"dog", *(f"dog-{n}" for n in range(2, 9))}

    @pytest.mark.skipif(not REAL.is_dir(), reason="the real adapters are not here")
    def test_real_files(self, library: Library) -> None:
        for path in sorted(REAL.glob("*.safetensors")):
            record, report = library.import_file(path)
            assert record.kind == "pictures" and record.rank == 4 and "unet: " in report


class TestChanges:
    def test_rename(self, library: Library, make: Make) -> None:
        record, _ = library.import_file(make(), "dog")
        Image.new("RGB", (2000, 1000)).save(make().parent / "a.png")
        library.set_preview("dog", make().parent / "a.png")
        renamed = library.rename("dog", "Dog")
        assert (renamed.id, renamed.made, [one.id for one in library.records()]) == ("Dog", record.made, ["Dog"])
        assert renamed.preview is not None and Image.open(renamed.preview).size == (512, 256)
        library.import_file(make(), "cat")
        with pytest.raises(ConfigError, match="already"):
            library.rename("Dog", "cat")
        with pytest.raises(ConfigError):
            library.rename("Dog", "../dog")

    def test_add_run(self, library: Library, run_folder: Path) -> None:
        record = library.add_run(run_folder)
        assert (record.id, record.run) == ("first-run", "first-run") and record.preview is not None
        assert [one.id for one in library.records()] == ["first-run"]
        assert library.add_run("first-run").id == "first-run" and library.add_run("first-run", "dog").id == "dog"
        assert [one.id for one in library.records()] == ["dog"]
        os.utime(run_folder / "adapter.safetensors", ns=(5, 5))  # the run went on
        assert {one.id for one in library.records()} == {"dog", "runs/first-run"}
        shutil.rmtree(run_folder)
        assert [one.id for one in library.records()] == ["dog"] and library.record("dog").intact

    def test_renaming_a_run_adds_it(self, library: Library, run_folder: Path) -> None:
        assert library.rename("runs/first-run", "dog").id == "dog"
        assert [one.id for one in library.records()] == ["dog"] and (run_folder / "adapter.safetensors").exists()

    def test_delete_and_undo(self, library: Library, make: Make, run_folder: Path) -> None:
        library.import_file(make(), "dog")
        library.add_run(run_folder)
        before = {one.id: one.path.read_bytes() for one in library.records()}
        tokens = [library.delete("dog"), library.delete("first-run")]
        assert library.records() == []
        assert [library.undo(token) for token in tokens] == [["dog"], ["first-run"]]
        assert {one.id: one.path.read_bytes() for one in library.records()} == before
        assert (run_folder / "adapter.safetensors").is_file() and list(library.workspace.trash.iterdir()) == []

    def test_deleting_what_a_run_has_learned(self, library: Library, run_folder: Path) -> None:
        token = library.delete("runs/first-run")
        assert library.records() == [] and run_folder.is_dir()
        assert library.undo(token) == ["runs/first-run"]

    def test_undo_writes_nothing_over(self, library: Library, make: Make) -> None:
        library.import_file(make(seed=1), "dog")
        token = library.delete("dog")
        library.import_file(make(seed=2), "dog")
        other = library.record("dog").path.read_bytes()
        with pytest.raises(ConfigError, match="there again under the same name"):
            library.undo(token)
        assert library.record("dog").path.read_bytes() == other
        library.rename("dog", "cat")
        assert library.undo(token) == ["dog"]

    def test_undo_expires(self, library: Library, make: Make) -> None:
        short = Library(library.workspace, LIMITS, undo_seconds=0.05)
        short.import_file(make(), "dog")
        token = short.delete("dog")
        time.sleep(0.1)
        with pytest.raises(ConfigError, match="no longer be undone"):
            short.undo(token)
        assert list(library.workspace.trash.iterdir()) == []

    @pytest.mark.parametrize("token", ["", "..", "../adapters", "/", "a" * 32, "a\0", None])
    def test_tokens_are_no_paths(self, token: Any, library: Library) -> None:
        with pytest.raises(ConfigError, match="no longer be undone"):
            library.undo(token)


class TestActions:
    def test_combine(self, library: Library, make: Make) -> None:
        for number, name in enumerate(("dog", "cat")):
            library.import_file(make(name, number, trigger_words=[name]), name)
        record = library.combine(["dog", "cat"], [0.5, -1])
        assert (record.id, record.rank, record.trigger_words) == ("dog-cat", 8, ("dog", "cat"))
        dog, cat, both = (ld.read_adapter(library.record(id).path) for id in ("dog", "cat", "dog-cat"))
        for path, layer in both.components["unet"].items():
            expected = 0.5 * dog.components["unet"][path].delta() - cat.components["unet"][path].delta()
            assert torch.allclose(layer.delta(), expected, atol=1e-5)
        assert library.combine(["dog", "cat"], [1, 1], "svd", r=2, name="small").rank == 2

    @pytest.mark.parametrize(
        ("ids", "weights", "rest", "words"),
        [
            (["dog"], [1], {}, "choose 2"),
            (["dog"] * 17, [1] * 17, {}, "choose 2 to 16"),
            (["dog", "dog"], [1], {}, "1 weights for 2"),
            (["dog", "dog"], [1, float("nan")], {}, "not between"),
            (["dog", "dog"], [1, 1e30], {}, "not between"),
            (["dog", "words"], [1, 1], {}, "of one kind"),
            (["dog", "dog"], [1, 1], {"method": "svd", "r": 10**9}, "from 1 to 256"),
            (["dog", "dog"], [1, 1], {"method": "no such"}, "method"),
        ],
    )
    def test_what_cannot_be_combined(
        self, ids: list[str], weights: list[float], rest: dict[str, Any], words: str, library: Library, make: Make
    ) -> None:
        library.import_file(make(), "dog")
        library.import_file(make(component="model"), "words")
        with pytest.raises(ConfigError, match=words):
            library.combine(ids, weights, **rest)
        assert len(library.records()) == 2

    def test_methods_that_form_whole_weights(self, library: Library, make: Make) -> None:
        layer = ld.LowRank(torch.ones(1, 10_000), torch.ones(10_000, 1))
        path = make().parent / "wide.safetensors"
        ld.write_adapter(ld.Adapter({"unet": {"to_q": layer}}), path)
        library.import_file(path)
        with pytest.raises(ConfigError, match="ties forms whole weights"):
            library.combine(["wide", "wide"], [1, 1], "ties")
        assert library.combine(["wide", "wide"], [1, 1], "svd", r=1).rank == 1
        library.import_file(make())
        assert library.combine(["dog", "dog"], [1, 1], "ties", r=2).rank == 2

    def test_resize(self, library: Library, make: Make) -> None:
        library.import_file(make(), "dog")
        record = library.resize("dog", 2)
        assert (record.id, record.rank, record.trigger_words) == ("dog-r2", 2, ("sks",))
        assert library.resize("dog", energy=0.5).rank in (1, 2, 3)
        for rank in (0, 257, 10**12, True, 2.5):
            with pytest.raises(ConfigError, match="from 1 to 256"):
                library.resize("dog", rank)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="choose a rank"):
            library.resize("dog")

    @pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
    def test_convert(self, format: str, library: Library, make: Make, tmp_path: Path) -> None:
        library.import_file(make(), "dog")
        path = library.convert("dog", format)
        assert path.name == f"dog-{format}.{'zip' if format == 'peft' else 'safetensors'}"
        assert (
            path.is_relative_to(library.workspace.root)
            and path.read_bytes() == library.convert("dog", format).read_bytes()
        )
        if format == "peft":
            with zipfile.ZipFile(path) as archive:
                archive.extractall(tmp_path / "out")
            path = tmp_path / "out"
        deltas = [ld.read_adapter(one) for one in (library.record("dog").path, path)]
        was, now = ({p: x.delta() for c in one.components.values() for p, x in c.items()} for one in deltas)
        assert len(was) == len(now) == 2
        for one, other in zip(sorted(was), sorted(now)):
            assert torch.allclose(was[one], now[other], atol=1e-6)

    def test_what_cannot_be_converted(self, library: Library, make: Make) -> None:
        library.import_file(make(), "dog")
        with pytest.raises(ConfigError, match="not one of diffusers, kohya, peft"):
            library.convert("dog", "../../x")
        layer = ld.LowRank(torch.ones(2, 8), torch.ones(6, 2))
        path = make().parent / "word.safetensors"
        ld.write_adapter(
            ld.Adapter({"unet": {"to_q": layer}}, tokens={"<s>": {"text_encoder": torch.ones(1, 8)}}), path
        )
        library.import_file(path)
        with pytest.raises(AdapterFormatError, match="no place for learned words") as caught:
            library.convert("word", "peft")
        assert str(library.workspace.root) not in str(caught.value)

    def test_different_models(self, library: Library, make: Make) -> None:
        library.import_file(make(), "dog")
        layer = ld.LowRank(torch.ones(2, 5), torch.ones(3, 2))
        path = make().parent / "other.safetensors"
        ld.write_adapter(ld.Adapter({"unet": {"down_blocks.0.attentions.0.to_q": layer}}), path)
        library.import_file(path)
        with pytest.raises(AdapterMismatchError, match="different models"):
            library.combine(["dog", "other"], [1, 1])


class TestVisitors:
    @pytest.fixture
    def public(self, library: Library) -> Library:
        return Library(library.workspace, PUBLIC)

    def test_each_sees_what_is_everybodys_and_their_own(self, library: Library, public: Library, make: Make) -> None:
        library.import_file(make(), "shared")
        public.import_file(make(), "annas", owner="anna")
        assert {one.id for one in public.records("anna")} == {"shared", "annas"}
        assert {one.id for one in public.records("tom")} == {"shared"} == {one.id for one in public.records()}
        for call in (public.record, public.delete):
            with pytest.raises(ConfigError, match="there is no adapter"):
                call("annas", owner="tom")
        with pytest.raises(ConfigError, match="belongs to everybody"):
            public.delete("shared", owner="tom")
        with pytest.raises(ConfigError, match="visitor"):
            public.import_file(make())
        with pytest.raises(ConfigError, match="not offered"):
            public.import_file(make(), owner="tom", model="/etc")
        assert public.undo(public.delete("annas", owner="anna")) == ["annas"]

    def test_runs_of_others(self, public: Library, run_folder: Path) -> None:
        (run_folder / "job.json").write_text(json.dumps({"owner": "anna"}))
        assert [one.id for one in public.records("anna")] == ["runs/first-run"] and public.records("tom") == []
        assert public.add_run("first-run", owner="anna").owner == "anna"
        with pytest.raises(ConfigError, match="there is no adapter"):
            public.add_run("first-run", owner="tom")


TOKEN = "hf_verysecretverysecret"


class Hub(BaseHTTPRequestHandler):
    """Refuses everything, and tells the token in its answer."""

    def do_POST(self) -> None:
        self.server.seen.append((self.path, self.headers.get("authorization")))  # type: ignore[attr-defined]
        body = json.dumps({"error": f"no rights for {self.headers.get('authorization')}"}).encode()
        self.send_response(403)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = HTTPServer(("127.0.0.1", 0), Hub)
    server.seen = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class TestPush:
    @pytest.mark.parametrize("component", ["unet", "model"])
    def test_what_is_uploaded(
        self, component: str, library: Library, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import huggingface_hub

        uploaded: dict[str, bytes] = {}
        calls: list[Any] = []

        class Api:
            def __init__(self, **settings: Any) -> None:
                calls.append(settings)

            def create_repo(self, repo: str, **settings: Any) -> Any:
                calls.append((repo, settings))
                return type("Url", (), {"repo_id": f"me/{repo}"})

            def upload_folder(self, *, folder_path: Path, repo_id: str, **_: Any) -> None:
                calls.append(repo_id)
                uploaded.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        bad = "`</code><script>alert(1)</script>\n---\nlicense: x"
        library.import_file(make(component=component, trigger_words=[bad], base_model="a/b"), "dog")
        assert library.push("dog", "dog-lora", TOKEN) == "https://huggingface.co/me/dog-lora"
        assert calls == [{"token": TOKEN}, ("dog-lora", {"private": True, "exist_ok": True}), "me/dog-lora"]
        files = {"unet": {"pytorch_lora_weights.safetensors"}, "model": {"adapter_model.safetensors",
                 "adapter_config.json"}}[component]  # fmt: skip
        assert set(uploaded) == {"README.md", *files}
        card = uploaded["README.md"].decode()
        assert card.count("\n---\n") == 1 and 'base_model: "a/b"' in card and "\nlicense" not in card
        assert card.split("\n---\n")[1].count("`") % 2 == 0
        assert not any(TOKEN.encode() in content for content in uploaded.values())

    def test_the_token_is_nowhere(
        self, hub: Any, library: Library, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        import traceback

        import huggingface_hub

        real = huggingface_hub.HfApi
        address = f"http://127.0.0.1:{hub.server_port}"
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: real(endpoint=address, token=token))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        library.import_file(make(), "dog")
        with caplog.at_level(0), pytest.raises(LoraDiffusionError, match="the hub did not take it") as caught:
            library.push("dog", "me/dog", TOKEN)
        assert hub.seen and hub.seen[0][1] == f"Bearer {TOKEN}"  # it did arrive where it belongs
        told = [str(caught.value), *traceback.format_exception(caught.value), caplog.text, *capfd.readouterr()]
        assert not any(TOKEN in text for text in told)
        files = [file for file in library.workspace.root.rglob("*") if file.is_file()]
        assert not any(TOKEN.encode() in file.read_bytes() for file in files)

    @pytest.mark.parametrize("repo", ["", "a/b/c", "../x", "a b", "http://x/y", "a\n", "x" * 300, None, "/a", "a--b"])
    def test_repositories(self, repo: Any, library: Library, make: Make) -> None:
        library.import_file(make(), "dog")
        with pytest.raises(ConfigError, match="cannot be a repository"):
            library.push("dog", repo, TOKEN)

    @pytest.mark.parametrize("token", ["", "  ", None, "a\nb"])
    def test_no_token(self, token: Any, library: Library, make: Make) -> None:
        library.import_file(make(), "dog")
        with pytest.raises(ConfigError, match="log in"):
            library.push("dog", "me/dog", token)
