"""Reads ETH3D's folder layout (https://www.eth3d.net/documentation), also written by our own scene generator.

    <scene>/dslr_calibration_undistorted/{cameras,images,points3D}.txt    pinhole cameras
    <scene>/dslr_calibration_jpg/{cameras,images,points3D}.txt            THIN_PRISM_FISHEYE cameras
    <scene>/rig_calibration_undistorted/..., rig_calibration/...          the same two for the rig of the low-res sets
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

from pqk.data.scenes.colmap import Model, has_model, model_paths, read_model
from pqk.data.scenes.depthfiles import DEPTH, match_depth
from pqk.data.scenes.folder import existing, missing_images, model_views
from pqk.data.scenes.names import look_alike
from pqk.data.scenes.scene import NoPictures, Scene
from pqk.errors import PqkError

UNDISTORTED, DISTORTED = "dslr_calibration_undistorted", "dslr_calibration_jpg"
MASKS = "masks_for_images"
RIG = ("rig_calibration_undistorted", "rig_calibration")
LAYOUT = (UNDISTORTED, DISTORTED, *RIG, "images", DEPTH, MASKS)  # the folders of a scene


def read(root: Path) -> Scene | None:
    """Reads a scene in this layout; None when `root` has none of the calibration folders.

    Calibrations with depth are preferred, then the camera's over the rig's, then undistorted ones. Raises PqkError for
    a malformed calibration, and NoPictures when the images of none are there.
    """
    folders = [root / name for name in (UNDISTORTED, DISTORTED, *RIG) if has_model(root / name)]
    if not folders:
        return None
    models = [(folder, read_model(folder)) for folder in folders]
    for folder, model in models:
        if not model.images:
            raise PqkError(f"{model_paths(folder)[1]}: no images are listed")
    present = [(folder, model) for folder, model in models if not _all_missing(model, root)]
    if not present:
        model = models[0][1]
        hint = look_alike(root / "images", model.images[0].name)
        raise NoPictures(
            f"{root / 'images'}: none of the {len(model.images)} images of {folders[0].name} is there{hint}"
        )
    depths = {folder: match_depth([image.name for image in model.images], [root / DEPTH]) for folder, model in present}
    with_depth = [(folder, model) for folder, model in present if depths[folder]]
    folder, model = (with_depth or present)[0]
    notes = []
    if not with_depth and (root / DEPTH).is_dir():
        distorted = (
            f"images/dslr_images and {DISTORTED}" if folder.name not in RIG else f"the images of {RIG[1]}, and it,"
        )
        notes.append(
            f"{root / DEPTH}: this depth does not belong to the images of {folder.name} "
            f"(ETH3D's depth is for the distorted images); add {distorted} to use it, going on without ground truth"
        )
    others = [other.name for other, _ in present if (other.name in RIG) != (folder.name in RIG)]
    if others:
        notes.append(f"{root}: the images of {folder.name} are used, those of {' and '.join(others)} are not")
    views = model_views(
        model,
        root / "images",
        depth_of=depths[folder].get,
        mask_of=lambda name: existing(root / MASKS / PurePosixPath(name).with_suffix(".png")),
        mask_marks_ignored=True,
    )
    if with_depth and any(view.depth_path is None for view in views):
        without = [view.name for view in views if view.depth_path is None]
        notes.append(f"{root / DEPTH}: {len(without)} of {len(views)} images lack depth ({without[0]}, ...)")
    return Scene(root.name, root, views, tuple(notes), model_paths(folder))


def _all_missing(model: Model, root: Path) -> bool:
    return len(missing_images(model, root / "images")) == len(model.images)
