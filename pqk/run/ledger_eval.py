"""`pqk ledger eval`: a fixed checkpoint under several eval seeds, one TSV row each; and one row measured again.

What an eval seed draws:

- the test scenes. Seed 0: those of the workload, as `pqk run` takes them. Generated scenes, seed s: as many scenes of
  the test split with base seed (workload's + s), none of which any other eval seed, training or calibration shares.
  Scenes of a folder, seed s: half of them, drawn without replacement.
- with the scenes, their pairs; and the pixels that chamfer takes.
- Speed is timed anew for every eval seed, on a scene of it: the noise of the measurement itself.

Nothing is added to pictures, and crops stay where the workload puts them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from backends.base import Backend, Precision, lowered_to
from pqk import paths
from pqk.data.scene import open_scene
from pqk.data.seeds import LIMIT
from pqk.errors import CheckFailed, PqkError, nearest
from pqk.files import check_writable, sha256_json
from pqk.models.checkpoint import load_model
from pqk.models.configs import lowest_confidence
from pqk.record.ledger import METRICS, add_row, identity, read_rows, refuse_mixed
from pqk.record.tsv import Row
from pqk.run import stages
from pqk.run.checkpoints import Checkpoint, agreed_seed, open_checkpoint, plain_name
from pqk.run.inputs import load_frames, scene_pairs
from pqk.run.prepare import (
    Request,
    asked_experiment,
    check_float_rest,
    chosen_quantizer,
    commit_of,
    context,
    count_parameters,
    engine_options,
    usable_backend,
)
from pqk.run.stages import ENGINE_VARIANTS, Context, Scenes
from pqk.run.store import OnEvent, Store
from pqk.run.variants import Variant
from pqk.spec.card import Experiment
from pqk.spec.workload import SYNTHETIC, SceneList, Workload

_SCORED_BY = "pqk.run.evaluate"
_ALIASES = {"fp32": "f32", "fp16": "f16"}


@dataclass(frozen=True)
class Asked:
    """The arguments of `pqk ledger eval`."""

    checkpoint: str | Path
    eval_seeds: tuple[int, ...] = (0,)
    backend: str = "openvino"
    precision: str = "f32"  # a float precision of the backend, or what the quantizer makes, such as int8
    quantizer: str | None = None
    card: str | None = None  # task card; default: the model card's
    train_seed: int | None = None  # default: the model card's
    settings: Mapping[str, Any] = field(default_factory=dict)
    timed: bool = True


class Bench:
    """A checkpoint on one backend in one precision, ready to be measured under any eval seed.

    Nothing long happens before `measure`. Raises PqkError and BackendError for what a user can mend.
    """

    def __init__(self, asked: Asked, root: Path, on_event: OnEvent, store: Store | None = None) -> None:
        self.root = root
        self.checkpoint: Checkpoint = open_checkpoint(asked.checkpoint, root)
        card = asked.card or self.checkpoint.task_card
        if card is None:
            raise PqkError(
                f"the model card of {self.checkpoint.name} tells no task card; name it with --card, such as A1"
            )
        self.backend: Backend = usable_backend(asked.backend)
        request = Request(card, asked.backend, asked.quantizer, settings=asked.settings, recipe=False)
        self.experiment: Experiment = asked_experiment(request, root)
        self.quantizer, self.precision = _engine(self.backend, asked, self.experiment)
        self.options = engine_options(self.experiment, asked.backend)
        self.ctx: Context = context(request, self.backend, root, on_event)
        self.cached = store is None  # compiled models are kept only beside the project's own store
        if store is not None:
            self.ctx = replace(self.ctx, store=store)
        config = {"precision": self.precision, "quantizer": self.quantizer, "options": self.options}
        if self.quantizer is not None:
            config["quant"] = self.experiment.quant.sha256
            config["calibration"] = calibration_digest(self.ctx, self.experiment.workload, root)
        sources = (_SCORED_BY, *getattr(self.backend, "sources", ()))
        self.known: Row = {
            "card": self.experiment.card.id,
            "train_seed": agreed_seed(self.checkpoint, asked.train_seed),
            "main_metric": self.experiment.evaluation.quality.main_metric,
            "checkpoint": self.checkpoint.name,
            "checkpoint_sha256": self.checkpoint.sha256,
            "backend": asked.backend,
            "quantizer": self.quantizer,
            "device": self.ctx.machine["device"],
            "precision": self.precision,
            "workload_sha256": workload_digest(self.ctx, self.experiment.workload, root),
            "eval_sha256": sha256_json(self.experiment.evaluation.quality.model_dump(mode="json")),
            "config_sha256": sha256_json(config),
            "code_sha256": stages.code_of(*sources),
            "settings": json.dumps(dict(asked.settings), sort_keys=True) if asked.settings else None,
        }
        self._variant: Variant | None = None
        self._params = 0
        self._min_conf = 0.0

    def measure(self, eval_seed: int, timed: bool) -> Row:
        """The whole row of an eval seed. `timed`: also pairs per second, null where the engine is emulated."""
        workload, quality = self.experiment.workload, self.experiment.evaluation.quality
        scenes, drawn = seed_scenes(self.ctx, workload, self.root, eval_seed)
        without = next((path for path in scenes.folders if not open_scene(path).has_ground_truth), None)
        if without is not None:
            raise PqkError(f"{without}: the ledger needs scenes with ground truth; this one has none")
        variant = self._ready()
        height, width = workload.input.height, workload.input.width
        views = workload.scenes.test.views
        keep = self.experiment.quant.ptq.keep_list if self.quantizer else ()
        scoring = {  # as `pqk run` asks, so that both share one artifact
            "views": views,
            "shape": [height, width],
            "pair_graph": workload.pair_graph.model_dump(mode="json"),
            "min_covisibility": workload.min_covisibility,
            "quality": quality.model_dump(mode="json"),
            "seed": eval_seed,
            "min_conf": self._min_conf,
            "keep": list(keep),
        }
        made: list[str] = []
        tell = self.ctx.on_event

        def on_event(kind: str, stage: str, key: str, seconds: float) -> None:
            if kind in ("reuse", "done"):
                made.append(key)
            tell(kind, stage, key, seconds)

        scores = stages.quality(replace(self.ctx, on_event=on_event), variant, None, scenes, scoring)
        emulated = scores["measured"] == "emulated"
        return self.known | {
            "eval_seed": eval_seed,
            **{name: scores["summary"].get(name) for name in METRICS},
            "fps": None if emulated or not timed else self._fps(variant, scenes, (height, width), views),
            "pairs": len(scores["pairs"]),
            "scenes": drawn,
            "scenes_sha256": scenes.sha256,
            "params": self._params,
            "measured": scores["measured"],
            "commit": commit_of(self.root),
            "datetime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "output": paths.shown(self.ctx.store.root / "quality" / made[-1][:16], self.root),
        }

    def _fps(self, variant: Variant, scenes: Scenes, shape: tuple[int, int], views: int | None) -> float:
        workload = self.experiment.workload
        frames = load_frames(open_scene(scenes.folders[0]), *shape, views=views)
        pairs = scene_pairs(frames, workload.pair_graph, workload.min_covisibility, True)
        asked = {
            "shape": list(shape),
            "views": views,
            "pairs": [list(pair) for pair in pairs],
            "efficiency": self.experiment.evaluation.efficiency.model_dump(mode="json"),
        }
        timed = stages.timing(self.ctx, [variant], scenes.folders[0], scenes.sha256, asked)
        samples = timed["variants"][variant.name]["pair"]
        return 1000 * len(samples) / float(sum(samples))

    def _ready(self) -> Variant:
        """The graphs of the checkpoint, exported and quantized once."""
        if self._variant is not None:
            return self._variant
        workload = self.experiment.workload
        shape = (workload.input.height, workload.input.width)
        model = load_model(self.checkpoint.path)
        self._params, self._min_conf = count_parameters(model), lowest_confidence(model.config)
        graphs = stages.export_graphs(self.ctx, model, self.checkpoint.sha256, *shape)
        del model
        options = dict(self.options)
        if self.cached and self.backend.name != "reference":  # which compiles nothing that could be kept
            options["cache_dir"] = str(paths.store(self.root).parent / "engines")
        if self.quantizer is None:
            precision = Precision(self.precision)
            name = ENGINE_VARIANTS[precision]
        else:
            precision, name = Precision.INT8, self.precision
            calibration = stages.calibration_images(self.ctx, workload.calibration, workload, self.root)
            ptq = self.experiment.quant.ptq.model_dump(mode="json")
            graphs = stages.quantize(
                self.ctx,
                self.backend.name,
                self.quantizer,
                str(self.checkpoint.path),
                graphs,
                calibration,
                ptq,
                shape,
            ).graphs
            rest = self.experiment.quant.float_rest
            options |= {} if rest == "auto" else {"rest": rest}
        self._variant = Variant(name, self.backend.name, precision, graphs["encoder"], graphs["decoder"], options)
        return self._variant


def _engine(backend: Backend, asked: Asked, experiment: Experiment) -> tuple[str | None, str]:
    """The quantizer (None for a float precision) and the precision's name. Raises PqkError."""
    wanted = _ALIASES.get(asked.precision, asked.precision)
    floats = [str(precision) for precision in backend.float_precisions()]
    if wanted in floats:
        if asked.quantizer is not None:
            raise PqkError(f"--precision {wanted} takes no quantizer, and --quantizer {asked.quantizer} is given")
        return None, wanted
    if not backend.quantizers():
        raise PqkError(f"--precision {asked.precision}: backend {backend.name} has {', '.join(floats)} here")
    ptq = experiment.quant.ptq
    quantizer = chosen_quantizer(backend, asked.quantizer, ptq)
    made = lowered_to(backend.quantizers()[quantizer], ptq.bits_w, ptq.bits_a)
    if wanted != made:
        known = [*floats, made]
        raise PqkError(
            f"--precision {asked.precision}{nearest(wanted, known)}: backend {backend.name} with {quantizer} has here "
            f"{', '.join(known)}"
        )
    check_float_rest(experiment.quant.float_rest, backend)
    return quantizer, made


def workload_digest(ctx: Context, workload: Workload, root: Path) -> str:
    """sha256 of what an evaluation is fed, seeds aside: input shape, pair graph, test scenes, least covisibility.

    Calibration and validation are left out: they are part of how a model was made, and recipes that differ there are
    still evaluated on the same. Of scenes in a folder the bytes count, and not where they lie.
    """
    test = workload.scenes.test
    scenes = test.model_dump(mode="json")
    if test.source != SYNTHETIC:
        scenes = {"views": test.views, "sha256": stages.test_scenes(ctx, test, workload, root).sha256}
    return sha256_json(
        {
            "input": workload.input.model_dump(mode="json"),
            "pair_graph": workload.pair_graph.model_dump(mode="json"),
            "min_covisibility": workload.min_covisibility,
            "scenes": scenes,
        }
    )


def calibration_digest(ctx: Context, workload: Workload, root: Path) -> str:
    """sha256 of the calibration set: how it is generated, or the bytes of its folder."""
    calibration = workload.calibration
    if calibration.source == SYNTHETIC:
        return sha256_json(calibration.model_dump(mode="json"))
    return stages.calibration_images(ctx, calibration, workload, root).sha256


def seed_scenes(ctx: Context, workload: Workload, root: Path, eval_seed: int) -> tuple[Scenes, str]:
    """The test scenes that an eval seed draws, and that in words; see the top of this file. Raises PqkError."""
    test: SceneList = workload.scenes.test
    if test.source == SYNTHETIC:
        base = test.seed + eval_seed
        if base >= LIMIT:
            raise PqkError(
                f"eval seed {eval_seed}: the base seed of the test scenes would be {base}, above {LIMIT - 1}"
            )
        scenes = stages.test_scenes(ctx, test.model_copy(update={"seed": base}), workload, root)
        return scenes, f"{len(scenes.folders)} generated, base seed {base}"
    scenes = stages.test_scenes(ctx, test, workload, root)
    count = len(scenes.folders)
    if eval_seed == 0:
        return scenes, f"all {count} of the list"
    if count < 2:
        raise PqkError(
            f"eval seed {eval_seed} draws half of the scenes, and there is one; only eval seed 0 takes it whole"
        )
    chosen = np.random.default_rng(eval_seed).choice(count, count // 2, replace=False)
    names = tuple(scenes.folders[index].name for index in sorted(chosen))
    return stages.folder_scenes(scenes.root, names), f"half: {len(names)} of {count} of the list"


def evaluate_seeds(
    asked: Asked, out: Path | None, root: Path, on_event: OnEvent, say: Callable[[Row, str], None]
) -> Path:
    """Measure what is not in the file yet, row by row, so that a killed run loses at most the seed it was at.

    `out`: default results/CHECKPOINT.CARD.BACKEND-PRECISION.tsv. A row is kept when the same run stands there, measured
    by the same code. `say` gets each row with a note: kept, or why it was measured again. Returns the file.
    Raises PqkError, before anything is measured, when the file holds rows of another workload or evaluation.
    """
    bench = Bench(asked, root, on_event)
    if out is None:
        tool = "-".join(word for word in (asked.backend, bench.quantizer, bench.precision) if word)
        out = root / "results" / f"{plain_name(bench.checkpoint.name)}.{bench.known['card']}.{tool}.tsv"
    if out.suffix != ".tsv" or out.is_dir():
        raise PqkError(f"--out {out}: the name of a ledger ends in .tsv")
    check_writable(out.parent)
    there = read_rows(out) if out.exists() else []
    refuse_mixed([(out, there), (out, [bench.known])])
    known = {identity(row): row for row in there}
    for seed in asked.eval_seeds:
        old = known.get(identity(bench.known | {"eval_seed": seed}))
        why = ""
        if old is not None:
            if old["code_sha256"] != bench.known["code_sha256"]:
                why = "measured again, as the code that scores has changed"
            elif asked.timed and old["fps"] is None and old["measured"] == "engine":
                why = "measured again, as it was not timed"
            else:
                say(old, "there already")
                continue
        row = bench.measure(seed, asked.timed)
        add_row(out, row)
        say(row, why)
    return out


def measure_again(row: Row, checkpoint: Checkpoint, root: Path, on_event: OnEvent) -> Row:
    """One row anew from the checkpoint's bytes: nothing is taken from the project's store. Not timed.

    Raises CheckFailed when the project asks for another workload, evaluation or engine than the row was measured with,
    and PqkError as `Bench` does.
    """
    asked = Asked(
        checkpoint.path,
        (row["eval_seed"],),
        row["backend"],
        row["precision"],
        row["quantizer"],
        row["card"],
        row["train_seed"],
        _settings_of(row),
    )
    parent = paths.store(root).parent
    check_writable(parent)
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=parent) as folder:
        bench = Bench(asked, root, on_event, Store(Path(folder)))
        for name in ("checkpoint_sha256", "workload_sha256", "eval_sha256", "config_sha256"):
            if bench.known[name] != row[name]:
                raise CheckFailed(
                    f"the run cannot be repeated here: {name} is {bench.known[name]} now, frozen was {row[name]}; "
                    f"check out the commit it was made at ({row['commit'] or 'unknown'})"
                )
        return bench.measure(row["eval_seed"], timed=False)


def _settings_of(row: Row) -> dict[str, Any]:
    try:
        settings = json.loads(row["settings"] or "{}")
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise PqkError(f"settings of the row are no JSON object: {row['settings'][:80]!r}")
    return settings
