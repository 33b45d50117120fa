"""Threads: models that share nothing run side by side; on one model, and on what two models share, they take turns."""

import copy
import gc
import pickle
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wn_jax as wn
from tests.nnx.net import AXES, Net, X, arrays, is_whole
from wn_jax.nnx import WeightNormed, _turns, split, update

LONG = 20  # seconds after which a test gives up on threads that wait


class Stop(nnx.Module):
    """A layer, and something that happens inside of the call."""

    def __init__(self, hook, linear=None):
        self.linear = linear or nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.hook = hook

    def __call__(self, x):
        self.hook()
        return self.linear(x)


def stop(hook, scale="weight"):
    return WeightNormed(Stop(hook), {"linear/kernel": -2}, scale=scale)


def together(*works):
    """The results of functions that run in a thread each."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(LONG) for future in [pool.submit(work) for work in works]]


class Crowd:
    """How many threads are in a place at a time."""

    def __init__(self):
        self.now = self.most = 0

    def __call__(self):
        self.now += 1
        self.most = max(self.most, self.now)
        time.sleep(0.05)
        self.now -= 1


@pytest.mark.parametrize("scale", ["weight", "auto"])
def test_two_models_may_wait_for_each_other(scale):
    barrier = threading.Barrier(2, timeout=LONG)
    models = stop(barrier.wait, scale), stop(barrier.wait, scale)
    transform = nnx.jit if scale == "auto" else lambda fn: fn
    results = together(*(lambda model=model: transform(lambda model, x: model(x))(model, X) for model in models))
    np.testing.assert_allclose(results[0], models[0].plain().linear(X), rtol=1e-6)
    np.testing.assert_array_equal(results[0], results[1])


def test_copies_run_side_by_side():
    barrier = threading.Barrier(4, timeout=LONG)
    model = stop(barrier.wait)
    graph, state = nnx.split(model)
    copies = [model, nnx.clone(model), nnx.merge(graph, state), nnx.merge(graph, state)]  # the last two share variables
    assert len(together(*(lambda model=model: model(X) for model in copies))) == 4


def test_a_model_and_its_part_take_turns():
    crowd = Crowd()
    layers = [Stop(crowd), Stop(crowd)]
    model = WeightNormed(nnx.Sequential(*layers), {"layers/0/linear/kernel": -2, "layers/1/linear/kernel": -2})
    part = model.layers[0]
    together(lambda: model(X), lambda: part(X), lambda: model.layers[0](X), lambda: model(X))
    assert crowd.most == 1
    assert isinstance(model.model.layers[0].linear.kernel, wn.WeightNorm)


def test_models_that_share_a_layer_take_turns():
    crowd = Crowd()
    first, second = stop(crowd), stop(crowd)
    second.model.linear = first.model.linear
    expected = first(X)
    results = together(*(lambda model=model: model(X) for model in (first, second) * 3))
    assert crowd.most == 1
    assert all((result == expected).all() for result in results)
    assert isinstance(first.model.linear.kernel, wn.WeightNorm)


def test_models_that_share_a_container_take_turns():
    crowd, shared = Crowd(), [nnx.Param(jnp.ones(2))]
    first, second = stop(crowd), stop(crowd)
    for model in (first, second):
        model.model.more = nnx.data(({"a tuple": "of containers"}, shared))
    together(*(lambda model=model: model(X) for model in (first, second) * 2))
    assert crowd.most == 1


def test_what_is_looked_at_meanwhile_is_whole():
    inside, seen = threading.Event(), threading.Event()

    def hook():
        inside.set()
        seen.wait(0.3)  # the others cannot have come through

    model = stop(hook)
    inner = WeightNormed(nnx.Sequential(Stop(hook)), {"layers/0/linear/kernel": -2})

    def look(reading):
        inside.wait(LONG)
        found = reading()
        seen.set()
        return found

    _, part = together(lambda: inner(X), lambda: look(lambda: inner.layers[0]))
    assert isinstance(part, WeightNormed)
    for reading in (model.plain, lambda: split(model)[1], lambda: update(model, split(model)[1]), lambda: model.linear):
        inside.clear()
        seen.clear()
        _, found = together(lambda: model(X), lambda reading=reading: look(reading))
        if isinstance(found, nnx.State):
            assert isinstance(found["linear"]["kernel"], wn.WeightNorm)
    assert isinstance(model.model.linear.kernel, wn.WeightNorm)


def test_models_that_call_one_another_and_themselves():
    inner = stop(lambda: None)
    outer = stop(lambda: inner(X))
    np.testing.assert_array_equal(outer(X), inner(X))
    depth = []

    def again():
        depth.append(1)
        if len(depth) < 3:
            own.model.linear(X)
            own(X)

    own = stop(again)
    own(X)
    assert len(depth) == 3
    assert isinstance(own.model.linear.kernel, wn.WeightNorm)
    together(lambda: outer(X), lambda: inner(X), lambda: outer(X))


def test_two_threads_that_would_wait_for_ever_are_told_so():
    barrier = threading.Barrier(2, timeout=LONG)
    models = []

    def other(i):
        if threading.current_thread().name == f"in {i}":
            barrier.wait()
            models[1 - i](X)

    models += [stop(lambda: other(0)), stop(lambda: other(1))]
    errors = []

    def work(i):
        try:
            models[i](X)
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work, args=(i,), name=f"in {i}", daemon=True) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not any(thread.is_alive() for thread in threads)
    assert len(errors) == 1  # the other thread had its turn
    assert "wait for each other" in errors[0]
    for model in models:
        assert isinstance(model.model.linear.kernel, wn.WeightNorm)


def test_an_error_ends_the_turn(wrapped):
    with pytest.raises(TypeError, match="dot_general"):
        together(lambda: wrapped(jnp.ones((2, 5))))
    wrapped.eval()
    assert together(lambda: wrapped(X))[0].shape == (8, 2)
    assert is_whole(wrapped)


def test_nothing_is_kept_and_nothing_is_seen(wrapped):
    paths = set(arrays(wrapped))
    wrapped(X)
    assert set(arrays(wrapped)) == paths
    assert set(vars(wrapped)) == set(vars(WeightNormed(Net(nnx.Rngs(0)), AXES)))
    for other in (pickle.loads(pickle.dumps(wrapped)), copy.deepcopy(wrapped), nnx.clone(wrapped)):
        other.eval()
        wrapped.eval()
        np.testing.assert_array_equal(other(X), wrapped(X))
    assert not _turns._users
    model = stop(lambda: None)
    model(X)
    alive = weakref.ref(model.model)
    del model
    gc.collect()
    assert alive() is None
