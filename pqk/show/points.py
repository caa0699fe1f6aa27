"""Computes what the report's 3D view shows, `point_maps`: the points of Teacher and candidate in the same pictures.

The candidate is the one of a record, with its engines, made or reused as `pqk export` does; the Teacher runs in f32 on
the same backend. The pictures are the first of the first test scene.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pqk.data.scenes.open import open_scene
from pqk.engines.variant import Variant
from pqk.errors import NotBuilt, PqkError
from pqk.families.viewing import Geometry
from pqk.files import check_writable, sha256_json, temporary_folder
from pqk.measure.predictions import Predictions
from pqk.recipe.candidate import Candidate
from pqk.recipe.recover import choose
from pqk.recipe.request import Request
from pqk.record.log import record_filename
from pqk.report.html.scene import PointMaps, write_points
from pqk.show.show import SURE, compare
from pqk.store.store import OnEvent
from pqk.store.worker import call

MOST_POINTS = 20_000
"""Points that are kept of each side: the report stays small."""
_MOST_SIDE = 256  # pixels of the longer side of pictures and error maps


def chosen_record(records: Sequence[Mapping[str, Any]], backend: str | None, quantizer: str | None) -> dict[str, Any]:
    """Returns the newest candidate's record on a backend and quantizer. Raises PqkError where there is none."""
    fits = [
        record
        for record in records
        if record["role"] == "candidate"
        and record["status"] == "ok"
        and backend in (None, record["backend"])
        and quantizer in (None, record["quantizer"])
    ]
    if not fits:
        asked = "".join(f" on {word}" for word in (backend, quantizer) if word)
        raise PqkError(f"there is no record of a candidate{asked}: run the card first")
    return dict(max(fits, key=lambda record: str(record["datetime"])))


def point_maps(
    record: Mapping[str, Any],
    most: int,
    folder: Path,
    root: Path,
    model: str | None,
    settings: Mapping[str, Any],
    on_event: OnEvent,
    say: Callable[[str], object],
) -> Path:
    """Writes the point maps of a record's candidate and its Teacher into `folder`; returns the file.

    most: pictures. model, settings: those of the run. Raises NotBuilt for a family that is not seen as points, and
    PqkError where these settings make another candidate than the record's.
    """
    seeds = {f"workload.seeds.{n}": record[f"{n}_seed"] for n in ("train", "eval") if record[f"{n}_seed"] is not None}
    request = Request(
        record["exp_id"], record["backend"], record["quantizer"], model, settings={**seeds, **settings}, qat=None
    )
    check_writable(folder)
    choice, _ = choose(request, root, on_event, lambda sentence: None, rollback=False)
    candidate = choice.candidate
    teacher, mine = candidate.variants[0], candidate.variants[-1]
    engine = sha256_json(mine.hashes)
    recorded = (record["hashes"] or {}).get("engine")
    if recorded != engine:
        raise PqkError(
            f"--show: with these settings the candidate of {record['exp_id']} is {engine[:12]}, the record's is "
            f"{str(recorded)[:12]}: give --model and --set as in the run, or run the card again"
        )
    seen = [_seen(candidate, variant, most, say) for variant in (teacher, mine)]
    labels = [f"Teacher {teacher.precision}", f"{record['exp_id']} {record['precision']}"]
    maps = compared_points(seen[0], seen[1], labels, _scene(candidate)[1], engine)
    return write_points(folder / f"{Path(record_filename(dict(record))).stem}.npz", maps)


def _scene(candidate: Candidate) -> tuple[Path, str]:
    """Returns folder and name of the first test scene. Raises NotBuilt where samples are no scenes."""
    folders = candidate.test.where.get("folders")
    if not folders:
        raise NotBuilt("the samples of this family are single pictures, not scenes: there are no points to show")
    return Path(folders[0]), candidate.test.groups[0]


def _seen(candidate: Candidate, variant: Variant, most: int, say: Callable[[str], object]) -> Geometry:
    experiment = candidate.experiment
    part = experiment.family.view_part()
    scene, _ = _scene(candidate)
    fed, samples = part.samples(open_scene(scene), experiment.workload, most)
    if fed != experiment.workload:
        raise PqkError(
            f"--show {most}: the engines of this candidate are fed another number of pictures at once; give the number "
            "that its workload has"
        )
    say(f"predicting {most} pictures with {variant.name}")
    with temporary_folder("show") as folder:
        asked = {**experiment.fed, "scene": str(scene), "most": most, "out": str(folder), "variant": variant.to_json()}
        call("shown", asked)
        with Predictions(folder) as kept:
            found = part.view(samples, [kept.arrays(place) for place in range(len(kept.samples))])
    if not isinstance(found, Geometry):
        raise NotBuilt("--show: predictions of this family are boxes in pictures, not points")
    return found


def compared_points(
    teacher: Geometry, candidate: Geometry, labels: Sequence[str], scene: str, engine: str
) -> PointMaps:
    """Returns the points of two models, decimated, with their distances in percent of the Teacher's depth.

    The candidate is brought to the Teacher's scale, as `pqk show` does (the ratio of the median depths). Left out are
    points that are not finite, and the `SURE` percent that the Teacher is least sure of.
    """
    scaled, comparison = compare(teacher, candidate)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        distance = np.linalg.norm(scaled.points - teacher.points, axis=3)
        error = np.where(teacher.depth > 0, 100.0 * distance / teacher.depth, np.nan).astype(np.float32)
    flat = [geometry.points.reshape(-1, 3) for geometry in (teacher, scaled)]
    sure = teacher.confidence.reshape(-1)
    good = np.isfinite(flat[0]).all(axis=1) & np.isfinite(flat[1]).all(axis=1) & np.isfinite(error.reshape(-1))
    good &= np.isfinite(sure)
    if not good.any():
        raise PqkError("--show: no point of the two models is finite, so there is nothing to see")
    good &= sure >= np.percentile(sure[good], SURE)
    places = np.flatnonzero(good)
    if len(places) > MOST_POINTS:  # at random: every n-th would leave whole columns of pixels out
        places = np.sort(np.random.default_rng(0).choice(places, MOST_POINTS, replace=False))
    shrink = max(1, -(-max(teacher.depth.shape[1:]) // _MOST_SIDE))
    about = {
        "engine": engine,
        "labels": list(labels),
        "scene": scene,
        "names": list(teacher.names),
        "total": int(good.sum()),
        "sure": SURE,
        "scale": comparison.scale,
    }
    return PointMaps(
        np.stack([points[places] for points in flat]).astype(np.float32),
        teacher.images.reshape(-1, 3)[places],
        error.reshape(-1)[places],
        teacher.images[:, ::shrink, ::shrink],
        error[:, ::shrink, ::shrink],
        about,
    )
