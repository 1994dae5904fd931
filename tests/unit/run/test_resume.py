"""What a resumed run has decided before, which changes it refuses, and which it prints."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.checkpoint.test_folder import EVENT, MANIFEST
from titan_growth.checkpoint.folder import StepFolder, file_entry, open_step, write_manifest
from titan_growth.checkpoint.history import Lineage, Progress
from titan_growth.checkpoint.search import find_checkpoint
from titan_growth.checkpoint.steps import step_path
from titan_growth.config.loader import dry_run_of, recipe_from_toml, to_toml, with_values
from titan_growth.config.schema.recipe import Recipe
from titan_growth.run.precision import Precision
from titan_growth.run.resume import compare, decided_before
from titan_growth.run.rotary import RopeScaling
from titan_growth.run.start import (
    Decisions,
    Finished,
    RunStart,
    Site,
    decide,
    is_finished,
    resolve,
    start_from,
)
from titan_growth.tools.errors import CheckpointError, ConfigError
from titan_growth.tools.run_folder import RunFolder

BFLOAT16 = Precision("bfloat16")
STAGES = [{"at": "10 steps", "factor": 2}, {"at": "20 steps", "factor": 2}]
TABLE: dict[str, Any] = {
    "model": {"flavor": "debugmodel", "n_layers": 8},
    "training": {"steps": 100, "seq_len": 64, "global_batch_size": 16},
    "checkpoint": {"enable": True},
    "debug": {"seed": 5},
    "growth": {"stages": STAGES},
}


def recipe(**changes: Any) -> Recipe:
    return with_values(recipe_from_toml(TABLE), {key.replace("__", "."): value for key, value in changes.items()})


def saved(root: Path, before: Recipe, *, growths: int = 0, step: int = 30, **manifest: Any) -> StepFolder:
    path = step_path(root / "checkpoint", step)
    path.mkdir(parents=True)
    (path / "recipe.toml").write_text(to_toml(before))
    lineage = Lineage(tuple(replace(EVENT, step=10 * (number + 1)) for number in range(growths)))
    (path / "lineage.json").write_text(lineage.to_json())
    files = {name: file_entry(path / name) for name in ("recipe.toml", "lineage.json")}
    values = {"progress": Progress(step=step), "num_layers": 2 * 2**growths, "files": files, **manifest}
    write_manifest(path, replace(MANIFEST, **values))
    folder = open_step(path)
    assert folder is not None
    return folder


REFUSED = [
    ({"model__n_layers": 16}, ["model (num_layers)"]),
    ({"model__dim": 512}, ["model (dim)", "model (head_dim)", "model (hidden_dim)"]),
    ({"model__rope_theta": 1e4}, ["model (rope_theta)"]),
    ({"model__init__scheme": "small", "model__init__head_std": 0.1}, ["model (init.scheme)", "model (init.head_std)"]),
    ({"training__seq_len": 128}, ["training.seq_len"]),
    ({"training__dtype": "bfloat16"}, ["training.dtype"]),
    ({"debug__seed": 6}, ["debug.seed"]),
    ({"data__bos": False}, ["data.bos"]),
    ({"data__eos": False}, ["data.eos"]),
    ({"data__document_mask": True}, ["data.document_mask"]),
    ({"data__shuffle": False}, ["data.shuffle"]),
    ({"data__validation_fraction": 0.1}, ["data.validation_fraction"]),
    ({"optimizer__name": "Adam"}, ["optimizer.name"]),
    ({"growth__stages": [{"at": "9 steps", "factor": 2}, STAGES[1]]}, ["growth.stages"]),
    ({"growth__stages": [{**STAGES[0], "optimizer_state": "copy"}, STAGES[1]]}, ["growth.stages"]),
    ({"growth__stages": STAGES[1:]}, ["growth.stages"]),
    ({"growth__stages": []}, ["growth.stages"]),
    ({"growth__enable": False}, ["growth.stages"]),
    ({"growth__stages": [STAGES[0], {"at": "20 steps", "factor": 4}]}, ["growth.stages"]),
    ({"growth__stages": STAGES[:1]}, ["growth.stages"]),
    ({"growth__stages": [*STAGES, {"at": "40 steps", "factor": 2}]}, ["growth.stages"]),
    ({"debug__seed": 6, "data__bos": False}, ["debug.seed", "data.bos"]),
]


@pytest.mark.parametrize(("changes", "keys"), REFUSED, ids=[str(case[0]) for case in REFUSED])
def test_what_makes_it_another_run_is_refused(changes: dict[str, Any], keys: list[str], tmp_path: Path) -> None:
    """One growth lies behind the checkpoint."""
    refused, _ = compare(saved(tmp_path, recipe(), growths=1), recipe(**changes))
    assert [problem.key for problem in refused] == keys
    assert all("step-30" in problem.message for problem in refused)
    assert all(problem.hint == "Name another job.dump_folder to start a new run" for problem in refused)


@pytest.mark.parametrize("stages", [[], STAGES[:1], [{"at": "10 steps", "factor": 4}, STAGES[1]]])
def test_another_depth_to_start_from_is_refused(stages: list[dict[str, Any]], tmp_path: Path) -> None:
    refused, _ = compare(saved(tmp_path, recipe(), growths=0), recipe(growth__stages=stages))
    assert [problem.key for problem in refused] == ["growth.stages"]
    assert "has 2 layers" in refused[0].message


def test_weights_alone_cannot_be_resumed(tmp_path: Path) -> None:
    refused, _ = compare(saved(tmp_path, recipe(), model_only=True), recipe())
    assert [problem.key for problem in refused] == ["checkpoint.last_save_model_only"]


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        ([("10 steps", 32)], [("10 steps", 32), ("40 steps", 64)], False),
        ([("10 steps", 32), ("40 steps", 64)], [("10 steps", 32), ("30 steps", 128)], False),
        ([], [("30 steps", 32)], False),
        ([("31744 tokens", 32)], [("31 steps", 32)], False),
        ([("10 steps", 32)], [("11 steps", 32)], True),
        ([("10 steps", 32)], [("10 steps", 64)], True),
        ([], [("29 steps", 32)], True),
        ([("10 steps", 32)], [], True),
    ],
)
def test_batches_of_the_past_stay(
    before: list[tuple[str, int]], now: list[tuple[str, int]], refused: bool, tmp_path: Path
) -> None:
    """The learning rate counts the tokens of all steps, so the 30 steps that have been taken keep their sizes."""
    made = [
        recipe(growth__stages=[], training__batch_schedule=[{"at": at, "global_batch_size": size} for at, size in one])
        for one in (before, now)
    ]
    problems, _ = compare(saved(tmp_path, made[0], num_layers=8), made[1])
    assert [problem.key for problem in problems] == (["training.batch_schedule"] if refused else [])


PRINTED = [
    ({"optimizer__lr": 1e-4}, "optimizer.lr = 0.0001 (was 0.0008)"),
    ({"optimizer__qk_clip": 100.0}, "optimizer.qk_clip = 100.0 (was 0.0)"),
    ({"debug__sdc_check_interval": 50}, "debug.sdc_check_interval = 50 (was 0)"),
    ({"training__steps": 200}, "training.steps = 200 (was 100)"),
    ({"training__global_batch_size": 32}, "training.global_batch_size = 32 (was 16)"),
    ({"checkpoint__interval": 10}, "checkpoint.interval = 10 (was 500)"),
    ({"parallelism__data_parallel_shard_degree": 4}, "parallelism.data_parallel_shard_degree = 4 (was -1)"),
    ({"lr_scheduler__decay_type": "cosine"}, 'lr_scheduler.decay_type = "cosine" (was "linear")'),
    ({"lr_scheduler__total_steps": 90}, "lr_scheduler.total_steps = 90 (was none)"),
    ({"validation__enable": True}, "validation.enable = true (was false)"),
    ({"training__dataloader__num_workers": 2}, "training.dataloader.num_workers = 2 (was 0)"),
    (
        {"growth__stages": [STAGES[0], {**STAGES[1], "at": "50 steps"}]},
        'growth.stages.1.at = "50 steps" (was "20 steps")',
    ),
    ({"growth__stages": [STAGES[0], {**STAGES[1], "lr": 1e-4}]}, "growth.stages.1.lr = 0.0001 (was none)"),
    ({"growth__base__lr": 1e-4}, "growth.base.lr = 0.0001 (was none)"),
]


@pytest.mark.parametrize(("changes", "line"), PRINTED, ids=[case[1] for case in PRINTED])
def test_other_changes_take_effect_and_are_printed(changes: dict[str, Any], line: str, tmp_path: Path) -> None:
    refused, lines = compare(saved(tmp_path, recipe(), growths=1), recipe(**changes))
    assert not refused
    assert [one for one in lines if not one.startswith("so the learning rate")] == [f"changed since step-30: {line}"]


def test_groups_that_come_or_go_are_told_by_their_keys(tmp_path: Path) -> None:
    """And not as `optimizer.groups = none` besides."""
    grouped = recipe(optimizer__groups=[{"pattern": "*norm.weight", "weight_decay_factor": 0.0}])
    _, came = compare(saved(tmp_path / "without", recipe(), growths=1), grouped)
    _, went = compare(saved(tmp_path / "with", grouped, growths=1), recipe())
    pattern = "changed since step-30: optimizer.groups.0.pattern"
    assert f'{pattern} = "*norm.weight" (was none)' in came
    assert f'{pattern} = none (was "*norm.weight")' in went
    assert not any("optimizer.groups = " in line for line in (*came, *went))


def test_names_and_places_are_not_worth_a_line(tmp_path: Path) -> None:
    now = recipe(
        job__description="x",
        metrics__log_freq=3,
        metrics__layers_freq=2,
        profiling__profile_freq=9,
        data__cache_dir="/x",
    )
    assert compare(saved(tmp_path, recipe()), now) == ([], [])
    # the same sizes said in another way
    assert compare(saved(tmp_path / "2", recipe()), recipe(model__dim=256)) == ([], [])


@pytest.mark.parametrize(("name", "text"), [("recipe.toml", "steps ="), ("recipe.toml", "[nothing]"),
                                            ("lineage.json", "{"), ("lineage.json", '{"events": [{}]}'),
                                            ("lineage.json", "{}")])  # fmt: skip
def test_unreadable_recipe_or_lineage_is_one_line(name: str, text: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, recipe())
    (folder.path / name).write_text(text)
    with pytest.raises(CheckpointError, match=r"^step-30 refused: its (recipe|lineage) cannot be read [^\n]+$"):
        compare(folder, recipe())
    if name == "recipe.toml":
        with pytest.raises(CheckpointError, match=r"^step-30 refused: its recipe cannot be read"):
            decide(recipe(), Site(RunFolder(tmp_path), 1, "cpu"), folder)


# ---- decisions -------------------------------------------------------------------------------------------------------


def test_a_seed_is_drawn_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    unseeded = recipe(debug__seed=None)
    drawn = iter([111, 222])
    monkeypatch.setattr(secrets, "randbelow", lambda limit: next(drawn))
    site = Site(folder, 1, "cpu")
    first = decide(unseeded, site, None)
    assert first == Decisions(111, BFLOAT16, first.rope_scaling, None)
    folder.write_text("recipe.toml", to_toml(with_values(unseeded, {"debug.seed": first.seed})))
    assert decide(unseeded, site, None) == Decisions(111, BFLOAT16, RopeScaling(), 16), (
        "the seed of the folder was drawn again"
    )
    # a checkpoint says more than the folder
    assert decide(unseeded, site, saved(tmp_path, recipe(debug__seed=9))).seed == 9
    # the user's own comes first
    assert decide(recipe(debug__seed=3), site, None).seed == 3


def test_a_damaged_recipe_in_the_folder_is_as_none(tmp_path: Path) -> None:
    for text in ("steps =", "[nothing]\n", "\x00"):
        (tmp_path / "recipe.toml").write_text(text)
        assert decided_before(tmp_path, None) is None
    assert decided_before(tmp_path / "nowhere", None) is None


def test_a_derived_batch_size_is_kept_on_other_meshes(tmp_path: Path) -> None:
    """-1 became 8 x 2 at the first start on 2 ranks; on 4 ranks it stays 16."""
    derived = recipe(training__global_batch_size=-1, training__local_batch_size=4)
    folder = RunFolder(tmp_path)
    first = start_from(None, derived, Site(folder, 2, "cpu")).plan
    assert first.recipe.training.global_batch_size == 8
    checkpoint = saved(tmp_path, first.recipe)
    assert decide(derived, Site(folder, 1, "cpu"), checkpoint) == Decisions(
        first.seed, BFLOAT16, RopeScaling(1.0), 8, progress=checkpoint.manifest.progress
    )
    again = start_from(checkpoint, derived, Site(folder, 1, "cpu")).plan
    assert again.recipe.training.global_batch_size == 8
    assert again.phase.num_accumulation_steps == 2
    with pytest.raises(ConfigError, match=r"training\.global_batch_size: 8 is not a multiple"):
        start_from(checkpoint, derived, Site(folder, 4, "cpu"))


def test_a_start_refuses_another_run_and_prints_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = saved(tmp_path, recipe(), growths=1)
    with pytest.raises(ConfigError, match=r"debug\.seed") as caught:
        start_from(checkpoint, recipe(data__bos=False, debug__seed=6), Site(RunFolder(tmp_path), 2, "cpu"))
    assert len(caught.value.problems) == 2
    caplog.set_level("INFO", logger="titan_growth")
    start_from(checkpoint, recipe(optimizer__lr=1e-4), Site(RunFolder(tmp_path), 2, "cpu")).log()
    assert "changed since step-30: optimizer.lr = 0.0001 (was 0.0008)" in caplog.messages


def chosen(folder: Path, **changes: Any) -> StepFolder | None:
    """The checkpoint that a start goes on from, going by manifest and texts: these have no shards."""
    section = recipe(**changes).checkpoint
    return find_checkpoint(section, folder / section.folder, reads_shards=lambda found: False).checkpoint


def test_newest_checkpoint_and_the_end(tmp_path: Path) -> None:
    all_growths = len(recipe().growth.active_stages)
    assert all_growths > 0
    for step in (9, 100, 30):
        saved(tmp_path, recipe(), step=step, growths=all_growths)
    newest = chosen(tmp_path)
    assert newest is not None
    assert newest.step == 100
    assert chosen(tmp_path, checkpoint__enable=False) is None
    asked = chosen(tmp_path, checkpoint__load_step=30)
    assert asked is not None
    assert asked.step == 30
    with pytest.raises(CheckpointError, match="there is no usable step-31"):
        chosen(tmp_path, checkpoint__load_step=31)
    assert is_finished(recipe(), newest)
    assert "this run is finished at step 100" in Finished(newest).message
    fresh = resolve(recipe(), Site(RunFolder(tmp_path / "nowhere"), 2, "cpu"))
    assert isinstance(fresh, RunStart), "without a checkpoint nothing is finished"
    assert not is_finished(recipe(training__steps=101), newest)
    assert not is_finished(recipe(checkpoint__load_step=100), newest), "going back on purpose is not the end"
    saved(tmp_path, recipe(), step=101, growths=all_growths - 1)
    newest = chosen(tmp_path)
    assert newest is not None
    assert newest.step == 101
    assert not is_finished(recipe(), newest), "a growth is still to come"


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that has ended: its checkpoint holds texts only, which is all that is asked of it here."""
    saved(tmp_path, recipe(), step=100, growths=len(STAGES), model_only=True)
    monkeypatch.setattr("titan_growth.run.start.problem_of", lambda folder: None)
    return tmp_path


def ended(folder: Path, **changes: Any) -> Finished:
    start = resolve(recipe(**changes), Site(RunFolder(folder), 2, "cpu"), lambda *_: False)
    assert isinstance(start, Finished)
    return start


def test_what_changed_since_a_run_was_finished_is_named(finished: Path) -> None:
    """With `nothing to do` alone, the user would take the new setting for what was trained."""
    assert ended(finished).changes == ()
    assert "without effect" not in ended(finished).message
    left_open = {"debug__seed": None, "training__global_batch_size": -1, "training__mixed_precision_param": "auto"}
    assert ended(finished, **left_open).changes == (), "what is left open is as the run has decided it"
    assert "Changed since, without effect: optimizer.lr = 0.02 (was 0.0008). Raise training.steps" in (
        ended(finished, optimizer__lr=0.02).message
    )
    with pytest.raises(ConfigError) as caught:
        ended(finished, training__seq_len=128)
    assert [str(problem) for problem in caught.value.problems] == [
        "training.seq_len: step-100 was written with 64, the recipe says 128. "
        "Name another job.dump_folder to start a new run"
    ]


def test_the_learning_rate_after_a_change_of_the_schedule_is_printed(tmp_path: Path) -> None:
    """A longer run is decayed anew from its beginning, so the rate jumps at the next step."""
    short = recipe(growth__stages=[], lr_scheduler__warmup_steps=0, optimizer__lr=0.1)
    longer = with_values(short, {"training.steps": 200})
    middle = saved(tmp_path / "middle", short, step=50)
    assert compare(middle, longer)[1] == [
        "changed since step-50: training.steps = 200 (was 100)",
        "so the learning rate at step 51 is 7.500e-02, instead of 5.000e-02",
    ]
    last = saved(tmp_path / "last", short, step=100)
    assert compare(last, longer)[1][-1] == (
        "so the learning rate at step 101 is 5.000e-02, and was 1.000e-03 at step 100, the last one"
    )
    other = with_values(short, {"checkpoint.interval": 7})
    assert compare(middle, other)[1] == ["changed since step-50: checkpoint.interval = 7 (was 500)"]


def test_a_dry_run_leaves_nothing_behind() -> None:
    assert dry_run_of(recipe()) == recipe()
    dry = dry_run_of(recipe(comm__mode="fake_backend", validation__enable=True, metrics__enable_tensorboard=True))
    assert (dry.training.steps, dry.checkpoint.enable, dry.growth.active_stages) == (1, False, [])
    assert not dry.validation.enable
    assert not dry.metrics.enable_tensorboard


def test_problems_are_reported_beside_a_search_that_fails(tmp_path: Path) -> None:
    saved(tmp_path, recipe())
    wrong = recipe(checkpoint__load_step=3, parallelism__tensor_parallel_degree=3)
    with pytest.raises(ConfigError, match="there is no usable step-3") as caught:
        resolve(wrong, Site(RunFolder(tmp_path), 1, "cpu"))
    assert [problem.key for problem in caught.value.problems] == ["", "parallelism.tensor_parallel_degree"]


def test_a_plan_for_elsewhere_opens_no_store(tmp_path: Path) -> None:
    stored = recipe(checkpoint__folder="s3://a-bucket/run")
    start = resolve(stored, Site(RunFolder(tmp_path), 1, "cuda", elsewhere=True))
    assert isinstance(start, RunStart)
    assert "s3://a-bucket/run is not looked into" in str(start.warnings[-1])


def test_a_store_with_errors_of_its_own_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_credentials(root: Path, spare: Path | None) -> None:
        raise LookupError("Unable to locate\ncredentials")

    monkeypatch.setattr("titan_growth.checkpoint.search.committed_steps", no_credentials)
    with pytest.raises(
        CheckpointError, match=r"^checkpoint\.folder \S+: cannot be read \(Unable to locate credentials\)$"
    ):
        resolve(recipe(), Site(RunFolder(tmp_path), 1, "cpu"))
