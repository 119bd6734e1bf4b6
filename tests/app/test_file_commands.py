"""The commands on adapter files: what they write is right, what they say is right, mistakes end in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_diffusion as ld
from lora_diffusion.files.registry import DIALECTS

Run = Callable[..., tuple[int, str, str]]
WRITABLE = [d.NAME for d in DIALECTS if hasattr(d, "write") or hasattr(d, "write_folder")]
COMMANDS = ["inspect", "convert", "combine", "resize", "extract", "merge"]
FOLDERS = [d.NAME for d in DIALECTS if hasattr(d, "write_folder")]


@pytest.fixture
def make(tiny_pipeline: Any, tmp_path: Path) -> Callable[..., Path]:
    """`make("a", seed)` → a file with an adapter for the tiny pipeline, of rank 4 in UNet and text encoder."""

    def call(name: str, seed: int = 0, components: tuple[str, ...] = ("unet", "text_encoder"), **config: Any) -> Path:
        torch.manual_seed(seed)
        ld.add_adapter(
            tiny_pipeline, ld.LoraConfig(r=4, init_lora_weights=False, **config), name, components=components
        )
        path = tmp_path / f"{name}.safetensors"
        ld.save_adapter(tiny_pipeline, path, name, metadata={"base_model": "tiny", "instance_prompt": "sks dog"})
        ld.delete_adapter(tiny_pipeline, name)
        return path

    return call


def deltas(path: Path) -> dict[str, torch.Tensor]:
    adapter = ld.read_adapter(path)
    return {f"{c}.{p}": layer.delta() for c, layers in adapter.components.items() for p, layer in layers.items()}


def fails(run: Run, *words: object) -> str:
    """Run, expect exit code 2, one line on stderr and nothing on stdout; returns the line."""
    code, out, err = run(*words)
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1 and err.startswith("error: ") and err.strip().isprintable(), err
    return err


def succeeds(run: Run, *words: object) -> Any:
    """Run with --json; returns what stdout holds, which is one JSON object."""
    code, out, err = run(*words, "--json")
    assert code == 0, err
    return json.loads(out)


class TestInspect:
    def test_lines_and_json(self, make: Callable[..., Path], run: Run) -> None:
        path = make("a")
        code, out, _ = run("inspect", path)
        assert code == 0
        for words in ("32 layers, rank 4, alpha 4, scale 1", "made for    tiny", "in prompts  sks dog", "intact"):
            assert words in out
        facts = succeeds(run, "inspect", path)
        assert (facts["file"], facts["bytes"]) == (str(path), path.stat().st_size)
        assert (facts["dialect"], facts["base"], facts["trigger_words"]) == ("diffusers", "tiny", ["sks dog"])
        assert (facts["intact"], facts["layers"], facts["without_effect"]) == (True, 40, [])
        unet = facts["components"]["unet"]
        assert (unet["ranks"], unet["alphas"], unet["scales"], unet["dtypes"]) == ([4], [4.0], [1.0], ["float32"])

    def test_a_changed_file(self, make: Callable[..., Path], run: Run) -> None:
        path = make("a")
        data = bytearray(path.read_bytes())
        data[-4] ^= 1
        path.write_bytes(data)
        assert succeeds(run, "inspect", path)["intact"] is False
        assert "BROKEN" in run("inspect", path)[1]

    def test_layers_without_effect(self, run: Run, tmp_path: Path) -> None:
        layer = ld.LowRank(torch.ones(2, 8), torch.zeros(6, 2))
        ld.write_adapter(ld.Adapter({"unet": {"mid.to_q": layer}}), tmp_path / "a.safetensors")
        assert succeeds(run, "inspect", tmp_path / "a.safetensors")["without_effect"] == ["unet.mid.to_q"]
        assert "1 layers, such as unet.mid.to_q" in run("inspect", tmp_path / "a.safetensors")[1]

    @pytest.mark.parametrize("mode", [(), ("--json",)])
    def test_nothing_from_a_file_reaches_the_terminal_raw(
        self, mode: tuple[str, ...], run: Run, tmp_path: Path
    ) -> None:
        bad = "\x1b[31mred\x9b0m\u202e\r\nfile  forged"
        layer = ld.LowRank(torch.ones(2, 8), torch.ones(6, 2))
        adapter = ld.Adapter({"unet": {"to_q": layer}}, foreign={f"ss_{bad}": bad, "ss_sd_model_name": bad})
        ld.write_adapter(
            adapter, tmp_path / "a.safetensors", metadata={bad: bad, "instance_prompt": bad, "list": [bad]}
        )
        code, out, _ = run("inspect", tmp_path / "a.safetensors", *mode)
        assert code == 0 and "red" in out
        assert all(line.isprintable() for line in out.split("\n"))
        assert mode or not any(line.startswith("file  forged") for line in out.split("\n"))

    def test_long_tables_are_cut(self, run: Run, tmp_path: Path) -> None:
        layer = ld.LowRank(torch.ones(2, 8), torch.ones(6, 2))
        adapter = ld.Adapter({"unet": {"to_q": layer}}, foreign={f"ss_{n:03}": "x" * 5000 for n in range(100)})
        ld.write_adapter(adapter, tmp_path / "a.safetensors")
        _, out, _ = run("inspect", tmp_path / "a.safetensors")
        assert "and 88 more; --json has them all" in out and len(out) < 8000
        assert len(succeeds(run, "inspect", tmp_path / "a.safetensors")["foreign"]) == 100

    def test_against_a_model(self, make: Callable[..., Path], run: Run, tiny_pipeline_dir: Path) -> None:
        path = make("a")
        fit = succeeds(run, "inspect", path, "--model", tiny_pipeline_dir)["fit"]
        assert fit["complete"] and fit["base"] == {"unet": "same", "text_encoder": "same"}
        assert len(fit["components"]["unet"]["matched"]) == 32
        assert fit["same_name"] is False  # a folder of another name than "tiny"
        code, out, _ = run("inspect", path, "--model", tiny_pipeline_dir)
        assert code == 0 and "32 of 32 layers fit; the base in hand is the one it was made for" in out

    def test_against_another_model(self, make: Callable[..., Path], run: Run) -> None:
        path = make("a", components=("text_encoder",))
        fit = succeeds(run, "inspect", path, "--model", "pocket")["fit"]
        part = fit["components"]["text_encoder"]
        assert not fit["complete"] and part["matched"] == [] and len(part["unmatched"]) == 8
        assert fit["base"] == {}
        code, out, _ = run("inspect", path, "--model", "pocket")
        assert code == 0 and "it does not fit" in out and "8 do not, such as" in out

    def test_mistakes(self, make: Callable[..., Path], run: Run, tmp_path: Path) -> None:
        assert "does not exist" in fails(run, "inspect", tmp_path / "x.safetensors")
        assert "convert" in fails(run, "inspect", self._pickle(tmp_path))
        assert "no model folder" in fails(run, "inspect", make("a"), "--model", tmp_path / "nowhere")
        assert "FILE must be given" in fails(run, "inspect", "--json")

    def _pickle(self, folder: Path) -> Path:
        torch.save({"x.lora_A": torch.ones(2, 8)}, folder / "a.bin")
        return folder / "a.bin"


class TestConvert:
    @pytest.mark.parametrize("format", WRITABLE)
    def test_every_format_says_the_same(self, format: str, make: Callable[..., Path], run: Run, tmp_path: Path) -> None:
        source = make("a", lora_alpha=2)
        target = tmp_path / "out" / ("b" if format in FOLDERS else "b.safetensors")
        facts = succeeds(run, "convert", source, target, "--to", format)
        assert (facts["dialect"], facts["format"], facts["layers"]) == ("diffusers", format, 40)
        assert facts["components"] == {"unet": 32, "text_encoder": 8}
        assert facts["bytes_before"] == source.stat().st_size and facts["bytes_after"] > 0
        before, after = deltas(source), deltas(target)
        assert before.keys() == after.keys()
        for where, delta in before.items():
            torch.testing.assert_close(after[where], delta, rtol=1e-6, atol=1e-7)

    def test_lines(self, make: Callable[..., Path], run: Run, tmp_path: Path) -> None:
        code, out, err = run("convert", make("a"), tmp_path / "b.safetensors", "--to", "diffusers")
        assert (code, err) == (0, "")
        assert "read    " in out and "40 layers in the dialect diffusers" in out
        assert "wrote   " in out and "unet 32" in out and "text_encoder 8" in out and "kB" in out

    @pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
    def test_dtype(self, name: str, dtype: torch.dtype, make: Callable[..., Path], run: Run, tmp_path: Path) -> None:
        source, target = make("a", use_dora=True), tmp_path / "b.safetensors"
        facts = succeeds(run, "convert", source, target, "--to", "diffusers", "--dtype", name)
        assert facts["bytes_after"] < 0.7 * facts["bytes_before"]
        old, new = ld.read_adapter(source).flat(), ld.read_adapter(target).flat()
        assert old.keys() == new.keys() and {tensor.dtype for tensor in new.values()} == {dtype}
        assert all(torch.equal(new[key], tensor.to(dtype)) for key, tensor in old.items())

    def test_too_large_for_its_dtype(self, run: Run, tmp_path: Path) -> None:
        layer = ld.LowRank(torch.ones(2, 8), torch.full((6, 2), 1e6))
        ld.write_adapter(ld.Adapter({"unet": {"to_q": layer}}), tmp_path / "a.safetensors")
        words = ["convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "diffusers"]
        assert "too large for float16" in fails(run, *words, "--dtype", "fp16")
        assert not (tmp_path / "b.safetensors").exists()

    def test_a_pickle_whose_alpha_nobody_wrote_down(self, run: Run, tmp_path: Path) -> None:
        a, b = torch.randn(2, 8), torch.randn(6, 2)
        torch.save({"encoder.layer.0.query.lora_A": a, "encoder.layer.0.query.lora_B": b}, tmp_path / "a.bin")
        target = tmp_path / "b.safetensors"
        notes = succeeds(run, "convert", tmp_path / "a.bin", target, "--to", "diffusers")["notes"]
        assert any("alpha" in note for note in notes)
        succeeds(run, "convert", tmp_path / "a.bin", target, "--to", "diffusers", "--alpha", 16)
        torch.testing.assert_close(deltas(target)["model.encoder.layer.0.query"], 8 * (b @ a))

    def test_alpha_where_the_file_says_none(self, run: Run, tmp_path: Path) -> None:
        layer = ld.LowRank(torch.randn(2, 8), torch.randn(6, 2))
        ld.write_adapter(ld.Adapter({"unet": {"to_q": layer}}), tmp_path / "a.safetensors")
        succeeds(
            run, "convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "diffusers", "--alpha", 1
        )
        torch.testing.assert_close(deltas(tmp_path / "b.safetensors")["unet.to_q"], 0.5 * layer.delta())

    def test_component(self, make: Callable[..., Path], run: Run, tmp_path: Path) -> None:
        source, target = make("a"), tmp_path / "b.safetensors"
        words = ["convert", source, target, "--to", "diffusers", "--component"]
        assert succeeds(run, *words, "unet")["components"] == {"unet": 32}
        assert set(deltas(target)) == {where for where in deltas(source) if where.startswith("unet.")}
        assert "--component transformer: the adapter has" in fails(run, *words, "transformer")
        assert "not one of" in fails(run, *words, "vae")

    def test_a_bare_models_layers_get_a_name(self, run: Run, tmp_path: Path) -> None:
        layer = ld.LowRank(torch.randn(2, 8), torch.randn(6, 2))
        ld.write_adapter(ld.Adapter({"model": {"mid.to_q": layer}}), tmp_path / "a.safetensors")
        words = ["convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "diffusers"]
        succeeds(run, *words, "--component", "unet")
        assert list(deltas(tmp_path / "b.safetensors")) == ["unet.mid.to_q"]

    def test_mistakes(self, make: Callable[..., Path], run: Run, tmp_path: Path) -> None:
        source, target = make("a"), tmp_path / "b.safetensors"
        assert "does not exist" in fails(run, "convert", tmp_path / "x.safetensors", target, "--to", "diffusers")
        line = fails(run, "convert", source, target, "--to", "gguf")
        assert f"--to 'gguf' is not one of {', '.join(WRITABLE)}" in line
        assert "SRC and DST must be given" in fails(run, "convert", "--to", "diffusers")
        assert "--to must be given" in fails(run, "convert", source, target)
        assert "ends in .safetensors" in fails(run, "convert", source, tmp_path / "b.bin", "--to", "diffusers")
        assert "is an input" in fails(run, "convert", source, source, "--to", "diffusers")
        assert "above 0" in fails(run, "convert", source, target, "--to", "diffusers", "--alpha", 0)
        assert "not one of fp16" in fails(run, "convert", source, target, "--to", "diffusers", "--dtype", "int8")
        assert not target.exists()
        (tmp_path / "plain").write_text("x")
        line = run("convert", source, tmp_path / "plain" / "b.safetensors", "--to", "diffusers")[2]
        assert line.startswith("error: ") and "could not be written" in line


class TestCombine:
    def test_the_exact_sum(self, make: Callable[..., Path], run: Run, tmp_path: Path) -> None:
        a, b, c = make("a", 0), make("b", 1), tmp_path / "c.safetensors"
        facts = succeeds(run, "combine", f"{a}:0.7", f"{b}:-0.5", "-o", c)
        assert facts["ranks"] == {"unet": [8], "text_encoder": [8]} and facts["error"] < 1e-6
        assert set(facts["errors"]["unet"]) == set(ld.read_adapter(c).components["unet"])
        old_a, old_b = deltas(a), deltas(b)
        for where, delta in deltas(c).items():
            torch.testing.assert_close(delta, 0.7 * old_a[where] - 0.5 * old_b[where], rtol=1e-5, atol=1e-6)

    def test_weights_are_1_and_flags_may_stand_anywhere(
        self, make: Callable[..., Path], run: Run, tmp_path: Path
    ) -> None:
        a, b, c = make("a", 0), make("b", 1), tmp_path / "c.safetensors"
        succeeds(run, "combine", a, "-o", c, b)
        old_a, old_b = deltas(a), deltas(b)
        for where, delta in deltas(c).items():
            torch.testing.assert_close(delta, old_a[where] + old_b[where], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("method", ["svd", "ties", "dare_ties", "dare_linear", "magnitude_prune"])
    def test_the_other_methods(self, method: str, make: Callable[..., Path], run: Run, tmp_path: Path) -> None:
        """They are `ld.combine`'s, seed and all; the report says what it cost."""
        a, b, c = make("a", 0), make("b", 1), tmp_path / "c.safetensors"
        options = ["--method", method, "--rank", 3, "--density", 0.4, "--seed", 5]
        facts = succeeds(run, "combine", f"{a}:0.7", f"{b}:0.5", "-o", c, *options)
        adapters = [ld.read_adapter(a), ld.read_adapter(b)]
        generator = torch.Generator().manual_seed(5)
        wanted = ld.combine(adapters, [0.7, 0.5], method, r=3, density=0.4, generator=generator)
        assert facts["error"] == pytest.approx(wanted.error) and 0.01 < facts["error"] < 1
        got = ld.read_adapter(c)
        for component, layers in wanted.adapter.components.items():
            for path, layer in layers.items():
                torch.testing.assert_close(got.components[component][path].delta(), layer.delta())

    def test_lines(self, make: Callable[..., Path], run: Run, tmp_path: Path) -> None:
        a = make("a")
        code, out, _ = run("combine", a, f"{a}:2", "-o", tmp_path / "c.safetensors", "--method", "svd", "--rank", 2)
        assert code == 0 and "40 layers, relative error 0." in out and "unet: 32 layers, rank 2" in out

    def test_mistakes(self, make: Callable[..., Path], run: Run, tmp_path: Path) -> None:
        a, c = make("a"), tmp_path / "c.safetensors"
        assert "'' is not a number; write FILE:WEIGHT" in fails(run, "combine", f"{a}:", "-o", c)
        line = fails(run, "combine", f"{a}:strong", "-o", c)
        assert "'strong' is not a number" in line and "--adapter" not in line
        assert "must be finite" in fails(run, "combine", f"{a}:nan", "-o", c)
        assert "FILE:WEIGHT and -o must be given" in fails(run, "combine")
        assert "-o must be given" in fails(run, "combine", a)
        assert "at least 1" in fails(run, "combine", a, "-o", c, "--method", "svd", "--rank", 0)
        assert "leave r out" in fails(run, "combine", a, "-o", c, "--rank", 2)
        assert "at most 1" in fails(run, "combine", a, "-o", c, "--method", "ties", "--density", 2)
        assert "not one of cat" in fails(run, "combine", a, "-o", c, "--method", "mean")
        assert "is an input" in fails(run, "combine", f"{a}:0.5", a, "-o", a)
        assert "DoRA" in fails(run, "combine", make("b", use_dora=True), "-o", c)
        assert not c.exists()


class TestResize:
    def test_to_a_rank(self, make: Callable[..., Path], run: Run, tmp_path: Path) -> None:
        a, b = make("a"), tmp_path / "b.safetensors"
        facts = succeeds(run, "resize", a, "-o", b, "--rank", 2)
        assert facts["ranks"] == {"unet": [2], "text_encoder": [2]}
        old, new = deltas(a), deltas(b)
        lost = sum(float((new[w] - old[w]).square().sum()) for w in old)
        assert facts["error"] == pytest.approx(
            (lost / sum(float(d.square().sum()) for d in old.values())) ** 0.5, rel=1e-4
        )
        for where, delta in old.items():
            s = torch.linalg.svdvals(delta)
            assert float((new[where] - delta).norm()) == pytest.approx(float(s[2:].norm()), rel=1e-3)

    def test_by_energy(self, make: Callable[..., Path], run: Run, tmp_path: Path) -> None:
        facts = succeeds(run, "resize", make("a"), "-o", tmp_path / "b.safetensors", "--energy", 0.8, "--dtype", "fp16")
        assert facts["error"] ** 2 < 0.2 and max(facts["ranks"]["unet"]) < 4
        assert {t.dtype for t in ld.read_adapter(tmp_path / "b.safetensors").flat().values()} == {torch.float16}

    def test_mistakes(self, make: Callable[..., Path], run: Run, tmp_path: Path) -> None:
        a, b = make("a"), tmp_path / "b.safetensors"
        assert "give --rank, --energy, or both" in fails(run, "resize", a, "-o", b)
        assert "at least 1" in fails(run, "resize", a, "-o", b, "--rank", 0)
        assert "9000" in fails(run, "resize", a, "-o", b, "--rank", 9000)
        assert "at most 1" in fails(run, "resize", a, "-o", b, "--energy", 1.5)
        assert "one argument too many" in fails(run, "resize", a, b, "--rank", 2, "-o", b)
        assert not b.exists()


@pytest.fixture
def merged(make: Callable[..., Path], run: Run, tiny_pipeline_dir: Path, tmp_path: Path) -> tuple[Path, Path, Any]:
    """(the adapter, the folder with it merged at 0.8, what the command said)."""
    path = make("a")
    facts = succeeds(run, "merge", tiny_pipeline_dir, f"{path}:0.8", "-o", tmp_path / "merged")
    return path, tmp_path / "merged", facts


class TestMerge:
    def test_it_is_merge_adapters(self, merged: tuple[Path, Path, Any], tiny_pipeline: Any) -> None:
        """Bit for bit, and everything else is as it was."""
        from diffusers import StableDiffusionPipeline

        path, folder, facts = merged
        ld.load_adapter(tiny_pipeline, path, "a", 0.8)
        report = ld.merge_adapters(tiny_pipeline)
        loaded = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        for component in ("unet", "text_encoder"):
            old = {n: t for n, t in getattr(tiny_pipeline, component).named_parameters() if ".adapter_" not in n}
            new = dict(getattr(loaded, component).named_parameters())
            assert old.keys() == new.keys() and all(torch.equal(old[n], new[n]) for n in new)
            said = facts["components"][component]
            assert said["adapters"] == {"a": 0.8} and said["layers"] == report.layers[component]
            assert said["error"] == pytest.approx(report.error[component])
            assert said["unchanged"] == report.unchanged[component]
        for old_tensor, new_tensor in zip(tiny_pipeline.vae.parameters(), loaded.vae.parameters()):
            assert torch.equal(old_tensor, new_tensor)
        assert loaded.tokenizer("sks dog").input_ids == tiny_pipeline.tokenizer("sks dog").input_ids

    def test_into_pocket(self, run: Run, tmp_path: Path) -> None:
        """In fp16, two adapters, and lines for people."""
        from diffusers import StableDiffusionPipeline

        from train.pocket import pocket_dir

        layer = ld.LowRank(torch.randn(2, 128), 0.01 * torch.randn(128, 2))
        path = "text_model.encoder.layers.0.self_attn.q_proj"
        ld.write_adapter(ld.Adapter({"text_encoder": {path: layer}}), tmp_path / "a.safetensors")
        words = ["merge", "pocket", tmp_path / "a.safetensors", f"{tmp_path / 'a.safetensors'}:0.5"]
        code, out, _ = run(*words, "-o", tmp_path / "out")
        assert code == 0 and "text_encoder: a (1), a-2 (0.5) in 1 layers; the update is off by" in out
        pipes = [
            StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float16, safety_checker=None)
            for folder in (pocket_dir(), tmp_path / "out")
        ]
        for name, weight in (("a", 1.0), ("b", 0.5)):
            ld.load_adapter(pipes[0], tmp_path / "a.safetensors", name, weight)
        ld.merge_adapters(pipes[0])
        old, new = (pipe.text_encoder.encoder.layers[0].self_attn.q_proj.weight for pipe in pipes)
        assert new.dtype == torch.float16 and torch.equal(old, new)

    def test_mistakes(self, merged: tuple[Path, Path, Any], run: Run, tiny_pipeline_dir: Path, tmp_path: Path) -> None:
        path, folder, _ = merged
        assert "exists already" in fails(run, "merge", tiny_pipeline_dir, path, "-o", folder)
        assert "exists already" in fails(run, "merge", tiny_pipeline_dir, path, "-o", path)
        assert "lies in the model folder" in fails(run, "merge", tiny_pipeline_dir, path, "-o", tiny_pipeline_dir / "x")
        assert "no model folder" in fails(run, "merge", tmp_path / "nowhere", path, "-o", tmp_path / "out")
        assert "does not exist" in fails(
            run, "merge", tiny_pipeline_dir, tmp_path / "x.safetensors", "-o", tmp_path / "out"
        )
        assert "is not a number" in fails(run, "merge", tiny_pipeline_dir, f"{path}:x", "-o", tmp_path / "out")
        assert "FILE:WEIGHT must be given" in fails(run, "merge", tiny_pipeline_dir, "-o", tmp_path / "out")
        assert "does not fit" in fails(run, "merge", "pocket", path, "-o", tmp_path / "out")
        assert sorted(one.name for one in tmp_path.iterdir()) == ["a.safetensors", "merged"]


class TestExtract:
    def test_what_was_merged_comes_out(
        self, merged: tuple[Path, Path, Any], run: Run, tiny_pipeline_dir: Path, tmp_path: Path
    ) -> None:
        path, folder, _ = merged
        out = tmp_path / "e.safetensors"
        facts = succeeds(run, "extract", "--base", tiny_pipeline_dir, "--tuned", folder, "--rank", 4, "-o", out)
        assert facts["layers"] == 40 and facts["error"] < 1e-4 and facts["skipped"] == {}
        wanted, got = deltas(path), deltas(out)
        assert wanted.keys() == got.keys()
        for where, delta in wanted.items():
            torch.testing.assert_close(got[where], 0.8 * delta, rtol=1e-4, atol=1e-5)
        assert ld.read_adapter(out).metadata["base_model"] == tiny_pipeline_dir.name

    def test_it_is_the_same_as_from_models(
        self, merged: tuple[Path, Path, Any], run: Run, tiny_pipeline: Any, tiny_pipeline_dir: Path, tmp_path: Path
    ) -> None:
        from diffusers import StableDiffusionPipeline

        _, folder, _ = merged
        tuned = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        wanted = ld.extract(tiny_pipeline, tuned, 2, components=["unet"], target_modules=["to_q"])
        words = ["extract", "--base", tiny_pipeline_dir, "--tuned", folder, "--rank", 2, "--component", "unet"]
        facts = succeeds(run, *words, "--target_modules", "to_q", "-o", tmp_path / "e.safetensors")
        assert facts["errors"] == wanted.errors and facts["skipped"] == wanted.skipped and facts["skipped"]
        got = ld.read_adapter(tmp_path / "e.safetensors").flat()
        assert all(torch.equal(got[key], tensor) for key, tensor in wanted.adapter.flat().items())

    def test_progress_goes_to_stderr(
        self, merged: tuple[Path, Path, Any], run: Run, tiny_pipeline_dir: Path, tmp_path: Path
    ) -> None:
        words = ["--base", tiny_pipeline_dir, "--tuned", merged[1], "--rank", 2, "-o", tmp_path / "e.safetensors"]
        code, out, err = run("extract", *words)
        assert code == 0 and "tensors compared" in err and "tensors compared" not in out
        assert "40 layers, relative error" in out

    def test_mistakes(self, merged: tuple[Path, Path, Any], run: Run, tiny_pipeline_dir: Path, tmp_path: Path) -> None:
        out = tmp_path / "e.safetensors"
        words = ["extract", "--base", tiny_pipeline_dir, "-o", out]
        rank = ["--rank", 2]
        line = run(*words, "--tuned", tiny_pipeline_dir, *rank)[2]
        assert "base and tuned have the same weights" in line
        assert "at least 1" in fails(run, *words, "--tuned", merged[1], "--rank", 0)
        assert "no model folder" in fails(run, *words, "--tuned", tmp_path / "nowhere", *rank)
        assert "--rank must be given" in fails(run, *words, "--tuned", merged[1])
        assert "the architectures differ" in run(*words, "--tuned", "pocket", *rank)[2]
        assert "'vae'" in fails(run, *words, "--tuned", merged[1], *rank, "--component", "vae")
        assert "--to 'x'" in fails(run, *words, "--tuned", merged[1], *rank, "--to", "x")
        assert not out.exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, run: Run) -> None:
    code, out, _ = run(name, "--help")
    assert code == 0 and f"usage: lora-diffusion {name}" in out and "--json" in out


def test_help_and_misuse_do_not_wait_for_torch() -> None:
    code = (
        "import sys; from app.cli import main; "
        f"codes = [main([name, flag]) for name in {COMMANDS} for flag in ('--help', '--nonsense')]; "
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else str(codes) if codes != [0, 2] * len(codes[::2]) else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
