"""Folders as people have them: links, other places and names, what may not be read, and what lies beside scenes."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pqk.data.scenes.camera import Camera
from pqk.data.scenes.colmap import ModelImage, write_text_model
from pqk.data.scenes.open import open_scene, open_scenes
from pqk.errors import PqkError
from pqk.families.scenes.sets import folder_scenes

WIDTH, HEIGHT = 48, 32
NAMES = ("0.png", "1.png", "2.png")


def paint(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_model(folder: Path, names: Sequence[str]) -> None:
    camera = Camera(1, "PINHOLE", WIDTH, HEIGHT, (40.0, 40.0, 24.0, 16.0))
    write_text_model(folder, [camera], [ModelImage.from_pose(i + 1, np.eye(4), 1, n) for i, n in enumerate(names)])


def write_depth(folder: Path, names: Sequence[str], value: float = 2.0) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.full((HEIGHT, WIDTH), value, "<f4").tofile(folder / name)


def write_room(root: Path, names: Sequence[str] = NAMES, model: str = "sparse/0", depth: bool = True) -> Path:
    """Images, a COLMAP model and depth."""
    for seed, name in enumerate(names):
        paint(root / "images" / name, seed)
    write_model(root / model, names)
    if depth:
        write_depth(root / "ground_truth_depth", names)
    return root


def photos(folder: Path, seed: int = 0, count: int = 2) -> Path:
    for k in range(count):
        paint(folder / f"{k}.png", seed + k)
    return folder


# ---------------------------------------------------------------- what is hashed


@pytest.mark.parametrize("linked", ["images", "ground_truth_depth", "sparse", "sparse/0", "images/1.png"])
def test_linked_folders_and_files_count(tmp_path: Path, linked: str) -> None:
    """A link is what it leads to: the same scores for the same files, other ones when these change."""
    plain = write_room(tmp_path / "plain")
    room = shutil.copytree(plain, tmp_path / "room")
    changed = tmp_path / "elsewhere" / Path(linked).name
    changed.parent.mkdir()
    shutil.move(room / linked, changed)
    (room / linked).symlink_to(changed)
    (room / "sparse" / "again").symlink_to("..")  # a loop
    first = folder_scenes(room).sha256
    assert first == folder_scenes(plain).sha256
    while changed.is_dir():
        changed = next(path for path in sorted(changed.iterdir()) if path.name not in ("again", "points3D.txt"))
    if changed.suffix == ".txt":
        changed.write_text(changed.read_text().replace("40.0 40.0", "41.0 40.0"))
    elif "depth" in linked:
        write_depth(changed.parent, [changed.name], 3.0)
    else:
        paint(changed, 99)
    assert folder_scenes(room).sha256 != first


def test_only_what_is_read_counts(tmp_path: Path) -> None:
    """Neither the name of a scene nor files that no reader opens; calibration reads no depth."""
    room = write_room(tmp_path / "room")
    first, pictures = folder_scenes(room).sha256, folder_scenes(room, truth=False).sha256
    (room / "notes.txt").write_text("x")
    (room / "images" / "preview.gif").write_bytes(b"x")
    (room / "sparse" / "0" / "points3D.txt").write_text("changed")
    renamed = shutil.move(room, tmp_path / "kitchen")
    assert folder_scenes(renamed).sha256 == first and [f.name for f in folder_scenes(renamed).folders] == ["kitchen"]
    write_depth(renamed / "ground_truth_depth", ["1.png"], 3.0)
    assert folder_scenes(renamed).sha256 != first and folder_scenes(renamed, truth=False).sha256 == pictures
    for name in ("images/1.png", "sparse/0/cameras.txt"):
        whole = (renamed / name).read_bytes()
        (renamed / name).write_bytes(whole + b"\n")
        assert folder_scenes(renamed, truth=False).sha256 != pictures
        (renamed / name).write_bytes(whole)


def test_a_linked_folder_keeps_the_name_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path / "run42")
    (tmp_path / "latest").symlink_to("run42")
    monkeypatch.chdir(tmp_path / "run42")
    assert [open_scene(path).name for path in (tmp_path / "latest", ".", "../latest")] == ["latest", "run42", "latest"]


@pytest.mark.parametrize("dead", ["images/0.png", "sparse", "ground_truth_depth", "images"])
def test_links_that_lead_nowhere(tmp_path: Path, dead: str) -> None:
    room = photos(tmp_path / "room", count=3)  # without the refusal these would be evaluated instead
    write_room(room)
    shutil.move(room / dead, tmp_path / "moved")
    (room / dead).symlink_to(tmp_path / "gone")
    with pytest.raises(PqkError, match=f"{dead}: this link leads nowhere|the model are missing"):
        open_scene(room)


# ---------------------------------------------------------------- what may not be read


@contextlib.contextmanager
def another_user() -> Iterator[Path]:
    """A folder that everyone may enter, seen by someone who is not root."""
    "".encode("utf-8-sig")  # loaded now: the interpreter's own files may be root's
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        for path in folder.rglob("*"):
            path.chmod(0o755)
        shutil.rmtree(folder)


def leave_root() -> None:
    if os.getuid() == 0:
        os.seteuid(65534)


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_unreadable_things_beside_scenes(caplog: pytest.LogCaptureFixture, mode: int) -> None:
    """lost+found lies on every disk; a stray file of someone else beside pictures is none of our business."""
    with another_user() as disk:
        write_room(disk / "room")
        photos(disk / "lost+found" / "inner")
        photos(disk / "album")
        (disk / "album" / "notes.txt").write_text("x")
        (disk / "album" / "notes.txt").chmod(0)
        (disk / "lost+found").chmod(mode)
        leave_root()
        assert [f.name for f in folder_scenes(disk).folders] == ["room"]
        assert "lost+found" in caplog.text and "permission denied; skipped" in caplog.text
        assert [f.name for f in folder_scenes(disk / "album").folders] == ["album"]


@pytest.mark.parametrize(
    "part", ["images/1.png", "images", "sparse/0", "sparse/0/images.txt", "ground_truth_depth/1.png", "."]
)
def test_an_unreadable_part_of_a_scene_is_one_sentence(part: str) -> None:
    with another_user() as folder:
        room = write_room(folder / "room")
        write_room(folder / "other")
        (room / part).chmod(0)
        leave_root()
        with pytest.raises(PqkError, match=r"(?i)^(cannot read )?\S*room\S*.*permission denied\)?$"):
            folder_scenes(room)
        if part != ".":  # not skipped beside others: its files are the scene's
            with pytest.raises(PqkError, match=r"(?i)permission denied"):
                folder_scenes(folder)


# ---------------------------------------------------------------- models and depth in other places


def test_the_largest_of_several_models(tmp_path: Path) -> None:
    names = [f"{k}.png" for k in range(8)]
    room = write_room(tmp_path, names, "sparse/1")
    write_model(room / "sparse" / "0", names[:2])
    scene = open_scene(room)
    assert len(scene.views) == 8 and scene.has_ground_truth
    (note,) = scene.notes
    assert "sparse/0 with 2 images, sparse/1 with 8 images the model sparse/1 is used, with 8 of the 8" in note
    shutil.rmtree(room / "sparse" / "1")
    scene = open_scene(room)
    assert len(scene.views) == 2 and "with 2 of the 8 images on disk" in scene.notes[0]
    assert "6 of 8 depth files are not used, the first is '2.png'" in scene.notes[1]


@pytest.mark.parametrize("place", ["sparse/1", "colmap/sparse/0", "dense/sparse", "distorted/sparse/0", "sparse/10"])
def test_models_in_other_places(tmp_path: Path, place: str) -> None:
    scene = open_scene(write_room(tmp_path, model=place))
    assert len(scene.views) == 3 and scene.has_ground_truth and not scene.notes


def test_the_images_of_a_dense_project_are_its_own(tmp_path: Path) -> None:
    room = write_room(tmp_path, model="dense/sparse")
    shutil.copytree(room / "images", room / "dense" / "images")
    assert open_scene(room).views[0].image_path == room / "dense" / "images" / "0.png"


def test_a_distorted_model_is_for_the_images_in_input(tmp_path: Path) -> None:
    room = write_room(tmp_path, model="distorted/sparse/0")
    shutil.copytree(room / "images", room / "input")
    assert open_scene(room).views[0].image_path == room / "input" / "0.png"


@pytest.mark.parametrize("ending", ["{}.png", "{}.raw", "{}.JPG.bin", "{}.jpg"])
def test_depth_with_another_ending(tmp_path: Path, ending: str) -> None:
    room = write_room(tmp_path, ["a/0.JPG", "a/1.JPG"], depth=False)
    write_depth(room / "ground_truth_depth", [ending.format(f"a/{k}") for k in range(2)])
    scene = open_scene(room)
    assert scene.has_ground_truth and not scene.notes
    assert [view.depth_path.name for view in scene.views if view.depth_path] == [ending.format(k) for k in range(2)]


def test_depth_that_could_belong_to_two(tmp_path: Path) -> None:
    room = write_room(tmp_path, ["0.png", "1.png"])
    write_depth(room / "ground_truth_depth", ["0.raw", "0.bin"])
    assert open_scene(room).has_ground_truth  # the full name wins
    (room / "ground_truth_depth" / "0.png").unlink()
    with pytest.raises(PqkError, match=r"0\.bin and 0\.raw could both be the depth of '0\.png'"):
        open_scene(room)
    room = write_room(tmp_path / "b", ["0.png", "0.jpg"], depth=False)
    write_depth(room / "ground_truth_depth", ["0.raw"])
    with pytest.raises(PqkError, match=r"0\.raw: this could be the depth of '0\.png' and of '0\.jpg'"):
        open_scene(room)


def test_truth_that_is_not_used_is_named(tmp_path: Path) -> None:
    room = write_room(tmp_path / "names", depth=False)
    write_depth(room / "ground_truth_depth", [f"depth_{name}" for name in NAMES])
    (note,) = open_scene(room).notes
    assert "3 of 3 depth files are not used, the first is 'depth_0.png': no image of sparse/0 has such a name" in note
    room = write_room(tmp_path / "place", model="reconstruction/0")
    model, depth = open_scene(room).notes
    assert (
        "a COLMAP model is not used: reconstruction/0; the model of a scene is looked for in sparse, colmap/sparse,"
        in model
    )
    assert "no camera model was found" in depth
    room = write_room(tmp_path / "folder", depth=False)
    write_depth(room / "depth_maps", NAMES)
    assert "depth_maps: this depth is not read; it is looked for in" in open_scene(room).notes[0]


# ---------------------------------------------------------------- pictures beside scenes, and names


def test_scenes_win_over_pictures_beside_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    photos(tmp_path)
    photos(tmp_path / "previews", 7)
    for name in ("room10", "room2"):
        write_room(tmp_path / name)
    assert [f.name for f in folder_scenes(tmp_path).folders] == ["room2", "room10"]
    assert f"2 pictures directly in {tmp_path} (0.png, ...), {tmp_path / 'previews'}" in caplog.text
    assert [f.name for f in folder_scenes(tmp_path, pictures=True).folders] == [tmp_path.name]
    for name in ("room10", "room2"):
        shutil.rmtree(tmp_path / name)
    assert [len(scene.views) for scene in open_scenes(tmp_path)] == [2]  # no scene wins: the pictures are the scene
    write_model(tmp_path / "model", ["x.png"])  # nor is a model without its pictures one
    assert [f.name for f in folder_scenes(tmp_path).folders] == [tmp_path.name]


def test_pictures_in_natural_order(tmp_path: Path) -> None:
    names = [f"frame_{k}.png" for k in range(8, 13)] + ["frame_012.png"]
    wanted = ["frame_8.png", "frame_9.png", "frame_10.png", "frame_11.png", "frame_012.png", "frame_12.png"]
    room = write_room(tmp_path / "room", names)
    assert [view.name for view in open_scene(room).views] == wanted
    shutil.rmtree(room / "sparse")
    assert [view.name for view in open_scene(room).views] == wanted


@pytest.mark.parametrize("name", ["12:30:00.png", "sub\\a.png", "a b.png", "x..y.png"])
def test_names_that_stay_inside(tmp_path: Path, name: str) -> None:
    scene = open_scene(write_room(tmp_path, [name, "b.png"]))
    assert name in [view.name for view in scene.views] and scene.has_ground_truth


@pytest.mark.parametrize(
    ("listed", "there"),
    [
        ("e\u0301.png", "\u00e9.png"),
        ("\u00e9.png", "e\u0301.png"),
        ("e\u0301/x.png", "\u00e9/x.png"),
        ("sub\\a.png", "sub/a.png"),
        ("A.PNG", "a.png"),
    ],
)
def test_look_alike_names_are_named(tmp_path: Path, listed: str, there: str) -> None:
    room = write_room(tmp_path, ["0.png", there], depth=False)
    write_model(room / "sparse" / "0", ["0.png", listed])
    with pytest.raises(PqkError) as caught:
        open_scene(room)
    assert f"({there!a} is there, but {listed!a} is another name" in str(caught.value)
    with pytest.raises(PqkError, match="is there, but 'ROOM' is another name"):
        open_scene(shutil.copytree(room, tmp_path / "room").parent / "ROOM")


def rig(root: Path, depth: str = "") -> Path:
    names = [f"rig_cam{c}_undistorted/{k}.png" for c in (4, 5) for k in range(2)]
    for seed, name in enumerate(names):
        paint(root / "images" / name, seed)
    write_model(root / "rig_calibration_undistorted", names)
    if depth:
        write_depth(root / "ground_truth_depth", [depth.format(name) for name in names])
    return root


def test_the_rig_of_eth3d(tmp_path: Path) -> None:
    scene = open_scene(rig(tmp_path / "a", "{}"))
    assert scene.has_ground_truth and not scene.notes
    assert [view.name for view in scene.views] == [f"rig_cam{c}_undistorted/{k}.png" for c in (4, 5) for k in range(2)]
    scene = open_scene(rig(tmp_path / "b", "other/{}"))
    assert "add the images of rig_calibration, and it, to use it" in scene.notes[0] and not scene.has_ground_truth
    both = rig(tmp_path / "c")
    write_model(both / "dslr_calibration_undistorted", ["rig_cam4_undistorted/0.png", "rig_cam4_undistorted/1.png"])
    scene = open_scene(both)
    assert len(scene.views) == 2 and "those of rig_calibration_undistorted are not" in scene.notes[0]
