import pytest
import torch

from compile_modes.graph import ops
from compile_modes.graph.ops import TABLE, ModeOp, lookup

# Names of arguments that carry a mode, in any aten schema.
MODE_ARGUMENTS = {"train", "training", "is_training", "use_input_stats", "dropout_p", "dropout"}
MODE_IN_NAME = ("no_training", "batch_norm_with_update", "batch_norm_no_update", "_fused_dropout")


def schemas():
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace in ("aten", "compile_modes"):
            packet = getattr(getattr(torch.ops, namespace), name, None)
            overload = getattr(packet, schema.overload_name or "default", None)
            if overload is not None:
                yield overload


def test_every_mode_carrying_overload_of_this_torch_has_a_row():
    missing = [
        str(overload)
        for overload in schemas()
        if {a.name for a in overload._schema.arguments} & MODE_ARGUMENTS
        or any(part in overload._schema.name for part in MODE_IN_NAME)
        if lookup(overload) is None
    ]
    assert not missing, f"give these a row in compile_modes/ops.py, or a refusal: {missing}"


def test_the_table_is_as_large_as_aten_has_mode_ops():
    assert len(TABLE) >= 95


def test_rows_of_this_torch_are_found_by_their_names():
    names = {name for name, _ in ops._rows()}
    resolved = {str(o).removeprefix("aten.").removesuffix(".default") for o in TABLE}
    # Private kernels that only some of the supported releases have.
    assert names - resolved <= {"_flash_attention_forward_no_dropout_inplace", "_flash_attention_forward.quantized",
                                "_scaled_dot_product_flash_attention.quantized"}  # fmt: skip


def test_every_row_can_be_switched_or_says_why_not():
    for op in TABLE.values():
        assert op.flag or op.p or op.refusal or op.modeless, op.overload
        assert op.family in {
            "dropout",
            "switch",
            "batch_norm",
            "instance_norm",
            "rrelu",
            "rnn",
            "attention",
            "noise",
            "spectral_norm",
        }


def test_the_cumulative_batch_norm_counts_itself():
    row = lookup(torch.ops.compile_modes.cumulative_batch_norm.default)
    assert (row.family, row.flag, row.stats) == ("batch_norm", "training", ops.STATS)
    assert not row.counter  # bind would put a second step of num_batches_tracked beside it


def test_a_second_row_for_an_overload_is_refused(monkeypatch):
    row = ("dropout", {"family": "dropout", "flag": "train", "p": "p"})
    monkeypatch.setattr(ops, "_rows", lambda: iter([row, row]))
    with pytest.raises(ValueError, match="two rows for aten::dropout"):
        ops._build()


def test_a_row_that_names_no_argument_of_the_schema_is_refused():
    with pytest.raises(ValueError, match="has no argument 'training'"):
        ModeOp(torch.ops.aten.dropout.default, "dropout", flag="training")


def test_arguments_are_read_by_schema_name_wherever_they_stand():
    row = lookup(torch.ops.aten.rrelu.default)
    assert row.read(("x",), {}, "training") is False
    assert row.read(("x", 0.1, 0.2, True), {}, "training") is True
    assert row.read(("x",), {"training": True}, "training") is True


def test_lookup_of_other_targets_is_none():
    assert lookup(torch.ops.aten.relu.default) is None
    assert lookup(torch.relu) is None
    assert lookup("dropout") is None
