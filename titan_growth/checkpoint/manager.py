"""The step folders of a run: when to save (`saving.py`), and rolling back.

The remains of a save that died are never loaded, and are cleared when their step is saved again. A checkpoint that
fails its checks is reported and the next older one is used; if none is left, the run stops instead of starting from
scratch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from titan_growth.checkpoint.folder import StepFolder, open_step, root_of, write_manifest
from titan_growth.checkpoint.ledger import LedgerFile
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.checkpoint.retention import Retention, set_aside
from titan_growth.checkpoint.rewind import RollBackError
from titan_growth.checkpoint.saving import Saver
from titan_growth.checkpoint.search import damage_of, spare_of
from titan_growth.checkpoint.steps import (
    CommittedSteps,
    committed_steps,
    is_step_name,
    step_of,
    step_path,
)
from titan_growth.config.schema.recipe import CheckpointConfig
from titan_growth.tools.collectives import on_rank0
from titan_growth.tools.errors import CheckpointError, RefusedCheckpointError
from titan_growth.tools.location import same_place
from titan_growth.tools.logs import logger


class CheckpointManager:
    """The step folders of one run.

    Args:
        resumed: the checkpoint the run resumes from.
    """

    def __init__(self, section: CheckpointConfig, dump_folder: Path, resumed: StepFolder | None = None) -> None:
        self.section = section
        self.root = root_of(section.folder, dump_folder)
        self.ledger = LedgerFile(self.root)
        self.spare = spare_of(section)
        self.saver = Saver(section, self.ledger, Retention(self.ledger, section.keep_latest_k, self.spare), resumed)

    # ---- going back ------------------------------------------------------------------------------------------------

    def begin(self, step: int | None) -> None:
        """Takes the folder for a run that goes on from a step, or starts from scratch (None), and writes its ledger.

        Later checkpoints are set aside: the user asked for it (`load_step`, `start_fresh`), or they were refused.
        """
        if moved := on_rank0(lambda: self._begin(step), self.saver.group):
            start = "starting from scratch" if step is None else f"resuming from step {step}"
            logger.warning("%s: later checkpoints are kept as %s", start, ", ".join(moved))

    def _begin(self, step: int | None) -> list[str]:
        found = committed_steps(self.root, self.spare)
        unfinished = {step_of(error.folder) for error in found.unfinished}
        there = [one for one in found.folders if one not in unfinished]
        there = [one for one in there if not same_place(step_path(self.root, one), self.spare)]
        first = -1 if step is None else step
        asked = step is None or self.section.load_step != -1
        # The order matters: a run killed in between finds the old ledger, and does the rest at its next start.
        later = [one for one in there if one > first]
        moved = set_aside(self.root, later, "superseded" if asked else "damaged")
        if self.section.enable:
            kept = {folder.step for folder in found.usable} | {step_of(error.folder) for error in found.refused}
            self.ledger.begin(kept.intersection(there).difference(later), started_fresh=self.section.start_fresh)
        return moved

    def _set_aside_rolled_back(self, step: int) -> list[str]:
        later = [one for one in sorted(self.ledger.steps, reverse=True) if one > step]
        self.ledger.strike(later)
        return set_aside(self.root, later, "rolled-back")

    # ---- saving --------------------------------------------------------------------------------------------------

    def is_due(self, step: int, *, last: bool, wanted: bool) -> bool:
        """Whether to save this step.

        Args:
            last: this is the last step.
            wanted: the run needs the checkpoint whatever the recipe says, to grow from it or because it stops.
        """
        section = self.section
        if not section.enable or section.load_only:
            return False
        first = section.enable_first_step_checkpoint and step == 1
        return wanted or first or last or step % section.interval == 0 or self.is_permanent(step)

    def is_permanent(self, step: int) -> bool:
        """Whether `permanent_interval` keeps the checkpoint of this step."""
        interval = self.section.permanent_interval
        return interval > 0 and step % interval == 0

    def make_permanent(self, held_out_loss: float) -> StepFolder:
        """Exempts the last saved checkpoint, which the model grows from, from retention."""
        folder = self.saver.last_saved
        assert folder is not None, "a model grows from a checkpoint"
        if folder.manifest.permanent and folder.manifest.held_out_loss == held_out_loss:
            return folder
        manifest = replace(folder.manifest, permanent=True, held_out_loss=held_out_loss)
        return self._rewrite(folder, manifest)

    def roll_back(self, back: RollBackError) -> StepFolder:
        """Rolls back to an earlier checkpoint and sets later ones aside.

        Raises:
            CheckpointError: if the checkpoint is missing or damaged.
        """
        self.saver.wait()
        folder = self._roll_back_target(back)
        manifest = back.change(folder.manifest)
        # The order matters: a run killed between the two reaches the same point and rolls back again.
        moved = on_rank0(lambda: self._set_aside_rolled_back(folder.step), self.saver.group)
        changed = self._rewrite(folder, manifest)
        kept = ", ".join(moved) or "none"
        logger.warning("rolled back to %s; later checkpoints are kept as %s", folder.path.name, kept)
        return changed

    def _rewrite(self, folder: StepFolder, manifest: Manifest) -> StepFolder:
        on_rank0(lambda: write_manifest(folder.path, manifest))
        self.saver.last_saved = StepFolder(folder.path, manifest)
        return self.saver.last_saved

    def _roll_back_target(self, back: RollBackError) -> StepFolder:
        source = back.source
        if source is None:
            found = on_rank0(lambda: committed_steps(self.root))
        elif not is_step_name(source):
            raise CheckpointError(f"{back.what} cannot be rolled back: {source} is not a checkpoint of this run")
        else:
            named = on_rank0(lambda: open_step(self.root / source))
            found = CommittedSteps([named] if named is not None else [], [])
        refused = list(found.refused)
        for folder in found.usable:
            damage = damage_of(folder)
            if damage is None:
                return folder
            refused.append(folder.refused(damage))
        if source and not refused:
            refused.append(RefusedCheckpointError(source, "it does not exist"))
        why = "; ".join(map(str, refused)) or "there is no checkpoint to go back to"
        raise CheckpointError(f"{back.what} cannot be rolled back: {why}")
