import pytest
import torch
from expecttest import assert_expected_inline

import compile_modes as cm
from nets import IMAGE, Attention, ConvNet, HardCoded, Norms, Regions, UnusedNorm, UserCounter

OWNERS = ["block1.bn", "block1.drop", "drop", "block2.bn", "block2.drop", "drop", ""]


def exported(model, *args):
    return torch.export.export(model, args)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    "wrap", [lambda ep: ep, lambda ep: ep.module(), lambda ep: torch.compile(ep.module())], ids=["ep", "gm", "compiled"]
)
def test_sites_know_their_owner_and_mode(mode, wrap):
    found = cm.sites(wrap(exported(ConvNet().train(mode), IMAGE)))
    assert [site.owner for site in found] == OWNERS
    assert [site.training for site in found] == [mode] * 7
    assert not any(site.bound for site in found)


def test_sites_show_what_an_op_is_set_to():
    found = {site.owner: site for site in cm.sites(exported(ConvNet(), IMAGE))}
    assert found["block1.bn"].literals == {"momentum": 0.03, "eps": 1e-3}
    assert found["block2.drop"].literals == {"p": 0.2}
    assert found["block2.drop"].p == 0.2


def test_batch_norms_know_their_counter_and_its_step():
    trained = {s.owner: s for s in cm.sites(exported(ConvNet(), IMAGE))}
    assert trained["block1.bn"].counter == "block1.bn.num_batches_tracked"
    assert trained["block1.bn"].step.target is torch.ops.aten.add_.Tensor
    evaluated = {s.owner: s for s in cm.sites(exported(ConvNet().eval(), IMAGE))}
    assert evaluated["block1.bn"].step is None
    assert evaluated["block1.bn"].counter_at is not None
    assert trained["drop"].counter is None


def test_a_counter_of_the_users_own_is_no_step():
    found = cm.sites(exported(UserCounter(), torch.randn(3, 4)))
    assert [str(s.step.args[0]) for s in found] == ["bn_num_batches_tracked"]


def test_norms_without_statistics_have_no_mode():
    found = {site.owner: site for site in cm.sites(exported(Norms(), torch.randn(3, 4, 5)))}
    assert found["batch_only"].modeless
    assert found["instance_only"].modeless
    assert found["batch_only"].training is None
    assert found["batch_only"].refusal(True) == found["batch_only"].refusal(False) == ""
    assert found["tracking"].training
    assert found["instance"].training


def test_sites_inside_regions_are_found():
    owners = {site.owner for site in cm.sites(exported(Regions(), IMAGE))}
    assert owners == {"frozen.bn", "frozen.drop", "mixed.bn", "mixed.drop"}


def test_refusals_name_the_reason():
    (attention, _) = cm.sites(exported(Attention().eval(), torch.randn(2, 3, 8)))
    assert "its p is lost" in attention.refusal(True)
    cumulative = cm.sites(exported(torch.nn.BatchNorm1d(4, momentum=None).eval(), torch.randn(3, 4)))
    assert "cumulative average" in cumulative[0].refusal(True)
    decomposed = exported(torch.nn.BatchNorm1d(4), torch.randn(3, 4)).run_decompositions()
    assert "decomposed" in cm.sites(decomposed)[0].refusal(False)


def test_what_has_no_graph_is_refused():
    with pytest.raises(cm.BindError, match="Linear has no graph"):
        cm.sites(torch.nn.Linear(2, 2))


def test_a_program_without_sites():
    assert cm.sites(exported(torch.nn.Linear(2, 2), torch.randn(1, 2))) == []
    assert cm.explain(exported(torch.nn.Linear(2, 2), torch.randn(1, 2))) == "no mode-dependent sites"


def test_explain_lists_sites_and_limits():
    bound = cm.bind(exported(HardCoded().eval(), torch.randn(3, 4)))
    assert_expected_inline(
        cm.explain(bound),
        """\
op                    owner   mode   held by     literals  limits
aten.dropout.default  (root)  eval   flag        p=0.1
aten.dropout.default  (root)  eval   flag        p=0.2
aten.dropout.default  (root)  train  hard-coded  p=0.3
3 sites: 3 dropout""",
    )


def test_explain_gives_the_reason_for_each_refusal():
    program = exported(Norms(), torch.randn(3, 4, 5))
    assert_expected_inline(
        cm.explain(program),
        """\
op                          owner          mode   held by  literals                 limits
aten.batch_norm.default     tracking       train  literal  momentum=0.3, eps=0.01
aten.batch_norm.default     batch_only     -      literal  momentum=0.1, eps=1e-05  the same computation in both modes
aten.instance_norm.default  instance       train  literal  momentum=0.4, eps=1e-05
aten.instance_norm.default  instance_only  -      literal  momentum=0.1, eps=1e-05  the same computation in both modes
4 sites: 2 batch_norm, 2 instance_norm""",
    )


def test_an_unused_batch_norm_is_a_site():
    (site,) = cm.sites(exported(UnusedNorm(), torch.randn(3, 4)))
    assert site.training
    assert not site.node.users
