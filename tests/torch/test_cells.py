"""GRUs, and cells of both kinds: the outputs of PyTorch's, from its state dicts, and the way back."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn
from wn_jax.torch import Array, from_flax, from_state_dict, gru, gru_cell, lstm_cell, to_flax, to_state_dict

torch = pytest.importorskip("torch")
parametrizations = torch.nn.utils.parametrizations

X = np.random.default_rng(0).standard_normal((2, 6, 3), np.float32)


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nn.RNN(nn.GRUCell(5, name=f"cell_{i}"))(x)
        return x


class Both(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Bidirectional(*(nn.RNN(nn.GRUCell(5, name=name)) for name in ("forth", "back")))(x)


def outputs(layer):
    with torch.no_grad():
        return layer(torch.from_numpy(X))[0].numpy()


@pytest.mark.parametrize("normalized", [(), ("weight_ih_l0", "weight_hh_l1")])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gru_gate_by_gate(normalized, bias):
    torch.manual_seed(0)
    layer = torch.nn.GRU(3, 5, num_layers=2, batch_first=True, bias=bias)
    for name in normalized:
        layer = parametrizations.weight_norm(layer, name)
    target = jax.eval_shape(Stack().init, jax.random.key(0), X)
    names = {"rnn": gru("params/cell_0") | gru("params/cell_1", layer=1)}
    state = {f"rnn.{key}": value for key, value in layer.state_dict().items()}
    if not bias:  # Flax' cell always has biases
        zeros = {f"rnn.bias_{side}_l{i}": np.zeros(15, np.float32) for side in ("ih", "hh") for i in range(2)}
        state |= zeros
    params = to_flax(from_state_dict(state), target, names)
    assert isinstance(params["params"]["cell_0"]["iz"]["kernel"], wn.WeightNorm) == bool(normalized)
    np.testing.assert_allclose(wn.wrap(Stack().apply)(params, X), outputs(layer), rtol=1e-5, atol=1e-6)

    again = to_state_dict(from_flax(params, names))
    assert again.keys() == state.keys()
    again = {key.removeprefix("rnn."): torch.from_numpy(value) for key, value in again.items()}
    before = outputs(layer)
    layer.load_state_dict({key: value for key, value in again.items() if bias or "bias" not in key})
    np.testing.assert_allclose(outputs(layer), before, rtol=1e-5, atol=1e-6)


def test_the_bias_inside_of_the_product_stays_apart():
    """Of the gates r, z and n: the two biases of r and of z are one sum, those of n are two."""
    torch.manual_seed(0)
    layer = torch.nn.GRU(3, 5, batch_first=True)
    target = jax.eval_shape(nn.RNN(nn.GRUCell(5)).init, jax.random.key(0), X)
    names = gru("params/cell")
    cell = to_flax(from_state_dict(layer.state_dict()), target, names)["params"]["cell"]
    ours = [cell["ir"]["bias"], cell["iz"]["bias"], cell["in"]["bias"], cell["hn"]["bias"]]
    first, second = (getattr(layer, f"bias_{side}_l0").detach().numpy().reshape(3, 5) for side in ("ih", "hh"))
    np.testing.assert_allclose(ours, [first[0] + second[0], first[1] + second[1], first[2], second[2]], rtol=1e-6)
    again = to_state_dict(from_flax({"params": {"cell": cell}}, names))
    np.testing.assert_array_equal(again["bias_hh_l0"].reshape(3, 5)[:2], 0)
    np.testing.assert_array_equal(again["bias_hh_l0"].reshape(3, 5)[2], second[2])


def test_the_gradients_of_a_gru():
    torch.manual_seed(0)
    layer = torch.nn.GRU(3, 5, batch_first=True)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        layer = parametrizations.weight_norm(layer, name)
    model, names = nn.RNN(nn.GRUCell(5)), gru("params/cell")
    params = to_flax(from_state_dict(layer.state_dict()), jax.eval_shape(model.init, jax.random.key(0), X), names)
    ours = jax.grad(lambda params: (wn.wrap(model.apply)(params, X) ** 2).sum())(params)
    ours = to_state_dict(from_flax(ours, names))
    (layer(torch.from_numpy(X))[0] ** 2).sum().backward()
    for name, value in layer.named_parameters():
        kept = slice(10, None) if name == "bias_hh_l0" else slice(None)  # of r and z, one bias has the sum
        np.testing.assert_allclose(ours[name][kept], value.grad.numpy()[kept], rtol=1e-4, atol=1e-5)


def test_a_gru_of_both_directions():
    torch.manual_seed(0)
    layer = torch.nn.GRU(3, 5, bidirectional=True, batch_first=True)
    target = jax.eval_shape(Both().init, jax.random.key(0), X)
    names = gru("params/forth") | gru("params/back", reverse=True)
    params = to_flax(from_state_dict(layer.state_dict()), target, names)
    np.testing.assert_allclose(Both().apply(params, X), outputs(layer), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(
    ("theirs", "ours", "layout"),
    [
        (torch.nn.LSTMCell, nn.LSTMCell, lstm_cell),
        (torch.nn.LSTMCell, nn.OptimizedLSTMCell, lstm_cell),
        (torch.nn.GRUCell, nn.GRUCell, gru_cell),
    ],
)
def test_one_step_of_a_cell(theirs, ours, layout, normalized):
    torch.manual_seed(0)
    layer = theirs(3, 5)
    if normalized:
        layer = torch.nn.utils.weight_norm(torch.nn.utils.weight_norm(layer, "weight_ih"), "weight_hh")
    x, h, c = (np.random.default_rng(i).standard_normal((2, size), np.float32) for i, size in enumerate((3, 5, 5)))
    is_gru = theirs is torch.nn.GRUCell
    carry = jnp.asarray(h) if is_gru else (jnp.asarray(c), jnp.asarray(h))
    state = torch.from_numpy(h) if is_gru else (torch.from_numpy(h), torch.from_numpy(c))
    with torch.no_grad():
        expected = layer(torch.from_numpy(x), state)
    cell = ours(5)
    target = jax.eval_shape(cell.init, jax.random.key(0), carry, x)
    params = to_flax(from_state_dict(layer.state_dict()), target, layout("params"))
    _, y = wn.wrap(cell.apply)(params, carry, x)
    np.testing.assert_allclose(y, (expected if is_gru else expected[0]).numpy(), rtol=1e-5, atol=1e-6)

    again = to_state_dict(from_flax(params, layout("params")), "old")
    assert again.keys() == layer.state_dict().keys()
    for name in again:
        if "bias" not in name:
            np.testing.assert_array_equal(again[name], layer.state_dict()[name].numpy())


def test_an_lstm_cell_of_equinox():
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.LSTMCell(3, 5), "weight_ih")
    names = {"weight_ih": "weight_ih", "weight_hh": "weight_hh"}
    names |= {name: Array("bias", add=True) for name in ("bias_ih", "bias_hh")}
    cell = eqx.nn.LSTMCell(3, 5, key=jax.random.key(0))
    cell = to_flax(from_state_dict(layer.state_dict()), cell, names)
    x, h, c = (np.random.default_rng(i).standard_normal(size, np.float32) for i, size in enumerate((3, 5, 5)))
    with torch.no_grad():
        expected = layer(*(torch.from_numpy(x[None]), [torch.from_numpy(h[None]), torch.from_numpy(c[None])]))
    ours = wn.wrap(lambda cell, x: cell(x, (jnp.asarray(h), jnp.asarray(c))))(cell, jnp.asarray(x))
    for value, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(value, other.numpy()[0], rtol=1e-5, atol=1e-6)


def test_a_linear_layer_of_haiku():
    torch.manual_seed(0)
    layer = parametrizations.weight_norm(torch.nn.Linear(3, 5))
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([5])(x)))
    target = net.init(jax.random.key(0), X)
    names = {"fc": {"weight": Array("mlp/~/linear_0/w", "o i -> i o"), "bias": "mlp/~/linear_0/b"}}
    state = {f"fc.{name}": value for name, value in layer.state_dict().items()}
    params = to_flax(from_state_dict(state), target, names)
    with torch.no_grad():
        np.testing.assert_allclose(wn.wrap(net.apply)(params, X), layer(torch.from_numpy(X)).numpy(), atol=1e-6)


def test_a_grouped_transposed_convolution_of_equinox():
    torch.manual_seed(0)
    options = {"kernel_size": 5, "stride": 2, "padding": 1, "groups": 2}
    layer = parametrizations.weight_norm(torch.nn.ConvTranspose1d(4, 2, **options))
    kernel = Array("weight", "(g i) o k -> (g o) i k", {"g": 2}, flip=True)
    names = {"weight": kernel, "bias": Array("bias", "o -> o 1")}
    ours = eqx.nn.ConvTranspose1d(4, 2, **options, key=jax.random.key(0))
    ours = to_flax(from_state_dict(layer.state_dict()), ours, names)
    x = np.random.default_rng(0).standard_normal((4, 9), np.float32)
    with torch.no_grad():
        expected = layer(torch.from_numpy(x)[None])[0].numpy()
    np.testing.assert_allclose(wn.wrap(lambda layer, x: layer(x))(ours, jnp.asarray(x)), expected, atol=1e-6)
    assert to_state_dict(from_flax(ours, names)).keys() == layer.state_dict().keys()
