"""The network: a small relative of RT-DETR (Zhao et al. 2023, arXiv:2304.08069) that TensorRT 8.5 parses.

Convolutions to stride 16, one encoder layer, queries chosen among its tokens, decoder layers of plain attention: no GridSample.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.conveyor_sprites import LABELS

HEIGHT, WIDTH = 192, 320
STRIDE = 16
TOKENS = (HEIGHT // STRIDE) * (WIDTH // STRIDE)
DIM, HEADS, QUERIES, LAYERS = 64, 4, 24, 2


class Norm(nn.Module):
    """LayerNorm from elementary operators: TensorRT 8.5 does not parse LayerNormalization."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(DIM)), nn.Parameter(torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5) * self.weight + self.bias


class Attention(nn.Module):
    def __init__(self, queries: int, keys: int) -> None:
        super().__init__()
        self.queries, self.keys = queries, keys  # known beforehand, so that the exported shapes are constants but for N
        self.query, self.key, self.value, self.out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        head = DIM // HEADS
        q = self.query(query).reshape(-1, self.queries, HEADS, head).transpose(1, 2) * head**-0.5
        k = self.key(key).reshape(-1, self.keys, HEADS, head).permute(0, 2, 3, 1)
        v = self.value(value).reshape(-1, self.keys, HEADS, head).transpose(1, 2)
        mixed = torch.matmul(torch.softmax(torch.matmul(q, k), -1), v)
        return self.out(mixed.transpose(1, 2).reshape(-1, self.queries, DIM))


def feed_forward(hidden: int = 2 * DIM, out: int = DIM) -> nn.Sequential:
    return nn.Sequential(nn.Linear(DIM, hidden), nn.ReLU(), nn.Linear(hidden, out))


class EncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(TOKENS, TOKENS), feed_forward()
        self.norms = nn.ModuleList(Norm() for _ in range(3))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        n = self.norms[0](x)
        x = x + self.attention(n + position, n + position, n)
        return self.norms[2](x + self.mlp(self.norms[1](x)))


class DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.among, self.across, self.mlp = Attention(QUERIES, QUERIES), Attention(QUERIES, TOKENS), feed_forward()
        self.norms = nn.ModuleList(Norm() for _ in range(4))
        self.head = Head()

    def forward(self, x: Tensor, place: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        n = self.norms[0](x)
        x = x + self.among(n + place, n + place, n)
        x = x + self.across(self.norms[1](x) + place, memory + position, memory)
        return self.norms[3](x + self.mlp(self.norms[2](x)))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score, self.box = nn.Linear(DIM, len(LABELS)), feed_forward(DIM, 4)
        nn.init.constant_(self.score.bias, -4.0)
        nn.init.zeros_(self.box[-1].weight)
        nn.init.zeros_(self.box[-1].bias)


class Convolution(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.is_residual = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return functional.relu(x + y if self.is_residual else y)


def inverse_sigmoid(x: Tensor) -> Tensor:
    x = x.clamp(1e-4, 1 - 1e-4)
    return torch.log(x / (1 - x))


class ConveyorDetr(nn.Module):
    """pixel_values [N,3,192,320] RGB 0..1 → logits [N,Q,3], pred_boxes [N,Q,4] cxcywh 0..1; while training, all that has a loss."""

    def __init__(self) -> None:
        super().__init__()
        plan = [(3, 16, 2), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 2), (64, 64, 1), (64, 64, 1)]
        self.backbone = nn.Sequential(*(Convolution(*each) for each in plan))
        self.position = nn.Parameter(torch.randn(1, TOKENS, DIM) * 0.02)
        self.encoder = EncoderLayer()
        self.choice = Head()
        self.dense = Head()  # learns from several tokens an object; training only
        self.place = nn.Sequential(nn.Linear(4, DIM), nn.ReLU(), nn.Linear(DIM, DIM))
        self.decoder = nn.ModuleList(DecoderLayer() for _ in range(LAYERS))
        y, x = torch.meshgrid(torch.arange(HEIGHT // STRIDE), torch.arange(WIDTH // STRIDE), indexing="ij")
        anchors = torch.stack([(x + 0.5) * STRIDE / WIDTH, (y + 0.5) * STRIDE / HEIGHT, x * 0 + 0.12, y * 0 + 0.2], -1)
        self.register_buffer("widen", torch.zeros(1, 1, DIM, dtype=torch.long), persistent=False)
        self.register_buffer("anchors", inverse_sigmoid(anchors.reshape(1, TOKENS, 4)))

    def forward(self, pixel_values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(logits, boxes) of the last decoder layer; while training followed by the earlier ones, the encoder and the dense head."""
        x = (pixel_values - 0.4) * 4
        tokens = self.backbone(x).reshape(-1, DIM, TOKENS).transpose(1, 2)
        memory = self.encoder(tokens, self.position)
        token_logits, token_boxes = self.choice.score(memory), self.anchors + self.choice.box(memory)
        best = (
            torch.topk(token_logits.amax(-1), QUERIES, dim=1).indices.unsqueeze(-1) + self.widen
        )  # broadcast by adding zeros: no Expand over a computed shape
        content = torch.gather(memory, 1, best)
        reference = torch.gather(token_boxes, 1, best[..., :4])
        outputs = []
        if self.training:
            outputs = [(self.dense.score(memory), torch.sigmoid(self.anchors + self.dense.box(memory)))]
            outputs.append((token_logits, torch.sigmoid(token_boxes)))
            content, reference = content.detach(), reference.detach()
        for layer in self.decoder:
            content = layer(content, self.place(reference), memory, self.position)
            moved = reference + layer.head.box(content)
            outputs.append((layer.head.score(content), torch.sigmoid(moved)))
            reference = moved.detach()
        return outputs[::-1]
