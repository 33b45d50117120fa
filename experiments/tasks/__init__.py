"""What can be trained: a network and its loss, as pure functions of one seed.

A task is a module here: one class of config for each of its networks, and `build`, which makes a `Task` of it. It is
then named in `_MODULES`. Nothing of it knows of weight normalization, optimizers, seeds in parallel or files.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from experiments.data import Dataset
from experiments.tasks import classification, language, regression, vae
from experiments.tasks.task import Examples, Gather, ModelConfig, ModelState, Params, Task

__all__ = ["AnyModelConfig", "Examples", "Gather", "ModelConfig", "ModelState", "Params", "Task", "build"]

_MODULES: tuple[ModuleType, ...] = (classification, regression, language, vae)
_BUILDERS = {config: module.build for module in _MODULES for config in module.CONFIGS}

if TYPE_CHECKING:
    AnyModelConfig = ModelConfig
else:
    AnyModelConfig = Annotated[Union[tuple(_BUILDERS)], Field(discriminator="name")]  # noqa: UP007


def build(config: Any, dataset: Dataset, gather: Gather = lambda _, params: params) -> Task:
    """The task that trains the network that `config` describes on this data set.

    A network that scans over its layers has each trip `gather` the parameters of its layer.

    Raises:
        ConfigError: the network does not fit the data.
    """
    return _BUILDERS[type(config)](config, dataset, gather)
