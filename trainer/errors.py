"""Errors of the trainer; see ``everstep.checkpoint.errors`` for the rules that they follow."""

from everstep.checkpoint.errors import EverstepError


class ConfigError(EverstepError):
    """The configuration cannot be run: unknown key, bad value, mesh that does not fit."""


class DataError(EverstepError):
    """The training data is missing, unreadable, too small, or not what the run began with."""


class TrainingError(EverstepError):
    """Loss or gradient are not numbers any more; nothing of that step was applied or saved."""

    def __init__(self, step: int, what: str, value: float, saved_step: int) -> None:
        super().__init__(step, what, value, saved_step)
        self.step, self.what, self.value, self.saved_step = step, what, value, saved_step

    def __str__(self) -> str:
        resume = f"go on from step {self.saved_step}" if self.saved_step else "start again"
        return (
            f"the {self.what} of step {self.step} is {self.value}: training has diverged; {resume} "
            "with a lower optim.lr, more optim.warmup_steps or a lower optim.clip_norm; where the "
            "loss had begun to rise before that, resume an earlier step"
        )
