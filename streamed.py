"""Weights laid out for streaming on a CPU, where a step of a row or two only reads them."""

import warnings

import torch
from torch import Tensor, nn


class StreamedLinear(nn.Linear):
    """A layer that reads its weights in half precision, as a CPU's steps of few rows wait for them.

    For weights it holds exactly, as an export's; sums are in fp32: only their order changes."""

    FEW_ROWS = 16  # more go the ordinary way

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.offset = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.data
        with warnings.catch_warnings():  # both functions are deprecated; their successor is slower
            warnings.simplefilter("ignore")
            self.packed = torch.fbgemm_pack_gemm_matrix_fp16(layer.weight.data)
            self(layer.weight.new_zeros(1, layer.in_features))  # each warns once a process

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > self.FEW_ROWS * self.in_features or x.dtype != torch.float32 or not x.is_cpu:
            return super().forward(x)
        return torch.fbgemm_linear_fp16_weight_fp32_activation(x, self.packed, self.offset)


def stream_weights(model: nn.Module) -> None:
    """Makes steps of one or two rows cheap on a CPU, for weights that no longer change.

    Names, shapes and values stay. Layers become `StreamedLinear` where their weights and this
    PyTorch allow it; others that widen out are laid out column by column, which reads faster."""
    packs = "fbgemm" in torch.backends.quantized.supported_engines
    packs = packs and hasattr(torch, "fbgemm_linear_fp16_weight_fp32_activation")
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear:
                continue
            weight = layer.weight.data
            if packs and torch.equal(weight.half().float(), weight):
                setattr(parent, name, StreamedLinear(layer))
            elif layer.out_features > layer.in_features:
                layer.weight.data = weight.t().contiguous().t()
