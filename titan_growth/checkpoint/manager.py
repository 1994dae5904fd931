"""The step folders of a run: when to save (`saving.py`), and rolling back.

A folder without a manifest is left over from a save that died. It is never loaded, and is cleared when its step is
saved again. A checkpoint that fails its checks is reported and the next older one is used; if none is left, the run
stops instead of starting from scratch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from titan_growth.checkpoint.folder import (
    CommittedSteps,
    StepFolder,
    committed_steps,
    is_step_name,
    open_step,
    root_of,
    write_manifest,
)
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.checkpoint.retention import Retention, set_aside_after
from titan_growth.checkpoint.rewind import RollBackError
from titan_growth.checkpoint.saving import Saver
from titan_growth.checkpoint.search import damage_of
from titan_growth.config.schema.recipe import CheckpointConfig
from titan_growth.tools.collectives import on_rank0
from titan_growth.tools.errors import CheckpointError, RefusedCheckpointError
from titan_growth.tools.location import folder_at
from titan_growth.tools.logs import logger


class CheckpointManager:
    """The step folders of one run.

    Args:
        resumed: the checkpoint the run resumes from.
    """

    def __init__(self, section: CheckpointConfig, dump_folder: Path, resumed: StepFolder | None = None) -> None:
        self.section = section
        self.root = root_of(section.folder, dump_folder)
        spare = folder_at(section.initial_load_path) if section.initial_load_path is not None else None
        self.saver = Saver(section, self.root, Retention(self.root, section.keep_latest_k, spare), resumed)

    # ---- going back ------------------------------------------------------------------------------------------------

    def set_aside_after(self, step: int) -> None:
        """Renames the checkpoints of later steps when a run resumes from an earlier one.

        Either the user asked for it (`load_step`), or the later ones were refused as damaged.
        """
        label = "superseded" if self.section.load_step != -1 else "damaged"
        moved = on_rank0(lambda: set_aside_after(self.root, step, label), self.saver.group)
        if moved:
            logger.warning("resuming from step %d: later checkpoints are kept as %s", step, ", ".join(moved))

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
        moved = on_rank0(lambda: set_aside_after(self.root, folder.step, "rolled-back"), self.saver.group)
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
