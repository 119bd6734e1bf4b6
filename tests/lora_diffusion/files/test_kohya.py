"""The kohya dialect: scales and names, what is refused, and diffusers' pipelines as the other side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_diffusion as ld
from lora_diffusion.files.safetensors_file import TensorFile

Run = Callable[..., Any]
Shapes = dict[str, tuple[int, ...]]

UNET = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
PATH = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
SGM = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
TEXT_PATH = "text_model.encoder.layers.0.self_attn.q_proj"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def write(path: Path, shapes: Shapes, alphas: dict[str, Any] | None = None, **metadata: str) -> Path:
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    tensors |= {f"{name}.alpha": torch.tensor(alpha) for name, alpha in (alphas or {}).items()}
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    return path


def pair(name: str, rank: int = 4, out: int = 6) -> Shapes:
    return {f"{name}.lora_down.weight": (rank, 8), f"{name}.lora_up.weight": (out, rank)}


def layer(rank: int, scale: float = 1.0, seed: int = 0, kernel: int = 0, dora: bool = False) -> ld.LowRank:
    """8 inputs, 6 outputs."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn((rank, 8, kernel, kernel) if kernel else (rank, 8), generator=g)
    b = torch.randn((6, rank, 1, 1) if kernel else (6, rank), generator=g)
    return ld.LowRank(a, b, scale, torch.rand(6, generator=g) if dora else None)


def strings(path: Path) -> dict[str, str]:
    with safe_open(str(path), "pt") as file:
        return dict(file.metadata())


def product(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What the file's own tensors say that a module's weight changes by."""
    down, up = tensors[f"{name}.lora_down.weight"].double(), tensors[f"{name}.lora_up.weight"].double()
    alpha = float(tensors[f"{name}.alpha"])
    return (alpha / down.shape[0] * up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:]).float()


@pytest.mark.parametrize(
    ("alpha", "scale"), [(4.0, 1.0), (1.0, 0.25), ([2.0], 0.5), (-2.0, -0.5), (0.0, 1.0), (None, 1.0)]
)
def test_each_module_has_its_own_scale(tmp_path: Path, alpha: Any, scale: float) -> None:
    """alpha / rank; no alpha and an alpha of 0 mean the rank, which the notes say."""
    shapes = {**pair(UNET), **pair(TEXT, rank=2)}
    given = {TEXT: 6.0} if alpha is None else {UNET: alpha, TEXT: 6.0}
    adapter = ld.read_adapter(write(tmp_path / "a.safetensors", shapes, given, ss_tag="x"))
    assert adapter.dialect == "kohya"
    assert adapter.components["unet"][PATH].scale == scale
    assert adapter.components["text_encoder"][TEXT_PATH].scale == 3.0
    assert adapter.notes == (
        [] if alpha else ["1 modules have no alpha, or one of 0: taken to be their rank (scale 1)"]
    )
    assert adapter.foreign == {"ss_tag": "x"}


def test_convolutions_dora_and_half_precision(tmp_path: Path) -> None:
    """LoCon's factors keep their kernel; lengths become (out,)."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"{CONV}.lora_down.weight": torch.randn(2, 4, 3, 3, generator=g),
        f"{CONV}.lora_up.weight": torch.randn(6, 2, 1, 1, generator=g),
        f"{CONV}.alpha": torch.tensor(1.0),
        f"{CONV}.dora_scale": torch.rand(6, 1, 1, 1, generator=g),
    }
    tensors = {name: value.half() for name, value in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    found = ld.read_adapter(tmp_path / "a.safetensors").components["unet"]["down_blocks.0.resnets.0.conv1"]
    assert found.magnitude is not None
    assert torch.equal(found.magnitude, tensors[f"{CONV}.dora_scale"].view(6))
    assert (found.a.shape, found.b.shape, found.scale, found.a.dtype) == (
        (2, 4, 3, 3),
        (6, 2, 1, 1),
        0.5,
        torch.float16,
    )
    delta = ld.LowRank(found.a, found.b, found.scale).delta()
    torch.testing.assert_close(delta, product(tensors, CONV), rtol=1e-5, atol=1e-6)


BROKEN: dict[str, tuple[Shapes, str]] = {
    "half alone": ({f"{UNET}.lora_down.weight": (4, 8)}, "without its other half"),
    "two names, text": ({**pair(TEXT), **pair(TEXT.replace("te_", "te1_", 1))}, "twice"),
    "two names, UNet": ({**pair(UNET), **pair(SGM)}, "twice"),
    "two alphas": ({**pair(UNET), f"{UNET}.alpha": (), f"{SGM}.alpha": ()}, "twice"),
    "ranks": ({f"{UNET}.lora_down.weight": (4, 8), f"{UNET}.lora_up.weight": (6, 3)}, "do not fit each other"),
    "no kernel": ({f"{UNET}.lora_down.weight": (4, 8, 1, 1), f"{UNET}.lora_up.weight": (6, 4)}, "do not fit"),
    "rank": (pair(UNET, rank=9000), "rank 9,000"),
    "suffix": ({**pair(UNET), f"{UNET}.lora_sideways.weight": (4, 4)}, "not understood in the kohya dialect"),
    "other name": ({**pair(UNET), "epoch": ()}, "not understood in the kohya dialect: epoch"),
    "module": (pair("lora_unet_double_blocks_0_img_mod_lin"), "Stable Diffusion 1, 2 and XL do not have"),
    "alpha alone": ({**pair(UNET), f"{TEXT}.alpha": ()}, "without the factors"),
    "alphas": ({**pair(UNET), f"{UNET}.alpha": (4,)}, r"shape \[4\]; one number"),
    "lengths alone": ({**pair(UNET), f"{TEXT}.dora_scale": (6, 1)}, "without the factors"),
    "lengths of inputs": ({**pair(UNET), f"{UNET}.dora_scale": (1, 8)}, "lengths per input"),
    "lengths of square": ({**pair(UNET, out=8), f"{UNET}.dora_scale": (1, 8)}, "lengths per input"),
    "lengths": ({**pair(UNET), f"{UNET}.dora_scale": (5, 1)}, r"shape \[5, 1\] for 6 outputs"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refused_in_one_line(case: str, tmp_path: Path) -> None:
    shapes, words = BROKEN[case]
    with pytest.raises(ld.AdapterFormatError, match=words) as caught:
        ld.read_adapter(write(tmp_path / "a.safetensors", shapes))
    assert str(caught.value).isprintable()


def test_a_refused_file_leaves_the_target_as_it_was(tmp_path: Path, tiny_pipeline: Any, bits: Run) -> None:
    parts = (tiny_pipeline.unet, tiny_pipeline.text_encoder)
    before = [(bits(part), [name for name, _ in part.named_modules()]) for part in parts]
    for shapes, words in BROKEN.values():
        with pytest.raises(ld.AdapterFormatError, match=words):
            ld.load_adapter(tiny_pipeline, write(tmp_path / "a.safetensors", shapes))
    assert [(bits(part), [name for name, _ in part.named_modules()]) for part in parts] == before


def test_unusable_numbers_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pair(UNET), {UNET: float("nan")})
    with pytest.raises(ld.AdapterFormatError, match="NaN or infinity"):
        ld.read_adapter(path)


MIXED = {
    "unet": {
        PATH: layer(4, 2.0, 1),
        PATH.replace("to_q", "to_k"): layer(3, -0.7, 2),
        PATH.replace("to_q", "to_v"): layer(7, 5 / 3**0.5, 3, dora=True),
        PATH.replace("to_q", "to_out.0"): layer(4, 0.0, 4),
        "down_blocks.0.resnets.0.conv1": layer(2, 0.5, 5, kernel=3),
        "down_blocks.0.resnets.0.conv_shortcut": layer(4, 1.5, 6, kernel=1, dora=True),
    },
    "text_encoder": {TEXT_PATH: layer(2, 1 / 3, 7), TEXT_PATH.replace("q_proj", "k_proj"): layer(2, 1 / 3, 8)},
}


@pytest.mark.parametrize("second_encoder", [False, True])
def test_ours_to_kohya_and_back(tmp_path: Path, second_encoder: bool) -> None:
    """Ranks, scales of either sign, convolutions and DoRA: the same updates, to the rounding of fp32."""
    components = {**MIXED, **({"text_encoder_2": MIXED["text_encoder"]} if second_encoder else {})}
    adapter = ld.Adapter(components, metadata={"note": [1, 2]})
    ld.write_adapter(adapter, tmp_path / "a.safetensors", format="kohya")
    again = ld.read_adapter(tmp_path / "a.safetensors")
    assert (again.dialect, again.intact, again.metadata, again.notes) == ("kohya", True, {"note": [1, 2]}, [])
    assert {c: set(layers) for c, layers in again.components.items()} == {c: set(ls) for c, ls in components.items()}
    for component, layers in components.items():
        for path, wanted in layers.items():
            found = again.components[component][path]
            delta, other = (ld.LowRank(low.a, low.b, low.scale).delta() for low in (found, wanted))
            torch.testing.assert_close(delta, other, rtol=1e-6, atol=1e-6)
            assert torch.equal(found.a, wanted.a)
            assert (found.magnitude is None) == (wanted.magnitude is None)
            if found.magnitude is not None and wanted.magnitude is not None:
                assert torch.equal(found.magnitude, wanted.magnitude)
    names = [tmp_path / f"{letter}.safetensors" for letter in "abc"]
    ld.write_adapter(again, names[1], format="kohya")
    ld.write_adapter(ld.read_adapter(names[1]), names[2], format="kohya")
    assert names[1].read_bytes() == names[2].read_bytes()
    first, second = strings(names[0]), strings(names[1])
    assert {key for key in first if first[key] != second[key]} == {"lora_diffusion"}, "configs are inferred on reading"


def test_one_alpha_for_all_of_a_component(tmp_path: Path) -> None:
    """Where the layers agree it is theirs, and B is as it was; else it is the commonest rank."""
    ld.write_adapter(ld.Adapter(MIXED), tmp_path / "a.safetensors", format="kohya")
    tensors = load_file(tmp_path / "a.safetensors")
    alphas = {name: value for name, value in tensors.items() if name.endswith(".alpha")}
    assert {float(value) for name, value in alphas.items() if "_unet_" in name} == {4.0}
    assert {value.shape for value in alphas.values()} == {()}
    assert {float(value) for name, value in alphas.items() if "_te_" in name} == {float(torch.tensor(2 / 3))}
    assert torch.equal(tensors[f"{TEXT}.lora_up.weight"], MIXED["text_encoder"][TEXT_PATH].b)
    torch.testing.assert_close(product(tensors, UNET), MIXED["unet"][PATH].delta(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        product(tensors, CONV), MIXED["unet"]["down_blocks.0.resnets.0.conv1"].delta(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    """Also where bf16 cannot hold the alpha: 257 is stored as 256, and the rest goes into B."""
    wanted = layer(257, 1.0)
    low = ld.LowRank(wanted.a.to(dtype), wanted.b.to(dtype), 1.0)
    ld.write_adapter(ld.Adapter({"unet": {PATH: low}}), tmp_path / "a.safetensors", format="kohya")
    found = ld.read_adapter(tmp_path / "a.safetensors").components["unet"][PATH]
    assert found.a.dtype == found.b.dtype == dtype
    precision = 1e-6 if dtype != torch.bfloat16 else 2e-2
    assert (found.delta() - low.delta()).norm() < precision * low.delta().norm()


@pytest.mark.parametrize(
    ("width", "version", "architecture", "is_v2", "prefix"),
    [
        (768, "sd_v1", "stable-diffusion-v1/lora", "False", "lora_unet_mid_block_"),
        (1024, "sd_v2", None, "True", "lora_unet_mid_block_"),
        (2048, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "False", "lora_unet_middle_block_1_"),
        (32, None, None, None, "lora_unet_mid_block_"),
    ],
)
def test_the_base_shows_in_the_widths(
    tmp_path: Path, width: int, version: str | None, architecture: str | None, is_v2: str | None, prefix: str
) -> None:
    """What the adapter does not show is not claimed."""
    low = ld.LowRank(torch.ones(2, width), torch.ones(6, 2))
    adapter = ld.Adapter({"unet": {PATH.replace("attn1.to_q", "attn2.to_k"): low}})
    ld.write_adapter(adapter, tmp_path / "a.safetensors", format="kohya")
    said = strings(tmp_path / "a.safetensors")
    assert said.get("ss_base_model_version") == version
    assert said.get("modelspec.architecture") == architecture
    assert said.get("ss_v2") == is_v2
    assert ("modelspec.sai_model_spec" in said) == (architecture is not None)
    assert all(name.startswith(prefix) for name in load_file(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    "adapter",
    [
        ld.Adapter({"text_encoder_2": {TEXT_PATH: layer(2)}, "unet": {PATH: layer(2)}}),
        ld.Adapter({"unet": {PATH: layer(2), PATH.replace("blocks.0", "blocks.3"): layer(2)}}),
        ld.Adapter({"unet": {PATH: layer(2), "add_embedding.linear_1": layer(2)}}),
        ld.Adapter({"unet": {PATH: layer(2)}}, foreign={"ss_base_model_version": "sdxl_base_v1-0"}),
    ],
)
def test_sdxl_is_told_by_what_only_it_has(tmp_path: Path, adapter: ld.Adapter) -> None:
    ld.write_adapter(adapter, tmp_path / "a.safetensors", format="kohya")
    assert f"{SGM}.lora_up.weight" in load_file(tmp_path / "a.safetensors")


def test_what_the_file_says_of_itself(tmp_path: Path) -> None:
    metadata = {
        "instance_prompt": "a photo of sks dog",
        "base_model": "sd15",
        "steps": 400,
        "settings": {"learning_rate": 1e-4, "resolution": 512, "seed": 7},
    }
    unet = {PATH: layer(4, 0.5), "down_blocks.0.resnets.0.conv1": layer(2, 1.0, kernel=3)}
    ld.write_adapter(ld.Adapter({"unet": unet}), tmp_path / "a.safetensors", "kohya", metadata)
    said = strings(tmp_path / "a.safetensors")
    assert json.loads(said["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2.0"}
    assert said["ss_network_module"] == "networks.lora"
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("4", "2.0")
    assert (said["ss_steps"], said["ss_learning_rate"], said["ss_seed"]) == ("400", "0.0001", "7")
    assert (said["ss_resolution"], said["modelspec.resolution"]) == ("(512, 512)", "512x512")
    assert (said["modelspec.trigger_phrase"], said["ss_sd_model_name"]) == ("a photo of sks dog", "sd15")
    assert said["sshs_model_hash"] == TensorFile(tmp_path / "a.safetensors").sha256()
    assert not any("date" in key for key in said)


def test_other_programs_words_stay_and_their_hashes_do_not(tmp_path: Path) -> None:
    given = {
        "modelspec.title": "Mine",
        "modelspec.date": "2024-01-01",
        "ss_tag_frequency": "{}",
        "ss_network_dim": "99",
    }
    hashes = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
    adapter = ld.read_adapter(write(tmp_path / "a.safetensors", pair(UNET), {UNET: 2.0}, **given, **hashes))
    assert adapter.intact is False
    ld.write_adapter(adapter, tmp_path / "b.safetensors", "kohya", {"trigger_words": ["sks", "dog"]})
    said = strings(tmp_path / "b.safetensors")
    assert {key: said[key] for key in given} == {**given, "ss_network_dim": "4"}
    assert said["modelspec.trigger_phrase"] == "sks, dog"
    assert said["sshs_model_hash"] == TensorFile(tmp_path / "b.safetensors").sha256()
    assert "sshs_legacy_hash" not in said
    assert ld.read_adapter(tmp_path / "b.safetensors").intact is True


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (ld.Adapter({"model": {"fc": layer(2)}}), "'model'; format='diffusers' or 'peft'"),
        (ld.Adapter({"transformer": {"proj_in": layer(2)}}), "'transformer'"),
        (ld.Adapter({"unet": {"my_block.to_q": layer(2)}}), "no name for unet.my_block.to_q in Stable Diffusion;"),
        (
            ld.Adapter({"unet": {"down_blocks.3.resnets.0.conv1": layer(2)}, "text_encoder_2": {TEXT_PATH: layer(2)}}),
            "no name for unet.down_blocks.3.resnets.0.conv1 in Stable Diffusion XL",
        ),
        (ld.Adapter({"text_encoder": {"text_model.embeddings.token_embedding": layer(2)}}), "no name for"),
        (
            ld.Adapter({"unet": {PATH: layer(2)}}, copies={"unet": {"conv_in": {"weight": torch.ones(1)}}}),
            "modules_to_save",
        ),
        (
            ld.Adapter({"unet": {PATH: layer(2)}}, tokens={"<s1>": {"text_encoder": torch.ones(1, 8)}}),
            r"no place for learned words \(<s1>\)",
        ),
    ],
)
def test_writing_refuses(tmp_path: Path, adapter: ld.Adapter, words: str) -> None:
    with pytest.raises(ld.AdapterFormatError, match=words):
        ld.write_adapter(adapter, tmp_path / "a.safetensors", format="kohya")
    assert list(tmp_path.iterdir()) == []


def latents(pipeline: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return pipeline("sks dog", num_inference_steps=2, height=32, width=32, generator=g, output_type="latent").images


# diffusers takes the attention of a text encoder in this dialect only where `out_proj` is there as well.
CONFIGS = {
    "SD1, as trained": {"unet": ld.LoraConfig(r=4, lora_alpha=2), "text_encoder": ld.LoraConfig(r=2, lora_alpha=6)},
    "SD1, mixed ranks and scales": {
        "unet": ld.LoraConfig(
            r=4,
            target_modules=["to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in"],
            rank_pattern={"mid_block.*to_q": 7, "proj_in": 2},
            alpha_pattern={"to_v": 1},
        ),
        "text_encoder": ld.LoraConfig(r=3, target_modules=["q_proj", "out_proj", "fc1"], alpha_pattern={"fc1": 9}),
    },
    "SD1, whatever else has weights": {
        "unet": ld.LoraConfig(
            r=2,
            lora_alpha=3,
            target_modules=[
                *("conv_in", "conv_out", "conv1", "conv2", "conv_shortcut", "conv"),
                *("proj_out", "time_emb_proj", "linear_1", "linear_2"),
            ],
        )
    },
}


@pytest.mark.parametrize("case", CONFIGS)
def test_diffusers_loads_what_we_write(
    case: str, tiny_pipeline: Any, tiny_pipeline_dir: Path, randomise: Run, tmp_path: Path
) -> None:
    """Latents of the whole way; ours again from the file."""
    from diffusers import StableDiffusionPipeline

    base = latents(tiny_pipeline)
    ld.add_adapter(tiny_pipeline, CONFIGS[case])
    randomise(tiny_pipeline, std=0.2)
    ld.save_adapter(tiny_pipeline, tmp_path / "a.safetensors", format="kohya")
    ours = latents(tiny_pipeline)
    assert (ours - base).abs().max() > 0.01
    for load in (lambda pipeline, path: pipeline.load_lora_weights(path), ld.load_adapter):
        fresh = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
        fresh.set_progress_bar_config(disable=True)
        load(fresh, tmp_path / "a.safetensors")
        torch.testing.assert_close(latents(fresh), ours, rtol=1e-3, atol=1e-4)  # of many steps, one after the other


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")
def test_alphas_per_module_count(tmp_path: Path, tiny_pipeline: Any, tiny_pipeline_dir: Path, unet_output: Run) -> None:
    """Ours is what the file's tensors say, added to the weights by hand; diffusers takes one alpha for all."""
    from diffusers import StableDiffusionPipeline

    theirs, by_hand = (StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None) for _ in "ab")
    modules = {
        "lora_unet_" + path.replace(".", "_"): module
        for path, module in by_hand.unet.named_modules()
        if path.endswith(("to_q", "to_k"))
    }
    shapes: Shapes = {}
    for name, module in modules.items():
        out, width = module.weight.shape
        shapes |= {f"{name}.lora_down.weight": (4, width), f"{name}.lora_up.weight": (out, 4)}
    alphas = {name: 0.1 if n % 3 == 0 else 0.2 for n, name in enumerate(modules)}
    path = write(tmp_path / "a.safetensors", shapes, alphas)
    tensors = load_file(path)
    with torch.no_grad():
        for name, module in modules.items():
            module.weight += product(tensors, name)
    wanted = unet_output(by_hand.unet)
    assert ld.load_adapter(tiny_pipeline, path).complete
    torch.testing.assert_close(unet_output(tiny_pipeline.unet), wanted, rtol=1e-4, atol=1e-5)
    theirs.load_lora_weights(path)
    assert (unet_output(theirs.unet) - wanted).abs().max() > 1e-3
    theirs.unload_lora_weights()
    ld.write_adapter(ld.read_adapter(path), tmp_path / "b.safetensors", format="kohya")
    theirs.load_lora_weights(tmp_path / "b.safetensors")
    torch.testing.assert_close(unet_output(theirs.unet), wanted, rtol=1e-4, atol=1e-5)


def test_dora_comes_back_into_a_model(
    tmp_path: Path, tiny_pipeline: Any, tiny_pipeline_dir: Path, unet_output: Run
) -> None:
    """Beside projections and convolutions. (diffusers leaves lengths out of kohya's files, with a warning.)"""
    from diffusers import StableDiffusionPipeline

    ld.add_adapter(tiny_pipeline, ld.LoraConfig(r=2, target_modules=["to_q", "conv1"], use_dora=True))
    for part in ld.adapter_parameters(tiny_pipeline)["unet"]:
        part.data.add_(torch.randn(part.shape, generator=torch.Generator().manual_seed(part.numel())) * 0.05)
    ld.save_adapter(tiny_pipeline, tmp_path / "a.safetensors", format="kohya")
    said = strings(tmp_path / "a.safetensors")
    assert said["ss_network_module"] == "lycoris.kohya"
    assert json.loads(said["ss_network_args"])["dora_wd"] == "True"
    fresh = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    assert ld.load_adapter(fresh, tmp_path / "a.safetensors").complete
    torch.testing.assert_close(unet_output(fresh.unet), unet_output(tiny_pipeline.unet), rtol=1e-4, atol=1e-5)


def test_we_load_what_diffusers_converts(
    tmp_path: Path, tiny_pipeline: Any, tiny_pipeline_dir: Path, randomise: Run
) -> None:
    """diffusers' own export to kohya's names, which calls the only text encoder `lora_te1_`."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya

    ld.add_adapter(tiny_pipeline, {"unet": ld.LoraConfig(r=4), "text_encoder": ld.LoraConfig(r=4)})
    randomise(tiny_pipeline, std=0.2)
    ld.save_adapter(tiny_pipeline, tmp_path / "ours.safetensors")
    exported = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(load_file(tmp_path / "ours.safetensors")))
    save_file(exported, tmp_path / "theirs.safetensors")
    fresh = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    fresh.set_progress_bar_config(disable=True)
    report = ld.load_adapter(fresh, tmp_path / "theirs.safetensors")
    assert (report.dialect, report.complete) == ("kohya", True)
    torch.testing.assert_close(latents(fresh), latents(tiny_pipeline), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def tiny_sdxl(tiny_pipeline_dir: Path) -> Run:
    """tiny_sdxl(): a new pipeline with Stable Diffusion XL's block kinds, layout and two text encoders."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from diffusers.models import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    def build() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            unet = UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(8, 16, 32),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 1, 2),
                cross_attention_dim=64,
                attention_head_dim=4,
                norm_num_groups=4,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 32,
            )
            first = CLIPTextModel.from_pretrained(tiny_pipeline_dir / "text_encoder")
            second = CLIPTextModelWithProjection(first.config)
            tokenizer = CLIPTokenizer.from_pretrained(tiny_pipeline_dir / "tokenizer")
            pipeline = StableDiffusionXLPipeline(
                vae=AutoencoderKL.from_pretrained(tiny_pipeline_dir / "vae"),
                text_encoder=first,
                text_encoder_2=second,
                tokenizer=tokenizer,
                tokenizer_2=tokenizer,
                unet=unet,
                scheduler=DDIMScheduler.from_pretrained(tiny_pipeline_dir / "scheduler"),
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build


@pytest.mark.parametrize(
    "targets",
    [
        ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"],
        ["conv1", "conv2", "conv_shortcut", "conv", "time_emb_proj", "conv_in", "conv_out", "linear_1", "linear_2"],
    ],
)
def test_diffusers_loads_our_sdxl_names(targets: list[str], tiny_sdxl: Run, randomise: Run, tmp_path: Path) -> None:
    """All kinds of modules of SDXL's UNet under Stability's names, and both text encoders."""
    ours = tiny_sdxl()
    base = latents(ours)
    config = {
        "unet": ld.LoraConfig(r=4, lora_alpha=6, target_modules=targets),
        "text_encoder": ld.LoraConfig(r=2, lora_alpha=1),
        "text_encoder_2": ld.LoraConfig(r=3, target_modules=["q_proj", "out_proj", "fc1", "fc2"]),
    }
    ld.add_adapter(ours, config)
    randomise(ours)
    ld.save_adapter(ours, tmp_path / "a.safetensors", format="kohya")
    names = {name.partition(".")[0] for name in load_file(tmp_path / "a.safetensors")}
    assert {name.split("_")[1] for name in names} == {"unet", "te1", "te2"}
    assert not any("down_blocks" in name or "up_blocks" in name or "mid_block" in name for name in names)
    wanted = latents(ours)
    assert (wanted - base).abs().max() > 0.01
    theirs, again = tiny_sdxl(), tiny_sdxl()
    theirs.load_lora_weights(tmp_path / "a.safetensors")
    torch.testing.assert_close(latents(theirs), wanted, rtol=1e-3, atol=1e-4)
    assert ld.load_adapter(again, tmp_path / "a.safetensors").complete
    torch.testing.assert_close(latents(again), wanted, rtol=1e-3, atol=1e-4)
