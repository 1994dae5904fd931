"""Probing growths: the recipes of the candidates, the linked checkpoint, what is refused, and the ranking."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.harness import run_ranks
from tests.runs import make_recipe, train
from titan_growth.checkpoint.folder import file_entry, open_step, write_manifest
from titan_growth.checkpoint.history import Progress
from titan_growth.commands.probe.candidates import Candidate, candidate_recipe, candidates_of, doubts
from titan_growth.commands.probe.command import main as probe_main
from titan_growth.commands.probe.report import Outcome, outcome_of, report
from titan_growth.commands.probe.runs import linked
from titan_growth.commands.source import Source, open_source
from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.growth.chain import chain_of
from titan_growth.models.registry import model_config_of
from titan_growth.run.lr_schedule import LRSchedule
from titan_growth.run.plan import ResumePoint, plan_run
from titan_growth.tools.findings import Findings


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 layers, grown to 4 at step 3 and trained to step 6 of a schedule of 20."""
    folder = tmp_path_factory.mktemp("probe")
    recipe = make_recipe(
        folder / "run",
        model__n_layers=4,
        training__steps=6,
        checkpoint__enable=True,
        validation__enable=True,
        lr_scheduler__total_steps=20,
        growth__stages__0__at="50%",
        growth__stages__0__factor=2,
    )
    run_ranks(train, 1, 1, recipe)
    return folder / "run" / "checkpoint" / "step-6"


STAGES = [
    PlannedGrowth(at="1 step", operator="stack", factor=2),
    PlannedGrowth(at="1 step", operator="map", layer_map=[0, 1, 1, 2, 3]),
    PlannedGrowth(at="1 step", operator="zero_width", dim=48, n_heads=6),
    PlannedGrowth(at="1 step", operator="learn", factor=2),
]


@pytest.mark.parametrize("stage", [None, *STAGES])
def test_a_candidate_goes_on_from_the_model_of_the_checkpoint(source: Path, stage: PlannedGrowth | None) -> None:
    opened = open_source(source)
    recipe = candidate_recipe(opened, Candidate("one", stage), 5)
    target = model_config_of(recipe.model, found := Findings())
    assert target is not None, found.problems
    chain = chain_of(recipe.growth, target, found := Findings())
    assert chain is not None, found.problems
    assert [config.num_layers for config in chain.configs[:2]] == [2, 4]
    assert chain.configs[1] == opened.config
    assert len(chain.configs) == (2 if stage is None else 3)
    assert (recipe.training.steps, recipe.lr_scheduler.total_steps) == (11, 20)
    if stage is not None:
        assert recipe.growth.stages[1].at == "6 steps"
        assert recipe.growth.stages[1].operator == stage.operator
    point = ResumePoint(opened.folder.manifest.progress, num_growths=1)
    plan = plan_run(recipe, found := Findings(), num_ranks=1, device_type="cpu", resume=point)
    assert plan is not None, found.problems


def test_the_checkpoint_of_a_candidate_links_to_the_shards_and_writes_nothing_there(
    source: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    opened = open_source(source)
    recipe = candidate_recipe(opened, Candidate("one", STAGES[0]), 5)
    linked(opened, opened.folder.manifest, tmp_path / "step-6", recipe)
    copy = open_step(tmp_path / "step-6")
    assert copy is not None
    assert copy.damage(checksums=True) is None
    assert copy.recipe_table()["training"]["steps"] == 11
    assert copy.lineage().events == opened.lineage.events
    shards = [path for path in (tmp_path / "step-6").iterdir() if path.suffix == ".distcp"]
    assert shards
    assert all(path.samefile(source / path.name) for path in shards)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--operator stack --factor 2", "--from: is missing"),
        ("--from SOURCE", "--operator: is missing: which growths are to be tried. Give it several times"),
        ("--from SOURCE --operator stak --factor 2", "'stak' --operator: unknown operator 'stak'"),
        ("--from SOURCE --operator stack", "'stack' --operator: does not say how large the model becomes"),
        ("--from SOURCE --operator stack --factor two", "--factor: "),
        ("--from SOURCE --operator stack --factor 2 --steps 0", "--steps: expected a positive whole number, got '0'"),
        ("--from SOURCE --operator stack --factor 2 --num-ranks x", "--num-ranks: expected a positive whole number"),
        ("--from SOURCE --operator stack --operator stack --factor 2", "'stack': is given twice"),
        ("--from SOURCE --operator random_depth --factor 2", "'random_depth': 'random_depth' has a mask, and no mask"),
        ("--from SOURCE --operator stack --factors 2", "--factors: is no argument of this command. Did you mean"),
        ("--from SOURCE --stage operator=stack", "--stage: is no TOML"),
        ("--from SOURCE --stage factor=2", "--stage: names no operator"),
        ("--from SOURCE --stage operator='stack',num_ranks=2", "--stage num_ranks: is no setting of a candidate"),
        (
            "--from SOURCE/.. --operator stack --factor 2",
            "refused: it is a folder of checkpoints. Name one of its",
        ),
        ("--from none --operator stack --factor 2", "--from: none: no such folder"),
        ("--from SOURCE --operator stack --factor 2 --to SOURCE/../..", "is not empty"),
        ("--from SOURCE --operator stack --factor 2 --to SOURCE/mine", "is inside the source"),
        (
            "--from SOURCE --operator stack --factor 2 -- --job.dump_folder x",
            "--job.dump_folder: would make it another",
        ),
        (
            "--from SOURCE --operator stack --factor 2 -- --job.dump-folder x",
            "--job.dump-folder: would make it another",
        ),
        (
            "--from SOURCE --operator stack --factor 2 -- --training.seq_len=64",
            "--training.seq_len: would make it another",
        ),
        ("--from SOURCE --operator stack --factor 2 -- --optimizer.lr 1", "--optimizer.lr: would make it another run"),
        (
            "--from SOURCE --operator stack --factor 2 -- --parallelism.tensor_parallel_degree 3",
            "'(not grown)' parallelism.tensor_parallel_degree: 3 does not divide the 1 rank",
        ),
        ("--from SOURCE --operator stack --factor 2 -- --parallelism.tensor 3", "parallelism.tensor: unknown key"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_started(
    words: str, message: str, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *words, **more: pytest.fail("a run was started"))
    argv = [word.replace("SOURCE", str(source)) for word in words.split()]
    before = sorted(source.parent.iterdir())
    assert probe_main(argv) in (1, 2)
    assert sorted(source.parent.iterdir()) == before, "something was left behind"
    found = capsys.readouterr().out
    assert message in found
    assert found.startswith("error: ")
    assert "Traceback" not in found


def written(folder: Path, **settings: object) -> Source:
    """The second step of a short run with settings of its own, opened."""
    keep = {"checkpoint__enable": True, "checkpoint__interval": 2, "checkpoint__keep_latest_k": 0}
    recipe = make_recipe(folder / "run", training__steps=12, **keep, **settings)
    run_ranks(train, 1, 1, recipe)
    return open_source(folder / "run" / "checkpoint" / "step-2")


BASE_LR = {"growth__base__lr": 0.05, "growth__base__warmup_steps": 1, "optimizer__lr": 0.01}
LATER = {"growth__stages__0__at": "9 steps", "growth__stages__0__factor": 2, "lr_scheduler__total_steps": 30}


@pytest.mark.parametrize("grows", ["later", "no", "not at all"])
def test_the_learning_rate_is_that_of_the_run(grows: str, tmp_path: Path) -> None:
    later = {} if grows == "not at all" else {**LATER, **BASE_LR, "growth__enable": grows == "later"}
    source = written(tmp_path, model__n_layers=4, **later)
    own = LRSchedule(
        source.recipe.lr_scheduler,
        lr=source.recipe.optimizer.lr,
        steps=source.recipe.training.steps,
        growth=source.recipe.growth,
    )
    stage = PlannedGrowth(at="1 step", operator="stack", factor=2, lr_policy="continue")
    for candidate in (Candidate("(not grown)", None), Candidate("grown", stage)):
        recipe = candidate_recipe(source, candidate, 5)
        schedule = LRSchedule(
            recipe.lr_scheduler, lr=recipe.optimizer.lr, steps=recipe.training.steps, growth=recipe.growth
        )
        grown_at = [2] if candidate.planned else []
        assert [schedule(step, grown_at) for step in (3, 7)] == [own(step) for step in (3, 7)]


def test_a_width_rounded_by_the_recipe_is_no_obstacle(tmp_path: Path) -> None:
    source = written(tmp_path, model__hidden_dim=None, model__multiple_of=24, model__ffn_dim_multiplier=1.3)
    recipe = candidate_recipe(source, Candidate("one", PlannedGrowth(at="1 step", operator="stack", factor=2)), 5)
    assert recipe.model.hidden_dim == source.config.hidden_dim


def test_candidates_take_the_shared_settings_that_mean_something_to_them(source: Path) -> None:
    layers = ", ".join(str(layer % 4) for layer in range(90))
    tables = [
        'operator = "learn", n_layers = 6, options = {steps = 5}',
        '{operator = "stack", factor = 3, parallelism = {tensor_parallel_degree = 2}}',
        f'operator = "map", layer_map = [{layers}]',
    ]
    shared = {"factor": 2, "mask_steps": 20, "options": {"lr": 0.5}, "warmup_steps": 9}
    small, learn, stack, masked, own, split, long = candidates_of(
        ["learn", "stack", "random_depth"], tables, shared, open_source(source)
    )
    growths = [one.planned for one in (learn, stack, masked, own, split, long)]
    assert small.planned is None
    assert [growth.options for growth in growths if growth] == [{"lr": 0.5}, {}, {}, {"steps": 5}, {}, {}]
    assert [growth.mask_steps for growth in growths if growth] == [None, None, 20, None, None, None]
    assert [growth.factor for growth in growths if growth] == [2, 2, 2, None, 3, None]
    assert split.planned is not None
    assert split.planned.parallelism is not None
    assert split.planned.parallelism.tensor_parallel_degree == 2
    lines = list(doubts(open_source(source), [small, learn, stack, masked], 5))
    assert sum("warmup of 9 steps is longer than the probe" in line for line in lines) == 3
    assert "random_depth: after 5 steps its mask is 25% open" in lines


def test_plugins_of_a_checkpoint_are_named_and_not_imported(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(source, tmp_path / "step-6")
    recipe = (tmp_path / "step-6" / "recipe.toml").read_text()
    (tmp_path / "step-6" / "recipe.toml").write_text(recipe.replace("plugins = []", 'plugins = ["not_there"]'))
    step = open_step(tmp_path / "step-6")
    assert step is not None
    files = {**step.manifest.files, "recipe.toml": file_entry(tmp_path / "step-6" / "recipe.toml")}
    write_manifest(tmp_path / "step-6", replace(step.manifest, files=files))
    assert probe_main(["--from", str(tmp_path / "step-6"), "--operator", "stack", "--factor", "2"]) == 2
    assert "If you trust it, add --plugins not_there" in capsys.readouterr().out


def outcome(name: str, loss: float, **more: object) -> Outcome:
    values = {"loss": loss, "validated": True, "tokens": 512, "flops": 1e9, "seconds": 1.0, **more}
    return Outcome(name, 4, 1000, 3.0, 3.5, **values)  # type: ignore[arg-type]


def test_the_best_comes_first_and_a_diverged_one_last() -> None:
    rows = [outcome("bad", math.nan), outcome("good", 2.0), outcome("fair", 2.5)]
    rows += [Outcome("(not grown)", 2, 500, loss=2.2, validated=True, tokens=512, flops=1e8, seconds=1.0)]
    rows += [Outcome("broken", 4, 1000, failure="error: no space")]
    lines = list(report(rows, 5, "step-6"))
    order = [line.split()[:2] for line in lines[4:8]]
    assert order == [["1.", "good"], ["(not", "grown)"], ["2.", "fair"], ["3.", "bad"]]
    assert "diverged" in lines[7]
    assert lines[8].split(maxsplit=2) == ["-", "broken", "failed: error: no space"]


def test_an_outcome_counts_from_the_checkpoint_and_names_what_it_is_judged_by(source: Path) -> None:
    opened = open_source(source)
    progress = Progress(step=6, tokens=10, flops=100, samples=1)
    start = type(opened.folder.manifest)(progress, 4, 1, "", False, False, 0, seconds=7.0)
    growth = {"event": "growth", "step": 6, "loss_before": 3.0, "loss_after": 3.1}
    step = {"step": 8, "tokens": 30, "flops": 160, "seconds": 9.5, "loss": 2.9}
    judged = outcome_of("one", opened.config, [growth, step, {"step": 8, "validation_loss": 2.8}], start, "")
    assert (judged.loss, judged.validated, judged.tokens, judged.flops, judged.seconds) == (2.8, True, 20, 60, 2.5)
    assert (judged.loss_before, judged.loss_after) == (3.0, 3.1)
    trained = outcome_of("one", opened.config, [growth, step, {"step": 7, "validation_loss": 2.8}], start, "")
    assert (trained.loss, trained.validated) == (2.9, False)
    assert "ranked by loss of the last batch" in "\n".join(report([trained], 2, "x"))
    assert outcome_of("one", opened.config, [], start, "").failure == "it left no metrics"


@pytest.mark.slow
def test_three_operators_and_a_map_are_ranked_on_two_ranks(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--from", str(source), "--steps", "3", "--num-ranks", "2", "--factor", "2", "--to", str(tmp_path / "kept")]
    words += ["--operator", "stack", "--operator", "interpose", "--operator", "zero_depth"]
    words += [
        "--stage",
        'operator = "map", layer_map = [0, 1, 1, 2, 3]',
        "--",
        "--parallelism.tensor_parallel_degree",
        "2",
    ]
    assert probe_main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line[:2] in ("1.", "2.", "3.", "4.")]
    assert {line.split()[1] for line in table} == {"stack", "interpose", "zero_depth", "map"}
    losses = []
    for folder in sorted((tmp_path / "kept").iterdir()):
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in metrics if "loss" in line] == [7, 8, 9]
        losses.append(next(line["validation_loss"] for line in reversed(metrics) if "validation_loss" in line))
        assert "tp 2" in (folder / "probe.log").read_text()
        assert not (folder / "checkpoint").exists()
    ranked = [float(line.split()[-4]) for line in table]
    assert ranked == sorted(ranked)
    assert ranked == [pytest.approx(loss, abs=1e-4) for loss in sorted(losses[1:])]
