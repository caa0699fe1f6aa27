"""Figures of boxes, and the numbers beside them, on boxes that are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image

from pqk.errors import PqkError
from pqk.families.viewing import BoxedPicture, Boxes
from pqk.report.show.boxes import Panel, _figure, draw_boxes
from pqk.report.style import PALETTE
from pqk.show.show import Side, draw


def picture(name: str, rows: list[tuple[int, float, list[float]]], size: tuple[int, int] = (60, 80)) -> BoxedPicture:
    """A grey picture with boxes: class, score, x1 y1 x2 y2."""
    boxes = np.array([box for _, _, box in rows], np.float32).reshape(-1, 4)
    labels, scores = np.array([row[0] for row in rows], np.int64), np.array([row[1] for row in rows], np.float32)
    return BoxedPicture(name, np.full((30, 40, 3), 200, np.uint8), size, boxes, scores, labels)


FIRST = Boxes(
    (
        picture("a.png", [(0, 0.9, [10, 10, 30, 40]), (1, 0.5, [40, 10, 70, 50]), (0, 0.25, [0, 0, 9, 9])]),
        picture("b.png", []),
        picture("c.png", [(2, 0.75, [5, 5, 25, 25])]),
    )
)
SECOND = Boxes(
    (
        picture("a.png", [(0, 0.9, [10, 10, 30, 30]), (2, 0.5, [40, 10, 70, 50])]),
        picture("b.png", [(0, 0.3125, [1, 2, 3, 4])]),
        picture("c.png", [(2, 0.75, [5, 5, 25, 25])]),
    )
)


def test_one_model(tmp_path: Path) -> None:
    drawn = draw("a scene", [Side("float", FIRST)], tmp_path / "out")
    assert [path.name for path in drawn.files] == ["boxes.png", "show.json"] and drawn.comparison is None
    about = json.loads((tmp_path / "out" / "show.json").read_text())
    assert about == {
        "scene": "a scene",
        "pictures": ["a.png", "b.png", "c.png"],
        "sizes": [[80, 60]] * 3,
        "models": ["float"],
        "least_score": 0.3,
        "found": [
            [
                [
                    {"class": 0, "score": pytest.approx(0.9), "box": [10, 10, 30, 40]},
                    {"class": 1, "score": 0.5, "box": [40, 10, 70, 50]},
                ],
                [],
                [{"class": 2, "score": 0.75, "box": [5, 5, 25, 25]}],
            ]
        ],
        "comparison": None,
    }
    with Image.open(tmp_path / "out" / "boxes.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or ()}
    used = [tuple(round(255 * part) for part in to_rgb(colour)) for colour in PALETTE]
    assert set(used[:3]) <= colours and used[3] not in colours


def test_two_models(tmp_path: Path) -> None:
    """Of three boxes each two are shared: in one picture 2/3 of the box, in another all; one has another class."""
    drawn = draw("a scene", [Side("float", FIRST), Side("int4", SECOND)], tmp_path)
    about = json.loads((tmp_path / "show.json").read_text())
    assert about["models"] == ["float", "int4"] and len(about["found"]) == 2
    assert about["comparison"] == {
        "least_iou": 0.5,
        "share_of_first_in_second": pytest.approx(2 / 3),
        "share_of_second_in_first": 0.5,
        "mean_iou": pytest.approx(5 / 6),
        "boxes": [[2, 2], [0, 1], [1, 1]],
        "shared": [1, 0, 1],
        "mean_ious": [pytest.approx(2 / 3), None, 1.0],
    }
    assert drawn.comparison is not None
    assert drawn.comparison.sentence == "2 boxes are shared, of 3 and 4, their mean IoU is 0.833"


def test_nothing_to_compare_is_null(tmp_path: Path) -> None:
    empty = Boxes(tuple(picture(each.name, []) for each in FIRST.pictures))
    for sides, shares in (((empty, empty), [None, None]), ((FIRST, empty), [0, None]), ((empty, FIRST), [None, 0])):
        drawn = draw("a", [Side("one", sides[0]), Side("two", sides[1])], tmp_path)
        found = json.loads((tmp_path / "show.json").read_text())["comparison"]
        assert [found["share_of_first_in_second"], found["share_of_second_in_first"]] == shares
        assert found["mean_iou"] is None and found["mean_ious"] == [None] * 3
        assert drawn.comparison is not None and "IoU" not in (drawn.comparison.sentence or "")


def test_other_pictures_are_refused(tmp_path: Path) -> None:
    fewer = Boxes(FIRST.pictures[:2])
    resized = Boxes((replace(FIRST.pictures[0], size=(61, 80)), *FIRST.pictures[1:]))
    for other in (fewer, resized):
        with pytest.raises(PqkError, match=r"the two models show other pictures: a\.png, b\.png, c\.png, and a\.png"):
            draw("a", [Side("one", FIRST), Side("two", other)], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_all_are_counted_and_the_first_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pqk.show.boxes.MOST_ROWS", 2)
    sizes = []
    for count in (3, 2):
        draw("a", [Side("one", Boxes(FIRST.pictures[:count]))], tmp_path)
        assert len(json.loads((tmp_path / "show.json").read_text())["found"][0]) == count
        with Image.open(tmp_path / "boxes.png") as image:
            sizes.append(image.size)
    assert sizes[0][1] == sizes[1][1]


@pytest.mark.parametrize("size", [(60, 80), (3000, 4000), (1000, 200), (20, 400), (1, 1)])
def test_labels_stay_in_their_picture_and_heads_apart(tmp_path: Path, size: tuple[int, int]) -> None:
    """In pictures of any size and shape, of boxes at every edge."""
    height, width = size
    ends = ((0.0, 0.02), (0.0, 1.0), (0.4, 0.6), (0.9, 0.95), (0.99, 1.0))
    boxes = np.array([[width * x, height * y, width * w, height * h] for x, w in ends for y, h in ends])
    labels = np.arange(len(boxes))
    panel = Panel("a head", np.zeros((4, 4, 3), np.uint8), size, boxes, np.ones(len(boxes)), labels)
    figure = _figure([panel, replace(panel, head="b head"), panel], "title\nof two lines")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, title = canvas.get_renderer(), figure._suptitle
    assert title is not None and len(figure.axes) == 3
    for axes in figure.axes:
        outside, slack = axes.get_window_extent(renderer), 3
        assert len(axes.texts) == len(boxes)
        for text in axes.texts:
            label = text.get_window_extent(renderer)
            assert outside.x0 - slack <= label.x0 and label.x1 <= outside.x1 + slack, text.get_text()
            assert label.y1 <= outside.y1 + slack, text.get_text()
        assert axes.get_tightbbox(renderer).y1 < title.get_window_extent(renderer).y0
    draw_boxes(tmp_path / "boxes.png", [panel], "title")
    assert (tmp_path / "boxes.png").stat().st_size > 2000
