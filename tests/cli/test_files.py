"""Files that the command line can't read: named, without a traceback."""

import struct
import zipfile

import pytest
import torch
from expecttest import assert_expected_inline

pytestmark = pytest.mark.filterwarnings("ignore::compile_modes.ModeWarning")


def damaged(file):
    """The bytes of a file with one bit of its weights changed."""
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        info = next(info for info in archive.infolist() if "weights/weight_" in info.filename)
    name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
    data[info.header_offset + 30 + name + extra] ^= 1
    return bytes(data)


def archive_of(names):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"pt2")

    return write


BAD = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "zip": archive_of(["a/b"]),
    "aoti": archive_of(["m/archive_format", "m/data/aotinductor/model/x.so"]),
    "torchscript": archive_of(["m/constants.pkl", "m/code/x.py"]),
    "pickle": lambda path: torch.save({}, path, _use_new_zipfile_serialization=False),
    "weights": lambda path: torch.save({}, path),
    "cut": lambda path: path.write_bytes((path.parent.parent / "train.pt2").read_bytes()[:-500]),
    "no graph": archive_of(["m/archive_format", "m/archive_version", "m/models/model.json"]),
}


def test_files_that_hold_no_program_are_named_without_a_traceback(run, files, caplog):
    said = []
    for name, make in BAD.items():
        (files / name).mkdir()
        make(files / name / "model.pt2")
        status, out, err = run("explain", f"{name}/model.pt2")
        assert (status, out, err[:7]) == (2, "", "error: "), name
        assert run("bake", f"{name}/model.pt2", "-o", "x.pt2") == (2, "", err)
        said.append(err[7:].partition("\n")[0].replace(torch.__version__, "x"))
    assert not [record for record in caplog.records if record.exc_info]
    assert_expected_inline(
        "\n".join(said),
        """\
CM504: there is no such file
CM501: the path is a directory
CM507: the file is empty
CM509: the file is no .pt2 archive
CM517: the file is a zip, but no .pt2 archive
CM513: the .pt2 archive holds no exported program
CM515: the file is a TorchScript archive
CM508: the file is a pickle, not an archive
CM516: the file was written by torch.save()
CM506: the file is cut off or damaged (BadZipFile: records are missing or overlap)
CM911: torch x can't load the program: ...""",
    )


def test_damage_is_found(run, files):
    (files / "damaged.pt2").write_bytes(damaged(files / "train.pt2"))
    status, _, err = run("explain", "damaged.pt2")
    assert status == 2
    assert "the file is damaged: the checksum of" in err
