"""What the tests of the deploy form share: a net with all that is folded and packed, and a call that looks at it."""

import copy
import gc
import warnings

import torch
from torch import nn
from torch._dynamo.utils import counters

import compile_modes as cm
from compile_modes.forms.deploy.running import DEPLOYED

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(7))
TOLERANCE = 1e-5


class Net(nn.Module):
    """Convolutions with and without bias, in groups, with norms behind, before and beside them; and linear layers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps=1e-3)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8)
        self.bn3, self.conv3 = nn.BatchNorm2d(8), nn.Conv2d(8, 64, 1)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True), nn.LayerNorm(64), nn.Linear(64, 5))

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = x + self.bn2(self.conv2(x)).relu_()
        x = self.conv3(self.bn3(x)).mean((2, 3))
        return self.fc(self.drop(x))


def net(kind=Net):
    """A net whose parameters and statistics are none that a fresh one has."""
    torch.manual_seed(11)
    model = kind()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model.eval()


def frozen(model, freeze="auto", **options):
    return torch.compile(model, backend="pt2e_modes", options={"freeze": freeze, **options})


def settle(call, *args, calls=5):
    """Calls until constants are in use, and returns the last result."""
    with torch.no_grad():
        for _ in range(calls):
            result = call(*args)
    return result


def runs_on_constants():
    """Of each parameter set of each graph that is alive, whether its last call ran on constants."""
    gc.collect()
    return [its._state[1] is not None for graph in DEPLOYED for its in graph.sets if not graph._graph.declined]


def agrees(call, model, *args, calls=5, tolerance=TOLERANCE):
    """Each of some calls equals eager: those in the stock form, the one that computes constants, and those on them."""
    with torch.no_grad():
        expected = copy.deepcopy(model)(*args)
        for number in range(calls):
            torch.testing.assert_close(call(*args), expected, rtol=tolerance, atol=tolerance, msg=f"call {number}")


def says(call, model, *args, tolerance=1e-5, calls=5):
    """Compares with eager, and returns what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", cm.ModeWarning)
        agrees(call, model, *args, calls=calls, tolerance=tolerance)
    return [str(w.message) for w in caught if issubclass(w.category, cm.ModeWarning)]


def compiled():
    """How many graphs Dynamo has handed over, and how often Inductor has been run."""
    return counters["stats"]["unique_graphs"], counters["aot_autograd"]["total"]
