"""Errors of the trainer; see ``everstep.checkpoint.errors`` for the rules that they follow."""

from everstep.checkpoint.errors import EverstepError


class ConfigError(EverstepError):
    """The configuration cannot be run: unknown key, bad value, mesh that does not fit."""


class DataError(EverstepError):
    """The training data is missing, unreadable, too small, or not what the run began with."""


class TrainingError(EverstepError):
    """The loss is not a number any more; nothing is saved, so the last checkpoint is a good one."""

    def __init__(self, step: int, loss: float, saved_step: int) -> None:
        super().__init__(step, loss, saved_step)
        self.step, self.loss, self.saved_step = step, loss, saved_step

    def __str__(self) -> str:
        resume = f"resume from step {self.saved_step}" if self.saved_step else "start again"
        return (
            f"the loss of step {self.step} is {self.loss}: training has diverged; {resume} with a "
            "lower optim.lr, more optim.warmup_steps or optim.clip_norm"
        )
