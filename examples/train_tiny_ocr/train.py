"""Train the model on a CPU: from nothing, or further from an exported checkpoint.

    python train.py --out run
    python train.py --out run --init ../../models/tiny-ocr --look_minutes 0 --lr 0.01

Time, not steps, drives every schedule, so a run ends when it is told to on any machine.
`--resume` continues from the last checkpoint in --out, with the time already spent counted.
"""

import argparse
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from data import IGNORED, Batch, Mix, Stream, make_batch
from kinds import HELD_OUT
from model import TinyOCR, load_exported, parameter_count
from muon import Muon, split

LOOK: Mix = {
    "short": 0.15,
    "line": 0.2,
    "lines": 0.15,
    "receipt": 0.15,
    "page": 0.1,
    "title": 0.1,
    "small": 0.15,
}
ALL_KINDS: Mix = {
    "short": 0.03,
    "line": 0.1,
    "lines": 0.07,
    "3 lines": 0.11,
    "small receipt": 0.04,
    "receipt": 0.14,
    "long receipt": 0.08,
    "page": 0.11,
    "title": 0.1,
    "small": 0.06,
    "document": 0.08,
    "full page": 0.08,
}
# the share of the reading phase from which a mix of batches holds
CURRICULUM: list[tuple[float, Mix]] = [
    (0.0, {"short": 1.0}),
    (0.08, {"short": 0.5, "line": 0.5}),
    (0.18, {"short": 0.2, "line": 0.3, "lines": 0.25, "small receipt": 0.15, "title": 0.1}),
    (0.32, ALL_KINDS),
]
Losses = dict[str, torch.Tensor]


def arguments() -> argparse.Namespace:
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("--out", type=Path, default=Path("run"), help="folder for log.txt and last.pt")
    a.add_argument(
        "--init",
        type=Path,
        help="start from this exported checkpoint, with all kinds from the beginning",
    )
    a.add_argument("--resume", action="store_true")
    a.add_argument(
        "--look_minutes",
        type=float,
        default=22,
        help="vision-only phase: each cell names its characters",
    )
    a.add_argument(
        "--minutes", type=float, default=93, help="reading phase: the whole model answers"
    )
    a.add_argument("--budget", type=int, default=1800, help="size of a batch in image cells")
    a.add_argument("--lr", type=float, default=0.02, help="Muon's learning rate")
    a.add_argument("--adam_lr", type=float, default=3e-3, help="AdamW's learning rate")
    a.add_argument(
        "--vision_lr",
        type=float,
        default=0.5,
        help="the vision tower's share of --lr while reading",
    )
    a.add_argument(
        "--freeze",
        type=float,
        default=0.05,
        help="share of the reading phase with a frozen vision tower",
    )
    a.add_argument(
        "--flat",
        type=float,
        default=0.33,
        help="share of the reading phase before the learning rate falls",
    )
    a.add_argument(
        "--slot_weight", type=float, default=1.0, help="weight of the per-cell loss while reading"
    )
    a.add_argument(
        "--guide_weight",
        type=float,
        default=0.5,
        help="weight of the attention guidance while reading",
    )
    a.add_argument(
        "--noise", type=float, default=0.05, help="share of wrong characters in the answer fed back"
    )
    a.add_argument(
        "--measure_minutes",
        type=float,
        default=4,
        help="minutes between held-out measurements and checkpoints",
    )
    a.add_argument("--seed", type=int, default=1)
    return a.parse_args()


@dataclass(frozen=True)
class Stage:
    """From `start` seconds on, until the next stage."""

    start: float
    reading: bool
    mix: Mix
    long_share: float  # of prompts


def stages(args: argparse.Namespace) -> list[Stage]:
    look = args.look_minutes * 60
    read = args.minutes * 60
    curriculum = [(0.0, ALL_KINDS)] if args.init else CURRICULUM
    reading = [
        Stage(look + share * read, True, mix, 0.35 if mix is ALL_KINDS else 0.1)
        for share, mix in curriculum
    ]
    return ([Stage(0.0, False, LOOK, 0.05)] if look else []) + reading


def learning_rate(progress: float, flat: float, floor: float) -> float:
    """Warms up, holds, then falls in a straight line; a share of the full rate."""
    fall = max(0.0, (progress - flat) / (1 - flat))
    return min(1.0, 0.02 + progress / 0.02) * (1 - (1 - floor) * fall)


def look(model: TinyOCR, batch: Batch) -> Losses:
    slots, characters = model.slot_loss(model.see(batch.images), batch.slots)
    return {"slots": slots, "characters": characters}


def read(model: TinyOCR, batch: Batch, noise: float = 0.0) -> Losses:
    out = model(batch, noise)
    slots, characters = model.slot_loss(out.cells, batch.slots)
    loss = F.cross_entropy(out.logits.flatten(0, 1), batch.answers.flatten(), ignore_index=IGNORED)
    right = (out.logits.argmax(-1) == batch.answers)[batch.answers != IGNORED].float().mean()
    return {
        "loss": loss,
        "right": right,
        "guidance": out.guidance,
        "slots": slots,
        "characters": characters,
    }


class Run:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.stages = stages(args)
        self.look_end = args.look_minutes * 60
        self.end = (args.look_minutes + args.minutes) * 60
        self.model = TinyOCR()
        if args.init:
            load_exported(self.model, args.init)
        matrices, rest = split(self.model)
        seeing = {id(p) for p in self.model.visual.parameters()}
        groups = [
            {"params": [p for p in matrices if (id(p) in seeing) is wanted]}
            for wanted in (True, False)
        ]
        self.muon = Muon(groups, args.lr)
        self.adam = torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
        rng = random.Random(12345)
        self.held_out = {
            name: make_batch(rng, *kind, budget=900, long=True) for name, kind in HELD_OUT.items()
        }
        self.spent = 0.0
        self.step_count = 0
        self.sums: dict[str, list[float]] = defaultdict(list)
        self.log = (args.out / "log.txt").open("a", buffering=1)

    def say(self, text: str) -> None:
        line = f"{self.spent / 60:7.2f} min {text}"
        print(line, flush=True)
        self.log.write(line + "\n")

    def save(self) -> None:
        state = {name: getattr(self, name).state_dict() for name in ("model", "muon", "adam")}
        new = self.args.out / "new.pt"
        torch.save(state | {"spent": self.spent, "step_count": self.step_count}, new)
        new.replace(self.args.out / "last.pt")

    def resume(self) -> None:
        state = torch.load(self.args.out / "last.pt")
        for name in ("model", "muon", "adam"):
            getattr(self, name).load_state_dict(state[name])
        self.spent = state["spent"]
        self.step_count = state["step_count"]

    def progress(self, reading: bool) -> float:
        return (
            (self.spent - self.look_end) / (self.end - self.look_end)
            if reading
            else self.spent / self.look_end
        )

    def set_rates(self, reading: bool) -> None:
        args = self.args
        progress = self.progress(reading)
        rate = learning_rate(progress, args.flat, 0.02 if reading else 0.5)
        self.muon.param_groups[0]["lr"] = args.lr * rate * (args.vision_lr if reading else 1)
        self.muon.param_groups[1]["lr"] = args.lr * rate
        self.adam.param_groups[0]["lr"] = args.adam_lr * rate
        self.model.visual.requires_grad_(not reading or progress >= args.freeze)

    def total(self, losses: Losses) -> torch.Tensor:
        if "loss" not in losses:
            return losses["slots"]
        return (
            losses["loss"]
            + self.args.slot_weight * losses["slots"]
            + self.args.guide_weight * losses["guidance"]
        )

    def step(self, batch: Batch, reading: bool) -> None:
        self.set_rates(reading)
        with torch.autocast("cpu", torch.bfloat16):
            losses = (
                read(self.model, batch, self.args.noise) if reading else look(self.model, batch)
            )
        self.total(losses).backward()
        for group in self.adam.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        for optimizer in (self.muon, self.adam):
            optimizer.step()
            optimizer.zero_grad()
        self.step_count += 1
        for name, value in losses.items():
            self.sums[name].append(value.item())

    def say_means(self) -> None:
        means = " ".join(
            f"{name} {sum(values) / len(values):.4f}" for name, values in self.sums.items()
        )
        self.say(f"step {self.step_count} {means}")
        self.sums.clear()

    @torch.no_grad()
    def measure(self, reading: bool) -> None:
        for name, batch in self.held_out.items():
            with torch.autocast("cpu", torch.bfloat16):
                losses = read(self.model, batch) if reading else look(self.model, batch)
            self.say(
                f"held out {name:14}"
                + " ".join(f"{key} {value:.4f}" for key, value in losses.items())
            )

    def run_stage(self, stage: Stage, end: float) -> None:
        self.say(f"{stage}")
        stream = Stream(
            stage.mix, self.args.budget, stage.long_share, self.args.seed + self.step_count
        )
        began = time.monotonic() - self.spent
        next_say = next_measure = self.spent
        for batch in stream:
            self.step(batch, stage.reading)
            self.spent = time.monotonic() - began
            if self.spent >= next_say:
                next_say = self.spent + 30
                self.say_means()
            if self.spent >= next_measure or self.spent >= end:
                next_measure = self.spent + 60 * self.args.measure_minutes
                self.measure(stage.reading)
                self.save()
            if self.spent >= end:
                break
        stream.close()

    def run(self) -> None:
        self.say(f"{parameter_count(self.model):,} parameters; {vars(self.args)}")
        ends = [stage.start for stage in self.stages[1:]] + [self.end]
        for stage, end in zip(self.stages, ends, strict=True):
            if self.spent < end:
                self.run_stage(stage, end)


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    run = Run(args)
    if args.resume:
        run.resume()
    run.run()


if __name__ == "__main__":
    main()
