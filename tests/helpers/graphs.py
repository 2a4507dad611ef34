"""Fixtures that let CUDA graphs be captured without a GPU, on a backend that can be run here."""

import pytest

from bcl_fast import backends, capture


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Models may lie on the CPU, counters on the host, and a graph is the function that it would have recorded.

    As in a graph, what the function leaves goes to where it went at the capture: the loss and the gradients.
    """

    def record(device, function):
        loss = function()
        owner = function.__self__
        gradients = {p: p.grad for p in owner._model.parameters()}

        def replay():
            loss.copy_(function())
            for parameter, gradient in gradients.items():
                if gradient is not None and parameter.grad is not gradient:
                    gradient.copy_(parameter.grad)
                    parameter.grad = None  # a graph sets nothing in Python

        return replay, loss

    monkeypatch.setattr(capture, "aside", lambda device, function: function())
    monkeypatch.setattr(capture, "record", record)
    monkeypatch.setattr(capture, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(backends, "REFRESH", (*backends.REFRESH, "portable"))
    stage = backends.stage.__wrapped__
    monkeypatch.setattr(
        backends, "stage", lambda name, backend: refresh_ if name == "refresh_" else stage(name, backend)
    )


def refresh_(weight, neighbors, step, refreshed_at, recompute_every):
    """The refresh as `triton` has it, on a backend that can be run here."""
    if int(step) % recompute_every == 0 and int(refreshed_at) != int(step):
        neighbors.copy_(backends.stage("neighbors", "portable")(weight, neighbors.shape[1]))
        refreshed_at.copy_(step)


@pytest.fixture(autouse=True)
def pulls_on_the_device(monkeypatch):
    """`targets_pull_` of these backends also counts the step."""
    from bcl_fast import portable

    stock = portable.targets_pull_

    def targets_pull_(weight, som_offset, som_lr, pull, step):
        stock(weight, som_offset, som_lr, pull)
        step.add_(1)

    monkeypatch.setattr(portable, "targets_pull_", targets_pull_)
