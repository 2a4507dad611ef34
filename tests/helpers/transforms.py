"""What torch's transforms are given: layers in eval(), their loss, and inputs that are no dense float tensors."""

import torch
from torch import nn

from helpers.layers import D, N, batch, make

VMAP = torch.func.vmap


def evaluated(space="weight", seed=0):
    """A layer in eval() and the nn.Linear that it must equal."""
    layer, linear = make(seed=seed, som_space=space), nn.Linear(N, D)
    with torch.no_grad():
        if space == "offset":
            layer.som_offset.copy_(0.1 * batch(D, seed + 5))
        linear.weight.copy_(layer.weight if space == "weight" else layer.weight + layer.som_offset)
        linear.bias.copy_(layer.bias)
    return layer.eval(), linear.eval()


def parameters(module):
    return {name: value.detach() for name, value in module.named_parameters()}


def loss(module):
    return lambda parameters, x: torch.func.functional_call(module, parameters, (x,)).square().sum()


def nested(x, layout):
    return torch.nested.nested_tensor([x[:3], x[:5]], layout=layout)


KINDS = {  # x [B, N] as everything else than a dense float tensor
    "sparse_coo": torch.Tensor.to_sparse,
    "sparse_csr": torch.Tensor.to_sparse_csr,
    "nested": lambda x: nested(x, torch.strided),
    "jagged": lambda x: nested(x, torch.jagged),
    "complex": lambda x: x.to(torch.complex64),
    "integer": torch.Tensor.long,
    "bool": torch.Tensor.bool,
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "mkldnn": torch.Tensor.to_mkldnn,
}
