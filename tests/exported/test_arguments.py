"""Modules with modes take their arguments as the eager model does: by position, by name, and any mix of both."""

import copy
import inspect
import io
import itertools

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import compile_modes as cm
from compile_modes._compat.frames import graphs_compiled

X, Y, Z = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(7))


class Net(nn.Module):
    """Tells its arguments apart, and has the defaults of a typical ``forward``."""

    def __init__(self):
        super().__init__()
        self.bn, self.drop = nn.BatchNorm1d(3, eps=1e-3, momentum=0.03), nn.Dropout(0.2)

    def forward(self, x, y=None, scale=2.0, *, z=None, **more):
        x = self.bn(x) * scale
        x = x if y is None else x + y
        x = x if z is None else x - z
        for value in more.values():
            x = x / value
        return self.drop(x)


class Containers(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def forward(self, named, listed, *rest, flag=True):
        return self.drop(named["a"] - named["b"] + listed[0] / listed[1][0] + sum(rest)), flag


class TwoPrograms(nn.Module):
    """Another structure of outputs in train."""

    def __init__(self):
        super().__init__()
        self.net, self.aux = Net(), nn.Linear(3, 2)

    def forward(self, x, y=None):
        x = self.net(x, y)
        return (x, self.aux(x)) if self.training else x


class Caller(nn.Module):
    """An eager parent that calls its child in some way."""

    def __init__(self, child, call):
        super().__init__()
        self.child, self.call = child, call

    def forward(self, *tensors):
        return self.call(self.child, *tensors)


def bind(model, args, kwargs=None, **options):
    return cm.bind(torch.export.export(copy.deepcopy(model), args, kwargs, **options))


def exported(model, args, kwargs=None, **options):
    return cm.export(copy.deepcopy(model), args, kwargs, **options)


def saved_and_loaded(model, args, kwargs=None, **options):
    file = io.BytesIO()
    cm.save(bind(model, args, kwargs, **options), file)
    file.seek(0)
    return cm.load(file)


def unflattened(model, args, kwargs=None, **options):
    return cm.bind(torch.export.unflatten(torch.export.export(copy.deepcopy(model), args, kwargs, **options)))


def copied(model, args, kwargs=None, **options):
    return copy.deepcopy(copy.deepcopy(bind(model, args, kwargs, **options)))


MAKE = pytest.mark.parametrize("make", [bind, exported, saved_and_loaded, unflattened, copied])


def same(reference, module, *args, **kwargs):
    """One train step and one eval call with these arguments, equal to eager in outputs, gradients and state."""
    for mode in (True, False):
        outputs = []
        for m in (reference, module):
            m.train(mode)
            m.zero_grad()
            torch.manual_seed(3)
            outputs.append(m(*args, **kwargs))
            outputs[-1].square().sum().backward()
        assert torch.equal(*outputs)
        for name, parameter in reference.named_parameters():
            assert torch.equal(parameter.grad, module.get_parameter(name).grad), name
    for name, value in reference.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


@MAKE
def test_arguments_exported_by_position_are_taken_by_name(make):
    reference = Net()
    module = make(reference, (X, Y))
    for args, kwargs in [((X, Y), {}), ((X,), {"y": Y}), ((), {"y": Y, "x": X}), ((X, Y, 2.0), {"z": None})]:
        same(reference, module, *args, **kwargs)
    assert str(inspect.signature(module)) == "(x, y)"


@MAKE
def test_arguments_exported_by_name_are_taken_by_position_where_the_model_takes_them_so(make):
    reference = Net()
    module = make(reference, (), {"z": Z, "y": Y, "x": X})  # in an order that is not that of the model
    for args, kwargs in [((X, Y), {"z": Z}), ((X,), {"z": Z, "y": Y}), ((), {"x": X, "y": Y, "z": Z})]:
        same(reference, module, *args, **kwargs)
    assert str(inspect.signature(module)) == "(x, y, *, z)"
    with pytest.raises(cm.CallError, match=r"'scale', which was at its default, 2\.0"):
        module(X, Y, Z)


def test_without_the_model_what_was_exported_by_name_is_given_by_name(monkeypatch):
    program = torch.export.export(Net(), (X,), {"z": Z, "y": Y})
    monkeypatch.delitem(globals(), "Net")  # as in a process that loads the program
    module = cm.bind(program)
    assert str(inspect.signature(module)) == "(x, *, z, y)"
    assert torch.equal(module.eval()(y=Y, x=X, z=Z), module(X, z=Z, y=Y))
    with pytest.raises(cm.CallError, match="2 arguments were given by position, and at most 1 can be"):
        module(X, Y, z=Z)


class OtherOrder(nn.Module):
    def forward(self, y, x, *, z):
        return x


@pytest.mark.parametrize("other", [nn.Linear, OtherOrder])
def test_a_class_that_is_not_the_one_that_was_exported_says_nothing(other, monkeypatch):
    program = torch.export.export(Net(), (X, Y), {"z": Z})
    monkeypatch.setitem(globals(), "Net", other)
    bound = cm.bind(program)
    assert str(inspect.signature(bound)) == "(x, y, *, z)"
    assert torch.equal(bound.eval()(z=Z, y=Y, x=X), bound(X, Y, z=Z))


@MAKE
@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((X,), {}, "the argument 'y' is missing"),
        ((X, Y), {"y": Y}, "the argument 'y' was given by position and by name"),
        ((X, Y), {"other": Y}, "the program has no argument 'other'"),
        ((X, Y), {"z": Z}, "the program has no argument 'z', which was at its default, None"),
        ((X, Y, 3.0), {}, "the program has no argument 'scale', which was at its default, 2.0"),
        ((X, Y, 2.0, Z), {}, "4 arguments were given by position, and at most 3 can be"),
    ],
)
def test_what_is_said_of_other_arguments(make, args, kwargs, says):
    module = make(Net(), (X, Y))
    state = copy.deepcopy(module.state_dict())
    with pytest.raises(TypeError) as error:
        module(*args, **kwargs)
    assert isinstance(error.value, cm.CallError)
    assert error.value.cause.startswith(says)
    assert error.value.where == "exported as forward(x, y)"
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@MAKE
def test_a_default_that_was_given_on_export_can_be_left_out(make):
    reference = Net()
    module = make(reference, (X, None), {"scale": 2.0, "z": Z})
    for args, kwargs in [((X,), {"z": Z}), ((X, None, 2.0), {"z": Z}), ((), {"z": Z, "x": X, "scale": 2.0})]:
        same(reference, module, *args, **kwargs)
    assert str(inspect.signature(module)) == "(x, y=None, scale=2.0, *, z)"


@pytest.mark.parametrize("make", [bind, exported, saved_and_loaded, copied])
def test_containers_and_variable_arguments(make):
    reference = Containers().eval()
    named, listed = {"a": X, "b": Y}, [Z, (X,)]
    module = make(reference, (named, listed, Y, Z)).eval()
    expected = reference(named, listed, Y, Z)[0]
    for args, kwargs in [
        ((named, listed, Y, Z), {}),
        (({"b": Y, "a": X}, listed, Y), {"rest_1": Z}),
        ((named, listed, Y, Z), {"flag": True}),
    ]:
        assert torch.equal(module(*args, **kwargs)[0], expected)
    assert str(inspect.signature(module)) == "(named, listed, rest_0, rest_1)"
    by_name = make(reference, (), {"listed": listed, "named": named}).eval()
    assert torch.equal(by_name(named, listed)[0], reference(named, listed)[0])


@pytest.mark.parametrize("make", [bind, exported, saved_and_loaded])
def test_inputs_are_checked_however_they_are_given(make):
    size = torch.export.Dim("size", min=2, max=5)
    module = make(Net(), (X, Y), dynamic_shapes=({0: size}, {0: size}))
    reference = Net()
    reference.load_state_dict(module.state_dict())
    for rows in (2, 4):
        same(reference, module, X[:rows], y=Y[:rows])
    for wrong in (torch.randn(6, 3), torch.randn(4, 2)):
        with pytest.raises(AssertionError, match="Guard failed"):
            module(wrong, y=wrong)
        with pytest.raises(AssertionError, match="Guard failed"):
            module(wrong, wrong)
    for structure in ([X], {"x": X}):
        with pytest.raises(ValueError, match="exported input tree spec"):
            module(y=Y, x=structure)


def test_an_unbound_program_still_refuses_names_and_a_bound_one_keeps_what_bake_leaves():
    module = torch.export.export(Net().eval(), (X, Y)).module()
    with pytest.raises(ValueError, match="keyword mismatch"):
        module(X, y=Y)
    baked = cm.bake(cm.bind(module))
    assert torch.equal(baked(X, y=Y), baked(X, Y))
    assert cm.bind(baked) is baked
    assert torch.equal(baked(X, y=Y), baked(X, Y))


CALLS = [
    lambda m, x, y: m(x, y),
    lambda m, x, y: m(x, y=y),
    lambda m, x, y: m(y=y, x=x),
    lambda m, x, y: m(x, y, z=None),
]


@pytest.mark.parametrize("make", [bind, exported, copied])
@pytest.mark.parametrize("way", ["compiled", "in place", "nested"])
@pytest.mark.every(4)
def test_compiled_modules_take_names_at_no_cost_in_graphs(make, way):
    reference = Net()
    module = make(reference, (X, Y))
    before = graphs_compiled()
    if way == "in place":
        module.compile(backend="eager", fullgraph=True)
        calls = [lambda *a, f=f: f(module, *a) for f in CALLS]
    elif way == "compiled":
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        calls = [lambda *a, f=f: f(compiled, *a) for f in CALLS]
    else:
        calls = [torch.compile(Caller(module, f), backend="eager", fullgraph=True) for f in CALLS]
    for _, mode in itertools.product(range(2), (True, False)):
        for call in calls:
            outputs = []
            for m, c in ((reference, reference), (module, call)):
                m.train(mode)
                torch.manual_seed(5)
                outputs.append(c(X, Y))
            assert torch.equal(*outputs)
    assert graphs_compiled() - before == (2 * len(CALLS) if way == "nested" else 2)


def test_two_programs_take_names_and_say_them():
    module = exported(TwoPrograms(), (X,), {"y": Y})
    assert type(module).__name__ == "DualModule"
    for m in (module, copy.deepcopy(module), torch.compile(module, backend="eager", fullgraph=True)):
        reference = TwoPrograms()
        reference.load_state_dict(getattr(m, "_orig_mod", m).state_dict())
        for mode, args in itertools.product((True, False), ((X, Y), ())):
            outputs = []
            for f in (reference.train(mode), m.train(mode)):
                torch.manual_seed(1)
                outputs.append(f(*args) if args else f(y=Y, x=X))
            torch.testing.assert_close(*outputs, rtol=0, atol=0)
        assert str(inspect.signature(m)) == "(x, y)"
    assert str(inspect.signature(module.forward)) == "(x, y)"
    with pytest.raises(cm.CallError, match="'y' was given by position and by name"):
        module(X, Y, y=Y)


@pytest.mark.parametrize(("make", "strict"), [(bind, False), (copied, False), (bind, True)])
@pytest.mark.parametrize("program", [((X, Y), {}), ((), {"y": Y, "x": X})])
@pytest.mark.parametrize("call", [((X, Y), {}), ((X,), {"y": Y}), ((), {"x": X, "y": Y}), ((), {"y": Y, "x": X})])
@pytest.mark.every(5)
def test_programs_of_bound_modules_are_right_in_any_order(make, program, call, strict):
    """torch's export of a GraphModule runs it with keywords in the order given, by other names than the graph's."""
    model = Net().eval()
    module = make(model, *program)
    module.eval()
    if not strict and program[1].keys() == {"x", "y"} and call[0]:
        with pytest.raises(cm.CallError, match=r"torch.export can't take by position what was exported by name"):
            torch.export.export(module, *call)
        return
    again = torch.export.export(module, *call, strict=strict)
    assert torch.equal(again.module()(*call[0], **call[1]), model(X, Y))
    assert torch.equal(cm.bind(again)(y=Y, x=X), model(X, Y))


@pytest.mark.parametrize("make", [bind, exported])
def test_a_program_of_a_bound_module_refuses_other_arguments(make):
    module = make(Net(), (X, Y))
    for args, kwargs in [((X, Y), {"other": Y}), ((X,), {"other": Y}), ((X, Y), {"y": Y})]:
        with pytest.raises(TypeError):
            torch.export.export(module, args, kwargs)
    with pytest.raises(ValueError, match="exported input tree spec"):
        torch.export.export(module, ([X],), {"y": Y})


def test_other_tracers_see_what_they_saw():
    model = Net().eval()
    module = bind(model, (X, Y)).eval()
    traces = [fx.symbolic_trace(module), make_fx(lambda x, y: module(x, y))(X, Y)]
    traces += [make_fx(lambda x, y: module(y=y, x=x))(X, Y), make_fx(fx.Interpreter(module).run)(X, Y)]
    for traced in traces:
        assert torch.equal(traced(X, Y), model(X, Y))


def test_names_of_functional_calls():
    module = bind(Net(), (X, Y)).eval()
    weights = {name: value + 1 for name, value in module.named_parameters()}
    by_position = torch.func.functional_call(module, weights, (X, Y))
    assert torch.equal(torch.func.functional_call(module, weights, (X,), {"y": Y}), by_position)
    assert not torch.equal(module(X, Y), by_position)


def test_a_graph_that_knows_no_names_is_left_alone():
    traced = fx.symbolic_trace(nn.Linear(2, 2))
    hooks = len(traced._forward_pre_hooks)
    assert cm.bind(traced) is traced
    assert len(traced._forward_pre_hooks) == hooks
    assert "__signature__" not in vars(traced)


def test_binding_again_generates_no_code_again():
    module = bind(Net(), (X, Y))
    generated = type(module).forward
    assert cm.bind(module) is module
    assert type(module).forward is generated
