"""Two plain layouts: images beside a COLMAP model, and a bare folder of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from pqk.data.colmap import Model, check_utf8, has_model, read_model
from pqk.data.scene import Scene, View
from pqk.errors import PqkError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
OTHER_PICTURES = {
    ".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jfif", ".jpe", ".mpo", ".gif", ".ppm", ".pgm", ".pnm",
    ".tga", ".dds", ".eps", ".psd", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"
}  # suffixes of pictures that are not read; a folder that holds some says so  # fmt: skip
MODEL_FOLDERS = ("sparse/0", "sparse", ".")  # where COLMAP and its users put the model, best first


def read_images(root: Path) -> Scene | None:
    """Images directly in `root`, or else in `root/images`: nothing is known of their cameras. None without images."""
    for folder in (root, root / "images"):
        files = image_files(folder)
        if files:
            unread = unread_pictures(folder)
            notes = (f"{folder}: {unread}; only the {len(files)} others are used",) if unread else ()
            return Scene(root.name, root, tuple(View(file.name, file) for file in files), notes)
    return None


def read_colmap_project(root: Path) -> Scene | None:
    """`root/images` (or `root`) with a model in sparse/0, sparse or root; None without a model.

    Depth is looked for in ground_truth_depth/<image name>, as raw float32 in the size of that image.
    """
    model_folder = next((root / name for name in MODEL_FOLDERS if has_model(root / name)), None)
    if model_folder is None:
        return None
    model = read_model(model_folder)
    image_folder = root / "images" if (root / "images").is_dir() else root
    views = model_views(model, image_folder, lambda name: existing(root / "ground_truth_depth" / name))
    if not views:
        raise PqkError(f"{model_folder}: the COLMAP model lists no images")
    return Scene(root.name, root, views)


def image_files(folder: Path) -> list[Path]:
    """Image files directly in a folder, sorted by name; [] when the folder is missing. Hidden files are left out.

    Raises PqkError for a name that is not UTF-8: neither a record nor a table could hold it.
    """
    if not folder.is_dir():
        return []
    files = (file for file in folder.iterdir() if file.suffix.lower() in EXTENSIONS and not file.name.startswith("."))
    found = sorted((file for file in files if file.is_file()), key=lambda file: file.name)
    for file in found:
        check_utf8(file.name, str(folder))
    return found


def unread_pictures(folder: Path) -> str:
    """How many pictures directly in a folder are of formats that are not read, and the first of them; '' if none."""
    if not folder.is_dir():
        return ""
    files = [p for p in folder.iterdir() if p.suffix.lower() in OTHER_PICTURES and not p.name.startswith(".")]
    if not files:
        return ""
    kinds = Counter(path.suffix.lower()[1:].upper() for path in files)
    named = " and ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    first = min(path.name for path in files).encode("utf-8", "backslashreplace").decode()
    return f"{named} not read ({first}{', ...' if len(files) > 1 else ''}), convert to JPEG or PNG"


def existing(path: Path) -> Path | None:
    """The path if it is a file."""
    return path if path.is_file() else None


def missing_images(model: Model, image_folder: Path) -> list[str]:
    """Names that the model lists but the folder lacks."""
    return [image.name for image in model.images if not (image_folder / image.name).is_file()]


def model_views(
    model: Model,
    image_folder: Path,
    depth_of: Callable[[str], Path | None],
    mask_of: Callable[[str], Path | None] = lambda name: None,
    mask_marks_ignored: bool = False,
) -> tuple[View, ...]:
    """One View per image of a COLMAP model, sorted by name; distorted cameras are undistorted on load.

    depth_of and mask_of give the file for an image name. Raises PqkError when an image file is missing or its camera
    model cannot be undistorted here.
    """
    missing = missing_images(model, image_folder)
    if missing:
        raise PqkError(
            f"{image_folder}: {len(missing)} of the {len(model.images)} images of the model are missing, "
            f"the first is {missing[0]!r}"
        )
    prefix = _common_folder(image.name for image in model.images)
    views = []
    for image in sorted(model.images, key=lambda image: image.name):
        camera = model.cameras[image.camera_id]
        if not camera.can_undistort:
            raise PqkError(
                f"{image_folder / image.name}: camera model {camera.model} cannot be undistorted here; "
                "run `colmap image_undistorter` and use its output folder"
            )
        views.append(
            View(
                name=image.name.removeprefix(prefix),
                image_path=image_folder / image.name,
                K=camera.K,
                world_to_cam=image.world_to_cam,
                depth_path=depth_of(image.name),
                mask_path=mask_of(image.name),
                distortion=None if camera.is_pinhole else camera,
                size=(camera.height, camera.width),
                mask_marks_ignored=mask_marks_ignored,
            )
        )
    return tuple(views)


def _common_folder(names: Iterable[str]) -> str:
    """'dslr_images/' when every name starts with this one folder, else ''."""
    folders = {name.rpartition("/")[0] for name in names}
    folder = folders.pop() if len(folders) == 1 else ""
    return folder + "/" if folder else ""
