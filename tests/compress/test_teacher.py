"""Training a Teacher: how it is scored, what is shipped, what is refused, and two processes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from training_toys import TINY, spec_with, tiny  # noqa: F401 (tiny is a fixture)

from pqk.compress.train import teacher
from pqk.compress.train.device import pick_device
from pqk.compress.train.judge import Judge
from pqk.compress.train.teacher import train_teacher
from pqk.data.render.synthetic import texture_bank
from pqk.errors import PqkError
from pqk.families.dust3r import batches as batches_module
from pqk.families.dust3r import learning
from pqk.families.dust3r.configs import NAMED
from pqk.families.dust3r.learning import constant_scores, depth_scores
from pqk.families.dust3r.scoring import PairTruth, constant_depth_scores, score_pair
from pqk.families.registry import family
from pqk.files import sha256_file
from pqk.models import load_model
from pqk.settings.training import TrainSpec, load_training

CPU = torch.device("cpu")


def noisy_pairs(count=2, size=48):
    """Rendered pairs, and points that are wrong in shape, in scale and from view to view."""
    pairs = batches_module.training_pairs(count, size, 5, texture_bank(), min_covisible=0.0)
    assert bool(pairs.valid.flatten(2).any(2).all())
    gt1, gt2, _, _ = pairs.ordered()
    draw = torch.Generator().manual_seed(1)
    return pairs, *(k * (gt + 0.2 * torch.randn(gt.shape, generator=draw)) for k, gt in ((0.7, gt1), (0.8, gt2)))


def test_training_and_evaluation_score_alike():
    """One definition: the same tensors give the same AbsRel and delta1, also at an even count of pixels."""
    pairs, points_1, points_2 = noisy_pairs()
    gt1, gt2, valid1, valid2 = pairs.ordered()
    rows = depth_scores(points_1, points_2, pairs)
    assert len(rows) == len(gt1) == 4
    constant = constant_scores(pairs)
    for k, row in enumerate(rows):
        maps = {"pts3d_1": points_1[k].numpy(), "pts3d_2": points_2[k].numpy()}
        truth = PairTruth(
            gt1[k].numpy(), gt2[k].numpy(), valid1[k].numpy(), valid2[k].numpy(),
            np.eye(3), np.eye(3), pairs.first_to_second()[k].numpy().astype(np.float64),
        )  # fmt: skip
        conf = {name: np.ones(valid1[k].shape, np.float32) for name in ("conf_1", "conf_2")}
        expected = score_pair(maps | conf, truth)
        assert row == pytest.approx({"absrel": expected["absrel"], "delta1": expected["delta1"]}, abs=1e-6)
        assert 0.02 < row["absrel"] < 1 and (int(valid1[k].sum()) + int(valid2[k].sum())) % 2 == 0
        flat = constant_depth_scores(truth)
        assert constant[k] == pytest.approx({"absrel": flat["absrel"], "delta1": flat["delta1"]}, abs=1e-6)


def test_training_scores_both_views_and_what_cannot_be_aligned():
    pairs, points_1, points_2 = noisy_pairs()
    plain = depth_scores(points_1, points_2, pairs)
    other = depth_scores(points_1, 1.5 * points_2, pairs)
    assert all(a["absrel"] > b["absrel"] for a, b in zip(other, plain, strict=True))
    behind = depth_scores(-points_1, -points_2, pairs)
    assert behind == [{"absrel": 1.0, "delta1": 0.0}] * 4
    points_2[0, 0, 0, 1] = torch.nan
    pairs.valid[0, 1, 0, 0] = True
    assert math.isnan(depth_scores(points_1, points_2, pairs)[0]["absrel"])
    pairs.valid[0] = False
    assert len(depth_scores(points_1, points_2, pairs)) == len(constant_scores(pairs)) == 2


def scores_of(model: nn.Module, spec: TrainSpec) -> dict[str, float]:
    """The means on the held-out pairs of a Teacher's training, and those of a constant depth."""
    batches = learning.batches(spec, CPU, seed=spec.seed, held_seed=spec.seed)
    judge = Judge(family("dust3r"), batches, contextlib.nullcontext)
    return {name: value for name, value in {**judge(model), **judge.floor()}.items() if isinstance(value, float)}


def test_training_learns_and_ships(tmp_path):
    """60 steps of a tiny model: the loss falls clearly, and the folder is a model with a card of its weights."""
    losses: list[float] = []
    out = tmp_path / "out"
    spec = spec_with(steps=60, validation={"size": 32, "pairs": 3, "every": 30, "patience": 8})
    outcome, progress = train_teacher(spec, out, device="cpu", report=lambda p: losses.append(p.loss), command="x")
    assert outcome == "done" and progress.step == 60
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert {p.name for p in out.iterdir()} == {
        *("checkpoint.pt", "spec.json", "config.json", "model.safetensors", "model_card.json")
    }
    card = json.loads((out / "model_card.json").read_text())
    assert card["sha256"] == sha256_file(out / "model.safetensors")
    assert (card["steps"], card["outcome"], card["dtype"], card["command"]) == (60, "done", "float16", "x")
    assert [h["step"] for h in card["history"]] == [30, 60]
    model = load_model(out)
    again = scores_of(model, spec)
    assert {k: card["validation"][k] for k in again} == pytest.approx(again)
    assert again.keys() == {"score", "absrel", "delta1", "constant_absrel", "constant_delta1"}
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, checkpoint["best"][key].half().float())


def test_half_and_half_is_the_whole(tmp_path):
    """8 steps straight, and 4 steps with a stop after each, and 4 more: the same weights to the last bit."""
    stages = [{"size": 32, "batch": 4, "until": 0.5}, {"size": 48, "batch": 2, "until": 1.0}]
    spec = spec_with(stages=stages, validation={"size": 32, "pairs": 1, "every": 4, "patience": 8})
    assert train_teacher(spec, tmp_path / "a", device="cpu")[0] == "done"
    for step in range(1, 5):
        outcome, progress = train_teacher(spec, tmp_path / "b", device="cpu", pause_after_s=1e-9)
        assert (outcome, progress.step) == ("paused", step)
        assert {p.name for p in (tmp_path / "b").iterdir()} == {"checkpoint.pt", "spec.json"}
    assert train_teacher(spec, tmp_path / "b", device="cpu")[0] == "done"
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in "ab")
    for part in ("model", "ema", "best"):
        assert a[part].keys() == b[part].keys() and all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    assert [h["score"] for h in a["progress"]["history"]] == [h["score"] for h in b["progress"]["history"]]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_a_paused_training_leaves_the_shipped_model(tmp_path):
    """Paused in the folder of a finished model: weights, configuration and card stay; the end replaces all three."""
    train_teacher(spec_with(steps=2), tmp_path, device="cpu")
    names = ("config.json", "model.safetensors", "model_card.json")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    outcome, _ = train_teacher(spec_with(steps=3), tmp_path, device="cpu", pause_after_s=1e-9, fresh=True)
    assert outcome == "paused"
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    assert train_teacher(spec_with(steps=3), tmp_path, device="cpu")[0] == "done"
    assert (tmp_path / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_a_death_while_shipping_leaves_no_card_of_other_weights(tmp_path, monkeypatch):
    """Killed in validation: nothing changed. Killed after any file: no card, or the card of the weights beside it."""
    old, new = (teacher.build_model("dust3r", TINY, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    teacher.ship(old, tmp_path, lambda model: {"which": "old"})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert before.keys() == {"config.json", "model.safetensors", "model_card.json"}

    def die(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teacher.ship(new, tmp_path, die)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    sync = teacher.fsync_folder
    for deadly in range(4):
        calls = []

        def count(folder, calls=calls, deadly=deadly):
            sync(folder)
            calls.append(folder)
            if len(calls) > deadly:
                raise KeyboardInterrupt

        monkeypatch.setattr(teacher, "fsync_folder", count)
        with pytest.raises(KeyboardInterrupt):
            teacher.ship(new, tmp_path, lambda model: {"which": "new"})
        card = tmp_path / "model_card.json"
        assert card.exists() == (deadly == 3)
        load_model(tmp_path)
    assert json.loads(card.read_text()) == {"which": "new", "sha256": sha256_file(tmp_path / "model.safetensors")}


def test_another_spec_or_budget_is_refused(tmp_path):
    train_teacher(spec_with(steps=2), tmp_path, device="cpu")
    weights = sha256_file(tmp_path / "model.safetensors")
    for spec, minutes in ((spec_with(steps=3), None), (spec_with(steps=2, seed=1), None), (spec_with(steps=2), 1.0)):
        with pytest.raises(PqkError, match=r"checkpoint\.pt is of another spec or budget; use --fresh"):
            train_teacher(spec, tmp_path, device="cpu", minutes=minutes)
    assert sha256_file(tmp_path / "model.safetensors") == weights
    (tmp_path / "spec.json").write_text("{")
    with pytest.raises(PqkError, match="another spec"):
        train_teacher(spec_with(steps=2), tmp_path, device="cpu")
    outcome, progress = train_teacher(spec_with(steps=3), tmp_path, device="cpu", fresh=True)
    assert (outcome, progress.step) == ("done", 3)


def test_fresh_forgets_the_old_checkpoint_at_once(tmp_path):
    """A fresh run that dies before its first save must not leave the old checkpoint under the new spec's name."""
    train_teacher(spec_with(steps=2), tmp_path, device="cpu")

    def die(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_teacher(spec_with(steps=5), tmp_path, device="cpu", fresh=True, report=die)
    assert train_teacher(spec_with(steps=5), tmp_path, device="cpu")[1].step == 5


def test_the_clock_can_end_the_run(tmp_path):
    outcome, progress = train_teacher(spec_with(steps=10**6), tmp_path, device="cpu", minutes=0.5 / 60)
    assert outcome == "done" and 0.5 <= progress.seconds < 10 and progress.share == 1.0


def test_validation_without_overlap(tmp_path, monkeypatch):
    """Pairs without a valid pixel do not count; only when there is no other, that is said."""
    spec = spec_with(validation={"size": 32, "pairs": 9, "every": 4, "patience": 8})
    real, calls = batches_module.training_pairs, []

    def some(batch, *args, **options):
        pairs = real(batch, *args, **options)
        calls.append(batch)
        if batch == 1:
            pairs.valid[:] = False
        return pairs

    model = teacher.build_model("dust3r", TINY)
    eight = spec_with(validation={"size": 32, "pairs": 8, "every": 4, "patience": 8})
    expected = scores_of(model, eight)
    monkeypatch.setattr(batches_module, "training_pairs", some)
    assert scores_of(model, spec) == expected
    assert calls == [8, 1] * 2  # the constant depth too
    with pytest.raises(PqkError, match="none of the held-out pairs has anything to score; lower min_covisible"):
        scores_of(model, spec_with(min_covisible=1.0))


def test_bad_arguments_are_one_sentence(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(PqkError, match=r"unknown model 'dust3r-tinny' \(did you mean 'dust3r-tiny'\?\)"):
        train_teacher(spec_with(model="dust3r-tinny"), out, device="cpu")
    for minutes in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(PqkError, match="minutes must be more than 0"):
            train_teacher(spec_with(), out, device="cpu", minutes=minutes)
    with pytest.raises(PqkError, match="pause_after must be more than 0, got -3"):
        train_teacher(spec_with(), out, device="cpu", pause_after_s=-3)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(PqkError, match="3 processes cannot share a batch of 4 pairs"):
        train_teacher(spec_with(), out, device="cpu")
    monkeypatch.delenv("WORLD_SIZE")
    assert not out.exists()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(PqkError, match="cannot write"):
        train_teacher(spec_with(), file / "out", device="cpu")


def test_devices(monkeypatch):
    assert pick_device("cpu") == CPU
    for name in ("gpu", "cuda:", "cuda:x", "meta", ""):
        with pytest.raises(PqkError, match="unknown device"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(PqkError, match="device 'cuda:1' was asked for, but torch sees 1"):
        pick_device("cuda:1")
    assert pick_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert pick_device("cuda") == torch.device("cuda:0")
    assert pick_device("cpu") == CPU


SPEC = """
version: "1.0"
model: dust3r-tiny
steps: 2
stages:
  - {size: 32, batch: 2, until: 1.0}
min_covisible: 0.0
validation: {size: 32, pairs: 1, every: 1}
"""


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        ("until: 1.0", "until: 0.9", r"stages .*rising values of 'until' that end with 1"),
        (
            "{size: 32, batch: 2, until: 1.0}",
            "{size: 32, batch: 2, until: 1.0}\n  - {size: 48, batch: 2, until: 0.5}",
            "rising",
        ),
        ("steps: 2", "steps: 2\nfov_deg: [70.0, 55.0]", r"fov_deg .*must be \[lowest, highest\]"),
        ("steps: 2", "steps: 2\nfov_deg: [70.0, 180.0]", "fov_deg"),
        ("steps: 2", "steps: 2\nlearning_rate: 1.0e-7", "final_rate 1e-06 must not be above learning_rate 1e-07"),
        ("steps: 2", "steps: 2\nseed: 1024", "seed is 1024"),
        ("steps: 2", "steps: 2\nlerning_rate: 0.1", r"unknown key 'lerning_rate' \(did you mean 'learning_rate'\?\)"),
    ],
)
def test_bad_specs_are_one_sentence(tmp_path, old, new, sentence):
    file = tmp_path / "t.yaml"
    file.write_text(SPEC)
    assert load_training(file, steps=7).steps == 7
    file.write_text(SPEC.replace(old, new, 1))
    with pytest.raises(PqkError, match=sentence) as caught:
        load_training(file)
    assert "\n" not in str(caught.value) and "t.yaml" in str(caught.value)


ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(*arguments: str | Path) -> str:
    """Two processes on this machine, one thread each, as torchrun starts them; what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, **ALONE}
    ran = subprocess.run([str(c) for c in command], env=environment, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def two_ranks(*arguments: str | Path) -> str:
    """The two processes themselves, without the seconds that torchrun takes to start them; what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = []
    for rank in "01":
        environment = {**os.environ, **ALONE, **meeting, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, *map(str, arguments)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(command, env=environment, **pipes))
    said = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    return "".join(out for out, _ in said)


DETECTOR = SPEC.replace("dust3r", "diffusiondet").replace("size: 32", "size: 64").replace("min_covisible: 0.0\n", "")


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "start"), [(SPEC, torchrun), (DETECTOR, two_ranks)], ids=["dust3r", "diffusiondet"])
def test_two_processes_from_the_command_line(tmp_path, spec, start):
    config, out = tmp_path / "t.yaml", tmp_path / "out"
    config.write_text(spec)
    said = start("-m", "pqk.cli", "train", "teacher", "--config", config, "-o", out, "--device", "cpu")
    assert said.count("done: 2 steps") == 1
    card = json.loads((out / "model_card.json").read_text())
    assert card["sha256"] == sha256_file(out / "model.safetensors")
    assert card["steps"] == 2 and len(card["history"]) == 2
    assert card["name"] == load_training(config).model and load_model(out).sizes
    assert not list(out.glob(".*"))


RANKS = """
import os, sys, torch
from pathlib import Path
from pqk.compress.train import teacher
from pqk.compress.train.loop import Trainer
from pqk.families.dust3r import batches
from pqk.families.dust3r.configs import NAMED
from pqk.settings.training import load_training

NAMED["dust3r-tiny"] = {**NAMED["dust3r-tiny"], "head_type": "linear", "enc_depth": 1, "dec_depth": 1,
                        "dec_blocks": None, "dec_blocks2": None, "enc_embed_dim": 32, "dec_embed_dim": 32}
out = Path(sys.argv[2])
rank = os.environ["RANK"]
kept, seeds, run, pairs = [], [], Trainer.run, batches.training_pairs

def spying_run(self, *args, **options):
    kept.append(self)
    return run(self, *args, **options)

def spying_pairs(batch, size, seed, *args, **options):
    seeds.append((batch, seed))
    return pairs(batch, size, seed, *args, **options)

Trainer.run, batches.training_pairs = spying_run, spying_pairs
outcome, progress = teacher.train_teacher(load_training(sys.argv[1]), out, device="cpu")
torch.save({"model": kept[0].model.state_dict(), "ema": kept[0].ema, "seeds": seeds, "outcome": outcome},
           out / f"rank{rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_hold_the_same_weights(tmp_path):
    """Both see other pairs, and end with equal weights; early stopping is decided for both."""
    script, config, out = tmp_path / "ranks.py", tmp_path / "t.yaml", tmp_path / "out"
    script.write_text(RANKS)
    config.write_text(SPEC.replace("steps: 2", "steps: 6").replace("every: 1}", "every: 2, patience: 100}"))
    two_ranks(script, config, out)
    first, second = (torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for part in ("model", "ema"):
        assert all(torch.equal(value, second[part][key]) for key, value in first[part].items())
    assert first["outcome"] == second["outcome"] == "done"
    training = [seed for seed in first["seeds"] if seed[1] < 2**30]
    assert training[:6] == [(1, 2 * step) for step in range(6)]  # a seventh batch may have been made ahead
    assert second["seeds"][:6] == [(1, 2 * step + 1) for step in range(6)]
    start = teacher.build_model("dust3r", load_model(out).config)
    assert any(not torch.equal(v, first["model"][k]) for k, v in start.state_dict().items())


def test_init_starts_from_given_weights(tmp_path, monkeypatch):
    train_teacher(spec_with(steps=2), tmp_path / "first", device="cpu")
    first = load_model(tmp_path / "first")
    # a rate so small that the weights cannot leave their start
    still = spec_with(steps=1, learning_rate=1e-12, final_rate=0.0, warmup=0.0, weight_decay=0.0)
    train_teacher(still, tmp_path / "more", device="cpu", init=str(tmp_path / "first"))
    more = load_model(tmp_path / "more")
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(more.state_dict()[name], weight, rtol=0, atol=1e-6)
    card = json.loads((tmp_path / "more" / "model_card.json").read_text())
    assert card["init"]["card"]["sha256"] == sha256_file(tmp_path / "first" / "model.safetensors")
    monkeypatch.setitem(NAMED, "tiny-for-tests", {**TINY, "enc_depth": 2})
    said = r"has another configuration than tiny-for-tests; .* unless the training file has network: \{enc_depth: 1\}$"
    with pytest.raises(PqkError, match=said):
        train_teacher(still, tmp_path / "other", device="cpu", init=str(tmp_path / "first"))
    as_said = still.model_copy(update={"network": {"enc_depth": 1}})
    train_teacher(as_said, tmp_path / "other", device="cpu", init=str(tmp_path / "first"))
    monkeypatch.setitem(NAMED, "tiny-for-tests", TINY)
    detector = TrainSpec.model_validate(
        {**still.model_dump(), "model": "diffusiondet-tiny", "stages": [{"size": 64, "batch": 2, "until": 1.0}]}
    )
    with pytest.raises(PqkError, match=r"than diffusiondet-tiny; training cannot start from it$"):
        train_teacher(detector, tmp_path / "third", device="cpu", init=str(tmp_path / "first"))


def test_two_trainings_in_one_folder_are_refused(tmp_path: Path) -> None:
    """Both would resume from one checkpoint and write it in turns."""
    file = tmp_path / "t.yaml"
    file.write_text(SPEC)
    out = tmp_path / "out"
    with teacher._alone(out), pytest.raises(PqkError, match=r"another process trains here.* -o"):
        train_teacher(load_training(file), out, device="cpu")
    train_teacher(load_training(file), out, device="cpu")
