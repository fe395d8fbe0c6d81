"""Buffers that are written through a view, and read before in the same graph."""

import torch
from torch import nn

from compile_modes.forms.saved_reads import pin_reads
from compile_modes.graph.view import View


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("book", torch.ones(4))

    def forward(self, x):
        y = x * self.book.clone()
        self.book[:2] = y.detach()[0, :2]
        return y


def test_what_is_read_before_a_part_of_a_buffer_is_written_is_saved_for_backward():
    graph = torch.export.export(Partly(), (torch.ones(3, 4),)).module()
    assert "clone" in [node.name for node in pin_reads(View(graph), [])]
