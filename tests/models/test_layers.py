"""Layers against plain NumPy, with weights taken from the modules."""

import jax
import numpy as np
import pytest
from flax import nnx

from xlarank.models import MLP, CrossNetwork, DotInteraction, MixtureOfExperts, TargetAttention, masked_mean

TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture
def x():
    return np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)


def linear(layer, x):
    """NumPy's x W + b in double precision."""
    bias = 0 if layer.bias is None else np.asarray(layer.bias[...], np.float64)
    return x @ np.asarray(layer.kernel[...], np.float64) + bias


def randomise_biases(module):
    """Fresh biases are zeros, which hide a missing one."""
    rng = np.random.default_rng(2)
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Linear) and node.bias is not None:
            node.bias[...] = jax.numpy.asarray(rng.normal(size=node.bias[...].shape).astype(np.float32))


def test_an_mlp_is_linear_then_relu(x):
    mlp = MLP(6, (4, 3), rngs=nnx.Rngs(0))
    randomise_biases(mlp)
    expected = x
    for layer in mlp.layers:
        expected = np.maximum(linear(layer, expected), 0)
    np.testing.assert_allclose(mlp(x), expected, **TOLERANCE)
    assert mlp.out_dim == 3


def test_an_mlp_without_layers_is_the_identity(x):
    mlp = MLP(6, (), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(mlp(x), x)
    assert mlp.out_dim == 6


def test_dropout_acts_in_training_only(x):
    mlp = MLP(6, (64,), dropout=0.5, rngs=nnx.Rngs(0))
    plain = MLP(6, (64,), rngs=nnx.Rngs(0))
    mlp.train()
    dropped = np.asarray(mlp(x))
    mlp.eval()
    np.testing.assert_array_equal(mlp(x), plain(x))
    assert (dropped == 0).mean() > (np.asarray(plain(x)) == 0).mean() + 0.1


@pytest.mark.parametrize("rank", [None, 2])
def test_a_cross_network_is_the_formula_of_dcn_v2(x, rank):
    cross = CrossNetwork(6, 2, rank=rank, rngs=nnx.Rngs(0))
    randomise_biases(cross)
    expected = x
    for index, up in enumerate(cross.up):
        low = expected if cross.down is None else linear(cross.down[index], expected)
        expected = x * linear(up, low) + expected
    np.testing.assert_allclose(cross(x), expected, **TOLERANCE)


def test_a_low_rank_cross_layer_has_two_d_r_weights():
    _, params, _ = nnx.split(CrossNetwork(30, 3, rank=4, rngs=nnx.Rngs(0)), nnx.Param, ...)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 3 * (2 * 30 * 4 + 30)


def test_dot_interaction_is_every_pair_once():
    vectors = np.random.default_rng(3).normal(size=(2, 4, 5)).astype(np.float32)
    interaction = DotInteraction(4)
    expected = np.stack([vectors[:, i] @ vectors[:, j].T for i in range(4) for j in range(i)])
    expected = np.diagonal(expected, axis1=1, axis2=2).T  # [B, pairs]
    np.testing.assert_allclose(interaction(vectors), expected, **TOLERANCE)
    assert interaction.out_dim == 6


def test_a_mixture_weighs_experts_by_each_tasks_softmax(x):
    mixture = MixtureOfExperts(6, 3, (4,), 2, rngs=nnx.Rngs(0))
    randomise_biases(mixture)
    experts = np.stack([np.maximum(linear(e.layers[0], x), 0) for e in mixture.experts], axis=1)  # [B, E, H]
    outputs = mixture(x)
    assert len(outputs) == 2
    for gate, output in zip(mixture.gates, outputs, strict=True):
        weights = np.exp(linear(gate, x))
        weights /= weights.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(output, (weights[:, :, None] * experts).sum(axis=1), **TOLERANCE)


def test_masked_mean_counts_what_the_mask_keeps():
    sequence = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    mask = np.array([[True, False, True, False], [False] * 4])
    expected = np.stack([(sequence[0, 0] + sequence[0, 2]) / 2, np.zeros(3)])
    np.testing.assert_array_equal(masked_mean(sequence, mask), expected)


@pytest.fixture
def attention_inputs():
    rng = np.random.default_rng(4)
    candidate = rng.normal(size=(3, 2)).astype(np.float32)
    sequence = rng.normal(size=(3, 5, 4)).astype(np.float32)
    mask = np.arange(5) < np.array([[5], [2], [0]])
    return candidate, np.where(mask[:, :, None], sequence, 0).astype(np.float32), mask


def test_target_attention_is_a_softmax_over_the_masked_steps(attention_inputs):
    candidate, sequence, mask = attention_inputs
    attention = TargetAttention(2, 4, rngs=nnx.Rngs(0))
    randomise_biases(attention)
    query = linear(attention.query, candidate)
    for row in range(2):
        steps = sequence[row, mask[row]]
        weights = np.exp(steps @ query[row] / 2)  # sqrt(D) = 2
        expected = weights @ steps / weights.sum()
        np.testing.assert_allclose(attention(candidate, sequence, mask)[row], expected, **TOLERANCE)


def test_an_empty_history_attends_to_zeros_without_nan(attention_inputs):
    candidate, sequence, mask = attention_inputs
    attention = TargetAttention(2, 4, rngs=nnx.Rngs(0))
    assert not np.asarray(attention(candidate, sequence, mask))[2].any()
    gradient = nnx.grad(lambda module: module(candidate, sequence, mask).sum())(attention)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_steps_beyond_the_mask_never_matter(attention_inputs):
    candidate, sequence, mask = attention_inputs
    attention = TargetAttention(2, 4, rngs=nnx.Rngs(0))
    other = np.where(mask[:, :, None], sequence, 1e6).astype(np.float32)
    np.testing.assert_array_equal(attention(candidate, other, mask), attention(candidate, sequence, mask))
    np.testing.assert_array_equal(masked_mean(other, mask), masked_mean(sequence, mask))
