"""The same adapters in the eager model by PEFT, which has to be installed."""

import copy

import pytest
import torch
from torch import nn

import compile_modes as cm
from tuning.twins import Tuned, X, bound, steps, wake

peft = pytest.importorskip("peft")


def with_peft(model, ours, targets, **options):
    """The eager model with PEFT's adapters, of the values that a bound module has."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.3, **options)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    state = {f"base_model.model.{name}": value for name, value in cm.lora_state_dict(ours).items()}
    assert not peft.set_peft_model_state_dict(theirs, state).unexpected_keys
    assert peft.get_peft_model_state_dict(theirs).keys() == state.keys()
    return theirs


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.every(2)
def test_twenty_steps_equal_those_of_peft(compiled, no_inductor):
    targets = ["stem", "grouped", "fc1", "fc2", "head.1"]  # PEFT leaves dilations out
    model = Tuned()
    ours = cm.lora(bound(model), targets, r=4, alpha=8, dropout=0.3)
    wake(ours)
    theirs = with_peft(model, ours, targets)
    call = torch.compile(ours, backend="pt2e_modes") if compiled else ours
    assert steps([theirs, call], X, 20) < 1e-5
    state = peft.get_peft_model_state_dict(theirs)
    for name, value in cm.lora_state_dict(ours).items():
        assert torch.allclose(state[f"base_model.model.{name}"], value, atol=1e-5)


def test_weights_merge_as_those_of_peft():
    targets = ["stem", "fc1", "fc2"]
    model = Tuned()
    ours = cm.lora(bound(model), targets, r=4, alpha=8, dropout=0.3)
    wake(ours)
    merged = with_peft(model, ours, targets).merge_and_unload()
    cm.merge(ours)
    for name, value in merged.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, atol=1e-6), name


def test_a_transformer_of_hugging_face_equals_that_of_peft():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=8)
    model = transformers.GPT2Model(config)

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.gpt = model

        def forward(self, embedded):
            return self.gpt(inputs_embeds=embedded, use_cache=False).last_hidden_state

    x, body = torch.randn(2, 5, 16), Body()
    ours = cm.lora(bound(body, x), ("*.c_attn", "*.c_fc"), r=4, alpha=8, dropout=0.3)
    assert ours.gpt.h.get_submodule("0.attn.c_attn").lora_B.weight.shape == (48, 4)
    wake(ours)
    theirs = with_peft(body, ours, ["c_attn", "c_fc"], fan_in_fan_out=True)
    assert steps([theirs, ours], x, 20, lr=0.02) < 1e-5
    merged = theirs.merge_and_unload().eval()
    assert torch.allclose(cm.merge(ours).eval()(x), merged(x), atol=1e-5)
