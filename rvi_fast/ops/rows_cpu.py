"""What training and inference of rows share on a CPU: their samples and the decoder, forwards and backwards.

Products are BLAS's, the rest compiled loops. Arrays stay from step to step: one that is made anew costs more in page
faults than the arithmetic on it, and so do their views in NumPy, which loops take.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import reference

if TYPE_CHECKING:
    from .elbo import ElboModel

aten = torch.ops.aten

DERIVATIVES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # of (gradient, input, output)
    "relu": lambda g, a, h: aten.threshold_backward(g, h, 0),
    "tanh": lambda g, a, h: aten.tanh_backward(g, h),
    "silu": lambda g, a, h: aten.silu_backward(g, a),
    "gelu": lambda g, a, h: aten.gelu_backward(g, a),
}


class Product(Protocol):
    """out [M, n] = start + a [M, k] @ b [k, n]; start: [n] or [M, n], or None for 0."""

    def __call__(self, a: Tensor, b: Tensor, out: Tensor, start: Tensor | None = None) -> Tensor: ...


def product(a: Tensor, b: Tensor, out: Tensor, start: Tensor | None = None) -> Tensor:
    """Of all rows at once."""
    return torch.mm(a, b, out=out) if start is None else torch.addmm(start, a, b, out=out)


class Rows:
    """A batch's own parameters, their moments and gradient, and its sample of z."""

    def __init__(self, batch: int, width: int, relays: Tensor, model: ElboModel, product: Product = product):
        num_relays, latent_dim = relays.shape

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=relays.dtype)

        self.relays, self.relays_transposed, self.product = relays, relays.T, product
        self.groups, self.active = np.array(model.groups, np.int64), np.array(model.active, np.int64)
        self.guesses = np.zeros((batch, len(model.groups)), np.int64)
        self.p, self.m, self.v, self.grad = (empty(batch, width) for _ in range(4))
        spans = [num_relays, latent_dim, latent_dim]
        _, self.residual, self.log_std = self.p.split(spans, dim=1)
        self.by_coef, self.by_mean, _ = self.grad.split(spans, dim=1)
        self.weight, self.kept = empty(batch, num_relays), np.empty((batch, num_relays), bits_of(self.p).dtype)
        self.radius, self.angle, self.cosine = (empty(batch, 2 * -(-latent_dim // 4)) for _ in range(3))
        self.mean, self.sigma, self.spread, self.z = (empty(batch, latent_dim) for _ in range(4))
        self.arrays = SimpleNamespace(**{name: t.numpy() for name, t in vars(self).items() if isinstance(t, Tensor)})
        self.bits = SimpleNamespace(p=bits_of(self.p), weight=bits_of(self.weight), grad=bits_of(self.grad))
        self.kl = np.empty(batch, self.arrays.mean.dtype)

    def moving(self) -> tuple[np.ndarray, ...]:
        """p, m and v."""
        return self.arrays.p, self.arrays.m, self.arrays.v

    def sample(self, seed: int, stream: str, step: int, row_ids: Tensor, draw: int = 0) -> None:
        """z [B, T] and kl [B] of p (reference.row_losses)."""
        from ..loops import relays as loops
        from ..loops import threads

        a, of_groups = self.arrays, (self.groups, self.active, self.guesses)
        loops.select(threads.available(), self.bits.p, *of_groups, self.bits.weight, self.kept)
        self.product(self.weight, self.relays, self.mean, self.residual)
        noise = self._box_muller(seed, stream, step, row_ids, draw)
        with np.errstate(over="ignore"):  # whoever reads the loss says what is infinite
            np.exp(a.log_std, out=a.sigma)
        loops.sample(a.mean, a.p, a.sigma, *noise, a.spread, a.z, self.kl)

    def _box_muller(self, seed: int, stream: str, step: int, row_ids: Tensor, draw: int) -> tuple[np.ndarray, ...]:
        """radius, cosine and sine [B, P] by whose products reference.philox_normal has its normals, to the bit."""
        from ..loops.philox import uniforms

        key = int(seed) % 2**64, step, reference.STREAMS[stream] << 28 | draw << 12
        a = self.arrays
        uniforms(*map(np.uint64, key), row_ids.numpy().view(np.uint64), a.radius, a.angle)
        torch.cos(self.angle, out=self.cosine)
        self.radius.log_().mul_(-2.0).sqrt_()
        self.angle.sin_()
        return a.radius, a.cosine, a.angle

    def gradient(self, by_z: Tensor, kl_weight: float) -> None:
        """grad [B, C] by p of a loss plus kl_weight * kl, of which by_z [B, T] is the gradient by z."""
        from ..loops import relays as loops

        a = self.arrays
        loops.sample_gradients(by_z.numpy(), a.mean, a.sigma, a.spread, kl_weight, a.grad)
        self.product(self.by_mean, self.relays_transposed, self.by_coef)
        loops.keep(self.bits.grad, self.kept)


class Decoder:
    """An MLP with weights that others hold: layers, weight and bias by turns, as of ElboModel.shared_shapes."""

    def __init__(self, batch: int, layers: list[Tensor], model: ElboModel, product: Product = product):
        weights, biases = layers[::2], layers[1::2]
        *self.hidden, (self.weight, self.transposed, self.bias) = zip(
            weights, (w.T for w in weights), biases, strict=True
        )
        self.linear_path, self.activation = model.linear_path, reference.ACTIVATIONS[model.activation]
        self.derivative, self.product = DERIVATIVES[model.activation], product

        def like(weight: Tensor, dim: int) -> Tensor:
            return weight.new_empty(batch, weight.shape[dim])

        self.before = [like(weight, 0) for weight, *_ in self.hidden]
        self.by_inputs = [like(weight, 1) for weight, *_ in self.hidden]
        self.features, self.by_features = like(self.weight, 1), like(self.weight, 1)
        self.xhat = like(self.weight, 0)
        self.xhat_array = self.xhat.numpy()

    def decode(self, z: Tensor) -> None:
        """xhat [B, D]."""
        self.inputs: list[Tensor] = [z]
        for (_, weight, bias), before in zip(self.hidden, self.before, strict=True):
            self.inputs.append(self.activation(self.product(self.inputs[-1], weight, before, bias)))
        if self.linear_path:
            torch.cat((self.inputs[-1], z), dim=1, out=self.features)
        else:
            self.features = self.inputs[-1]
        self.product(self.features, self.transposed, self.xhat, self.bias)

    def softplus_and_sigmoid(self) -> tuple[np.ndarray, np.ndarray]:
        """Of xhat [B, D]."""
        return torch.nn.functional.softplus(self.xhat).numpy(), torch.sigmoid(self.xhat).numpy()

    def gradient(self, by_layers: list[Tensor] | None = None) -> Tensor:
        """The gradient by z [B, T], where xhat holds that by xhat; by_layers takes the layers', but for the last bias,
        unless these are frozen."""
        depth, latent_dim = len(self.hidden), self.inputs[0].shape[1]
        if by_layers is not None:
            torch.mm(self.xhat.T, self.features, out=by_layers[2 * depth])
        grad, by_linear = self.product(self.xhat, self.weight, self.by_features), None
        if self.linear_path:
            grad, by_linear = grad[:, :-latent_dim], grad[:, -latent_dim:]
        for i in reversed(range(depth)):
            grad = self.derivative(grad, self.before[i], self.inputs[i + 1])
            if by_layers is not None:
                torch.mm(grad.T, self.inputs[i], out=by_layers[2 * i])
                torch.sum(grad, dim=0, out=by_layers[2 * i + 1])
            grad = self.product(grad, self.hidden[i][0], self.by_inputs[i])
        return grad if by_linear is None else grad + by_linear


def bits_of(values: Tensor) -> np.ndarray:
    """As integers of the same size, in the same memory."""
    return values.view(reference.INTEGERS[values.itemsize]).numpy()
