"""Draws the test scenes of an evaluation seed: of `pqk run --seed N` and of `pqk ledger eval --eval-seeds N`.

What an eval seed draws:

- the test scenes. Seed 0: those of the workload. Generated scenes, seed s: as many scenes of the test split with base
  seed (workload's + s), none of which any other eval seed, training or calibration shares. Scenes of a folder, seed s:
  half of them, drawn without replacement. Two halves overlap, so their scores are not independent; the ledger's
  intervals count with that (`pqk.record.ledger.halves_interval`).
- with the scenes, their pairs; and the pixels that chamfer takes.
- where images are cropped, if they leave room: the centre for seed 0, anywhere for seed s (`run/inputs.py`).

Nothing is added to pictures.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pqk.errors import PqkError
from pqk.recipe import stages
from pqk.recipe.stages import Context, Scenes
from pqk.settings.seeds import LIMIT
from pqk.settings.workload import SYNTHETIC, SceneList, Workload


def seed_scenes(ctx: Context, workload: Workload, root: Path, eval_seed: int) -> tuple[Scenes, str]:
    """Gives the test scenes that an eval seed draws, and that in words. Raises PqkError."""
    asked = workload.scenes.test
    if asked.source != SYNTHETIC:
        return draw(stages.listed_scenes(ctx, "test", asked, workload, root), eval_seed)
    seeded = seeded_list(asked, eval_seed)
    scenes = stages.listed_scenes(ctx, "test", seeded, workload, root)
    return scenes, f"{len(scenes.folders)} generated, base seed {seeded.seed}"


def seeded_list(asked: SceneList, eval_seed: int) -> SceneList:
    """Gives a list of generated scenes with the base seed of an eval seed. Raises PqkError for one above all seeds."""
    base = asked.seed + eval_seed
    if base >= LIMIT:
        raise PqkError(f"eval seed {eval_seed}: the base seed of the test scenes would be {base}, above {LIMIT - 1}")
    return asked.model_copy(update={"seed": base})


def draw(listed: Scenes, eval_seed: int) -> tuple[Scenes, str]:
    """Gives what an eval seed draws of scenes in a folder, and that in words. Raises PqkError where there is one."""
    count = len(listed.folders)
    if eval_seed == 0:
        return listed, f"all {count} of the list"
    if count < 2:
        raise PqkError(
            f"eval seed {eval_seed} draws half of the scenes, and there is one, which only eval seed 0 takes; "
            "to seed the training alone: --set workload.seeds.train=N"
        )
    chosen = np.random.default_rng(eval_seed).choice(count, count // 2, replace=False)
    names = tuple(listed.folders[index].name for index in sorted(chosen))
    return stages.folder_scenes(listed.root, names), f"half: {len(names)} of {count} of the list"
