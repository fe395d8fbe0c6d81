"""diff(): what two programs differ in is found, told, and nothing else; each difference is one that was made here."""

import copy
import json
import math

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import compile_modes as cm
from compile_modes.exported.differing import weights
from nets import IMAGE, TOKENS, VECTORS, Attention, Auxiliary, ConvNet, EveryFlag, HardCoded, Recurrent, Regions, Small

pytestmark = pytest.mark.filterwarnings("ignore::compile_modes.ModeWarning")
MODELS = [
    (ConvNet, IMAGE),
    (Attention, TOKENS),
    (HardCoded, VECTORS),
    (Recurrent, torch.randn(3, 7, 4)),
    (Regions, IMAGE),
]


def exported(model, *args, training=True):
    return torch.export.export(model.train(training), args)


def changes(report):
    return {site.owner: dict(site.changes) for site in report.sites}


@pytest.mark.every(2)
@pytest.mark.parametrize(("kind", "x"), MODELS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_program_does_not_differ_from_itself_or_its_module(kind, x):
    program = exported(kind(), x)
    for other in (program, program.module(), copy.deepcopy(program)):
        report = cm.diff(program, other)
        assert not report, str(report)
        assert report.compared["sites"] == len(cm.sites(program))
        assert report.compared["weights"] >= len(program.state_dict)
    assert "nothing differs" in str(report)


@pytest.mark.every(2)
@pytest.mark.parametrize(("kind", "x"), MODELS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_other_mode_differs_in_modes_alone(kind, x):
    model = kind()
    module = cm.bind(exported(model, x))
    other = copy.deepcopy(module).eval()
    report = cm.diff(module, other)
    flags = {site.owner for site in cm.sites(module) if site.bound}
    assert {site.owner for site in report.sites} == flags
    assert all(dict(site.changes) == {"mode": ("train", "eval")} for site in report.sites if site.owner)
    assert not report.weights


def test_binding_shows_as_flags_in_the_place_of_literals():
    program = exported(Small(4), VECTORS)
    report = cm.diff(program, cm.bind(program))
    assert changes(report) == {"bn": {"held by": ("literal", "flag")}, "drop": {"held by": ("literal", "flag")}}


def test_each_difference_is_told_as_text():
    program = exported(Small(4), VECTORS)
    module, other = program.module(), copy.deepcopy(program).module()
    with torch.no_grad():
        other.bn.weight[1] += 0.5
        other.bn.bias[0] = math.nan
    other.bn.running_mean = other.bn.running_mean.double()
    other.register_buffer("more", torch.zeros(2))
    for site in cm.sites(other):
        site.node.args = tuple({0.25: 0.5, 1e-3: 1e-5}.get(a, a) if isinstance(a, float) else a for a in site.node.args)
    cm.set_mode(other, None, overrides={"bn": "eval"})
    report = cm.diff(module, other)
    assert_expected_inline(
        str(report),
        """\
GraphModule -> GraphModule
2 pairs of sites and 5 of weights: 2 sites changed, 3 weights changed, 1 weight added

sites    op                       owner  what differs
changed  aten.batch_norm.default  bn     mode: train -> eval, eps: 0.001 -> 1e-05
changed  aten.dropout.default     drop   p: 0.25 -> 0.5

weights  name             what differs
changed  bn.weight        off by up to 0.5 in 1 element
changed  bn.bias          off by up to inf in 1 element
changed  bn.running_mean  float32 [4] on cpu -> float64 [4] on cpu
added    more             float32 [2] on cpu""",
    )
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["differ"] is True
    assert data["counts"] == {
        "sites": {"changed": 2, "lost": 0, "added": 0},
        "weights": {"changed": 3, "lost": 0, "added": 1},
    }
    assert data["sites"][0]["changes"] == {"mode": ["train", "eval"], "eps": [0.001, 1e-05]}
    assert [weight["largest"] for weight in data["weights"]] == [0.5, "inf", 0.0, None]
    backwards = cm.diff(other, module)
    assert [weight.what for weight in backwards.weights] == ["changed", "changed", "lost", "changed"]
    assert changes(backwards)["drop"] == {"p": (0.5, 0.25)}


class Two(nn.Module):
    """Two dropouts in one module, or one of them, and one in another module."""

    def __init__(self, *ps):
        super().__init__()
        self.ps, self.drop = ps, nn.Dropout(0.3)

    def forward(self, x):
        for p in self.ps:
            x = torch.relu(nn.functional.dropout(x, p, self.training))
        return self.drop(x)


@pytest.mark.parametrize(
    ("before", "after", "lost", "added", "changed"),
    [
        ((0.1, 0.2, 0.4), (0.1, 0.4), [0.2], [], []),
        ((0.2, 0.4), (0.1, 0.2, 0.4), [], [0.1], []),
        ((0.1, 0.2), (0.1, 0.5), [], [], [(0.2, 0.5)]),
        ((0.1,) * 4, (0.1,) * 2, [0.1, 0.1], [], []),
        ((), (0.1,), [], [0.1], []),
    ],
)
def test_sites_of_one_owner_are_paired_by_what_they_are(before, after, lost, added, changed):
    report = cm.diff(exported(Two(*before), VECTORS), exported(Two(*after), VECTORS))
    by_what = {what: [s for s in report.sites if s.what == what] for what in ("lost", "added", "changed")}
    assert [s.changes["p"] for s in by_what["lost"]] == [(p, None) for p in lost]
    assert [s.changes["p"] for s in by_what["added"]] == [(None, p) for p in added]
    assert [s.changes["p"] for s in by_what["changed"]] == changed
    assert bool(report) is bool(lost or added or changed)


def test_sites_that_a_tool_has_put_elsewhere_are_paired():
    module, other = (exported(Small(4), VECTORS).module() for _ in range(2))
    other.load_state_dict(module.state_dict())
    for site in cm.sites(other):
        site.node.meta.pop("nn_module_stack")
    report = cm.diff(module, other)  # a norm is known by its statistics
    assert [(s.op, dict(s.changes)) for s in report.sites if "dropout" in s.op] == [
        ("aten.dropout.default", {"owner": ("drop", "")})
    ]
    assert all(site.what == "changed" for site in report.sites)


def test_what_tools_replace_is_seen():
    pytest.importorskip("torchao.quantization.pt2e")
    from torchao.quantization.pt2e import move_exported_model_to_eval

    module = exported(Small(4), VECTORS).module()
    before = copy.deepcopy(module)
    move_exported_model_to_eval(module)
    told = changes(cm.diff(before, module))
    assert any("eps" in found for found in told.values())
    assert all(found.get("mode") == ("train", "eval") for found in told.values())


@pytest.mark.slow
def test_modules_with_two_programs_are_compared_program_by_program():
    model = Auxiliary()
    both, other = cm.export(model, (IMAGE,)), cm.export(copy.deepcopy(model), (IMAGE,))
    assert not cm.diff(both, other)
    owner = next(site.owner for site in cm.sites(other) if site.bound)
    other.get_submodule(owner).eval()
    report = cm.diff(both, other)
    assert {site.program for site in report.sites} <= {"train", "eval"}
    assert "program" in str(report)
    single = exported(model, IMAGE)
    report = cm.diff(single, both)
    assert "the second has two programs" in report.programs
    assert not [site for site in report.sites if site.what != "changed"]
    assert cm.diff(single, both.eval())
    both.train()


def test_modes_that_are_computed_or_none_at_all_are_compared():
    model = EveryFlag()
    a, b = cm.export(model, (VECTORS,)), cm.export(model, (VECTORS,))
    assert not cm.diff(a, b)
    told = [dict(site.changes) for site in cm.diff(a, copy.deepcopy(b).eval()).sites]
    assert {"mode": ("eval", "train")} in told  # an inverted flag
    assert {"mode": ("train", "eval")} in told
    assert len(told) < len(cm.sites(a))  # for some are hard-coded
    program = exported(ConvNet(), IMAGE)
    assert not cm.diff(torch.export.unflatten(program), torch.export.unflatten(program))
    (lost,) = cm.diff(program, torch.export.unflatten(program)).sites  # two calls of one module have one graph there
    assert (lost.what, lost.owner, lost.changes["p"]) == ("lost", "drop", (0.1, None))
    compiled = torch.compile(a, backend="eager")
    assert not cm.diff(compiled, b)


def test_nothing_is_changed_by_comparing():
    program, module = exported(Small(4), VECTORS), cm.bind(exported(Small(4), VECTORS))
    codes = module.code, program.graph_module.code
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes = [m.training for m in module.modules()]
    cm.diff(program, module)
    assert (module.code, program.graph_module.code) == codes
    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        (nn.Linear(2, 2), "Linear", "compile_modes.verify"),
        (torch.compile(nn.Linear(2, 2)), "Linear", "export both models"),
        ("a.pt2", "str", "compile-modes diff"),
        (3, "int", "modules with a graph"),
    ],
)
def test_what_holds_no_graph_is_refused(given, kind, says):
    program = exported(Small(4), VECTORS)
    for pair, where in (((given, program), "the first argument"), ((program, given), "the second argument")):
        with pytest.raises(cm.BindError, match=f"CM916: {kind} holds no graph") as error:
            cm.diff(*pair)
        assert error.value.where == where
        assert says in error.value.remedy


TENSORS = {
    "same": (torch.tensor([1.0, math.nan, math.inf]), torch.tensor([1.0, math.nan, math.inf]), None),
    "zeros": (torch.tensor([0.0]), torch.tensor([-0.0]), None),
    "infinity": (torch.tensor([math.inf]), torch.tensor([-math.inf]), (math.inf, 1)),
    "large integers": (torch.tensor([2**53]), torch.tensor([2**53 + 1]), (1.0, 1)),
    "bytes": (torch.tensor([3, 250], dtype=torch.uint8), torch.tensor([250, 3], dtype=torch.uint8), (247.0, 2)),
    "truth": (torch.tensor([True, False]), torch.tensor([True, True]), (1.0, 1)),
    "complex": (torch.tensor([1 + 1j]), torch.tensor([1 - 1j]), (2.0, 1)),
    "half": (torch.ones(3, dtype=torch.bfloat16), torch.full((3,), 1.5, dtype=torch.bfloat16), (0.5, 3)),
    "strides": (torch.arange(6.0).reshape(2, 3).t(), torch.arange(6.0).reshape(2, 3).t().contiguous(), None),
    "empty": (torch.empty(0), torch.empty(0), None),
    "scalar": (torch.tensor(1.0), torch.tensor(2.0), (1.0, 1)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_values_are_compared_bit_for_bit_but_for_nans_and_zeros(name, monkeypatch):
    a, b, expected = TENSORS[name]
    for piece in (weights._PIECE, 1):
        monkeypatch.setattr(weights, "_PIECE", piece)
        found, left_out, pairs = weights.differing({"w": a}, {"w": b})
        assert (left_out, pairs) == ({}, 1)
        assert [(w.largest, w.elements) for w in found] == ([expected] if expected else [])


def test_kinds_that_differ_are_told_with_their_values():
    (found,), _, _ = weights.differing({"w": torch.ones(2)}, {"w": torch.tensor([1.0, 3.0]).double()})
    assert found.text == "float32 [2] on cpu -> float64 [2] on cpu, off by up to 2 in 1 element"
    (found,), _, _ = weights.differing({"w": torch.ones(2)}, {"w": torch.ones(3)})
    assert (found.text, found.largest, found.elements) == ("float32 [2] on cpu -> float32 [3] on cpu", None, None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        nn.UninitializedParameter,
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ],
    ids=["sparse", "lazy", "nested"],
)
def test_what_cannot_be_compared_is_left_out_by_name(make):
    tensor = make()
    found, left_out, pairs = weights.differing({"w": tensor}, {"w": make()})
    assert (found, pairs) == ([], 1)
    assert left_out["w"].startswith("RuntimeError: ")
    ((lost,), _, _), ((added,), _, _) = weights.differing({"w": tensor}, {}), weights.differing({}, {"w": tensor})
    assert (lost.what, added.what) == ("lost", "added")


def test_what_has_no_values_is_left_out_by_name():
    found, left_out, _ = weights.differing({"w": torch.ones(2, device="meta")}, {"w": torch.zeros(2, device="meta")})
    assert (found, left_out) == ([], {"w": "ValueError: it has no values"})
    report = cm.DiffReport(("a", "b"), (), (), "", {"sites": 0, "weights": 1}, left_out)
    assert not report
    assert "not compared: w: ValueError" in str(report)
