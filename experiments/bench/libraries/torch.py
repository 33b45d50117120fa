"""The networks in PyTorch, with `torch.nn.utils.parametrizations.weight_norm` on each weight, eager and compiled."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from experiments.bench.arms import Arm, CannotError
from experiments.bench.libraries.jax_steps import LEARNING_RATE, inputs
from experiments.bench.networks import Conv, Dense, Layer, Network, Recurrent, Upsample
from experiments.bench.rows import Row

Apply = Callable[[Tensor], Tensor]
State = dict[str, Tensor]


class TorchOps:
    """The operations of networks between layers. Channels are first in images and sounds."""

    relu, tanh = staticmethod(F.relu), staticmethod(torch.tanh)

    def leaky_relu(self, x: Tensor, slope: float) -> Tensor:
        return F.leaky_relu(x, slope)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")  # JAX's default

    def max_pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2)

    def mean(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))

    def rms_norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        split = (*query.shape[:-1], heads, query.shape[-1] // heads)
        q, k, v = (x.reshape(split).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(query.shape)


class Net(nn.Module):
    """A network, its layers weight-normalized or not."""

    def __init__(self, network: Network, wrapped: bool = False) -> None:
        super().__init__()
        wrap = _wrap if wrapped else lambda layer: layer
        self.network, self.ops = network, TorchOps()
        self.layers = nn.ModuleDict({name: wrap(_layer(layer)) for name, layer in network.layers.items()})
        self.wrapped, self.recurrent = wrapped, _is_recurrent(network)

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        if not (self.wrapped and self.recurrent):
            return self.network.forward(self.call, x, self.ops)
        # nn.LSTM reads a weight three times, and would compute it as often; PyTorch's docs have this for such a case.
        with parametrize.cached():
            return self.network.forward(self.call, x, self.ops)

    def call(self, name: str, x: Tensor) -> Tensor:
        """Apply a layer; of a recurrent one, the hidden states."""
        result = self.layers[name](x)
        return result[0] if isinstance(result, tuple) else result


def arms(row: Row) -> list[Arm]:
    """The plain arm and the weight-normalized one, in eager mode."""
    _check(row)
    return [_arm("torch plain", "torch plain", row), _arm("torch", "torch plain", row, wrapped=True)]


def compiled_arms(row: Row) -> list[Arm]:
    """The same through `torch.compile`."""
    _check(row)
    if _is_recurrent(row.build()):
        raise CannotError("torch.compile leaves nn.LSTM and nn.GRU as they are")
    _warm_up_compiler()
    # Not again between the two, as it would undo the first; nothing that the first has compiled fits the second.
    torch.compiler.reset()
    plain = "torch compiled plain"
    return [_arm(plain, plain, row, compiled=True), _arm("torch compiled", plain, row, wrapped=True, compiled=True)]


def build(row: Row, wrapped: bool = False) -> Net:
    """A model; with and without weight normalization it computes the same at first."""
    torch.manual_seed(0)
    return Net(row.build(), wrapped).to(_device(), _dtype(row))


def _arm(name: str, against: str, row: Row, wrapped: bool = False, compiled: bool = False) -> Arm:
    net = build(row, wrapped)
    initial = _copy(net)
    # With a break in the graph, it would be compiled in part.
    apply: Apply = torch.compile(net, fullgraph=True) if compiled else net
    run = _runner(row, net, apply)
    # It takes long, and doing it again would undo what is compiled: it is measured once, and returned each time.
    compile_again = _returning(_first_step(run)) if compiled else None
    return Arm(name, against, run, compile_again, None, _deviation(row, net, apply, initial), of_torch=True)


def _first_step(run: Callable[[int], None]) -> float:
    """The seconds of a first step, in which all is compiled, without what earlier processes have left on the disk."""
    with fresh_cache():
        start = time.perf_counter()
        run(1)
        return time.perf_counter() - start


def _returning(seconds: float) -> Callable[[], float]:
    return lambda: seconds


def _runner(row: Row, net: Net, apply: Apply) -> Callable[[int], None]:
    """A function that makes so many steps, and waits for them."""
    x = _input(row)
    parts = list(x) if row.work == "accumulate" else [x]
    step = _serve(apply, x) if row.work == "serve" else _train(net, apply, parts)

    def run(steps: int) -> None:
        for _ in range(steps):
            step()
        if x.is_cuda:
            torch.cuda.synchronize()

    return run


def _serve(apply: Apply, x: Tensor) -> Callable[[], None]:
    """A step that is a forward pass."""

    def step() -> None:
        with torch.inference_mode():
            apply(x)

    return step


def _train(net: Net, apply: Apply, parts: list[Tensor]) -> Callable[[], None]:
    """A step of gradient descent on the mean gradient of the parts of a batch."""
    params = list(net.parameters())
    optimizer = torch.optim.SGD(params, lr=LEARNING_RATE, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        for part in parts:
            (apply(part).square().mean() / len(parts)).backward()
        optimizer.step()

    return step


def _deviation(row: Row, net: Net, apply: Apply, initial: State) -> float:
    """The largest difference of the first output from that in float64, over the largest of the latter."""
    x = _input(row)
    x = x[0] if row.work == "accumulate" else x
    exact_net = build(row, net.wrapped)
    exact_net.load_state_dict(initial)
    now = _copy(net)
    net.load_state_dict(initial)
    # In the mode of the steps, as it would be compiled again for another.
    with torch.inference_mode(row.work == "serve"):
        own = apply(x).detach().double()
    net.load_state_dict(now)
    with torch.no_grad():
        exact = exact_net.double()(x.double())
    return float((own - exact).abs().max() / exact.abs().max())


@functools.cache
def _warm_up_compiler() -> None:
    """Do once what only the first compilation of a process has to: imports, and the headers for the C++ compiler."""
    net = nn.Linear(1, 1).to(_device())
    with fresh_cache():
        torch.compile(net)(torch.ones(1, 1, device=_device())).square().mean().backward()


def _check(row: Row) -> None:
    """Raise where PyTorch cannot do the work of a row."""
    if _device() == "cuda" and not torch.cuda.is_available():
        raise CannotError("this PyTorch has no CUDA, and JAX is on a GPU")
    torch.set_float32_matmul_precision("high")  # on a GPU that is what JAX has by default
    if row.work == "ensemble":
        raise CannotError(
            "torch.vmap has no rule for the operation of weight_norm, and falls back to a loop over the members"
        )


def _input(row: Row) -> Tensor:
    """The batch, of the same numbers in all libraries."""
    numbers = np.array(inputs(row, channels_first=True), np.float32)
    return torch.from_numpy(numbers).to(_device(), _dtype(row))


def _copy(net: Net) -> State:
    """A copy of the parameters, which steps do not change."""
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def _device() -> str:
    """The device that JAX computes on, by PyTorch's name."""
    return "cpu" if jax.default_backend() == "cpu" else "cuda"


def _dtype(row: Row) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[row.dtype]


def _is_recurrent(network: Network) -> bool:
    return any(isinstance(layer, Recurrent) for layer in network.layers.values())


def _wrap(layer: nn.Module) -> nn.Module:
    """A layer with weight normalization of each of its weights."""
    if isinstance(layer, nn.RNNBase):
        return weight_norm(weight_norm(layer, "weight_ih_l0"), "weight_hh_l0")
    # The axis of the outputs, as in the other libraries; PyTorch's default is that of the inputs here.
    return weight_norm(layer, dim=1) if isinstance(layer, nn.ConvTranspose1d) else weight_norm(layer)


def _layer(layer: Layer) -> nn.Module:
    if isinstance(layer, Dense):
        return nn.Linear(layer.inputs, layer.features, bias=layer.bias)
    if isinstance(layer, Conv):
        conv: Any = {1: nn.Conv1d, 2: nn.Conv2d}[len(layer.kernel)]
        return conv(layer.inputs, layer.features, layer.kernel, padding=layer.padding, dilation=layer.dilation)
    if isinstance(layer, Upsample):
        shape = (layer.inputs, layer.features, layer.kernel, layer.stride)
        return nn.ConvTranspose1d(*shape, padding=layer.padding)
    recurrent: Any = {"lstm": nn.LSTM, "gru": nn.GRU}[layer.kind]
    return recurrent(layer.inputs, layer.features, batch_first=True)
