"""Saving, finding and loading step folders on one rank: what is accepted, refused and kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.harness import run_ranks
from titan_growth.checkpoint.folder import StepFolder, open_step
from titan_growth.checkpoint.history import Lineage, Progress
from titan_growth.checkpoint.loading import load
from titan_growth.checkpoint.manager import CheckpointManager
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.checkpoint.search import find_checkpoint
from titan_growth.checkpoint.steps import committed_steps, step_numbers
from titan_growth.config.schema.recipe import CheckpointConfig
from titan_growth.tools.errors import CheckpointError

LINEAGE = Lineage().to_json()


def manager(folder: Path, **section: Any) -> CheckpointManager:
    return CheckpointManager(CheckpointConfig(enable=True, **{"save_retries": 0, **section}), folder)


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "layers.0.w": torch.full((4, 3), value),
        "optimizer.state.layers.0.w.exp_avg": torch.full((4, 3), 2 * value),
        "optimizer.state.layers.0.w.step": torch.tensor(value),
    }


def save(checkpoints: CheckpointManager, step: int, value: float | None = None, *, permanent: bool = False) -> Any:
    manifest = Manifest(Progress(step=step), 1, 1, "1 rank", model_only=False, permanent=permanent, metrics_offset=0)
    state = tensors(float(step) if value is None else value)
    checkpoints.saver.save(manifest, state, recipe_toml="[training]\n", lineage_json=LINEAGE)
    checkpoints.saver.wait()
    assert checkpoints.saver.last_saved is not None
    return checkpoints.saver.last_saved


def found_in(checkpoints: CheckpointManager) -> StepFolder | None:
    """The checkpoint a run would resume from."""
    found = find_checkpoint(checkpoints.section, checkpoints.root).checkpoint
    if found is not None:
        checkpoints.saver.last_saved = found
    return found


def restored(folder: Any) -> float:
    state = tensors(0.0)
    load(SafeReader(folder.path), state)
    value = state["layers.0.w"][0, 0].item()
    expected = tensors(value)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    return value


@pytest.fixture
def on_one_rank(tmp_path: Path) -> Callable[[Callable[[int, Path], Any]], Any]:
    return lambda function: run_ranks(function, 1, tmp_path)[0]


# ---- saving and loading ----------------------------------------------------------------------------------------------


def _round_trip(rank: int, folder: Path) -> None:
    checkpoints = manager(folder)
    assert found_in(checkpoints) is None
    written = save(checkpoints, 5)
    assert {path.name for path in written.path.iterdir()} == {
        ".metadata", "__0_0.distcp", "manifest.json", "recipe.toml", "lineage.json",
    }  # fmt: skip
    assert set(written.manifest.files) == {".metadata", "__0_0.distcp", "recipe.toml", "lineage.json"}
    assert written.damage(checksums=True) is None
    found = found_in(checkpoints)
    assert found == written
    assert restored(found) == 5.0
    assert set(SafeReader(found.path).tensor_entries()) == set(tensors())


def test_round_trip(on_one_rank: Any) -> None:
    on_one_rank(_round_trip)


def _torch_save(rank: int, folder: Path) -> None:
    written = save(manager(folder), 5)
    dcp_to_torch_save(written.path, folder / "all.pt")
    state = torch.load(folder / "all.pt", weights_only=True)
    flat = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    assert flat.keys() == tensors().keys()
    assert all(torch.equal(flat[name], tensor) for name, tensor in tensors(5.0).items())


def test_a_step_folder_is_a_dcp_folder(on_one_rank: Any) -> None:
    on_one_rank(_torch_save)


def _grown(rank: int, folder: Path) -> None:
    written = save(manager(folder), 5)
    wanted = {f"copies.{number}.w": torch.zeros(4, 3) for number in range(4)}
    reader = SafeReader(written.path, lambda name: list(wanted) if name == "layers.0.w" else [])
    load(reader, wanted)
    assert reader.num_chunks_read == 1
    assert all(torch.equal(tensor, torch.full((4, 3), 5.0)) for tensor in wanted.values())


def test_load_under_other_names(on_one_rank: Any) -> None:
    on_one_rank(_grown)


def _misfits(rank: int, folder: Path) -> None:
    checkpoints = manager(folder)
    path = save(checkpoints, 5).path
    for wanted, message in (
        ({"other.w": torch.zeros(1)}, "has no other.w"),
        ({"layers.0.w": torch.zeros(4, 4)}, "layers.0.w is 4 x 3 there and 4 x 4 here"),
        ({"layers.0.w": torch.zeros(12)}, "layers.0.w is 4 x 3 there and 12 here"),
        ({"layers.0.w": torch.tensor(0.0)}, "layers.0.w is 4 x 3 there and a scalar here"),
        ({"layers.0.w": torch.zeros(4, 3).bfloat16()}, "layers.0.w is torch.float32 there and torch.bfloat16 here"),
        ({f"x.{i}": torch.zeros(1) for i in range(5)}, "has no x.0; has no x.1 (and 3 more)"),
    ):
        before = {name: tensor.clone() for name, tensor in wanted.items()}
        with pytest.raises(CheckpointError) as caught:
            load(SafeReader(path), wanted)
        assert str(caught.value) == f"step-5 refused: it is of another model: {message}"
        assert all(torch.equal(before[name], wanted[name]) for name in wanted)


def test_missing_and_misfit_tensors_are_named(on_one_rank: Any) -> None:
    on_one_rank(_misfits)


def _damaged_load(rank: int, folder: Path) -> None:
    checkpoints = manager(folder)
    path = save(checkpoints, 5).path
    shard = path / "__0_0.distcp"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(CheckpointError, match=r"^step-5 refused: __0_0\.distcp, where \S+ should be, is no archive"):
        load(SafeReader(path), tensors(0.0))
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"^step-5 refused: __0_0\.distcp is missing$"):
        load(SafeReader(path), tensors(0.0))


def test_a_read_that_fails_is_one_line(on_one_rank: Any) -> None:
    on_one_rank(_damaged_load)


# ---- choosing --------------------------------------------------------------------------------------------------------


def _uncommitted(rank: int, folder: Path) -> None:
    checkpoints = manager(folder)
    save(checkpoints, 5)
    dead = save(checkpoints, 9).path
    (dead / "manifest.json").unlink()
    (dead / "__7_0.distcp").write_bytes(b"of a rank that no longer exists")
    found = found_in(checkpoints)
    assert found is not None
    assert found.step == 5
    again = save(checkpoints, 9, 90.0)
    assert not (dead / "__7_0.distcp").exists(), "old shards lie beside the new ones"
    assert found_in(checkpoints) == again
    assert restored(again) == 90.0


def test_remains_of_a_dead_save_are_ignored_and_replaced(on_one_rank: Any) -> None:
    on_one_rank(_uncommitted)


def _fallback(rank: int, folder: Path) -> None:
    checkpoints = manager(folder)
    for step in (8, 9, 10):
        save(checkpoints, step)
    shard = checkpoints.root / "step-10" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    found = found_in(checkpoints)
    assert found is not None
    assert found.step == 9
    with pytest.raises(CheckpointError, match=r"there is no usable step-10 in .*__0_0\.distcp does not match"):
        found_in(manager(folder, load_step=10))
    with pytest.raises(CheckpointError, match="there is no usable step-7 in"):
        found_in(manager(folder, load_step=7))
    asked = found_in(manager(folder, load_step=8))
    assert asked is not None
    assert asked.step == 8
    for step in (8, 9):
        (checkpoints.root / f"step-{step}" / "lineage.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds checkpoints, but none can be used: .*lineage\.json is missing"):
        found_in(checkpoints)
    assert found_in(CheckpointManager(CheckpointConfig(enable=False), folder)) is None


def test_a_damaged_one_is_passed_over_and_none_left_is_an_error(on_one_rank: Any) -> None:
    """A flipped bit; and a run whose checkpoints are all damaged must not start from scratch."""
    on_one_rank(_fallback)


def _aside(rank: int, folder: Path) -> None:
    checkpoints = manager(folder, load_step=5)
    for _ in range(2):
        for step in (5, 10):
            save(checkpoints, step)
        checkpoints.begin(5)
    assert step_numbers(checkpoints.root) == [5]
    assert (checkpoints.root / "superseded-10").is_dir()
    assert (checkpoints.root / "superseded-10-2").is_dir()


def test_going_back_keeps_later_checkpoints_aside(on_one_rank: Any) -> None:
    on_one_rank(_aside)


# ---- keeping ---------------------------------------------------------------------------------------------------------


def _retention(rank: int, folder: Path) -> None:
    checkpoints = manager(folder, keep_latest_k=2)
    for step in (1, 2, 9, 10):
        save(checkpoints, step, permanent=step in (1, 9))
    for step in (11, 12):  # two dead saves: they must not push out good ones
        (checkpoints.root / f"step-{step}").mkdir()
    assert [found.step for found in committed_steps(checkpoints.root).usable] == [10, 9, 2, 1]
    save(checkpoints, 13)
    checkpoints.saver.close()
    assert [found.step for found in committed_steps(checkpoints.root).usable] == [13, 10, 9, 1]
    for step in (14, 15):
        save(checkpoints, step)
        checkpoints.saver.close()
    assert [found.step for found in committed_steps(checkpoints.root).usable] == [15, 14, 9, 1]
    assert not (checkpoints.root / "step-2").exists()
    everything = manager(folder, keep_latest_k=0)
    save(everything, 16)
    assert [found.step for found in committed_steps(checkpoints.root).usable] == [16, 15, 14, 9, 1]


def test_the_newest_k_committed_and_the_permanent_are_kept(on_one_rank: Any) -> None:
    on_one_rank(_retention)


def _damaged_ones_do_not_count(rank: int, folder: Path) -> None:
    for step in (2, 4, 6):
        save(manager(folder), step)
    checkpoints = manager(folder, keep_latest_k=2)
    for step in (4, 6):
        shard = checkpoints.root / f"step-{step}" / "__0_0.distcp"
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(bytes(data))
    found = found_in(checkpoints)
    assert found is not None
    assert found.step == 2
    checkpoints.begin(found.step)
    save(checkpoints, 3)
    checkpoints.saver.close()
    kept = {"step-2", "step-3", "damaged-4", "damaged-6"}
    assert {path.name for path in checkpoints.root.iterdir()} == {*kept, "ledger.json"}
    save(checkpoints, 5)
    checkpoints.saver.close()
    newest = found_in(checkpoints)
    assert newest is not None
    assert newest.step == 5
    assert step_numbers(checkpoints.root) == [5, 3]


def test_damaged_checkpoints_never_push_out_good_ones(on_one_rank: Any) -> None:
    """Once passed over by a resume, they keep their files but do not count among the latest k."""
    on_one_rank(_damaged_ones_do_not_count)


def _remains(rank: int, folder: Path) -> None:
    checkpoints = manager(folder)
    for step in (2, 9):
        (checkpoints.root / f"step-{step}").mkdir(parents=True)
        (checkpoints.root / f"step-{step}" / "__0_0.distcp").write_bytes(b"half")
    save(checkpoints, 4)
    checkpoints.saver.close()
    assert step_numbers(checkpoints.root) == [9, 4], "older remains are cleared; a later one may still be being written"


def test_remains_of_dead_saves_are_cleared(on_one_rank: Any) -> None:
    on_one_rank(_remains)


def _permanent(rank: int, folder: Path) -> None:
    checkpoints = manager(folder, keep_latest_k=2)
    save(checkpoints, 1)
    kept = checkpoints.make_permanent(held_out_loss=2.5)
    assert kept.manifest.permanent
    assert kept.manifest.held_out_loss == 2.5
    for step in (2, 3, 4):
        save(checkpoints, step)
    checkpoints.saver.close()
    assert [found.step for found in committed_steps(checkpoints.root).usable] == [4, 3, 1]
    assert open_step(kept.path) == kept
    assert kept.damage(checksums=True) is None


def test_a_checkpoint_can_be_made_permanent(on_one_rank: Any) -> None:
    on_one_rank(_permanent)
