"""Each layer of PyTorch, its weight normalized, as the Flax layer: the same outputs and gradients, and back."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn
from wn_jax.torch import (
    Array,
    batch_norm,
    conv,
    conv_transpose,
    embedding,
    from_flax,
    from_state_dict,
    linear,
    lstm,
    norm,
    to_flax,
    to_state_dict,
)

torch = pytest.importorskip("torch")
from torch.nn.utils import parametrizations  # noqa: E402


def padding(kernel, pad, more=0):
    """Of a transposed convolution, from PyTorch's."""
    return [(k - 1 - pad, k - 1 - pad + more) for k in kernel]


# PyTorch's layer, Flax's, the map, the input (features last), and for each `dim` the axes in Flax's layout.
LAYERS = {
    "linear": (
        lambda: torch.nn.Linear(7, 5),
        nn.Dense(5),
        linear("params"),
        (3, 7),
        {0: (-2,), 1: (-1,), None: (-2, -1)},
    ),
    "conv1d": (
        lambda: torch.nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2),
        nn.Conv(6, (3,), 2, [(2, 2)], kernel_dilation=2),
        conv("params"),
        (2, 9, 4),
        {0: (-3, -2), 1: (-3, -1), 2: (-2, -1), None: (-3, -2, -1)},
    ),
    "conv1d_of_one_output": (
        lambda: torch.nn.Conv1d(4, 1, 3, padding=1),
        nn.Conv(1, (3,), 1, [(1, 1)]),
        conv("params"),
        (2, 9, 4),
        {0: (-3, -2)},
    ),
    "conv1d_grouped": (
        lambda: torch.nn.Conv1d(4, 6, 3, groups=2),
        nn.Conv(6, (3,), padding="VALID", feature_group_count=2),
        conv("params"),
        (2, 9, 4),
        {0: (-3, -2), 2: (-2, -1)},
    ),
    "conv2d": (
        lambda: torch.nn.Conv2d(3, 6, (3, 2), bias=False),
        nn.Conv(6, (3, 2), padding="VALID", use_bias=False),
        conv("params"),
        (2, 8, 7, 3),
        {0: (-4, -3, -2), 3: (-4, -2, -1)},
    ),
    "conv2d_depthwise": (
        lambda: torch.nn.Conv2d(4, 8, 3, groups=4),
        nn.Conv(8, (3, 3), padding="VALID", feature_group_count=4),
        conv("params"),
        (2, 8, 7, 4),
        {0: (-4, -3, -2)},
    ),
    "conv3d": (
        lambda: torch.nn.Conv3d(2, 3, 2),
        nn.Conv(3, (2, 2, 2), padding="VALID"),
        conv("params"),
        (1, 4, 5, 3, 2),
        {0: (-5, -4, -3, -2)},
    ),
    "conv_transpose1d": (
        lambda: torch.nn.ConvTranspose1d(4, 6, 5, stride=3, padding=1, output_padding=1),
        nn.ConvTranspose(6, (5,), (3,), padding((5,), 1, 1)),
        conv_transpose("params"),
        (2, 7, 4),
        {0: (-3, -1), 1: (-3, -2), 2: (-2, -1), None: (-3, -2, -1)},
    ),
    "conv_transpose1d_transpose_kernel": (
        lambda: torch.nn.ConvTranspose1d(4, 6, 5, stride=3, padding=1),
        nn.ConvTranspose(6, (5,), (3,), padding((5,), 1), transpose_kernel=True),
        conv_transpose("params", transpose_kernel=True),
        (2, 7, 4),
        {0: (-3, -2), 1: (-3, -1)},
    ),
    "conv_transpose2d": (
        lambda: torch.nn.ConvTranspose2d(3, 2, (3, 4), stride=2, padding=1),
        nn.ConvTranspose(2, (3, 4), (2, 2), padding((3, 4), 1)),
        conv_transpose("params"),
        (2, 5, 4, 3),
        {0: (-4, -3, -1), 2: (-3, -2, -1)},
    ),
    "conv_transpose1d_depthwise": (
        lambda: torch.nn.ConvTranspose1d(6, 6, 5, stride=3, padding=1, groups=6),
        nn.Conv(6, (5,), 1, padding((5,), 1), input_dilation=3, feature_group_count=6),
        conv_transpose("params", groups=6),
        (2, 7, 6),
        {0: (-3, -2), 2: (-2, -1)},
    ),
    "conv_transpose1d_grouped": (
        lambda: torch.nn.ConvTranspose1d(6, 3, 5, stride=3, padding=1, groups=3),
        nn.Conv(3, (5,), 1, padding((5,), 1), input_dilation=3, feature_group_count=3),
        conv_transpose("params", groups=3),
        (2, 7, 6),
        {0: (-3,), 2: (-2, -1)},
    ),
    "conv_transpose1d_dilated": (
        lambda: torch.nn.ConvTranspose1d(4, 6, 5, stride=2, padding=1, dilation=3),
        nn.ConvTranspose(6, (5,), (2,), [(3 * 4 - 1, 3 * 4 - 1)], kernel_dilation=(3,)),
        conv_transpose("params"),
        (2, 7, 4),
        {0: (-3, -1)},
    ),
    "heads": (
        lambda: torch.nn.Linear(7, 6, bias=False),
        nn.DenseGeneral((2, 3), use_bias=False),
        {"weight": Array("params/kernel", "(heads d) i -> i heads d", {"heads": 2})},
        (3, 7),
        {0: (-3,)},
    ),
}
CASES = [(name, dim) for name, case in LAYERS.items() for dim in case[4]]


def to_torch(x):
    """Features from the last axis to the second."""
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def from_torch(y):
    return np.moveaxis(y.detach().numpy(), 1, -1)


@pytest.mark.parametrize(("name", "dim"), CASES)
def test_outputs_and_gradients_equal_torch_and_the_way_back_is_exact(name, dim):
    make, flax_layer, names, shape, axes = LAYERS[name]
    torch.manual_seed(0)
    layer = parametrizations.weight_norm(make(), dim=dim)
    with torch.no_grad():
        layer.parametrizations.weight.original0 *= 1.5
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    state = {f"layer.{key}": value for key, value in layer.state_dict().items()}
    target = jax.eval_shape(flax_layer.init, jax.random.key(0), x)
    names = {"layer": names}
    params = to_flax(from_state_dict(state), target, names)
    assert params["params"]["kernel"].axes == axes[dim]

    expected = layer(to_torch(x))
    (expected**2).sum().backward()
    y = wn.wrap(flax_layer.apply)(params, x)
    np.testing.assert_allclose(np.reshape(y, from_torch(expected).shape), from_torch(expected), rtol=1e-5, atol=2e-6)
    again = to_state_dict(from_flax(params, names))
    assert again.keys() == state.keys()
    assert all(np.array_equal(again[key], value.numpy()) for key, value in state.items())

    grads = jax.grad(lambda params: jnp.sum(wn.wrap(flax_layer.apply)(params, x) ** 2))(params)
    grads = to_state_dict(from_flax(grads, names))  # gradients have the structure and the layout
    for key, parameter in layer.named_parameters():
        grad = parameter.grad.numpy()
        np.testing.assert_allclose(grads[f"layer.{key}"], grad, rtol=1e-4, atol=1e-5 * np.abs(grad).max())


@pytest.mark.parametrize(
    ("make", "names", "dim"),
    [
        (lambda: torch.nn.ConvTranspose1d(6, 6, 5, groups=3), conv_transpose("params", groups=3), 0),
        (lambda: torch.nn.ConvTranspose1d(6, 6, 5, groups=3), conv_transpose("params", groups=3), 1),
        (lambda: torch.nn.ConvTranspose1d(6, 6, 5, groups=3), conv_transpose("params", groups=3), None),
    ],
)
def test_a_norm_that_is_none_over_axes_there_is_refused_and_the_folded_weight_taken(make, names, dim):
    layer = parametrizations.weight_norm(make(), dim=dim)
    tree = from_state_dict(layer.state_dict())
    flax_layer = nn.Conv(6, (5,), 1, [(4, 4)], feature_group_count=3)
    x = np.random.default_rng(0).standard_normal((2, 7, 6), np.float32)
    target = jax.eval_shape(flax_layer.init, jax.random.key(0), x)
    if dim is None:  # one norm for all is a norm over all axes
        assert to_flax(tree, target, names)["params"]["kernel"].axes == (-3, -2, -1)
        return
    with pytest.raises(ValueError, match=r"'weight' has a norm over the axes .* no norm over axes.*reconstruct"):
        to_flax(tree, target, names)
    params = to_flax(wn.reconstruct(tree), target, names)
    np.testing.assert_allclose(flax_layer.apply(params, x), from_torch(layer(to_torch(x))), rtol=1e-5, atol=1e-6)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nn.RNN(nn.OptimizedLSTMCell(5, name=f"cell_{i}"))(x)
        return x


@pytest.mark.parametrize("normalized", [True, False])
def test_an_lstm_gate_by_gate(normalized):
    torch.manual_seed(0)
    layer = torch.nn.LSTM(3, 5, num_layers=2, batch_first=True)
    for name in ("weight_ih_l0", "weight_hh_l1") if normalized else ():
        layer = parametrizations.weight_norm(layer, name)
    x = np.random.default_rng(0).standard_normal((2, 6, 3), np.float32)
    model = Recurrent()
    target = jax.eval_shape(model.init, jax.random.key(0), x)
    names = {"rnn": lstm("params/cell_0") | lstm("params/cell_1", layer=1)}
    state = {f"rnn.{key}": value for key, value in layer.state_dict().items()}
    params = to_flax(from_state_dict(state), target, names)
    assert isinstance(params["params"]["cell_0"]["if"]["kernel"], wn.WeightNorm) == normalized
    expected = layer(torch.from_numpy(x))[0].detach().numpy()
    np.testing.assert_allclose(wn.wrap(model.apply)(params, x), expected, rtol=1e-5, atol=1e-6)

    again = to_state_dict(from_flax(params, names))
    assert again.keys() == state.keys()  # the two biases became one, and zeros
    for side, value in (("ih", state["rnn.bias_ih_l1"] + state["rnn.bias_hh_l1"]), ("hh", torch.zeros(20))):
        np.testing.assert_array_equal(again[f"rnn.bias_{side}_l1"], value.numpy())
    layer.load_state_dict({key.removeprefix("rnn."): torch.from_numpy(value) for key, value in again.items()})
    np.testing.assert_allclose(layer(torch.from_numpy(x))[0].detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_an_lstm_of_both_directions():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            cells = [nn.OptimizedLSTMCell(5, name=name) for name in ("forth", "back")]
            return nn.Bidirectional(*map(nn.RNN, cells))(x)

    torch.manual_seed(0)
    layer = torch.nn.LSTM(3, 5, bidirectional=True, batch_first=True)
    x = np.random.default_rng(0).standard_normal((2, 6, 3), np.float32)
    target = jax.eval_shape(Both().init, jax.random.key(0), x)
    names = lstm("params/forth") | lstm("params/back", reverse=True)
    params = to_flax(from_state_dict(layer.state_dict()), target, names)
    expected = layer(torch.from_numpy(x))[0].detach().numpy()
    np.testing.assert_allclose(Both().apply(params, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_goes_there_and_back_exactly(dtype):
    torch.manual_seed(0)
    layer = parametrizations.weight_norm(torch.nn.Conv1d(4, 6, 3)).to(getattr(torch, dtype))
    tree, names = from_state_dict(layer.state_dict()), conv("")
    target = {"kernel": jnp.zeros((3, 4, 6), dtype), "bias": jnp.zeros(6, dtype)}
    params = to_flax(tree, target, names)
    assert (params["kernel"].g.dtype, params["kernel"].v.dtype) == (jnp.float32, dtype)
    again, before = to_state_dict(from_flax(params, names)), to_state_dict(tree)
    assert all(np.array_equal(again[key], before[key]) for key in before)


def test_embeddings_and_norms():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.LayerNorm(epsilon=1e-5)(nn.Embed(9, 4)(tokens))
            return nn.BatchNorm(use_running_average=True)(x)

    torch.manual_seed(0)
    layers = torch.nn.ModuleList([torch.nn.Embedding(9, 4), torch.nn.LayerNorm(4), torch.nn.BatchNorm1d(4)]).eval()
    with torch.no_grad():
        for value in layers.state_dict().values():
            value += torch.rand(value.shape) if value.is_floating_point() else 3
    tokens = np.arange(6).reshape(2, 3)
    target = jax.eval_shape(Model().init, jax.random.key(0), tokens)
    names = {
        "0": embedding("params/Embed_0"),
        "1": norm("params/LayerNorm_0"),
        "2": batch_norm("params/BatchNorm_0", "batch_stats/BatchNorm_0"),
    }
    variables = to_flax(from_state_dict(layers.state_dict()), target, names)
    x = layers[1](layers[0](torch.from_numpy(tokens))).transpose(1, 2)
    np.testing.assert_allclose(Model().apply(variables, tokens), from_torch(layers[2](x)), rtol=1e-5, atol=1e-5)
    again = to_state_dict(from_flax(variables, names))
    assert again.keys() == layers.state_dict().keys() - {"2.num_batches_tracked"}
