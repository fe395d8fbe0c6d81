"""``warmup(background=True)``: a child fills the cache of this process, or leaves it as it was and says why."""

import copy
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

import compile_modes as cm
from compile_modes._compat import finding, recipes
from compile_modes.warming import background, publishing
from graphs import graphs_compiled
from nets import IMAGE, VECTORS, ConvNet, Small
from setups import compiled_as


class FailsInEval(Small):
    def forward(self, x):
        if not self.training:
            raise RuntimeError("out of luck")
        return super().forward(x)


class DiesInEval(Small):
    """Ends the process that runs it in eval, if that is the child."""

    def forward(self, x):
        if not self.training and os.environ.get("DIE_IN_EVAL") != str(os.getpid()):
            os._exit(3)
        return super().forward(x)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, with files that must stay as they are."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    (tmp_path / "cache" / "ab").mkdir(parents=True)
    (tmp_path / "cache" / "ab" / "kernel.so").write_text("ours")
    return tmp_path / "cache"


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_bytes().hex() for p in folder.rglob("*") if p.is_file()}


def evaluate(call, x, grad=False):
    call.eval()
    with torch.set_grad_enabled(grad):
        return call(x)


def hits(group: str) -> tuple[int, int]:
    name = {"inductor": "fxgraph_cache", "aot_autograd": "autograd_cache"}[group]
    return counters[group][f"{name}_hit"], counters[group][f"{name}_miss"]


def train_step(call, x):
    call.train()
    call(x).square().sum().backward()


@pytest.mark.slow
def test_the_other_mode_is_in_the_cache(cache):
    torch.manual_seed(1)
    model = Small(4)
    expected = evaluate(copy.deepcopy(model), VECTORS)
    model.train()
    call = torch.compile(model, backend="pt2e_modes")
    model.bn.weight.grad = torch.ones(4)
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    handle = cm.warmup(call, VECTORS, background=True)
    assert not handle.done
    assert handle.wait(600)
    assert (handle.done, handle.error, repr(handle)) == (True, None, "<Warmup: complete>")
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.bn.weight.grad, torch.ones(4))
    assert all(m.training for m in model.modules())
    assert graphs_compiled() == 0
    torch.testing.assert_close(evaluate(call, VECTORS), expected)
    assert (hits("inductor"), hits("aot_autograd")) == ((1, 0), (1, 0))
    assert (cache / "ab" / "kernel.so").read_text() == "ours"
    assert not list((cache / "compile_modes_warmup").iterdir())
    evaluate(call, VECTORS, grad=True)  # which was not asked for
    assert hits("aot_autograd") == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bound", "in place", "forward", "nested", "stock"])
def test_all_modes_of_all_kinds(kind, cache):
    call = compiled_as(kind, ConvNet(), IMAGE)
    generator = torch.get_rng_state()
    assert cm.warmup(call, IMAGE, modes=("train", "eval"), background=True).wait(600)
    assert torch.equal(generator, torch.get_rng_state())
    train_step(call, IMAGE)
    evaluate(call, IMAGE)
    assert (hits("inductor"), hits("aot_autograd")) == ((3, 0), (2, 0))


@pytest.mark.slow
@pytest.mark.parametrize("exported", [False, True], ids=["eager", "bound"])
def test_a_size_that_has_changed_is_dynamic_in_the_child_too(exported, cache):
    """As after a ragged last batch: eval compiles with a dynamic batch then, in the child as well."""
    model = Small(4)
    if exported:
        batch = torch.export.Dim.DYNAMIC
        model = cm.bind(torch.export.export(model, (VECTORS,), dynamic_shapes=({0: batch},)))
    call = torch.compile(model, backend="pt2e_modes")
    train_step(call, VECTORS)
    train_step(call, VECTORS[:-1])
    assert cm.warmup(call, VECTORS, background=True).wait(600)
    counters.clear()
    evaluate(call, VECTORS)
    assert (hits("inductor"), hits("aot_autograd")) == ((1, 0), (1, 0))


@pytest.mark.slow
def test_settings_reach_the_child(cache):
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    x = torch.randn(6, 3, 12, 12)
    torch._dynamo.mark_dynamic(x, 0)
    call = torch.compile(
        ConvNet(), backend="pt2e_modes", fullgraph=True, options={"overrides": {"block1.*": "eval"}, "dce": True}
    )
    try:
        torch.set_float32_matmul_precision("medium")
        torch.set_num_threads(2)
        with inductor_config.patch({"cpp.max_horizontal_fusion_size": 4}), torch.autocast("cpu", torch.bfloat16):
            modes = ["train", {"block2*": "eval", "*": "train"}]
            assert cm.warmup(call, x, modes=modes, background=True).wait(600)
            train_step(call, x)
            call.block2.eval()
            for module in call.block2.modules():
                module.training = False
            call(x).sum().backward()
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)
    assert (hits("inductor"), hits("aot_autograd")) == ((4, 0), (2, 0))


def test_a_failing_child_is_warned_of_once(cache, no_inductor):
    before = files(cache)
    call = torch.compile(FailsInEval(4), backend="pt2e_modes")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handle = cm.warmup(call, VECTORS, background=True)
        assert handle.wait(600)
    assert [w.message.code for w in caught] == ["CM613"]
    assert caught[0].filename == __file__
    assert "out of luck" in str(caught[0].message)
    assert "out of luck" in handle.error
    assert files(cache) == before


@pytest.mark.slow
def test_a_child_that_dies_is_warned_of_and_an_error_where_warnings_are(cache, monkeypatch, no_inductor):
    monkeypatch.setenv("DIE_IN_EVAL", str(os.getpid()))
    before = files(cache)
    handle = cm.warmup(torch.compile(DiesInEval(4), backend="pt2e_modes"), VECTORS, background=True)
    with pytest.raises(cm.ModeWarning, match="ended with code 3"):
        handle.wait(600)
    assert files(cache) == before


@pytest.mark.slow
@pytest.mark.parametrize("end", ["cancel", "kill"])
def test_a_child_ended_halfway_leaves_the_cache_as_it_was_and_working(end, cache):
    call = torch.compile(ConvNet(), backend="pt2e_modes")
    before = files(cache)
    handle = cm.warmup(call, IMAGE, background=True)
    private = next((cache / "compile_modes_warmup").iterdir()) / "cache"
    give_up = time.monotonic() + 200
    while not list(private.rglob("*.cpp")):  # it is compiling kernels
        assert time.monotonic() < give_up
        time.sleep(0.05)
    if end == "cancel":
        handle.cancel()
        assert repr(handle) == "<Warmup: cancelled>"
        assert handle.error is None
    else:
        os.killpg(handle._process.pid, signal.SIGKILL)
        with pytest.raises(cm.ModeWarning, match="CM613"):
            handle.wait(60)
    assert handle.done
    assert files(cache) == before
    torch.testing.assert_close(evaluate(call, IMAGE), evaluate(call._orig_mod, IMAGE))


PARENT = """
import os, sys, time
import torch, compile_modes as cm
from nets import IMAGE, ConvNet
handle = cm.warmup(torch.compile(ConvNet(), backend="pt2e_modes"), IMAGE, background=True)
print(handle._process.pid, flush=True)
time.sleep(60 if sys.argv[1] == "kill" else 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kill", "exit"])
def test_the_child_ends_with_its_parent(end, cache):
    process = subprocess.Popen([sys.executable, "-c", PARENT, end], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    if end == "kill":
        time.sleep(2)
        process.kill()
    process.wait()
    process.stdout.close()
    give_up = time.monotonic() + 20
    while alive(pid):
        assert time.monotonic() < give_up
        time.sleep(0.1)
    assert [name for name in files(cache) if not name.startswith("compile_modes_warmup")] == ["ab/kernel.so"]


def alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_what_can_not_be_taken_to_another_process_is_an_error_at_once(cache, no_inductor):
    class Local(Small):
        pass

    before = files(cache)
    with pytest.raises(cm.WarmupError, match=r"CM610.*Local"):
        cm.warmup(torch.compile(Local(4), backend="pt2e_modes"), VECTORS, background=True)
    unbound = torch.export.export(Small(4), (VECTORS,)).module()
    with pytest.raises(cm.WarmupError, match="CM610"):
        cm.warmup(torch.compile(unbound, backend="pt2e_modes"), VECTORS, background=True)
    with inductor_config.patch(force_disable_caches=True), pytest.raises(cm.WarmupError, match="CM612"):
        cm.warmup(torch.compile(Small(4), backend="pt2e_modes"), VECTORS, background=True)
    in_main = type("Net", (Small,), {"__module__": "__main__"})
    with pytest.raises(cm.WarmupError, match="CM611: Net is defined in __main__"):
        cm.warmup(torch.compile(in_main(4), backend="pt2e_modes"), VECTORS, background=True)
    assert files(cache) == before
    assert not list((cache / "compile_modes_warmup").iterdir())


def test_publishing_takes_whole_files_and_overwrites_none(tmp_path, monkeypatch):
    private, cache = tmp_path / "private", tmp_path / "cache"
    for name in ("ab/kernel.so", "ab/new.so", "fxgraph/x/y/z", "aotautograd/k", "locks/l.lock", "triton/0/a", ".t.tmp"):
        (private / name).parent.mkdir(parents=True, exist_ok=True)
        (private / name).write_text("child's")
    (cache / "ab").mkdir(parents=True)
    (cache / "ab" / "kernel.so").write_text("ours")
    order = []
    link = os.link
    monkeypatch.setattr(os, "link", lambda a, b: (order.append(Path(b).relative_to(cache).as_posix()), link(a, b)))
    assert publishing.publish(private, cache) == 3
    assert order == ["ab/kernel.so", "ab/new.so", "fxgraph/x/y/z", "aotautograd/k"]
    assert sorted(p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file()) == sorted(order)
    assert (cache / "ab" / "kernel.so").read_text() == "ours"

    def refuse(a, b):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert publishing.publish(private, tmp_path / "other") == 4
    assert publishing.publish(private, tmp_path / "other") == 0


def test_what_a_module_was_compiled_with_is_read_back():
    how = {"fullgraph": True, "dynamic": False, "mode": "max-autotune-no-cudagraphs"}
    model = ConvNet()
    model.compile(backend="pt2e_modes", **how)
    for found in (
        recipes.of_wrapper(torch.compile(ConvNet(), backend="pt2e_modes", **how)),
        recipes.in_place(model),
        recipes.of_function(torch.compile(ConvNet().forward, backend="pt2e_modes", **how)),
    ):
        assert found.pop("backend").__name__ == "pt2e_modes"
        assert found == how
    assert recipes.of_function(ConvNet().forward) is None
    assert recipes.of_wrapper(torch.compile(nn.Linear(1, 1), options={"max_autotune": True})) == {
        "backend": "inductor",
        "options": {"max_autotune": True},
        "fullgraph": False,
        "dynamic": None,
    }


def test_another_order_of_imports_can_be_taken_over():
    script = """
    import sys, torch
    from compile_modes._compat import finding
    assert finding.finders() == ["torch._utils"], finding.finders()
    before = list(sys.modules)
    finding.find_in(["compile_modes", "not.here"])
    assert finding.finders() == ["compile_modes"]
    assert list(sys.modules) == ["compile_modes", "not.here", *(m for m in before if m != "compile_modes")]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
    assert finding.finders()


def test_folders_of_killed_processes_go_after_a_day(tmp_path):
    old = tmp_path / "room" / "old"
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    new = background._make_folder(tmp_path / "room")
    assert list((tmp_path / "room").iterdir()) == [new]
