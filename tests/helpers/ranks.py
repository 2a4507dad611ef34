"""Ranks: processes of gloo on the CPU, started once. One that gets stuck is killed with the test it is stuck in."""

import importlib
import multiprocessing
import os
import queue
import tempfile
import time
import warnings

import torch

SECONDS = 12  # that a job may take where the machine is shared: alone it takes a tenth of one
TO_START = 90  # likewise: three


def work(rank, orders, results):
    """A rank: jobs in, their results or errors out."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else the machine's name must resolve
    warnings.simplefilter("ignore")
    for part in ("fsdp", "tensor.parallel"):
        importlib.import_module("torch.distributed." + part)
    results.put("ready")
    while (order := orders.get()) is not None:
        module, job, world, store = order
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        try:
            result = getattr(importlib.import_module(module), job)(rank)
        except Exception as error:
            result = error
        try:
            torch.distributed.destroy_process_group()
        finally:
            results.put(result if not isinstance(result, Exception) else f"{type(result).__name__}: {result}")


class Ranks:
    """Two processes that do the same job side by side."""

    def __init__(self):
        self.processes = []

    def start(self):
        context = multiprocessing.get_context("spawn")
        self.orders, self.results = ([context.Queue() for _ in range(2)] for _ in range(2))
        self.processes = [
            context.Process(target=work, args=(rank, self.orders[rank], self.results[rank]), daemon=True)
            for rank in range(2)
        ]
        for process in self.processes:
            process.start()
        self.answers(2, TO_START)

    def answers(self, world, seconds):
        """What each rank has to say within this time."""
        end, answers = time.monotonic() + seconds, []
        while len(answers) < world:
            try:
                answers.append(self.results[len(answers)].get(timeout=0.2))
            except queue.Empty:
                if time.monotonic() > end or not all(process.is_alive() for process in self.processes):
                    self.kill()
                    raise TimeoutError(f"rank {len(answers)} is dead or stuck") from None
        return answers

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []

    def do(self, job, world=2):
        """The result of every rank: what `job` returned, or its error as text."""
        if not self.processes:
            self.start()
        with tempfile.TemporaryDirectory() as folder:
            for orders in self.orders[:world]:
                orders.put((job.__module__, job.__name__, world, os.path.join(folder, "store")))
            return self.answers(world, SECONDS)
