"""Nested values in JSON, and back without the classes that they had."""

import collections
import json
from dataclasses import dataclass

import pytest
import torch
from torch.utils import _pytree as pytree

from compile_modes.package.structure import Record, Strange, build, describe, take, tensors_of

Point = collections.namedtuple("Point", ["x", "y"])
A, B = torch.zeros(1), torch.ones(2)


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


pytree.register_dataclass(Output)


def there_and_back(tree):
    tensors = []
    node = json.loads(json.dumps(describe(tree, tensors)))
    taken = []
    take(node, tree, taken)
    assert list(map(id, taken)) == list(map(id, tensors)) == [id(tensors[i]) for i in tensors_of(node)]
    return build(node, tensors)


@pytest.mark.parametrize(
    "tree",
    [A, None, 3, (A, [B, None], ()), {"a": A, 1: (B, "text", 1.5, True)}, [], {}],
    ids=lambda tree: str(tree)[:20],
)
def test_what_is_plain_comes_back_as_it_was(tree):
    assert there_and_back(tree) == tree


def test_a_namedtuple_comes_back_with_its_fields():
    point = there_and_back(Point(A, [B]))
    assert (point.x, point[1]) == (A, [B])
    assert type(point).__name__ == "Point"


def test_a_class_of_the_model_comes_back_as_a_record():
    output = there_and_back(Output(A, B))
    assert isinstance(output, Record)
    assert output.logits is output["logits"] is output[0] is A
    assert output[1:] == (B,)
    with pytest.raises(AttributeError, match="attentions"):
        output.attentions  # noqa: B018


def test_a_record_is_taken_by_name_from_any_class_that_has_them():
    node = describe(Output(A, B), [])
    taken = []
    take(node, {"loss": B, "logits": A}, taken)
    assert taken == [A, B]


@pytest.mark.parametrize("tree", [len, {A: 1}, [{1.5: A}], float("nan"), {"a": {1, 2}}], ids=str)
def test_what_json_has_no_place_for_is_refused(tree):
    with pytest.raises(Strange):
        describe(tree, [])


@pytest.mark.parametrize(
    ("tree", "other", "says"),
    [
        ((A, 2), (A, 3), "3 is given, where 2 is compiled in"),
        ((A, 2), (A, 2.0), "2.0 is given, where 2 is compiled in"),
        ((A, True), (A, 1), "1 is given, where True is compiled in"),
        ((A, B), (A,), "a tuple of 1 is given, where there was a tuple of 2"),
        ([A], (A,), "a tuple of 1 is given, where there was a list of 1"),
        ({"a": A}, {"b": A}, "a dict of 1 is given, where there was a dict of ['a']"),
        ((), (A,), "a tuple of 1 is given, where there was a tuple of 0"),
        (A, [A], "a list of 1 is given, where there was a tensor"),
        (Point(A, B), (A, B), "a tuple of 2 is given, where there was a named of 2"),
    ],
    ids=str,
)
def test_what_is_not_as_described_is_said(tree, other, says):
    with pytest.raises(Strange) as error:
        take(describe(tree, []), other, [])
    assert str(error.value) == says


def test_dicts_are_taken_in_the_order_of_the_description():
    taken = []
    take(describe({"a": A, "b": B}, []), {"b": B, "a": A}, taken)
    assert taken == [A, B]
