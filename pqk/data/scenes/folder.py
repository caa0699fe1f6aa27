"""Reads two plain layouts: images beside a COLMAP model, and a bare folder of images."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pqk.data.scenes.colmap import Model, check_utf8, has_model, model_paths, read_model
from pqk.data.scenes.depthfiles import DEPTH, match_depth, unused_depth
from pqk.data.scenes.names import look_alike, natural
from pqk.data.scenes.scene import NoPictures, Scene, View
from pqk.errors import PqkError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
OTHER_PICTURES = {
    ".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jfif", ".jpe", ".mpo", ".gif", ".ppm", ".pgm", ".pnm",
    ".tga", ".dds", ".eps", ".psd", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"
}  # suffixes of pictures that are not read, but named in a note  # fmt: skip
PROJECTS = (".", "colmap", "dense", "dense/0", "distorted")  # where COLMAP and its users put a project, best first
LAYOUT = ("images", "input", "sparse", "colmap", "dense", "distorted", DEPTH)  # the folders of a scene
_DEEPEST = 3  # folders below a scene in which a model that is not read is still found and named


def read_images(root: Path) -> Scene | None:
    """Reads images directly in `root`, or else in `root/images`, without cameras. Returns None without images."""
    for folder in (root, root / "images"):
        files = image_files(folder)
        if files:
            unread = unread_pictures(folder)
            notes = [f"{folder}: {unread}; only the {len(files)} others are used"] if unread else []
            notes += (*_unread_models(root, ()), *unused_depth(root, (), "no camera model was found"))
            return Scene(root.name, root, tuple(View(file.name, file) for file in files), tuple(notes))
    return None


def read_colmap_project(root: Path) -> Scene | None:
    """Reads `root/images` (or `root`) with a model in sparse/N, sparse or root, or such a project in a subfolder.

    Returns None without a model. Of several models, the one with the most images on disk is used. Depth is searched in
    ground_truth_depth; see `match_depth`. Raises PqkError for a malformed model and for one with some images missing,
    NoPictures when all are missing.
    """
    project, found = next(((p, m) for p in PROJECTS if (m := _models(root / p))), (".", []))
    if not found:
        return None
    choices = [_choice(root, root / project, folder) for folder in found]
    best = max(choices, key=lambda choice: (choice.present, choice.present - len(choice.model.images)))
    if not best.model.images:
        raise PqkError(f"{best.folder}: the COLMAP model lists no images")
    if not best.present:
        raise NoPictures(
            f"{best.folder}: none of the {len(best.model.images)} images of this COLMAP model is in {best.images}, "
            f"the first is {best.model.images[0].name!r}{look_alike(best.images, best.model.images[0].name)}"
        )
    depth = match_depth([image.name for image in best.model.images], [root / DEPTH, root / project / DEPTH])
    views = model_views(best.model, best.images, depth.get)
    notes = [
        *_choice_notes(root, best, choices),
        *_unread_models(root, [choice.folder for choice in choices]),
        *unused_depth(root, depth.values(), f"no image of {_inside(root, best.folder)} has such a name"),
    ]
    return Scene(root.name, root, views, tuple(notes), model_paths(best.folder))


def image_files(folder: Path) -> list[Path]:
    """Returns image files directly in a folder, in natural order, without hidden ones; [] when the folder is missing.

    Raises PqkError for a link that leads nowhere, and for a name that is not UTF-8: neither a record nor a table could
    hold it.
    """
    if not folder.is_dir():
        return []
    refuse_dead_links(folder)
    files = (file for file in folder.iterdir() if file.suffix.lower() in EXTENSIONS and not file.name.startswith("."))
    found = sorted((file for file in files if file.is_file()), key=lambda file: natural(file.name))
    for file in found:
        check_utf8(file.name, str(folder))
    return found


def unread_pictures(folder: Path) -> str:
    """Returns how many pictures directly in a folder are in formats that are not read, and the first; '' if none."""
    if not folder.is_dir():
        return ""
    files = [p for p in folder.iterdir() if p.suffix.lower() in OTHER_PICTURES and not p.name.startswith(".")]
    if not files:
        return ""
    kinds = Counter(path.suffix.lower()[1:].upper() for path in files)
    named = " and ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    first = min(path.name for path in files).encode("utf-8", "backslashreplace").decode()
    return f"{named} not read ({first}{', ...' if len(files) > 1 else ''}), convert to JPEG or PNG"


def refuse_dead_links(folder: Path, known: Collection[str] = ()) -> None:
    """Raises PqkError for a link directly in a folder that leads nowhere or in a circle, where a scene needs it.

    That is a link with the name of a picture, or one of the `known` names.
    """
    for entry in sorted(folder.iterdir()):
        needed = entry.name in known or (entry.suffix.lower() in EXTENSIONS and not entry.name.startswith("."))
        if needed and entry.is_symlink() and not entry.exists():
            raise PqkError(f"{entry}: this link leads nowhere")


def existing(path: Path) -> Path | None:
    """Returns the path if it is a file, else None."""
    return path if path.is_file() else None


def missing_images(model: Model, image_folder: Path) -> list[str]:
    """Returns the names that the model lists but the folder lacks."""
    return [image.name for image in model.images if not (image_folder / image.name).is_file()]


def model_views(
    model: Model,
    image_folder: Path,
    depth_of: Callable[[str], Path | None],
    mask_of: Callable[[str], Path | None] = lambda name: None,
    mask_marks_ignored: bool = False,
) -> tuple[View, ...]:
    """Returns one View per image of a COLMAP model, in the natural order of names; distorted ones are undistorted on
    load.

    depth_of and mask_of return the file for an image name. Raises PqkError when an image file is missing or its camera
    model cannot be undistorted here.
    """
    missing = missing_images(model, image_folder)
    if missing:
        hint = next((hint for name in missing[:20] if (hint := look_alike(image_folder, name))), "")
        raise PqkError(
            f"{image_folder}: {len(missing)} of the {len(model.images)} images of the model are missing, "
            f"the first is {missing[0]!r}{hint}"
        )
    prefix = _common_folder(image.name for image in model.images)
    views = []
    for image in sorted(model.images, key=lambda image: natural(image.name)):
        camera = model.cameras[image.camera_id]
        if not camera.can_undistort:
            raise PqkError(
                f"{image_folder / image.name}: camera model {camera.model} shows a whole sphere and has no "
                "pinhole view; cut perspective views out of the images first"
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


@dataclass(frozen=True)
class _Choice:
    """A model, the folder that holds its images, and how many of them are there."""

    folder: Path
    model: Model
    images: Path
    present: int


def _models(project: Path) -> list[Path]:
    """Returns the folders with a model in a COLMAP project: sparse/N, sparse, and the project itself."""
    sparse = project / "sparse"
    numbered = (
        sorted((e for e in sparse.iterdir() if e.is_dir()), key=lambda e: natural(e.name)) if sparse.is_dir() else []
    )
    return [folder for folder in (*numbered, sparse, project) if has_model(folder)]


def _choice(root: Path, project: Path, folder: Path) -> _Choice:
    model = read_model(folder)
    # 3D Gaussian splatting keeps the distorted pictures in input/, and undistorted ones of the same names in images/.
    names = ("input", "images") if project.name == "distorted" else ("images", "input")
    places = [*(place / name for place in (project, root) for name in names), project, root]
    there = [place for place in dict.fromkeys(places) if place.is_dir()]
    present = {place: len(model.images) - len(missing_images(model, place)) for place in there}
    images = next((place for place in there if present[place]), there[0])  # not elsewhere, where one is missing here
    return _Choice(folder, model, images, present[images])


def _choice_notes(root: Path, best: _Choice, choices: Sequence[_Choice]) -> Iterator[str]:
    """Yields a note that says which of several models was used, and how many of the images on disk it has."""
    used = {best.images / image.name for image in best.model.images}
    on_disk = {file for folder in {path.parent for path in used} if folder.is_dir() for file in image_files(folder)}
    unused = len(on_disk - used)
    several = len(choices) > 1
    if several or unused:
        there = ", ".join(f"{_inside(root, c.folder)} with {len(c.model.images)} images" for c in choices)
        models = f"of the models {there} the " if several else "the "
        yield (
            f"{root}: {models}model {_inside(root, best.folder)} is used, with "
            f"{len(used)} of the {len(on_disk | used)} images on disk"
        )


def _unread_models(root: Path, read: Iterable[Path]) -> Iterator[str]:
    """Yields a note about camera models below a scene that no view uses."""
    known, unread = {os.path.realpath(folder) for folder in read}, []
    seen: set[str] = set()
    for here, folders, _ in os.walk(root, followlinks=True):
        real = os.path.realpath(here)
        if real in seen or len(Path(here).relative_to(root).parts) >= _DEEPEST:
            folders.clear()
        folders.sort()
        with contextlib.suppress(OSError):  # of another user, and no part of this scene
            if real not in known | seen and has_model(Path(here)):
                unread.append(_inside(root, Path(here)))
        seen.add(real)
    if unread:
        places = ", ".join(f"{project}/sparse".removeprefix("./") for project in PROJECTS)
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        yield f"{root}: a COLMAP model is not used: {unread[0]}{more}; the model of a scene is looked for in {places}"


def _inside(root: Path, folder: Path) -> str:
    return folder.relative_to(root).as_posix()


def _common_folder(names: Iterable[str]) -> str:
    """Returns 'dslr_images/' when every name starts with this one folder, else ''."""
    folders = {name.rpartition("/")[0] for name in names}
    folder = folders.pop() if len(folders) == 1 else ""
    return folder + "/" if folder else ""
