"""A family of one convolution: an image goes in, its brightness comes out. Everything that a family must have."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from pqk.families.contract import Family, GraphSpec, GraphUse, Metric, Sample, SampleSet
from pqk.settings import evaluation, workload
from pqk.settings.seeds import split_seed

FAMILY = Family("toy", *["toy_family"] * 5)


class Workload(workload.Workload):
    """Square images, as many of each split."""

    side: int
    images: int

    @property
    def static(self) -> dict[str, Any]:
        return {"side": self.side}


Evaluation = evaluation.Evaluation
GRAPHS = (GraphUse("net", unit="images"),)
METRICS = (Metric("error", "", "lower", 0.0),)
NAMED = {"toy-tiny": {"width": 16}}
KINDS, ATTENTION, LAST_LAYERS = (), None, None


def part_of(name: str) -> None:
    return None


# --- model: about the mean of the pixels, whose border the convolution sees less of


UNDONE: dict[str, Any] = {}


def build(config: Any) -> Any:
    import torch

    class Net(torch.nn.Sequential):
        family, config = "toy", {"width": 16}

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return super().forward(image).mean(dim=(2, 3))

    net = Net(
        torch.nn.Conv2d(3, config["width"], 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(config["width"], 1, 1)
    )
    net.config = {"width": config["width"]}
    return net


def initialize(model: Any, generator: Any = None) -> None:
    for layer in (model[0], model[2]):
        layer.weight.data.fill_(1 / layer.weight[0].numel())
        layer.bias.data.fill_(0.01)


def adapt(weights: Any, expected: Any) -> Any:
    return weights


def may_lack(key: str) -> bool:
    return False


def official(content: Any) -> None:
    return None


def graphs(model: Any, fed: Any) -> dict[str, GraphSpec]:
    import torch

    return {"net": GraphSpec(model, {"image": torch.rand(1, 3, fed.side, fed.side)}, ("image",), ("value",))}


def predict(call: Any, sample: Sample, fed: Any, seed: int) -> dict[str, np.ndarray]:
    return {"value": call("net", {"image": sample.inputs})["value"][0, 0]}


# --- data: random images with their mean as truth


SEED_DRAWS: Literal["samples", "noise"] = "samples"


def _images(split: str, fed: Any, seed: int, first: int, count: int) -> list[np.ndarray]:
    seeds = [split_seed(split, seed, first + number) for number in range(count)]
    return [np.random.default_rng(s).random((1, 3, fed.side, fed.side), np.float32) ** (1 + s % 3) for s in seeds]


def open_split(split: str, fed: Any, root: Any, make: Any, given: Any = None, first: int = 0, count: Any = None) -> Any:
    seed, count = fed.seeds.eval if split == "test" else 0, count or fed.images

    def write(folder: Path) -> None:
        np.save(folder / "images.npy", np.stack(_images(split, fed, seed, first, count)))

    asked = {"split": split, "seed": seed, "first": first, "count": count, **fed.static}
    folder, sha256 = make(split, asked, ("toy_family",), write)
    names = tuple(f"{split} {first + number}" for number in range(count))
    return SampleSet({"folder": str(folder)}, {}, names, sha256, True, drawn=f"{count} generated, seed {seed}")


def samples(found: SampleSet, fed: Any, seed: int) -> list[Sample]:
    images = np.load(Path(found.where["folder"]) / "images.npy")
    return [Sample(number, "image", image, float(image.mean())) for number, image in enumerate(images)]


def most(found: SampleSet, fed: Any) -> int:
    return len(found.groups)


class _Calibration(list[Sample]):
    @property
    def images(self) -> int:
        return len(self)


def calibration(found: SampleSet, fed: Any, images: int) -> _Calibration:
    return _Calibration(samples(found, fed, 0)[:images])


def timed(found: SampleSet, fed: Any) -> list[Sample]:
    return samples(found, fed, 0)[:1]


def example(fed: Any) -> Sample:
    return Sample(0, "example", _images("train", fed, 0, 0, 1)[0])


def can_grow(fed: Any, given: Any) -> bool:
    return True


def refuse_overlap(sets: Any) -> None:
    pass


def digest(split: str, fed: Any, sha256: Any) -> str:
    from pqk.files import sha256_json

    return sha256_json({"split": split, "images": fed.images, **fed.static})


# --- scoring


OUTPUTS = {"value": "values"}


def score(prediction: Any, sample: Sample, options: Any, seed: int) -> dict[str, Any] | None:
    return {"error": abs(float(prediction["value"]) - sample.truth)}


def needs(options: Any) -> str:
    return "an image"


def as_truth(prediction: Any, sample: Sample, config: Any) -> Sample:
    return Sample(sample.group, sample.name, sample.inputs, float(prediction["value"]))


def floor(sample: Sample, options: Any) -> dict[str, Any] | None:
    return {"error": abs(0.5 - sample.truth)}


def summarise(evidence: Any) -> dict[str, float | None]:
    return {"error": sum(row["error"] for row in evidence) / len(evidence)}
