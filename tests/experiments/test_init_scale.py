"""`model.init_scale`: read, laid over, written back, and what it makes of pre-activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tomli_w

import wn_jax as wn
from experiments import data
from experiments.config import toml_file
from experiments.engine import arm, training
from experiments.engine.members import Member
from experiments.errors import ConfigError
from tests.experiments.commands import DIGITS, arm_config, fails

BASE = """
name = "scaled"
data = { name = "digits", batch_size = 50 }
optimizer = { name = "sgd", learning_rate = 0.01 }
train = { steps = 4, record_every = 2, seeds = 1 }
mesh = { data = 1 }
[model]
name = "mlp"
hidden = [8]
weights = "weight_norm"
init = "data"
"""


def load(tmp_path, arms, *settings):
    (tmp_path / "it.toml").write_text(BASE + arms)
    return toml_file.load(tmp_path / "it.toml", settings)


def scales(experiment):
    return {name: own.model.init_scale for name, own in experiment.arms.items()}


ARMS = """
[model.init_scale]
"*" = 0.5
"Dense_1/kernel" = 0.25
[arms.same]
[arms.number]
model.init_scale = 2
[arms.more]
model.init_scale = { "Dense_0/*" = 0.125, "*" = 4.0 }
"""
WANTED = {
    "same": {"*": 0.5, "Dense_1/kernel": 0.25},
    "number": 2.0,
    "more": {"*": 4.0, "Dense_1/kernel": 0.25, "Dense_0/*": 0.125},
}


def test_a_table_of_an_arm_is_laid_over_that_of_the_base_and_a_number_stands_for_all(tmp_path):
    assert scales(load(tmp_path, ARMS)) == WANTED
    over_a_number = 'init_scale = 0.5\n[arms.a]\nmodel.init_scale = { "*" = 3.0 }\n[arms.b]\n'
    assert scales(load(tmp_path, over_a_number)) == {"a": {"*": 3.0}, "b": 0.5}


@pytest.mark.parametrize(
    "arms",
    [
        ARMS,
        # The order counts, as of globs the last that matches does, and keys alone are the same.
        '[arms.a]\nmodel.init_scale = { "a*" = 1.0, "*" = 2 }\n[arms.b]\nmodel.init_scale = { "*" = 2, "a*" = 1.0 }',
        '[arms.a]\nmodel.init_scale = { "a" = 1.0, "b" = 2.0 }\n[arms.b]\nmodel.init_scale = { "b" = 2.0 }\n',
        "[arms.a]\nmodel.init_scale = {}\n[arms.b]\n",
    ],
)
def test_the_resolved_config_has_the_same_tables_in_the_same_order(arms, tmp_path):
    experiment = load(tmp_path, arms)
    (tmp_path / "resolved.toml").write_text(tomli_w.dumps(toml_file.to_dict(experiment)))
    again = toml_file.load(tmp_path / "resolved.toml")
    assert again == experiment
    assert str(scales(again)) == str(scales(experiment))


def test_settings_take_quoted_paths(tmp_path):
    (number,) = scales(load(tmp_path, "", "model.init_scale=0.1")).values()
    assert number == 0.1
    both = ('model.init_scale."Dense_1/kernel"=0.1', "model.init_scale.'Dense_0/*'=3")
    assert list(scales(load(tmp_path, "", *both)).values()) == [{"Dense_1/kernel": 0.1, "Dense_0/*": 3.0}]
    with pytest.raises(ConfigError, match="'init_scale' is a value, not a table"):
        load(tmp_path, "", "model.init_scale=0.1", both[0])


@pytest.mark.parametrize("value", ["0", "-1.0", "nan", "inf", "true", "'x'", "[1.0]", "{ a = 0 }", "{ a = { b = 1 } }"])
def test_all_numbers_are_positive(value, tmp_path):
    said = fails("compare", DIGITS, "--set", f"arms.weight_norm.model.init_scale={value}", "--out", tmp_path / "run")
    wanted = "arms.weight_norm.model.init_scale: must be a positive number, or a table of such by the path of a weight"
    assert wanted in said
    assert ("for 'a'" in said) == value.startswith("{")


def test_a_path_that_no_weight_has_is_told_before_anything_is_trained(tmp_path):
    setting = 'arms.weight_norm.model.init_scale."Dense_0/kernle"=0.1'
    said = fails("train", DIGITS, "--arm", "weight_norm", "--set", setting, "--out", tmp_path / "run")
    assert "arm 'weight_norm': model.init_scale names leaves that params does not have: 'Dense_0/kernle'" in said
    assert "Dense_0/kernel" in said
    assert not (tmp_path / "run").exists()
    glob = load(tmp_path, "", "model.init_scale.'*/head/*'=0.1")
    with pytest.raises(ConfigError, match=r"model\.init_scale has globs that match no node: .*Dense_0/kernel"):
        arm.build(glob)


def test_without_initialization_from_data_it_has_no_meaning(tmp_path):
    arm.build(load(tmp_path, "", "model.init=framework", "model.init_scale.nowhere=0.1"))


def test_pre_activations_have_the_deviations_of_the_table(tmp_path):
    config = load(tmp_path, "", "model.init_scale.'Dense_1/*'=0.25").arms["base"]
    dataset = data.load(config.data)
    functions = training.functions(config, dataset)
    member = Member(jnp.int32(0), jnp.float32(0.01))
    examples = {name: jnp.asarray(values) for name, values in dataset.train.items()}
    state = jax.jit(functions.start)(member, examples)
    batch = {name: values[functions.first(member)] for name, values in examples.items()}
    predict = wn.wrap(lambda params: functions.task.predict(params, state.model_state, batch, jax.random.key(0))[0])
    np.testing.assert_allclose(jnp.std(predict(state.params), axis=0), 0.25, rtol=1e-4)
    assert arm_config("weight_norm").model.init_scale == 1.0
