"""A run from its first or next step to its end, on this rank: also when it goes back on the way.

Folder, data, checkpoints and heartbeat stay over a roll-back; model, optimizer and observers are made anew.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch.distributed as dist

from titan_growth.checkpoint.folder import StepFolder
from titan_growth.checkpoint.manager import CheckpointManager
from titan_growth.checkpoint.rewind import RollBackError
from titan_growth.config.loader import to_json, to_toml
from titan_growth.config.schema.recipe import Recipe
from titan_growth.liveness.exit_report import DONE, FAILED, REQUEUE, RESIZE
from titan_growth.liveness.heartbeat import Heartbeat
from titan_growth.liveness.stop_signal import StopSignal
from titan_growth.metrics.observers import Observers
from titan_growth.run.data import RunData
from titan_growth.run.start import decide, note_going_back, settle
from titan_growth.tools.collectives import on_rank0, set_timeout, timeout_in_force
from titan_growth.tools.device import Device
from titan_growth.tools.errors import ConfigError, TitanGrowthError, TrainingError
from titan_growth.tools.logs import logger
from titan_growth.tools.run_folder import RunFolder
from titan_growth.trainer import Trainer

LAST_SAVE_SECONDS = 30.0
"""For which a run that breaks off waits for a save in the background."""


@dataclass
class Session:
    """What stays when a run goes back to an earlier checkpoint and on from there."""

    asked: Recipe
    recipe: Recipe
    folder: RunFolder
    device: Device
    run_data: RunData
    checkpointer: CheckpointManager
    stop: StopSignal
    heartbeat: Heartbeat | None

    def last_checkpoint(self) -> str:
        """What the run can go on from, for the message of a run that breaks off."""
        saved = self.checkpointer.last_saved
        if saved is None:
            return "There is no checkpoint yet; the same command starts anew"
        return f"The last checkpoint is {saved.path.name}; run the same command again"

    def run(self, checkpoint: StepFolder | None) -> tuple[int, str, int | None]:
        """Trains from a checkpoint, or from the start, and from earlier ones when it has to go back.

        Returns:
            (status, message, ranks to go on with) for the exit report.
        """
        while True:
            try:
                return self._train(checkpoint)
            except RollBackError as back:
                if dist.get_world_size() > 1:
                    set_timeout(self.recipe.comm.init_timeout_seconds)
                checkpoint = self.checkpointer.roll_back(back)
            gc.collect()  # the error has kept the model alive, and another one is about to be built
            self.device.free_memory()

    def _train(self, checkpoint: StepFolder | None) -> tuple[int, str, int | None]:
        asked, recipe, folder, device = self.asked, self.recipe, self.folder, self.device
        run_data, checkpointer, stop = self.run_data, self.checkpointer, self.stop
        dry_run = recipe.comm.mode == "fake_backend"
        decisions = on_rank0(lambda: decide(recipe, folder, checkpoint))
        plan = settle(recipe, decisions, checkpoint, num_ranks=dist.get_world_size(), device_type=device.type)
        before = (checkpoint.manifest.data, checkpoint.path.name) if checkpoint is not None else ({}, "")
        if problems := run_data.changes_since(*before):
            raise ConfigError(problems)
        if checkpoint is not None and not recipe.checkpoint.load_only:
            checkpointer.set_aside_after(checkpoint.step)
            if asked.checkpoint.load_step in (-1, recipe.checkpoint.load_step):
                on_rank0(lambda: note_going_back(asked, folder))
        if not dry_run:
            on_rank0(lambda: _save_recipe(plan.recipe, folder))
        observers = Observers(plan.recipe, folder, device, checkpoint, self.heartbeat)
        for line in (plan.recipe.job.description, *plan.describe(device.type), observers.peak_source):
            logger.info("%s", line)
        trainer = Trainer(
            plan,
            run_data=run_data,
            device=device,
            checkpointer=checkpointer,
            checkpoint=checkpoint,
            observers=observers,
            stop=stop,
        )
        try:
            completed = _fit(trainer)
            for line in observers.summary(trainer.progress, checkpointer.last_saved, completed=completed):
                logger.info("%s", line)
            checkpointer.close()
        except TitanGrowthError:
            checkpointer.close()  # all ranks can still finish what they write in the background
            raise
        except BaseException:
            # Another rank may be gone. If it only waits for its own part of a save, the save is still worth a moment.
            checkpointer.close(min(LAST_SAVE_SECONDS, timeout_in_force()))
            raise
        finally:
            observers.close()
            trainer.close()
        if completed:
            return DONE, "", None
        if trainer.wanted_ranks is not None:
            return (
                RESIZE,
                f"saved at step {trainer.progress.step}; the growth wants {trainer.wanted_ranks} ranks",
                trainer.wanted_ranks,
            )
        if checkpointer.last_saved is not None and checkpointer.last_saved.step == trainer.progress.step:
            return (
                REQUEUE,
                f"stopped at step {trainer.progress.step} and saved{stop.reason}; run the same command again to go on",
                None,
            )
        key = "checkpoint.load_only is true" if recipe.checkpoint.load_only else "checkpoint.enable is false"
        return FAILED, f"stopped at step {trainer.progress.step} without saving: {key}", None


def _fit(trainer: Trainer) -> bool:
    """From here on the run has started: whatever fails is a failure (1), and no longer a bad recipe or folder (2)."""
    try:
        return trainer.fit()
    except TitanGrowthError as error:
        if error.exit_status == FAILED:
            raise
        raise TrainingError(str(error)) from error


def _save_recipe(recipe: Recipe, folder: RunFolder) -> None:
    folder.write_text("recipe.toml", to_toml(recipe))
    if recipe.job.save_config_file is not None:
        folder.write_text(recipe.job.save_config_file, to_json(recipe))
    if recipe.job.print_config:
        print(to_toml(recipe))
