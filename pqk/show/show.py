"""Shows what a model sees in pictures, beside another model where one is named: `show`, and `draw` for any predictions.

`draw` takes arrays (`Side`) and knows no engine, so predictions of a quantized model are drawn by it as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np

from pqk.data.scenes.open import open_scenes
from pqk.data.scenes.ply import write_points
from pqk.data.scenes.scene import Scene
from pqk.errors import PqkError
from pqk.families.identify import RANDOM, family_of, model_name
from pqk.families.metrics.geometry import align_scale
from pqk.families.registry import family
from pqk.families.viewing import Boxes, Geometry
from pqk.files import check_writable, temporary_folder, write_json
from pqk.measure.predictions import Predictions
from pqk.recipe.experiment import config_file, config_loaders, teacher_path
from pqk.report.show.cloud import draw_cloud
from pqk.report.show.depth import MOST_ROWS, draw_depth, relative_difference
from pqk.report.show.trajectory import draw_trajectory, rotation_differences
from pqk.show.boxes import Agreement, draw_found
from pqk.store.worker import call

SURE = 20
"""Percent of the points, the least sure ones, that are left out of a cloud."""


@dataclass(frozen=True)
class Side:
    """A model by the name that figures give it, and what it says of the pictures."""

    label: str
    seen: Geometry | Boxes


@dataclass(frozen=True)
class Comparison:
    """How far a second model is from the first. scale: that its lengths were multiplied by; others: a number a picture.

    depth: mean of |second - first| / first over the pixels of a picture; rotation: degrees between its cameras; both
    None where nothing could be compared.
    """

    scale: float
    depth: tuple[float | None, ...]
    rotation: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """Returns the mean of `depth` over the pictures."""
        known = [value for value in self.depth if value is not None]
        return float(np.mean(known)) if known else None

    @property
    def sentence(self) -> str | None:
        """Returns the comparison in words; None where nothing could be compared."""
        if self.mean is None:
            return None
        return f"depth differs by {100 * self.mean:.3g} % on average, lengths by the factor {self.scale:.4g}"


@dataclass(frozen=True)
class Drawn:
    """The files that were written, and the comparison where there were two sides."""

    files: tuple[Path, ...]
    comparison: Comparison | Agreement | None


def show(
    model: str | None,
    against: str | None,
    images: Path,
    most: int,
    out: Path,
    root: Path,
    say: Callable[[str], object] = lambda sentence: None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Drawn:
    """Predicts the first `most` pictures of a folder in float, in a process of their own, and draws them into `out`.

    model, against: as `load_model` takes them, or names in the hub's cache; default of model: the project's Teacher.
    against may also be a file of quantized weights of the model (`save_weights`): they are dequantized. settings:
    values of the workload, as of `pqk run`: {"workload.sampler.steps": 4}. Raises PqkError for wrong ones, for models
    of two families, a folder of several scenes or of fewer pictures than the family shows, and NotBuilt (exit code 3)
    for a family without a view.
    """
    first = teacher_path(model, root)
    if against is not None and holds_weights(against):
        with temporary_folder("dequantized") as folder:
            made = dequantized(first, Path(against), folder / Path(against).stem)
            return show(first, str(made), images, most, out, root, say, settings)
    asked = [first, *([against] if against is not None else [])]
    kinds = [family_of(path) for path in asked]
    if len(set(kinds)) > 1:
        raise PqkError(
            f"{asked[0]} is a model of the family {kinds[0]}, and {asked[1]} of {kinds[1]}: compare two of one"
        )
    of = family(kinds[0])
    part = of.view_part()
    scene = _one_scene(images)
    others = [name for name in settings if name.partition(".")[0] != "workload"]
    if others:
        raise PqkError(f"--set {others[0]}: pqk show reads workload.yaml alone; its keys begin with workload.")
    own = {name.partition(".")[2]: value for name, value in settings.items()}
    workload = config_loaders(of)["workload"](config_file(root, of, "workload"), own, "--set")
    fed = {"family": of.name, "workload": workload.model_dump(mode="json")}
    _, samples = part.samples(scene, workload, most)
    check_writable(out)
    sides = []
    for path, label in zip(asked, _labels(asked), strict=True):
        say(f"predicting {len(samples)} samples with {label}")
        with temporary_folder("show") as folder:
            request = {**fed, "scene": str(scene.root), "most": most, "model": path, "out": str(folder)}
            call("shown", request)
            with Predictions(folder) as kept:
                predictions = [kept.arrays(place) for place in range(len(kept.samples))]
        try:
            sides.append(Side(label, part.view(samples, predictions)))
        except PqkError as error:
            raise PqkError(f"{label}: {error}") from error
    return draw(scene.name, sides, out)


def holds_weights(path: str) -> bool:
    """Returns whether a path names a file of quantized weights."""
    from safetensors import SafetensorError, safe_open

    from pqk.compress.weights.files import KEY

    if not path.endswith(".safetensors") or not Path(path).is_file():
        return False
    try:
        with safe_open(path, framework="pt") as opened:
            return KEY in (opened.metadata() or {})
    except SafetensorError:
        return False  # who loads it says why


def dequantized(model: str, weights: Path, folder: Path) -> Path:
    """Writes a model whose weights are those of a file of quantized ones, dequantized; returns its folder.

    Raises PqkError where the file is damaged or of another model.
    """
    from pqk.compress.weights.files import load_weights
    from pqk.compress.weights.model import quantized_model
    from pqk.models import load_model, save_model

    read, float_model = load_weights(weights), load_model(model)
    try:
        made = quantized_model(float_model, read, "dequantized")
    except PqkError as error:
        raise PqkError(f"{weights}: {error}") from error
    return save_model(made, folder)


def draw(scene: str, sides: Sequence[Side], out: Path) -> Drawn:
    """Draws one or two sides of the same pictures into the folder `out`, each file as a whole, and replaces older ones.

    Both are of one kind. Of boxes: `draw_found`. Of geometry: depth.png: pictures, depth maps, and their relative
    difference. cloud.png, cloud.ply (of the second side cloud-against.ply): the points. trajectory.png: the cameras.
    show.json: the comparison in numbers. The second side is brought to the scale of the first: the ratio of the median
    depths. Raises PqkError for sides of other pictures or shapes, and where no scale can be found.
    """
    labels, seen = [side.label for side in sides], [side.seen for side in sides]
    if isinstance(seen[0], Boxes):
        return Drawn(*draw_found(scene, labels, cast("list[Boxes]", seen), out))
    geometries = cast("list[Geometry]", seen)
    first = geometries[0]
    comparison = None
    if len(geometries) > 1:
        scaled, comparison = compare(first, geometries[1])
        geometries = [first, scaled]
    head = f"{scene}: {labels[0]}" + (f" against {labels[1]}" if len(labels) > 1 else "")
    note = (
        ""
        if comparison is None
        else f"\nlengths of {labels[1]} times {comparison.scale:.4g}, the ratio of the median depths"
    )
    files = [out / name for name in ("depth.png", "cloud.png", "trajectory.png", "show.json")]
    draw_depth(
        files[0],
        labels,
        first.names,
        first.images,
        [each.depth for each in geometries],
        head + _depth_title(first, comparison) + note,
    )
    clouds = [_cloud(each) for each in geometries]
    draw_cloud(files[1], labels, clouds, f"{head}\npoints, without the {SURE} % least sure{note}")
    draw_trajectory(
        files[2], labels, first.names, [each.cameras for each in geometries], head + _camera_title(comparison) + note
    )
    for name, (points, colours) in zip(("cloud.ply", "cloud-against.ply"), clouds, strict=False):
        write_points(out / name, points, colours)
        files.append(out / name)
    if len(clouds) == 1:
        (out / "cloud-against.ply").unlink(missing_ok=True)  # of an older drawing
    write_json(files[3], _numbers(scene, labels, first.names, comparison))
    return Drawn(tuple(files), comparison)


def compare(first: Geometry, second: Geometry) -> tuple[Geometry, Comparison]:
    """Returns the second geometry at the scale of the first, the ratio of their median depths, and how far it is off.

    Raises PqkError for geometries of other pictures or shapes, and where no scale can be found.
    """
    if first.depth.shape != second.depth.shape or first.names != second.names:
        raise PqkError(
            f"the two models show other pictures: {first.depth.shape} of {', '.join(first.names)}, and "
            f"{second.depth.shape} of {', '.join(second.names)}"
        )
    usable = np.isfinite(second.depth) & (second.depth > 0)
    scale = align_scale(second.depth.ravel(), first.depth.ravel(), usable.ravel(), "median")
    cameras = second.cameras.copy()
    cameras[:, :, 3] *= scale
    factor = np.float32(scale)
    scaled = replace(second, depth=factor * second.depth, points=factor * second.points, cameras=cameras)
    errors = [relative_difference(a, b) for a, b in zip(first.depth, scaled.depth, strict=True)]
    depth = tuple(float(np.nanmean(error)) if np.isfinite(error).any() else None for error in errors)
    rotation = tuple(float(angle) for angle in rotation_differences(first.cameras, scaled.cameras))
    return scaled, Comparison(scale, depth, rotation)


def _cloud(geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Returns the surest points (N,3) and their colours (N,3) uint8."""
    points, sure = geometry.points.reshape(-1, 3), geometry.confidence.reshape(-1)
    good = np.isfinite(points).all(axis=1) & np.isfinite(sure)
    if good.any():
        good &= sure >= np.percentile(sure[good], SURE)
    return points[good], geometry.images.reshape(-1, 3)[good]


def _depth_title(first: Geometry, comparison: Comparison | None) -> str:
    left_out = len(first.names) - MOST_ROWS
    more = f" ({left_out} more pictures are not drawn)" if left_out > 0 else ""
    if comparison is None:
        return f"\ndepth{more}"
    mean = "not known" if comparison.mean is None else f"{100 * comparison.mean:.3g} %"
    return f"\nmean absolute relative difference of depth: {mean}{more}"


def _camera_title(comparison: Comparison | None) -> str:
    if comparison is None:
        return "\ncameras, in the frame of the first"
    return f"\ncameras, in the frame of the first; mean difference of rotation {_mean_rotation(comparison):.2g}°"


def _mean_rotation(comparison: Comparison) -> float:
    """Returns the mean over all cameras but the first, whose frame both are in."""
    return float(np.mean(comparison.rotation[1:] or (0.0,)))


def _numbers(scene: str, labels: Sequence[str], names: Sequence[str], comparison: Comparison | None) -> dict[str, Any]:
    """Returns what show.json holds."""
    return {
        "scene": scene,
        "pictures": list(names),
        "models": list(labels),
        "comparison": None
        if comparison is None
        else {
            "scale": comparison.scale,
            "depth_mean_relative_difference": comparison.mean,
            "depth_relative_difference": list(comparison.depth),
            "rotation_difference_deg": list(comparison.rotation),
        },
    }


def _one_scene(images: Path) -> Scene:
    """Returns the only scene of a folder; its cameras and depth, where it has some, are not looked at."""
    scenes = open_scenes(images, pictures=True)
    if len(scenes) > 1:
        names = ", ".join(scene.name for scene in scenes[:6]) + (", ..." if len(scenes) > 6 else "")
        raise PqkError(f"{images} holds {len(scenes)} scenes ({names}); name the folder of one of them")
    return scenes[0]


def _labels(paths: Sequence[str]) -> list[str]:
    """Returns a name for each model; with the folder above it where two have one name."""
    names = [path if path.startswith(RANDOM) else model_name(path) for path in paths]
    if len(set(names)) == len(names):
        return names
    above = [
        path if path.startswith(RANDOM) else f"{Path(path).absolute().parent.name}/{model_name(path)}" for path in paths
    ]
    return above if len(set(above)) == len(above) else [f"{name} ({place + 1})" for place, name in enumerate(names)]
