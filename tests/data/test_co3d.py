"""CO3Dv2: the tiny official tree of tests/golden/proto_co3d, opened as scenes, spoilt in many ways, and drawn from."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pqk.data.scenes import co3d
from pqk.data.scenes.co3d_annotations import EXPORTED, open_category, opencv_camera
from pqk.data.scenes.open import open_scene, open_scenes
from pqk.data.scenes.ply import read_points
from pqk.data.scenes.preprocess import fit_to_shape
from pqk.errors import PqkError

TREE = Path(__file__).parents[1] / "golden" / "proto_co3d" / "co3d"
APPLE, BENCH = "540_79043_153212", "415_57112_110099"
FIRST = 32  # frame_number of images/frame000029.jpg
Edit = Callable[[Any], Any]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of the data set, to spoil."""
    return Path(shutil.copytree(TREE, tmp_path / "co3d"))


def load(path: Path) -> Any:
    return json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".jgz" else path.read_bytes())


def edit(path: Path, change: Edit) -> None:
    """Change what an annotation file holds; `change` works in place or returns the new value."""
    value = load(path)
    changed = change(value)
    data = json.dumps(value if changed is None else changed).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".jgz" else data)


def edit_frame(root: Path, change: Edit, number: int = FIRST) -> None:
    def change_it(frames: list[dict[str, Any]]) -> None:
        change(next(f for f in frames if (f["sequence_name"], f["frame_number"]) == (APPLE, number)))

    edit(root / "apple" / "frame_annotations.jgz", change_it)


def edit_lists(root: Path, change: Edit) -> None:
    edit(root / "apple" / "set_lists" / "set_lists_fewview_dev.json", change)


# ---------------------------------------------------------------- scenes


def test_the_data_set_a_category_and_a_sequence(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    scenes = open_scenes(root)
    assert [scene.name for scene in scenes] == [f"apple/{APPLE}", f"bench/{BENCH}"]
    assert all(scene.has_ground_truth and scene.is_calibrated for scene in scenes)
    assert "5 of 6 sequences have no image here" in caplog.text
    assert "3 of 60 frames have an image here, the others are left out" in caplog.text
    (apple,) = open_scenes(root / "apple")
    one = open_scene(root / "apple" / APPLE)  # families open each scene again by its folder
    assert apple.name == one.name and apple.root == one.root == root / "apple" / APPLE
    assert apple.content() == one.content() == scenes[0].content()
    assert [view.name for view in one.views] == [f"frame{k:06}.jpg" for k in (29, 31, 58)]
    view = one.views[1]
    image, depth, mask, foreground = view.load_image(), view.load_depth(), view.load_mask(), view.load_foreground()
    assert image.shape == (60, 44, 3) and image.dtype == np.uint8
    assert depth is not None and depth.shape == (60, 44) and depth.dtype == np.float32
    assert mask is not None and mask.dtype == bool and foreground is not None
    assert foreground.dtype == np.float32 and 0 <= foreground.min() < foreground.max() <= 1
    frame = fit_to_shape(view, 32, 32, one.name)
    assert frame.depth is not None and (frame.depth > 0).any() and frame.K is not None


def test_points_of_the_sequence_land_in_its_images() -> None:
    for scene in open_scenes(TREE):
        points = co3d.point_cloud(scene.root.parent, scene.root.name)
        assert points is not None and points.shape == (50, 3)
        for view in scene.views:
            assert view.K is not None and view.world_to_cam is not None and view.size is not None
            seen = points @ view.world_to_cam[:3, :3].T + view.world_to_cam[:3, 3]
            assert (seen[:, 2] > 0).all()
            pixels = (seen @ view.K.T)[:, :2] / seen[:, 2:]
            inside = (pixels > 0).all(axis=1) & (pixels < view.size[::-1]).all(axis=1)
            assert inside.mean() > 0.7


def test_the_order_is_that_of_the_set_list(root: Path) -> None:
    edit_lists(root, lambda lists: lists["test"].reverse())
    assert [view.name for view in open_scene(root / "apple" / APPLE).views] == [
        f"frame{k:06}.jpg" for k in (58, 31, 29)
    ]


def test_frames_of_other_lists_and_of_none(root: Path) -> None:
    """A sequence that only `train` lists is opened by its own folder; without set lists all frames count, by number."""

    def move(lists: dict[str, Any]) -> None:
        lists["train"] = [entry for entry in reversed(lists["test"]) if entry[0] == APPLE]
        lists["test"] = [entry for entry in lists["test"] if entry[0] != APPLE]

    edit_lists(root, move)
    assert open_scene(root / "apple" / APPLE).views[0].name == "frame000058.jpg"
    with pytest.raises(PqkError, match=r"apple: no image of its 5 sequences is there"):
        open_scenes(root / "apple")
    assert [scene.name for scene in open_scenes(root)] == [f"bench/{BENCH}"]
    shutil.rmtree(root / "apple" / "set_lists")
    (scene,) = open_scenes(root / "apple")
    assert [view.name for view in scene.views] == [f"frame{k:06}.jpg" for k in (29, 31, 58)]
    assert [path.name for path in scene.model_files] == ["frame_annotations.jgz"]
    with pytest.raises(PqkError, match=r"set_lists_fewview_dev\.json: no such file"):
        list(co3d.draw(root, ["apple"]))


def test_nothing_is_decoded_before_it_is_asked_for(root: Path) -> None:
    folder = root / "apple" / APPLE
    for file in (f for part in ("images", "depths", "masks", "depth_masks") for f in (folder / part).iterdir()):
        file.write_bytes(b"no picture")
    (scene,) = open_scenes(root / "apple")
    view = scene.views[0]
    for load_it, words in (
        (view.load_image, "frame000029.jpg: not an image"),
        (view.load_depth, "frame000029.jpg.geometric.png: the depth map is damaged or no PNG"),
        (view.load_mask, "frame000029.png: not an image"),
        (view.load_foreground, "frame000029.png: not an image"),
    ):
        with pytest.raises(PqkError, match=words):
            load_it()


def test_changed_annotations_are_read_again(root: Path) -> None:
    before = open_scene(root / "apple" / APPLE).content()
    edit_frame(root, lambda frame: frame["viewpoint"].update(T=[1.0, 2.0, 3.0]))
    after = open_scene(root / "apple" / APPLE)
    np.testing.assert_array_equal(after.views[0].world_to_cam[:3, 3], [-1, -2, 3])
    assert before != after.content()


def test_folders_that_are_no_sequence(root: Path) -> None:
    for folder in (root, root / "apple", root / "apple" / "set_lists"):
        with pytest.raises(PqkError, match=r"no scene here.*or the folder of one sequence in a category of CO3Dv2"):
            open_scene(folder)
    (root / "apple" / "12_101_55").mkdir()
    with pytest.raises(PqkError, match=r"apple/12_101_55: none of the 55 images of this sequence is there, such as fr"):
        open_scene(root / "apple" / "12_101_55")


def test_scenes_beside_categories(root: Path) -> None:
    (root / "album").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / "album" / "a.png")
    assert [scene.name for scene in open_scenes(root)] == [f"apple/{APPLE}", f"bench/{BENCH}"]
    names = [f"apple/{APPLE}", f"bench/{BENCH}", "album"]
    assert sorted(scene.name for scene in open_scenes(root, pictures=True)) == sorted(names)


# ---------------------------------------------------------------- depth and masks


def test_missing_depth_and_masks(root: Path) -> None:
    folder = root / "apple" / APPLE
    (folder / "depths" / "frame000029.jpg.geometric.png").unlink()
    (folder / "depth_masks" / "frame000031.png").unlink()
    edit_frame(root, lambda frame: frame.update(mask=None))
    scene = open_scene(folder)
    assert not scene.has_ground_truth and "1 of 3 images lack depth (frame000029.jpg, ...)" in scene.notes[1]
    assert scene.views[0].load_depth() is None and scene.views[0].load_foreground() is None
    assert scene.views[1].load_mask() is None and scene.views[1].load_depth() is not None
    edit_frame(root, lambda frame: frame.update(depth=None))
    assert open_scene(folder).views[0].depth_path is None
    shutil.rmtree(folder / "depths")  # poses alone: no truth, and nothing to note
    scene = open_scene(folder)
    assert not scene.has_ground_truth and len(scene.notes) == 1


def write_half(path: Path, values: list[list[float]]) -> None:
    Image.fromarray(np.array(values, np.float16).view(np.uint16)).save(path)


def test_float16_depth(root: Path) -> None:
    """Bits of float16, times scale_adjustment; what is not finite or not above 0 is no measurement."""
    folder = root / "apple" / APPLE
    path = folder / "depths" / "frame000031.jpg.geometric.png"
    edit_frame(root, lambda frame: frame["image"].update(size=[2, 3]), 34)
    write_half(path, [[1.5, -1.0, np.nan], [np.inf, 0.0, 65504.0]])
    view = open_scene(folder).views[1]
    np.testing.assert_array_equal(view.load_depth(), [[0.75, 0, 0], [0, 0, 32752]])
    write_half(path, [[1.0, 1.0]])
    with pytest.raises(PqkError, match=r"geometric\.png: the depth map has 2x1 pixels, the image .*31\.jpg has 3x2"):
        view.load_depth()
    Image.fromarray(np.ones((2, 3), np.uint8)).save(path)
    with pytest.raises(PqkError, match=r"geometric\.png: the depth map has pixels of mode L, expected grey ones of 16"):
        view.load_depth()
    whole = (TREE / "apple" / APPLE / "depths" / path.name).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PqkError, match=r"geometric\.png: the depth map is damaged"):
        view.load_depth()
    path.unlink()
    with pytest.raises(PqkError, match=r"cannot read .*geometric\.png: no such file"):
        view.load_depth()


def test_an_image_of_another_size(root: Path) -> None:
    edit_frame(root, lambda frame: frame["image"].update(size=[61, 44]))
    with pytest.raises(PqkError, match=r"frame000029\.jpg: the image has 44x60 pixels, its camera is for 44x61"):
        open_scene(root / "apple" / APPLE).views[0].load_image()


# ---------------------------------------------------------------- cameras


@pytest.mark.parametrize("kind", ["ndc_isotropic", "ndc_norm_image_bounds"])
@pytest.mark.parametrize("size", [(40, 56), (60, 44)])
def test_cameras_against_pytorch3d_s_definition(kind: str, size: tuple[int, int]) -> None:
    """Points are projected as PyTorch3D defines it: row vectors, x left, y up, NDC from the image's centre."""
    random = np.random.default_rng(0)
    height, width = size
    for _ in range(20):
        rotation = np.linalg.qr(random.normal(size=(3, 3)))[0]
        rotation *= np.sign(np.linalg.det(rotation))
        translation, focal, centre = random.normal(size=3), random.uniform(1, 3, 2), random.uniform(-0.1, 0.1, 2)
        points = random.normal(size=(8, 3))
        seen = points @ rotation + translation
        ndc = focal * seen[:, :2] / seen[:, 2:] + centre
        unit = np.array([width, height]) / 2 if kind == "ndc_norm_image_bounds" else min(width, height) / 2
        expected = np.array([width, height]) / 2 - ndc * unit
        K, world_to_cam = opencv_camera(rotation, translation, focal, centre, size, kind)
        found = points @ world_to_cam[:3, :3].T + world_to_cam[:3, 3]
        np.testing.assert_allclose(found, seen * [-1, -1, 1], atol=1e-12)
        pixels = found @ K.T
        np.testing.assert_allclose(pixels[:, :2] / pixels[:, 2:], expected, rtol=1e-9, atol=1e-9)


def test_the_format_of_intrinsics(root: Path) -> None:
    """Without the field they are per axis, which makes another focal length on the longer side."""
    folder = root / "apple" / APPLE
    isotropic = open_scene(folder).views[0].K
    edit_frame(root, lambda frame: frame["viewpoint"].pop("intrinsics_format"))
    per_axis = open_scene(folder).views[0].K
    assert isotropic is not None and per_axis is not None
    assert per_axis[1, 1] == pytest.approx(isotropic[1, 1] * 60 / 44) and per_axis[0, 0] == isotropic[0, 0]
    edit_frame(root, lambda frame: frame.update(viewpoint=None))
    scene = open_scene(folder)
    assert scene.views[0].K is None and "1 of 3 images lack a camera (frame000029.jpg" in scene.notes[1]


# ---------------------------------------------------------------- bad annotations


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: f.pop("image"), "image is missing, expected an object"),
        (lambda f: f["image"].update(size=[60, 44.5]), "image.size is [60, 44.5], expected 2 positive whole numbers"),
        (lambda f: f["image"].update(size="60x44"), "image.size is '60x44', expected 2 positive whole numbers"),
        (lambda f: f.update(viewpoint=[]), "viewpoint is [], expected an object"),
        (lambda f: f["viewpoint"].update(T=[0, 1]), "viewpoint.T is [0, 1], expected 3 finite numbers"),
        (lambda f: f["viewpoint"].update(T=[0, 1, None]), "viewpoint.T is [0, 1, None], expected 3 finite numbers"),
        (lambda f: f["viewpoint"].update(T=[0, 1, np.nan]), "viewpoint.T is [0, 1, nan], expected 3 finite numbers"),
        (lambda f: f["viewpoint"].update(R=[[1, 0], [0]]), "viewpoint.R is [[1, 0], [0]], expected 3 x 3 finite"),
        (lambda f: f["viewpoint"].update(R=np.ones((3, 3)).tolist()), "expected a rotation: orthonormal rows"),
        (lambda f: f["viewpoint"].update(R=(-np.eye(3)).tolist()), "expected a rotation: orthonormal rows"),
        (lambda f: f["viewpoint"].update(focal_length=[1, -1]), "focal_length is [1, -1], expected positive numbers"),
        (lambda f: f["viewpoint"].pop("principal_point"), "viewpoint.principal_point is missing, expected 2 finite"),
        (
            lambda f: f["viewpoint"].update(intrinsics_format="ndc_isotropc"),
            "viewpoint.intrinsics_format is 'ndc_isotropc', expected ndc_isotropic or ndc_norm_image_bounds (did you",
        ),
        (lambda f: f["depth"].update(scale_adjustment=0), "depth.scale_adjustment is 0, expected a number above 0"),
        (
            lambda f: f["depth"].update(scale_adjustment=True),
            "depth.scale_adjustment is True, expected a finite number",
        ),
        (lambda f: f["depth"].update(path=3), "depth.path is 3, expected text"),
        (
            lambda f: f["image"].update(path="bench/x.jpg"),
            f"image.path is 'bench/x.jpg', expected a path in apple/{APPLE}",
        ),
    ],
)
def test_bad_values_of_a_frame(root: Path, change: Edit, sentence: str) -> None:
    edit_frame(root, change)
    for function, folder in ((open_scene, root / "apple" / APPLE), (open_scenes, root)):
        with pytest.raises(PqkError) as caught:
            function(folder)
        said = str(caught.value)
        assert said.startswith(f"{root}/apple/frame_annotations.jgz: {APPLE} frame {FIRST}: ") and sentence in said


@pytest.mark.parametrize("escape", ["../../secret.png", "/etc/passwd", "apple/../../x", "", "C:\\x", "..\\x", "a\0b"])
@pytest.mark.parametrize("key", ["image", "depth", "mask", "depth mask"])
def test_paths_cannot_leave_the_data_set(root: Path, key: str, escape: str) -> None:
    inner, name = ("depth", "mask_path") if key == "depth mask" else (key, "path")
    edit_frame(root, lambda frame: frame[inner].update({name: escape}))
    with pytest.raises(PqkError) as caught:
        open_scene(root / "apple" / APPLE)
    expected = "a relative path that stays inside the folder of the data set" if escape else "text"
    assert f"{inner}.{name} is {escape!r}, expected {expected}" in str(caught.value)


@pytest.mark.parametrize("name", ["..", "../x", "/x", "a/b", "a\\b", ".", 7, None])
def test_names_of_sequences_are_names_of_folders(root: Path, name: Any) -> None:
    for file in ("frame_annotations.jgz", "sequence_annotations.jgz"):
        shutil.copy(TREE / "apple" / "frame_annotations.jgz", root / "apple")
        edit(root / "apple" / file, lambda items: items[3].update(sequence_name=name))
        with pytest.raises(PqkError, match=rf"{file}: entry 3: sequence_name is"):
            list(co3d.draw(root, ["apple"]))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda lists: [1], "expected one JSON object with the lists test, val, train"),
        (lambda lists: {"test": 3}, "test is 3, expected a list"),
        (lambda lists: {"test": [["x"]]}, "test[0] is ['x'], expected [sequence, frame number, image path]"),
        (lambda lists: {"test": [["x", True, "y"]]}, "test[0] is ['x', True, 'y'], expected"),
        (
            lambda lists: {"test": [[APPLE, 999, "y"]]},
            f"test has frame 999 of {APPLE}, which frame_annotations.jgz has",
        ),
        (lambda lists: {"test": [["../..", 0, "y"]]}, "test has frame 0 of ../.., which frame_annotations.jgz has not"),
    ],
)
def test_bad_set_lists(root: Path, change: Edit, sentence: str) -> None:
    edit_lists(root, change)
    with pytest.raises(PqkError) as caught:
        open_scenes(root / "apple")
    assert f"set_lists_fewview_dev.json: {sentence}" in str(caught.value)


def test_damaged_annotation_files(root: Path) -> None:
    path = root / "apple" / "frame_annotations.jgz"
    whole = path.read_bytes()
    for data, words in (
        (b"no gzip", "damaged or no gzip file"),
        (whole[: len(whole) // 2], "damaged or no gzip file"),
        (whole[:2000] + b"xxxx" + whole[2004:], "damaged or no gzip file|not valid JSON"),
        (gzip.compress(b"[{"), "not valid JSON"),
        (gzip.compress(b"\xff\xfe"), "not valid JSON"),
        (gzip.compress(b"[" * 100_000), "not valid JSON"),
        (gzip.compress(b"{}"), "expected one JSON list of objects"),
        (gzip.compress(b"[1]"), "entry 0 is 1, expected an object"),
        (
            gzip.compress(b'[{"sequence_name": "a", "frame_number": 1.5}]'),
            "entry 0: frame_number is 1.5, expected a wh",
        ),
        (gzip.compress(b'[{"sequence_name": "a", "frame_number": -1}]'), "entry 0: frame_number is -1, expected a wh"),
    ):
        path.write_bytes(data)
        for function in (open_scene, open_scenes):
            with pytest.raises(PqkError, match=rf"frame_annotations\.jgz: ({words})"):
                function(root / "apple" / APPLE)
    path.write_bytes(whole)
    edit(path, lambda frames: frames.append(frames[0]))
    with pytest.raises(PqkError, match=r"frame_annotations\.jgz: 12_101_55 frame 75: the frame appears twice"):
        open_scenes(root)


def test_dead_links(root: Path) -> None:
    shutil.rmtree(root / "apple" / APPLE / "depths")
    (root / "apple" / APPLE / "depths").symlink_to("gone")
    with pytest.raises(PqkError, match="depths: this link leads nowhere"):
        open_scenes(root)


# ---------------------------------------------------------------- the protocol


def test_the_drawn_frames(root: Path) -> None:
    """Sequences are drawn from one generator, so a skipped one changes nothing and a used one all that follow."""
    both = list(co3d.draw(root, ["apple", "bench"]))
    assert [each.sequence for each in both] == ["12_101_55", APPLE, BENCH, "415_57121_110109"]
    assert all(len(set(each.ids)) == 10 for each in both)
    alone = list(co3d.draw(root, ["bench"]))
    assert alone[0].ids != both[2].ids
    edit(root / "apple" / "sequence_annotations.jgz", lambda items: items[2].update(viewpoint_quality_score=0.5))
    assert [each.ids for each in co3d.draw(root, ["apple", "bench"])] == [each.ids for each in both]
    annotated = list(co3d.draw(root, ["apple"], 42, "annotated"))
    assert [each.sequence for each in annotated] == [APPLE, "12_101_55"]
    assert len(list(co3d.draw(root, ["apple", "bench"], count=3, sequences=1))) == 2


@pytest.mark.parametrize(
    ("quality", "verdict"), [(0.51, "used"), (0.5, "quality not above 0.5"), (None, "quality not above 0.5")]
)
def test_the_quality_must_be_known_and_above(root: Path, quality: float | None, verdict: str) -> None:
    edit(root / "apple" / "sequence_annotations.jgz", lambda items: items[0].update(viewpoint_quality_score=quality))
    assert co3d.verdict(root / "apple", APPLE) == verdict


def test_other_verdicts(root: Path) -> None:
    assert co3d.verdict(root / "apple", APPLE, least=60) == "used"
    assert co3d.verdict(root / "apple", APPLE, least=61) == "fewer than 61 test frames"
    assert co3d.verdict(root / "apple", "unknown") == "quality not above 0.5"
    edit_frame(root, lambda frame: frame["viewpoint"].update(T=[5e4, 5e4, 0]))
    assert co3d.verdict(root / "apple", APPLE) == "used"
    edit_frame(root, lambda frame: frame["viewpoint"].update(T=[5e4, 5e4, 1]))
    assert co3d.verdict(root / "apple", APPLE) == "a frame with T0+T1+T2 > 1e5"
    edit_frame(root, lambda frame: frame.update(viewpoint=None))
    with pytest.raises(PqkError, match=rf"{APPLE} frame {FIRST} has no viewpoint"):
        co3d.verdict(root / "apple", APPLE)
    for arguments, words in (({"order": "random"}, "not 'random'"), ({"count": 51}, "51 frames cannot be drawn")):
        with pytest.raises(PqkError, match=words):
            list(co3d.draw(root, ["apple"], **arguments))  # type: ignore[arg-type]


def test_the_scene_of_the_drawn_frames(root: Path) -> None:
    """All ten images must be there, and stay in the drawn order."""
    drawn = next(each for each in co3d.draw(root, ["apple"]) if each.sequence == APPLE)
    with pytest.raises(PqkError, match=rf"{drawn.frames[0].image}: the protocol evaluates this image"):
        drawn.scene()
    for frame in drawn.frames:
        shutil.copy(TREE / "apple" / APPLE / "images" / "frame000029.jpg", root / frame.image)
    scene = drawn.scene()
    assert [view.image_path for view in scene.views] == [root / frame.image for frame in drawn.frames]
    for view, frame in zip(scene.views, drawn.frames, strict=True):
        np.testing.assert_array_equal(view.world_to_cam, frame.world_to_cam)
        assert view.load_image().shape == (60, 44, 3)


def test_the_categories() -> None:
    assert len(co3d.SEEN) == 41 and len({*co3d.SEEN, *co3d.UNSEEN}) == 51
    assert list(co3d.SEEN) == sorted(co3d.SEEN)


# ---------------------------------------------------------------- point clouds


def test_point_clouds(root: Path) -> None:
    annotations = root / "apple" / "sequence_annotations.jgz"
    expected = co3d.point_cloud(root / "apple", APPLE)
    edit(annotations, lambda items: items[0]["point_cloud"].update(path=f"{EXPORTED}apple/{APPLE}/pointcloud.ply"))
    np.testing.assert_array_equal(co3d.point_cloud(root / "apple", APPLE), expected)
    edit(annotations, lambda items: items[0]["point_cloud"].update(path=f"{EXPORTED}../../pointcloud.ply"))
    with pytest.raises(
        PqkError, match=rf"sequence_annotations\.jgz: {APPLE}: point_cloud\.path is .*relative path that"
    ):
        co3d.point_cloud(root / "apple", APPLE)
    edit(annotations, lambda items: items[0].update(point_cloud=None))
    assert co3d.point_cloud(root / "apple", APPLE) is None
    edit(annotations, lambda items: items.append(items[0]))
    with pytest.raises(PqkError, match=rf"{APPLE}: the sequence appears twice"):
        co3d.point_cloud(root / "apple", APPLE)
    with pytest.raises(PqkError, match="has no such sequence"):
        co3d.point_cloud(root / "bench", APPLE)
    assert open_category(root / "bench") is open_category(root / "bench")


HEADER = "ply\nformat {} 1.0\ncomment x\nelement vertex 2\n{}element face 1\nproperty list uchar int i\nend_header\n"
XYZ = "property uchar red\nproperty float x\nproperty double y\nproperty float z\n"


def test_ply_files(tmp_path: Path) -> None:
    path = tmp_path / "a.ply"
    expected = [[1, 2, 3], [4, 5, 6]]
    rows = [(7, 1, 2, 3), (8, 4, 5, 6)]
    for name, order in (("binary_little_endian", "<"), ("binary_big_endian", ">")):
        kind = [("red", "u1"), ("x", f"{order}f4"), ("y", f"{order}f8"), ("z", f"{order}f4")]
        path.write_bytes(HEADER.format(name, XYZ).encode() + np.array(rows, kind).tobytes() + b"\x01\0\0\0\0")
        np.testing.assert_array_equal(read_points(path), expected)
    text = "\n".join(" ".join(map(str, row)) for row in rows)
    for lines in ("\n", "\r\n"):
        path.write_bytes((HEADER.format("ascii", XYZ) + text + "\n1 0\n").replace("\n", lines).encode())
        np.testing.assert_array_equal(read_points(path), expected)
    assert read_points(path).dtype == np.float32
    little = HEADER.format("binary_little_endian", XYZ)
    for data, words in (
        ("", "no PLY file"),
        ("ply\nformat ascii 1.0\n", "no PLY file"),
        (HEADER.format("binary_middle_endian", XYZ), "the header must give a format"),
        (little.replace("double y", "double v"), "with scalar x, y and z"),
        (little.replace("property uchar red", "property list uchar int x"), "with scalar x, y and z"),
        (little.replace("vertex", "edge"), "its first element, vertex"),
        (little.replace("uchar red", "float x"), "appears twice"),
        (little + "abc", "the values of the 2 vertices are damaged or not all there"),
        (HEADER.format("ascii", XYZ) + "1 2 3\n", "the values of the 2 vertices are damaged"),
        (HEADER.format("ascii", XYZ) + "1 2 3 4\n", "1 of the 2 vertices are there|damaged"),
        (HEADER.format("ascii", XYZ) + "1 2 3 x\n1 2 3 4\n", "the values of the 2 vertices are damaged"),
        (HEADER.format("ascii", XYZ), "0 of the 2 vertices are there"),
    ):
        path.write_text(data)
        with pytest.raises(PqkError, match=rf"a\.ply: .*({words})"):
            read_points(path)
    with pytest.raises(PqkError, match=r"cannot read .*gone\.ply"):
        read_points(tmp_path / "gone.ply")
