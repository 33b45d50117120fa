"""An experiment: its arms, and the tables that belong to no other subject. `toml_file` reads one from a file.

The tables of data, models, optimizers, the mesh and curvature are defined with their subjects.
"""

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
    """Length of training, and what happens on the way. All arms of an experiment share it."""

    steps: Count
    """How many steps to train."""

    record_every: Count
    """Every so many steps, the mean training loss since the last record is recorded."""

    evaluate_every: Count | None = None
    """Every so many steps, the network is evaluated. Default: at each record."""

    checkpoint_every: Count | None = None
    """Every so many steps, everything is saved. Default: at each evaluation."""

    keep_checkpoints: Count = 2
    """How many checkpoints are kept: the newest ones."""

    seeds: Count
    """How many seeds are trained side by side."""

    first_seed: CountOrZero = 0
    """The first of these. The others follow it."""

    target_loss: Annotated[tuple[float, ...], pydantic.BeforeValidator(several)] = ()
    """The training losses to which the report counts the steps: one number, or several."""

    ema: Fraction = 0.0
    """The decay of an average of the parameters, which is then what is evaluated. 0: there is none.

    Running averages of batch normalization stay those of the parameters themselves.
    """

    on_nonfinite: Literal["auto", "stop", "mark"] = "auto"
    """Whether a loss that is not finite stops the run, or only marks the seed and rate that it belongs to.

    "auto": mark, where an arm has several seeds or learning rates, and else stop.
    """

    steps_per_call: Count | None = None
    """How many steps make one compiled call.

    Default: all up to the next record. On CPU with convolutions 1, as XLA is slow there in loops.
    """

    members_per_call: Count | None = None
    """How many seeds and rates make one compiled call.

    Default: all. On CPU with convolutions 1, as XLA is slow there in groups.
    """

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
    """The data that it learns from."""

    model: AnyModelConfig
    """The network with its loss, and how its weights are written."""

    optimizer: OptimizerConfig
    """How it is trained."""

    train: TrainConfig
    """How long, and what happens on the way."""

    mesh: MeshConfig = MeshConfig()
    """How it lies on the devices."""

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
    """All of a config file, with its arms resolved."""

    name: Name
    """The experiment's name, which is also part of the names of its run folders."""

    arms: dict[Name, ArmConfig]
    """The arms, in the order of the file. Without `[arms]` the base is the one arm, `base`."""

    conditioning: ConditioningConfig | None = None
    """The measurements of `python -m experiments conditioning`. To the other commands they have no meaning."""

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
