"""Train the judge, apart from the model it judges: python train_judge.py --work ~/pocket --minutes 10

Two things from one small convolutional network on (3, 64, 64) pictures: what a picture shows (one head per attribute of
the first, that is the left or only, thing and of the second), and a 64-d embedding in which two pictures of one subject
lie close together and a subject with one attribute changed does not, nor one that is only half there: its colours, and
a face that is a blend with another's. It never sees the UNet's pictures; half of what it learns from went through the
autoencoder, or it would be worthless on decoded pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from optimizer import MuonAdamW
from safetensors.torch import load_file, save_file
from shards import pictures, scenes
from train_vae import as_tensor
from training import Record, machine
from world import Scene, Thing, render, sample_scene
from world.creature import BODIES, MOUTHS, TOPS
from world.palette import NAMES as COLOURS
from world.patterns import PATTERNS
from world.places import NAMES as PLACES
from world.scene import KINDS, SIDES, SIZES, sample_thing
from world.things import VARIANTS

from train.judge import JudgeNetwork

HEADS = {
    "count": ("1", "2"), "kind": KINDS, "colour": COLOURS, "pattern": PATTERNS, "colour2": COLOURS,
    "size": tuple(SIZES), "side": tuple(SIDES), "place": (*PLACES, *COLOURS), "kind_b": KINDS, "colour_b": COLOURS,
    "body": BODIES, "top": TOPS, "eyes": ("1", "2", "3"), "mark": ("none", "star", "heart", "dot"),
    "belly": ("False", "True"),
}  # fmt: skip
JUDGE_SHARDS = (900_000, 900_001, 900_002)  # scenes that pocket never trains on
VALIDATION = 900_100
GROUP = 4  # pictures of one subject in an identity batch
KINDS_OF_PICTURE = 3  # of each subject: itself, with one attribute wrong, half-formed


def labels(scene: Scene) -> list[int]:
    """One class index per head, -100 where the head does not apply."""
    first = scene.things[0]
    second = scene.things[1] if len(scene.things) == 2 else None
    c = first.creature
    has_second = first.pattern != "plain" or (c is not None and c.belly)
    found = {
        "count": str(len(scene.things)), "kind": first.kind, "colour": first.colour, "pattern": first.pattern,
        "colour2": first.colour2 if has_second else None, "size": first.size if second is None else None,
        "side": first.side if second is None else None, "place": scene.place,
        "kind_b": second.kind if second else None, "colour_b": second.colour if second else None,
        "body": c.body if c else None, "top": c.top if c else None, "eyes": str(c.eyes) if c else None,
        "mark": c.mark if c else None, "belly": str(c.belly) if c else None,
    }  # fmt: skip
    return [HEADS[k].index(v) if (v := found[k]) is not None else -100 for k in HEADS]


def one_wrong(thing: Thing, rng: np.random.Generator) -> Thing:
    """`thing` with one attribute changed so that it can be seen."""

    def other(options: tuple, current: object) -> object:
        rest = [o for o in options if o != current]
        return rest[int(rng.integers(len(rest)))]

    c = thing.creature
    if c is None:
        options = ["colour", "pattern", "variant"] if VARIANTS[thing.kind] > 1 else ["colour", "pattern"]
        options += ["colour2"] if thing.pattern != "plain" else []
    else:
        options = ["colour", "pattern", "body", "top", "eyes"] + (["mark"] if c.mark != "none" else [])
        options += ["colour2"] if thing.pattern != "plain" or c.belly else []
    which = options[int(rng.integers(len(options)))]
    if which == "colour":
        return replace(thing, colour=other(tuple(x for x in COLOURS if x != thing.colour2), thing.colour))
    if which == "colour2":
        return replace(thing, colour2=other(tuple(x for x in COLOURS if x != thing.colour), thing.colour2))
    if which == "pattern":
        return replace(thing, pattern=other(PATTERNS, thing.pattern))
    if which == "variant":
        return replace(thing, variant=other(tuple(range(VARIANTS[thing.kind])), thing.variant))
    change = {"body": BODIES, "top": TOPS, "eyes": (1, 2, 3), "mark": ("none", "star", "heart", "dot"), "mouth": MOUTHS}
    return replace(thing, creature=replace(c, **{which: other(change[which], getattr(c, which))}))


def anywhere(thing: Thing, rng: np.random.Generator, *, company: float = 0.15) -> Scene:
    """`thing` in a scene drawn at random: place, size, side, now and then beside another thing."""
    scene = sample_scene(rng, two=company)
    while scene.place == thing.colour or (scene.place == thing.colour2 and thing.pattern != "plain"):
        scene = sample_scene(rng, two=company)
    other = scene.things[0]
    if len(scene.things) == 2:
        return Scene((replace(thing, size="small", side="on the left"), scene.things[1]), scene.place)
    return Scene((replace(thing, size=other.size, side=other.side),), scene.place)


def muddled(thing: Thing, rng: np.random.Generator) -> Thing:
    """`thing` in the same colours with its build changed: what a half-formed picture of it is blended with."""
    c = thing.creature
    if c is None:
        return replace(thing, variant=int(rng.integers(VARIANTS[thing.kind])), pattern=one_of(PATTERNS, rng))
    build = {"body": BODIES, "top": TOPS, "eyes": (1, 2, 3), "mouth": MOUTHS, "mark": ("none", "star", "heart", "dot")}
    return replace(thing, creature=replace(c, **{name: one_of(options, rng) for name, options in build.items()}))


def one_of(options: tuple, rng: np.random.Generator) -> object:
    return options[int(rng.integers(len(options)))]


@torch.no_grad()
def half_formed(vae: AutoencoderKL, thing: Thing, scenes: list[Scene], rng: np.random.Generator) -> torch.Tensor:
    """Pictures in which `thing` is only half there, (n, 3, 64, 64) in [-1, 1].

    Each is drawn twice in the same spot, as itself and `muddled`; their latents are blended under a soft random mask,
    smooth noise is added where the thing is, and the blend decoded: right colours, wrong or smeared parts, as a model
    in its middle makes. The background stays clean, or it alone would tell.
    """
    drawn = []
    for scene in scenes:
        seed = int(rng.integers(2**31))
        dress = {"size": scene.things[0].size, "side": scene.things[0].side}
        beside = scene.things[1:]
        itself, other = (replace(shown, **dress) for shown in (thing, muddled(thing, rng)))
        for things in ((itself, *beside), (other, *beside), ()):
            drawn.append(np.asarray(render(Scene(things, scene.place), np.random.default_rng(seed))))
    latents = vae.encode(as_tensor(np.stack(drawn))).latent_dist.mode().float()
    one, two, bare = latents[0::3], latents[1::3], latents[2::3]
    n = len(one)

    def smooth(channels: int, cells: int) -> torch.Tensor:
        coarse = torch.from_numpy(rng.normal(size=(n, channels, cells, cells)).astype(np.float32))
        return F.interpolate(coarse, size=one.shape[-2:], mode="bicubic")

    there = ((one - bare).abs().mean(1, keepdim=True) > 0.3).float()
    there = F.avg_pool2d(F.max_pool2d(there, 3, 1, 1), 3, 1, 1)
    mask = torch.sigmoid(4 * smooth(1, 5))
    strength = torch.from_numpy(rng.uniform(0.2, 0.8, (n, 1, 1, 1)).astype(np.float32))
    blend = torch.lerp(two, one, mask) + strength * there * smooth(one.shape[1], 8)
    return vae.decode(blend).sample.float().clamp(-1, 1)


@torch.no_grad()
def identity_pool(vae: AutoencoderKL, rng: np.random.Generator, subjects: int) -> tuple[torch.Tensor, ...]:
    """Pictures of `subjects` things, and which subject each shows: GROUP as they are, GROUP with one attribute wrong
    (a subject of its own), GROUP half-formed (each a subject of its own). Raw, decoded, numbers."""
    raw, decoded, who = [], [], []
    for k in range(subjects):
        kind = "creature" if rng.random() < 0.7 else "cup" if rng.random() < 0.6 else None
        thing = sample_thing(rng, "night", kind)
        near = one_wrong(thing, rng)
        images = [np.asarray(render(anywhere(shown, rng), rng)) for shown in (thing, near) for _ in range(GROUP)]
        x = as_tensor(np.stack(images))
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encode(x).latent_dist.mode().float()
            soft = torch.from_numpy(rng.uniform(0, 0.15, (len(z), 1, 1, 1)).astype(np.float32))
            y = vae.decode(z + soft * torch.randn_like(z)).sample.float().clamp(-1, 1)
            blends = half_formed(vae, thing, [anywhere(thing, rng) for _ in range(GROUP)], rng)
        raw += [x.half(), blends.half()]
        decoded += [y.half(), blends.half()]
        first = k * (2 + GROUP)
        who += [first] * GROUP + [first + 1] * GROUP + list(range(first + 2, first + 2 + GROUP))
    return torch.cat(raw), torch.cat(decoded), torch.tensor(who)


def contrast(embedding: torch.Tensor, who: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, eq. 2)."""
    logits = embedding @ embedding.T / temperature
    self_mask = torch.eye(len(who), dtype=torch.bool)
    logits = logits.masked_fill(self_mask, -1e4)
    same = (who[:, None] == who[None, :]) & ~self_mask
    anchors = same.any(dim=1)  # a half-formed picture is only ever a negative
    log_p = logits - logits.logsumexp(dim=1, keepdim=True)
    return -(log_p * same).sum(dim=1)[anchors].div(same.sum(dim=1)[anchors]).mean()


def too_near(embedding: torch.Tensor, own: int = GROUP, margin: float = 0.35) -> torch.Tensor:
    """How far pictures with something wrong lie within `margin` (cosine) of their subject's own, squared and averaged.

    The contrast is content when they lie further off than the subject's own; the scale of likeness needs them far off.
    """
    each = embedding.view(-1, KINDS_OF_PICTURE * GROUP, embedding.shape[1])
    cosines = each[:, :own] @ each[:, own:].transpose(1, 2)
    return (cosines - margin).clamp_min(0).square().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--subjects", type=int, default=2000, help="to learn likeness from")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--go-on", action="store_true", help="start from the judge in the work folder")
    args = parser.parse_args()
    torch.manual_seed(5)
    vae = AutoencoderKL.from_pretrained(args.work / "vae").eval()
    net = JudgeNetwork({k: len(v) for k, v in HEADS.items()})
    optimizer = MuonAdamW(net.parameters(), [net.stem.weight, *(h.weight for h in net.heads.values())], lr=args.lr)
    record = Record(args.work / "judge.jsonl")
    if args.go_on:
        net.load_state_dict({k: v.float() for k, v in load_file(args.work / "judge" / "judge.safetensors").items()})
    start = "judge" if args.go_on else "scratch"
    record.write(event="start", start=start, parameters=sum(p.numel() for p in net.parameters()), machine=machine())

    @torch.no_grad()
    def through(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return vae.decode(vae.encode(x).latent_dist.mode()).sample.float().clamp(-1, 1)

    def pool(shard: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raw = as_tensor(pictures(shard, args.work, count))
        decoded = torch.cat([through(raw[k : k + 100]) for k in range(0, count, 100)])
        return raw.half(), decoded.half(), torch.tensor([labels(s) for s in scenes(shard, count)])

    def load(name: str, make):  # the pools take minutes to make; keep them
        path = args.work / f"{name}.pt"
        if not path.exists():
            torch.save(make(), path)
        return torch.load(path, weights_only=True)

    def attribute_pool() -> tuple[torch.Tensor, ...]:
        parts = [pool(shard, 10_000) for shard in JUDGE_SHARDS]
        return tuple(torch.cat([part[k] for part in parts]) for k in range(3))

    raw, decoded, target = load("judge-attributes", attribute_pool)
    id_raw, id_decoded, who = load(
        "judge-subjects", lambda: identity_pool(vae, np.random.default_rng(11), args.subjects)
    )
    each = KINDS_OF_PICTURE * GROUP
    rng = np.random.default_rng(6)
    began, step = time.time(), 0

    def noisy(a: torch.Tensor, b: torch.Tensor, index: np.ndarray) -> torch.Tensor:
        """Clean or decoded at random, or in between, with a little noise, blur of decoding and brightness."""
        mix = torch.from_numpy(rng.choice((0.0, 1.0, 0.5), size=len(index), p=(0.4, 0.45, 0.15)).astype(np.float32))
        x = a[index].float().lerp(b[index].float(), mix.view(-1, 1, 1, 1))
        x = x + torch.randn_like(x) * torch.from_numpy(rng.uniform(0, 0.06, (len(index), 1, 1, 1)).astype(np.float32))
        dy, dx = rng.integers(-2, 3, 2)
        return torch.roll(x, (int(dy), int(dx)), (2, 3))

    while (spent := time.time() - began) < args.minutes * 60:
        optimizer.set_lr(
            args.lr * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * spent / args.minutes / 60))
        )
        index = rng.integers(0, len(target), args.batch)
        chosen = rng.choice(len(who) // each, args.batch // (2 * GROUP), replace=False)
        identity = (chosen[:, None] * each + np.arange(each)).reshape(-1)
        x = torch.cat([noisy(raw, decoded, index), noisy(id_raw, id_decoded, identity)])
        with torch.autocast("cpu", torch.bfloat16):
            out, embedding = net(x)
        n = args.batch
        attribute_loss = sum(
            F.cross_entropy(o[:n].float(), target[index, k], ignore_index=-100) for k, o in enumerate(out.values())
        )
        identity_loss = contrast(embedding[n:].float(), who[identity])
        near_loss = too_near(embedding[n:].float())
        loss = attribute_loss + 3.0 * identity_loss + 30.0 * near_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            losses = {"attributes": attribute_loss, "identity": identity_loss, "near": near_loss}
            record.write(event="step", step=step, **{k: round(float(v), 4) for k, v in losses.items()},
                         minutes=round(spent / 60, 2))  # fmt: skip
    net.eval()
    raw_v, decoded_v, target_v = pool(VALIDATION, 1000)
    accuracy: dict[str, dict[str, float]] = {}
    for name, x in (("renders", raw_v), ("decoded", decoded_v)):
        with torch.no_grad():
            out, _ = net(x.float())
        accuracy[name] = {}
        for k, (head, o) in enumerate(out.items()):
            scored = target_v[:, k] >= 0
            accuracy[name][head] = round(float((o.argmax(-1) == target_v[:, k])[scored].float().mean()), 3)
    folder = args.work / "judge"
    folder.mkdir(exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in net.state_dict().items()}, folder / "judge.safetensors")
    (folder / "judge.json").write_text(json.dumps({"heads": HEADS, "accuracy": accuracy}, indent=1))
    record.write(event="end", step=step, accuracy=accuracy)


if __name__ == "__main__":
    main()
