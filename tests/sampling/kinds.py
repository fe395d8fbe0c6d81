"""Models with randomness of each kind, and what to call them with."""

import torch
import torch.nn.functional as F
from torch import nn

X, STEPS = torch.linspace(-1, 1, 40).view(5, 8), torch.ones(7, 3, 8)
IMAGES = torch.linspace(-1, 1, 384).view(2, 3, 8, 8)


class Called(nn.Module):
    """A function of itself and an input, with a linear layer."""

    def __init__(self, function):
        super().__init__()
        self.function, self.linear, self.drop = function, nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x):
        return self.function(self, x)


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x / 0.5 * x.new_empty(x.shape[0], 1).bernoulli_(0.5)


class BatchMode(nn.Module):
    """One mask for a whole batch."""

    def forward(self, x):
        return x * torch.empty(1).bernoulli_(0.5) if self.training else x


class Noise(nn.Module):
    """Draws in a region without gradients, into a tensor made of nothing."""

    def forward(self, x):
        if not self.training:
            return x
        with torch.no_grad():
            noise = torch.empty(8).bernoulli_(0.5)
        return x * noise


class Block(nn.Module):
    def __init__(self, *then):
        super().__init__()
        self.norm, self.linear, self.then = nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Sequential(*then)

    def forward(self, x):
        return self.linear(self.then(self.norm(x)))


def attention(self, x):
    heads = self.linear(x).view(1, 5, 2, 4).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.3 if self.training else 0.0)
    return mixed.transpose(1, 2).reshape(5, 8)


def written(self, x):
    """Values computed before the dropout are written to behind it, and read again."""
    h = self.linear(x)
    view = h[1:]
    h.add_(self.drop(x))
    return view * 2 + h[:1]


def regions(self, x):
    with torch.no_grad():
        h = self.drop(self.linear(x))
    with torch.autocast("cpu", torch.bfloat16):
        return self.linear(h).float() + x


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True), 2)


KINDS = {
    "dropout": lambda: (Block(nn.Dropout(0.3)), X),
    "in place": lambda: (Block(nn.ReLU(inplace=True), nn.Dropout(0.3, inplace=True), nn.ReLU(inplace=True)), X),
    "of the input, in place": lambda: (nn.Sequential(nn.Dropout(0.3, inplace=True), nn.Linear(8, 8)), X),
    "alpha": lambda: (Block(nn.AlphaDropout(0.3)), X),
    "feature": lambda: (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout2d(0.3), nn.BatchNorm2d(8)), IMAGES),
    "feature alpha": lambda: (nn.Sequential(nn.Conv2d(3, 8, 1), nn.FeatureAlphaDropout(0.3)), IMAGES),
    "attention": lambda: (Called(attention), X),
    "encoder": lambda: (encoder(), torch.linspace(-1, 1, 80).view(2, 5, 8)),
    "lstm": lambda: (nn.LSTM(8, 8, 2, dropout=0.3, bidirectional=True), STEPS),
    "gru": lambda: (nn.GRU(8, 8, 2, dropout=0.3), STEPS),
    "rnn": lambda: (nn.RNN(8, 8, 2, dropout=0.3), STEPS),
    "stochastic depth": lambda: (Block(DropPath()), X),
    "one mask for a batch": lambda: (Block(BatchMode()), X),
    "a region": lambda: (Block(Noise()), X),
    "of a weight": lambda: (Called(lambda s, x: F.linear(x, F.dropout(s.linear.weight, 0.5, s.training))), X),
    "softmax over the batch": lambda: (Called(lambda s, x: s.drop(x).softmax(0).cumsum(0).flip(0)), X),
    "the batch with itself": lambda: (Called(lambda s, x: (h := s.drop(s.linear(x))) @ h.T), X),
    "over all": lambda: (Called(lambda s, x: s.drop(x) - s.drop(x).mean()), X),
    "sorted, by index": lambda: (Called(lambda s, x: s.drop(x).sort(0)[0][[4, 0, 1]]), X),
    "written to": lambda: (Called(written), X),
    "regions": lambda: (Called(regions), X),
    "a norm that always trains": lambda: (
        nn.Sequential(nn.Dropout(0.3), nn.BatchNorm1d(8, track_running_stats=False)),
        X,
    ),
    "always": lambda: (Called(lambda s, x: s.linear(s.drop(x)) + torch.randn(5, 8)), X),
}
