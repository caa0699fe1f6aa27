"""Measures a checkpoint, or a card's own result, under several eval seeds, one TSV row each: `pqk ledger eval`.

It also measures one row again, for `pqk ledger verify`. The family decides which samples an eval seed draws
(`DataPart.open_split`). Speed is timed again for every eval seed, on one of its scenes; the spread shows the noise of
the measurement.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from backends.base import Backend, Graph, Precision, lowered_to
from pqk import paths
from pqk.engines.variant import Variant
from pqk.errors import CheckFailed, PqkError, nearest
from pqk.families.checkpoint import load_model
from pqk.families.contract import SampleSet
from pqk.files import check_writable, sha256_json
from pqk.measure.noise import warning
from pqk.measure.scores import drop_of
from pqk.recipe import stages
from pqk.recipe.candidate import Choice
from pqk.recipe.columns import described_metrics
from pqk.recipe.experiment import Experiment
from pqk.recipe.forms import formed
from pqk.recipe.quantization import Quantization
from pqk.recipe.recover import choose
from pqk.recipe.request import (
    Model,
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
from pqk.recipe.stages import ENGINE_VARIANTS, Context, open_split, parts_code
from pqk.record.ledger import COLUMNS, IDENTITY, RESULT, add_row, identity, read_rows, refuse_mixed
from pqk.record.tsv import Row
from pqk.settings.plan import TRAIN_SEED
from pqk.store.code import code_of
from pqk.store.store import OnEvent, Store
from pqk.study.checkpoints import (
    Checkpoint,
    agreed_seed,
    finalize,
    keep_result,
    kept_graphs,
    open_checkpoint,
    plain_name,
)

_SCORED_BY = "pqk.measure.evaluate"
_ALIASES = {"fp32": "f32", "fp16": "f16"}


@dataclass(frozen=True)
class Asked:
    """The arguments of `pqk ledger eval`."""

    checkpoint: str | Path | None  # None: the card's own result
    eval_seeds: tuple[int, ...] = (0,)
    backend: str = "openvino"
    precision: str | None = None  # a float precision of the backend (default f32), or that of the quantizer
    quantizer: str | None = None
    card: str | None = None  # task card; default: the model card's
    train_seed: int | None = None  # default: the model card's; of a card's own result workload.yaml's
    settings: Mapping[str, Any] = field(default_factory=dict)
    timed: bool = True
    model: str | None = None  # of a card's own result: the Teacher, as in `pqk run`
    train_scenes: Path | None = None  # of a card's own result: the training data, as in `pqk run`
    train_images: Path | None = None


class Bench:
    """A model on one backend in one precision, ready to be measured under any eval seed.

    The model is a checkpoint, in float or quantized as its card says; a kept result, whose graphs are used unchanged;
    or, without a checkpoint, the candidate of the card's own run, which is made when it does not exist yet. The first
    two do no long work before `measure`. Raises PqkError and BackendError for errors that a user can fix.
    """

    def __init__(
        self,
        asked: Asked,
        root: Path,
        on_event: OnEvent,
        store: Store | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.root = root
        self.say = say
        self.checkpoint = None if asked.checkpoint is None else open_checkpoint(asked.checkpoint, root)
        self.kept = None if self.checkpoint is None else self.checkpoint.result
        settings = dict(asked.settings)
        card = asked.card or (self.checkpoint.task_card if self.checkpoint else None)
        if self.checkpoint is None:
            _check_result_asked(asked)
            settings |= {} if asked.train_seed is None else {TRAIN_SEED: asked.train_seed}
        elif card is None:
            raise PqkError(
                f"the model card of {self.checkpoint.name} has no task card; name it with --card, such as A1"
            )
        elif asked.model is not None:
            raise PqkError("--model is the Teacher of a card's own result; a CKPT has none")
        elif asked.train_scenes or asked.train_images:
            raise PqkError("--train-scenes and --train-images are for a card's own result; a CKPT is trained already")
        self.backend: Backend = usable_backend(asked.backend)
        self.request = Request(
            str(card),
            asked.backend,
            asked.quantizer,
            model=asked.model if self.checkpoint is None else str(self.checkpoint.path),  # its family is used
            settings=settings,
            recipe=self.checkpoint is None,
            qat=True,
            train_scenes=asked.train_scenes,
            train_images=asked.train_images,
        )
        self.experiment: Experiment = asked_experiment(self.request, root)
        self.options = engine_options(self.experiment, asked.backend)
        self.ctx: Context = context(self.request, self.backend, root, on_event)
        self.cached = store is None  # compiled models are kept only beside the project's own store
        if store is not None:
            self.ctx = replace(self.ctx, store=store)
        others = {name: value for name, value in settings.items() if name != TRAIN_SEED}  # it has its own column
        parts = parts_code(self.experiment.family, "settings", "data", "predict", "scoring")
        sources = (_SCORED_BY, *parts, *getattr(self.backend, "sources", ()))
        self.known: Row = dict.fromkeys(COLUMNS) | {
            "card": self.experiment.card.id,
            "main_metric": self.experiment.evaluation.quality.main_metric,
            "metrics": json.dumps(described_metrics(self.experiment.metrics.values())),
            "backend": asked.backend,
            "device": self.ctx.machine["device"],
            "isa": self.ctx.machine["isa"],
            "cores": self.ctx.machine["cores"],
            "workload_sha256": split_digest(self.ctx, self.experiment, "test", root),
            "eval_sha256": sha256_json(self.experiment.evaluation.quality.model_dump(mode="json")),
            "code_sha256": code_of(*sources),
            "settings": json.dumps(others, sort_keys=True) if others else None,
        }
        self.made: Choice | None = None
        self.teacher: Variant | None = None
        self._variant: Variant | None = None
        if self.checkpoint is not None:
            self._identify_checkpoint(asked)

    def _identify_checkpoint(self, asked: Asked) -> None:
        assert self.checkpoint is not None
        seed = agreed_seed(self.checkpoint, asked.train_seed)
        self.known |= {
            "train_seed": seed,
            "checkpoint": self.checkpoint.name,
            "checkpoint_sha256": self.checkpoint.sha256,
        }
        if self.kept is not None:
            if (asked.precision, asked.quantizer) not in (
                (None, None),
                (self.kept["precision"], self.kept["quantizer"]),
            ):
                raise PqkError(f"{self.checkpoint.name} is quantized already: leave out --precision and --quantizer")
            if self.kept["backend"] != asked.backend:
                raise PqkError(f"{self.checkpoint.name} holds graphs for backend {self.kept['backend']}")
            self._identify(self.kept["quantizer"], self.kept["precision"], True)
            self.known |= {"float_sha256": self.kept["float_sha256"], "lowered": self.kept["lowered"]}
        else:
            self._identify(*_engine(self.backend, asked, self.experiment), False)

    def _identify(self, quantizer: str | None, precision: str, result: bool) -> None:
        """Sets precision, quantizer and the digest of everything about the engine that is not in the checkpoint.

        result: for a recipe's own quantized result, whose digest includes the recipe and its methods.
        """
        config: dict[str, Any] = {"precision": precision, "quantizer": quantizer, "options": self.options}
        if calling := self.experiment.workload.calling:
            config["feeding"] = calling
        if quantizer is not None:
            config["quant"] = self.experiment.quant.sha256
            config["calibration"] = split_digest(self.ctx, self.experiment, "calibration", self.root)
        if result:
            recipe = self.experiment.card.recipe
            asked = self.experiment
            specs = {"P": asked.prune, "K": asked.distill, "T": asked.reduce, "PQK": asked.joint}
            methods = {method: spec.sha256 for method, spec in specs.items()}
            config["recipe"] = list(recipe)
            config |= {method: methods[method] for method in recipe if method in methods}
        self.known |= {"quantizer": quantizer, "precision": precision, "config_sha256": sha256_json(config)}

    def make(self) -> None:
        """Makes or reuses a card's own result, as `pqk run --no-rollback` does, and fills in its columns."""
        if self.checkpoint is not None or self._variant is not None:
            return
        made, _ = choose(self.request, self.root, self.ctx.on_event, self.say, rollback=False)
        candidate = made.rows[-1]
        self.teacher, self._variant = made.rows[0].variant, candidate.variant
        own = made.common | candidate.own
        name, quantizer = own["model"], own["quantizer"] if candidate.lowered else None
        hashes = own["hashes"]
        self._identify(quantizer, own.get("precision", str(candidate.variant.precision)), candidate.lowered is not None)
        self.known |= {
            "train_seed": self.experiment.workload.seeds.train,
            "teacher_sha256": made.common["hashes"]["model"],
            "params": own["params"],
            "checkpoint": f"{name}+{candidate.lowered}" if candidate.lowered in ("PTQ", "QAT") else name,
            "checkpoint_sha256": sha256_json(candidate.variant.hashes) if candidate.lowered else hashes["model"],
            "float_sha256": hashes["model"] if candidate.lowered else None,
            "lowered": candidate.lowered,
        }
        self.made = made

    def measure(self, eval_seed: int, timed: bool) -> Row:
        """Returns the row of an eval seed. `timed`: with samples per second, null where the engine is emulated."""
        experiment = self._seeded(eval_seed)
        found = open_split(self.ctx, experiment, "test", self.root)
        if not found.truthful:
            raise PqkError(f"{found.groups[0]}: the ledger needs scenes with ground truth; this one has none")
        variant = self._ready()
        keep = experiment.quant.ptq.keep_list if self.known["quantizer"] else ()
        # as `pqk run` asks, so that both share one artifact
        scores = stages.quality(self.ctx, experiment, variant, None, found, {}, keep)
        drop = None
        if self.teacher is not None:
            base = stages.quality(self.ctx, experiment, self.teacher, None, found, {})
            drop = drop_of(experiment.metric, scores, base, True)
        emulated = scores["measured"] == "emulated"
        return self.known | {
            "eval_seed": eval_seed,
            **scores["summary"],
            "drop_pct": None if drop is None else drop.value,
            "fps": None if emulated or not timed else self._fps(experiment, variant, found),
            "pairs": len(scores["samples"]),
            "scenes": found.drawn or f"all {len(found.groups)}",
            "scenes_sha256": found.sha256,
            "measured": scores["measured"],
            "commit": commit_of(),
            "datetime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "output": paths.shown(Path(scores["artifact"]), self.root),
        }

    def _seeded(self, eval_seed: int) -> Experiment:
        """Returns the experiment with another eval seed."""
        workload = self.experiment.workload
        seeds = workload.seeds.model_copy(update={"eval": eval_seed})
        return replace(self.experiment, workload=workload.model_copy(update={"seeds": seeds}))

    def _fps(self, experiment: Experiment, variant: Variant, found: SampleSet) -> float:
        timed = stages.timing(self.ctx, experiment, [variant], found)
        if timed["disturbed"]:
            self.say(warning(timed["disturbed"]))
        times = timed["variants"][variant.name]["sample"]
        return 1000 * len(times) / float(sum(times))

    def _ready(self) -> Variant:
        """Returns the variant to measure: made, kept, or exported and quantized once."""
        self.make()
        if self._variant is not None:
            return self._variant
        assert self.checkpoint is not None
        model = load_model(self.checkpoint.path)
        self.known["params"] = count_parameters(model)
        options = dict(self.options)
        if self.cached and self.backend.name != "reference":  # it compiles nothing that could be kept
            options["cache_dir"] = str(paths.store(self.root).parent / "engines")
        if self.kept is not None:
            graphs = kept_graphs(self.checkpoint)
        else:
            graphs = stages.export_graphs(self.ctx, self.experiment, model, self.checkpoint.sha256)
        del model
        self._variant = self._of(graphs, options)
        return self._variant

    def _of(self, graphs: Mapping[str, Graph], options: Mapping[str, Any]) -> Variant:
        """Returns the variant of a checkpoint's graphs: in float, quantized as by a recipe's stage Q, or as kept."""
        assert self.checkpoint is not None
        quantizer, precision, experiment = self.known["quantizer"], self.known["precision"], self.experiment
        if quantizer is None:
            name, asked = ENGINE_VARIANTS[Precision(precision)], Precision(precision)
            return Variant(name, self.backend.name, asked, graphs, options)
        if self.kept is not None:
            rest = experiment.quant.float_rest
            own = {**options} if rest == "auto" else {**options, "rest": rest}
            return formed(self.ctx, Variant(precision, self.backend.name, Precision.INT8, graphs, own))[0]
        calibration = open_split(self.ctx, experiment, "calibration", self.root)
        model = Model(str(self.checkpoint.path), self.checkpoint.name, self.checkpoint.sha256)
        about = (experiment, self.backend.name, quantizer, precision, model, graphs, calibration)
        return Quantization(*about, floats=(), columns={"hashes": {}}, options=options).row(self.ctx).variant


def _check_result_asked(asked: Asked) -> None:
    """Raises PqkError for options that do not fit a card's own result."""
    if asked.card is None:
        raise PqkError("give a CKPT, or --card for the own result of a card")
    if asked.precision is not None:
        raise PqkError(
            f"--precision {asked.precision} is for a CKPT: the result of card {asked.card} has its recipe's precision"
        )
    given = asked.settings.get(TRAIN_SEED)
    if None not in (given, asked.train_seed) and given != asked.train_seed:
        raise PqkError(f"--train-seed {asked.train_seed} and --set {TRAIN_SEED}={given} contradict each other")


def _engine(backend: Backend, asked: Asked, experiment: Experiment) -> tuple[str | None, str]:
    """Returns the quantizer (None for a float precision) and the name of the precision.

    Raises PqkError for a precision or quantizer that the backend does not have.
    """
    given = asked.precision or str(Precision.F32)
    wanted = _ALIASES.get(given, given)
    floats = [str(precision) for precision in backend.float_precisions()]
    if wanted in floats:
        if asked.quantizer is not None:
            raise PqkError(f"--precision {wanted} takes no quantizer, and --quantizer {asked.quantizer} is given")
        return None, wanted
    if not backend.quantizers():
        raise PqkError(f"--precision {given}: backend {backend.name} has {', '.join(floats)} here")
    ptq = experiment.quant.ptq
    quantizer = chosen_quantizer(backend, asked.quantizer, ptq)
    made = lowered_to(backend.quantizers()[quantizer], ptq.bits_w, ptq.bits_a)
    if wanted != made:
        known = [*floats, made]
        raise PqkError(
            f"--precision {given}{nearest(wanted, known)}: backend {backend.name} with {quantizer} has here "
            f"{', '.join(known)}"
        )
    check_float_rest(experiment.quant.float_rest, backend)
    return quantizer, made


def split_digest(ctx: Context, experiment: Experiment, split: str, root: Path) -> str:
    """Returns the sha256 of a split's data, without the seeds; for a data folder, of its bytes and not its path."""
    seeds = experiment.workload.seeds.model_copy(update={"eval": 0})  # 0 draws a whole folder
    whole = replace(experiment, workload=experiment.workload.model_copy(update={"seeds": seeds}))
    part = experiment.family.data_part()
    return part.digest(split, whole.workload, lambda: open_split(ctx, whole, split, root).sha256)


def evaluate_seeds(
    asked: Asked,
    out: Path | None,
    root: Path,
    on_event: OnEvent,
    say: Callable[[Row, str], None],
    tell: Callable[[str], None] = lambda text: None,
) -> Path:
    """Measures the eval seeds that the file lacks, row by row, so that a killed run loses at most one seed.

    `out`: default: results/CHECKPOINT.CARD.BACKEND-PRECISION.tsv, for a card's own result results/CARD.BACKEND.tsv. A
    row is kept when it is of the same run and was measured by the same code. `say` gets each row with a note: kept, or
    why it was measured again; `tell` gets the messages of a card's run. Returns the file.
    Raises PqkError, before anything is measured, when the file holds rows of another workload or evaluation.
    """
    bench = Bench(asked, root, on_event, say=tell)
    if out is None and bench.checkpoint is None:
        tool = "-".join(word for word in (asked.backend, asked.quantizer) if word)
        out = root / "results" / f"{bench.known['card']}.{tool}.tsv"
    elif out is None:
        tool = "-".join(word for word in (asked.backend, bench.known["quantizer"], bench.known["precision"]) if word)
        out = root / "results" / f"{plain_name(bench.known['checkpoint'])}.{bench.known['card']}.{tool}.tsv"
    if out.suffix != ".tsv" or out.is_dir():
        raise PqkError(f"--out {out}: the name of a ledger ends in .tsv")
    check_writable(out.parent)
    there = read_rows(out) if out.exists() else []
    refuse_mixed([(out, there), (out, [bench.known])])
    bench.make()
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
        add_row(out, row, IDENTITY if bench.checkpoint is not None else RESULT)
        say(row, why)
    return out


def finalize_result(bench: Bench, name: str | None, root: Path) -> tuple[Checkpoint, bool]:
    """Keeps a card's own result in outputs/checkpoints/NAME. Returns it, and whether it is new.

    A float result is kept as by `finalize`; a quantized one with its graphs. `name`: default: the card, the train seed
    and eight digits of the digest.
    """
    bench.make()
    assert bench.made is not None
    known, candidate = bench.known, bench.made.candidate
    card, seed, digest = known["card"], known["train_seed"], known["checkpoint_sha256"]
    name = name or f"{plain_name(card)}-s{seed}-{digest[:8]}"
    if known["lowered"] is None:
        return finalize(candidate.model, root, name, seed, card)
    variant = bench.made.rows[-1].variant
    about = {
        "params": known["params"],
        "train_seed": seed,
        "card": card,
        "source": f"pqk run {card}, settings {known['settings'] or 'of the card'}",
        "result": {
            "backend": known["backend"],
            "quantizer": known["quantizer"],
            "precision": known["precision"],
            "lowered": known["lowered"],
            "float_sha256": known["float_sha256"],
        },
    }
    return keep_result(root, Path(candidate.model), known["float_sha256"], variant.graphs, about, name)


def measure_again(row: Row, checkpoint: Checkpoint, root: Path, on_event: OnEvent) -> Row:
    """Measures one row again from the checkpoint's bytes, without the project's store. Returns the row, not timed.

    A quantized result is measured from its kept graphs; its training and quantization are not repeated.
    Raises CheckFailed when the project has another workload, evaluation or engine than the row, and PqkError as `Bench`
    does.
    """
    asked = Asked(
        checkpoint.folder,
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
        raise PqkError(f"settings of the row are not a JSON object: {row['settings'][:80]!r}")
    return settings
