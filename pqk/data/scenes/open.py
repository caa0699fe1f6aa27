"""Opens scenes, `open_scene` and `open_scenes`: finds the layout of a folder and calls the reader of that layout."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path

from pqk.data.scenes import co3d, colmap, eth3d, folder
from pqk.data.scenes.names import look_alike, natural
from pqk.data.scenes.scene import NoPictures, Scene, unreadable
from pqk.errors import PqkError

log = logging.getLogger(__name__)


def open_scene(path: Path | str) -> Scene:
    """Opens one scene: CO3Dv2 sequence, ETH3D layout, COLMAP project, or folder of images, the first that fits.

    Raises PqkError when the folder is missing, cannot be read or holds none of these, and for malformed calibration
    files.
    """
    root = _folder(path)
    scene = _open(root)
    if scene is None:
        raise PqkError(
            f"{root}: no scene here{_unread(root)}; expected images, or images/ with a COLMAP model in sparse/0, "
            "or the ETH3D layout, or the folder of one sequence in a category of CO3Dv2"
        )
    return _noted([scene])[0]


def open_scenes(path: Path | str, pictures: bool = False) -> list[Scene]:
    """Opens a single scene, or every subfolder that is one, in the natural order of their names.

    Of a category of CO3Dv2, in the folder itself or a subfolder, every sequence that its list `test` names is a scene.

    Scenes with known cameras are preferred: where a subfolder holds one, pictures beside it and folders of plain
    pictures are left out and named in a warning. With `pictures`, pictures in the folder itself are used first, and
    scenes without cameras count as much as others. A subfolder without a scene, or one that cannot be read, is skipped
    with a warning. Raises PqkError when there is no scene, and whatever `open_scene` raises, also for a subfolder.
    """
    root = _folder(path)
    sequences = _sequences(root)
    if sequences:
        return _noted(sequences)
    here = _open(root)
    if here is not None and (here.is_calibrated or pictures):
        return _noted([here])
    found: list[Scene] = []
    for inner in _subfolders(root):
        try:
            if sequences := _sequences(inner):
                found += sequences
                continue
            scene = _open(inner)
        except NoPictures as error:
            if here is None and not co3d.is_category(inner):
                raise
            _warn(f"{error}; skipped")  # other pictures are there, and those of this model or category are not
            continue
        if scene is not None:
            found.append(scene)
        elif here is None:
            _warn(f"{inner} holds no scene, skipped{_unread(inner)}")
    calibrated = [scene for scene in found if scene.is_calibrated]
    if here is not None and not calibrated:
        return _noted([here])
    if not found:
        raise PqkError(f"{root}: no scene here, and none in its subfolders{_unread(root)}")
    if not calibrated or pictures:
        return _noted(found)
    ignored = [str(scene.root) for scene in found if not scene.is_calibrated]
    if here is not None:
        ignored.insert(0, f"{len(here.views)} pictures directly in {root} ({here.views[0].name}, ...)")
    if ignored:
        _warn(
            f"left out, because {len(calibrated)} scenes with known cameras are there and these have none: "
            f"{', '.join(ignored)}"
        )
    return _noted(calibrated)


def _sequences(root: Path) -> list[Scene]:
    """Returns the scenes of a category of CO3Dv2; [] for another folder."""
    try:
        if not co3d.is_category(root):
            return []
        scenes, note = co3d.read_category(root)
    except OSError as error:
        raise unreadable(error, root) from error
    colmap.check_utf8(root.name, str(root.parent))
    if note:
        _warn(note)
    return scenes


def _open(root: Path) -> Scene | None:
    try:
        folder.refuse_dead_links(root, (*folder.LAYOUT, *eth3d.LAYOUT))
        scene = co3d.read(root) or eth3d.read(root) or folder.read_colmap_project(root) or folder.read_images(root)
    except OSError as error:
        raise unreadable(error, root) from error
    if scene is not None:
        colmap.check_utf8(root.name, str(root.parent))
    return scene


def _unread(root: Path) -> str:
    """Names the unsupported pictures of a folder without a scene, as the end of a sentence; '' without any."""
    found = folder.unread_pictures(root) or folder.unread_pictures(root / "images")
    return f" ({found})" if found else ""


def _folder(path: Path | str) -> Path:
    """Returns the folder as an absolute path; a link keeps its own name."""
    root = Path(path)
    try:
        if not root.exists():
            hint = look_alike(root.parent, root.name) if root.parent.is_dir() else ""
            raise PqkError(f"scene folder {root} does not exist{hint}")
        if not root.is_dir():
            raise PqkError(f"scene folder {root} is a file; give the folder that holds the scene")
        return root.resolve() if root.name in ("", "..") else root.parent.resolve() / root.name
    except OSError as error:
        raise unreadable(error, root) from error


def _subfolders(root: Path) -> list[Path]:
    """Returns the folders in `root` that can be listed; warns of others, such as lost+found on a disk."""
    try:
        entries = sorted(
            (e for e in root.iterdir() if not e.name.startswith(".")), key=lambda entry: natural(entry.name)
        )
    except OSError as error:
        raise unreadable(error, root) from error
    folders = []
    for entry in entries:
        try:
            if entry.is_dir():
                with os.scandir(entry) as listed:
                    for item in listed:
                        item.stat(follow_symlinks=False)  # a folder may be listed although its entries cannot be opened
                        break
                folders.append(entry)
        except OSError as error:
            _warn(f"{unreadable(error, entry)}; skipped")
    return folders


def _noted(scenes: list[Scene]) -> list[Scene]:
    """Warns of each note of the scenes, and returns them."""
    for scene in scenes:
        for note in scene.notes:
            _warn(note)
    return scenes


@cache
def _warn(sentence: str) -> None:
    """Warns once per sentence: a run opens a scene many times."""
    log.warning("%s", sentence)
