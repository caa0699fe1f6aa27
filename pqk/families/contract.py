"""Defines what a model family is: the modules that pqk asks for everything it does not know itself.

A family is a handful of plain modules. `Family` names them as text, so that nothing is imported before it is used, and
so that the key of an artifact holds the code of just those parts that made it: a changed metric runs no engine.

The heart is `predict`: the glue between the graphs, written once against a `call` that the runner injects.

| injected as `call` | gives |
| --- | --- |
| compiled engines | inference |
| torch modules | the reference of parity |
| engines and a stopwatch | time per graph and per sample |
| float engines and a recorder of graph g | calibration feeds of g |
| a counter | calls per sample: FLOPs, executed precision |

`learning`, `cutting` and `reducing` start as None: such a family has Q, parity, export, timing and the ledger, and none
of P, K and T. Without `view` its predictions are not drawn (`pqk show`). A family of settings and model alone has its
networks loaded and built, and no recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from pqk.errors import NotBuilt

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from pqk.data.scenes.scene import Scene
    from pqk.families.cutting import CuttingPart
    from pqk.families.reducing import ReducingPart
    from pqk.families.viewing import Boxes, Geometry
    from pqk.settings.evaluation import Evaluation
    from pqk.settings.quant import Quant
    from pqk.settings.training import Training
    from pqk.settings.workload import Workload

    Arrays = Mapping[str, np.ndarray]


class Call(Protocol):
    """Runs one graph. Engines, torch modules, a stopwatch or a recorder stand behind it; a family never knows which."""

    def __call__(
        self, graph: str, feeds: Mapping[str, Any], *, reuse: Hashable | None = None, stay: bool = False
    ) -> dict[str, Any]:
        """Returns the outputs of `graph` by name.

        reuse: calls of one graph with an equal `reuse` in one group have equal feeds, so scoring may answer from
        memory; the time of a sample never does. stay: the outputs only go into another graph and may stay on the
        device; without it they are numpy arrays.
        """
        ...


@dataclass(frozen=True)
class GraphSpec:
    """One exportable part of a model with static, named inputs and outputs.

    module: takes the inputs in the order of `input_names` and returns one tensor, or a tuple in the order of
    `output_names`. It shares its weights with the model it was taken from.
    inputs: example inputs: values as the model meets them, random and no two alike, so that a check of an export on
    them sees every operation. more: other such examples, for a graph whose inputs mean nothing once their values are
    shuffled, which the check would do otherwise.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    more: tuple[dict[str, Tensor], ...] = ()


@dataclass(frozen=True)
class GraphUse:
    """How a graph is used, known without a model.

    after: graphs whose outputs reach its inputs; of the others the recorder of calibration feeds computes nothing.
    every: the calibration samples 0, every, 2 every ... feed it. unit: what one feed is, in the plural.
    """

    name: str
    after: tuple[str, ...] = ()
    every: int = 1
    unit: str = "samples"


@dataclass(frozen=True)
class Sample:
    """What one score belongs to: a pair, a set of frames, an image.

    group: place of what intervals resample as a whole (the scene; of single images the image) in the set, from 0.
    name: unique in its group. inputs: only `predict` looks inside. truth: only `score` does; None without ground truth.
    """

    group: int
    name: str
    inputs: Any
    truth: Any = None


@dataclass(frozen=True)
class SampleSet:
    """The samples of one split, as plain data for a worker process.

    where: the files that `samples` opens; how: what else decides which samples they are. Both are plain JSON that only
    the family reads. groups: their names, in order. sha256: of everything that is read. truthful: the samples carry
    ground truth that a model is scored against. own: they are the user's, as opposed to generated. drawn: what the
    evaluation seed drew, in words; empty: nothing.
    """

    where: Mapping[str, Any]
    how: Mapping[str, Any]
    groups: tuple[str, ...]
    sha256: str
    truthful: bool
    own: bool = False
    drawn: str = ""

    @property
    def key(self) -> dict[str, Any]:
        """What decides the samples: the part of a cache key that stands for them."""
        return {"sha256": self.sha256, "how": dict(self.how), "truthful": self.truthful}

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for a worker process."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> SampleSet:
        return SampleSet(**{**data, "groups": tuple(data["groups"])})


class Calibration(Protocol):
    """Calibration samples by their place; each is decoded when it is asked for, and nothing is held in memory."""

    images: int  # that the samples hold in all

    def __getitem__(self, index: int) -> Sample: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Given:
    """Data named on the command line in place of the workload's: with ground truth, or pictures alone.

    scenes, images: test samples. train_scenes, train_images: what is learned from.
    """

    scenes: Path | None = None
    images: Path | None = None
    train_scenes: Path | None = None
    train_images: Path | None = None


class Maker(Protocol):
    """Makes or reuses generated data.

    split: what the terminal calls it. inputs: everything that decides it, plain JSON. modules: the code that makes it.
    write: fills an empty folder. Returns the folder and the sha256 of its files.
    """

    def __call__(
        self, split: str, inputs: Mapping[str, Any], modules: tuple[str, ...], write: Callable[[Path], object], /
    ) -> tuple[Path, str]: ...


@dataclass(frozen=True)
class Metric:
    """A quality metric.

    unit: '' for a ratio. better: which way it improves. perfect: its best value. drops: where the Teacher plays the
    truth, the distance from `perfect` is itself a relative loss, see `loss_pct` (AbsRel 0.02 against the Teacher's
    output is a drop of 2 %). threshold: name of the line in eval.yaml's `thresholds` that its rise above the Teacher's
    must stay below, and meaning: what it tells; None: not judged beside the main metric. guard: its relative loss is
    judged where a recipe spares work (T), which the main metric may not show. parts: columns that come with it.
    """

    name: str
    unit: str
    better: Literal["lower", "higher"]
    perfect: float
    drops: bool = False
    threshold: str | None = None
    meaning: str = ""
    guard: bool = False
    parts: tuple[str, ...] = ()

    def loss(self, value: float) -> float:
        """Returns how far a value is from the best one, in the metric's unit; negative beyond it."""
        return self.perfect - value if self.better == "higher" else value - self.perfect

    def loss_pct(self, value: float) -> float:
        """Returns `loss` in percent of the best value, of 1 where that is 0."""
        return 100 * self.loss(value) / (abs(self.perfect) or 1.0)


class SettingsPart(Protocol):
    """The family's sections of the configuration files. Imports nothing heavy."""

    Workload: type[Workload]  # of workload.yaml: shapes, pairs or frames or steps, scene lists
    Evaluation: type[Evaluation]  # of eval.yaml: the options of its metrics, its own thresholds
    Quant: type[Quant]  # of quant.yaml: its own groups for the keep-list, its own settings of calibration
    GRAPHS: tuple[GraphUse, ...]  # in the order of first use
    METRICS: tuple[Metric, ...]  # the first is the default main metric
    NAMED: Mapping[str, Mapping[str, Any]]  # configurations that `random:NAME` builds
    SIGN: str | None  # a weight that all checkpoints of the family have and no other family's; None: not told by one
    KINDS: tuple[str, ...]  # kinds of the parts of a network, in the order of a table
    ATTENTION: tuple[str, ...]  # keep-list entries of the matmuls of attention
    PATCH: int  # sides of images are multiples of it
    LAST_LAYERS: tuple[str, ...]  # keep-list entries of the layers whose errors reach the outputs undamped

    def part_of(self, name: str) -> tuple[str, str] | None:
        """Returns part and kind of a weight or of a graph's node; None for what is in no named part."""
        ...


class ModelPart(Protocol):
    """Builds the model, reads official checkpoints, splits the model into graphs."""

    LAYOUT: str | None  # what an official checkpoint holds, for a message; None: there are none
    UNDONE: Mapping[str, Any]  # training-only settings of stored configurations, and what they are set to here

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """Returns an empty model with the attributes `family` and `config`. Raises PqkError that names the key."""
        ...

    def initialize(self, model: nn.Module, generator: torch.Generator | None = None) -> None:
        """Fills every parameter with fresh random weights."""
        ...

    def adapt(self, weights: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
        """Returns weights under the model's own names, which are `expected`; foreign keys are left out."""
        ...

    def may_lack(self, key: str) -> bool:
        """Whether a checkpoint may lack this weight, because no result depends on it."""
        ...

    def official(self, content: Any) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Returns configuration and weights of a loaded official checkpoint; None when it is another family's.

        content: what a pickle held, or bare weights by name, also on the meta device: shapes without values. Raises
        PqkError without the file's name, which the caller adds.
        """
        ...

    def graphs(self, model: nn.Module, workload: Workload) -> dict[str, GraphSpec]:
        """Returns the exportable parts by name, in the order of `GRAPHS`."""
        ...


class PredictPart(Protocol):
    """Runs one sample through the graphs."""

    def predict(self, call: Call, sample: Sample, workload: Workload, seed: int) -> Arrays:
        """Returns the prediction of one sample, with whatever loop, noise and post-processing the family has."""
        ...

    # Optional: def calibrated(graph: str, feeds: Feeds, ptq: Mapping[str, Any]) -> Feeds
    # Returns what the graph is calibrated on in place of the feeds that `predict` gave it. ptq: section of quant.yaml.


class DataPart(Protocol):
    """Where samples come from. Splits are train, validation, calibration and test; no sample is in two of them."""

    SEED_DRAWS: Literal["samples", "noise"]  # what an evaluation seed changes

    def open_split(
        self,
        split: str,
        workload: Workload,
        root: Path,
        make: Maker,
        given: Given = ...,
        first: int = 0,
        count: int | None = None,
    ) -> SampleSet:
        """Returns the samples of a split: generated by `make`, or read from the workload's or the given folders.

        The test split is what the workload's eval seed draws. The split 'train' of generated data is made as it is
        learned from, so its set is empty; of a folder, `drawn` says how much is learned from and how much is held out.
        first, count: only these groups of generated data, beyond the workload's own (`--decide` adds some). Raises
        PqkError in one sentence for what a user must fix, before anything long begins.
        """
        ...

    def samples(self, found: SampleSet, workload: Workload, seed: int) -> Iterable[Sample]:
        """Yields samples in a fixed order, groups in theirs, decoded one at a time.

        seed: of the evaluation, for what it draws in reading (crops). Raises PqkError.
        """
        ...

    def most(self, found: SampleSet, workload: Workload) -> int:
        """Returns how many samples there are at most, without decoding any."""
        ...

    def calibration(self, found: SampleSet, workload: Workload, images: int) -> Calibration:
        """Returns the first calibration samples that hold `images` images. Raises PqkError where there are fewer."""
        ...

    def timed(self, found: SampleSet, workload: Workload, images: int | None = None) -> Sequence[Sample]:
        """Returns the samples of one group as they are timed; what is in a picture moves no time.

        images: that the group has; default: as many as the family times. Raises PqkError where the set has fewer.
        """
        ...

    def example(self, workload: Workload) -> Sample:
        """Returns a sample of random numbers, always the same, in the shape of real ones."""
        ...

    def can_grow(self, workload: Workload, given: Given) -> bool:
        """Whether more test groups can be made: generated ones can, those of a folder are all there are."""
        ...

    def refuse_overlap(self, sets: Mapping[str, SampleSet]) -> None:
        """Raises PqkError when two of the user's splits share a sample."""
        ...

    def digest(self, split: str, workload: Workload, sha256: Callable[[], str]) -> str:
        """Returns a sha256 of what a split ('test' or 'calibration') is fed, seeds aside.

        Generated data counts as it is generated, data in a folder by `sha256()` of its content and not by its place.
        """
        ...


class ScoringPart(Protocol):
    """Scores predictions. No engine runs here."""

    OUTPUTS: Mapping[str, Literal["points", "values"]]  # of `predict`, and how those of two runtimes are compared

    def score(self, prediction: Arrays, sample: Sample, options: Mapping[str, Any], seed: int) -> dict[str, Any] | None:
        """Returns the evidence of one sample, plain JSON; None when it has too little truth to be scored.

        A number is a metric of the sample, None one that it does not have; anything else is for `complete` and
        `summarise` alone. options: section `quality` of eval.yaml. Raises PqkError for a prediction that cannot be
        scored.
        """
        ...

    def needs(self, options: Mapping[str, Any]) -> str:
        """Returns what a sample must hold to be scored, for the end of a sentence."""
        ...

    def as_truth(self, prediction: Arrays, sample: Sample, config: Mapping[str, Any]) -> Sample:
        """Returns the sample with a prediction of the Teacher (of configuration `config`) in place of the truth."""
        ...

    def floor(self, sample: Sample, options: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the evidence of a predictor that ignores its input: the floor that any model must beat."""
        ...

    def summarise(self, evidence: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
        """Returns all metrics of a list of evidence, which `complete` has seen where there is one."""
        ...

    # Optional: def complete(evidence: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]
    # For metrics that are no mean over samples. Returns the evidence of all samples of a set with a value of each such
    # metric per sample, whose mean is that of the set (`pqk.stats.jackknife`). Values of an earlier call are replaced.


Join = Callable[..., "Tensor"]
"""(values, axis=0, orders=1) -> those of the whole batch. axis: of the samples, which come `orders` times in a row."""


class Batches(Protocol):
    """The batches of one training. Each can be asked for at any time: a resumed run sees what an undisturbed one would.

    truthful: batches carry ground truth; without it the Teacher's outputs take its place (`LearningPart.as_truth`).
    """

    truthful: bool

    def train(self, index: int, count: int, size: int) -> Any:
        """Returns batch number `index` of the training samples: `count` of them, of size x size pixels."""
        ...

    def held_out(self, pairs: int | None = None, size: int | None = None, batch: int | None = None) -> Iterator[Any]:
        """Yields the samples that a training is judged on: always the same ones, which no training batch holds.

        pairs, size, batch: how many, of size x size pixels, and how many at once; default: as the settings say.
        """
        ...


class LearningPart(Protocol):
    """What P, K, QAT and PQK need: batches, a forward over the graphs' modules, losses, metrics of held-out samples."""

    # names of the losses: task, kl, features, imitation; probe: what is cut by without truth; match, where a family has
    # it: what attention finds in other frames, for which `forward` watches 'match'; sampler: what a sampler of many
    # steps finds, for which `forward` watches `SamplerLoss.watched`
    TERMS: tuple[str, ...]
    UNIT: str  # what a batch holds, in the plural
    SOURCE: str  # of generated batches, for the card of a model that was trained on them
    REMEDY: str  # what helps where no held-out sample has anything to score, for the end of a message

    def parts(self, model: nn.Module) -> dict[str, nn.Module]:
        """Returns the modules of all graphs of a model, by name; they share its weights and take any size."""
        ...

    def as_exported(self, parts: Mapping[str, nn.Module], workload: Workload) -> None:
        """Sets modules that `forward` ran at other sizes back to the static shapes of the workload."""
        ...

    def batches(
        self,
        asked: Training,
        device: torch.device,
        *,
        seed: int,
        held_seed: int,
        found: SampleSet | None = None,
        workload: Workload | None = None,
    ) -> Batches:
        """Returns the batches of a training.

        asked: its settings, with those of the held-out samples. seed: draws the training batches, held_seed the
        held-out ones. found: the split 'train' (None: generated), read as `workload` says. Raises PqkError.
        """
        ...

    def forward(self, parts: Mapping[str, nn.Module], batch: Any, watched: Any = None) -> dict[str, Any]:
        """Returns the outputs for a batch. parts: the graphs' modules, plain, gated or rounding.

        watched: what else is kept, under 'features'; see `features`.
        """
        ...

    def losses(
        self,
        out: Mapping[str, Any],
        batch: Any,
        teacher: Mapping[str, Any] | None,
        terms: Collection[str],
        options: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """Returns the losses that are asked for, each a scalar. teacher: the Teacher's outputs for the batch.

        options: alpha (weight of the confidence in a loss), and for kl and features temperature and bridges.
        """
        ...

    def features(self, teacher: nn.Module, student: nn.Module, seed: int) -> tuple[Any, Any, nn.ModuleDict]:
        """Returns what to watch in the Teacher and in the student, and learned maps where their widths differ."""
        ...

    def as_truth(self, batch: Any, out: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
        """Returns the batch with outputs of the Teacher (of configuration `config`) in place of the truth."""
        ...

    def score(self, out: Mapping[str, Any], batch: Any) -> list[list[dict[str, float]]]:
        """Returns the metrics of each sample of a held-out batch, once for each time that it was predicted.

        They are named and computed as in the evaluation, the first of `METRICS` among them. A sample without anything
        to score has an empty list; predictions that the evaluation refuses get the worst value, or NaN.
        """
        ...

    # Optional: complete, that of the scoring part; `score` and `floor` then return evidence of this form. compiled: the
    # parts under torch.compile, of a family whose `forward` cannot be traced as a whole. borrowed: by the name of
    # another family, a function from the weights of its networks to those that a training of this one can begin with.
    # For trainings in several processes: samples(batch) -> their number; share(batch, first, last) -> a batch of these
    # samples for `forward`, without a truth that it does not need; joined(out, join: Join) -> those of the whole batch.

    def shift(self, out: Mapping[str, Any], uncut: Mapping[str, Any], batch: Any) -> float:
        """Returns the mean relative distance of a cut network's outputs to those of the uncut one, over a batch."""
        ...

    def floor(self, batch: Any) -> list[list[dict[str, float]]]:
        """Returns what `score` would of a predictor that ignores its input."""
        ...

    def distance(self, out: Mapping[str, Any], teacher: Mapping[str, Any], options: Mapping[str, Any]) -> list[float]:
        """Returns the loss 'imitation' of each sample of a batch by itself."""
        ...

    def same_network(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether weights of one configuration mean the same in the other."""
        ...


class ExportPart(Protocol):
    """What a deployment bundle holds beside graphs and manifest."""

    def about_inputs(self, workload: Workload) -> dict[str, Any]:
        """Returns the entries of the manifest that say how inputs are made."""
        ...

    def sample_source(self, runtime: str, workload: Workload) -> str:
        """Returns a script that runs the bundle without pqk, for 'openvino' or 'onnxruntime'."""
        ...


class ViewPart(Protocol):
    """What is drawn of a family's predictions."""

    def samples(self, scene: Scene, workload: Any, most: int) -> tuple[Any, list[Sample]]:
        """Returns samples that together show the first `most` pictures of a scene, and the workload that feeds them.

        The workload is the given one, or differs in how many pictures are fed at once. Raises PqkError for fewer
        pictures than can be shown, two where they are seen in depth, and for what their files raise.
        """
        ...

    def view(self, samples: Sequence[Sample], predictions: Sequence[Mapping[str, np.ndarray]]) -> Geometry | Boxes:
        """Returns what the predictions of `samples` say. Raises PqkError where nothing can be seen in them."""
        ...


@dataclass(frozen=True)
class Family:
    """A family by the modules of its parts, each given as 'package.module'.

    The modules hold what the protocols of this file name; one module may serve as several parts.
    """

    name: str
    settings: str
    model: str
    predict: str | None = None
    data: str | None = None
    scoring: str | None = None
    learning: str | None = None
    cutting: str | None = None
    reducing: str | None = None
    export: str | None = None
    vectors: str | None = None
    view: str | None = None

    def settings_part(self) -> SettingsPart:
        return cast(SettingsPart, import_module(self.settings))

    def model_part(self) -> ModelPart:
        return cast(ModelPart, import_module(self.model))

    def predict_part(self) -> PredictPart:
        """Raises NotBuilt (exit code 3) for a family that has no such part, as the next two do."""
        return cast(PredictPart, self._needed("predict"))

    def data_part(self) -> DataPart:
        return cast(DataPart, self._needed("data"))

    def scoring_part(self) -> ScoringPart:
        return cast(ScoringPart, self._needed("scoring"))

    def check_runs(self) -> None:
        """Raises NotBuilt (exit code 3) for a family whose models are built and loaded only."""
        lacking = [part for part in ("predict", "data", "scoring") if getattr(self, part) is None]
        if lacking:
            raise NotBuilt(
                f"models of the family {self.name} can be loaded and built, but not run in recipes yet: "
                f"the family has no part {' or '.join(lacking)}"
            )

    def _needed(self, part: str) -> Any:
        self.check_runs()
        return import_module(getattr(self, part))

    def learning_part(self) -> LearningPart:
        """Raises NotBuilt (exit code 3) for a family that cannot be trained."""
        if self.learning is None:
            raise NotBuilt(f"models of the family {self.name} cannot be trained here: it has no learning part")
        return cast(LearningPart, import_module(self.learning))

    def cutting_part(self) -> CuttingPart:
        assert self.cutting is not None
        return cast("CuttingPart", import_module(self.cutting))

    def reducing_part(self) -> ReducingPart:
        assert self.reducing is not None
        return cast("ReducingPart", import_module(self.reducing))

    def export_part(self) -> ExportPart | None:
        return None if self.export is None else cast(ExportPart, import_module(self.export))

    def view_part(self) -> ViewPart:
        """Raises NotBuilt (exit code 3) for a family whose predictions are not drawn."""
        if self.view is None:
            raise NotBuilt(f"predictions of the family {self.name} cannot be drawn here: it has no view part")
        return cast(ViewPart, import_module(self.view))


def completed(part: ScoringPart | LearningPart, evidence: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the evidence of all samples of a set with the metrics that only the set as a whole has.

    These are the columns of `complete`, where the part has that function.
    """
    complete = getattr(part, "complete", None)
    return [dict(row) for row in evidence] if complete is None else complete(evidence)
