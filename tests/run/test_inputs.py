"""What a run is fed: frames loaded as they are used, crops that no name moves, and calibration from named scenes."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_toys import small_experiment

from pqk.data.scenes import preprocess
from pqk.data.scenes.kept import Kept
from pqk.data.scenes.open import open_scene
from pqk.data.scenes.scene import View
from pqk.errors import PqkError
from pqk.families.dust3r.inputs import scene_pairs
from pqk.families.dust3r.settings import PairGraph
from pqk.families.scenes.frames import CalibrationImages, Frames, load_frames
from pqk.recipe import stages
from pqk.store.store import Store

pytestmark = pytest.mark.usefixtures("forked_workers")

NEIGHBOURS = PairGraph(kind="neighbor", k=4, symmetrize=True)


def photos(folder: Path, count: int, size: tuple[int, int] = (96, 64)) -> Path:
    folder.mkdir(parents=True)
    for k in range(count):
        pixels = np.random.default_rng(k).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(folder / f"{k}.bmp")
    return folder


def test_what_was_used_last_is_kept() -> None:
    made: list[int] = []

    def make(index: int) -> bytes:
        made.append(index)
        return bytes(10)

    items = Kept(5, make, len, 30)
    assert len(list(items)) == 5 and made == [0, 1, 2, 3, 4]
    assert items[-1] == items[2] == bytes(10) and made == [0, 1, 2, 3, 4]  # kept: 3, 4, 2 in the order of their use
    assert items[0] == items[4] == bytes(10) and made[5:] == [0]
    assert items[3] and made[5:] == [0, 3]
    assert len(items[1:3]) == 2
    with pytest.raises(IndexError):
        items[5]
    large = Kept(3, make, lambda item: 10**12, 30)
    made.clear()
    assert large[0] and large[1] and large[0] and made == [0, 1]  # a pair stays, however large


@pytest.mark.parametrize("kind", ["neighbor", "topk"])
def test_a_thousand_pictures_need_no_more_memory_than_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Each picture is decoded for the check, and dropped again."""
    loads: list[str] = []
    load = View.load_image
    monkeypatch.setattr(View, "load_image", lambda view: loads.append(view.name) or load(view))  # type: ignore[func-returns-value]
    monkeypatch.setattr("pqk.families.scenes.frames._FRAMES", 4 * 64 * 64 * 12)
    folder = photos(tmp_path / "few", 2)
    for k in range(2, 200):
        (folder / f"{k}.bmp").symlink_to("0.bmp")
    scene = open_scene(folder)
    frames = load_frames(scene, 64, 64)
    assert isinstance(frames, Frames) and loads == []
    tracemalloc.start()
    pairs = scene_pairs(frames, NEIGHBOURS.model_copy(update={"kind": kind}), 0.3, False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert loads == [view.name for view in scene.views] and len(pairs) >= 199 and len(frames) == 200
    assert peak < 200 * 64 * 64 * 12 / 2
    (folder / "150.bmp").unlink()
    (folder / "150.bmp").write_bytes(b"BM")
    with pytest.raises(PqkError, match=r"150\.bmp"):
        scene_pairs(load_frames(open_scene(folder), 64, 64), NEIGHBOURS, 0.3, False)


def test_no_name_and_no_order_moves_a_crop(tmp_path: Path) -> None:
    """With an eval seed the crop is drawn from the picture's bytes; without, it is the centre."""
    folder = photos(tmp_path / "holiday", 4)
    first = [frame.image for frame in load_frames(open_scene(folder), 64, 64, seed=3)]
    renamed = open_scene(folder.rename(tmp_path / "trip"))
    again = load_frames(renamed, 64, 64, seed=3)
    for k in (2, 0, 3, 1):
        np.testing.assert_array_equal(again[k].image, first[k])
    centre = [frame.image for frame in load_frames(renamed, 64, 64)]
    other = [frame.image for frame in load_frames(renamed, 64, 64, seed=4)]
    assert any((a != b).any() for a, b in zip(first, other, strict=True))
    assert any((a != b).any() for a, b in zip(first, centre, strict=True))
    np.testing.assert_array_equal(centre[1], preprocess.fit_to_shape(renamed.views[1], 64, 64).image)


def test_calibration_takes_the_named_scenes(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        photos(tmp_path / "data" / name, 3)
    given = {"source": "data", "names": ["c", "a"], "images": 4}
    settings = {f"workload.calibration.{name}": value for name, value in given.items()}
    settings["quant.ptq.calibration_images"] = 4
    experiment = small_experiment(settings)
    ctx = stages.Context(Store(tmp_path / "store"), lambda *event: None, {})
    made = stages.open_split(ctx, experiment, "calibration", tmp_path)
    assert made.groups == ("c", "a")
    images = CalibrationImages([Path(folder) for folder in made.where["folders"]], 4, 64, 64)
    assert [f"{view.image_path.parent.name}/{view.name}" for view in images.views] == [
        "c/0.bmp", "c/1.bmp", "a/0.bmp", "a/1.bmp",
    ]  # fmt: skip
    shutil.copy(tmp_path / "data" / "b" / "1.bmp", tmp_path / "data" / "a" / "0.bmp")
    assert stages.open_split(ctx, experiment, "calibration", tmp_path).sha256 != made.sha256
    gone = small_experiment({**settings, "workload.calibration.names": ["d"]})
    with pytest.raises(
        PqkError, match=r"calibration set .workload.calibration.source. is empty or unreadable: .*data/d"
    ):
        stages.open_split(ctx, gone, "calibration", tmp_path)
