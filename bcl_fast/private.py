"""The functions of torch without a public name that this package needs, each with the reason.

Nothing else here or in kernels/ names a private function of torch: where a new version moves one, this file changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
NO_BACKWARD = -1  # what torch says for the number of the running backward where none runs


def compiled_torch() -> str:
    """The file of torch's compiled part: torch says whether it has OpenMP, not of which runtime."""
    return torch._C.__file__


def running_backward() -> int:
    """The number of the backward that runs in this thread, or NO_BACKWARD: a pull belongs to one backward."""
    return torch._C._current_graph_task_id()


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call back once the running backward is done: torch has hooks for gradients, none for the end of a backward."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def keeps_graph() -> bool:
    """Whether the running backward keeps its graph (retain_graph): what it saved is read again."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def is_batched_gradient(tensor: Tensor) -> bool:
    """Whether this is several gradients as one (autograd.grad(is_grads_batched=True)), without memory of its own."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def never_compiled(function: Function) -> Function:
    """`torch.compiler.disable`, but the compiler is imported with the first call, not with this package."""
    disabled: Any = torch._disable_dynamo(function)
    return disabled


def skipped_by_compilers(function: Any) -> Any:
    """`never_compiled` at no cost a call, for what autograd alone calls: a compiler looks neither at it nor below it.

    A compiler that traces autograd's own calls meets the mark of `torch.compiler.disable`.
    """
    eval_frame = torch._C._dynamo.eval_frame
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    function._torchdynamo_disable = True
    return function


def accumulation_hooks(weight: Tensor) -> dict[int, Any]:
    """What `register_post_accumulate_grad_hook` has hung on a weight, in the order in which autograd calls them."""
    return weight._post_accumulate_grad_hooks or {}


def forget_accumulation_hooks(weight: Any) -> None:
    """Leave no empty dict of hooks: after a swap of contents autograd would not look at one that was set before."""
    if not weight._post_accumulate_grad_hooks:
        weight._post_accumulate_grad_hooks = None


def current_stream(device: int) -> int:
    """The handle of a CUDA device's current stream, in a tenth of the time of `torch.cuda.current_stream`."""
    return torch._C._cuda_getCurrentRawStream(device)


def transform(compiling: bool) -> str | None:
    """The program transform, if one runs, that would record or differentiate the product of a layer alone."""
    # Not is_exporting(): torch 2.11 compiles that to True outside of exports too.
    if torch.compiler._is_exporting_flag:
        return "torch.export"
    if compiling:
        return None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if not torch._C._len_torch_function_stack():  # where make_fx puts a mode of its own, too
        return None
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # make_fx has imported it already

    return None if get_proxy_mode() is None else "make_fx"
