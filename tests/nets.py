"""Small models, with no probability, eps or momentum at its default."""

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

IMAGE = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
VECTORS = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4))
SEQUENCE = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(2))


class Block(nn.Module):
    def __init__(self, cin: int, cout: int, p: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, padding=1)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3, momentum=0.03)
        self.drop = nn.Dropout2d(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(torch.relu(self.bn(self.conv(x))))


class ConvNet(nn.Module):
    """Two blocks, a dropout used twice, and a functional dropout of the root's own."""

    def __init__(self) -> None:
        super().__init__()
        self.block1 = Block(3, 4, 0.3)
        self.block2 = Block(4, 4, 0.2)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.block2(self.drop(self.block1(x))))
        return F.dropout(self.fc(x.mean((2, 3))), 0.15, self.training)


class Small(nn.Module):
    """One batch norm and one dropout, for graphs that a snapshot can show."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(features, eps=1e-3, momentum=0.03)
        self.drop = nn.Dropout(0.25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.bn(x))


class Parent(nn.Module):
    """An eager module around another one, with mode-dependent parts of its own."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.BatchNorm2d(3, momentum=0.2), nn.Dropout(0.05))
        self.child = child

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.child(self.stem(x))


class Activations(nn.Module):
    """The whole dropout family and RReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Dropout(0.1),
            nn.Dropout1d(0.2),
            nn.AlphaDropout(0.15),
            nn.FeatureAlphaDropout(0.25),
            nn.RReLU(),
            nn.RReLU(0.2, 0.4),
        )
        self.fc = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(self.fc(x))


class Norms(nn.Module):
    """Batch norms with and without statistics, affine and not, and a tracking instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.tracking = nn.BatchNorm1d(4, eps=1e-2, momentum=0.3, affine=False)
        self.batch_only = nn.BatchNorm1d(4, track_running_stats=False)
        self.instance = nn.InstanceNorm1d(4, momentum=0.4, affine=True, track_running_stats=True)
        self.instance_only = nn.InstanceNorm1d(4)
        self.conv = nn.Conv1d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.instance_only(self.instance(self.batch_only(self.tracking(x))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, num_layers=3, dropout=0.3, batch_first=True)
        self.gru = nn.GRU(5, 4, num_layers=2, dropout=0.2, bidirectional=True, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(self.lstm(x)[0])[0]


class RecurrentStack(nn.Module):
    """Recurrent layers in an eager model, behind a layer whose output needs a gradient, and a region without grad."""

    def __init__(self, lstm: nn.Module, gru: nn.Module) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.lstm, self.gru = lstm, gru

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lstm(self.fc(x))[0]
        with torch.no_grad():
            z = self.gru(x)[0]
        return y + z


class Checkpointed(nn.Module):
    """A child whose first result is computed again in the backward pass."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(lambda t: self.child(t)[0], x, use_reentrant=False)


class Attention(nn.Module):
    """Attention dropout, beside a dropout module."""

    def __init__(self, p: float = 0.2) -> None:
        super().__init__()
        self.p = p
        self.qkv = nn.Linear(8, 24)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        p = self.p if self.training else 0.0
        return self.drop(F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).reshape(x.shape))


class Regions(nn.Module):
    """Mode-dependent modules inside no_grad and autocast regions, which export as higher-order ops."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = Block(3, 3, 0.3)
        self.mixed = Block(3, 3, 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.frozen(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            z = self.mixed(x)
        return x + y + z


class UnusedNorm(nn.Module):
    """A batch norm whose output nobody uses still tracks statistics in train."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4, momentum=0.2)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.bn(x)
        return self.fc(x)


class UserCounter(nn.Module):
    """A counter of the user's own, which advances in both modes."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return self.bn(x) + self.steps


class HardCoded(nn.Module):
    """Three dropouts of one owner, one of them always on (F.dropout's default)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.fc(x), 0.1, self.training)
        return F.dropout(F.dropout(x, 0.2, self.training), 0.3)


class DropPath(nn.Module):
    """Stochastic depth as timm ("bernoulli") and transformers ("floor") write it, or scaled "after" the mask."""

    def __init__(self, p: float, style: str = "bernoulli") -> None:
        super().__init__()
        self.p, self.style = p, style

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep, shape = 1 - self.p, (x.shape[0],) + (1,) * (x.ndim - 1)
        if self.style == "bernoulli":
            return x * x.new_empty(shape).bernoulli_(keep).div_(keep)
        if self.style == "after":
            return x * (torch.rand(shape, dtype=x.dtype) > self.p) / keep
        mask = keep + torch.rand(shape, dtype=x.dtype)
        mask.floor_()
        return x.div(keep) * mask


class DropBlock(nn.Module):
    """A mask made under no_grad, where export moves the random numbers into a region of their own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        with torch.no_grad():
            keep = 1 - F.max_pool2d(torch.empty(x.shape[0], 1, *x.shape[2:]).bernoulli_(0.1), 3, 1, 1)
            keep = keep * (keep.numel() / (keep.sum() + 1e-7))
        return x * keep


class Residual(nn.Module):
    """A random mask on each branch, between parts with flags."""

    def __init__(self, *drops: nn.Module) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in drops)
        self.drops = nn.ModuleList(drops)
        self.bn = nn.BatchNorm2d(3, eps=1e-3, momentum=0.03)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, drop in zip(self.convs, self.drops, strict=True):
            x = x + drop(conv(x))
        return self.bn(x)


class Sampler(nn.Module):
    """Draws random numbers in both modes, as a variational autoencoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 8)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, log = self.fc(x).chunk(2, -1)
        return self.drop(mean + torch.randn_like(mean) * log.exp())


class MixedMask(nn.Module):
    """A mask among other computations of its module: from one export, nobody can tell what it depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        if self.training:
            x = x * torch.empty(len(x), 1).bernoulli_(0.5)
        return self.drop(x.relu())


class EveryFlag(nn.Module):
    """One owner with flags that follow its mode, don't, and are inverted; a mask and a dropout only train has."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.fc(x), 0.1, self.training)
        x = F.dropout(x, 0.2)
        x = F.dropout(F.dropout(x, 0.3, False), 0.15, not self.training)
        if self.training:
            x = F.dropout(x, 0.25) * torch.empty(len(x), 1).bernoulli_(0.5)
        q = x[None, None]
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.0 if self.training else 0.3)[0, 0]


class Auxiliary(nn.Module):
    """Another structure of outputs in train, state of the root's own, and a dropout of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ConvNet()
        self.aux = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.2))
        self.scale = nn.Parameter(torch.ones(5))
        self.register_buffer("shift", torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        y = F.dropout(self.net(x) * self.scale + self.shift, 0.1, self.training)
        return (y, self.aux(y)) if self.training else y


class FunctionalNorm(nn.Module):
    """Calls batch norm's function, which counts nothing, on a module's state."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bn = self.bn
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, 0.2, 1e-3)


class Twice(nn.Module):
    """One batch norm called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4, momentum=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.bn(x) * 2)


class BrokenBetween(nn.Module):
    """Two dropouts, and a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)
