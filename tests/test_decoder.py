"""MLPDecoder: an MLP, with or without a linear path beside it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from rvi_fast.nn import MLPDecoder

T, D = 3, 4
ACTIVATIONS = {"relu": torch.relu, "silu": functional.silu, "tanh": torch.tanh, "gelu": functional.gelu}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("linear_path", [False, True])
@pytest.mark.parametrize("hidden", [(), (5,), (7, 1, 6)], ids=str)
@torch.no_grad()
def test_equals_its_layers(hidden, linear_path, activation):
    torch.manual_seed(0)
    decoder = MLPDecoder(T, D, hidden, linear_path=linear_path, activation=activation)
    z = torch.randn(6, T)
    h = z
    for layer in decoder.mlp:
        if isinstance(layer, torch.nn.Linear):
            h = ACTIVATIONS[activation](h @ layer.weight.T + layer.bias)
    if linear_path and hidden:
        split = hidden[-1]
        expected = h @ decoder.head.weight[:, :split].T + z @ decoder.head.weight[:, split:].T + decoder.head.bias
    else:
        expected = h @ decoder.head.weight.T + decoder.head.bias
    assert [layer.out_features for layer in decoder.mlp if isinstance(layer, torch.nn.Linear)] == list(hidden)
    torch.testing.assert_close(decoder(z), expected)
    assert torch.equal(decoder.head(decoder.features(z)), decoder(z))


@pytest.mark.parametrize("linear_path", [False, True])
def test_the_linear_path_passes_a_dead_mlp(linear_path):
    decoder = MLPDecoder(T, D, (5,), linear_path=linear_path)
    decoder.mlp[0].bias.data.fill_(-1e3)
    z = torch.randn(2, T, requires_grad=True)
    decoder(z).sum().backward()
    assert bool(z.grad.any()) == linear_path


def test_empty_batch_and_float64():
    decoder = MLPDecoder(T, D).double()
    assert decoder(torch.zeros(0, T, dtype=torch.float64)).shape == (0, D)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_dim": 0}, "latent_dim must be a positive int"),
        ({"out_dim": 2.0}, "out_dim must be a positive int"),
        ({"hidden": (64, 0)}, "hidden must be a positive int"),
        ({"activation": "swish"}, "activation must be one of relu, silu, tanh, gelu; got 'swish'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MLPDecoder(**{"latent_dim": T, "out_dim": D, **settings})
