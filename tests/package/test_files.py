"""Files: what is in one, what is no package, what is damaged, and what was compiled for something else."""

import io
import json
import pickle
import struct
import zipfile

import pytest
import torch

import compile_modes as cm
from compile_modes._compat import aoti
from compile_modes.archive.container import HEADER
from nets import VECTORS
from package.packages import Cnn


def rewritten(path, target, change):
    """A copy of a file with another header."""
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(target, "w") as after:
        for info in before.infolist():
            data = before.read(info)
            if info.filename.endswith(HEADER):
                header = json.loads(data)
                change(header)
                data = json.dumps(header).encode()
            after.writestr(info, data)
    return target


def refused(path, code, faked=None):
    with pytest.raises(cm.ArchiveError) as error:
        cm.load_package(path)
    assert error.value.code == code, error.value
    assert str(path) in error.value.where
    return str(error.value)


def test_weights_are_in_the_file_once_and_loading_unpickles_nothing(fake_file, faked, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for holder, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(holder, name, never)
    packed = cm.load_package(fake_file)
    torch.manual_seed(0)
    model = Cnn()
    with zipfile.ZipFile(fake_file) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
        size = sum(i.file_size for i in archive.infolist() if "/data/weights/" in i.filename)
    assert not [name for name in names if name.endswith((".pkl", ".pt"))]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    assert size <= sum(held.values()) + 4 * 4  # and the constants
    assert packed.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(packed.state_dict()[name], value)


def test_other_files_are_told_apart(fake_file, faked, tmp_path):
    cm.save(cm.export(torch.nn.Dropout(0.5), (VECTORS,)), tmp_path / "saved.pt2")
    refused(tmp_path / "saved.pt2", "CM030")
    with pytest.raises(cm.ArchiveError, match=r"CM032.*\n.*\n.*load_package"):
        cm.load(fake_file)
    torch.export.save(torch.export.export(torch.nn.Linear(4, 4), (VECTORS,)), tmp_path / "exported.pt2")
    refused(tmp_path / "exported.pt2", "CM512")
    (tmp_path / "empty.pt2").touch()
    refused(tmp_path / "empty.pt2", "CM507")
    refused(tmp_path / "none.pt2", "CM504")
    (tmp_path / "text.pt2").write_text("not a zip")
    refused(tmp_path / "text.pt2", "CM509")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_off_is_damaged(part, fake_file, faked, tmp_path):
    data = fake_file.read_bytes()
    (tmp_path / "cut.pt2").write_bytes(data[: int(part * len(data))])
    refused(tmp_path / "cut.pt2", "CM506")


def test_a_changed_byte_of_any_record_is_damage(fake_file, faked, tmp_path):
    data = fake_file.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = [i for i in archive.infolist() if i.file_size]
    changed = 0
    for info in infos:
        name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
        at = info.header_offset + 30 + name + extra
        bad = bytearray(data)
        bad[at + info.file_size // 2] ^= 0xFF
        (tmp_path / "bad.pt2").write_bytes(bad)
        with pytest.raises(cm.ArchiveError):
            cm.load_package(tmp_path / "bad.pt2")
        changed += 1
    assert changed > 10


CHANGES = {
    "newer": (lambda h: h.update(format=99), "CM031"),
    "other torch": (lambda h: h.update(torch="1.13.1+cpu"), "CM033"),
    "other system": (lambda h: h["package"]["machine"].update(system="win32"), "CM034"),
    "other machine": (lambda h: h["package"]["machine"].update(machine="riscv64"), "CM034"),
    "other ABI": (lambda h: h["package"]["machine"].update(cxx11_abi=False), "CM034"),
    "better CPU": (lambda h: h["package"]["machine"]["extensions"].append("avx4096"), "CM035"),
    "no such device": (lambda h: h["package"]["machine"].update(device="tpu"), "CM036"),
    "a mode without code": (lambda h: h["package"]["modes"].update(more=h["package"]["modes"]["eval"]), "CM506"),
    "a weight beyond its record": (lambda h: h["package"]["tensors"][0].update(offset=10**9), "CM506"),
    "no weights": (lambda h: h["package"].pop("state"), "CM506"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_compiled_for_something_else_is_told(name, fake_file, faked, tmp_path):
    change, code = CHANGES[name]
    refused(rewritten(fake_file, tmp_path / "other.pt2", change), code)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_package_for_a_gpu_needs_one(fake_file, faked, tmp_path):
    target = rewritten(fake_file, tmp_path / "g.pt2", lambda h: h["package"]["machine"].update(device="cuda"))
    refused(target, "CM036")


def test_a_library_that_torch_cannot_open_is_told(fake_file):
    assert "CM037" in refused(fake_file, "CM037")  # there is a text in the place of the library


def test_the_file_says_for_programs_in_c_what_is_where(fake_file):
    with zipfile.ZipFile(fake_file) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("extra/compile_modes.txt")]
        lines = [line.split("\t") for line in archive.read(name).decode().splitlines()]
        records = {n.partition("/")[2] for n in archive.namelist()}
    weights = {line[1]: line[2:] for line in lines if line[0] == "weight"}
    assert weights["conv.weight"][1:] == ["float32", "8,3,3,3", "27,9,3,1", "0"]
    assert weights["tied"] == weights["head.weight"]
    assert {line[0] for line in weights.values()} <= records
    outputs = [line[2:] for line in lines if line[:2] == ["output", "train"]]
    assert outputs[:3] == [["loss"], ["result", "0"], ["result", "1"]]
    gradients = [line[1] for line in outputs if line[0] == "gradient"]
    assert sorted(gradients) == ["bn.bias", "bn.weight", "conv.weight", "head.bias", "head.weight"]
    assert [line[1:] for line in lines if line[0] == "input"][:2] == [
        ["train", "image", "float32"],
        ["train", "target0", "int64"],
    ]


def test_what_a_cpu_can_do_is_known_on_linux():
    assert aoti.machine(torch.device("cpu"))["extensions"] or not aoti.os.path.exists("/proc/cpuinfo")
