"""Small models with every kind of layer whose weights can be rounded."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Mixed(nn.Module):
    """Convolution, attention, linear layers of which two share a weight, transposed convolution, batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, stride=4)
        self.norm = nn.BatchNorm2d(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32, bias=False)
        self.again = nn.Linear(64, 32)
        self.again.weight = self.down.weight
        self.head = nn.ConvTranspose2d(32, 16, 4, stride=4)

    def forward(self, image: Tensor) -> Tensor:
        found = self.norm(self.patch(image))
        tokens = found.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        tokens = tokens + self.down(torch.relu(self.up(tokens)))
        tokens = tokens + self.again(torch.relu(self.up(tokens)))
        out: Tensor = self.head(tokens.transpose(1, 2).reshape(found.shape))
        return out


def mixed(seed: int = 0) -> Mixed:
    torch.manual_seed(seed)
    return Mixed().eval()


def layers(width: int = 64, seed: int = 0) -> nn.Sequential:
    """Two linear layers with a normalization between them."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(width, 2 * width), nn.GELU(), nn.LayerNorm(2 * width), nn.Linear(2 * width, width)
    ).eval()


IMAGE = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(9))


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())
