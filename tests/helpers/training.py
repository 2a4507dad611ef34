"""A model with a BCLLayer, its data, and the plain loop that every framework's run is compared with."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bcl_fast.layer import BCLLayer
from bcl_fast.monitor import Monitor
from helpers.layers import D, N, batch, state

# Seven batches, so that the last window of four is incomplete, and the last one smaller: means weigh by samples.
SAMPLES = (6, 6, 6, 6, 6, 6, 3)
DATA = [(batch(B, seed), torch.arange(B) % 5) for seed, B in enumerate(SAMPLES)]
OPTIONS = dict(neighborhood_k=3, recompute_every=4, som_lr=0.05)
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2, weight_decay=0.1),
}
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS)
windows = pytest.mark.parametrize("window", [1, 4])
# What starts afresh may say so. Tests of a good checkpoint do without this mark: there a warning would be wrong.
may_start_afresh = pytest.mark.filterwarnings("ignore:.*(neighbors|step|som_offset):UserWarning")


def network(plain=False, seed=0, **options):
    """A model whose second layer is the BCLLayer, or an nn.Linear of the same name."""
    torch.manual_seed(seed)
    first = nn.Linear(N, D) if plain else BCLLayer(N, D, **{**OPTIONS, **options})
    return nn.Sequential(nn.Linear(N, N), first, nn.ReLU(), nn.Linear(D, 5))


def train(model, optimizer="sgd", *, bound=True, data=DATA, epochs=1, window=1, clip=None, bf16=False):
    """The loop that every run below must equal; `optimizer` may be a name or one that has taken steps."""
    optimizer = OPTIMIZERS[optimizer](model.parameters()) if isinstance(optimizer, str) else optimizer
    if bound:
        bind_all(model, optimizer)
    model.train()
    for _ in range(epochs):
        for i, (x, y) in enumerate(data):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(x), y)
            (loss / window).backward()
            if (i + 1) % window == 0 or i + 1 == len(data):
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return state(model)


def bind_all(model, optimizer):
    for module in model.modules():
        if isinstance(module, BCLLayer):
            module.bind_optimizer(optimizer)


def bind_wrapped(model, optimizer):
    """Bind to a wrapper of an optimizer, or be told by name what is allowed and bind to that."""
    try:
        bind_all(model, optimizer)
    except TypeError as error:
        assert "optimizer must be a torch.optim.Optimizer" in str(error)
        bind_all(model, optimizer.optimizer)


def two_layers(seed=0, **options):
    torch.manual_seed(seed)
    made = [BCLLayer(N, D, **{**OPTIONS, **options}), nn.ReLU(), BCLLayer(D, 6, **{**OPTIONS, **options})]
    return nn.Sequential(*made, nn.Linear(6, 5))


def run(model, optimizer, steps=7, start=0, monitor=None, window=1):
    """A plain loop, which may be monitored; a step is `window` batches."""
    for step in range(start, start + steps):
        for part in range(window):
            x, y = DATA[(step * window + part) % len(DATA)]
            loss = F.cross_entropy(model(x), y) / window
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.log(loss=loss)
    return state(model)


def measured(model, optimizer=None, every=1):
    """A list that gets everything measured, and the monitor that fills it."""
    found = []
    return found, Monitor(model, optimizer, every, out=None, callback=found.append)
