"""A batch of rows on a CPU, forth to what the decoder says of them and back, in compiled loops.

Between steps the caches fill with other data, and a call of PyTorch then costs several times what it does in a loop of
its own: so arrays are made once for a size of batch, and few calls are made of a step.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .. import reference

if TYPE_CHECKING:
    from ..loops.decoder import Weights
    from .elbo import ElboModel


class Rows:
    """A batch's own parameters and their moments, its sample of z, what the decoder makes of it, and gradients."""

    def __init__(self, size: int, latent_dim: int, columns: int, weights: Weights, model: ElboModel):
        from ..loops.memory import LINE
        from ..loops.rows import Batch

        dtype = torch.from_numpy(weights.values).dtype
        relays, hidden = sum(model.groups), sum(model.hidden)
        width = relays + 2 * latent_dim

        def empty(columns: int) -> np.ndarray:
            return torch.empty(size, columns, dtype=dtype).numpy()

        def lines(columns: int) -> np.ndarray:
            return torch.zeros(size, -(-columns * dtype.itemsize // LINE) * LINE // dtype.itemsize, dtype=dtype).numpy()

        def bits(values: np.ndarray) -> np.ndarray:
            return values.view(f"i{values.itemsize}")

        pairs = 2 * -(-latent_dim // 4)
        p, grad, weight, by_coef = empty(width), empty(width), lines(relays), lines(relays)
        self.arrays = Batch(
            p=p, p_bits=bits(p), groups=np.array(model.groups, np.int64), active=np.array(model.active, np.int64),
            guesses=np.zeros((size, len(model.groups)), np.int64),
            weight=weight, weight_bits=bits(weight), kept=np.empty((size, relays), bits(p).dtype),
            mean=lines(latent_dim), sigma=empty(latent_dim),
            radius=empty(pairs), cosine=empty(pairs), sine=empty(pairs),
            spread=empty(latent_dim), kl=np.empty(size, p.dtype),
            before=lines(hidden), after=lines(hidden + latent_dim), xhat=lines(columns),
            by_after=lines(hidden + latent_dim), by_mean=lines(latent_dim), by_coef=by_coef, by_coef_bits=bits(by_coef),
            grad=grad, grad_bits=bits(grad),
        )  # fmt: skip
        self.moving = p, empty(width), empty(width)
        self.weights = weights
        noise = self.arrays.radius, self.arrays.cosine, self.arrays.sine
        self.radius, self.cosine, self.sine = map(torch.from_numpy, noise)

    def forward(self, seed: int, stream: str, step: int, row_ids: Tensor, draw: int = 0) -> None:
        """kl [B] and xhat [B, D] of p and one draw of z (reference.row_losses)."""
        from ..loops import rows, threads

        self.draw(seed, stream, step, row_ids, draw)
        rows.forward(threads.available(), self.arrays, self.weights)

    def draw(self, seed: int, stream: str, step: int, row_ids: Tensor, draw: int) -> None:
        """radius, cosine and sine [B, P], of whose products reference.philox_normal has its normals, to the bit."""
        from ..loops.philox import uniforms

        key = int(seed) % 2**64, step, reference.STREAMS[stream] << 28 | draw << 12
        uniforms(*map(np.uint64, key), row_ids.numpy().view(np.uint64), self.arrays.radius, self.arrays.sine)
        torch.cos(self.sine, out=self.cosine)
        self.radius.log_().mul_(-2.0).sqrt_()
        self.sine.sin_()

    def backward(self, kl_weight: float) -> None:
        """grad [B, C] by p of a loss, whose gradient by xhat [B, D] stands there, plus kl_weight * kl."""
        from ..loops import rows, threads

        rows.backward(threads.available(), self.arrays, self.weights, kl_weight)


def weights_of(values: np.ndarray, model: ElboModel, latent_dim: int, columns: int, block: int = 0) -> Weights:
    """Of values [P], as ElboModel.shared_shapes has them. block: rows that a product takes at a time, in which case the
    weights must not change."""
    from ..loops import decoder, products

    shapes = np.array([s for s in model.shared_shapes(latent_dim, columns) if len(s) == 2], np.int64)
    sizes = shapes.prod(1)
    biases = np.array([0, *shapes[1:, 0]])
    starts = np.cumsum([0, *(sizes + biases)[:-1]])
    ends = np.cumsum([0, *model.hidden])
    hidden, total = list(itertools.pairwise(ends)), ends[-1] + latent_dim
    of_z = ends[-1], total
    inputs = [(0, 0), of_z, *hidden]
    if model.linear_path:
        inputs[-1] = inputs[-1][0], total
    weights = decoder.Weights(
        values=values,
        shapes=shapes,
        starts=starts,
        inputs=np.array(inputs, np.int64),
        outputs=np.array([(0, 0), *hidden, (0, columns)], np.int64),
        activation=decoder.ACTIVATIONS.index(model.activation),
        blas=products.HAS_BLAS,
        block=block,
        packed=np.empty(0, values.dtype),
        places=np.zeros(2 * len(shapes) + 1, np.int64),
    )
    return decoder.packed(weights) if block and products.HAS_PACKING and values.dtype == np.float32 else weights
