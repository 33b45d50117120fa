"""What an experiment is. `toml_file` reads one from a file; tables that belong to one subject are defined there."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from experiments.config.conditioning import ConditioningConfig
from experiments.data import DataConfig
from experiments.devices.mesh import MeshConfig
from experiments.optimizers import OptimizerConfig
from experiments.schema import Count, CountOrZero, Fraction, Name, Table, distinct, several, unknown
from experiments.tasks import AnyModelConfig


class TrainConfig(Table):
    """Length of training, and what happens on the way. All arms of an experiment share it.

    Every `record_every` steps the mean training loss is recorded, every `evaluate_every` steps (default: as often) the
    network is evaluated, and every `checkpoint_every` steps (default: as often as it is evaluated) everything is saved.
    `ema` is the decay of an average of the parameters, which is then what is evaluated; 0: none. (Running averages of
    batch normalization stay those of the parameters themselves.)
    A loss that is not finite stops the run, or where an arm has several seeds or learning rates, marks that one, unless
    `on_nonfinite` says otherwise.
    The report counts the steps to each `target_loss`, of the training loss: one number, or several.
    `steps_per_call` and `members_per_call` are how many steps and how many seeds and rates make one compiled call
    (default: all up to the next record, all; on CPU with convolutions 1, as XLA is slow there in loops and in groups).
    """

    steps: Count
    record_every: Count
    evaluate_every: Count | None = None
    checkpoint_every: Count | None = None
    keep_checkpoints: Count = 2
    seeds: Count
    first_seed: CountOrZero = 0
    target_loss: Annotated[tuple[float, ...], pydantic.BeforeValidator(several)] = ()
    ema: Fraction = 0.0
    on_nonfinite: Literal["auto", "stop", "mark"] = "auto"
    steps_per_call: Count | None = None
    members_per_call: Count | None = None

    @pydantic.field_validator("target_loss")
    @classmethod
    def _targets_differ(cls, targets: tuple[float, ...]) -> tuple[float, ...]:
        return distinct(targets, "a loss")

    @pydantic.model_validator(mode="after")
    def _whole_records(self) -> TrainConfig:
        whole = {"steps": self.steps, "evaluate_every": self.evaluation_period, "checkpoint_every": self.save_period}
        for name, value in whole.items():
            if value % self.record_every:
                raise ValueError(f"{name} ({value}) must be a multiple of record_every ({self.record_every})")
        if self.first_seed + self.seeds > 2**31:
            raise ValueError(f"first_seed ({self.first_seed}) and seeds ({self.seeds}) go beyond 2**31 - 1 together")
        if self.steps_per_call and self.record_every % self.steps_per_call:
            raise ValueError(
                f"record_every ({self.record_every}) must be a multiple of steps_per_call ({self.steps_per_call})"
            )
        return self

    @property
    def evaluation_period(self) -> int:
        """Steps from one evaluation to the next."""
        return self.evaluate_every or self.record_every

    @property
    def save_period(self) -> int:
        """Steps from one checkpoint to the next."""
        return self.checkpoint_every or self.evaluation_period


class ArmConfig(Table):
    """Everything that one arm depends on."""

    data: DataConfig
    model: AnyModelConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()

    @pydantic.model_validator(mode="after")
    def _batch_has_a_deviation(self) -> ArmConfig:
        if self.model.init == "data" and (self.model.init_examples or self.data.batch_size) < 2:
            raise ValueError(
                "one example has no standard deviation for model.init = 'data'; "
                "set model.init_examples to 2 or more, or model.init = 'framework'"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _drawn_anew_in_training(self) -> ArmConfig:
        if self.data.binarize == "dynamic" and getattr(self.model, "likelihood", None) != "bernoulli":
            raise ValueError(
                "data.binarize = 'dynamic' leaves it to training to draw binary images, and only a vae with likelihood "
                "= 'bernoulli' does; set data.binarize = 'fixed', or for other pixels 'none'"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _norms_are_there_to_keep(self) -> ArmConfig:
        if self.optimizer.keep_norms and self.model.weights != "weight_norm":
            raise ValueError(
                f"optimizer.keep_norms keeps the norms of v, and weights written as {self.model.weights!r} have none; "
                "set model.weights = 'weight_norm', or leave it out"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _members_fill_calls(self) -> ArmConfig:
        members = self.train.seeds * len(self.optimizer.learning_rate)
        if self.train.members_per_call and members % self.train.members_per_call:
            raise ValueError(
                f"seeds times learning rates ({members}) must be a multiple of "
                f"train.members_per_call ({self.train.members_per_call})"
            )
        return self


class Experiment(Table):
    """A name and the resolved arms, in the order of the file. Without `[arms]` the base is the one arm, `base`.

    `conditioning` is what `python -m experiments conditioning` measures, and has no meaning to the other commands.
    """

    name: Name
    arms: dict[Name, ArmConfig]
    conditioning: ConditioningConfig | None = None

    @pydantic.model_validator(mode="after")
    def _path_is_that_of_an_arm(self) -> Experiment:
        if self.conditioning is None:
            return self
        arm, table = self.arms.get(self.conditioning.path), self.conditioning
        if arm is None:
            raise ValueError(f"conditioning.path: {unknown('arm', table.path, self.arms)}")
        if getattr(arm.model, "norm", "none") != "none":
            raise ValueError(
                f"conditioning.path: arm {table.path!r} has a normalization; choose one with norm = 'none'"
            )
        for step in table.steps:
            if step % self.train.record_every or step > self.train.steps:
                raise ValueError(
                    f"conditioning.steps: {step} must be a multiple of train.record_every ({self.train.record_every}) "
                    f"and at most train.steps ({self.train.steps})"
                )
        return self

    @property
    def train(self) -> TrainConfig:
        """The table that all arms share."""
        return next(iter(self.arms.values())).train
