"""Train pocket's autoencoder: torchrun --nproc_per_node=2 train_vae.py --work ~/pocket --minutes 30

AutoencoderKL, f4: (3, 64, 64) pictures to (8, 16, 16) latents. Eight channels, because a flat drawing's patch with an
edge between two colours has about eight degrees of freedom; four made eyes and zigzags soft.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from optimizer import MuonAdamW
from shards import pictures, render_ahead
from training import Average, Record, Workers, machine, save_atomically

CONFIG = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 8, "sample_size": 64, "layers_per_block": 1,
    "block_out_channels": (24, 40, 80), "norm_num_groups": 8, "mid_block_add_attention": False, "scaling_factor": 1.0,
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
}  # fmt: skip
TRAIN_SHARDS = range(6)
VALIDATION_SHARD = 1_000_000


def build() -> AutoencoderKL:
    model = AutoencoderKL(**CONFIG)
    for name, p in model.named_parameters():
        if name.endswith("conv2.weight"):  # residual branches start small: a smoother and faster start
            p.data.mul_(0.2)
    return model


def as_tensor(batch: np.ndarray) -> torch.Tensor:
    """(n, 64, 64, 3) uint8 -> (n, 3, 64, 64) float32 in [-1, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(batch)).permute(0, 3, 1, 2).float()
    return (x / 127.5 - 1).contiguous()  # a CPU's group norm is many times slower on channels last


def loss_terms(vae: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """L1 + L2, edges (finite differences), and KL per latent dimension."""
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample()).sample.float()
    pixel = F.l1_loss(y, x) + F.mse_loss(y, x)
    edges = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return pixel, edges, kl


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    errors = []
    for k in range(0, len(images), 50):
        x = as_tensor(images[k : k + 50])
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append(((y - x) / 2).pow(2).mean(dim=(1, 2, 3)))
    return float((-10 * torch.cat(errors).log10()).mean())


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: np.ndarray) -> None:
    """Fold zero mean, unit variance per latent channel into the 1×1 convolutions; decode(encode(x)) stays."""
    z = torch.cat([vae.encode(as_tensor(images[k : k + 50])).latent_dist.mode() for k in range(0, len(images), 50)])
    mean, std = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))
    c = len(mean)
    vae.quant_conv.weight[:c] /= std[:, None, None, None]
    vae.quant_conv.bias[:c] = (vae.quant_conv.bias[:c] - mean) / std
    vae.quant_conv.bias[c:] -= 2 * std.log()
    w = vae.post_quant_conv.weight
    vae.post_quant_conv.bias += (w[:, :, 0, 0] * mean).sum(dim=1)
    w *= std[None, :, None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for shards, checkpoints and records")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time, over all resumes")
    parser.add_argument("--batch", type=int, default=8, help="pictures in a step, for each process")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    workers = Workers()
    if workers.first:
        render_ahead(TRAIN_SHARDS, args.work)
    workers.agree(0.0)
    data = np.concatenate([pictures(s, args.work) for s in TRAIN_SHARDS])
    held = pictures(VALIDATION_SHARD, args.work, 500)
    vae = build()
    ends = [vae.encoder.conv_in.weight, vae.decoder.conv_out.weight]
    optimizer = MuonAdamW(vae.parameters(), ends, lr=args.lr, weight_decay=1e-3)
    average = Average(vae, 0.998)
    step, spent = 0, 0.0
    checkpoint = args.work / "vae.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["model"])
        if "muon" in state["optimizer"]:
            optimizer.load_state_dict(state["optimizer"])
        for s, v in zip(average.shadow, state["average"], strict=True):
            s.copy_(v)
        step, spent, average.steps = state["step"], state["spent"], state["step"]
    record = Record(args.work / "vae.jsonl")
    if workers.first:
        record.write(
            event="start",
            step=step,
            parameters=sum(p.numel() for p in vae.parameters()),
            workers=workers.count,
            machine=machine(),
        )
    began, last, last_step = time.time() - spent, time.time(), step
    parameters = list(vae.parameters())
    while (elapsed := workers.agree(time.time() - began)) < args.minutes * 60:
        rng = np.random.default_rng([args.seed, step, workers.rank])
        x = as_tensor(data[np.sort(rng.integers(0, len(data), args.batch))])
        done = elapsed / (args.minutes * 60)
        lr = args.lr * min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)) + 0.01)
        optimizer.set_lr(lr)
        with torch.autocast("cpu", torch.bfloat16):
            pixel, edges, kl = loss_terms(vae, x)
        loss = pixel + 0.5 * edges + 1e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        workers.average(parameters)
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        if torch.isfinite(norm):
            optimizer.step()
            average.update()
        step += 1
        if step % 250 == 0 and workers.first:
            speed = (step - last_step) * args.batch * workers.count / (time.time() - last)
            average.swap()
            quality = psnr(vae, held[:200])
            average.swap()
            record.write(event="step", step=step, samples=step * args.batch * workers.count, loss=round(float(loss), 4),
                         pixel=round(float(pixel), 4), kl=round(float(kl), 2), psnr_db=round(quality, 2),
                         images_per_second=round(speed, 1), minutes=round((time.time() - began) / 60, 1))  # fmt: skip
            save_atomically({"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "average": average.shadow,
                             "step": step, "spent": time.time() - began}, checkpoint)  # fmt: skip
            last, last_step = time.time(), step
    if not workers.first:
        return
    average.swap()
    before = psnr(vae, held)
    normalise_latents(vae, data[:2000])
    after = psnr(vae, held)
    vae.eval().save_pretrained(args.work / "vae")
    record.write(event="end", step=step, psnr_db=round(before, 2), psnr_db_normalised=round(after, 2))


if __name__ == "__main__":
    main()
