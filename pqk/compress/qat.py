"""Quantization-aware training: encoder and decoder that round as their int8 engines do, taught by the float model.

The toolchain prepares the two modules and makes engines of them afterwards; here they are trained together, so that
the decoder learns to live with the tokens that the rounded encoder gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pqk.compress.train.fit import Fitted, Stop, fit
from pqk.compress.train.imitation import Distance, imitation_loss
from pqk.compress.train.loop import Progress
from pqk.compress.train.pairs import SymmetricPairs
from pqk.data.render.stream import PairBatch
from pqk.errors import PqkError
from pqk.families.dust3r.losses import confidence_loss
from pqk.families.dust3r.model import OUTPUTS
from pqk.settings.quant import Qat
from pqk.settings.training import Fit, Stage


class Quantized(nn.Module):
    """The two prepared graphs as one model for images of any size: what `SymmetricPairs` needs."""

    def __init__(self, encoder: Any, decoder: Any, patch_size: int) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.patch_size = patch_size
        self.exported: tuple[int, int] = encoder.grid

    def graphs(self) -> dict[str, nn.Module]:
        """Encoder and decoder, set back to the size that they were prepared for: ready for a quantizer's `finish`."""
        for part in (self.encoder, self.decoder):
            part.set_grid(*self.exported)
        return {"encoder": self.encoder, "decoder": self.decoder}

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> tokens (B, H/p * W/p, enc_dim)."""
        self.encoder.set_grid(*self._grid(images.shape[-2:]))
        tokens: Tensor = self.encoder(images)
        return tokens

    def decode(self, tokens1: Tensor, tokens2: Tensor, hw1: tuple[int, int], hw2: tuple[int, int]) -> dict[str, Tensor]:
        """Tokens of both views, which have one size -> points (B, H, W, 3) and confidences (B, H, W) of both."""
        if hw1 != hw2:
            raise PqkError(f"the exported graphs take views of one size, got {hw1} and {hw2}")
        self.decoder.set_grid(*self._grid(hw1))
        return dict(zip(OUTPUTS, self.decoder(tokens1, tokens2), strict=True))

    def _grid(self, hw: Any) -> tuple[int, int]:
        return int(hw[0]) // self.patch_size, int(hw[1]) // self.patch_size


def training_of(spec: Qat) -> Fit:
    """The section `qat` of quant.yaml as a training: one image size, a rate that falls to a tenth."""
    return Fit(
        stages=[Stage(size=spec.size, batch=spec.batch, until=1.0)],
        learning_rate=spec.lr,
        final_rate=spec.lr / 10,
        warmup=spec.warmup_epochs / spec.epochs,
        weight_decay=spec.weight_decay,
        ema=spec.ema,
        epochs=spec.epochs,
        steps_per_epoch=spec.steps_per_epoch,
        validation=spec.validation,
    )


def qat(
    parts: Mapping[str, nn.Module],
    teacher: Any,
    spec: Qat,
    *,
    seed: int,
    scratch: Path,
    device: str = "cpu",
    stop: Stop | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Fitted:
    """Fine-tune the prepared modules together; `Fitted.model.graphs()` gives the trained ones, on the CPU.

    parts: what a quantizer's `prepare` made of each graph's module; they are trained in place.
    teacher: the float model that they are compared with and learn from; its own weights stay.
    seed, scratch, stop, report: see `fit`. After a kill, modules prepared anew from the same model, spec and
    calibration continue from `scratch`.
    The best averaged weights are those nearest to the teacher on held-out pairs; the history tells AbsRel and drop too.
    Raises PqkError as `fit` does.
    """
    model = Quantized(parts["encoder"], parts["decoder"], teacher.sizes.patch_size)
    training = training_of(spec)
    aim_of = SymmetricPairs(teacher).eval()

    def loss_of(module: nn.Module, pairs: PairBatch, share: float) -> Tensor:
        with torch.no_grad():
            aim = aim_of(pairs.images)
        got = module(pairs.images)
        with torch.autocast(pairs.images.device.type, enabled=False):
            loss = imitation_loss(got, aim, training.alpha)
            if spec.task_weight:
                loss = loss + spec.task_weight * confidence_loss(got, *pairs.ordered(), training.alpha)[0]
            return loss

    return fit(
        model,
        training,
        loss_of,
        seed=seed,
        scratch=scratch,
        device=device,
        teacher=teacher,
        score_of=Distance(teacher, training.alpha),
        stop=stop,
        report=report,
    )
