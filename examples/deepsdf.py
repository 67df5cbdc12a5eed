"""An auto-decoder of 2-d shapes by their signed distance, in the style of DeepSDF (Park et al., arXiv 1901.05103).

A shape is a row of a table, its code; one decoder takes a code and a point to the distance from the shape's border.
There is no encoder: codes and decoder are trained together. The only lines that differ from nn.Embedding and Adam are
the two that make the table and the optimiser.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from compare import Problem, main, row_table
from torch import Tensor, nn

from rvi_fast.optim import RowAdam

CODE, HIDDEN = 64, 64
SHAPES, POINTS = 64, 32  # of a batch
LR = 2e-3


def make_shapes(count: int) -> Tensor:
    """[N, 8]: a disc (centre, radius) joined with a turned box (centre, half its sides, angle)."""
    uniform = torch.rand(count, 8, generator=torch.Generator().manual_seed(0))
    low = torch.tensor([-0.5, -0.5, 0.1, -0.5, -0.5, 0.1, 0.1, 0.0])
    high = torch.tensor([0.5, 0.5, 0.4, 0.5, 0.5, 0.4, 0.4, 1.5])
    return low + (high - low) * uniform


def signed_distance(shapes: Tensor, points: Tensor) -> Tensor:
    """shapes [B, 8], points [B, P, 2] -> [B, P], negative inside (there the nearer of the two borders counts)."""
    disc, radius, box, half, angle = shapes[:, None].split([2, 1, 2, 2, 1], dim=-1)
    to_disc = (points - disc).norm(dim=-1) - radius[..., 0]
    x, y = (points - box).unbind(-1)
    cos, sin = angle[..., 0].cos(), angle[..., 0].sin()
    beyond = torch.stack((cos * x + sin * y, cos * y - sin * x), dim=-1).abs() - half
    to_box = beyond.clamp(min=0).norm(dim=-1) + beyond.amax(-1).clamp(max=0)
    return torch.minimum(to_disc, to_box)


class AutoDecoder(nn.Module):
    def __init__(self, codes: nn.Module):
        super().__init__()
        self.codes = codes
        self.decoder = nn.Sequential(
            nn.Linear(CODE + 2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)
        )

    def distance(self, codes: Tensor, points: Tensor) -> Tensor:
        """codes [B, CODE], points [B, P, 2] -> [B, P]."""
        each = codes[:, None].expand(-1, points.shape[1], -1)
        return self.decoder(torch.cat((each, points), dim=-1))[..., 0]

    def forward(self, rows: Tensor, points: Tensor, target: Tensor) -> Tensor:
        codes = self.codes(rows)
        error = self.distance(codes, points) - target
        return error.abs().mean() + 1e-4 * codes.square().sum(1).mean()


def batches(shapes: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(len(shapes), (SHAPES,), generator=generator)
        points = 2 * torch.rand(SHAPES, POINTS, 2, generator=generator) - 1
        yield rows, points, signed_distance(shapes[rows], points)


def initial_codes(count: int) -> Tensor:
    return 0.1 * torch.randn(count, CODE, generator=torch.Generator().manual_seed(2))


def train(count: int, steps: int) -> tuple[float, float]:
    """Mean error of the distance at new points of the shapes: the model's, and the best guess's that sees no shape."""
    torch.manual_seed(0)
    shapes = make_shapes(count)
    model = AutoDecoder(row_table(initial_codes(count)))
    optimizer = RowAdam(model.parameters(), lr=LR)
    for batch in batches(shapes, steps):
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()
    points = (2 * torch.rand(200, 2) - 1).expand(count, -1, -1)
    true = signed_distance(shapes, points)
    with torch.no_grad():
        found = model.distance(model.codes(torch.arange(count)), points)
    return (found - true).abs().mean().item(), (true.median(0).values - true).abs().mean().item()


def problem(count: int, steps: int) -> Problem:
    return Problem(AutoDecoder, initial_codes(count), batches(make_shapes(count), steps), LR)


if __name__ == "__main__":
    main(train, problem, train_steps=5_000)
