"""Fetches scenes of the ETH3D benchmark (Schöps et al., CVPR 2017; https://www.eth3d.net) as pqk reads them.

The archives of a scene unpack to one folder, `OUT/SCENE`, in the layout of `pqk.data.scenes.eth3d`; nothing is renamed:

| kind | archive | folders of the scene |
| --- | --- | --- |
| jpg | SCENE_dslr_jpg.7z | images/dslr_images, dslr_calibration_jpg |
| depth | SCENE_dslr_depth.7z | ground_truth_depth/dslr_images, of the pictures of jpg |
| undistorted | SCENE_dslr_undistorted.7z | images/dslr_images_undistorted, dslr_calibration_undistorted |

So `OUT/SCENE` is a scene with ground truth, `OUT` a folder of scenes, and `OUT/SCENE/images` a folder of photographs.
What was unpacked, from where, stands in `OUT/SCENE/.fetched.json`; an archive that stands there is not fetched again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pqk.data.fetch.download import Fetched, Patience, Progress, about_file, download
from pqk.data.fetch.unpack import Limits, check_7z, unpack
from pqk.data.scenes.open import open_scene
from pqk.errors import PqkError, nearest
from pqk.files import clear_write_errors, whole_folder, write_json
from pqk.locks import locked

OFFICIAL = "https://www.eth3d.net/data"
SCENES = (
    "courtyard", "delivery_area", "electro", "facade", "kicker", "meadow", "office", "pipes", "playground", "relief",
    "relief_2", "terrace", "terrains",
)  # the training scenes of the high-resolution multi-view benchmark: those with ground truth  # fmt: skip
DEFAULT_SCENES = ("courtyard", "delivery_area")
KINDS = {"jpg": "dslr_jpg", "depth": "dslr_depth", "undistorted": "dslr_undistorted"}
DEFAULT_KINDS = ("jpg", "depth")
RECORD = ".fetched.json"
_ARCHIVES = ".archives"  # scene readers skip names that begin with a dot


@dataclass(frozen=True)
class Request:
    """What is fetched. base: address of the folder with the archives; suffix: '7z' or 'zip'; keep: keep them."""

    out: Path
    scenes: tuple[str, ...] = DEFAULT_SCENES
    kinds: tuple[str, ...] = DEFAULT_KINDS
    base: str = OFFICIAL
    suffix: str = "7z"
    keep: bool = False
    patience: Patience = Patience()  # noqa: RUF009 (frozen)
    limits: Limits = Limits()  # noqa: RUF009 (frozen)


def fetch(request: Request) -> list[Path]:
    """Fetches every archive that is not unpacked yet, and returns the folders of the scenes.

    Each scene is complete before the next begins, and what a killed call leaves is gone on from. One process at a time
    works in a folder; another waits. Raises PqkError as `download` and `unpack` do, and for an unknown scene or kind.
    """
    for what, asked, known in (("scene", request.scenes, SCENES), ("kind", request.kinds, tuple(KINDS))):
        for name in asked:
            if name not in known:
                raise PqkError(f"unknown {what} {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    if request.suffix == "7z" and any(_missing(request, scene) for scene in request.scenes):
        check_7z()  # before hours of downloading
    archives = request.out / _ARCHIVES
    with clear_write_errors(archives):
        archives.mkdir(parents=True, exist_ok=True)
    with locked(archives / ".lock", waiting=lambda: print("another process fetches; waiting", file=sys.stderr)):
        for scene in request.scenes:
            for kind in _missing(request, scene):
                _fetch_one(request, scene, kind)
    return [request.out / scene for scene in request.scenes]


def _missing(request: Request, scene: str) -> list[str]:
    done = _record(request.out / scene)
    return [kind for kind in request.kinds if kind not in done]


def _record(folder: Path) -> dict[str, Any]:
    """Returns what was unpacked into a scene's folder, by kind; nothing when its record is missing or damaged."""
    try:
        found = json.loads((folder / RECORD).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _fetch_one(request: Request, scene: str, kind: str) -> None:
    name = f"{scene}_{KINDS[kind]}.{request.suffix}"
    archives, folder = request.out / _ARCHIVES, request.out / scene
    fetched = download(f"{request.base.rstrip('/')}/{name}", archives / name, Progress(name), request.patience)
    unpacked = archives / f"{name}.unpacked"
    with clear_write_errors(folder):
        if unpacked.exists():  # of a call that was killed before it recorded it
            shutil.rmtree(unpacked)
        with whole_folder(unpacked) as empty:
            files = unpack(fetched.path, empty, inside=scene, limits=request.limits)
        _merge(unpacked / scene, folder)
        write_json(folder / RECORD, {**_record(folder), kind: _about(fetched, len(files))})
        shutil.rmtree(unpacked)
        if not request.keep:
            fetched.path.unlink()
            about_file(fetched.path).unlink()


def _about(fetched: Fetched, files: int) -> Mapping[str, Any]:
    remote = fetched.remote
    return {
        "url": remote.url,
        "bytes": remote.length,
        "sha256": fetched.sha256,
        "etag": remote.etag,
        "last_modified": remote.modified,
        "files": files,
    }


def _merge(new: Path, folder: Path) -> None:
    """Moves a folder to its place, into what is there of it: whole folders where they are new, else file by file."""
    if folder.is_symlink():
        raise PqkError(f"{folder}: a link is in the place where the scene is unpacked; move it away")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        new.rename(folder)
    elif new.is_dir() and folder.is_dir():
        for entry in sorted(new.iterdir()):
            _merge(entry, folder / entry.name)
    elif new.is_dir() or folder.is_dir():
        raise PqkError(f"{folder}: of file and folder, one is here and the other in the archive; move it away")
    else:
        new.replace(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs scripts/download_eth3d.py; returns 0. Raises PqkError (exit code 2), NotBuilt (3) without py7zr."""
    parser = argparse.ArgumentParser(
        prog="download_eth3d.py",
        description="Fetch scenes of ETH3D (https://www.eth3d.net has the terms of use). Resumes where it was stopped.",
    )
    parser.add_argument("--output_dir", "--output-dir", type=Path, required=True, metavar="DIR", help="gets DIR/SCENE")
    parser.add_argument(
        "--scenes",
        nargs="+",
        default=DEFAULT_SCENES,
        metavar="SCENE",
        help=f"of {', '.join(SCENES)}; default: the first two",
    )
    parser.add_argument(
        "--kind",
        nargs="+",
        default=DEFAULT_KINDS,
        metavar="KIND",
        help="jpg (pictures as taken), depth (their ground truth), undistorted (pictures of a pinhole camera, which "
        "the depth does not fit); default: jpg depth, about 0.8 GB a scene to fetch",
    )
    parser.add_argument("--base-url", default=OFFICIAL, metavar="URL", help="another server; default: %(default)s")
    parser.add_argument("--archives", choices=("7z", "zip"), default="7z", help="what it has; default: %(default)s")
    parser.add_argument("--keep-archives", action="store_true", help="keep them, in DIR/.archives")
    asked = parser.parse_args(arguments)
    request = Request(
        asked.output_dir,
        tuple(dict.fromkeys(asked.scenes)),
        tuple(dict.fromkeys(asked.kind)),
        asked.base_url,
        asked.archives,
        asked.keep_archives,
    )
    for folder in fetch(request):
        print(_described(folder))
    return 0


def _described(folder: Path) -> str:
    """Returns a line about a scene, as pqk reads it. Raises PqkError where it is none."""
    if not (folder / "images").is_dir():
        return f"{folder}: no pictures yet; --kind jpg fetches those of this depth"
    scene = open_scene(folder)
    measured = sum(view.depth_path is not None for view in scene.views)
    places = sorted(path.name for path in (folder / "images").iterdir() if path.is_dir())
    return f"{folder}: {len(scene.views)} pictures with cameras, {measured} with depth; images/ has {', '.join(places)}"
