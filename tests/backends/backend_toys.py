"""Small torch modules and graphs for the tests of the toolchains."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backends.base import BackendError, Feeds, Graph, Quantizer, QuantSpec, Source
from backends.exchange import export

SIZE, PATCH, WIDTH, HEADS = 64, 8, 64, 2


class Block(nn.Module):
    """Pre-norm attention and GELU MLP."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.proj(attended)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ToyTransformer(nn.Module):
    """Patch embedding, blocks, a transposed convolution and a residual convolution head; two outputs."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.ConvTranspose2d(WIDTH, 64, 2, 2)
        self.conv1, self.conv2 = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.out = nn.Conv2d(64, 4, 1)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.embed(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        side = SIZE // PATCH
        x = self.up(tokens.transpose(1, 2).reshape(image.shape[0], WIDTH, side, side))
        x = x + self.conv2(F.relu(self.conv1(F.relu(x))))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return tokens, self.out(F.relu(x))


def toy(depth: int = 2) -> ToyTransformer:
    """A seeded toy whose norms and biases are not at their initial values (exporters merge equal tensors)."""
    torch.manual_seed(0)
    module = ToyTransformer(depth).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def toy_flops(depth: int = 2) -> float:
    """FLOPs of the toy by hand, two per multiply-add."""
    n, side = (SIZE // PATCH) ** 2, SIZE // PATCH
    block = 2 * n * WIDTH * WIDTH * (3 + 1 + 4 + 4) + 2 * 2 * n * n * WIDTH
    embed = 2 * n * WIDTH * 3 * PATCH * PATCH
    up = 2 * side * side * WIDTH * 64 * 4
    convs = 2 * 2 * (2 * side) ** 2 * 64 * 64 * 9
    out = 2 * (4 * side) ** 2 * 64 * 4
    return float(depth * block + embed + up + convs + out)


def image(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def toy_source(folder: Path, depth: int = 2) -> Source:
    module, example = toy(depth), {"image": image()}
    graph = export(module, example, ["tokens", "map"], folder / "toy.onnx")
    return Source("toy", module, example, ("tokens", "map"), graph)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def linear_graph(folder: Path) -> tuple[nn.Module, Graph]:
    module = Linear().eval()
    return module, export(module, {"x": torch.randn(8, 64)}, ["y"], folder / "linear.onnx")


class Calibration:
    """Makes its items when asked and counts how many are alive at once."""

    def __init__(self, count: int, names: tuple[str, ...] = ("image",)) -> None:
        self.count = count
        self.names = names
        self.made = 0
        self.alive = 0
        self.most_alive = 0

    def __iter__(self) -> Iterator[Feeds]:
        import weakref

        for seed in range(self.count):
            array = image(seed).numpy().copy()
            self.made += 1
            self.alive += 1
            self.most_alive = max(self.most_alive, self.alive)
            weakref.finalize(array, self._gone)
            yield dict.fromkeys(self.names, array)
            del array

    def _gone(self) -> None:
        self.alive -= 1


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Mean absolute difference relative to the mean absolute reference."""
    return float(np.abs(got - want).mean() / np.abs(want).mean())


def quantized(
    quantizer: Quantizer,
    spec: QuantSpec,
    source: Source,
    folder: Path,
    name: str = "q",
    items: int | None = None,
    **changes: Any,
) -> Graph:
    """`source` under another name, quantized into `folder` by `spec` with `changes`; `items` images calibrate it."""
    calibration = Calibration(spec.calibration_samples if items is None else items)
    asked = dataclasses.replace(spec, output_dir=folder, **changes)
    return quantizer.quantize(dataclasses.replace(source, name=name), asked, calibration)


@contextlib.contextmanager
def refused(says: str, folder: Path) -> Iterator[None]:
    """What stands inside is refused in a sentence that holds `says`, and leaves nothing in `folder`."""
    with pytest.raises(BackendError) as caught:
        yield
    assert says in str(caught.value)
    assert list(folder.iterdir()) == []


def magnitudes_seen(source: Source, names: Iterable[str], items: Iterable[Feeds]) -> dict[str, float]:
    """Of the named tensors of a float graph (or of its input `image`), the largest magnitude over all items."""
    import onnx
    import onnxruntime

    model = onnx.load(str(source.graph.path))
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name != "image")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    largest = dict.fromkeys(names, 0.0)
    for item in items:
        found = dict(zip([o.name for o in session.get_outputs()], session.run(None, item), strict=True)) | item
        largest = {name: max(value, float(np.abs(found[name]).max())) for name, value in largest.items()}
    return largest
