"""The loss of set prediction: one-to-one assignment (Carion et al. 2020, arXiv:2005.12872), then focal scores, L1 and GIoU."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

Target = tuple[Tensor, Tensor]  # labels [K] int64, boxes [K,4] cxcywh 0..1


def corners(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def generalised_iou(one: Tensor, other: Tensor) -> Tensor:
    """Pairwise over the leading dimensions, which broadcast; boxes cxcywh (Rezatofighi et al. 2019)."""
    a, b = corners(one), corners(other)
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    outer = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = one[..., 2:].prod(-1) + other[..., 2:].prod(-1) - inner
    return inner / union.clamp(min=1e-9) - (outer - union) / outer.clamp(min=1e-9)


@torch.no_grad()
def assign(logits: Tensor, boxes: Tensor, targets: list[Target], copies: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cheapest one-to-one match (Carion et al. 2020), with `copies` predictions for each object: picture, prediction, target indices."""
    pictures, predictions, wanted = [], [], []
    start = 0
    score = torch.sigmoid(logits)
    for n, (labels, truth) in enumerate(targets):
        if len(labels):
            pair = generalised_iou(boxes[n][:, None], truth[None])
            distance = (boxes[n][:, None] - truth[None]).abs().sum(-1)
            cost = 2 * (1 - score[n][:, labels]) + 5 * distance - 2 * pair
            rows, columns = linear_sum_assignment(np.tile(cost.numpy(), (1, copies)))
            predictions += rows.tolist()
            wanted += (start + columns % len(labels)).tolist()
            pictures += [n] * len(rows)
        start += len(labels)
    return torch.tensor(pictures), torch.tensor(predictions), torch.tensor(wanted)


def set_loss(logits: Tensor, boxes: Tensor, targets: list[Target], copies: int = 1) -> Tensor:
    logits, boxes = logits.float(), boxes.float()
    all_labels, all_boxes = torch.cat([each[0] for each in targets]), torch.cat([each[1] for each in targets])
    wanted = torch.zeros_like(logits)
    count = max(1, len(all_labels) * copies)
    box_loss = boxes.sum() * 0
    if len(all_labels):
        picture, prediction, index = assign(logits, boxes, targets, copies)
        wanted[picture, prediction, all_labels[index]] = 1
        found, truth = boxes[picture, prediction], all_boxes[index]
        box_loss = 5 * (found - truth).abs().sum() + 2 * (1 - generalised_iou(found, truth)).sum()
    error = (wanted - torch.sigmoid(logits)).abs()
    focal = error**1.5 * functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return (2 * focal.sum() + box_loss) / count
