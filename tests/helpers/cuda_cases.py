"""What tests of the CUDA stages share: when they run, over which forms, and what their choices are held to."""

import os

import pytest
import torch

from bcl_fast import backends, cuda
from bcl_fast import reference as ref
from helpers.backends import stage
from helpers.stages import by_row

SERVED = backends.why_not("cuda", "cuda" if torch.cuda.is_available() else "cpu") is None

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU; less shared memory leads here on the host")
on_host = pytest.mark.skipif("BCL_FAST_CUDA" not in os.environ, reason="a GPU, or no C++ compiler")
served = pytest.mark.skipif(not SERVED, reason="the CUDA library is not built")


def over_forms(stage, **fixed):
    """Parametrize a test over the forms of a stage that are compiled, those with these values alone."""
    forms = [form for form in cuda.FORMS[stage] if form.items() >= fixed.items()]
    return pytest.mark.parametrize("form", forms, ids=[" ".join(map(str, form.values())) for form in forms])


def check_choices(*arguments):
    got, expected = (by_row(*choose(*arguments)) for choose in (stage("selection", "cuda"), ref.selection))
    assert got[0].equal(expected[0])
    scale = float(expected[1].nan_to_num().max())
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-6 * scale, equal_nan=True)
