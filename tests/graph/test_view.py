import pytest
import torch

import compile_modes as cm
from graphs import View, bodies, canonical, dynamo_path, own
from nets import IMAGE, Regions


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']", ""),
        ("L['self'].seq.1", "seq.1"),
        ("L['self']._modules['b']._modules['0']._buffers['running_mean']", "b.0.running_mean"),
        ("G['model'].layers.3.drop", "layers.3.drop"),
        ("layer1.bn", "layer1.bn"),
    ],
)
def test_dynamo_paths_become_named_modules_paths(source, path):
    assert dynamo_path(source) == path


def test_call_indices_of_export_are_dropped():
    assert canonical("seq.bn@1") == "seq.bn"
    assert canonical("bn@12.running_mean") == "bn.running_mean"
    assert canonical("a@b") == "a@b"


def test_regions_are_found_and_copied_before_an_edit():
    ep = torch.export.export(Regions(), (IMAGE,))
    gm = ep.module()
    regions = [body.module for body in bodies(gm)[1:]]
    assert len(regions) == 1 or len(regions) == 2  # a disabled autocast region may be inlined
    assert own(View(gm))
    assert not own(View(gm)), "owned once is owned"
    assert all(body.module not in regions for body in bodies(gm))


def test_binding_leaves_the_program_and_its_other_modules_alone():
    ep = torch.export.export(Regions(), (IMAGE,))
    other = ep.module()
    before = [body.graph.python_code("self").src for body in bodies(ep.module())]
    bound = cm.bind(ep).eval()
    assert [body.graph.python_code("self").src for body in bodies(ep.module())] == before
    torch.manual_seed(0)
    trained = other(IMAGE)
    torch.manual_seed(0)
    assert torch.equal(trained, ep.module()(IMAGE))
    assert not torch.equal(trained, bound(IMAGE))
