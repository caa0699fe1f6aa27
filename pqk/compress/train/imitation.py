"""How far a network's answers are from its Teacher's: the loss of quantized networks, and what their best is chosen by.

On a handful of held-out pairs AbsRel varies by more than rounding costs, and so it cannot tell which of two checkpoints
is the better one. The distance to the Teacher's own points can: every pixel has a say in it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pqk.compress.train.pairs import SymmetricPairs

NEAREST = 0.05
"""Points nearer to the camera than this, in the Teacher's unit, count as being this far in the relative error."""


def imitation_loss(got: Mapping[str, Tensor], aim: Mapping[str, Tensor], alpha: float) -> Tensor:
    """How far outputs are from the Teacher's: sum over both views of mean(w * err) + alpha * mean(|ln c - ln c_T|).

    err = |x - x_T| / max(|x_T|, NEAREST) per pixel; w is the Teacher's confidence c_T over its mean in that view, so
    that pixels the Teacher knows nothing about (sky, occlusions) weigh little. Points (B, H, W, 3) in one unit,
    confidences (B, H, W) above 0; every pixel counts, as the Teacher answers everywhere. No unit.
    """
    total = torch.zeros((), device=got["conf_1"].device)
    for view in (1, 2):
        points, wanted = got[f"pts3d_{view}"].float(), aim[f"pts3d_{view}"].float()
        conf, trusted = got[f"conf_{view}"].float(), aim[f"conf_{view}"].float()
        err = (points - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(NEAREST)
        weight = trusted / trusted.mean(dim=(1, 2), keepdim=True)
        total = total + (weight * err).mean() + alpha * (conf.log() - trusted.log()).abs().mean()
    return total


class Distance:
    """`imitation_loss` of each held-out pair: `score_of` of `fit`. The Teacher answers each batch of them once."""

    def __init__(self, teacher: nn.Module, alpha: float) -> None:
        """teacher: on the device of the training, and not changed by it. alpha: see `imitation_loss`."""
        self.answer, self.alpha = SymmetricPairs(teacher).eval(), alpha
        self.known: list[tuple[Tensor, dict[str, Tensor]]] = []  # images of a batch, and the Teacher's answer

    def __call__(self, images: Tensor, out: dict[str, Tensor]) -> list[float]:
        """Gives the distance of each pair: images (B, 2, 3, H, W) and the outputs (2B, ...) for both of its orders."""
        with torch.no_grad():
            aim = next((known for seen, known in self.known if torch.equal(seen, images)), None)
            if aim is None:
                aim = self.answer(images)
                self.known.append((images, aim))
            count = len(images)
            orders = [torch.tensor([pair, count + pair], device=images.device) for pair in range(count)]
            return [float(imitation_loss(_of(out, both), _of(aim, both), self.alpha)) for both in orders]


def _of(outputs: Mapping[str, Tensor], samples: Tensor) -> dict[str, Tensor]:
    return {name: values[samples] for name, values in outputs.items()}
