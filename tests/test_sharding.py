"""BCLLayer where its weight, its samples or itself are spread over ranks: right, or an error that names the cause.

Ranks are processes of gloo on the CPU, started once. One that gets stuck is killed with the test it is stuck in.
"""

import importlib
import multiprocessing
import os
import queue
import tempfile
import time
import warnings

import pytest
import torch
from torch import nn

from bcl_fast.layer import BCLLayer

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

SECONDS = 12  # that a job may take where the machine is shared: alone it takes a tenth of one
TO_START = 90  # likewise: three
N, D = 12, 8


# --- Ranks -----------------------------------------------------------------------------------------------------------


def work(rank, orders, results):
    """A rank: jobs in, their results or errors out."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else the machine's name must resolve
    warnings.simplefilter("ignore")
    for module in ("fsdp", "tensor.parallel"):
        importlib.import_module("torch.distributed." + module)
    results.put("ready")
    while (order := orders.get()) is not None:
        job, world, store = order
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        try:
            result = globals()[job](rank)
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
                orders.put((job.__name__, world, os.path.join(folder, "store")))
            return self.answers(world, SECONDS)


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks()
    try:
        pool.start()
        yield pool
    finally:
        pool.kill()


def model(**options):
    torch.manual_seed(0)
    return nn.Sequential(BCLLayer(N, D, neighborhood_k=3, som_lr=0.1, **options), nn.Tanh(), nn.Linear(D, 4))


def batch(rank, step=0):
    return torch.randn(6 + rank, N, generator=torch.Generator().manual_seed(2 * step + rank))


def train(call, rank, step=0):
    call(batch(rank, step)).square().sum().backward()


def weights(module):
    return {name: value.detach().clone().numpy() for name, value in module.state_dict().items()}


def gradients(module):
    return {name: parameter.grad.numpy() for name, parameter in module.named_parameters()}


def equal(one, other):
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


# --- A weight in parts -----------------------------------------------------------------------------------------------


def fully_sharded(rank):
    from torch.distributed.fsdp import fully_shard

    net = model(sync="local")
    fully_shard(net, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    train(net, rank)


def layer_fully_sharded(rank):
    from torch.distributed.fsdp import fully_shard

    net, mesh = model(sync="local"), init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    train(net, rank)


def wrapped_by_fsdp(rank, **options):
    from torch.distributed.fsdp import FullyShardedDataParallel

    train(FullyShardedDataParallel(model(sync="local"), device_id=torch.device("cpu"), **options), rank)


def wrapped_by_fsdp_with_original_parameters(rank):
    wrapped_by_fsdp(rank, use_orig_params=True)


def wrapped_by_fsdp_that_shards_nothing(rank):
    from torch.distributed.fsdp import ShardingStrategy

    wrapped_by_fsdp(rank, use_orig_params=True, sharding_strategy=ShardingStrategy.NO_SHARD)


def parallelized(rank, style="ColwiseParallel", columns=slice(None)):
    import torch.distributed.tensor.parallel as parallel

    net = model(sync="local")
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    parallel.parallelize_module(net, mesh, {"0": getattr(parallel, style)()})
    net(batch(0)[:, columns]).square().sum().backward()


def parallelized_by_rows(rank):
    part = N // torch.distributed.get_world_size()
    parallelized(rank, "RowwiseParallel", slice(rank * part, (rank + 1) * part))


def distributed(rank, shard=True, input=False):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    layer = model(sync="local")[0]
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0) if shard else Replicate()]))
    layer.bias = nn.Parameter(distribute_tensor(layer.bias.detach(), mesh, [Replicate()]))
    x = batch(0)
    layer(distribute_tensor(x, mesh, [Replicate()]) if input else x).sum().backward()


def distributed_with_its_input(rank):
    distributed(rank, input=True)


def distributed_but_replicated(rank):
    distributed(rank, shard=False, input=True)


SPREAD = [
    (fully_sharded, "fully_shard"),
    (layer_fully_sharded, "fully_shard"),
    (wrapped_by_fsdp, "FSDP"),
    (wrapped_by_fsdp_with_original_parameters, "FSDP"),
    (wrapped_by_fsdp_that_shards_nothing, "FSDP"),
    (parallelized, "DTensor"),
    (parallelized_by_rows, "DTensor"),
    (distributed, "DTensor"),
    (distributed_with_its_input, "DTensor"),
    (distributed_but_replicated, "DTensor"),
]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("job, cause", SPREAD, ids=[job.__name__ for job, _ in SPREAD])
def test_a_spread_weight_is_an_error_that_names_the_cause(ranks, job, cause, world):
    for answer in ranks.do(job, world):
        assert answer is not None, "trained in silence"
        assert answer.startswith(("RuntimeError:", "TypeError:")) and cause in answer, answer


def evaluated_fully_sharded(rank):
    from torch.distributed.fsdp import fully_shard

    net, plain = model(sync="local").eval(), model(sync="local").eval()
    fully_shard(net, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    return bool((net(batch(rank)) - plain(batch(rank))).abs().max() < 1e-6)


def test_a_spread_weight_evaluates(ranks):
    assert ranks.do(evaluated_fully_sharded) == [True, True]


def replicas(net, monkeypatch):
    """What nn.DataParallel makes of a module on two GPUs, without any."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(
        replicate,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[t.detach() if detach else t * 1 for t in tensors] for _ in devices],
    )
    return replicate.replicate(net, [0, 1])


def test_replicas_of_data_parallel_are_an_error_that_names_the_cause(monkeypatch):
    net = model()
    for replica in replicas(net, monkeypatch):
        with pytest.raises(RuntimeError, match="DataParallel"):
            train(replica, 0)
    assert equal(weights(net), weights(model()))
    train(net, 0)
    assert int(net[0].step) == 1


def test_replicas_of_data_parallel_evaluate(monkeypatch):
    net = model().eval()
    for replica in replicas(net, monkeypatch):
        assert replica(batch(0)).equal(net(batch(0)))


def test_data_parallel_on_one_device_trains():
    """Without GPUs, and on one, it calls the module itself."""
    net, plain = model(), model()
    for call in (nn.DataParallel(net), plain):
        train(call, 0)
    assert equal(weights(net), weights(plain)) and int(net[0].step) == 1


# --- Samples of several ranks ----------------------------------------------------------------------------------------


def global_sync(rank, **options):
    train(DistributedDataParallel(model(**options)), rank)


def global_sync_without_ddp(rank):
    train(model(), rank)


def global_sync_of_coupled_forces(rank):
    """Their mask itself is of all samples."""
    global_sync(rank, forces="coupled")


def global_sync_of_coupled_forces_without_a_pull(rank):
    net = model(forces="coupled")
    net[0].frozen = True
    train(DistributedDataParallel(net), rank)


def global_sync_with_a_pull_again(rank):
    net = model()
    net[0].som_lr = 0
    parallel = DistributedDataParallel(net)
    train(parallel, rank)
    net[0].som_lr = 0.1
    train(parallel, rank)


@pytest.mark.parametrize(
    "job",
    [
        global_sync,
        global_sync_without_ddp,
        global_sync_of_coupled_forces,
        global_sync_of_coupled_forces_without_a_pull,
        global_sync_with_a_pull_again,
    ],
    ids=lambda job: job.__name__,
)
def test_what_needs_other_ranks_is_an_error_that_names_the_cause(ranks, job):
    for answer in ranks.do(job):
        assert answer is not None, "trained in silence"
        assert "RuntimeError" in answer and "sync='global'" in answer and "2 ranks" in answer, answer


@pytest.mark.parametrize("job", [global_sync, global_sync_without_ddp, global_sync_of_coupled_forces])
def test_one_rank_needs_no_other(ranks, job):
    assert ranks.do(job, world=1) == [None]


def frozen(rank, how="frozen", **options):
    net = model(**options)
    setattr(net[0], how, how == "frozen" or 0)
    before = weights(net)
    parallel = DistributedDataParallel(net)
    for step in range(2):
        net.zero_grad()
        train(parallel, rank, step)
    return before, weights(net), gradients(net)


def without_som_lr(rank):
    return frozen(rank, "som_lr")


def frozen_winner_take_all(rank):
    return frozen(rank, gradient_mask="winner_take_all")


def frozen_offset(rank):
    return frozen(rank, som_space="offset")


JOBS = {
    frozen: {},
    without_som_lr: {},
    frozen_winner_take_all: {"gradient_mask": "winner_take_all"},
    frozen_offset: {"som_space": "offset"},
}


@pytest.mark.parametrize("job", JOBS, ids=[job.__name__ for job in JOBS])
def test_a_layer_without_a_pull_needs_no_other_rank(ranks, job):
    """Decoupled masks are of each sample by itself: what DDP gives is the mean of the two ranks' own gradients."""
    alone = []
    for rank in range(2):
        net = model(**JOBS[job])
        net[0].frozen = True
        for step in range(2):
            net.zero_grad()
            train(net, rank, step)
        alone.append(gradients(net))
    mean = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}
    for answer in ranks.do(job):
        assert not isinstance(answer, str), answer
        before, after, gradient = answer
        assert equal(gradient, mean)
        assert after["0.step"] == 2 and (after["0.weight"] == before["0.weight"]).all()
        assert not before.keys() & {"0.som_offset"} or not after["0.som_offset"].any()


def local_sync(rank):
    """One training, of whose gradients only DDP knows; and the same by hand."""
    net, twin = model(sync="local"), model(sync="local")
    parallel = DistributedDataParallel(net)
    optimizers = [torch.optim.SGD(module.parameters(), 0.1) for module in (net, twin)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            train(parallel, rank, step)
            train(twin, rank, step)
            for parameter in twin.parameters():
                torch.distributed.all_reduce(parameter.grad.div_(2))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    drifts = [str(warning.message) for warning in caught if "replicas drift" in str(warning.message)]
    return weights(net), weights(twin), len(drifts)


def test_local_sync_trains_every_rank_by_itself(ranks):
    answers = ranks.do(local_sync)
    for answer in answers:
        assert not isinstance(answer, str), answer
        ours, theirs, drifts = answer
        assert ours["0.step"] == 3 and drifts == 2  # one for each layer
        for name in theirs:
            torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(theirs[name]), rtol=1e-5, atol=1e-6)
    (first, *_), (second, *_) = answers
    assert (first["0.weight"] != second["0.weight"]).any() and (first["2.weight"] == second["2.weight"]).all()


def stuck(rank):
    if rank == 0:
        torch.distributed.barrier()  # for which the other never comes
    else:
        time.sleep(1000)


def test_a_rank_that_is_stuck_is_killed(ranks, monkeypatch):
    ranks.do(global_sync_without_ddp, world=1)
    monkeypatch.setitem(globals(), "SECONDS", 1)
    processes = ranks.processes
    with pytest.raises(TimeoutError, match="rank 0 is dead or stuck"):
        ranks.do(stuck)
    assert not any(process.is_alive() for process in processes)
