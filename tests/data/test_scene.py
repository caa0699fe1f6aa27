"""Scenes written to disk in each layout and read back."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image

from pqk.data.scenes.camera import Camera
from pqk.data.scenes.colmap import ModelImage, write_text_model
from pqk.data.scenes.open import open_scene, open_scenes
from pqk.data.scenes.preprocess import fit_to_shape
from pqk.data.scenes.scene import View
from pqk.errors import PqkError
from pqk.families.scenes.frames import CalibrationImages

WIDTH, HEIGHT = 48, 32
PINHOLE = Camera(1, "PINHOLE", WIDTH, HEIGHT, (40.0, 41.0, 23.0, 17.0))
FISHEYE = Camera(
    1, "THIN_PRISM_FISHEYE", WIDTH, HEIGHT, (40.0, 41.0, 23.0, 17.0, 0.2, 0.1, 1e-3, 2e-3, -0.1, 0.05, 1e-3, 2e-3)
)


def picture(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pose(x: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[0, 3] = x
    return matrix


def write_eth3d(root, folder="dslr_images_undistorted", camera=PINHOLE, names=("000.png", "001.png"), depth=True):
    """The official layout, for one of the two image folders."""
    calibration = "dslr_calibration_undistorted" if camera.is_pinhole else "dslr_calibration_jpg"
    images = [ModelImage.from_pose(i + 1, pose(i), 1, f"{folder}/{name}") for i, name in enumerate(names)]
    write_text_model(root / calibration, [camera], images)
    (root / "images" / folder).mkdir(parents=True)
    for i, name in enumerate(names):
        Image.fromarray(picture(i)).save(root / "images" / folder / name)
    if depth:
        write_depth(root, folder, names)
    return root


def write_depth(root, folder, names):
    (root / "ground_truth_depth" / folder).mkdir(parents=True)
    for i, name in enumerate(names):
        values = np.full((HEIGHT, WIDTH), 2.0 + i, dtype="<f4")
        values[16, 20:23] = (np.inf, 0, -1)
        values.tofile(root / "ground_truth_depth" / folder / name)


def test_generated_layout(tmp_path):
    scene = open_scene(write_eth3d(tmp_path / "room"))
    assert scene.name == "room" and scene.has_ground_truth and scene.notes == ()
    assert [view.name for view in scene.views] == ["000.png", "001.png"]
    view = scene.views[1]
    assert view.distortion is None and view.load_mask() is None
    np.testing.assert_array_equal(view.load_image(), picture(1))
    np.testing.assert_array_equal(view.K, PINHOLE.K)
    np.testing.assert_array_equal(view.world_to_cam, pose(1))
    depth = view.load_depth()
    assert depth.dtype == np.float32 and depth.shape == (HEIGHT, WIDTH)
    np.testing.assert_array_equal(depth[16, 20:24], [0, 0, 0, 3])
    frame = fit_to_shape(view, 32, 32, scene.name)
    np.testing.assert_array_equal(frame.depth, depth[:, 8:40])


def test_official_depth_uses_the_distorted_images(tmp_path):
    root = write_eth3d(tmp_path / "s", depth=False)
    write_eth3d(root, "dslr_images", FISHEYE)
    (root / "masks_for_images/dslr_images").mkdir(parents=True)
    ignored = np.zeros((HEIGHT, WIDTH), np.uint8)
    ignored[:, :24] = 2
    Image.fromarray(ignored).save(root / "masks_for_images/dslr_images/000.png")
    scene = open_scene(root)
    assert scene.has_ground_truth and scene.notes == ()
    view = scene.views[0]
    assert view.image_path.parent.name == "dslr_images" and view.distortion == FISHEYE
    assert view.load_image().shape == (HEIGHT, WIDTH, 3)
    depth, mask = view.load_depth(), view.load_mask()
    assert set(np.unique(depth)) == {0.0, 2.0}  # z is kept by undistortion
    assert not mask[:, :20].any() and mask[8:24, 26:40].all()
    assert (fit_to_shape(view, 32, 32).depth[:, :12] == 0).all()


def test_undistorted_images_with_foreign_depth_go_without(tmp_path):
    root = write_eth3d(tmp_path / "s", depth=False)
    write_depth(root, "dslr_images", ["000.png", "001.png"])
    scene = open_scene(root)
    assert not scene.has_ground_truth
    assert len(scene.notes) == 1 and "does not belong to the images of dslr_calibration_undistorted" in scene.notes[0]
    assert scene.views[0].load_depth() is None and scene.views[0].K is not None


def test_views_without_depth_are_named(tmp_path):
    root = write_eth3d(tmp_path / "s")
    (root / "ground_truth_depth/dslr_images_undistorted/001.png").unlink()
    scene = open_scene(root)
    assert not scene.has_ground_truth and "1 of 2 images lack depth (001.png" in scene.notes[0]


def test_missing_images(tmp_path):
    root = write_eth3d(tmp_path / "s")
    (root / "images/dslr_images_undistorted/001.png").unlink()
    with pytest.raises(PqkError, match=r"1 of the 2 images of the model are missing, the first is '.*001\.png'"):
        open_scene(root)
    (root / "images/dslr_images_undistorted/000.png").unlink()
    with pytest.raises(PqkError, match="none of the 2 images"):
        open_scene(root)


@pytest.mark.parametrize("model_folder", ["sparse/0", "sparse", "."])
def test_colmap_project(tmp_path, model_folder):
    images = [ModelImage.from_pose(1, pose(3), 1, "a/x.png"), ModelImage.from_pose(2, pose(4), 1, "b.png")]
    write_text_model(tmp_path / model_folder, [PINHOLE], images)
    (tmp_path / "images/a").mkdir(parents=True)
    for name in ("a/x.png", "b.png", "not_registered.png"):
        Image.fromarray(picture()).save(tmp_path / "images" / name)
    scene = open_scene(tmp_path)
    assert [view.name for view in scene.views] == ["a/x.png", "b.png"] and not scene.has_ground_truth
    np.testing.assert_array_equal(scene.views[1].world_to_cam, pose(4))


def test_camera_model_that_cannot_be_undistorted(tmp_path):
    camera = Camera(1, "EQUIRECTANGULAR", WIDTH, HEIGHT, (WIDTH, HEIGHT))
    root = write_eth3d(tmp_path / "s", camera=camera)
    with pytest.raises(PqkError, match="camera model EQUIRECTANGULAR shows a whole sphere"):
        open_scene(root)


def test_plain_images(tmp_path):
    for name in ("b.PNG", "a.jpg", ".hidden.png", "notes.txt"):
        if name.endswith("txt"):
            (tmp_path / name).write_text("x")
        else:
            Image.fromarray(picture()).save(tmp_path / name)
    scene = open_scene(tmp_path)
    assert [view.name for view in scene.views] == ["a.jpg", "b.PNG"] and not scene.has_ground_truth
    assert scene.views[0].K is None and scene.views[0].load_depth() is None and scene.views[0].load_mask() is None
    (tmp_path / "sub/images").mkdir(parents=True)
    Image.fromarray(picture()).save(tmp_path / "sub/images/c.png")
    assert [view.name for view in open_scene(tmp_path / "sub").views] == ["c.png"]


def test_open_scenes(tmp_path, caplog):
    write_eth3d(tmp_path / "b_room")
    write_eth3d(tmp_path / "a_room")
    (tmp_path / "empty").mkdir()
    assert [scene.name for scene in open_scenes(tmp_path)] == ["a_room", "b_room"]
    assert "empty holds no scene, skipped" in caplog.text
    assert [scene.name for scene in open_scenes(tmp_path / "a_room")] == ["a_room"]
    with pytest.raises(PqkError, match="and none in its subfolders"):
        open_scenes(tmp_path / "empty")


def test_no_scene(tmp_path):
    with pytest.raises(PqkError, match="gone does not exist"):
        open_scene(tmp_path / "gone")
    with pytest.raises(PqkError, match="no scene here; expected images"):
        open_scene(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(PqkError, match="is a file; give the folder"):
        open_scene(tmp_path / "file")


def test_names_cannot_leave_the_scene(tmp_path):
    root = write_eth3d(tmp_path / "s")
    Image.fromarray(picture()).save(tmp_path / "secret.png")
    text = (root / "dslr_calibration_undistorted/images.txt").read_text()
    (root / "dslr_calibration_undistorted/images.txt").write_text(
        text.replace("dslr_images_undistorted/001.png", "../../secret.png")
    )
    with pytest.raises(PqkError, match=r"images.txt line 5: image name '../../secret.png' must be a relative path"):
        open_scene(root)


def test_damaged_images(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(picture(0, 200, 200)).save(path, quality=95)
    view, whole = View("a.jpg", path), path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PqkError, match=r"a\.jpg: the image is damaged"):
        view.load_image()
    path.write_bytes(b"hello")
    with pytest.raises(PqkError, match=r"a\.jpg: not an image"):
        view.load_image()
    path.write_bytes(b"")
    with pytest.raises(PqkError, match=r"a\.jpg: not an image"):
        view.load_image()
    path.unlink()
    with pytest.raises(PqkError, match=r"a\.jpg: the image does not exist"):
        view.load_image()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(PqkError, match="not 8-bit"):
        View("deep.png", tmp_path / "deep.png").load_image()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA"])
def test_every_8_bit_mode_becomes_rgb(tmp_path, mode):
    Image.fromarray(picture()).convert(mode).save(tmp_path / "a.png")
    image = View("a.png", tmp_path / "a.png").load_image()
    assert image.shape == (HEIGHT, WIDTH, 3) and image.dtype == np.uint8 and image.std() > 10


def test_exif_orientation(tmp_path):
    """Orientation 6 asks for a quarter turn; a calibration is for the pixels as they are stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = np.zeros((32, 48, 3), np.uint8)
    image[:, :8] = 255  # white left edge; upright it is the top edge
    Image.fromarray(image).save(tmp_path / "a.jpg", exif=exif, quality=100)
    upright = View("a.jpg", tmp_path / "a.jpg").load_image()
    assert upright.shape == (48, 32, 3) and upright[:7].min() > 200 and upright[9:].max() < 50
    K = np.eye(3)
    assert View("a.jpg", tmp_path / "a.jpg", K=K, size=(32, 48)).load_image().shape == (32, 48, 3)
    assert View("a.jpg", tmp_path / "a.jpg", K=K, size=(48, 32)).load_image().shape == (48, 32, 3)
    with pytest.raises(PqkError, match="the image has 48x32 pixels, its camera is for 40x40"):
        View("a.jpg", tmp_path / "a.jpg", K=K, size=(40, 40)).load_image()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_calibration_is_for_the_stored_pixels_of_a_tiff_too(tmp_path, orientation):
    """Of scored images and of calibration images; COLMAP does not turn them, Pillow turns a TIFF while it loads."""
    root = write_eth3d(tmp_path / "s", names=("a.tif", "b.tif"))
    for path in (root / "images/dslr_images_undistorted").iterdir():
        Image.fromarray(picture()).save(path, tiffinfo={274: orientation})
    view = open_scene(root).views[0]
    np.testing.assert_array_equal(view.load_image(), picture())
    for found in CalibrationImages([root], 2, 32, 48):
        np.testing.assert_array_equal(found.image, fit_to_shape(view, 32, 48).image)
    upright = View("a.tif", view.image_path).load_image()
    assert upright.shape[:2] == ((HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT))
    assert np.array_equal(upright, picture()) == (orientation == 1)


def test_calibration_images_are_undistorted_as_the_scored_ones_are(tmp_path):
    root = write_eth3d(tmp_path / "s", "dslr_images", FISHEYE)
    frames = [fit_to_shape(view, 32, 48).image for view in open_scene(root).views]
    for found, frame in zip(CalibrationImages([root], 2, 32, 48), frames, strict=True):
        np.testing.assert_array_equal(found.image, frame)


def test_a_mask_is_judged_by_its_values(tmp_path):
    """A palette by index, whatever its colours; RGB by any channel; grey and black-and-white as they are."""
    Image.fromarray(picture()).save(tmp_path / "a.png")
    ignored = np.zeros((HEIGHT, WIDTH), np.uint8)
    ignored[:, 24:] = 1
    blue = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    blue[..., 2] = ignored
    masks = {"grey.png": Image.fromarray(ignored), "blue.png": Image.fromarray(blue)}
    masks["bits.png"] = Image.fromarray(ignored * 255).convert("1")
    for name, palette in (("dark.png", (0, 0, 2, 0, 0, 0)), ("white0.png", (255, 255, 255, 0, 0, 0))):
        masks[name] = Image.fromarray(ignored)
        masks[name].putpalette(palette)
    for name, mask in masks.items():
        mask.save(tmp_path / name)
        for marks_ignored in (True, False):
            view = View("a.png", tmp_path / "a.png", mask_path=tmp_path / name, mask_marks_ignored=marks_ignored)
            np.testing.assert_array_equal(view.load_mask(), (ignored == 0) == marks_ignored, err_msg=name)
    for mode in ("RGBA", "LA", "CMYK"):
        path = tmp_path / ("other.tif" if mode == "CMYK" else "other.png")
        Image.fromarray(ignored).convert("RGB").convert(mode).save(path)
        with pytest.raises(
            PqkError, match=rf"a mask is one value a pixel \(grey, palette or RGB\).* mode {mode} are not"
        ):
            View("a.png", tmp_path / "a.png", mask_path=path).load_mask()


def test_pictures_of_other_formats_are_counted_and_named(tmp_path, caplog):
    for name in ("IMG_2.HEIC", "IMG_1.HEIC", "x.cr2", ".hidden.heic"):
        (tmp_path / name).write_bytes(b"x")
    sentence = r"\(1 CR2 and 2 HEIC not read \(IMG_1\.HEIC, \.\.\.\), convert to JPEG or PNG\)"
    for function in (open_scene, open_scenes):
        with pytest.raises(PqkError, match=sentence):
            function(tmp_path)
    for name in ("0.jpg", "1.jpg"):
        Image.fromarray(picture()).save(tmp_path / name)
    scene = open_scene(tmp_path)
    assert [view.name for view in scene.views] == ["0.jpg", "1.jpg"]
    assert len(scene.notes) == 1 and "1 CR2 and 2 HEIC not read (IMG_1.HEIC, ...)" in scene.notes[0]
    assert scene.notes[0].endswith("only the 2 others are used") and scene.notes[0] in caplog.text
    assert not open_scene(write_eth3d(tmp_path / "s")).notes


@pytest.mark.parametrize("model", ["OPENCV", "RADIAL"])
def test_a_camera_that_leaves_nothing_of_the_picture(tmp_path, model):
    """Its distortion sends nearly every ray outside of the image; without a word a black picture was fed."""
    lens = {"OPENCV": (40, 41, 23, 17, 1e6, -1e9, 0, 0), "RADIAL": (40, 23, 17, 30, 0)}[model]
    root = write_eth3d(tmp_path / "s", "dslr_images", Camera(1, model, WIDTH, HEIGHT, lens))
    with pytest.raises(PqkError, match=rf"000\.png: .* leaves \S+ % of the picture, .* camera 1 \({model} 40 "):
        open_scene(root).views[0].load_image()


def test_bad_depth(tmp_path):
    view = open_scene(write_eth3d(tmp_path / "s")).views[0]
    good = view.depth_path.read_bytes()
    for bad in (good[:-4], good + b"\0\0\0\0", b""):
        view.depth_path.write_bytes(bad)
        with pytest.raises(PqkError, match=rf"has {len(bad)} bytes, expected {4 * WIDTH * HEIGHT} \(48x32 float32"):
            view.load_depth()
    view.depth_path.write_bytes(struct.pack("<ff", float("nan"), float("nan")) + good[8:])
    with pytest.raises(PqkError, match=r"000\.png: 2 of 1536 depth values are NaN"):
        view.load_depth()
    view.depth_path.unlink()
    with pytest.raises(PqkError, match="cannot read the depth file"):
        view.load_depth()


def test_depth_size_comes_from_the_image_when_no_camera_says_it(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    np.ones((HEIGHT, WIDTH), "<f4").tofile(tmp_path / "d")
    assert View("a.png", tmp_path / "a.png", depth_path=tmp_path / "d").load_depth().shape == (HEIGHT, WIDTH)


def test_mask_of_the_wrong_size(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((10, 20), np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(PqkError, match=r"the mask has 20x10 pixels, the image a\.png has 48x32"):
        View("a.png", tmp_path / "a.png", mask_path=tmp_path / "m.png").load_mask()


def test_names_that_are_not_utf8(tmp_path):
    """Refused where a picture or a scene has such a name; other files are not looked at."""
    import os

    from pqk.families.scenes.sets import folder_scenes

    folder = tmp_path / "room"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    before = folder_scenes(folder).sha256
    (folder / os.fsdecode(b"note\xff.txt")).write_text("x")
    assert folder_scenes(folder).sha256 == before
    strange = folder / os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "b.png")
    (tmp_path / "b.png").rename(strange)
    with pytest.raises(PqkError, match=r"room: the name 'caf\\udce9\.png' is not UTF-8; rename it") as caught:
        open_scene(folder)
    str(caught.value).encode()
    strange.unlink()
    folder.rename(tmp_path / os.fsdecode(b"r\xe9"))
    with pytest.raises(PqkError, match=r"the name 'r\\udce9' is not UTF-8"):
        open_scenes(tmp_path)
