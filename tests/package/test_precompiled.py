"""Code that is compiled ahead and put around a module; compiled by Inductor, for its bytes are what it is about."""

import contextlib
import copy
import inspect
import itertools
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import compile_modes as cm
from compile_modes._compat import bundling
from package.precompiled_net import Net, pictures

pytestmark = pytest.mark.skipif(bool(bundling.missing()), reason=bundling.missing())
HERE = Path(__file__).parent
MODES = {"train": "train", "eval": "eval", "mc": {"drop": "train", "*": "eval"}}
SIZES = ({0: torch.export.Dim("batch", min=2, max=64)},)


@pytest.fixture(autouse=True)
def as_eager():
    with torch._inductor.config.patch(fallback_random=True):
        yield


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def make():
    torch.manual_seed(0)
    model = Net()
    return cm.precompile(model, (pictures(4),), modes=MODES, dynamic_shapes=SIZES)


GRAPHS = {}  # of programs, in place of code


def bundled(program, gradients, options):
    name = f"the graph with the number {len(GRAPHS)}".encode()
    GRAPHS[name] = program.graph_module
    return name, []


@contextlib.contextmanager
def faked():
    """Has graphs in place of code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundling, "own_cache", lambda: contextlib.nullcontext(dict))
        patch.setattr(bundling, "bundled", bundled)
        patch.setattr(bundling, "opened", GRAPHS.__getitem__)
        yield


@pytest.fixture(scope="module")
def made():
    with faked():
        return make()


@pytest.fixture(scope="module")
def compiled():
    with torch._inductor.config.patch(fallback_random=True):
        torch.compile(torch.sin)(torch.ones(9))  # Inductor notes in another cache what this machine can run
        return make()


@pytest.fixture
def ours(made):
    return copy.deepcopy(made)


def steps(ours, model):
    """Flips, steps and evaluations side by side; nothing is compiled."""
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (ours, model)]
    compiled = counters["inductor"].copy()
    for step in range(4):
        x = pictures(4 + 9 * step, step)
        found = []
        for module, optimizer in zip((ours, model), optimizers, strict=True):
            module.train()
            optimizer.zero_grad()
            torch.manual_seed(step)
            out = module(x)
            out["scores"].square().mean().backward()
            optimizer.step()
            module.eval()
            with torch.no_grad():
                evaluated = module(x)
                module.drop.train()
                torch.manual_seed(step)
                sampled = module(x)
            found.append([out["scores"], out["pair"], evaluated["scores"], sampled["scores"]])
        close(*found)
        close(*([p.grad for p in m.parameters()] for m in (ours, model)))
        close(*(list(m.buffers()) for m in (ours, model)))
    assert counters["inductor"] == compiled


@pytest.mark.parametrize("kind", ["made", pytest.param("compiled", marks=pytest.mark.slow)])
def test_steps_and_flips_equal_eager(kind, request):
    ours = copy.deepcopy(request.getfixturevalue(kind))
    model = copy.deepcopy(ours._orig_mod)
    steps(ours, model)
    assert model.norm.num_batches_tracked == 4


def test_the_module_stays_inside(ours):
    model = ours._orig_mod
    assert ours.norm is model.norm
    assert [id(p) for p in ours.parameters()] == [id(p) for p in model.parameters()]
    ours.eval()
    assert not model.drop.training
    ours.mode("mc")
    assert (ours.training, ours.norm.training, ours.drop.training) == (False, False, True)
    assert isinstance(ours, cm.Precompiled)
    assert str(inspect.signature(ours.forward)) == "(image)"


def test_flags_that_were_not_compiled_are_refused_by_name(ours):
    ours.eval().norm.train()
    with pytest.raises(cm.PackageError, match=r"CM041.*norm in train.*\n.*'train', 'eval', 'mc'"):
        ours(pictures(4))
    with pytest.raises(cm.PackageError, match=r"CM040.*'deploy'"):
        ours.mode("deploy")


def test_eval_has_no_backward_and_says_so(ours):
    with pytest.raises(cm.PackageError, match=r"CM063.*'eval'"):
        ours.eval()(pictures(4))
    ours._orig_mod.requires_grad_(False)
    assert not ours(pictures(4))["scores"].requires_grad
    with pytest.raises(cm.CallError, match=r"CM045[\s\S]*image"):
        ours.train()(pictures(4).requires_grad_())


def appended(model):
    model.more = nn.ReLU()


def bias_added(model):
    model.again.bias = nn.Parameter(torch.ones(3))


def another_function(model):
    model.act = torch.sigmoid


def another_entry(model):
    model.config["scale"] = 7.0


def another_forward(model):
    model.head.forward = lambda x: x


def another_class(model):
    model.norm.__class__ = type("Norm", (nn.BatchNorm2d,), {})


def another_hook(model):
    model.hook.remove()
    model.head.register_forward_hook(lambda module, args, out: out * 2)


def another_type(model):
    model.drop.p = 1


def a_tensor_for_a_number(model):
    model.drop.p = torch.tensor([0.5, 0.5])


def retied(model):
    weight = torch.randn(3, 6)
    state = {**model.state_dict(), "head.weight": weight, "again.weight": weight}
    model.load_state_dict(state, assign=True)


def newly_tied(model):
    model.norm.running_var = model.norm.running_mean


def another_tensor_in_a_list(model):
    model.listed[0] = torch.zeros(3)


def drop_p(model):
    model.drop.p = 0.9


def a_hook(model):
    model.norm.register_forward_hook(lambda *_: None)


def another_submodule(model):
    model.norm = nn.BatchNorm2d(6)


def another_dtype(model):
    model.double()


def without_a_weight(model):
    model.norm._parameters["weight"] = None


def untied(model):
    model.again.weight = nn.Parameter(model.head.weight.detach().clone())


def woken(model):
    model.frozen.requires_grad_()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (appended, "CM073.*modules"), (bias_added, "CM073.*parameters"), (another_function, "CM064"),
        (another_entry, "CM064"), (another_forward, "CM073.*forward"), (another_class, "CM073.*class"),
        (another_hook, "CM065"), (another_type, "CM064"), (a_tensor_for_a_number, "CM064"), (retied, "CM047"),
        (newly_tied, "CM075"), (another_tensor_in_a_list, "CM064"),
        (drop_p, "CM064.*0.9"), (a_hook, "CM065"), (another_submodule, "CM052"), (another_dtype, "CM046"),
        (without_a_weight, "CM073.*parameters"), (untied, "CM047"), (woken, "CM048"),
    ],
)  # fmt: skip
def test_what_makes_code_stale_is_refused(change, code, ours):
    ours.train()
    change(ours._orig_mod)
    with pytest.raises(cm.PackageError, match=code):
        ours(pictures(4))


def test_weights_may_be_others(ours):
    model = Net()
    ours._orig_mod.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    ours._orig_mod.again.weight = ours._orig_mod.head.weight
    ours._orig_mod.scale = torch.tensor([3.0, 1.0, 1.0])  # neither parameter nor buffer
    model.scale = ours._orig_mod.scale
    x = pictures(5)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x)["scores"], model.eval()(x)["scores"])


def test_attributes_are_those_of_the_module_inside(ours):
    ours.note = 3
    assert ours._orig_mod.note == 3
    del ours.note
    assert not hasattr(ours, "note")
    ours.training = False
    assert not ours._orig_mod.training
    ours.register_forward_hook(lambda module, args, out: "hooked")
    with torch.no_grad():
        assert copy.deepcopy(ours.eval())(pictures(4)) == "hooked"
        with pytest.raises(cm.PackageError, match="CM074"), torch.inference_mode():
            ours.train()(pictures(4))
    assert not ours.norm.num_batches_tracked


class Named(nn.Linear):
    def forward(self, x, a=None, b=None):
        return super().forward(x) + a - 2 * b


def test_what_goes_by_name_does_not_go_by_position():
    model, (x, a, b) = Named(3, 3), torch.randn(3, 2, 3)
    with faked():
        ours = cm.precompile(model, (x,), {"b": b, "a": a}, modes=["eval"])
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x, a=a, b=b), model(x, a, b))
        for args, kwargs in [((x, a, b), {}), ((x, a), {"b": b}), ((x,), {"a": a})]:
            with pytest.raises(cm.CallError, match=r"CM042.*by position"):
                ours(*args, **kwargs)


def test_calls_and_surroundings_that_are_others_are_refused(ours):
    ours.eval()
    with torch.no_grad():
        for args, kwargs, code in [
            ((), {}, "CM042"), ((pictures(4), 1), {}, "CM042"), ((), {"picture": pictures(4)}, "CM042"),
            ((pictures(4).double(),), {}, "CM043"), ((pictures(1),), {}, "CM044"), ((pictures(65),), {}, "CM044"),
        ]:  # fmt: skip
            with pytest.raises(cm.CallError, match=code):
                ours(*args, **kwargs)
        ours(image=pictures(4).transpose(2, 3))
        with pytest.raises(cm.PackageError, match=r"CM066.*autocast is torch.bfloat16"), torch.autocast("cpu"):
            ours(pictures(4))


def test_bad_requests_change_nothing():
    model = Net()
    model.drop.eval()
    before = [m.training for m in model.modules()]
    with pytest.raises(cm.OptionError, match=r"CM061.*'mc'"):
        cm.precompile(model, (pictures(4),), gradients=("mc",))
    model.norm.register_full_backward_hook(lambda *_: None)
    with pytest.raises(cm.PackageError, match=r"CM062.*norm"):
        cm.precompile(model, (pictures(4),))
    assert [m.training for m in model.modules()] == before


def test_a_torch_without_bundles_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(bundling, "missing", lambda: "something")
    for call in (lambda: cm.precompile(Net(), (pictures(4),)), lambda: cm.load_precompiled(tmp_path / "x", Net())):
        with pytest.raises(cm.PackageError, match=r"CM060.*something"):
            call()


@pytest.fixture
def file(made, tmp_path):
    made.save(tmp_path / "net.code")
    with faked():
        yield tmp_path / "net.code"


@pytest.mark.slow
def test_another_process_compiles_nothing(compiled, tmp_path):
    """It has an empty cache."""
    torch.manual_seed(1)
    torch.save(Net().state_dict(), tmp_path / "weights")
    file = tmp_path / "code"
    compiled.save(file)
    code = [sys.executable, str(HERE / "precompiled_worker.py"), str(file), str(tmp_path)]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing was compiled" in done.stdout


def test_another_module_is_refused(file):
    class Other(Net):
        pass

    for model, said in [
        (Net(p=0.1), "p of 'drop' is 0.1, and was 0.5"), (Other(), "the root is a .*Other, and was a Net"),
        (nn.Sequential(Net()), "the root is a Sequential"), (cm.export(Net(), (pictures(4),)), "the root is a "),
    ]:  # fmt: skip
        with pytest.raises(cm.PackageError, match=f"CM067.*{said}"):
            cm.load_precompiled(file, model)
    wide = Net()
    wide.scale = torch.ones(4)
    with pytest.raises(cm.PackageError, match=r"CM046[\s\S]*scale"):
        cm.load_precompiled(file, wide)
    del wide.scale
    with pytest.raises(cm.PackageError, match=r"CM067.*scale"):
        cm.load_precompiled(file, wide)


def test_files_are_told_apart_and_damage_is_found(file, tmp_path, made):
    for read in (cm.load, cm.load_package):
        with pytest.raises(cm.ArchiveError, match="CM072"):
            read(file)
    cm.save(cm.export(nn.Linear(2, 2), (torch.ones(2, 2),)), tmp_path / "saved.pt2")
    with pytest.raises(cm.ArchiveError, match="CM069"):
        cm.load_precompiled(tmp_path / "saved.pt2", Net())
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        records = [archive.read(info) for info in archive.infolist()]
    for record in filter(None, records):
        place = data.index(record) + len(record) // 2
        changed = bytearray(data)
        changed[place] ^= 0xFF
        (tmp_path / "damaged").write_bytes(changed)
        with pytest.raises(cm.ArchiveError):
            cm.load_precompiled(tmp_path / "damaged", Net())
    with pytest.raises(cm.PackageError, match="CM068"):
        pickle.dumps(made)


class Unpicklable(dict):
    def __reduce_ex__(self, protocol):
        raise TypeError("no")


def test_code_that_cannot_be_opened_or_written_is_told(file, monkeypatch, ours, tmp_path):
    def fails(bundle):
        raise RuntimeError("no compiler")

    with monkeypatch.context() as patch:
        patch.setattr(bundling, "opened", fails)
        with pytest.raises(cm.ArchiveError, match=r"CM070.*no compiler"):
            cm.load_precompiled(file, Net())
    next(iter(ours._ahead.codes.values())).results.leaves.append((False, Unpicklable()))
    try:
        with pytest.raises(cm.ArchiveError, match="CM071"):
            ours.save(tmp_path / "file")
        assert not (tmp_path / "file").exists()
    finally:
        next(iter(ours._ahead.codes.values())).results.leaves.pop()


@pytest.mark.slow
def test_bound_modules_and_gradients_of_inputs(tmp_path):
    torch.manual_seed(0)
    model = Net()
    x = pictures(4).requires_grad_()
    bound = cm.bind(torch.export.export(model, (x.detach(),), strict=False))
    ours = cm.precompile(bound, (x,), gradients=("train", "eval"))
    ours.save(tmp_path / "code")
    cm.save(bound, tmp_path / "bound.pt2")
    loaded = cm.load_precompiled(tmp_path / "code", cm.load(tmp_path / "bound.pt2"))
    for module, flag in itertools.product((ours, loaded), (True, False)):
        twin = copy.deepcopy(model)
        twin.load_state_dict(module._orig_mod.state_dict())
        grads = []
        for one in (module, twin):
            torch.manual_seed(0)
            out = one.train(flag)(x)["scores"]
            grads.append([out, *torch.autograd.grad(out.sum(), x)])
        close(*grads)
        close(list(module.buffers()), list(twin.buffers()))


class Asking(nn.Module):
    """Arguments by name, a value among them; a region without gradients; an even size; a list returned."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, scale=1.0, *, mask=None):
        with torch.no_grad():
            gate = self.linear(x).sigmoid()
        pairs = x.view(-1, 2, 4).sum(1)
        return [self.linear(x) * gate * scale * mask, pairs, None]


@pytest.mark.slow
def test_arguments_by_name_regions_and_conditions():
    model, x, mask = Asking(), torch.randn(6, 4), torch.ones(4)
    sizes = {"x": {0: torch.export.Dim.AUTO}, "scale": None, "mask": None}
    ours = cm.precompile(model, (x,), {"scale": 2.0, "mask": mask}, modes=("train",), dynamic_shapes=sizes)
    assert str(inspect.signature(ours.forward)) == "(x, *, scale, mask)"
    for batch in (6, 10):
        x, found = torch.randn(batch, 4), []
        for module in (ours, copy.deepcopy(model)):
            out = module(x, mask=mask, scale=2.0)
            out[0].sum().backward()
            found.append([*out[:2], *(p.grad for p in module.parameters())])
            model.zero_grad()
        close(*found)
        assert out[2] is None
    with pytest.raises(cm.CallError, match=r"CM051|CM044"):
        ours(torch.randn(7, 4), mask=mask, scale=2.0)
    with pytest.raises(cm.CallError, match=r"CM042.*3.0"):
        ours(x, mask=mask, scale=3.0)
