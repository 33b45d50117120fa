"""Configs that cannot run: one message with file, key, what is allowed and was meant; exit code 2; no run folder."""

import tomllib

import pytest
import tomli_w

from experiments.config import toml_file
from experiments.errors import ConfigError
from tests.experiments.commands import DIGITS, ROOT, fails

# Those of experiments with arms; the vocoder's is read in test_vocoder_run.
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.toml") if path.stem != "vocoder")


def write(file, text):
    """The digits config without its arms, and with the tables in `text` written over it."""
    raw = tomllib.loads(DIGITS.read_text())
    del raw["arms"]
    for key, value in tomllib.loads(text).items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    file.write_text(tomli_w.dumps(raw))
    return file


LARGE = {
    "digits": ("9" * 5000, "a number cannot be read: Exceeds the limit (4300 digits)"),
    "digits in base 16": ("0x" + "f" * 5000, "an int has more than 64 bits"),
    "digits in a list": ("[1, [1, 9223372036854775808]]", "an int has more than 64 bits"),
    "brackets": ("[" * 5000 + "]" * 5000, "it is nested too deep"),
    "less brackets": ("[" * 100 + "]" * 100, "tables and lists are nested more than 30 deep"),
    "tables": ("{a = " * 5000 + "1" + "}" * 5000, "it is nested too deep"),
    "dots": ("{a" + ".a" * 500 + " = 1}", "tables and lists are nested more than 30 deep"),
}


@pytest.mark.parametrize("name", LARGE)
def test_values_that_are_too_large_to_be_meant(name, tmp_path):
    """In a file and by `--set`: one error of a few lines, however much was given."""
    value, message = LARGE[name]
    (tmp_path / "config.toml").write_text(f"train.steps = {value}")
    for path, settings in ((tmp_path / "config.toml", []), (DIGITS, [f"train.steps={value}"])):
        with pytest.raises(ConfigError) as caught:
            toml_file.load(path, settings)
        assert str(caught.value).startswith(f"{path}: ")
        assert message in str(caught.value)
        assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("a" + ".a" * 500 + "=1", "tables and lists are nested more than 30 deep"),
        ("train.steps=" + "[" * 5000, "it is nested too deep"),
        ("train.steps='" + "9" * 5000 + "'", "train.steps: Input should be a valid integer"),
        ("train.steps=" + "x" * 5000, "train.steps: Input should be a valid integer"),
        ("model.name=" + "x" * 5000, "is not allowed"),
        ("[" * 5000 + "=1", "expected a.b=value"),
    ],
)
def test_settings_that_are_too_large_to_be_meant(setting, message):
    with pytest.raises(ConfigError) as caught:
        toml_file.load(DIGITS, [setting])
    assert message in str(caught.value)
    assert len(str(caught.value)) < 700


# What is written over the digits config, and what the error says.
BAD = {
    "unknown key": (
        "[optimizer]\nlearning_rat = 0.1",
        "optimizer.learning_rat: unknown key (did you mean 'learning_rate'?); allowed: name, learning_rate, options, ",
    ),
    "unknown table": (
        "[optimiser]\nx = 1",
        "optimiser: unknown key (did you mean 'optimizer'?); allowed: data, model, optimizer, train, mesh, name, arms",
    ),
    "wrong type": ("[train]\nseeds = 'five'", "train.seeds: Input should be a valid integer; got 'five'"),
    "a value for a table": ("train = 5", "train: must be a table; got 5"),
    "a value for the model": ("model = 5", "model: must be a table; got 5"),
    "a model without a name": ("model = 5\n[arms.wn]\nmodel = { hidden = [4] }", "model: name: missing"),
    "out of range": ("[train]\nema = 1.0", "train.ema: Input should be less than 1; got 1.0"),
    "no such choice": (
        "[model]\nweights = 'weigth_norm'",
        "model.weights: 'weigth_norm' is not allowed (did you mean 'weight_norm'?); allowed: plain, weight_norm, froz",
    ),
    "unknown data set": (
        "[data]\nname = 'digit'",
        "data.name: unknown data set 'digit' (did you mean 'digits'?); data sets: digits, mnist, cifar10",
    ),
    "unknown model": ("[model]\nname = 'mpl'", "'mpl' is not allowed (did you mean 'mlp'?); allowed: mlp, conv, "),
    "a key of another model": ("[model]\nname = 'conv_pool'", "model.hidden: unknown key; allowed: weights, scale, "),
    "a layer without units": ("[model]\nhidden = [8, 0]", "model.hidden.1: Input should be greater than 0; got 0"),
    "unknown schedule": (
        "[optimizer]\nschedule = 'cosin'",
        "optimizer.schedule: 'cosin' is not allowed (did you mean 'cosine'?); allowed: constant, linear_second_half, ",
    ),
    "unknown optimizer": ("[optimizer]\nname = 'adm'", "unknown optimizer 'adm' (did you mean 'adam'?); optimizers: "),
    "an optimizer with a line search": (
        "[optimizer]\nname = 'lbfgs'\noptions = {}",
        "optax's lbfgs cannot be used here with these options",
    ),
    "unknown option": (
        "[optimizer]\noptions.momentun = 0.5",
        "optimizer: options.momentun: sgd has no such option (did you mean 'momentum'?); it has momentum, ",
    ),
    "an option of another optimizer": (
        "[optimizer]\nname = 'adam'",
        "options.momentum: adam has no such option; it has b1, b2, eps",
    ),
    "unknown option later": (
        "[optimizer]\nsecond_half.momentun = 0.5",
        "second_half.momentun: sgd has no such option (did you mean ",
    ),
    "an option of the wrong type": (
        "[optimizer]\nname = 'adam'\noptions = { b1 = 'x' }",
        "options.b1: must be a number; got 'x'",
    ),
    "a switched option that is no number": (
        "[optimizer]\nsecond_half.momentum = 'x'",
        "optimizer.second_half.momentum: Input should be a valid number; got 'x'",
    ),
    "a switched option that is a switch": (
        "[optimizer]\noptions.nesterov = true\nsecond_half.nesterov = 0",
        "nesterov",
    ),
    "no rates": ("[optimizer]\nlearning_rate = []", "optimizer.learning_rate: is an empty list; give one number, or "),
    "a rate twice": ("[optimizer]\nlearning_rate = [0.1, 0.2, 0.1]", "learning_rate: [0.1, 0.2, 0.1] names a rate tw"),
    "a negative rate": ("[optimizer]\nlearning_rate = -0.1", "Input should be greater than 0; got -0.1"),
    "a negative rate in a list": (
        "[optimizer]\nlearning_rate = [0.1, -0.1]",
        "optimizer.learning_rate.1: Input should be greater than 0; got -0.1",
    ),
    "a rate that is text": (
        "[optimizer]\nlearning_rate = ['x']",
        "optimizer.learning_rate.0: Input should be a valid ",
    ),
    "a rate of infinity": ("[optimizer]\nlearning_rate = inf", "Input should be a finite number; got inf"),
    "a rate of NaN": ("[optimizer]\nlearning_rate = nan", "Input should be a finite number; got nan"),
    "decay of what is not": (
        "[optimizer.weight_decay]\nw = 0.1",
        "optimizer.weight_decay.w: 'w' is not allowed; allowed: g, v, weight, other",
    ),
    "negative decay": (
        "[optimizer.weight_decay]\ng = -0.1",
        "optimizer.weight_decay.g: Input should be greater than or equal to 0; got -0.1",
    ),
    "no clipping by 0": ("[optimizer]\nclip_norm = 0", "optimizer.clip_norm: Input should be greater than 0; got 0"),
    "unknown key of an arm": (
        "[arms.wn]\nmodel.wieghts = 'plain'",
        "arms.wn.model.wieghts: unknown key (did you mean 'weights'?); allowed: weights, scale, init, ",
    ),
    "no such choice in an arm": (
        "[arms.wn]\nmodel.norm = 'bach'",
        "arms.wn.model.norm: 'bach' is not allowed (did you mean 'batch'?)",
    ),
    "unknown optimizer of an arm": (
        "[arms.wn]\noptimizer = { name = 'adm', options = {} }",
        "unknown optimizer 'adm' (did you mean 'adam'?)",
    ),
    "an arm that is no table": ("[arms]\nwn = 3", "arms must be tables"),
    "arms that are no table": ("arms = 3", "arms must be tables"),
    "an arm of another length": ("[arms.plain]\n[arms.wn]\ntrain.steps = 24", "arms are compared at the same steps"),
    "uneven records": ("[train]\nrecord_every = 7", "train: steps (600) must be a multiple of record_every (7)"),
    "uneven evaluations": (
        "[train]\nevaluate_every = 30",
        "train: evaluate_every (30) must be a multiple of record_every (12)",
    ),
    "uneven checkpoints": (
        "[train]\ncheckpoint_every = 30",
        "train: checkpoint_every (30) must be a multiple of record_every (12)",
    ),
    "uneven calls": (
        "[train]\nsteps_per_call = 5",
        "train: record_every (12) must be a multiple of steps_per_call (5)",
    ),
    "members that fill no calls": (
        "[train]\nmembers_per_call = 4",
        "seeds times learning rates (10) must be a multiple of train.members_per_call (4)",
    ),
    "magnitudes from data without any": (
        "[model]\ninit = 'data'",
        "model: init = 'data' sets the magnitudes of weights, and plain ones have none; set weights = 'weight_norm' or",
    ),
    "magnitudes from data in an arm": ("[arms.wn]\nmodel.init = 'data'", "arms.wn.model: init = 'data' sets the magn"),
    "magnitudes from one example": (
        "[data]\nbatch_size = 1\n[model]\ninit = 'data'\nweights = 'weight_norm'",
        "one example has no standard deviation for model.init = 'data'; set model.init_examples to 2 or more, or",
    ),
    "magnitudes from one example of many": (
        "[arms.wn]\nmodel = { init = 'data', weights = 'frozen_scale', init_examples = 1 }",
        "arms.wn: one example has no standard deviation",
    ),
    "no name": ("name = ''", "name: String should match pattern"),
    "a name in an arm": (
        "[arms.wn]\nname = 'x'",
        "arms.wn.name: unknown key; allowed: data, model, optimizer, train, mesh",
    ),
    "an arm's name": ('[arms."[x]"]', "String should match pattern"),
    "a seed too large": ("[train]\nfirst_seed = 9999999999", "train.first_seed: Input should be less than 2147483648"),
    "unknown rule": ("[train]\non_nonfinite = 'stopp'", "train.on_nonfinite: 'stopp' is not allowed (did you mean 'st"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_config(name, tmp_path):
    text, message = BAD[name]
    file = write(tmp_path / "bad.toml", text)
    errors = fails("compare", file, "--out", tmp_path / "run")
    assert message in errors
    assert str(file) in errors
    assert not (tmp_path / "run").exists()


# What is right as a config, and does not fit the data or the machine.
UNFIT = {
    "a batch too large": ("[data]\nbatch_size = 5000", "data.batch_size: 5000 is more than the 1297 training examples"),
    "flat examples for convolutions": (
        "model = 0\n[arms.conv]\nmodel = { name = 'conv_pool' }",
        "model.name: conv_pool needs images of 12 x 12 pixels or more with channels, and the examples have the shape "
        "(64,); choose model.name = 'mlp'",
    ),
    "no folder of data": (
        "[data]\nname = 'mnist'\ndir = 'nowhere/at/all'",
        "data.name = 'mnist': no folder has all of its files; looked in\n  nowhere/at/all/mnist: no such folder\n"
        "  nowhere/at/all: no such folder\nrun `python -m experiments fetch mnist`",
    ),
    "more devices than there are": (
        "[mesh]\ndata = 33\nfsdp = 3",
        "mesh: data 33 x fsdp 3 x model 1 = 99 devices are wanted, and JAX sees 8 here; lower them",
    ),
    "more devices than are left for the batch": (
        "[mesh]\nmodel = 16",
        "mesh: data 1 x fsdp 1 x model 16 = 16 devices are wanted, and JAX sees 8 here; lower them",
    ),
    "features that cannot be shared out": (
        "[mesh]\nmodel = 3",
        "mesh.model: 3 does not divide the features of a layer; change it, or leave it out",
    ),
    "sums that cannot be shared out": (
        "[data]\nbatch_size = 105\n[model]\nhidden = [9]\n[mesh]\nfsdp = 7",
        "mesh.fsdp: 7 does not divide what a layer sums over, and no features either; change it, or leave it out",
    ),
    "devices that share no batch": (
        "[mesh]\nfsdp = 8",
        "data.batch_size: 100 examples cannot be shared out evenly among 8 devices (mesh: data 1 x fsdp 8); change it "
        "or [mesh]",
    ),
    "magnitudes from more examples than there are": (
        "[model]\ninit = 'data'\nweights = 'weight_norm'\ninit_examples = 2000",
        "model.init_examples: 2000 is more than the 1297 training examples",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_config_that_does_not_fit(name, tmp_path):
    text, message = UNFIT[name]
    assert message in fails("compare", write(tmp_path / "bad.toml", text), "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_broken_toml_names_the_line(tmp_path):
    (tmp_path / "broken.toml").write_text("[data\nname = 1")
    errors = fails("compare", tmp_path / "broken.toml")
    assert "broken.toml: not valid TOML: " in errors
    assert "line 1" in errors


def test_a_config_without_a_name_says_so(tmp_path):
    (tmp_path / "unnamed.toml").write_text(DIGITS.read_text().replace('name = "digits"', "", 1))
    assert "unnamed.toml: name: missing" in fails("compare", tmp_path / "unnamed.toml")


def test_a_config_without_arms_is_one_arm(tmp_path):
    assert list(toml_file.load(write(tmp_path / "base.toml", "")).arms) == ["base"]


def test_settings_reach_base_and_arms():
    experiment = toml_file.load(DIGITS, ["optimizer.learning_rate=0.5", "arms.plain.optimizer.learning_rate=[0.25, 1]"])
    rates = {name: arm.optimizer.learning_rate for name, arm in experiment.arms.items()}
    assert rates.pop("plain") == (0.25, 1.0)
    assert set(rates.values()) == {(0.5,)}


def test_quoted_keys_are_toml_keys():
    experiment = toml_file.load(DIGITS, ['arms."plain".model.norm=batch'])
    assert experiment.arms["plain"].model.norm == "batch"


def test_selected_arms_are_as_they_were():
    experiment = toml_file.load(DIGITS)
    chosen = toml_file.select(experiment, ["batch_norm", "plain"])
    assert chosen.arms == {name: experiment.arms[name] for name in ("batch_norm", "plain")}
    assert (chosen.name, chosen.train) == (experiment.name, experiment.train)
    with pytest.raises(ConfigError, match=r"unknown arm 'plian' .did you mean 'plain'.*; arms: plain, weight_norm, "):
        toml_file.select(experiment, ["plain", "plian"])


# Arms of different kinds, where one has what another has not.
KINDS = """
model = 0
optimizer = 0
train = { steps = 8, record_every = 2, seeds = 1, target_loss = 1e-8, ema = 0.5 }
[arms.mlp]
model = { name = "mlp", hidden = [] }
optimizer = { name = "sgd", learning_rate = 1, options = { momentum = 0.9, nesterov = true }, clip_norm = 1.5 }
[arms.conv]
data = { name = "cifar10", validation = 5, dir = "a \\"quoted\\" place" }
model = { name = "conv_pool", width = 8, noise = 0.0, weights = "weight_norm", init = "data", init_examples = 9 }
optimizer = { name = "adam", learning_rate = [0.1, 3e-4], second_half = { b1 = 0.5 }, weight_decay = { g = 0.1 } }
[arms.wide]
model = { name = "mlp", hidden = [4, 4], norm = "batch" }
optimizer = { name = "adam", learning_rate = [0.1], schedule = "cosine", warmup_steps = 3 }
"""


@pytest.mark.parametrize("file", [*CONFIGS, "kinds"], ids=lambda file: getattr(file, "stem", file))
def test_the_resolved_config_loads_as_the_same_experiment(file, tmp_path):
    experiment = toml_file.load(write(tmp_path / "kinds.toml", KINDS) if file == "kinds" else file)
    for chosen in (experiment, *(toml_file.select(experiment, [name]) for name in experiment.arms)):
        resolved = tmp_path / "resolved.toml"
        resolved.write_text(tomli_w.dumps(toml_file.to_dict(chosen)))
        again = toml_file.load(resolved)
        assert again == chosen
        assert list(again.arms) == list(chosen.arms)


def test_a_setting_on_a_resolved_config_reaches_all_arms(tmp_path):
    resolved = tmp_path / "resolved.toml"
    content = toml_file.to_dict(toml_file.load(ROOT / "configs" / "cifar10.toml"))
    assert (content["model"]["noise"], content["train"]["ema"]) == (0.15, 0.0)  # what is not in the file is spelt out
    assert content["arms"]["batch_norm"] == {"model": {"weights": "plain", "init": "framework", "norm": "batch"}}
    resolved.write_text(tomli_w.dumps(content))
    settings = ["data.batch_size=50", "model.width=8", "optimizer.learning_rate=[0.5, 0.25]", "optimizer.clip_norm=2"]
    again = toml_file.load(resolved, [*settings, "optimizer.options.b1=0.75", "train.seeds=3"])
    for arm in again.arms.values():
        assert (arm.data.batch_size, arm.model.width, arm.train.seeds) == (50, 8, 3)
        assert (arm.optimizer.learning_rate, arm.optimizer.clip_norm) == ((0.5, 0.25), 2)
        assert arm.optimizer.options == {"b1": 0.75, "b2": 0.999, "eps": 0.0, "eps_root": 1e-8}
    assert [arm.model.norm for arm in again.arms.values()] == ["none", "none", "mean_only", "mean_only", "batch"]
