"""BCLLayer where its weight, its samples or itself are spread over ranks: right, or an error that names the cause."""

import contextlib
import importlib
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import helpers.ranks
import pytest
import torch
from helpers.ranks import Ranks
from torch import nn

from bcl_fast.layer import BCLLayer
from bcl_fast.monitor import Monitor, Monitored

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

N, D = 12, 8


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


def monitored(rank):
    """The first rank says where to."""
    plain, watched = model(sync="local"), model(sync="local")
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    torch.distributed.broadcast_object_list(folder)
    for net in (plain, watched):
        parallel, optimizer = DistributedDataParallel(net), torch.optim.SGD(net.parameters(), 0.1)
        watching = Monitor(parallel, optimizer, 2, folder[0]) if net is watched else contextlib.nullcontext()
        with watching as monitor:
            for step in range(3):
                train(parallel, rank, step)
                optimizer.step()
                optimizer.zero_grad()
                if monitor is not None:
                    monitor.log(rank=rank)
    return folder[0], equal(weights(plain), weights(watched))


def test_of_several_ranks_the_first_is_monitored(ranks):
    answers = ranks.do(monitored)
    assert not any(isinstance(answer, str) for answer in answers), answers
    (folder, first), (other, second) = answers
    assert folder == other and first and second
    found = Monitored.read(Path(folder))
    shutil.rmtree(folder)
    assert {name: [line["step"] for line in lines] for name, lines in found.layers.items()} == {"0": [0, 2]}
    assert len(found.runs) == 1 and found.logged == {"0": [{"step": 0, "rank": 0}, {"step": 2, "rank": 0}]}


def stuck(rank):
    if rank == 0:
        torch.distributed.barrier()  # for which the other never comes
    else:
        time.sleep(1000)


def test_a_rank_that_is_stuck_is_killed(ranks, monkeypatch):
    ranks.do(global_sync_without_ddp, world=1)
    monkeypatch.setattr(helpers.ranks, "SECONDS", 1)
    processes = ranks.processes
    with pytest.raises(TimeoutError, match="rank 0 is dead or stuck"):
        ranks.do(stuck)
    assert not any(process.is_alive() for process in processes)
