"""Keys of artifacts hold all code that makes them and nothing else, and no result of other code is kept.

Every file of pqk and backends is edited in turn, as it is read for the key of each stage; some in a copy of the tree.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from run_toys import REPOSITORY, environment, scene_samples

from backends.base import Graph, Precision
from backends.openvino.pieces import OpenVINOPieces
from pqk.bench.predict_speed import Table
from pqk.engines.variant import Variant
from pqk.errors import PqkError
from pqk.families.registry import family
from pqk.recipe import ranking, stages, training
from pqk.recipe.block_profile import changes
from pqk.recipe.experiment import resolve
from pqk.recipe.joint import join
from pqk.recipe.request import PACKAGES, Model
from pqk.recipe.stages import Context, Learn
from pqk.settings.card import load_card
from pqk.store import worker
from pqk.store.code import Reader, Top, closure, code_of, digest, refuse_other
from pqk.store.sources import source_of
from pqk.store.store import Artifact, Store

pytest.importorskip("openvino")

EVERY = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    for folder in ("pqk", "backends")
    for path in (REPOSITORY / folder).rglob("*.py")
)
VERSIONS = dict.fromkeys(("torch", "numpy", "scipy", "pillow", "onnx", "onnxscript", "openvino"), "1")


class Asked(Exception):
    """Ends a stage when its key is known."""


class Recorder(Context):
    """A context that makes nothing, and knows which code and inputs the stages ask for."""

    def __init__(self, versions: Mapping[str, str] | None = None, wanted: str | None = None) -> None:
        """wanted: a stage whose key another one asks for, the last time; None for the first one that is to be made."""
        machine = {"device": "a CPU", "versions": dict(versions or VERSIONS)}
        super().__init__(Store(Path("unused")), lambda *event: None, machine)
        self.modules: tuple[str, ...] = ()
        self.inputs: dict[str, Any] = {}
        self.wanted = wanted

    def key(self, stage: str, modules: tuple[str, ...], inputs: Mapping[str, Any]) -> str:
        if stage == self.wanted:
            self.modules, self.inputs = modules, dict(inputs)
        return super().key(stage, modules, inputs)

    def make(
        self, stage: str, modules: tuple[str, ...], inputs: Mapping[str, Any], *rest: Any, **more: Any
    ) -> Artifact:
        if self.wanted is None:
            self.modules, self.inputs = modules, dict(inputs)
        raise Asked


def graph(name: str, suffix: str = ".onnx") -> Graph:
    return Graph(Path(name + suffix), (), (), name)


def variant(precision: Precision = Precision.F32, backend: str = "openvino") -> Variant:
    return Variant(str(precision), backend, precision, GRAPHS)


GRAPHS = {"encoder": graph("encoder"), "decoder": graph("decoder")}
SAMPLES = scene_samples([Path("scene")])
TEACHER = Model("teacher", "teacher", "sha")


def _experiment(card: str = "B1") -> Any:
    return resolve(load_card(card, REPOSITORY), REPOSITORY)


def _quantize(ctx: Context, learn: bool, quantizer: str = "nncf") -> Any:
    spec, lines = {"epochs": 1}, {"line_pct": 1.0}
    asked = Learn(spec, 0, lines, lines, SAMPLES.to_json(), SAMPLES.key, None) if learn else None
    return stages.quantize(ctx, _experiment(), "openvino", quantizer, "model", GRAPHS, SAMPLES, asked)


def _scenes(ctx: Context) -> Any:
    return stages.open_split(ctx, _experiment(), "test", Path("unused"))


def _scores(ctx: Context) -> Any:
    return stages.quality(ctx, _experiment(), variant(Precision.INT8), variant(), SAMPLES, {}, ["Softmax"])


def _joint(ctx: Context) -> Any:
    return join(ctx, _experiment("G1"), "openvino", "nncf", TEACHER, GRAPHS, SAMPLES, SAMPLES)


def _pieces(ctx: Context) -> Any:
    part = SimpleNamespace(key="sha", words="a part")
    return Table(ctx, "openvino", OpenVINOPieces(), Precision.F32, [part], 0.25).times(part)


STAGES: dict[str, Callable[[Context], Any]] = {
    "scenes": _scenes,
    "graphs": lambda ctx: stages.export_graphs(ctx, _experiment(), None, "sha"),  # type: ignore[arg-type]
    "prune": lambda ctx: training.train_stages(ctx, _experiment("C1"), TEACHER, SAMPLES),
    "distill": lambda ctx: training.train_stages(ctx, _experiment("A1"), TEACHER, SAMPLES),
    "joint": _joint,
    "quantize": lambda ctx: _quantize(ctx, False),
    "quantize inc": lambda ctx: _quantize(ctx, False, "inc"),
    "qat": lambda ctx: _quantize(ctx, True),
    "predictions": lambda ctx: _scores(ctx),
    "scores": lambda ctx: _scores(ctx),
    "timing": lambda ctx: stages.timing(ctx, _experiment(), [variant()], SAMPLES),
    "pieces": _pieces,
    "memory": lambda ctx: stages.memory(ctx, _experiment(), variant()),
    "parts": lambda ctx: changes(ctx, _experiment(), variant(), variant(), TEACHER, TEACHER),
}


ENGINES = ("predictions", "timing", "memory", "parts", "quantize")
"""Stages that run the family's `predict`, and neither its metrics nor its losses."""
MEASURING = ("predictions", "scores", "timing", "memory")


@pytest.fixture(scope="module")
def asked() -> dict[str, Recorder]:
    """For every stage what it asks the store for."""
    found = {}
    for name in STAGES:
        found[name] = recorded(name)
    return found


def recorded(stage: str, versions: Mapping[str, str] | None = None) -> Recorder:
    found = Recorder(versions, "predictions" if stage == "predictions" else None)
    with pytest.raises(Asked):
        STAGES[stage](found)
    return found


def edited(module: str, change: Callable[[bytes], bytes]) -> Reader:
    def read(name: str) -> bytes | None:
        source = source_of(name)
        return change(source) if name == module and source is not None else source

    return read


def with_code(source: bytes) -> bytes:
    return source + b"\nADDED = 1\n"


def with_prose(source: bytes) -> bytes:
    """Another docstring, a comment, an empty line, and a text that stands for itself."""
    other = re.sub(rb'^("""|\'\'\')', rb"\1Once more. ", source)
    return b"# A comment.\n\n" + other + b'\n"""A remark."""  # and another one\n'


@pytest.mark.parametrize("stage", STAGES)
def test_every_file_of_a_stage_is_in_its_key_and_no_other(asked: Mapping[str, Recorder], stage: str) -> None:
    modules = asked[stage].modules
    inside, before = set(closure(*modules)), code_of(*modules)
    assert 5 < len(inside) < len(EVERY) / 2 and inside <= set(EVERY)
    for module in EVERY:
        changed = code_of(*modules, read=edited(module, with_code)) != before
        assert changed == (module in inside), module
    for module in inside:
        assert code_of(*modules, read=edited(module, with_prose)) == before, module


@pytest.mark.parametrize(
    ("stage", "module"),
    [
        ("graphs", "pqk.families.checkpoint"),
        ("graphs", "pqk.families.registry"),
        ("graphs", "pqk.families.build"),
        ("graphs", "pqk.families.dust3r.build"),
        ("graphs", "pqk.families.dust3r.model"),
        ("prune", "pqk.families.checkpoint"),
        ("distill", "pqk.families.dust3r.model"),
        ("prune", "pqk.compress.train.stop_rules"),
        ("distill", "pqk.compress.train.stop_rules"),
        ("joint", "pqk.compress.train.stop_rules"),
        ("qat", "pqk.compress.train.stop_rules"),
        ("predictions", "backends.openvino.backend"),
        ("predictions", "backends.openvino.keep"),  # which checks the keep-list in the engine
        ("quantize inc", "pqk.families.dust3r.model"),  # it starts from the module
        ("qat", "pqk.families.dust3r.model"),
        ("scenes", "pqk.data.render.generate"),
        ("scores", "pqk.families.dust3r.scoring"),
        ("scores", "pqk.families.metrics.geometry"),
        ("scores", "pqk.families.dust3r.data"),  # the truth is read again
        *((stage, "pqk.families.dust3r.predict") for stage in (*ENGINES, "qat")),
        *((stage, "pqk.families.dust3r.data") for stage in (*ENGINES, "qat")),
        *((stage, "pqk.families.dust3r.settings") for stage in (*ENGINES, "qat", "scores")),
        *((stage, "pqk.engines.calls") for stage in ENGINES),
        ("parts", "pqk.families.dust3r.parts"),
        ("prune", "pqk.families.dust3r.learning"),
        ("prune", "pqk.families.dust3r.cutting"),
        ("distill", "pqk.families.dust3r.learning"),
        ("joint", "pqk.families.dust3r.learning"),
    ],
)
def test_what_decides_a_result_is_in_its_key(asked: Mapping[str, Recorder], stage: str, module: str) -> None:
    assert module in closure(*asked[stage].modules)


@pytest.mark.parametrize(
    ("stage", "module"),
    [
        ("qat", "pqk.measure.timing"),
        ("qat", "pqk.compress.cut.student"),
        ("qat", "pqk.recipe.stages"),
        ("joint", "pqk.measure.evaluate"),
        ("predictions", "pqk.measure.scoring"),
        ("predictions", "pqk.families.dust3r.scoring"),
        ("prune", "pqk.compress.distill"),
        ("distill", "pqk.compress.cut.prune"),
        ("timing", "backends.openvino.nncf"),
        ("quantize", "pqk.families.dust3r.model"),  # it starts from the graph
        *((stage, "pqk.families.dust3r.scoring") for stage in ENGINES),
        *((stage, "pqk.families.metrics.geometry") for stage in ENGINES),
        *((stage, "pqk.families.dust3r.losses") for stage in (*MEASURING, "quantize")),
        *((stage, "pqk.families.dust3r.learning") for stage in (*MEASURING, "quantize")),
        *((stage, "pqk.families.dust3r.cutting") for stage in (*MEASURING, "quantize")),
        *((stage, "pqk.families.dust3r.export") for stage in STAGES),
        ("timing", "pqk.measure.scoring"),
        ("memory", "pqk.measure.scoring"),
        ("scenes", "pqk.families.dust3r.model"),
    ],
)
def test_what_a_stage_does_not_use_is_not_in_its_key(asked: Mapping[str, Recorder], stage: str, module: str) -> None:
    assert module not in closure(*asked[stage].modules)


@pytest.mark.parametrize("stage", ["scenes", "graphs", "prune", "distill", "joint", "qat", "predictions", "scores"])
def test_another_torch_is_another_key(asked: Mapping[str, Recorder], stage: str) -> None:
    other = recorded(stage, {**VERSIONS, "torch": "2"})
    assert other.inputs != asked[stage].inputs


@pytest.mark.parametrize("stage", [name for name in STAGES if name not in ("scenes", "scores")])
def test_tools_that_a_stage_computes_with_are_in_its_key(stage: str) -> None:
    """What its code imports of other packages is in the key by version, or only reads, checks, watches and draws."""
    asked = recorded(stage, dict.fromkeys(PACKAGES, "1"))
    used = {
        name.partition(".")[0]
        for source in closure(*asked.modules).values()
        for node in ast.walk(ast.parse(source))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
    }  # fmt: skip
    used -= {
        *sys.stdlib_module_names,
        "pqk",
        "backends",
        "yaml",
        "pydantic",
        "pydantic_core",
        "safetensors",
        "rich",
        "psutil",
        "filelock",
        "pycolmap",  # gives what the own reader gives
    }
    names = {"PIL": "pillow", "torch_pruning": "torch-pruning", "neural_compressor": "neural-compressor-pt"}
    known = asked.inputs.get("versions") or asked.inputs.get("machine", {}).get("versions")
    if known is None:  # a measurement of several variants: each has its machine
        known = asked.inputs["variants"][0]["machine"]["versions"]
    assert {names.get(name, name) for name in used} <= set(known)


def test_code_of_a_task_is_in_the_key_of_what_it_makes(asked: Mapping[str, Recorder]) -> None:
    """The module that the worker resolves is one of those whose code is hashed."""
    for stage, found in asked.items():
        name = stage.split()[0]
        if name in worker.TASKS:
            assert worker.TASKS[name].partition(":")[0] in found.modules, stage
    assert {worker.TASKS[name].partition(":")[0] for name in ("parted", "ranking", "mixed")} == set(ranking._CODE)


def test_prose_and_code() -> None:
    """What a text may say without another key, and what it may not."""
    plain = textwrap.dedent('''
        """A module."""
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            import torch
        WIDTH = 3
        """How wide it is."""
        class Box:
            """A box."""
            def size(self) -> int:
                "Its size."
                return WIDTH  # in metres
        ''')
    for old, new in [("A module.", "Another."), ("import torch", "import numpy"), ("How wide", "The width"),
                     ("A box.", "A thing."), ('"Its size."', ""), ("  # in metres", ""), ("= 3", "=  3")]:  # fmt: skip
        assert digest(plain.replace(old, new).encode()) == digest(plain.encode()), old
    for old, new in [("WIDTH = 3", "WIDTH = 4"), ("return WIDTH", "return -WIDTH"), ("-> int", "-> float"),
                     ("class Box", "class Bag"), ("from typing", "import os\nfrom typing")]:  # fmt: skip
        assert digest(plain.replace(old, new).encode()) != digest(plain.encode()), old
    assert digest(b"this is no Python") != digest(b"this is  no Python")


def test_imports_are_followed_wherever_they_are() -> None:
    """In functions and branches, by a relative name, through a package; not those for the type checker only."""
    sources = {
        "toy": b"",
        "toy.a": b"def f():\n    try:\n        from . import b\n    except ImportError:\n        pass\n",
        "toy.b": b"if True:\n    from .c import thing\n",
        "toy.c": b"import typing\nif typing.TYPE_CHECKING:\n    import toy.d\nelse:\n    import toy.e as e\n",
        "toy.d": b"",
        "toy.e": b"",
    }
    assert set(closure("toy.a", read=sources.get)) == {"toy", "toy.a", "toy.b", "toy.c", "toy.e"}
    assert set(closure(Top("toy.a"), read=sources.get)) == {"toy", "toy.a"}
    assert set(closure(Top("toy.a"), "toy.a", read=sources.get)) == {"toy", "toy.a", "toy.b", "toy.c", "toy.e"}
    with pytest.raises(PqkError, match=r"module toy\.x has no source file"):
        code_of("toy.x", read=sources.get)


def test_other_code_is_refused() -> None:
    refuse_other("timing", {"a": "1", "b": "2"}, {"b": "2", "c": "3"})  # neither hashed nor loaded: no matter
    with pytest.raises(PqkError) as caught:
        refuse_other("timing", {"a": "1", "b": "2"}, {"a": "9", "b": "8"})
    assert str(caught.value) == (
        "the code changed while the timing process ran (a and 1 more): its result is not kept, run again"
    )


# In a copy of the tree


TOY = 'LENGTH = 3  # metres\n\n\ndef work(request):\n    {extra}\n    return {{"length": LENGTH}}\n'
PARENT = """
import sys
from pathlib import Path
from pqk.errors import PqkError
from pqk.store import worker
from pqk.store.code import code_of
toy = Path(worker.__file__).with_name("toy.py")
code_of("pqk.store.toy")
exec(sys.argv[1])
try:
    print(worker.call("timing", {})["length"])
except PqkError as error:
    print(error)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the packages whose task 'timing' is a toy that imports nothing heavy."""
    ignored = shutil.ignore_patterns("__pycache__")
    for package in ("pqk", "backends"):
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=ignored)
    path = tmp_path / "pqk" / "store" / "worker.py"
    text = path.read_text("utf-8")
    assert text.count("pqk.measure.timing:time_variants") == 1
    path.write_text(text.replace("pqk.measure.timing:time_variants", "pqk.store.toy:work"), "utf-8")
    (tmp_path / "pqk" / "store" / "toy.py").write_text(TOY.format(extra="pass"))
    return tmp_path


def ran(tree: Path, script: str, *arguments: str) -> str:
    variables = environment() | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-P", "-c", script, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True, cwd=tree).stdout.strip()


REFUSED = "the code changed while the timing process ran (pqk.store.toy): its result is not kept, run again"


@pytest.mark.parametrize(
    ("before", "answer"),
    [
        ("pass", "3"),
        ("toy.write_text(toy.read_text().replace('3', '4'))", REFUSED),  # hashed, then edited, then run
        ("toy.write_text(toy.read_text().replace('metres', 'feet'))", "3"),  # a comment
    ],
)
def test_a_file_edited_between_key_and_work(tree: Path, before: str, answer: str) -> None:
    assert ran(tree, PARENT, before) == answer


@pytest.mark.parametrize(
    ("extra", "answer"),
    [
        # what is loaded already is what runs, and it is what was hashed
        ('import pathlib; pathlib.Path(__file__).write_text("LENGTH = 5")', "3"),
        # what is loaded later is not: the worker loads it edited, and its parent notices
        ('import pathlib; p = pathlib.Path(__file__).with_name("device_hours.py"); p.write_text("A = 1"); '
         "import pqk.store.device_hours", REFUSED.replace("store.toy", "store.device_hours")),
    ],
)  # fmt: skip
def test_a_file_edited_while_its_worker_runs(tree: Path, extra: str, answer: str) -> None:
    (tree / "pqk" / "store" / "toy.py").write_text(TOY.format(extra=extra))
    assert ran(tree, PARENT, "pass") == answer


def test_a_process_runs_what_it_has_hashed(tree: Path) -> None:
    """Also its own modules: hashed first and loaded after an edit, or loaded first and hashed after one."""
    script = """
    from pathlib import Path
    import pqk
    from pqk.store.sources import keep_sources
    keep_sources()
    from pqk.store.code import code_of
    toy = Path(pqk.__file__).with_name("store") / "toy.py"
    old = toy.read_text()
    first = code_of("pqk.store.toy")
    toy.write_text(old.replace("3", "44"))
    from pqk.store.toy import LENGTH
    assert LENGTH == 3
    import pqk.errors, pqk.paths
    paths = Path(pqk.paths.__file__)
    text = paths.read_text()
    paths.write_text("changed = 1")
    kept = code_of("pqk.paths")
    paths.write_text(text)
    print(first, kept)
    """
    first, kept = ran(tree, textwrap.dedent(script)).split()
    (tree / "pqk" / "store" / "toy.py").write_text(TOY.format(extra="pass"))
    again = "import sys\nfrom pqk.store.code import code_of\nprint(code_of(sys.argv[1]))"
    assert (first, kept) == (ran(tree, again, "pqk.store.toy"), ran(tree, again, "pqk.paths"))


def test_an_edited_loader_makes_new_graphs(tree: Path) -> None:
    """On the disk, not as it is read: the loader that decides which weights a graph gets, and its docstring."""
    script = "import sys\nfrom pqk.store.code import code_of\nprint(code_of(*sys.argv[1:]))"
    code = (*stages.LOADER_CODE, *stages.parts_code(family("dust3r"), "model"))
    before = ran(tree, script, *code)
    path = tree / "pqk" / "families" / "build.py"
    text = path.read_text("utf-8")
    for old, new, same in [
        ("Give the model copies of the weights", "Hand the model copies of the weights", True),
        ("given = dict(weights)", "given = dict(sorted(weights.items()))", False),
    ]:
        assert text.count(old) == 1
        path.write_text(text.replace(old, new), "utf-8")
        assert (ran(tree, script, *code) == before) is same, new


def test_a_module_is_parsed_once_and_never_by_what_it_said_before(tree: Path) -> None:
    """What one process has found in the sources, the next one reads, unless it is damaged."""
    script = """
    import ast
    parse, parsed = ast.parse, []
    ast.parse = lambda source: parsed.append(source) or parse(source)
    from pqk.store.code import code_of
    print(code_of("pqk.store.worker"), len(parsed))
    """
    code, count = ran(tree, textwrap.dedent(script)).split()
    assert int(count) > 10
    assert ran(tree, textwrap.dedent(script)).split() == [code, "0"]
    (kept,) = (tree / "pqk" / "store" / "__pycache__").glob("facts.*.json")
    kept.write_text(kept.read_text()[:-9])
    assert ran(tree, textwrap.dedent(script)).split() == [code, count]
    toy = tree / "pqk" / "store" / "progress.py"
    toy.write_text(f"{toy.read_text()}MORE = 1\n")
    other, edited = ran(tree, textwrap.dedent(script)).split()
    assert other != code and edited == "1"
