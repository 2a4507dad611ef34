"""Peers: what one could take for a part of the work instead, on the same data at the same size.

Those of other packages (extra [peers]: MiniSom, torchsom, vector-quantize-pytorch) take part where they are installed;
DIFFERENCES says how each differs from BCL.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from stages import ONE_FUNCTION, stage_calls
from torch import Tensor

from bcl_fast import BCLLayer, backends, cuda
from bcl_fast.measure.implementations import Size, batch, reasons, serving_stages
from bcl_fast.measure.rows import Row, absent, row
from bcl_fast.measure.timing import compared, ratio

PACKAGES = {"MiniSom": "minisom", "TorchSOM": "torchsom", "vector-quantize-pytorch": "vector_quantize_pytorch"}
DIFFERENCES = {
    "random samples": "no training at all: units are training samples",
    "MiniSom": "a sample at a time; the nearest unit and its neighbors on a fixed grid move; the rate falls",
    "TorchSOM": "a batch at a time; the nearest unit and its neighbors on a fixed grid move",
    "vector-quantize-pytorch": "units are moving averages of the samples nearest to them; a unit with an average of "
    "less than 2 becomes a random sample of the batch at once",
    "bcl": "the pull alone, without a loss: competition by products among the most similar units, no grid",
}
SOM_LR = 0.05  # of the pull, where it is all there is


def why_not(name: str) -> str | None:
    """None where a peer can take part, else the reason."""
    package = PACKAGES.get(name)
    return None if package is None or importlib.util.find_spec(package) else f"{package} is not installed"


# --- Selection --------------------------------------------------------------------------------------------------------


def selection_times(size: Size, device: str = "cpu", **amount: Any) -> list[Row]:
    """The choice of every column's samples by torch's own sorts and by every backend: equal sets, then times."""
    arguments = stage_calls(size, device)["selection"]
    activation, bias, rinv, _, need, _, _, rescue_k = arguments
    key = (activation - bias) * rinv[:, None]
    place = torch.arange(size.B, device=device, dtype=torch.float32)[:, None].expand_as(key)

    def argsort_twice() -> Tensor:
        rank = key.argsort(dim=0, stable=True).argsort(dim=0)
        return (rank.float() * need[:, None]).topk(rescue_k, dim=0).indices

    def sort_once() -> Tensor:
        order = key.sort(dim=0, stable=True).indices
        return (torch.empty_like(key).scatter_(0, order, place) * need[:, None]).topk(rescue_k, dim=0).indices

    names = serving_stages(device)
    calls: dict[str, Callable[[], Any]] = {
        name: partial(backends.stage("selection", name), *arguments) for name in names
    }
    chosen = {name: calls[name]()[0] for name in names}
    calls |= {"argsort of argsort, topk": argsort_twice, "sort, scatter, topk": sort_once}
    chosen |= {name: call().T for name, call in calls.items() if name not in names}
    chosen = {name: samples.sort(dim=1).values for name, samples in chosen.items()}
    for name, samples in chosen.items():
        assert samples.equal(chosen["reference"]), f"{name} at {size} chooses other samples than the reference"
    windows, _ = compared(calls, device, **amount)
    rows = []
    for name, own in windows.items():
        over_reference = ratio("ratio_to_reference", own, windows["reference"])
        values = dict(device=device, ms=statistics.median(own), **over_reference, rounds=len(own))
        rows.append(row("selection", name, size, **values))
    return rows + absent("selection", size, reasons(device, compiled=ONE_FUNCTION), device=device)


# --- Ranks ------------------------------------------------------------------------------------------------------------


def sort_segments(key: Tensor) -> None:
    """Sort each row of key [D, B] int32 by CUB alone; the result is dropped."""
    buffers = key, *(torch.empty_like(key) for _ in range(3))
    cuda.call("sort", key, tuple(key.shape), *(buffer.data_ptr() for buffer in buffers), *key.shape)


def rank_times(size: Size, device: str = "cpu", names: Sequence[str] | None = None, **amount: Any) -> list[Row]:
    """The ranks of whole columns [B, D] by torch's own sorts and by backends, None: by all that serve.

    Equal ranks first, then times. CUB's sort alone, which is no rank yet, shows what can be reached.
    """
    key = batch(size, device)[1]
    calls: dict[str, Callable[[], Any]] = {
        "argsort of argsort": lambda: key.argsort(dim=0, stable=True).argsort(dim=0, stable=True),
        "torch.sort": lambda: key.sort(dim=0, stable=True),
    }
    expected = calls["argsort of argsort"]()
    for backend in serving_stages(device) if names is None else names:
        calls[backend] = partial(backends.stage("rank", backend), key)
        assert calls[backend]().equal(expected), f"{backend} at {size}: ranks differ"
    if "cuda" in calls:
        columns = key.T.contiguous().view(torch.int32)
        calls["CUB segmented sort"] = lambda: sort_segments(columns)
    rows = []
    for name, own in compared(calls, device, **amount)[0].items():
        ms = statistics.median(own)
        rows.append(row("ranks", name, size, device=device, ms=ms, gkeys_per_s=key.numel() / ms / 1e6, rounds=len(own)))
    return rows


# --- A SOM's epoch ----------------------------------------------------------------------------------------------------


def units_of(side: int, train: Tensor) -> Tensor:
    """A training sample for each of side * side units [D, N]."""
    return train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: side * side]].clone()


def batches(train: Tensor, batch_size: int) -> Iterator[Tensor]:
    """One epoch in an order that is always the same; the last samples, too few for a batch, are left out."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
    return (train[rows] for rows in order.split(batch_size) if len(rows) == batch_size)


def _minisom(train: Tensor, side: int, batch_size: int) -> Tensor:
    from minisom import MiniSom

    som = MiniSom(side, side, train.shape[1], random_seed=0)
    som.random_weights_init(train.numpy())
    som.train(train.numpy(), len(train), random_order=True)
    return torch.from_numpy(som.get_weights()).flatten(0, 1).float()


def _torchsom(train: Tensor, side: int, batch_size: int) -> Tensor:
    from torchsom import SOM

    som = SOM(side, side, train.shape[1], epochs=1, batch_size=batch_size, device="cpu", random_seed=0)
    som.initialize_weights(train)
    som.fit(train, verbose=False)
    return som.weights.detach().flatten(0, 1)


def _bcl(train: Tensor, side: int, batch_size: int) -> Tensor:
    layer = pulled_layer(units_of(side, train))
    for x in batches(train, batch_size):
        pull(layer, x)
    return layer.weight.detach()


def pulled_layer(units: Tensor) -> BCLLayer:
    """A layer whose features [D, N] are these units."""
    layer = BCLLayer(units.shape[1], units.shape[0], som_lr=SOM_LR)
    layer.weight.data.copy_(units)
    layer.bias.data.zero_()
    return layer


def pull(layer: BCLLayer, x: Tensor) -> None:
    """A training step without a loss."""
    output = layer(x)
    output.backward(torch.zeros_like(output))
    layer.weight.grad = layer.bias.grad = None


def quality(units: Tensor, held_out: Tensor) -> dict[str, float]:
    """How well units [D, N] represent samples [m, N]: mean distance and cosine of the best, and how many are a best."""
    nearest = torch.cdist(held_out, units).min(dim=1)
    cosine = torch.nn.functional.normalize(held_out) @ torch.nn.functional.normalize(units).T
    return {
        "quantization_error": float(nearest.values.mean()),
        "best_cosine": float(cosine.amax(dim=1).mean()),
        "units_in_use": int(nearest.indices.unique().numel()),
    }


def som_epoch(train: Tensor, held_out: Tensor, side: int = 8, batch_size: int = 128) -> list[Row]:
    """One epoch over train [n, N] for side * side units: seconds, and how well they represent held_out [m, N]."""
    size = Size(batch_size, side * side, train.shape[1])
    ways: dict[str, Callable[..., Tensor]] = {
        "random samples": lambda train, side, batch_size: units_of(side, train),
        "MiniSom": _minisom,
        "TorchSOM": _torchsom,
        "bcl": _bcl,
    }
    rows = []
    for name, way in ways.items():
        reason = why_not(name)
        if reason is not None:
            rows.append(row("som-epoch", name, size, status=reason))
            continue
        start = time.perf_counter()
        units = way(train, side, batch_size)
        ms = (time.perf_counter() - start) * 1e3
        rows.append(row("som-epoch", name, size, ms=ms, difference=DIFFERENCES[name], **quality(units, held_out)))
    return rows


# --- Reviving dead units ----------------------------------------------------------------------------------------------


def revival(train: Tensor, held_out: Tensor, side: int = 8, batch_size: int = 128) -> list[Row]:
    """Half of side * side units serve no sample: after an epoch, how many of them are some sample's nearest?

    They start on the pixels that no sample uses, so that their activation is 0 and every other unit is nearer. `ms` is
    the median step; `half_revived_after` counts steps until half of the dead are a nearest (None: never).
    """
    size, dead = Size(batch_size, side * side, train.shape[1]), side * side // 2
    start = units_of(side, train)
    unused = (train == 0).all(dim=0) & (held_out == 0).all(dim=0)
    outside = torch.rand(dead, train.shape[1], generator=torch.Generator().manual_seed(2)) * unused
    start[:dead] = torch.nn.functional.normalize(outside) * start.norm(dim=1).mean()
    assert unused.any() and _alive(start, held_out, dead) == 0, "the dead units are not dead"
    rows = []
    for name, prepare in (("vector-quantize-pytorch", _quantizer), ("bcl", _pulled)):
        reason = why_not(name)
        if reason is not None:
            rows.append(row("revival", name, size, status=reason))
            continue
        step, units = prepare(start)
        taken, half = [], None
        for number, x in enumerate(batches(train, batch_size), 1):
            begun = time.perf_counter()
            step(x)
            taken.append((time.perf_counter() - begun) * 1e3)
            if half is None and _alive(units(), held_out, dead) >= dead / 2:
                half = number
        found = {"dead": dead, "revived": _alive(units(), held_out, dead), "half_revived_after": half}
        found |= quality(units(), held_out)
        rows.append(row("revival", name, size, ms=statistics.median(taken), difference=DIFFERENCES[name], **found))
    return rows


def _alive(units: Tensor, held_out: Tensor, dead: int) -> int:
    """How many of the first `dead` units are the nearest of a sample."""
    return int((torch.cdist(held_out, units).argmin(dim=1).unique() < dead).sum())


def _quantizer(start: Tensor) -> tuple[Callable[[Tensor], Any], Callable[[], Tensor]]:
    from vector_quantize_pytorch import VectorQuantize

    torch.manual_seed(0)
    quantizer = VectorQuantize(dim=start.shape[1], codebook_size=len(start), threshold_ema_dead_code=2)
    state = quantizer.state_dict()
    state["_codebook.embed"], state["_codebook.embed_avg"] = start[None], start[None]  # averages of one sample each
    quantizer.load_state_dict(state)
    return lambda x: quantizer(x[:, None]), lambda: quantizer.codebook


def _pulled(start: Tensor) -> tuple[Callable[[Tensor], Any], Callable[[], Tensor]]:
    layer = pulled_layer(start)
    return lambda x: pull(layer, x), lambda: layer.weight.detach()
