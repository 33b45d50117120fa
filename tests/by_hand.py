"""Training written by hand in NumPy, in float64: two Dense layers with weight normalization, and three optimizers."""

import numpy as np
import optax


def data(features, targets, examples=64):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((examples, features))
    return x, np.tanh(x @ rng.standard_normal((features, targets))) + 0.1 * rng.standard_normal((examples, targets))


def reference_gradients(params, x, y):
    """Backpropagation by hand through `mean((dense(tanh(dense(x))) - y)^2)`, with equation 3 for each kernel."""
    (g1, v1, b1), (g2, v2, b2) = params
    n1, n2 = np.linalg.norm(v1, axis=0), np.linalg.norm(v2, axis=0)
    w1, w2 = v1 * (g1 / n1), v2 * (g2 / n2)
    hidden = np.tanh(x @ w1 + b1)
    error = 2 * (hidden @ w2 + b2 - y) / y.size
    grad_w2, grad_b2 = hidden.T @ error, error.sum(0)
    back = (error @ w2.T) * (1 - hidden**2)
    grad_w1, grad_b1 = x.T @ back, back.sum(0)
    gradients = []
    for g, v, n, grad_w, grad_b in ((g1, v1, n1, grad_w1, grad_b1), (g2, v2, n2, grad_w2, grad_b2)):
        grad_g = (grad_w * v).sum(0) / n
        gradients.append([grad_g, g / n * grad_w - g * grad_g / n**2 * v, grad_b])
    return gradients


def sgd(state, grad, t):
    return -0.1 * grad, state


def momentum(state, grad, t):
    state = grad + 0.9 * state
    return -0.05 * state, state


def adam(state, grad, t):
    first, second = state if isinstance(state, tuple) else (0.0, 0.0)
    first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
    return -1e-3 * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8), (first, second)


OPTIMIZERS = {
    "sgd": (sgd, optax.sgd(0.1)),
    "momentum": (momentum, optax.sgd(0.05, momentum=0.9)),
    "adam": (adam, optax.adam(1e-3)),
}


def trained(name, params, x, y, steps):
    """`params`, as `[[g, v, bias], [g, v, bias]]`, after `steps` steps of the optimizer of that name."""
    rule, _ = OPTIMIZERS[name]
    params, memory = [list(layer) for layer in params], [[0.0] * 3, [0.0] * 3]
    for t in range(1, steps + 1):
        gradients = reference_gradients(params, x, y)
        for layer, leaf in np.ndindex(2, 3):
            update, memory[layer][leaf] = rule(memory[layer][leaf], gradients[layer][leaf], t)
            params[layer][leaf] = params[layer][leaf] + update
    return params


def assert_close(ours, theirs, rtol=1e-5):
    for layer, expected in zip(ours, theirs, strict=True):
        for a, b in zip(layer, expected, strict=True):
            assert np.abs(a - b).max() <= rtol * np.abs(b).max()
