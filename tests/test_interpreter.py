"""The instruments of helpers/interpreter.py find what they are there for: each on a kernel made wrong on purpose."""

import pytest
import torch
from helpers.interpreter import Launches, Place, Races, Traffic, enable

pytestmark = pytest.mark.skipif(not enable(), reason="Triton's interpreter does not run here")

if enable():
    import triton
    import triton.language as tl

    @triton.jit
    def _copy_kernel(source_ptr, target_ptr, n, shift, BLOCK: tl.constexpr, MASKED: tl.constexpr, OTHER: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        if MASKED:
            value = tl.load(source_ptr + i, inside, other=0.0) if OTHER else tl.load(source_ptr + i, inside)
        else:
            value = tl.load(source_ptr + i)
        tl.store(target_ptr + i + shift, value, inside if OTHER else None)

    @triton.jit
    def _meet_kernel(target_ptr, everywhere: tl.constexpr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        own = i if everywhere else tl.program_id(0) * BLOCK + i
        tl.store(target_ptr + own, 1.0)
        if BARRIER:
            tl.debug_barrier()
        tl.load(target_ptr + own)

    @triton.jit
    def _add_kernel(target_ptr, BLOCK: tl.constexpr):
        tl.atomic_add(target_ptr + tl.arange(0, BLOCK), 1.0)

    @triton.jit
    def _square_kernel(a_ptr, target_ptr, PRECISION: tl.constexpr):
        i = tl.arange(0, 16)
        a = tl.load(a_ptr + i[:, None] * 16 + i[None, :])
        tl.store(target_ptr + i[:, None] * 16 + i[None, :], tl.dot(a, a, input_precision=PRECISION))

    @triton.jit
    def _dot_kernel(a_ptr, target_ptr):
        i = tl.arange(0, 16)
        a = tl.load(a_ptr + i[:, None] * 16 + i[None, :])
        tl.store(target_ptr + i[:, None] * 16 + i[None, :], (a + a).to(tl.float32))


def copy(n=10, room=16, shift=0, masked=True, other=True, programs=2):
    source, target = torch.ones(room if not masked else n), torch.zeros(room)
    _copy_kernel[(programs,)](source, target, n, shift, 8, masked, other)
    return target


def test_a_right_kernel_runs():
    assert copy().tolist() == [1.0] * 10 + [0.0] * 6


def test_a_load_outside_of_its_tensor_is_an_error():
    with pytest.raises(Exception, match="lanes of a load point outside of its tensors"):
        source, target = torch.ones(10), torch.zeros(16)
        _copy_kernel[(2,)](source, target, 10, 0, 8, False, True)


def test_a_store_outside_of_its_tensor_is_an_error():
    with pytest.raises(Exception, match="lanes of a store point outside of its tensors"):
        copy(shift=7)


def test_a_load_without_other_shows():
    """On a GPU its masked lanes hold anything."""
    assert copy(other=False)[10:].isnan().all()


def test_bfloat16_arithmetic_is_an_error():
    with pytest.raises(Exception, match="of bfloat16 is wrong in the interpreter"):
        _dot_kernel[(1,)](torch.ones(16, 16, dtype=torch.bfloat16), torch.empty(16, 16))


def square(a, precision):
    result = torch.empty(16, 16)
    _square_kernel[(1,)](a, result, precision)
    return result


@pytest.mark.parametrize("precision, least, most", [("ieee", 0, 3e-7), ("tf32x3", 1e-8, 1e-6), ("tf32", 1e-4, 1e-3)])
def test_products_have_the_precision_that_was_asked_for(precision, least, most):
    a = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ a.double()
    assert least <= float(((square(a, precision) - exact) / exact).abs().max()) <= most


@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
def test_products_keep_infinities_and_nan(precision):
    a = torch.eye(16)
    a[0, 0], a[5, 5] = torch.inf, torch.nan
    result = square(a, precision)
    assert result[0, 0] == torch.inf and result[5, 5].isnan()


@pytest.mark.parametrize(
    "everywhere, barrier, message",
    [
        (True, True, "a store of another program"),
        (False, False, "an earlier store without a barrier"),
        (False, True, None),
    ],
)
def test_races_are_found(everywhere, barrier, message):
    target = torch.empty(16)

    def meet():
        with Races():
            _meet_kernel[(2,)](target, everywhere, barrier, 8)

    if message is None:
        return meet()
    with pytest.raises(Exception, match=message):
        meet()


def test_a_race_declared_shared_is_not_reported():
    with Races(shared=("target_ptr",)):
        _meet_kernel[(2,)](torch.empty(16), True, False, 8)


def test_atomics_of_several_programs_are_no_race():
    target = torch.zeros(8)
    with Races():
        _add_kernel[(3,)](target, 8)
    assert target.tolist() == [3.0] * 8


def test_traffic_counts_lanes_and_distinct_elements():
    target = torch.zeros(8)
    with Traffic() as traffic:
        _add_kernel[(3,)](target, 8)
        copy()
    atomic, load = Place("_add_kernel", "target_ptr", "atomic"), Place("_copy_kernel", "source_ptr", "load")
    assert (traffic.lanes[atomic], traffic.distinct[atomic]) == (24, 8)
    assert (traffic.lanes[load], traffic.distinct[load]) == (10, 10)


def test_launches_are_described_and_may_be_left_out():
    with Launches(execute=False) as launches:
        target = copy()
    (launch,) = launches
    assert not target.any() and launch.name == "_copy_kernel" and launch.grid == (2,)
    assert launch.types["source_ptr"] == "*fp32" and launch.types["BLOCK"] == "constexpr" and launch.values["n"] == 10
