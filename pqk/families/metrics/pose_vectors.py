"""Runners of the cases of relative poses: the metrics, and CO3Dv2, the data set they are evaluated on.

Pass marks are those of the protocols: 1e-6 degrees (1e-5 for identical poses), 1e-12 for AUC and shares of pairs, 1e-9
for cameras; depth, masks and the chosen frames must be equal.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from pqk.data.scenes import co3d
from pqk.data.scenes.co3d_annotations import open_category
from pqk.families.metrics import pose
from pqk.families.vectors import Case, Compared, compare

DEGREES, IDENTICAL, AREA, CAMERA = 1e-6, 1e-5, 1e-12, 1e-9
GAUGE_FREE = ("vggt", "pi3")  # variants whose errors do not depend on the world frame


def pairs(case: Case) -> Iterator[Compared]:
    """Errors of the pairs of sequences in three variants, and AUC, RRA and RTA with every way to average."""
    categories = [str(case.answer("categories", k)) for k in range(len(case.peek("categories")))]
    thresholds = case.answer("thresholds")
    pred, gt, change = case["in_pred_w2c"], case["in_gt_w2c"], case["in_world_change"]
    rows: dict[str, list[list[float]]] = {"mean_over_categories": [], "pooled": []}
    for variant in case.answer("rows_of_out_auc"):
        sequences = [pose.pair_errors(p, g, variant) for p, g in zip(pred, gt, strict=True)]
        yield from _errors(case, variant, sequences)
        if variant in GAUGE_FREE:
            moved = [pose.pair_errors(p @ change, g, variant) for p, g in zip(pred, gt, strict=True)]
            yield from _errors(case, variant, moved, " in another world frame")
        found = pose.summarise(zip(categories, sequences, strict=True), thresholds)
        for name, averaged in rows.items():
            averaged.append([getattr(found, name)[f"auc_{degrees}"] for degrees in thresholds])
        for degrees in thresholds:
            auc, at = f"auc_{degrees}", str(degrees)
            expected: list[tuple[Any, tuple[str, ...]]] = [
                ([each[auc] for each in found.per_sequence], ("per_sequence_auc", at)),
                (found.mean_over_categories[auc], ("mean_over_categories_auc", at)),
                (found.mean_over_sequences[auc], ("mean_over_sequences_auc", at)),
                (found.pooled[auc], ("pooled_auc", at)),
                (found.pooled[f"rra_{degrees}"], ("pooled_RRA", at)),
                (found.pooled[f"rta_{degrees}"], ("pooled_RTA", at)),
            ]
            expected += [(each[auc], ("per_category_auc", name, at)) for name, each in found.per_category.items()]
            for value, keys in expected:
                yield case.check_answer(value, variant, *keys, mark=AREA, scale=1.0)
    for name, averaged in rows.items():
        yield compare(f"out_auc_{name}", averaged, case[f"out_auc_{name}"], AREA, 1.0)


def edges(case: Case) -> Iterator[Compared]:
    """Pairs without a baseline, with reversed or missing translations and large turns; errors on borders of bins."""
    names, thresholds = case.answer("cases"), case.answer("thresholds")
    pred, gt = case["in_pred_w2c"], case["in_gt_w2c"]
    for variant in GAUGE_FREE:
        found = [pose.pair_errors(p, g, variant) for p, g in zip(pred, gt, strict=True)]
        for kind, values in (("rot", [e.rotation for e in found]), ("trans", [e.translation for e in found])):
            name = f"out_{kind}_err_{variant}"
            for value, expected, label in zip(values, case[name], names, strict=True):
                mark = IDENTICAL if label == "identical" else DEGREES
                yield compare(f"{name} ({label})", value, expected, mark, 1.0)
        yield compare(
            f"pairs without a baseline ({variant})",
            [int(e.no_baseline[0]) for e in found],
            [int("without_baseline" in label) for label in names],
        )
    errors = case["in_max_err"]
    yield compare("out_auc", [pose.auc(errors, degrees) for degrees in thresholds], case["out_auc"], AREA, 1.0)
    single = [[pose.auc([error], degrees) for degrees in thresholds] for error in errors if np.isfinite(error)]
    yield compare("out_auc_single", single, case["out_auc_single"], AREA, 1.0)
    below = [pose.share_below(errors, degrees) for degrees in thresholds]
    yield compare("out_acc", below, case["out_acc"], AREA, 1.0)


def _errors(case: Case, variant: str, found: list[pose.PairErrors], where: str = "") -> Iterator[Compared]:
    for kind, values in (("rot", [e.rotation for e in found]), ("trans", [e.translation for e in found])):
        name = f"out_{kind}_err_{variant}"
        yield compare(name + where, values, case[name], DEGREES, 1.0)


def data_set(case: Case) -> Iterator[Compared]:
    """A tiny CO3Dv2: cameras, depth, masks, points, and the frames that the protocols of VGGT and Pi3 choose."""
    root = case.path / "co3d"
    categories = [str(name) for name in case.answer("category_order")]
    for index in range(len(case.peek("frames_with_files"))):
        yield from _frame(case, index)
    for name in categories:
        with_files = [each["sequence"] for each in case.peek("frames_with_files") if each["category"] == name]
        yield case.check(f"out_pointcloud_{name}", co3d.point_cloud(root / name, with_files[0]), 0.0)
    for path in case.peek("sequences"):
        name, _, sequence = path.partition("/")
        yield _same(f"answers.sequences.{path}", co3d.verdict(root / name, sequence), case.answer("sequences", path))
    vggt = list(co3d.draw(root, categories))
    for key, drawn in (("vggt_seed0", vggt), ("pi3_seed42", list(co3d.draw(root, categories, 42, "annotated")))):
        expected = case.peek(f"{key}_selection")
        names = [each.sequence for each in drawn]
        yield _same(f"answers.{key}_selection.sequence", names, [each["sequence"] for each in expected])
        for index, each in enumerate(drawn):
            yield case.check_answer(list(each.ids), f"{key}_selection", index, "ids", mark=0)
            if "images" in expected[index]:
                images = [frame.image for frame in each.frames]
                yield _same(f"answers.{key}_selection.{index}.images", images, expected[index]["images"])
    for each in vggt:
        cameras = [frame.world_to_cam[:3] for frame in each.frames if frame.world_to_cam is not None]
        yield case.check(f"out_sel_w2c_{each.folder.name}_{each.sequence}", cameras, CAMERA)
    generator = np.random.RandomState(0)
    choices = [generator.choice(count, 10, replace=False) for count in (202, 102, 50)]
    yield case.check_answer(choices, "np_random_seed0_choice_202_102_50", mark=0)
    names = co3d.few([f"s{k:02}" for k in range(14)], 10, random.Random(0))
    yield _same("random_seed0_sample", names, sorted(case.answer("random_seed0_sample_10_of_s00_to_s13")))


def _frame(case: Case, index: int) -> Iterator[Compared]:
    """Compares one frame with files, as the scene of its sequence gives it."""
    keys = ("frames_with_files", index)
    expected = case.peek(*keys)
    category = open_category(case.path / "co3d" / expected["category"])
    scene = co3d.read(category.folder / expected["sequence"])
    views = {} if scene is None else {view.image_path: view for view in scene.views}
    view = views.get(category.root / expected["image"])
    number = {frame.image: frame.number for frame in category.frames(expected["sequence"], None, "")}
    yield case.check_answer(number.get(expected["image"], -1), *keys, "frame_number", mark=0)
    yield _same(f"answers.frames_with_files.{index}.image", view is not None, True)
    if view is None or view.K is None or view.world_to_cam is None:
        return
    factor = case.answer(*keys, "scale_adjustment")
    yield compare(f"answers.frames_with_files.{index}.scale_adjustment", view.depth_factor, factor, 0.0)
    yield case.check(f"out_K_{index}", view.K, CAMERA)
    yield case.check(f"out_w2c_{index}", view.world_to_cam[:3], CAMERA)
    yield case.check(f"out_depth_{index}", view.load_depth(), 0.0)
    mask = view.load_mask()
    yield case.check(f"out_depth_mask_{index}", None if mask is None else mask.astype(np.float32), 0.0)
    yield case.check(f"out_mask_{index}", view.load_foreground(), 0.0)


def _same(name: str, found: Any, expected: Any) -> Compared:
    """Compares things that are no numbers."""
    same = found == expected
    return Compared(name, 0.0 if same else np.inf, 0.0, "" if same else f"{found} instead of {expected}"[:200])


KINDS = {"proto_pose": pairs, "proto_pose_edge": edges, "proto_co3d": data_set}
