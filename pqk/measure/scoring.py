"""The scores of pairs against the ground truth of their scenes or against a reference. No engine runs here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from pqk.cores import allowed_cores
from pqk.data.scenes.open import open_scene
from pqk.data.scenes.preprocess import Frame
from pqk.errors import PqkError
from pqk.families.dust3r.inputs import load_frames
from pqk.families.dust3r.scoring import pair_truth, score_against_reference, score_pair, summarise
from pqk.measure.predictions import Predictions

_MOST = 4  # pairs that are scored at once
Arrays = Mapping[str, np.ndarray]


class Scorer:
    """Scores pairs on threads while the next ones are predicted or read; a context manager.

    request: name (of the variant), scenes (folders), quality (scale_alignment, chamfer_points, min_valid_pixels), seed,
    and, needed only against a reference, min_conf (the bound above which its activation gives confidences). `add`
    blocks while several pairs wait, which bounds the memory, and raises the PqkError of an earlier pair, naming it.
    """

    def __init__(self, request: Mapping[str, Any], threads: int) -> None:
        self._request = request
        self._scenes = [Path(folder).name for folder in request["scenes"]]
        self._waiting: list[tuple[Mapping[str, Any], Future[dict[str, Any] | None]]] = []
        self._rows: list[dict[str, Any]] = []
        self._pool, self._most = ThreadPoolExecutor(threads, "score"), threads + 2

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(
        self, pair: Mapping[str, Any], frames: tuple[Frame, Frame] | None, arrays: Arrays, reference: Arrays | None
    ) -> None:
        """Score a pair against `reference`, or where that is None against the ground truth of its two frames."""
        self._waiting.append((pair, self._pool.submit(self._score, frames, arrays, reference)))
        while len(self._waiting) > self._most:
            self._collect()

    def result(self) -> dict[str, Any]:
        """summary (mean per metric) and pairs (a row each: scene by its place in the list, first, second, scores).

        A pair of which a view has fewer than min_valid_pixels of ground truth has no row. Raises PqkError when no pair
        is left.
        """
        while self._waiting:
            self._collect()
        if not self._rows:
            wanted = self._request["quality"]["min_valid_pixels"]
            raise PqkError(
                f"there is no pair to evaluate: none of {', '.join(self._scenes)} has two views with {wanted} valid "
                "depth pixels (quality.min_valid_pixels)"
            )
        plain = [{k: v for k, v in row.items() if k not in ("scene", "first", "second")} for row in self._rows]
        return {"summary": summarise(plain), "pairs": self._rows}

    def _collect(self) -> None:
        pair, job = self._waiting.pop(0)
        try:
            scores = job.result()
        except PqkError as error:
            where = f"{self._scenes[pair['scene']]}, {pair['first']} and {pair['second']}"
            raise PqkError(f"{self._request['name']} on scene {where}: {error}") from error
        if scores is not None:
            self._rows.append({**{key: pair[key] for key in ("scene", "first", "second")}, **scores})

    def _score(
        self, frames: tuple[Frame, Frame] | None, arrays: Arrays, reference: Arrays | None
    ) -> dict[str, Any] | None:
        quality, seed = self._request["quality"], self._request["seed"]
        options = {"align": quality["scale_alignment"], "chamfer_points": quality["chamfer_points"], "seed": seed}
        if reference is not None:
            return score_against_reference(arrays, reference, **options, min_conf=self._request["min_conf"])
        assert frames is not None
        truth = pair_truth(*frames)
        if min(int(truth.valid1.sum()), int(truth.valid2.sum())) < quality["min_valid_pixels"]:
            return None
        return score_pair(arrays, truth, **options)


def score(request: dict[str, Any]) -> dict[str, Any]:
    """Score kept predictions. Request: what `Scorer` needs, predictions (folder), reference (a folder as well, or
    null), and how its images were read: views, shape. Returns what `Scorer.result` does."""
    with ExitStack() as stack:
        mine = stack.enter_context(Predictions(Path(request["predictions"])))
        other = stack.enter_context(Predictions(Path(request["reference"]))) if request["reference"] else None
        if other is not None and [p["places"] for p in other.pairs] != [p["places"] for p in mine.pairs]:
            raise PqkError(f"the predictions of {request['name']} and of its reference are of other pairs")
        scorer = stack.enter_context(Scorer(request, min(_MOST, allowed_cores())))
        for scene, pairs in groupby(enumerate(mine.pairs), key=lambda item: item[1]["scene"]):
            frames: Sequence[Frame] = ()
            if other is None:
                opened, (height, width) = open_scene(Path(request["scenes"][scene])), request["shape"]
                frames = load_frames(opened, height, width, request["views"], request["seed"])
            for place, pair in pairs:
                i, j = pair["places"]
                both = (frames[i], frames[j]) if frames else None
                scorer.add(pair, both, mine.arrays(place), other.arrays(place) if other is not None else None)
        return scorer.result()
