"""Opens the data of a training: the samples of the split 'train', as batches of the family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pqk.families.contract import Batches, Family, LearningPart, SampleSet
from pqk.families.cutting import CuttingPart
from pqk.families.registry import family
from pqk.settings.training import Training
from pqk.settings.workload import Workload

VALIDATION_SEED = 1
"""Every method is scored on the same held-out samples, whatever its training seed. Those of seed 0 selected the
Teacher, and `scenes.validation`, which decides between models, has a seed of its own."""


@dataclass(frozen=True)
class TrainingData:
    """The family and its training samples: the split 'train', read as the workload says; found None: generated."""

    family: Family
    found: SampleSet | None = None
    workload: Workload | None = None

    @property
    def learning(self) -> LearningPart:
        return self.family.learning_part()

    @property
    def cutting(self) -> CuttingPart:
        return self.family.cutting_part()

    @property
    def truthful(self) -> bool:
        """Returns whether there is ground truth. Without it the Teacher's outputs replace it, and there is no task
        loss.
        """
        return self.found is None or self.found.truthful

    def batches(self, asked: Training, device: torch.device, seed: int) -> Batches:
        """Returns the batches of a training with this seed; the held-out ones are the same for every seed."""
        return self.learning.batches(
            asked, device, seed=seed, held_seed=VALIDATION_SEED, found=self.found, workload=self.workload
        )


def opened_training(request: Mapping[str, Any]) -> TrainingData:
    """Returns the training data of a worker's request: family, workload, train (see `SampleSet.to_json`)."""
    of = family(request["family"])
    workload = of.settings_part().Workload.model_validate_json(json.dumps(request["workload"]))
    return TrainingData(of, SampleSet.from_json(request["train"]), workload)
