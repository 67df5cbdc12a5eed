"""Ratings, most of them missing: matrix factorisation with biases (Koren, Bell and Volinsky, 2009) by minibatches.

A user is a row of a table, with one vector and one bias; a film has the same in an ordinary embedding, for films are
few. A rating is predicted as mean + biases + user . film. What differs from nn.Embedding and Adam is the two lines that
make the table and the optimiser.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from compare import Problem, main, row_table
from torch import Tensor, nn

from rvi_fast.optim import RowAdam

FILMS, SEEN, HELD_OUT = 500, 30, 5  # a user rates 30 of 500 films (94 % are missing), and 5 more that are held out
RANK, DIM = 4, 64  # of the truth, of the model
NOISE = 0.5  # of a rating, before it is rounded
PENALTY = 0.1  # on the squares of vectors and biases, by rating
USERS = 128  # of a batch
LR = 5e-3


class Ratings(NamedTuple):
    films: Tensor  # int64 [N, SEEN + HELD_OUT]
    stars: Tensor  # [N, SEEN + HELD_OUT]: halves from 0.5 to 5


def make_ratings(count: int) -> Ratings:
    generator = torch.Generator().manual_seed(0)
    tastes, kinds = (torch.randn(n, RANK, generator=generator) for n in (count, FILMS))
    mildness, fame = (0.3 * torch.randn(n, generator=generator) for n in (count, FILMS))
    films = torch.randint(FILMS, (count, SEEN + HELD_OUT), generator=generator)
    exact = 3 + mildness[:, None] + fame[films] + (kinds[films] @ tastes[:, :, None])[..., 0] / RANK**0.5
    noisy = exact + NOISE * torch.randn(exact.shape, generator=generator)
    return Ratings(films, (2 * noisy).round().clamp(1, 10) / 2)


class Factorisation(nn.Module):
    def __init__(self, users: nn.Module):
        super().__init__()
        self.users = users  # [N, DIM + 1]: vector and bias
        self.films = nn.Embedding(FILMS, DIM + 1)
        nn.init.normal_(self.films.weight, std=0.1)
        self.mean = nn.Parameter(torch.tensor(3.0))

    def predict(self, users: Tensor, films: Tensor) -> Tensor:
        """users and films [..., DIM + 1] -> stars [...]."""
        return self.mean + users[..., DIM] + films[..., DIM] + (users[..., :DIM] * films[..., :DIM]).sum(-1)

    def forward(self, rows: Tensor, films: Tensor, stars: Tensor) -> Tensor:
        users, films = self.users(rows)[:, None], self.films(films)
        size = users.square().sum(-1) + films.square().sum(-1)
        return ((stars - self.predict(users, films)).square() + PENALTY * size).mean()


def batches(ratings: Ratings, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(len(ratings.films), (USERS,), generator=generator)
        yield rows, ratings.films[rows, :SEEN], ratings.stars[rows, :SEEN]


def initial_users(count: int) -> Tensor:
    return 0.1 * torch.randn(count, DIM + 1, generator=torch.Generator().manual_seed(2))


def of_means(ratings: Ratings) -> Tensor:
    """Held-out stars by the means of films and users: what a model without vectors can say."""
    films, stars = ratings.films[:, :SEEN], ratings.stars[:, :SEEN]
    total = torch.zeros(FILMS).index_add_(0, films.flatten(), stars.flatten())
    film_means = total / films.flatten().bincount(minlength=FILMS).clamp(min=1)
    user_bias = (stars - film_means[films]).mean(1, keepdim=True)
    return film_means[ratings.films[:, SEEN:]] + user_bias


def train(count: int, steps: int) -> tuple[float, float]:
    """Root mean squared error of held-out ratings: of the model, and of the films' and users' means."""
    torch.manual_seed(0)
    ratings = make_ratings(count)
    model = Factorisation(row_table(initial_users(count)))
    optimizer = RowAdam(model.parameters(), lr=LR)
    for batch in batches(ratings, steps):
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()
    held_out = ratings.stars[:, SEEN:]
    with torch.no_grad():
        predicted = model.predict(model.users(torch.arange(count))[:, None], model.films(ratings.films[:, SEEN:]))
    error, baseline = ((guess - held_out).square().mean().sqrt().item() for guess in (predicted, of_means(ratings)))
    return error, baseline


def problem(count: int, steps: int) -> Problem:
    return Problem(Factorisation, initial_users(count), batches(make_ratings(count), steps), LR)


if __name__ == "__main__":
    main(train, problem, train_steps=1_000)
