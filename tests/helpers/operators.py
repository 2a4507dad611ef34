"""Arguments and results of the operators of a training step."""

import torch

from bcl_fast.structures import Statistics
from bcl_fast.testing import columns, neighbors_of

B, D, N, K = 9, 5, 4, 3


def statistics_arguments(backend, config, dtype=torch.float32, bias=True):
    x, weight = columns("random", B, N, dtype), columns("random", D, N, dtype, seed=1)
    c = columns("random", 1, D, dtype, seed=2)[0] if bias else None
    activation, ticket = torch.nn.functional.linear(x, weight, c), torch.tensor(0)
    state = neighbors_of(D, K), torch.tensor(0), torch.tensor(-1)
    return x, weight, c, activation, *state, ticket, backend, *config.statistics


def forward(backend, config, dtype=torch.float32):
    """A weight, what the statistics of a forward with it leave, and the pull they hold."""
    x, weight, *others = statistics_arguments(backend, config, dtype)
    found = Statistics(*torch.ops.bcl_fast.statistics_(x, weight, *others))
    return weight, found, found.pull(x)
