"""The tasks that can be trained: a network and its loss, as pure functions of one seed.

A task is a module here: one class of config for each of its networks (`CONFIGS`), and `build`, which makes a `Task` of
one. The module is named in `_MODULES`. No task knows of weight normalization, optimizers, seeds in parallel or files.
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

# Pydantic reads the class of a config from its `name`; a type checker cannot follow a union that is made at run time.
if TYPE_CHECKING:
    AnyModelConfig = ModelConfig
else:
    AnyModelConfig = Annotated[Union[tuple(_BUILDERS)], Field(discriminator="name")]  # noqa: UP007


def build(config: Any, dataset: Dataset, gather: Gather = lambda _, params: params) -> Task:
    """The task that trains the network that `config` describes on this data set.

    Arguments:
        config: one of the configs in `CONFIGS` of a module here.
        dataset: the data that is trained on.
        gather: `(stack, parameters) -> parameters`, which a network that scans over its layers calls in each trip, on
            the parameters of that trip's layer.

    Raises:
        ConfigError: the network does not fit the data.
    """
    return _BUILDERS[type(config)](config, dataset, gather)
