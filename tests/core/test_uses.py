"""`infer_axes` and `weight_uses`: what a user gives them, and what comes back."""

import dataclasses
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wn_jax as wn
from tests.zoo import ZOO
from tests.zoo.model import KEY, filled
from wn_jax import infer_axes, weight_uses
from wn_jax._program.notes import Reason

X = jnp.ones((4, 6))


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


PARAMS = {"kernel": jnp.ones((6, 3)), "bias": jnp.zeros(3)}
AXES = {"kernel": (-2,)}


@pytest.mark.parametrize("read", [infer_axes, weight_uses])
def test_what_is_no_function(read):
    for bad in (PARAMS, None, "model"):
        with pytest.raises(TypeError, match=r"takes a function, such as model\.apply; got"):
            read(bad)


@pytest.mark.parametrize("read", [infer_axes, weight_uses])
def test_parameters_are_given_by_position(read):
    with pytest.raises(TypeError, match=r"argument 0 must be the parameters, by position.*keywords \['params', 'x'\]"):
        read(dense)(params=PARAMS, x=X)
    with pytest.raises(TypeError, match="argument 1 must be the parameters"):
        read(dense, argnums=1)(PARAMS)


def test_parameters_need_not_come_first():
    assert infer_axes(lambda x, params: dense(params, x), argnums=1)(X, PARAMS) == AXES
    assert infer_axes(lambda x, params, y: dense(params, x) * y, argnums=1)(X, PARAMS, y=X[:, :3]) == AXES
    assert infer_axes(lambda x, params: dense(params, x))(X, PARAMS) == {"": (-1,)}  # `x`, taken for the parameters


def test_an_error_of_the_function_passes_through_with_a_note():
    class BrokenError(Exception):
        pass

    def fails(params, x):
        raise BrokenError("here")

    for read in (infer_axes, weight_uses):
        with pytest.raises(BrokenError, match="here") as caught:
            read(fails)(PARAMS, X)
        assert any("wn_jax traced" in note and "fails" in note for note in caught.value.__notes__)
    with pytest.raises(TypeError, match="dot_general") as caught:
        infer_axes(dense)(PARAMS, jnp.ones((4, 7)))
    assert any("how it uses its parameters" in note for note in caught.value.__notes__)


def test_the_result_keeps_the_name_of_the_function():
    assert infer_axes(dense).__name__ == weight_uses(dense).__name__ == "dense"


def test_abstract_arguments_give_the_same():
    abstract = jax.eval_shape(lambda: (PARAMS, X))
    assert infer_axes(dense)(*abstract) == AXES
    assert weight_uses(dense)(*abstract) == weight_uses(dense)(PARAMS, X)
    assert infer_axes(dense)(jax.tree.map(np.asarray, PARAMS), np.asarray(X)) == AXES
    assert jax.jit(lambda p, x: infer_axes(dense)(p, x) == AXES)(PARAMS, X)


def test_a_hand_edited_dict_is_taken():
    axes = infer_axes(dense)(PARAMS, X)
    axes["bias"] = (-1,)
    nodes = wn.reparameterize(PARAMS, axes)
    assert {name: node.axes for name, node in nodes.items()} == {"kernel": (-2,), "bias": (-1,)}
    del axes["kernel"]
    assert not isinstance(wn.reparameterize(PARAMS, axes)["kernel"], wn.WeightNorm)


def test_a_tree_that_holds_nodes_already():
    nodes = wn.reparameterize(PARAMS, AXES)
    assert infer_axes(dense)(nodes, X) == AXES
    assert weight_uses(dense)(nodes, X) == weight_uses(dense)(PARAMS, X)
    other = wn.reparameterize(PARAMS, {"kernel": -1})
    (row,) = (row for row in weight_uses(dense)(other, X) if row.path == "kernel")
    assert (row.reduction, row.scale) == ((-2,), "weight")  # the scale of such a node varies along what is summed


@pytest.mark.parametrize("name", ["linen_boxed", "nnx_mlp"])
def test_boxed_parameters_have_the_paths_of_the_bare(name):
    model = ZOO[name]()
    assert [row.path for row in weight_uses(model.fn)(model.params, model.x)] == sorted([*model.axes, *model.left])
    nodes = wn.reparameterize(model.params, infer_axes(model.fn)(model.params, model.x))
    assert infer_axes(model.fn)(nodes, model.x) == model.axes


def test_an_l2_penalty_says_to_pass_the_model():
    def loss(params, x):
        return jnp.mean(dense(params, x) ** 2) + 1e-4 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

    bias, kernel = weight_uses(loss)(PARAMS, X)
    assert infer_axes(loss)(PARAMS, X) == {}
    assert (kernel.path, kernel.reason, kernel.uses) == ("kernel", "penalty", ("dot_general",))
    assert "pass the model, not the loss" in kernel.reason.explanation
    assert bias.reason == "elementwise"
    for penalty in (
        lambda w: jnp.vdot(w, w),
        jnp.linalg.norm,
        lambda w: jnp.sum(jnp.abs(w)),
        lambda w: w.ravel() @ w.ravel(),
    ):
        found = weight_uses(lambda p, x, penalty=penalty: dense(p, x).sum() + penalty(p["kernel"]))(PARAMS, X)
        assert found[1].reduction is None
    assert infer_axes(lambda p, x: jnp.mean(dense(p, x) ** 2))(PARAMS, X) == AXES


def test_data_in_a_closure_counts_where_no_argument_is_an_array():
    assert infer_axes(lambda params: dense(params, X))(PARAMS) == AXES
    assert infer_axes(lambda params, train: dense(params, X))(PARAMS, True) == AXES
    mask = jnp.ones((5, 6))  # beside data in an argument, a closed-over array is a constant

    def fn(params, x):
        return dense(params, x) + (mask @ params["other"]).sum()

    found = weight_uses(fn)({**PARAMS, "other": jnp.ones((6, 3))}, X)
    assert {row.path: row.reason for row in found} == {"bias": "elementwise", "kernel": None, "other": "closed over"}


def test_a_closed_over_module_that_changes_is_read_anew():
    net = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    net.transposed = False
    params = {"w": jnp.ones((6, 6))}

    def fn(params, x):
        return net(x @ (params["w"].T if net.transposed else params["w"]))

    assert infer_axes(fn)(params, X) == {"w": (-2,)}
    net.transposed = True
    assert infer_axes(fn)(params, X) == {"w": (-1,)}


def test_mutable_collections_rngs_and_static_keywords_through_a_closure():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(8)(x)
            x = nn.Dropout(0.5, deterministic=not train)(nn.BatchNorm(use_running_average=not train)(x))
            return nn.Dense(3, use_bias=False)(x)

    net = Net()
    variables = net.init(KEY, X, train=False)
    axes = {"params/Dense_0/kernel": (-2,), "params/Dense_1/kernel": (-2,)}

    def train(variables, x):
        return net.apply(variables, x, train=True, rngs={"dropout": KEY}, mutable=["batch_stats"])

    assert infer_axes(train)(variables, X) == axes
    assert infer_axes(net.apply)(variables, X, train=False) == axes
    rngs = {"dropout": KEY}
    assert infer_axes(net.apply)(variables, X, train=True, rngs=rngs, mutable=["batch_stats"]) == axes
    left = {row.path: row.reason for row in weight_uses(train)(variables, X) if row.reason}
    assert left["batch_stats/BatchNorm_0/mean"] == left["params/BatchNorm_0/scale"] == "elementwise"


def test_the_table():
    def fn(params, tokens):
        x = params["embedding"][tokens]
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
        x = x @ params["twice"] @ params["twice"]
        return jnp.einsum("bi,ihd->bhd", x, params["heads"]) + params["bias"]

    params = {
        "embedding": jnp.ones((7, 6)),
        "layers": jnp.ones((5, 6, 6)),
        "twice": jnp.ones((6, 6)),
        "heads": jnp.ones((6, 2, 3)),
        "bias": jnp.ones((2, 3)),
        "spare": jnp.ones(2),
        "count": jnp.ones((), int),
    }
    found = weight_uses(fn)(params, jnp.zeros(2, int))
    lines = (
        "path       shape      reduction  feature   batch  uses             scale",
        "bias       (2, 3)     left alone: elementwise (add)",
        "count      ()         left alone: dtype (int32)",
        "embedding  (7, 6)     left alone: indexed (gather)",
        "heads      (6, 2, 3)  (-3,)      (-2, -1)  -      dot_general      output",
        "layers     (5, 6, 6)  (-2,)      (-1,)     (-3,)  dot_general      output",
        "spare      (2,)       left alone: unused",
        "twice      (6, 6)     (-2,)      (-1,)     -      2 x dot_general  output",
        "",
        "dtype: it is not a real floating-point array, or is converted to another kind of number",
        "elementwise: it is added to or multiplied with other values, not contracted (a bias, a gain, a positional "
        "embedding)",
        "indexed: its rows are looked up, as in an embedding",
        "unused: the program does not use it",
    )
    assert str(found) == "\n".join(lines)
    layers = next(row for row in found if row.path == "layers")
    expected = {"path": "layers", "shape": (5, 6, 6), "dtype": jnp.float32, "reduction": (-2,), "feature": (-1,)}
    expected |= {"batch": (-3,), "uses": ("dot_general",), "scale": "output", "reason": None, "by": None}
    assert dataclasses.asdict(layers) == expected
    spare = next(row for row in found if row.path == "spare")
    assert (spare.reduction, spare.feature, spare.batch, spare.uses, spare.scale) == (None, None, None, (), None)
    assert (spare.reason, spare.by) == ("unused", None)


def test_the_side_of_the_scale_goes_by_sizes():
    for rows, scale in ((2, "output"), (5, "output"), (6, "weight"), (100, "weight")):
        (_, row) = weight_uses(dense)(PARAMS, jax.ShapeDtypeStruct((rows, 6), jnp.float32))
        assert row.scale == scale
    looped = lambda p, x: jax.lax.fori_loop(0, 3, lambda _, h: h + dense(p, x), 0 * x[:, :3])  # noqa: E731
    for rows, scale in ((1, "output"), (2, "weight")):
        (_, row) = weight_uses(looped)(PARAMS, jax.ShapeDtypeStruct((rows, 6), jnp.float32))
        assert row.scale == scale


def test_batch_dimensions_of_a_matmul_are_batch_axes():
    (row,) = weight_uses(lambda w, x: jnp.einsum("nbi,nio->nbo", x, w))(jnp.ones((3, 6, 2)), jnp.ones((3, 4, 6)))
    assert (row.path, row.reduction, row.feature, row.batch) == ("", (-2,), (-1,), (-3,))
    assert all(reason.explanation for reason in Reason)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        h = nn.gelu(nn.Dense(64)(nn.LayerNorm()(x)))
        return x + nn.Dense(32)(h)


def test_a_deep_transformer_is_read_in_full():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(11, 32)(tokens) + self.param("position", nn.initializers.zeros, (8, 32))
            for _ in range(24):
                x = Block()(x)
            return nn.Dense(11)(nn.LayerNorm()(x))

    net, tokens = Net(), jnp.zeros((2, 8), int)
    params = filled(jax.eval_shape(net.init, KEY, tokens))
    start = time.perf_counter()
    found = weight_uses(net.apply)(params, tokens)
    print(f"{len(found)} leaves in {time.perf_counter() - start:.2f} s")
    expected = {}
    for i in range(24):
        attention = f"params/Block_{i}/MultiHeadDotProductAttention_0"
        expected |= {f"{attention}/{name}/kernel": (-3,) for name in ("query", "key", "value")}
        expected |= {f"{attention}/out/kernel": (-3, -2)}
        expected |= {f"params/Block_{i}/Dense_{j}/kernel": (-2,) for j in (0, 1)}
    assert {row.path: row.reduction for row in found if row.reduction} == {**expected, "params/Dense_0/kernel": (-2,)}
    others = {row.path: row.reason for row in found if row.reason}
    assert others.pop("params/Embed_0/embedding") == "indexed"
    assert set(others.values()) == {"elementwise"}
    assert len(found) == 24 * (4 * 2 + 2 * 2 + 2 * 2) + 2 + 2 + 2
