"""The networks that are timed, written once for all frameworks: their layers by name, and how these are put together.

A library makes the layers (`Dense`, `Conv`, ...) in its own way and says what the few other operations are (`Ops`), so
that all of them time the same computation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Dense:
    """A matrix multiplication along the last axis."""

    inputs: int
    """The size of that axis before it."""

    features: int
    """The size of that axis after it."""

    bias: bool = True
    """Whether a bias is added."""


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution."""

    inputs: int
    """The channels before it."""

    features: int
    """The channels after it."""

    kernel: tuple[int, ...]
    """The size of the kernel along each axis."""

    padding: int = 0
    """The zeros on both sides of each axis."""

    dilation: int = 1
    """The distance between the places that a kernel reads."""


@dataclasses.dataclass(frozen=True)
class Upsample:
    """A transposed convolution along time."""

    inputs: int
    """The channels before it."""

    features: int
    """The channels after it."""

    kernel: int
    """The size of the kernel."""

    stride: int
    """The number of samples that it makes of one."""

    @property
    def padding(self) -> int:
        """The samples that are cut off on both sides: padding in PyTorch's sense."""
        return (self.kernel - self.stride) // 2


@dataclasses.dataclass(frozen=True)
class Recurrent:
    """A recurrent layer along the second of three axes."""

    kind: str
    """The cell: "lstm" or "gru"."""

    inputs: int
    """The size of the last axis before it."""

    features: int
    """The size of the last axis after it."""


Layer = Dense | Conv | Upsample | Recurrent
Apply = Callable[[str, Any], Any]
"""Applies the layer of a name."""


class Ops(Protocol):
    """The operations of networks between layers. Which axis has the channels is each library's own choice."""

    def relu(self, x: Any) -> Any: ...
    def leaky_relu(self, x: Any, slope: float) -> Any: ...
    def gelu(self, x: Any) -> Any: ...
    def tanh(self, x: Any) -> Any: ...
    def max_pool(self, x: Any) -> Any:
        """The maximum over 2 x 2 pixels, which halves height and width."""
        ...

    def mean(self, x: Any) -> Any:
        """The mean over height and width."""
        ...

    def rms_norm(self, x: Any) -> Any:
        """RMSNorm along the last axis, without a gain."""
        ...

    def attention(self, query: Any, key: Any, value: Any, heads: int) -> Any:
        """Causal attention of (examples, places, features)."""
        ...


@dataclasses.dataclass(frozen=True)
class Network:
    """A network."""

    layers: Mapping[str, Layer]
    """Its layers by name."""

    forward: Callable[[Apply, Any, Any], Any]
    """`(apply, x, ops) -> output`."""

    input: tuple[int, ...]
    """The shape of one example, channels last."""

    @property
    def spatial(self) -> bool:
        """Whether some libraries want the channels of its input first."""
        return any(isinstance(layer, Conv | Upsample) for layer in self.layers.values())


def mlp(width: int) -> Network:
    """Three dense layers of one width."""

    def forward(apply: Apply, x: Any, ops: Ops) -> Any:
        return apply("third", ops.relu(apply("second", ops.relu(apply("first", x)))))

    return Network({name: Dense(width, width) for name in ("first", "second", "third")}, forward, (width,))


def recurrent(kind: str, steps: int, width: int) -> Network:
    """One recurrent layer."""
    return Network({"cell": Recurrent(kind, width, width)}, lambda apply, x, _: apply("cell", x), (steps, width))


def conv_pool(width: int = 96, classes: int = 10) -> Network:
    """The paper's network for CIFAR-10 (section 5.1), without noise and dropout, which cost all libraries the same."""
    wide, layers = 2 * width, dict[str, Layer]()
    for i, (inputs, features) in enumerate([(3, width), (width, width), (width, width), (width, wide)], 1):
        layers[f"conv_{i}"] = Conv(inputs, features, (3, 3), padding=1)
    layers |= {f"conv_{i}": Conv(wide, wide, (3, 3), padding=1) for i in (5, 6)}
    layers["conv_7"] = Conv(wide, wide, (3, 3))
    layers |= {f"conv_{i}": Conv(wide, wide, (1, 1)) for i in (8, 9)}
    layers["dense"] = Dense(wide, classes)

    def forward(apply: Apply, x: Any, ops: Ops) -> Any:
        for i in range(1, 10):
            x = ops.leaky_relu(apply(f"conv_{i}", x), 0.1)
            x = ops.max_pool(x) if i in (3, 6) else x
        return apply("dense", ops.mean(x))

    return Network(layers, forward, (32, 32, 3))


def hifi_gan(frames: int, channels: int = 512, mels: int = 80) -> Network:
    """The generator of HiFi-GAN V1 (Kong, Kim & Bae 2020, arXiv 2010.05646): 256 samples for each frame of mels."""
    ups, kernels, dilations = ((8, 16), (8, 16), (2, 4), (2, 4)), (3, 7, 11), (1, 3, 5)
    layers: dict[str, Layer] = {"pre": Conv(mels, channels, (7,), padding=3)}
    for i, (stride, size) in enumerate(ups):
        inputs = channels >> i
        half = inputs // 2
        layers[f"up_{i}"] = Upsample(inputs, half, size, stride)
        for k in kernels:
            for d in dilations:
                layers[f"dilated_{i}_{k}_{d}"] = Conv(half, half, (k,), padding=d * (k - 1) // 2, dilation=d)
                layers[f"straight_{i}_{k}_{d}"] = Conv(half, half, (k,), padding=(k - 1) // 2)
    layers["post"] = Conv(channels >> len(ups), 1, (7,), padding=3)

    def block(apply: Apply, x: Any, ops: Ops, name: str) -> Any:
        for d in dilations:
            y = apply(f"dilated_{name}_{d}", ops.leaky_relu(x, 0.1))
            x = x + apply(f"straight_{name}_{d}", ops.leaky_relu(y, 0.1))
        return x

    def forward(apply: Apply, x: Any, ops: Ops) -> Any:
        x = apply("pre", x)
        for i in range(len(ups)):
            x = apply(f"up_{i}", ops.leaky_relu(x, 0.1))
            first, *others = (block(apply, x, ops, f"{i}_{k}") for k in kernels)
            x = sum(others, start=first) / len(kernels)
        return ops.tanh(apply("post", ops.leaky_relu(x, 0.01)))

    return Network(layers, forward, (frames, mels))


def gpt(places: int, blocks: int = 4, width: int = 512, heads: int = 8) -> Network:
    """Blocks of causal attention and a perceptron, each after an RMSNorm and added to what goes in."""
    shapes = {"query": (1, 1), "key": (1, 1), "value": (1, 1), "out": (1, 1), "up": (1, 4), "down": (4, 1)}
    layers: dict[str, Layer] = {
        f"{name}_{i}": Dense(fan_in * width, fan_out * width, bias=False)
        for i in range(blocks)
        for name, (fan_in, fan_out) in shapes.items()
    }

    def forward(apply: Apply, x: Any, ops: Ops) -> Any:
        for i in range(blocks):
            y = ops.rms_norm(x)
            query, key, value = (apply(f"{name}_{i}", y) for name in ("query", "key", "value"))
            x = x + apply(f"out_{i}", ops.attention(query, key, value, heads))
            x = x + apply(f"down_{i}", ops.gelu(apply(f"up_{i}", ops.rms_norm(x))))
        return x

    return Network(layers, forward, (places, width))


NETWORKS: dict[str, Callable[[], Network]] = {
    "mlp-1024": functools.partial(mlp, 1024),
    "mlp-4096": functools.partial(mlp, 4096),
    "mlp-512": functools.partial(mlp, 512),
    "lstm": functools.partial(recurrent, "lstm", 128, 512),
    "gru": functools.partial(recurrent, "gru", 128, 512),
    "conv-pool": conv_pool,
    "hifi-gan": functools.partial(hifi_gan, 16),
    "gpt-16": functools.partial(gpt, 16),
    "gpt-128": functools.partial(gpt, 128),
    "gpt-512": functools.partial(gpt, 512),
}
