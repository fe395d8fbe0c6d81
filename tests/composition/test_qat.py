"""torchao's PT2E quantization-aware training, compiled, with flips and frozen batch norm, beside the standard flow."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import compile_modes as cm
from composition.models import Block, X
from graphs import graphs_compiled
from oracle import agrees, same_outputs, same_state
from setups import compile_

pt2e = pytest.importorskip("torchao.quantization.pt2e")
quantize = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
BATCH_NORM = torch.ops.aten.batch_norm.default
# On torch 2.11, this quantizer finds nothing to quantize.
quantizes = pytest.mark.skipif(torch.__version__ < "2.12", reason="the quantizer annotates nothing on torch 2.11")


class Net(nn.Module):
    """One block behind a layer, which gets its gradient through the pattern that torchao makes of the block."""

    def __init__(self):
        super().__init__()
        self.first, self.block, self.fc = nn.Conv2d(3, 3, 1), Block(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return F.dropout(self.fc(self.block(self.first(x)).mean((2, 3))), 0.15, self.training)


def prepare(model):
    """The prepared module, and the program that it was made from."""
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    program = torch.export.export(model, (X,))
    return quantize.prepare_qat_pt2e(program.module(), quantizer), program


def standard_with_right_literals(model):
    """The standard flow, with what torchao writes over put right by hand."""
    prepared, _ = prepare(model)
    for node in prepared.graph.nodes:
        if node.target is BATCH_NORM:
            assert node.args[6:8] == (0.1, 1e-5), "torchao keeps literals now: restore_literals() has become needless"
            node.args = (*node.args[:6], 0.2, 1e-2, *node.args[8:])
        elif node.target is torch.ops.aten.add.Tensor and node.args[1] == 1e-5:
            node.args = (node.args[0], 1e-2)
    prepared.recompile()
    return prepared


def freeze_by_hand(prepared):
    """What torchao's tutorials do."""
    for node in prepared.graph.nodes:
        if node.target is BATCH_NORM:
            node.args = (*node.args[:5], False, *node.args[6:])
    prepared.recompile()


def train(call, optimizer, seeds):
    for seed in seeds:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        call(X).square().mean().backward()
        optimizer.step()


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.05)


def flow(compiled, bound, standard):
    """Trains both: ours compiled, and evaluated in between; the standard one eagerly, for flips would spoil it."""
    optimizers = [sgd(standard), sgd(bound)]
    for call, optimizer in zip((standard, bound), optimizers, strict=True):
        train(call, optimizer, [0])  # in eager mode: the first call gives the observers' state its size
    for seeds, frozen in ((range(1, 3), False), (range(3, 5), True)):
        if frozen:
            freeze_by_hand(standard)
            bound.block.bn.eval()
        train(standard, optimizers[0], seeds)
        train(compiled, optimizers[1], seeds)
        modes = [module.training for module in bound.modules()]
        bound.apply(pt2e.disable_observer).eval()
        before = copy.deepcopy(bound.state_dict())
        assert torch.equal(compiled(X), compiled(X))
        assert all(torch.equal(v, before[k]) for k, v in bound.state_dict().items())
        bound.apply(pt2e.enable_observer)
        for module, mode in zip(bound.modules(), modes, strict=True):
            module.training = mode


def prepared_pair():
    model = Net()
    bound, program = prepare(copy.deepcopy(model))
    cm.restore_literals(cm.bind(bound), program)
    return standard_with_right_literals(model), bound


def check_state(standard, bound, tolerance):
    for module in (standard, bound):
        counter = module.get_submodule("block.bn").num_batches_tracked
        assert counter == (5 if module is standard else 3)  # the tutorial's way of freezing leaves it counting
        counter.zero_()
    same_state(standard, bound, tolerance)


@quantizes
@pytest.mark.slow
def test_compiled_training_with_flips_and_freezing_equals_the_standard_flow(no_inductor):
    standard, bound = prepared_pair()
    graphs = graphs_compiled()
    flow(compile_(bound), bound, standard)
    assert graphs_compiled() - graphs == 3  # train, eval, train with batch norms frozen
    check_state(standard, bound, 1e-5)


@quantizes
@pytest.mark.slow
def test_through_inductor_it_converts_to_what_the_standard_flow_gives():
    standard, bound = prepared_pair()
    flow(compile_(bound), bound, standard)
    check_state(standard, bound, 1e-4)
    expected, found = quantize.convert_pt2e(standard), quantize.convert_pt2e(cm.bake(bound))
    targets = [[str(node.target) for node in module.graph.nodes] for module in (expected, found)]
    assert targets[0] == targets[1]
    assert sum("dequantize" in target for target in targets[0]) > 3
    outputs = [cm.move_exported_model_to_eval(module)(X) for module in (expected, found)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_restored_literals_make_a_prepared_module_train_as_the_eager_model(no_inductor):
    """With fake quantization off, eager PyTorch on the original module is the oracle."""
    reference = Net()
    prepared, program = prepare(copy.deepcopy(reference))
    changed = cm.restore_literals(cm.bind(prepared), program)
    assert changed == ["block.bn: momentum 0.1 -> 0.2", "block.bn: eps 1e-05 -> 0.01"]
    assert cm.restore_literals(prepared, program) == []
    prepared.apply(pt2e.disable_fake_quant).apply(pt2e.disable_observer)
    prepared(X)  # sizes the observers' state
    prepared.get_submodule("block.bn").load_state_dict(reference.block.bn.state_dict())
    compiled = compile_(prepared)
    optimizers = [sgd(reference), sgd(prepared)]
    for mode, frozen in ((True, False), (False, False), (True, True)):
        for m, call, optimizer in zip((reference, prepared), (reference, compiled), optimizers, strict=True):
            m.train(mode)
            if frozen:
                m.block.bn.eval()
            if mode:
                train(call, optimizer, range(2))
        same_outputs(reference, compiled, X, seeds=1, tolerance=1e-4)
        ours = prepared.state_dict()
        for name, tensor in reference.state_dict().items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


def test_restored_literals_after_torchao_has_flipped_a_module():
    reference = Net()
    program = torch.export.export(copy.deepcopy(reference), (X,))
    flipped = program.module()
    pt2e.move_exported_model_to_eval(flipped)
    pt2e.move_exported_model_to_train(flipped)
    changed = cm.restore_literals(flipped, program)
    assert {"block.bn: momentum 0.1 -> 0.2", "(root): p 0.5 -> 0.15"} <= set(changed)
    same_outputs(reference, flipped, X, seeds=2, tolerance=1e-5)


def test_literals_of_another_program_are_refused():
    module = torch.export.export(Net(), (X,)).module()
    other = torch.export.export(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), (X,))
    with pytest.raises(cm.BindError, match="no site of the module is in the program"):
        cm.restore_literals(module, other)
    with pytest.raises(cm.BindError, match="can't be edited in place"):
        cm.restore_literals(other, other)


def test_bound_unprepared_modules_keep_what_they_have():
    reference = Net()
    program = torch.export.export(copy.deepcopy(reference), (X,))
    module = cm.bind(program)
    assert cm.restore_literals(module, program) == []
    agrees(reference, module, inputs=[X], flips=1)
