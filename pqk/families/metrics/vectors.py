"""Runners of the cases of evaluation protocols, for the parts that the shared metrics and readers have code for.

Pass marks are those of the protocols: 1e-9 for transforms, 1e-6 for metrics in float64, 1e-5 where the case computed in
float32, one pixel for a share of pixels. What else a case expects is named as not handled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pqk.data.scenes.colmap import read_model
from pqk.data.scenes.depth import measured_depth
from pqk.families.metrics import pose_vectors
from pqk.families.metrics.geometry import Array, abs_rel, align_scale, chamfer, delta, rmse, umeyama
from pqk.families.vectors import Case, Compared

EXACT, METRIC, SINGLE = 1e-9, 1e-6, 1e-5
DELTAS = {f"delta{power}": 1.25**power for power in (1, 2, 3)}
CROPS = {"Eigen crop": (slice(45, 471), slice(41, 601))}


def depth(case: Case) -> Iterator[Compared]:
    """Depth of single images: AbsRel, RMSE and deltas with a median or least-squares scale, and without any."""
    yield from _depth(case, "frames", "in_pred", "none")


def video_depth(case: Case) -> Iterator[Compared]:
    """Depth of videos, one scale for a sequence; the resized prediction is taken from the case."""
    yield from _depth(case, "sequences", "mid_pred_resized", "metric")


def _depth(case: Case, items: str, pred_name: str, unaligned: str) -> Iterator[Compared]:
    for index, item in enumerate(case.peek(items)):
        keys = (items, index)
        pred, gt = (case[f"{name}_{index}"].reshape(-1) for name in (pred_name, "in_gt"))
        farthest, clip = (case.answer(*keys, name) for name in ("max_depth", "post_clip_max"))
        valid = gt > 0 if farthest is None else (gt > 0) & (gt < farthest)
        if "valid_pixels" in item:
            yield case.check_answer(int(valid.sum()), *keys, "valid_pixels", mark=0)
        for method, factor, results in (
            ("median", "median_ratio_numpy", ("derived_float64", "median_numpy")),
            ("lstsq", "lstsq_scale", ("derived_float64", "lstsq_scale")),
            ("none", "", (unaligned,)),
        ):
            scale = align_scale(pred, gt, valid, method)
            if factor in item.get("factors_float64", {}):
                yield case.check_answer(scale, *keys, "factors_float64", factor, mark=METRIC)
            place: Any = item
            for key in results:
                place = place.get(key, {})
            scaled = scale * pred.astype(np.float64)
            scaled = scaled if clip is None else np.minimum(scaled, clip)
            mark = SINGLE if method == "none" else METRIC
            yield from _depth_scores(case, scaled, gt, valid, place, (*keys, *results), mark)


def _depth_scores(
    case: Case, pred: Array, gt: Array, valid: Array, place: dict[str, Any], keys: tuple[str | int, ...], mark: float
) -> Iterator[Compared]:
    """Compare the metrics that `place`, the answer of these keys, has."""
    pixels = int(valid.sum())
    if "valid_pixels" in place:
        yield case.check_answer(pixels, *keys, "valid_pixels", mark=0)
    for name, metric in (("Abs Rel", abs_rel), ("RMSE", rmse)):
        if name in place:
            yield case.check_answer(metric(pred, gt, valid), *keys, name, mark=mark)
    for name, threshold in DELTAS.items():
        if name in place:
            found = delta(pred, gt, valid, threshold)
            yield case.check_answer(found, *keys, name, mark=1.01 / pixels, scale=1.0)


def nyu(case: Case) -> Iterator[Compared]:
    """NYU's conventions that take the ratio of medians: filled or raw depth, with or without the Eigen crop."""
    millimetres = {name: case[f"in_{name}_mm"].astype(np.float32) / 1000 for name in ("pred", "filled", "raw")}
    for name, place in case.peek().items():
        if "ratio of medians" not in name:
            continue
        window = CROPS["Eigen crop"] if "Eigen crop" in name else (slice(None), slice(None))
        pred = millimetres["pred"][window].astype(np.float64)
        gt = millimetres["filled" if "filled" in name else "raw"][window]
        valid = gt > 0
        yield from _depth_scores(case, align_scale(pred, gt, valid, "median") * pred, gt, valid, place, (name,), SINGLE)


def point_map(case: Case) -> Iterator[Compared]:
    """Similarity of two point maps, and accuracy and completeness before ICP; after it, of the case's moved points."""
    valid = case["in_valid"].astype(bool)
    pred, gt = case["in_pred_pts"][valid].astype(np.float64), case["in_gt_pts"][valid].astype(np.float64)
    found = umeyama(pred, gt)
    yield case.check("out_umeyama_R", found.rotation, EXACT)
    yield case.check("out_umeyama_t", found.translation, EXACT)
    yield case.check("out_umeyama_c", found.scale, EXACT)
    yield case.check_answer(found.scale, "umeyama_scale", mark=EXACT)
    aligned = found.apply(pred)
    if "mid_aligned" in case:
        yield case.check("mid_aligned", aligned, EXACT)
    distances = chamfer(aligned, gt)
    yield case.check_answer(distances.accuracy, "acc_mean_without_icp", mark=METRIC)
    yield case.check_answer(distances.completeness, "comp_mean_without_icp", mark=METRIC)
    if "mid_after_icp" in case:
        distances = chamfer(case["mid_after_icp"], gt)
        yield case.check_answer(distances.accuracy, "acc_mean", mark=METRIC)
        yield case.check_answer(distances.completeness, "comp_mean", mark=METRIC)
        yield case.check_answer(distances.mean, "overall", mark=METRIC)


def trajectory(case: Case) -> Iterator[Compared]:
    """Similarity of two trajectories' camera centres, and the distances after it."""
    for index in range(len(case.peek("sequences"))):
        pred, gt = (case[f"in_{name}_c2w_{index}"][:, :3, 3] for name in ("pred", "gt"))
        found = umeyama(pred, gt)
        yield case.check(f"out_align_R_{index}", found.rotation, EXACT)
        yield case.check(f"out_align_t_{index}", found.translation, EXACT)
        yield case.check_answer(found.scale, "sequences", index, "scale", mark=EXACT)
        yield case.check(f"out_ape_{index}", np.linalg.norm(found.apply(pred) - gt, axis=1), EXACT)


def mvs_depth(case: Case) -> Iterator[Compared]:
    """Robust MVD's relative error and inliers at 1.03 in percent; the resized prediction is taken from the case."""
    rows: list[list[float]] = []
    for index in range(len(case.peek("samples"))):
        rows.append([])
        pred, gt = case[f"mid_pred_resized_{index}"].astype(np.float64), case[f"in_gt_{index}"]
        valid, keys = gt > 0, ("samples", index)
        ratio = align_scale(pred, gt, valid, "median")
        yield case.check_answer(ratio, *keys, "ratio", mark=SINGLE)
        for name, scale in (("raw", 1.0), ("aligned", ratio)):
            clipped = np.clip(scale * pred, 0.1, 100.0)
            found = 100 * abs_rel(clipped, gt, valid)
            yield case.check_answer(found, *keys, name, "absrel_percent", mark=SINGLE)
            rows[-1].append(found)
            for key, values in (("inliers103_percent", clipped), ("inliers103_percent_unclipped", scale * pred)):
                found = 100 * delta(values, gt, valid, 1.03)
                yield case.check_answer(found, *keys, name, key, mark=SINGLE, scale=100.0)
                if values is clipped:
                    rows[-1].append(found)
    yield case.check("out_absrel_inliers", rows, SINGLE)
    means = iter(np.mean(rows, axis=0))
    for name in ("raw", "aligned"):
        for key in ("absrel_percent", "inliers103_percent"):
            yield case.check_answer(next(means), "mean_over_samples", name, key, mark=SINGLE)


def readers(case: Case) -> Iterator[Compared]:
    """Files of COLMAP and ETH3D: cameras, poses and measured depth."""
    scene = case.path / "files" / "eth3d" / "courtyard"
    if scene.is_dir():
        model = read_model(scene / "dslr_calibration_undistorted")
        for image in model.images:
            yield case.check(f"out_eth3d_w2c_{image.image_id}", image.world_to_cam, EXACT)
        yield case.check("out_eth3d_K_colmap", model.cameras[model.images[0].camera_id].K, EXACT)
        expected = case["out_eth3d_depth"]
        file = next(path for path in sorted((scene / "ground_truth_depth").rglob("*")) if path.is_file())
        yield case.check("out_eth3d_depth", measured_depth(np.fromfile(file, "<f4").reshape(expected.shape)), 0.0)
    for folder in sorted((case.path / "files" / "scannetpp").glob("**/colmap")):
        image = read_model(folder).images[0]
        yield case.check("out_scannetpp_w2c", image.world_to_cam, EXACT)


KINDS = {
    "proto_depth": depth,
    "proto_videodepth": video_depth,
    "proto_nyu": nyu,
    "proto_pointmap": point_map,
    "proto_trajectory": trajectory,
    "proto_mvs_depth": mvs_depth,
    "proto_readers": readers,
    **pose_vectors.KINDS,
}
