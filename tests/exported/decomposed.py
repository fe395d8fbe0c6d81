"""Programs that were decomposed before they are bound."""

import copy
import warnings

import torch
from torch import nn

import compile_modes as cm

ERASED = "erased from an eval graph"


class BatchNorms(nn.Module):
    """Affine and not, tracking and not, called once, twice, and with the momentum that looks like no update."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)
        self.plain = nn.BatchNorm1d(4, eps=1e-2, momentum=0.3, affine=False)
        self.batch_only = nn.BatchNorm1d(4, track_running_stats=False)
        self.deep = nn.Sequential(nn.BatchNorm1d(4, momentum=0.05), nn.Identity())

    def forward(self, x):
        return self.deep(self.batch_only(self.plain(self.conv(x))))


def decomposed(model, start, *args, table=None):
    program = torch.export.export(copy.deepcopy(model).train(start), args)
    return program.run_decompositions() if table is None else program.run_decompositions(table)


def bind(exported, **options):
    """Binds, with the remark on dropouts that eval exports may have lost taken for granted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"(?s).*{ERASED}", category=cm.ModeWarning)
        return cm.bind(exported, **options)
