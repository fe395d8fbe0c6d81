"""A module that holds tensors of all kinds, and what a file must keep of each."""

import functools

import torch
from torch import nn

DTYPES = [
    torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128, torch.bool, torch.uint8,
    torch.int8, torch.int64, torch.uint16, torch.float8_e4m3fn,
]  # fmt: skip


class Zoo(nn.Module):
    """Tensors of all kinds. Constants differ by mode, and one name is a constant in both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.last = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
        buffers = {f"kind{i}": torch.randint(0, 2, (3, 2)).to(dtype) for i, dtype in enumerate(DTYPES)}
        buffers |= {"empty": torch.zeros(0, 3), "flat": torch.zeros(2, 0, dtype=torch.int32)}
        buffers |= {"slice": torch.arange(10.0)[3:7], "transposed": torch.randn(4, 3).t(), "one": torch.tensor(1.5)}
        buffers |= {"stepped": torch.randn(6, 4)[::2, 1:], "expanded": torch.randn(1, 3).expand(2, 3)}
        buffers |= {"conj": torch.randn(5, dtype=torch.complex64)[1:].conj()}
        buffers |= {"negative": torch.randn(4, dtype=torch.complex64).conj().imag}
        whole = torch.randn(8)
        buffers |= {"left": whole[:5], "right": whole[3:], "bits": whole.view(torch.int32)}
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.register_buffer("table", torch.randn(4), persistent=False)
        self.register_buffer("view", self.first.weight.detach()[1:], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x)) * self.scalar + self.frozen + self.table
        for buffer in (self.last, *self._buffers.values()):
            if buffer.dtype != torch.float8_e4m3fn:
                y = y + (buffer.real if buffer.is_complex() else buffer).double().sum().float()
        offset = torch.tensor([1.0, 2.0, 3.0, 4.0]) if self.training else torch.tensor([0.5, 0.0, 0.0, 0.0])
        return y + offset


def both(model: nn.Module, *args: torch.Tensor) -> dict[str, torch.export.ExportedProgram]:
    return {mode: torch.export.export(model.train(mode == "train"), args) for mode in ("train", "eval")}


@functools.cache
def zoo() -> tuple[Zoo, dict[str, torch.export.ExportedProgram]]:
    """For the tests that write to none of its tensors."""
    model = Zoo()
    return model, both(model, torch.randn(2, 4))


def tensors(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    return {**program.state_dict, **program.constants}


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def assert_same(before: torch.Tensor, after: torch.Tensor) -> None:
    assert torch.equal(before.float(), after.float()) if before.dtype.itemsize == 1 else torch.equal(before, after)
    for what in ("dtype", "shape", "device", "requires_grad"):
        assert getattr(before, what) == getattr(after, what), what
    assert isinstance(before, nn.Parameter) == isinstance(after, nn.Parameter)
    if not (before.is_conj() or before.is_neg()):
        assert before.stride() == after.stride()
    assert after.is_leaf
    assert not after._is_view()
