"""ETH3D's folder layout (https://www.eth3d.net/documentation), also written by our own scene generator.

    <scene>/dslr_calibration_undistorted/{cameras,images,points3D}.txt    pinhole cameras
    <scene>/dslr_calibration_jpg/{cameras,images,points3D}.txt            THIN_PRISM_FISHEYE cameras
    <scene>/images/<folder>/<file>                                        names in images.txt start with <folder>
    <scene>/ground_truth_depth/<folder>/<file>                            raw float32, same name as the image
    <scene>/masks_for_images/<folder>/<stem>.png                          0 = use, anything else = ignore

A depth map belongs to the image of the same folder and name. The official depth belongs to the distorted images
(`dslr_images`), so it cannot be laid over the undistorted ones; the distorted images are then used and undistorted
together with their depth.

ETH3D's masks distinguish 1 (colour not trustworthy: reflections, flare) from 2 (the laser scan lacks what the image
shows). Both are ignored here.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from pqk.data.colmap import Model, has_model, read_model
from pqk.data.folder import existing, missing_images, model_views
from pqk.data.scene import Scene
from pqk.errors import PqkError

UNDISTORTED, DISTORTED = "dslr_calibration_undistorted", "dslr_calibration_jpg"


def read(root: Path) -> Scene | None:
    """Read a scene in this layout; None when `root` has neither calibration folder.

    Raises PqkError for a malformed calibration, and when the images of neither calibration are there.
    """
    folders = [root / name for name in (UNDISTORTED, DISTORTED) if has_model(root / name)]
    if not folders:
        return None
    models = [(folder, read_model(folder)) for folder in folders]
    for folder, model in models:
        if not model.images:
            raise PqkError(f"{folder / 'images.txt'}: no images are listed")
    present = [(folder, model) for folder, model in models if not _all_missing(model, root)]
    if not present:
        model = models[0][1]
        raise PqkError(f"{root / 'images'}: none of the {len(model.images)} images of {folders[0].name} is there")
    with_depth = [(folder, model) for folder, model in present if any(_depth(root, i.name) for i in model.images)]
    folder, model = (with_depth or present)[0]
    notes = []
    if not with_depth and (root / "ground_truth_depth").is_dir():
        notes.append(
            f"{root / 'ground_truth_depth'}: this depth does not belong to the images of {folder.name} "
            f"(ETH3D's depth is for the distorted images); add images/dslr_images and {DISTORTED} to use it, "
            "going on without ground truth"
        )
    views = model_views(
        model,
        root / "images",
        depth_of=lambda name: _depth(root, name),
        mask_of=lambda name: existing(root / "masks_for_images" / PurePosixPath(name).with_suffix(".png")),
        mask_marks_ignored=True,
    )
    if with_depth and any(view.depth_path is None for view in views):
        without = [view.name for view in views if view.depth_path is None]
        notes.append(
            f"{root / 'ground_truth_depth'}: {len(without)} of {len(views)} images lack depth ({without[0]}, ...)"
        )
    return Scene(root.name, root, views, tuple(notes))


def _depth(root: Path, image_name: str) -> Path | None:
    return existing(root / "ground_truth_depth" / image_name)


def _all_missing(model: Model, root: Path) -> bool:
    return len(missing_images(model, root / "images")) == len(model.images)
