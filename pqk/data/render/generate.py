"""Writes generated scenes as files for `pqk data make`, in the COLMAP + depth layout of real scenes: `make_scenes`."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from pqk.cores import allowed_cores
from pqk.data.render.intersect import SceneBatch
from pqk.data.render.pool import in_processes, is_made
from pqk.data.render.raytrace import trace
from pqk.data.render.synthetic import render, sample_scenes, texture_bank
from pqk.data.scenes.camera import Camera
from pqk.data.scenes.colmap import ModelImage, write_text_model
from pqk.data.scenes.covisibility import covisibility
from pqk.data.scenes.pairs import pair_graph
from pqk.errors import PqkError, nearest
from pqk.files import clear_write_errors, write_json
from pqk.settings.seeds import INDICES, LIMIT, SPLITS, split_seed

IMAGES = "dslr_images_undistorted"
JPEG_QUALITY = 95
ATTEMPTS = 24
LOW = 128  # side in pixels of the depth maps on which overlap is checked
CLOSEST = 0.5  # metres; nearer surfaces ruin relative depth errors
BAND = 128
WORTH = 4  # scenes; fewer take less time than the start of a process


@dataclass(frozen=True)
class ScenePlan:
    """The settings of one generated scene. k: neighbours in the pair graph whose pairs must overlap."""

    split: str
    seed: int
    index: int
    views: int
    size: int = 512
    k: int = 4
    min_covisibility: float = 0.30
    depth: bool = True

    @property
    def name(self) -> str:
        return f"{self.split}-{self.seed}-{self.index:04d}"


def make_scenes(
    out: Path, plans: Iterable[ScenePlan], jobs: int | None = None, done: Callable[[str], None] | None = None
) -> list[Path]:
    """Renders the planned scenes into `out`, several processes side by side; existing scenes are kept.

    jobs: number of processes, by default one for each core that this process may use, and for fewer than `WORTH`
    scenes this process alone. Returns the scene folders in the order of the plans. Raises PqkError for a plan with an
    impossible value, a folder that cannot be written, a folder that already holds something else under a scene's name,
    and a process that was killed.
    """
    plans = list(plans)
    for plan in plans:
        if plan.split not in SPLITS:
            raise PqkError(
                f"unknown split {plan.split!r}{nearest(plan.split, SPLITS)}; allowed are {', '.join(SPLITS)}"
            )
        if plan.views < 2:
            raise PqkError(f"a scene needs at least 2 views, got {plan.views}")
        if plan.size % 16 or not 32 <= plan.size <= 2048:
            raise PqkError(f"image size must be a multiple of 16 from 32 to 2048, got {plan.size}")
        for name, value, limit in (("seed", plan.seed, LIMIT), ("index", plan.index, INDICES)):
            if not 0 <= value < limit:
                raise PqkError(f"the {name} of a scene must be from 0 to {limit - 1}, got {value}")
    if jobs is not None and jobs < 1:
        raise PqkError(f"the number of jobs must be at least 1, got {jobs}")
    if out.exists() and not out.is_dir():
        raise PqkError(f"cannot write scenes into {out}: it is a file, not a folder")
    with clear_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    missing = [plan for plan in plans if not is_made(out / plan.name, "scene.json", asdict(plan), "scene")]
    for plan in missing:
        _remove_leftovers(out, plan)
    jobs = min(jobs or (allowed_cores() if len(missing) >= WORTH else 1), max(1, len(missing)))
    if jobs == 1:
        for plan in missing:
            write_scene(out, plan)
            if done:
                done(plan.name)
    else:
        for name in in_processes(_write_one, [(out, plan) for plan in missing], jobs, "scenes"):
            if done:
                done(name)
    return [out / plan.name for plan in plans]


def _remove_leftovers(out: Path, plan: ScenePlan) -> None:
    """Deletes the temporary folders of processes that were killed while they wrote this scene."""
    for folder in out.glob(f".{plan.name}.*.tmp"):
        number = folder.name.split(".")[-2]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


def _write_one(task: tuple[Path, ScenePlan]) -> str:
    write_scene(*task)
    return task[1].name


def find_scene(plan: ScenePlan) -> tuple[SceneBatch, torch.Tensor, torch.Tensor, torch.Generator, dict[str, float]]:
    """Draws scenes until every used pair overlaps enough; narrows the camera arc each time.

    Returns the scene, cam_to_world (1,V,4,4), field of view (1,V), the generator for the image noise, and the
    covisibility of each used pair. Deterministic in the plan's seed.
    """
    generator = torch.Generator().manual_seed(split_seed(plan.split, plan.seed, plan.index))
    pairs = pair_graph(plan.views, "neighbor", plan.k, symmetrize=True)
    spread = np.array([5.0, 11.0])
    for _ in range(ATTEMPTS):
        scene, pose, fov = sample_scenes(1, plan.views, generator, spread=(spread[0], spread[1]))
        focal = LOW / 2 / torch.tan(fov / 2)
        _, depth = trace(scene, pose, focal, LOW, LOW, None)
        maps = depth[0].numpy()
        poses = torch.linalg.inv(pose[0].double()).numpy()
        intrinsics = [_intrinsics(float(f), LOW) for f in focal[0]]
        shares = {
            f"{i}-{j}": covisibility(maps[i], intrinsics[i], poses[i], maps[j], intrinsics[j], poses[j], stride=2)
            for i, j in pairs
        }
        if min(shares.values()) >= plan.min_covisibility and maps.min() >= CLOSEST:
            return scene, pose, fov, generator, shares
        spread = spread * 0.92
    raise PqkError(
        f"scene {plan.name}: no camera path with covisibility {plan.min_covisibility} in {ATTEMPTS} tries; "
        "lower min_covisibility or the number of neighbours"
    )


def write_scene(out: Path, plan: ScenePlan) -> Path:
    """Renders one scene into `out`/<name>; the folder is written whole or not at all."""
    scene, pose, fov, generator, shares = find_scene(plan)
    size, target = plan.size, out / plan.name
    images, depth, focal = render(scene, pose, fov, size, size, texture_bank(), generator, band=BAND)
    to_cam = torch.linalg.inv(pose[0].double()).numpy()
    temporary = out / f".{plan.name}.{os.getpid()}.tmp"
    with clear_write_errors(target):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "images" / IMAGES).mkdir(parents=True)
            if plan.depth:
                (temporary / "ground_truth_depth" / IMAGES).mkdir(parents=True)
            cameras, members, points, colours = [], [], [], []
            for v in range(plan.views):
                pixels = (images[0, v].permute(1, 2, 0).numpy() * 255 + 0.5).astype(np.uint8)
                z = np.ascontiguousarray(depth[0, v].numpy(), dtype="<f4")
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
                name = f"{IMAGES}/{v:03d}.jpg"
                (temporary / "images" / name).write_bytes(buffer.getvalue())
                if plan.depth:
                    (temporary / "ground_truth_depth" / name).write_bytes(z.tobytes())
                f = float(focal[0, v])
                cameras.append(Camera(v + 1, "PINHOLE", size, size, (f, f, size / 2, size / 2)))
                members.append(ModelImage.from_pose(v + 1, to_cam[v], v + 1, name))
                xyz, rgb = _sparse_points(z, pixels, f, pose[0, v].double().numpy())
                points.append(xyz)
                colours.append(rgb)
            write_text_model(
                temporary / "dslr_calibration_undistorted",
                cameras,
                members,
                np.concatenate(points),
                np.concatenate(colours),
            )
            rounded = {key: round(value, 4) for key, value in shares.items()}
            about = {**asdict(plan), "rolling_floor": bool(scene.terrain), "covisibility": rounded}
            write_json(temporary / "scene.json", about)
            try:
                temporary.rename(target)
            except OSError:  # another process may have been faster with the same scene
                if not (target / "scene.json").exists():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _intrinsics(focal: float, size: int) -> np.ndarray:
    return np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1.0]])


def _sparse_points(
    depth: np.ndarray, pixels: np.ndarray, focal: float, cam_to_world: np.ndarray, step: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a coarse grid of surface points and colours, like the points of a structure-from-motion model."""
    size = depth.shape[0]
    v, u = np.mgrid[step // 2 : size : step, step // 2 : size : step].reshape(2, -1)
    z = depth[v, u].astype(np.float64)
    local = np.stack([(u + 0.5 - size / 2) / focal * z, (v + 0.5 - size / 2) / focal * z, z], -1)
    return local @ cam_to_world[:3, :3].T + cam_to_world[:3, 3], pixels[v, u]
