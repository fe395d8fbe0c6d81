"""What of a decomposed program bind can't put together again: refused, or named."""

import copy
import operator
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compile_modes as cm
from exported.decomposed import ERASED, BatchNorms, decomposed
from nets import IMAGE, VECTORS, ConvNet, Norms, Recurrent, Small, Twice, UnusedNorm
from oracle import agrees, same_outputs, same_state, text
from setups import STARTS

aten = torch.ops.aten


class Reads(nn.Module):
    """Something else has to do with a batch norm's buffers, at a place that a subclass chooses."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4, momentum=0.3)
        self.register_buffer("seen", torch.zeros(4))


class Before(Reads):
    def forward(self, x):
        shift = self.bn.running_mean.view(4)  # an alias: eager sees the update
        return self.bn(self.fc(x)) + shift


class After(Reads):
    def forward(self, x):
        return self.bn(self.fc(x)) + self.bn.running_mean * 2


class Returned(Reads):
    def forward(self, x):
        return self.bn(self.fc(x)), self.bn.running_var.clone()


class Averaged(Reads):
    def forward(self, x):
        y = self.bn(self.fc(x))
        self.seen.lerp_(self.bn.running_mean, 0.25)
        return y


class Counted(Reads):
    def forward(self, x):
        return self.bn(self.fc(x)) * self.bn.num_batches_tracked


class Changed(Reads):
    def forward(self, x):
        self.bn.running_mean.mul_(0.5)
        return self.bn(self.fc(x))


@STARTS
@pytest.mark.parametrize("build", [Before, After, Returned, Averaged, Counted, Changed])
@pytest.mark.every(6)
def test_other_uses_of_the_buffers_are_right_or_refused(build, start):
    reference = build()
    program = decomposed(reference, start, VECTORS)
    plain = copy.deepcopy(program.module())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bound = cm.bind(program)
    refused = any("decomposed, and its" in str(w.message) for w in caught)
    assert refused is (start or build is Changed)
    same_outputs(plain, bound, VECTORS)
    same_state(plain, bound, 0.0)
    reference.load_state_dict(bound.state_dict())
    if not refused:
        agrees(reference, bound, inputs=[VECTORS], flips=2)
        return
    assert "decomposed, and its" in cm.explain(bound)
    reference.train(start)
    outputs = [m(VECTORS) for m in (reference, bound)]
    for m, y in zip((reference, bound), outputs, strict=True):
        (y[0] if isinstance(y, tuple) else y).square().sum().backward()  # the graph is functional, so it works
        torch.testing.assert_close(m.fc.weight.grad, reference.fc.weight.grad)
    same_state(reference, bound)


def test_a_refused_batch_norm_keeps_its_reason_and_is_bound_twice():
    with pytest.warns(cm.ModeWarning, match=r"its running_mean is also used by mul"):
        bound = cm.bind(decomposed(After(), True, VECTORS))
    graphs = text(bound)
    with pytest.warns(cm.ModeWarning, match=r"its running_mean is also used by mul"):
        cm.bind(bound)
    assert text(bound) == graphs


def test_saved_statistics_that_are_read():
    class Saved(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x):
            bn = self.bn
            stats = (bn.running_mean, bn.running_var)
            y, mean, _, *new = aten._native_batch_norm_legit_functional(x, bn.weight, bn.bias, *stats, True, 0.1, 1e-5)
            for buffer, value in zip(stats, new, strict=True):
                buffer.copy_(value)
            return y, mean

    with pytest.warns(cm.ModeWarning, match="is read, which training IR does not return"):
        bound = cm.bind(decomposed(Saved(), True, VECTORS))
    y, mean = bound(VECTORS)
    torch.testing.assert_close(mean, VECTORS.mean(0))
    y.sum().backward()


def test_instance_norm_is_refused_by_name_and_trains():
    x = torch.randn(3, 4, 5)
    for start in (True, False):
        reference = Norms()
        with pytest.warns(cm.ModeWarning) as caught:
            bound = cm.bind(decomposed(reference, start, x))
        said = [str(w.message) for w in caught if w.category is cm.ModeWarning]
        assert "owner 'instance'): CM720: decomposed, and its running statistics are no buffers" in said[0]
        assert [s.owner for s in cm.sites(bound) if s.bound] == ["tracking"]
        reference.train(start)
        torch.testing.assert_close(bound(x), reference(x))
        bound(x).sum().backward()


def test_shared_modules_of_an_unflattened_module_are_refused_by_name_and_train():
    reference = Twice()
    module = torch.export.unflatten(decomposed(reference, True, VECTORS))
    with pytest.warns(cm.ModeWarning, match="2 sites keep their exported mode"):
        cm.bind(module)
    for _ in range(3):
        results = [m(VECTORS) for m in (reference, module)]
        torch.testing.assert_close(results[1], results[0])
        for y in results:
            y.square().sum().backward()
        torch.testing.assert_close(module.bn.weight.grad, reference.bn.weight.grad)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], tensor)


def test_batch_norm_inside_a_branch_is_refused_by_name():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda y: self.bn(y), lambda y: y * 2, (x,))

    with pytest.warns(cm.ModeWarning, match=r"decomposed"):
        bound = cm.bind(decomposed(Branch(), False, VECTORS))
    assert [site.bound for site in cm.sites(bound)] == [False]


@pytest.mark.every(2)
@pytest.mark.parametrize("lost", [3, 4, "counter", "copy"])
def test_an_update_that_does_not_reach_its_buffer_is_refused(lost):
    module = decomposed(Small(4), True, VECTORS).module()
    copies = [node for node in module.graph.nodes if node.target is aten.copy_.default]
    for node in copies:
        value = node.args[1]
        index = value.args[1] if value.target is operator.getitem else "counter"
        if index == lost or (lost == "copy" and index == 3):
            module.graph.erase_node(node)
            if lost in (3, 4):
                module.graph.erase_node(value)
    module.recompile()
    plain = copy.deepcopy(module)
    with pytest.warns(cm.ModeWarning, match="is not updated by the graph"):
        cm.bind(module)
    same_outputs(plain, module, VECTORS)
    same_state(plain, module, 0.0)


def test_dropouts_erased_from_eval_graphs_are_named():
    with pytest.warns(cm.ModeWarning, match=rf"{ERASED}; .*left nothing behind: block1.drop, block2.drop, drop\)"):
        bound = cm.bind(decomposed(ConvNet(), False, IMAGE))
    assert "left nothing behind: block1.drop" in cm.explain(bound)
    reference = ConvNet().eval()
    reference.load_state_dict(bound.state_dict())
    torch.testing.assert_close(bound(IMAGE), reference(IMAGE))
    with pytest.warns(cm.ModeWarning, match=ERASED):
        cm.bind(decomposed(ConvNet(), False, IMAGE).module())


def test_nothing_is_said_where_nothing_is_lost():
    with warnings.catch_warnings():
        warnings.simplefilter("error", cm.ModeWarning)
        cm.bind(decomposed(ConvNet(), True, IMAGE))
        bound = cm.bind(decomposed(nn.Linear(4, 4), False, VECTORS))
    assert cm.explain(bound) == "no mode-dependent sites"


def test_a_batch_norm_whose_result_is_unused_is_gone_from_an_eval_graph():
    with pytest.warns(cm.ModeWarning, match="bn: its batch norm is not in the graph"):
        bound = cm.bind(decomposed(UnusedNorm(), False, VECTORS))
    assert "bn: its batch norm is not in the graph" in cm.explain(bound)


@pytest.mark.slow
def test_lost_rnn_dropout_is_named():
    with pytest.warns(cm.ModeWarning) as caught:
        cm.bind(decomposed(Recurrent(), True, torch.randn(3, 7, 4)))
    (said,) = (str(w.message) for w in caught if w.category is cm.ModeWarning)
    assert "lstm: torch's decomposition of an RNN drops the dropout" in said
    assert "gru: torch's decomposition" in said


def test_draws_outside_of_dropout_modules_are_named():
    class Draws(nn.Module):
        def forward(self, x):
            return F.dropout(F.dropout2d(x, 0.4, self.training), 0.2, self.training)

    with pytest.warns(cm.ModeWarning, match="random numbers of '' are drawn in both modes"):
        bound = cm.bind(decomposed(Draws(), True, IMAGE))
    assert [site.op.family for site in cm.sites(bound)] == ["dropout"]


class Mine(nn.Dropout2d):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_dropout_module_of_the_users_own_is_named():
    stays = pytest.warns(cm.ModeWarning, match="0: its dropout is decomposed, and stays")
    with pytest.warns(cm.ModeWarning, match="random numbers of '0' are drawn in both modes"), stays:
        cm.bind(decomposed(nn.Sequential(Mine(0.3), nn.BatchNorm2d(3)), True, IMAGE))


@pytest.mark.usefixtures("no_inductor")
def test_the_backend_names_bind_for_an_unbound_one():
    module = decomposed(BatchNorms(), False, torch.randn(3, 4, 5)).module()
    with pytest.warns(cm.ModeWarning, match="with 2 mode-dependent sites is compiled as it was exported"):
        torch.compile(module, backend="pt2e_modes")(torch.randn(3, 4, 5))


def test_set_mode_refuses_what_bind_has_not_put_together():
    module = decomposed(BatchNorms(), True, torch.randn(3, 4, 5)).module()
    report = cm.set_mode(module, False)
    assert [site.owner for site, _ in report.refused] == ["plain", "deep.0"]
    assert all("bind()" in why for _, why in report.refused)
