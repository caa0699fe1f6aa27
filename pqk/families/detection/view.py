"""Shows detections: every picture is a sample of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pqk.data.scenes.scene import Scene, View
from pqk.errors import PqkError
from pqk.families.contract import Sample
from pqk.families.detection.inputs import MEAN, STD, Fed, fit
from pqk.families.detection.settings import Workload
from pqk.families.viewing import BoxedPicture, Boxes


def samples(scene: Scene, workload: Workload, most: int) -> tuple[Workload, list[Sample]]:
    """Returns a sample of each of the first `most` pictures, numbered from 0, and the workload unchanged.

    Pictures are turned as EXIF says, and their cameras play no part. Raises PqkError for what their files raise.
    """
    height, width = workload.input.height, workload.input.width
    pictures = (View(view.name, view.image_path) for view in scene.views[:most])
    return workload, [Sample(k, p.name, fit(p.load_image(), height, width, k)) for k, p in enumerate(pictures)]


def view(samples: Sequence[Sample], predictions: Sequence[Mapping[str, np.ndarray]]) -> Boxes:
    """Returns all detections in the pictures of `samples`. Raises PqkError for a box or score that is not finite."""
    return Boxes(tuple(_picture(*each) for each in zip(samples, predictions, strict=True)))


def _picture(sample: Sample, prediction: Mapping[str, np.ndarray]) -> BoxedPicture:
    fed: Fed = sample.inputs
    found = {name: prediction[name] for name in ("boxes", "scores", "labels")}
    if not all(np.isfinite(array).all() for array in found.values()):
        raise PqkError(f"{sample.name}: a box or score is not finite: there is nothing to see")
    pixels = fed.image[0, :, : fed.size[0], : fed.size[1]].transpose(1, 2, 0) * STD + MEAN
    return BoxedPicture(sample.name, np.clip(np.round(pixels), 0, 255).astype(np.uint8), fed.original, **found)
