"""Defines the detector: backbone and head, with prediction, losses and the tables of its checkpoints.

Chen et al. 2023 (DiffusionDet: Diffusion Model for Object Detection, ICCV). Images are RGB with values 0 ... 255, boxes
corners in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pqk.errors import PqkError
from pqk.families.detection.inputs import padded
from pqk.families.diffusiondet.network.backbone import Backbone
from pqk.families.diffusiondet.network.boxes import to_centres
from pqk.families.diffusiondet.network.configs import LARGEST_PROPOSALS, read_config
from pqk.families.diffusiondet.network.head import Head
from pqk.families.diffusiondet.sampling import labels as states
from pqk.families.diffusiondet.sampling import schedule
from pqk.families.diffusiondet.sampling.noise import DrawnNoise, Noise, given_noise
from pqk.families.diffusiondet.sampling.sampler import HeadCall, Sampling, detect, sample
from pqk.families.diffusiondet.sampling.selection import rescale
from pqk.families.diffusiondet.training import targets as starts
from pqk.families.diffusiondet.training.losses import LabelStates, LossOptions, set_losses

Target = Mapping[str, Tensor]
"""Truths of an image: `labels` (G,) int64 and `boxes` (G, 4), in pixels of the network's input."""


class DiffusionDet(nn.Module):
    """The network of one configuration (`network.configs`). Raises PqkError when the configuration is no valid one.

    backbone: normalised image -> p2 ... p5. head: maps, noisy boxes and a time -> logits and boxes of every stage.
    """

    family = "diffusiondet"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = {key: value for key, value in config.items() if key != "family"}
        self.sizes = sizes = read_config(self.config)
        self.backbone = Backbone(sizes.backbone)
        self.head = Head(sizes)
        self.fill_schedule()

    def fill_schedule(self) -> None:
        """Sets the twelve buffers of the noise schedule, which checkpoints hold and nothing here reads.

        They follow from nothing but the number of times, so those of a file are replaced by exact ones.
        """
        for name, values in schedule.tables().items():
            self.register_buffer(name, torch.from_numpy(values.copy()))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads weights as torch does, and leaves the buffers of the schedule exact."""
        found = super().load_state_dict(state_dict, strict, assign)
        self.fill_schedule()
        return found

    def forward(
        self,
        images: Tensor,
        boxes: Tensor,
        t: Tensor | int,
        labels: Tensor | None = None,
        whwh: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Returns what `network.head.Head` does for normalised images (B, 3, H, W) and noisy boxes (B, N, 4)."""
        return self.head(self.backbone(images), boxes, t, labels, whwh)

    @torch.inference_mode()
    def predict(
        self,
        images: Tensor | Sequence[Tensor],
        *,
        steps: int | None = None,
        boxes: int | None = None,
        seed: int | None = None,
        noise: Tensor | Mapping[str, Tensor] | None = None,
        image_ids: Sequence[int] | None = None,
        output_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[dict[str, Tensor]]:
        """Returns the detections of each image: `boxes` (D, 4), `scores` (D,), `labels` (D,) int64, the best first.

        images: one (3, H, W), a batch (B, 3, H, W), or a sequence of images of any sizes; RGB, values 0 ... 255,
        already resized. steps, boxes: of the sampler and proposals; default: as configured. seed: of the noise, with
        the image's number in `image_ids` (default 0, 1 ...), so an image sees the same noise in any batch; default 0.
        noise: standard-normal rows instead: those at the start (B, N, 4), or `init`, `step` and `renew` by name
        (`sampling.noise.given_noise`). output_sizes: (height, width) that boxes are scaled and clipped to; default:
        those of the images. Raises PqkError for what does not fit.
        """
        listed = _listed(images)
        how = Sampling.of(self.sizes, _count(steps, "steps", schedule.TIMES), _count(boxes, "boxes", LARGEST_PROPOSALS))
        if noise is not None and seed is not None:
            raise PqkError("give a seed or the noise, not both")
        sources: Sequence[Noise]
        if noise is not None:
            sources = given_noise(noise, len(listed), how.proposals)
        else:
            ids = range(len(listed)) if image_ids is None else image_ids
            _as_many(ids, listed, "image_ids")
            sources = [DrawnNoise(how.proposals, seed or 0, number) for number in ids]
        sizes = [(image.shape[1], image.shape[2]) for image in listed]
        outputs = sizes if output_sizes is None else list(output_sizes)
        _as_many(outputs, listed, "output_sizes")
        device = self.backbone.bottom_up.stem.conv1.weight.device
        batch, whwh = padded([image.to(device) for image in listed])
        maps = self.backbone(batch)
        found = []
        for index, source in enumerate(sources):
            call = self.head_call([map_[index : index + 1] for map_ in maps], whwh[index])
            detections = detect(sample(call, whwh[index], source, how), how)
            found.append(rescale(detections, sizes[index], outputs[index])._asdict())
        return found

    def head_call(self, maps: Sequence[Tensor], whwh: Tensor) -> HeadCall:
        """Returns the last stage of the head over the maps of one image, as the sampler calls it. whwh: (4,)."""

        def call(boxes: Tensor, t: int, labels: Tensor | None) -> tuple[Tensor, ...]:
            given = None if labels is None else labels[None]
            return tuple(each[-1, 0] for each in self.head(maps, boxes[None], t, given, whwh[None]))

        return call

    def losses(
        self,
        logits: Tensor,
        boxes: Tensor,
        targets: Sequence[Target],
        quality: Tensor | None = None,
        labels: LabelStates | None = None,
    ) -> dict[str, Tensor]:
        """Returns the weighted losses of the head's outputs by name; their sum is the loss (`training.losses`).

        logits: (stages, B, N, K). boxes: (stages, B, N, 4). targets: of each image, also with its `whwh` (4,).
        """
        return set_losses(logits, boxes, targets, LossOptions.of(self.sizes), quality, labels)

    def training_losses(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Target],
        draws: Sequence[starts.Draws] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Returns the losses of one training step: truths with noise go through the whole network.

        images: (3, h, w) each, as for `predict`. draws: the random numbers of each image; default: fresh ones.
        """
        batch, whwh = padded(images)
        sizes = self.sizes
        if draws is None:
            draws = [starts.draw(sizes.proposals, len(one["labels"]), generator) for one in targets]
        noisy = [
            starts.noisy_boxes(to_centres(one["boxes"] / size), drawn, sizes.scale, sizes.noise_std)
            for one, size, drawn in zip(targets, whwh, draws, strict=True)
        ]
        boxes = torch.stack([starts.start_boxes(one, size, sizes.scale) for one, size in zip(noisy, whwh, strict=True)])
        t = torch.stack([drawn.t.reshape(()) for drawn in draws]).to(batch.device)
        given, labels = self._label_states(targets, noisy, t, generator)
        logits, refined, *rest = self.head(self.backbone(batch), boxes, t, given, whwh)
        sized = [{**one, "whwh": size} for one, size in zip(targets, whwh, strict=True)]
        return self.losses(logits, refined, sized, rest[0] if rest else None, labels)

    def _label_states(
        self, targets: Sequence[Target], noisy: Sequence[starts.Noisy], t: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor | None, LabelStates | None]:
        """Returns what the head is given of the classes, and the drawn states, of a network that diffuses classes."""
        sizes, classes = self.sizes, self.sizes.stage.classes
        if sizes.label_state is None or not sizes.label_diffusion:
            return None, None
        clean = []
        for one, rows in zip(targets, noisy, strict=True):
            mask = one["labels"].new_full((1,), classes)
            clean.append(torch.cat((one["labels"], mask))[rows.chosen])
        y0 = torch.stack(clean)
        times = t[:, None].expand_as(y0)
        if sizes.label_state == "dist":
            return states.corrupted_distribution(y0, times, classes, sizes.label_schedule), None
        uniform = torch.rand(y0.shape, generator=generator).to(y0.device)
        y = states.corrupt(y0, times, uniform, classes, sizes.label_schedule)
        return y, LabelStates(y, t)


def _listed(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Returns images one by one."""
    if isinstance(images, Tensor):
        if images.ndim not in (3, 4):
            raise PqkError(f"images must have the shape (3, H, W) or (B, 3, H, W), got {tuple(images.shape)}")
        return [images] if images.ndim == 3 else list(images)
    return list(images)


def _count(value: int | None, name: str, most: int) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
        raise PqkError(f"{name} must be a whole number from 1 to {most}, got {value!r}")
    return value


def _as_many(given: Sequence[Any], images: Sequence[Tensor], name: str) -> None:
    if len(given) != len(images):
        raise PqkError(f"{name} has {len(given)} entries for {len(images)} images")
