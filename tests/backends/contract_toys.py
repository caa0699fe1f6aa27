"""A two-layer network whose every number is known, as a float graph and with Q/DQ nodes, and its exact simulation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from backends.base import Graph
from backends.exchange import describe_onnx

ROWS, LEVELS = 8, 127
# Weights keep to 7 bits: two products of u8 and s8 fit into 16 bits then, on every CPU (2 * 255 * 63 < 2**15).
WEIGHT_LEVELS = 63


@dataclass(frozen=True)
class Network:
    """y = relu(x W1 + b1) W2 + b2. Integer weights times a step per column; x and the hidden layer have one step each.

    `q1` [K, H] and `q2` [H, N] are int8, `step1` [H] and `step2` [N] their steps.
    """

    q1: np.ndarray
    step1: np.ndarray
    b1: np.ndarray
    q2: np.ndarray
    step2: np.ndarray
    b2: np.ndarray
    step_x: float
    step_h: float

    def inputs(self, seed: int = 0) -> np.ndarray:
        """float32 [ROWS, K]: off the borders of the quantizer's steps, so that every runtime rounds x to the same."""
        rng = np.random.default_rng(seed)
        shape = (ROWS, self.q1.shape[0])
        codes = rng.integers(-100, 101, shape) + rng.uniform(-0.3, 0.3, shape)
        return (codes * self.step_x).astype(np.float32)

    def module(self) -> torch.nn.Module:
        """The float network in torch."""
        first, second = torch.nn.Linear(*self.q1.shape), torch.nn.Linear(*self.q2.shape)
        with torch.no_grad():
            for layer, q, step, bias in ((first, self.q1, self.step1, self.b1), (second, self.q2, self.step2, self.b2)):
                layer.weight.copy_(torch.from_numpy((q * step).T))
                layer.bias.copy_(torch.from_numpy(bias))
        return torch.nn.Sequential(first, torch.nn.ReLU(), second).eval()

    def exact(self, x: np.ndarray) -> np.ndarray:
        """The float network in float64."""
        h = np.maximum(x.astype(np.float64) @ (self.q1 * self.step1.astype(np.float64)) + self.b1, 0)
        return h @ (self.q2 * self.step2.astype(np.float64)) + self.b2

    def simulated(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The Q/DQ network in exact arithmetic, and how far a correct float32 runtime may be from it, elementwise.

        The first layer's sums are integers; only the float32 steps and biases round. That can move the hidden layer
        by a relative 8 * 2^-24, so where a hidden value lies that near to the border of two of its quantizer's steps
        it may fall into the other: then y moves by one hidden step times the weight. The rest is float32 rounding.
        """
        rounding = 8 * 2.0**-24
        codes = np.clip(np.rint(x.astype(np.float64) / self.step_x), -128, LEVELS)
        weight = self.q2 * self.step2.astype(np.float64)
        products = (codes * self.step_x) @ (self.q1 * self.step1.astype(np.float64))
        h = np.maximum(products + self.b1, 0) / self.step_h
        doubt = rounding * (np.abs(products) + np.abs(self.b1)) / self.step_h
        may_flip = np.abs(h - np.floor(h) - 0.5) <= doubt
        hidden = np.clip(np.rint(h), -128, LEVELS) * self.step_h
        bound = self.step_h * (may_flip @ np.abs(weight))
        bound += rounding * self.q2.shape[0] ** 0.5 * (hidden @ np.abs(weight) + np.abs(self.b2))
        return hidden @ weight + self.b2, bound


def network(inner: int = 64, hidden: int = 128, out: int = 32) -> Network:
    """A seeded network whose hidden layer uses the whole range of its quantizer without clipping much."""
    rng = np.random.default_rng(5)

    def layer(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        q = rng.integers(-WEIGHT_LEVELS, WEIGHT_LEVELS + 1, (rows, columns)).astype(np.int8)
        step = (rng.uniform(0.5, 1.5, columns) / WEIGHT_LEVELS / rows**0.5).astype(np.float32)
        return q, step, rng.uniform(-0.1, 0.1, columns).astype(np.float32)

    (q1, step1, b1), (q2, step2, b2) = layer(inner, hidden), layer(hidden, out)
    # Steps that float32 holds exactly, so that x and h mean the same in float32 and float64.
    return Network(q1, step1, b1, q2, step2, b2, step_x=2.0**-7, step_h=3 * 2.0**-8)


def write_graph(net: Network, path: Path, quantized: bool) -> Graph:
    """The network as ONNX: float weights, or int8 weights with Q/DQ nodes before both multiplications."""
    tensors = {"b1": net.b1, "b2": net.b2}
    nodes = []

    def activation(name: str, step: float) -> str:
        if not quantized:
            return name
        tensors[f"{name}_step"], tensors[f"{name}_zero"] = np.array(step, np.float32), np.array(0, np.int8)
        ports = [f"{name}_step", f"{name}_zero"]
        nodes.append(helper.make_node("QuantizeLinear", [name, *ports], [f"{name}_q"], f"{name}/quantize"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *ports], [f"{name}_d"], f"{name}/dequantize"))
        return f"{name}_d"

    def weight(name: str, q: np.ndarray, step: np.ndarray) -> str:
        if not quantized:
            tensors[name] = (q * step).astype(np.float32)
            return name
        tensors.update({f"{name}_q": q, f"{name}_step": step, f"{name}_zero": np.zeros(len(step), np.int8)})
        ports = [f"{name}_q", f"{name}_step", f"{name}_zero"]
        nodes.append(helper.make_node("DequantizeLinear", ports, [name], f"{name}/dequantize", axis=1))
        return name

    def linear(source: str, number: int, q: np.ndarray, step: np.ndarray, result: str) -> None:
        nodes.append(
            helper.make_node("MatMul", [source, weight(f"w{number}", q, step)], [f"m{number}"], f"/fc{number}")
        )
        nodes.append(helper.make_node("Add", [f"m{number}", f"b{number}"], [result], f"/bias{number}"))

    linear(activation("x", net.step_x), 1, net.q1, net.step1, "s")
    nodes.append(helper.make_node("Relu", ["s"], ["h"], "/relu"))
    linear(activation("h", net.step_h), 2, net.q2, net.step2, "y")
    ports = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [ROWS, width])]
        for name, width in (("x", net.q1.shape[0]), ("y", net.q2.shape[1]))
    ]
    made = helper.make_graph(nodes, "toy", *ports, [numpy_helper.from_array(a, n) for n, a in tensors.items()])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return describe_onnx(path)
