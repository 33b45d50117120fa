"""A transformer of Flax Linen, its layers scanned, trained on four meshes as one shards it: FSDP, tensor parallel."""

import contextlib
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.core import meta
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import wn_jax as wn
from tests.collectives import collectives
from wn_jax._tree import flatten

pytestmark = [
    pytest.mark.usefixtures("quickly_compiled"),
    pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices"),
]

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "model": (1, 1, 8), "mixed": (2, 2, 2)}
LAYERS, EMBED, HEADS, MLP, VOCAB, LENGTH, BATCH, STEPS = 2, 32, 8, 64, 64, 16, 16, 30
RULES = (("batch", ("data", "fsdp")), ("embed", "fsdp"), ("heads", "model"), ("mlp", "model"), ("vocab", "model"),
         ("kv", None), ("layers", None))  # fmt: skip

# Written by hand, by path: the axes of the norm, and on which axes of the mesh g and v lie.
_IN = ((-3,), P(None, None, "model", None), P(None, "fsdp", "model", None))  # (layers, embed, heads, kv)
KERNELS = {
    "params/layers/query/kernel": _IN,
    "params/layers/key/kernel": _IN,
    "params/layers/value/kernel": _IN,
    "params/layers/out/kernel": ((-3, -2), P(None, None, None, "fsdp"), P(None, "model", None, "fsdp")),
    "params/layers/up/kernel": ((-2,), P(None, None, "model"), P(None, "fsdp", "model")),
    "params/layers/down/kernel": ((-2,), P(None, None, "fsdp"), P(None, "model", "fsdp")),
    "params/head/kernel": ((-2,), P(None, "model"), P("fsdp", "model")),
}
OTHERS = {
    "params/embed/embedding": P("model", "fsdp"),
    **dict.fromkeys(["params/layers/before/scale", "params/layers/between/scale", "params/norm/scale"], P()),
}


def named(*names):
    return nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        project = functools.partial(nn.Dense, use_bias=False)
        einsum = functools.partial(nn.Einsum, use_bias=False)  # in a mesh, Flax's DenseGeneral refuses three names
        y = nn.RMSNorm(name="before")(x)
        q, k, v = (
            einsum((EMBED, HEADS, 8), "ble,ehd->blhd", kernel_init=named("embed", "heads", "kv"), name=name)(y)
            for name in ("query", "key", "value")
        )
        y = nn.dot_product_attention(q, k, v, mask=nn.make_causal_mask(jnp.ones(x.shape[:2])))
        x = x + einsum((HEADS, 8, EMBED), "blhd,hde->ble", kernel_init=named("heads", "kv", "embed"), name="out")(y)
        y = nn.gelu(project(MLP, kernel_init=named("embed", "mlp"), name="up")(nn.RMSNorm(name="between")(x)))
        x = x + project(EMBED, kernel_init=named("mlp", "embed"), name="down")(y)
        return nn.with_logical_constraint(x, ("batch", None, None)), None


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        x = nn.Embed(VOCAB, EMBED, embedding_init=init, name="embed")(tokens)
        x = nn.with_logical_constraint(x, ("batch", None, None))
        stack = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS,
                        metadata_params={nn.PARTITION_NAME: "layers"})  # fmt: skip
        x, _ = stack(name="layers")(x, None)
        x = nn.RMSNorm(name="norm")(x)
        return nn.Dense(VOCAB, use_bias=False, kernel_init=named("embed", "vocab"), name="head")(x)


MODEL = Transformer()
TX = optax.sgd(0.1, momentum=0.9)


@functools.cache
def boxed():
    return jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((2, LENGTH), jnp.int32))


@functools.cache
def inferred():
    return wn.infer_axes(MODEL.apply)(boxed(), jnp.zeros((2, LENGTH), jnp.int32))


@functools.cache
def batches():
    """Tokens that mostly follow from those before."""
    random = np.random.default_rng(0)
    tokens = [random.integers(0, VOCAB, (STEPS, BATCH))]
    for _ in range(LENGTH):
        noise = random.random((STEPS, BATCH)) < 0.1
        tokens.append(np.where(noise, random.integers(0, VOCAB, (STEPS, BATCH)), (5 * tokens[-1] + 3) % VOCAB))
    return np.stack(tokens, -1).astype(np.int32)


def build(name):
    return jax.make_mesh(MESHES[name], ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)


def by_hand(mesh, nodes=True):
    """The sharding of each parameter, from the tables."""
    place = functools.partial(NamedSharding, mesh)

    def of(path):
        if path in OTHERS:
            return place(OTHERS[path])
        axes, g, v = KERNELS[path]
        return wn.WeightNorm(place(g), place(v), axes) if nodes else place(v)

    paths, _, treedef = flatten(meta.unbox(boxed()))
    return treedef.unflatten(map(of, paths))


def loss_on(mesh):
    """Of plain weights, which are gathered along `fsdp` where there is a mesh."""

    def whole(leaf, sharding):
        names = (None if name == "fsdp" else name for name in sharding.spec)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, P(*names)))

    def loss(params, tokens):
        if mesh is not None:
            params = jax.tree.map(whole, params, by_hand(mesh, nodes=False))
        with nn.logical_axis_rules(RULES if mesh is not None else ()):
            logits = MODEL.apply(params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss


@functools.cache
def compiled(name=None, nodes=True, scale="auto"):
    """A step on a mesh, or on one device; the state that it starts from; and the shardings of state and batch."""
    mesh = name and build(name)
    loss = wn.wrap(loss_on(mesh), scale=scale) if nodes else loss_on(mesh)
    params = meta.unbox(wn.reparameterize(boxed(), inferred()) if nodes else boxed())
    state, shardings, options = (params, TX.init(params)), (None, None), {}
    if mesh is not None:
        shardings = of_state(by_hand(mesh, nodes), state), NamedSharding(mesh, P(("data", "fsdp")))
        state = jax.device_put(state, shardings[0])
        options = {
            "in_shardings": shardings
        }  # of the outputs nothing is said: assert_placed looks where they came to be

    def step(state, tokens):
        params, moments = state
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, moments = TX.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):  # for the constraints in the model
        return jax.jit(step, **options).lower(state, batches()[0]).compile(), state, shardings


class Trainer:
    def __init__(self, *args, **options):
        self.step, self.state, (self.shardings, self.batch) = compiled(*args, **options)

    def losses(self, first, last):
        losses = []
        for batch in batches()[first:last]:
            self.state, loss = self.step(self.state, jax.device_put(batch, self.batch))
            losses.append(float(loss))
        return losses


def of_state(params, state):
    """Shardings of a state from those of its parameters: the momentum lies where they do."""
    return params, optax.tree.map_params(TX, lambda _, sharding: sharding, state[1], params)


def assert_placed(state, shardings):
    for leaf, sharding in zip(*map(jax.tree.leaves, (state, shardings)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (leaf.sharding, sharding)


def parts(specs):
    """The structure and the leaves, as nodes compare by identity."""
    leaves, treedef = jax.tree.flatten(specs)
    return treedef, leaves


@functools.cache
def expected():
    return Trainer().losses(0, STEPS)


def test_the_program_tells_the_axes():
    assert inferred() == {path: axes for path, (axes, _, _) in KERNELS.items()}


@pytest.mark.parametrize("name", MESHES)
def test_names_in_the_model_say_where_g_and_v_are(name):
    """Read by Flax from the boxes of the nodes, or by `wn.shardings` from the specs of the plain tree."""
    mesh, nodes = build(name), wn.reparameterize(boxed(), inferred())
    on_mesh = functools.partial(nn.logical_to_mesh_sharding, mesh=mesh, rules=RULES)
    plain = on_mesh(nn.get_partition_spec(boxed()))
    assert parts(plain) == parts(by_hand(mesh, nodes=False))
    assert parts(on_mesh(nn.get_partition_spec(nodes))) == parts(by_hand(mesh))
    assert parts(wn.shardings(meta.unbox(nodes), plain)) == parts(by_hand(mesh))


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_training_on_a_mesh(name):
    """The losses of one device, every array where it was, and nothing sent for weight norm but sums of features."""
    trainer = Trainer(name)
    np.testing.assert_allclose(trainer.losses(0, STEPS), expected(), rtol=1e-5)
    assert_placed(trainer.state, trainer.shardings)
    added = collectives(trainer.step.as_text()) - collectives(compiled(name, nodes=False)[0].as_text())
    assert {kind for kind, _ in added} == (set() if name == "data" else {"all-reduce"})
    nodes = [leaf for leaf in flatten(trainer.state[0])[1] if isinstance(leaf, wn.WeightNorm)]
    largest = max(math.prod(node.g.sharding.shard_shape(node.g.shape)) for node in nodes)
    assert max((size for _, size in added), default=0) <= largest <= LAYERS * MLP


@pytest.mark.slow
def test_scales_of_outputs_give_the_same_losses():
    losses = Trainer("mixed", scale="output").losses(0, STEPS)
    np.testing.assert_allclose(losses, expected(), rtol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_is_continued_on_another(tmp_path):
    """Restored to where `wn.shardings` says, into shapes alone."""
    before, after = Trainer("mixed"), Trainer("fsdp")
    before.losses(0, 3)
    shapes = jax.eval_shape(lambda: before.state)
    plain = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed()), build("fsdp"), RULES)
    shardings = of_state(wn.shardings(shapes[0], plain), shapes)
    target = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                          shapes, shardings)  # fmt: skip
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", before.state)
    with ocp.StandardCheckpointer() as checkpointer:
        after.state = checkpointer.restore(tmp_path / "state", target)
    assert_placed(after.state, after.shardings)
    jax.tree.map(np.testing.assert_array_equal, after.state, before.state)
    losses = after.losses(3, 6)
    np.testing.assert_allclose(losses, before.losses(3, 6), rtol=1e-5)
    np.testing.assert_allclose(losses, expected()[3:6], rtol=1e-5)
