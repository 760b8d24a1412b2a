"""Train the small DETR of the rendered belt camera, export it to ONNX and measure it on belts it has never seen.

python -m training.conveyor_detr --minutes 20 --bfloat16
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.conveyor import Box, Conveyor
from models.conveyor_sprites import LABELS
from training.conveyor_network import HEIGHT, WIDTH, ConveyorDetr
from training.evaluation import evaluate
from training.set_loss import Target, set_loss

HELD_OUT_SEEDS = 1000  # training starts there; the demo, the tests and the evaluation look at belts below


def shrink(frame: np.ndarray, antialias: bool) -> Tensor:
    """BGR picture [H,W,3] → RGB uint8 [3,192,320], stretched."""
    planes = torch.from_numpy(np.ascontiguousarray(frame[:, :, ::-1].transpose(2, 0, 1))).float()[None]
    small = functional.interpolate(planes, (HEIGHT, WIDTH), mode="bilinear", antialias=antialias, align_corners=False)
    return small[0].round().clamp(0, 255).to(torch.uint8)


def as_target(truth: tuple[Box, ...], width: int, height: int) -> Target:
    labels = torch.tensor([LABELS.index(box.label) for box in truth], dtype=torch.long)
    edges = torch.tensor([[b.x0 / width, b.y0 / height, b.x1 / width, b.y1 / height] for b in truth]).reshape(-1, 4)
    return labels, torch.cat([(edges[:, :2] + edges[:, 2:]) / 2, edges[:, 2:] - edges[:, :2]], -1)


class Pictures:
    """A growing pool of rendered pictures; each draw renders a few more, so that no two epochs are the same."""

    def __init__(self, size: int, rng: random.Random) -> None:
        self.size, self.rng = size, rng
        self.pool: list[tuple[Tensor, Target]] = []
        self.oldest = 0
        self.belt, self.left, self.t_s = Conveyor(HELD_OUT_SEEDS), 0, 0.0

    def render(self, count: int) -> None:
        for _ in range(count):
            if self.left == 0:
                self.belt = Conveyor(self.rng.randrange(HELD_OUT_SEEDS, 10**6), objects_per_s=self.rng.uniform(0.7, 1.6))
                self.left, self.t_s = 40, self.rng.uniform(0, 3600)
            self.left -= 1
            self.t_s += self.rng.uniform(1.0, 4.0)
            picture = shrink(self.belt.frame(self.t_s), antialias=self.rng.random() < 0.5)
            entry = picture, as_target(self.belt.truth(self.t_s), self.belt.width, self.belt.height)
            if len(self.pool) < self.size:
                self.pool.append(entry)
            else:
                self.pool[self.oldest % self.size] = entry
                self.oldest += 1

    def batch(self, count: int) -> tuple[Tensor, list[Target]]:
        pictures, targets = [], []
        for picture, (labels, boxes) in self.rng.sample(self.pool, count):
            if self.rng.random() < 0.5:
                picture, boxes = picture.flip(-1), torch.cat([1 - boxes[:, :1], boxes[:, 1:]], -1)
            tint = torch.tensor([self.rng.gauss(1, 0.04) for _ in range(3)])[:, None, None] * self.rng.uniform(0.85, 1.15)
            pictures.append(picture.float() / 255 * tint + self.rng.gauss(0, 0.02))
            targets.append((labels, boxes))
        return torch.stack(pictures).clamp(0, 1), targets


def train(options: argparse.Namespace) -> ConveyorDetr:
    rng = random.Random(options.seed)
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    model = ConveyorDetr().to(memory_format=torch.channels_last)
    if options.resume:
        model.load_state_dict(torch.load(options.resume))
    average = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=1e-4)
    pictures = Pictures(4000, rng)
    pictures.render(300)
    started = told = time.monotonic()
    shown, step, progress = 0.0, 0, 0.0
    while progress < 1:
        elapsed = time.monotonic() - started
        progress = min(1.0, step / options.steps if options.steps else elapsed / (60 * options.minutes))
        rate = options.rate * min(1.0, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        pictures.render(8 if len(pictures.pool) < pictures.size else 3)
        batch, targets = pictures.batch(options.batch)
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            outputs = model(batch.contiguous(memory_format=torch.channels_last))
        dense = outputs.pop()
        loss = sum((set_loss(*each, targets) for each in outputs), set_loss(*dense, targets, copies=4))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        step += 1
        keep = min(0.998, step / (step + 20))
        for name, value in model.state_dict().items():
            average[name] = torch.lerp(average[name], value, 1 - keep) if value.is_floating_point() else value.clone()
        shown = loss.item() if step == 1 else 0.98 * shown + 0.02 * loss.item()
        if time.monotonic() - told > 20:
            told = time.monotonic()
            print(f"{progress:6.1%}  step {step}  {told - started:5.0f} s  loss {shown:.3f}  rate {rate:.1e}", flush=True)
            if options.checkpoint:
                torch.save(average, options.checkpoint)
    print(f"trained {step} steps of {options.batch} pictures in {time.monotonic() - started:.0f} s")
    model.load_state_dict(average)
    return model


class Deployed(nn.Module):
    def __init__(self, model: ConveyorDetr) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(pixel_values)[0]


def export(model: ConveyorDetr, path: Path) -> None:
    model.eval()
    for each in model.backbone:
        each.conv, each.norm = torch.nn.utils.fusion.fuse_conv_bn_eval(each.conv, each.norm), nn.Identity()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        Deployed(model),
        (torch.rand(2, 3, HEIGHT, WIDTH),),
        str(path),
        input_names=["pixel_values"],
        output_names=["logits", "pred_boxes"],
        dynamic_axes={name: {0: "N"} for name in ("pixel_values", "logits", "pred_boxes")},
        opset_version=17,
        dynamo=False,
    )
    print(f"{path}: {path.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--steps", type=int, default=0, help="instead of --minutes")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bfloat16", action="store_true", help="faster where the processor has AVX512-BF16 or AMX")
    parser.add_argument("--checkpoint", type=Path, help="write averaged weights there every 20 s")
    parser.add_argument("--resume", type=Path, help="start from such a checkpoint")
    parser.add_argument("--output", type=Path, default=Path("models/weights/conveyor_detr.onnx"))
    parser.add_argument("--evaluate-only", action="store_true", help="measure --output as it is")
    options = parser.parse_args()
    if not options.evaluate_only:
        export(train(options), options.output)
    evaluate(options.output, range(100), frames_a_seed=20)


if __name__ == "__main__":
    main()
