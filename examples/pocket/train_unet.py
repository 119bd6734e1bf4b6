"""Train pocket's UNet and go on with its text encoder:

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 train_unet.py --work ~/pocket --minutes 90

UNet2DConditionModel on (8, 16, 16) latents, v-prediction (Salimans & Ho 2022, eq. in app. D), cross-attention on the
text encoder's 32 states. Resumable: the same command goes on from the last checkpoint; `--minutes` counts all resumes.
Muon's momentum is spread over the processes and is not kept; it is made anew in a few dozen steps.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from grids import draw_grid
from optimizer import MuonAdamW
from shards import SHARD, pictures, render_ahead, scenes
from train_text import encode
from train_vae import as_tensor
from training import Average, Record, Workers, machine, save_atomically
from transformers import CLIPTextModel, CLIPTokenizer
from world import Scene, caption

CONFIG = {
    "sample_size": 16, "in_channels": 8, "out_channels": 8, "layers_per_block": 1, "block_out_channels": (64, 96, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 128, "attention_head_dim": 4, "norm_num_groups": 16,
}  # fmt: skip
SCHEDULER = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.02, "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction", "timestep_spacing": "trailing", "steps_offset": 1,
    "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def build() -> UNet2DConditionModel:
    """A fresh UNet whose residual branches and output start at zero, so that it starts as the identity."""
    unet = UNet2DConditionModel(**CONFIG)
    for name, p in unet.named_parameters():
        if "conv2." in name or "proj_out." in name or name.startswith("conv_out."):
            torch.nn.init.zeros_(p)
    return unet


def latents_of(vae_folder: Path, work: Path, shard: int) -> np.ndarray:
    """The shard's latents, (n, 8, 16, 16) float16, encoded on first use."""
    path = work / f"latents-{shard}.npy"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(vae_folder)
        images, out = pictures(shard, work), []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for k in range(0, len(images), 100):
                out.append(vae.encode(as_tensor(images[k : k + 100])).latent_dist.mode().half().numpy())
        np.save(path.with_suffix(".partial.npy"), np.concatenate(out))
        path.with_suffix(".partial.npy").replace(path)
    return np.load(path)


def timesteps(rng: np.random.Generator, count: int) -> torch.Tensor:
    """(count,) int64 in 0..999: a quarter stratified over all, the rest logit-normal about the middle.

    Shapes and faces are decided at the middle noise levels, so most of the work goes there (Esser et al. 2024, "Scaling
    Rectified Flow Transformers", section 3.1).
    """
    even = count // 4
    uniform = (rng.permutation(even) + rng.random(even)) / even
    middle = 1 / (1 + np.exp(-rng.normal(-0.2, 1.1, count - even)))
    return torch.from_numpy((np.concatenate([uniform, middle]) * 1000).astype(np.int64).clip(0, 999))


def chances(told: list[Scene]) -> np.ndarray:
    """How often each scene is shown, summing to one: those with a creature more often, they are the hardest to draw."""
    weight = np.array([1.7 if any(t.creature for t in scene.things) else 1.0 for scene in told])
    return weight / weight.sum()


def with_stray_word(text: str, rng: np.random.Generator) -> str:
    """Now and then a word that means nothing, so that an unknown word disturbs nothing."""
    if rng.random() >= 0.05:
        return text
    words = text.split()
    stray = "".join(LETTERS[i] for i in rng.integers(0, 26, int(rng.integers(2, 6))))
    words.insert(int(rng.integers(0, len(words) + 1)), stray)
    return " ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with vae/, text_encoder/, tokenizer/")
    parser.add_argument("--minutes", type=float, default=90.0, help="training time, over all resumes")
    parser.add_argument(
        "--decay-minutes", type=float, default=20.0, help="the last minutes, in which the rate falls to 5 %%"
    )
    parser.add_argument("--shards", type=int, default=12, help="ten thousand scenes each")
    parser.add_argument("--batch", type=int, default=32, help="pictures in a step, for each process")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--grid-minutes", type=float, default=10.0)
    args = parser.parse_args()
    workers = Workers()
    torch.manual_seed(3)
    start = args.work / "unet-start"  # see unpublish.py
    unet = UNet2DConditionModel.from_pretrained(start) if start.exists() else build()
    checkpoint = args.work / "unet.pt"
    state = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else None
    text_encoder = CLIPTextModel.from_pretrained(args.work / "text_encoder", dtype=torch.float32).train()
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    unet.train()  # contiguous: a CPU's group norm is many times slower on channels last
    both = torch.nn.ModuleList([unet, text_encoder])
    parameters = list(both.parameters())
    tables = [p for n, p in both.named_parameters() if "embedding" in n and "time" not in n]
    ends = [unet.conv_in.weight, unet.conv_out.weight, *tables]
    slower = dict.fromkeys(text_encoder.parameters(), 0.3)
    optimizer = MuonAdamW(parameters, ends, lr=args.lr, scale=slower, workers=workers)
    average = Average(both, 0.999)
    step, spent = 0, 0.0
    if state is not None:
        both.load_state_dict(state["model"])
        for s, v in zip(average.shadow, state["average"], strict=True):
            s.copy_(v)
        optimizer.adamw.load_state_dict(state["adamw"])
        step, spent, average.steps = state["step"], state["spent"], state["step"]
    mine = [s for s in range(args.shards) if s % workers.count == workers.rank]
    render_ahead(range(args.shards), args.work) if workers.first else None
    workers.agree(0.0)
    for s in mine:
        latents_of(args.work / "vae", args.work, s)
    workers.agree(0.0)
    latents = torch.from_numpy(
        np.concatenate([latents_of(args.work / "vae", args.work, s) for s in range(args.shards)])
    )
    told = [s for shard in range(args.shards) for s in scenes(shard)]
    chance = chances(told)
    scheduler = DDIMScheduler(**SCHEDULER)
    alpha = scheduler.alphas_cumprod.sqrt().float()
    sigma = (1 - scheduler.alphas_cumprod).sqrt().float()
    record = Record(args.work / "unet.jsonl")
    if workers.first:
        record.write(event="start", step=step, start=start.name if start.exists() else "scratch",
                     unet_parameters=sum(p.numel() for p in unet.parameters()), workers=workers.count,
                     batch=args.batch * workers.count, lr=args.lr, scenes=args.shards * SHARD,
                     machine=machine())  # fmt: skip
    unet.set_attn_processor(AttnProcessor())  # the plain one: its backward is the faster one on a CPU at these sizes
    began, last, last_step, losses, resumed = time.time() - spent, time.time(), step, [], step
    next_grid = spent / 60 + 1e-9 + args.grid_minutes

    def save() -> None:
        state = {"model": both.state_dict(), "adamw": optimizer.adamw.state_dict(), "average": average.shadow}
        save_atomically({**state, "step": step, "spent": time.time() - began}, checkpoint)

    while (elapsed := workers.agree(time.time() - began) / 60) < args.minutes:
        rng = np.random.default_rng([7, step, workers.rank])
        torch.manual_seed(int(rng.integers(2**31)))
        chosen = rng.choice(len(told), args.batch, p=chance)
        texts = [with_stray_word(caption(told[i], rng), rng) if rng.random() > 0.1 else "" for i in chosen]
        x0 = latents[chosen].float()
        t = timesteps(rng, args.batch)
        noise = torch.randn_like(x0)
        a, s = alpha[t].view(-1, 1, 1, 1), sigma[t].view(-1, 1, 1, 1)
        noisy = a * x0 + s * noise
        velocity = a * noise - s * x0
        left = (args.minutes - elapsed) / args.decay_minutes
        lr = args.lr * min(1.0, (step - resumed + 1) / 200) * float(np.clip(left, 0.05, 1.0))
        optimizer.set_lr(lr)
        with torch.autocast("cpu", torch.bfloat16):
            states = text_encoder(encode(tokenizer, texts)).last_hidden_state
            predicted = unet(noisy, t, states, return_dict=False)[0]
        loss = (predicted.float() - velocity).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        workers.average(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if torch.isfinite(norm):
            optimizer.step()
            average.update()
        losses.append(loss.detach())
        step += 1
        if step % 200 == 0 and workers.first:
            speed = (step - last_step) * args.batch * workers.count / (time.time() - last)
            record.write(event="step", step=step, samples=step * args.batch * workers.count,
                         loss=round(float(torch.stack(losses).mean()), 4), grad_norm=round(float(norm), 3),
                         images_per_second=round(speed, 1), minutes=round(elapsed, 1), lr=round(lr, 6))  # fmt: skip
            save()
            losses = []
            if elapsed >= next_grid:
                next_grid = elapsed + args.grid_minutes
                write_average(average, unet, text_encoder, args.work)
                unet.set_attn_processor(AttnProcessor2_0())
                draw_grid(args.work, args.work / f"grid-{step:06d}.png")
                unet.set_attn_processor(AttnProcessor())
            last, last_step = time.time(), step
    if workers.first:
        write_average(average, unet, text_encoder, args.work)
        draw_grid(args.work, args.work / f"grid-{step:06d}.png")
        save()
        record.write(event="end", step=step, samples=step * args.batch * workers.count)


def write_average(average: Average, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, work: Path) -> None:
    """Save the averaged weights as unet-average/ and text_encoder-average/."""
    average.swap()
    unet.save_pretrained(work / "unet-average")
    text_encoder.save_pretrained(work / "text_encoder-average")
    average.swap()


if __name__ == "__main__":
    main()
