"""Modules of other packages that read the weight of a linear layer: refused by name, exactly where they never call it.

A row of the table in attach.py that is no longer true of the installed version fails here.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bcl_fast.attach import _READERS, attach_bcl

WIDTH, IMAGE = 16, (2, 16, 4, 4)
SMALL = dict(vocab_size=20, hidden_size=WIDTH, num_hidden_layers=1)


def of_transformers(model, *names):
    """Names in a file of transformers' models."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    file = "data2vec_audio" if model == "data2vec" else model
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{file}")
    if missing := [name for name in names if not hasattr(module, name)]:
        pytest.skip(f"this version of transformers has no {missing[0]}")
    return [getattr(module, name) for name in names]


def attention_map(model, name):
    (kind,) = of_transformers(model, name)
    return kind(WIDTH, 2), (torch.randn(2, 3, WIDTH), torch.randn(IMAGE)), {}


def dab_detr():
    (kind,) = of_transformers("dab_detr", "DabDetrMHAttentionMap")
    return kind(WIDTH, WIDTH, 2), (torch.randn(2, 3, WIDTH), torch.randn(IMAGE)), {}


def mamba(model, name):
    (kind,) = of_transformers(model, name)
    model = kind(kind.config_class(**SMALL, state_size=4))
    return model, (torch.arange(6)[None],), {}


def jamba():
    kind, Config = of_transformers("jamba", "JambaMambaMixer", "JambaConfig")
    heads = dict(num_attention_heads=2, num_key_value_heads=1, intermediate_size=WIDTH)
    return kind(Config(**SMALL, **heads, mamba_d_state=4, use_mamba_kernels=False), 0), (torch.randn(2, 5, WIDTH),), {}


def layoutlmv2():
    kind, Config = of_transformers("layoutlmv2", "LayoutLMv2Encoder", "LayoutLMv2Config")
    config = Config(**SMALL, num_attention_heads=2, intermediate_size=8)
    places = dict(bbox=torch.zeros(1, 4, 4, dtype=torch.int64), position_ids=torch.arange(4)[None])
    return kind(config), (torch.randn(1, 4, WIDTH), torch.zeros(1, 1, 1, 4)), places


def longcat():
    kind, Config = of_transformers("longcat_flash", "LongcatFlashTopkRouter", "LongcatFlashConfig")
    return kind(Config(hidden_size=WIDTH)), (torch.randn(2, 3, WIDTH),), {}


def mobilebert():
    kind, Config = of_transformers("mobilebert", "MobileBertLMPredictionHead", "MobileBertConfig")
    return kind(Config(vocab_size=20, hidden_size=WIDTH, embedding_size=8)), (torch.randn(2, 3, WIDTH),), {}


def neomme():
    (kind,) = of_transformers("neomme", "NeoMMEForMaskedLM")
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=8, embedding_rank=8)
    return kind(kind.config_class(**SMALL, **heads)), (torch.arange(7, 12)[None],), {}


def tdnn(model):
    (kind,) = of_transformers(model, "TDNNLayer")
    config = SimpleNamespace(tdnn_dim=[8, 8], tdnn_kernel=[3, 3], tdnn_dilation=[1, 1])
    return kind(config, 1), (torch.randn(2, 9, 8),), {}


def wavlm():
    (kind,) = of_transformers("wavlm", "WavLMAttention")
    return kind(WIDTH, 2), (torch.randn(2, 5, WIDTH),), {}


TDNN = ["data2vec", "unispeech_sat", "wav2vec2", "wav2vec2_bert", "wav2vec2_conformer", "wavlm"]
BUILDERS = {
    "ConditionalDetrMHAttentionMap": lambda: attention_map("conditional_detr", "ConditionalDetrMHAttentionMap"),
    "DabDetrMHAttentionMap": dab_detr,
    "DetrMHAttentionMap": lambda: attention_map("detr", "DetrMHAttentionMap"),
    "FalconMambaMixer": lambda: mamba("falcon_mamba", "FalconMambaForCausalLM"),
    "JambaMambaMixer": jamba,
    "LayoutLMv2Encoder": layoutlmv2,
    "LongcatFlashTopkRouter": longcat,
    "MambaMixer": lambda: mamba("mamba", "MambaForCausalLM"),
    "MaskFormerDetrMHAttentionMap": lambda: attention_map("maskformer", "MaskFormerDetrMHAttentionMap"),
    "MobileBertLMPredictionHead": mobilebert,
    "NeoMMEForMaskedLM": neomme,
    "WavLMAttention": wavlm,
    **{f"TDNNLayer of {model}": lambda model=model: tdnn(model) for model in TDNN},
}


def test_what_is_refused_is_what_is_never_called():
    for name, build in BUILDERS.items():
        compare(name, *build())


def compare(name, model, args, kwargs):
    """What attach_bcl refuses of a model with what a forward of it does not call."""
    reader = name.partition(" ")[0]
    inside = {n: m for n, m in model.named_modules() if type(m).__name__ == reader}
    children = {f"{n}.{key}".lstrip("."): key for n, m in inside.items() for key in m._modules}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n in children}
    called = []
    for n, linear in linears.items():
        linear.register_forward_hook(lambda *args, n=n: called.append(n))
    model(*args, **kwargs)
    read = [n for n in linears if children[n] in _READERS[f"transformers {reader}"].split()]
    assert read and sorted({*linears} - {*called}) == sorted(read)
    for n in read:
        with pytest.raises(ValueError, match=f"'{n}' belongs to a {reader}, which reads its weight"):
            attach_bcl(model, n)
    if called:
        attach_bcl(model, set(called))


def test_every_row_of_the_table_is_tried():
    tried = {f"transformers {name.partition(' ')[0]}" for name in BUILDERS}
    assert {row for row in _READERS if row.startswith("transformers")} == tried


class MultiheadAttention(nn.Module):
    """A user's own class, of a name in the table: it calls its layers."""

    def __init__(self):
        super().__init__()
        self.out_proj = nn.Linear(12, 12)

    def forward(self, x):
        return self.out_proj(x)


class Gated(nn.MultiheadAttention):
    """A relative that calls a layer of its own."""

    def __init__(self):
        super().__init__(12, 2)
        self.gate = nn.Linear(12, 12)

    def forward(self, x):
        return super().forward(x, x, x)[0] * self.gate(x)


@pytest.mark.parametrize("kind, name", [(MultiheadAttention, "out_proj"), (Gated, "gate")])
def test_a_layer_that_is_called_is_attached_whatever_its_parent_is_called(kind, name):
    model = kind()
    layer = attach_bcl(model, name).layer
    model(torch.randn(5, 3, 12)).square().sum().backward()
    assert int(layer.step) == 1
    if kind is Gated:
        with pytest.raises(ValueError, match="'out_proj' belongs to a MultiheadAttention"):
            attach_bcl(model, "out_proj")
