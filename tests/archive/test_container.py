"""Files that are missing, foreign, damaged, hostile or can't be written."""

import errno
import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import compile_modes as cm
from compile_modes.archive import container
from compile_modes.archive import programs as archive

HEADER = "archive/extra/compile_modes.json"


def program():
    return torch.export.export(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2)), (torch.randn(2, 3),))


@pytest.fixture
def path(tmp_path):
    archive.write(tmp_path / "model.pt2", {"train": program()}, {"a": 1})
    return tmp_path / "model.pt2"


def rewrite(path: Path, changes: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """Writes the archive again with other records; None leaves one out."""
    with zipfile.ZipFile(path) as old:
        records = {info.filename: old.read(info) for info in old.infolist()} | changes
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in records.items():
            if data is not None:
                new.writestr(name, data)


def message_of(path) -> str:
    with pytest.raises(cm.ArchiveError) as error:
        archive.read(path)
    assert str(path) in str(error.value)
    return str(error.value).replace(str(path), "PATH")


def test_missing_file_directory_and_empty_file(tmp_path):
    assert_expected_inline(
        message_of(tmp_path / "no.pt2"),
        """\
CM504: there is no such file
  where: PATH
  what to do: check the path""",
    )
    assert_expected_inline(
        message_of(tmp_path),
        """\
CM501: the path is a directory
  where: PATH
  what to do: name a file in it""",
    )
    (tmp_path / "empty.pt2").touch()
    assert_expected_inline(
        message_of(tmp_path / "empty.pt2"),
        """\
CM507: the file is empty
  where: PATH
  what to do: get another copy, or save it again""",
    )


def test_what_is_said_of_a_program_that_torch_saved(tmp_path):
    torch.export.save(program(), tmp_path / "torch.pt2")
    assert_expected_inline(
        message_of(tmp_path / "torch.pt2"),
        """\
CM512: the file was written by torch.export.save(), not by compile_modes
  where: PATH
  what to do: load it by torch.export.load() and give the program to compile_modes.bind()""",
    )


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning", "ignore:.*deprecated.*:DeprecationWarning")
def test_other_foreign_files(tmp_path):
    file, model = tmp_path / "file", nn.Linear(2, 2)
    torch.save(model.state_dict(), file)
    assert "was written by torch.save()" in message_of(file)
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)
    assert "is a pickle" in message_of(file)
    torch.jit.save(torch.jit.trace(model, torch.ones(2)), file)
    assert "TorchScript" in message_of(file)
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("a/b.txt", "b")
    assert "is a zip, but no .pt2 archive" in message_of(file)
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("serialized_exported_program.json", "{}")
    assert "torch 2.7 or older" in message_of(file)
    with zipfile.ZipFile(file, "w") as zipped:
        pass
    assert "no .pt2 archive" in message_of(file)
    file.write_bytes(b"# a text\n")
    assert "is no .pt2 archive" in message_of(file)


def test_truncated_anywhere(path):
    whole = path.read_bytes()
    for cut in sorted({1, 3, 4, 30, len(whole) - 1, *range(5, len(whole), 97)}):
        path.write_bytes(whole[:cut])
        assert "cut off or damaged" in message_of(path) or cut < 4


def test_any_flipped_byte_is_noticed_or_harmless(path):
    whole, rng = path.read_bytes(), random.Random(0)
    expected, noticed = archive.read(path)[0]["train"].state_dict, 0
    positions = [*rng.sample(range(len(whole)), 300), *range(len(whole) - 22, len(whole))]
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded, notes = archive.read(path)
        except cm.ArchiveError:
            noticed += 1
        else:  # padding, dates and the like, which the checksums leave out
            assert notes == {"a": 1}
            assert all(torch.equal(loaded["train"].state_dict[name], value) for name, value in expected.items())
    assert noticed > len(positions) / 2


def test_a_flipped_byte_of_a_weight_is_noticed(path):
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as zipped:
        weight = zipped.read("archive/data/weights/weight_0")
    whole[whole.index(weight) + 5] ^= 4
    path.write_bytes(whole)
    torch.export.pt2_archive._package.load_pt2(path)  # torch's reader compares no checksums
    assert "Bad CRC-32 for file 'archive/data/weights/weight_0'" in message_of(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({HEADER: None}, "was written by torch.export.save()"),
        ({HEADER: b"{"}, "damaged (JSONDecodeError"),
        ({HEADER: b"[]"}, "damaged"),
        ({HEADER: b'{"format": 1, "programs": []}'}, "damaged"),
        ({HEADER: b'{"format": "1", "notes": {}, "programs": ["train"]}'}, "damaged"),
        ({HEADER: b'{"format": 1, "notes": [], "programs": ["train"]}'}, "damaged"),
        ({HEADER: b'{"format": 1, "notes": {}, "programs": ["train", "eval"]}'}, "models/eval.json is missing"),
        ({"archive/data/weights/weight_0": None}, "damaged"),
        ({"archive/data/weights/weight_0": b"1234"}, "reaches beyond the record data/weights/weight_0"),
        ({"archive/data/weights/train_weights_config.json": b"{}"}, "damaged"),
        ({"archive/models/other.json": b"{}"}, "models/other.json is missing or unknown"),
        ({"archive/models/train.json": b"{}"}, "can't load program 'train', written with torch"),
        ({"archive/models/train.json": b"no json"}, "can't load program 'train', written with torch"),
        ({"archive/byteorder": b"big" if sys.byteorder == "little" else b"little"}, "the other byte order"),
    ],
)
def test_records_that_are_missing_or_wrong(path, changes, message):
    rewrite(path, changes)
    assert message in message_of(path)


def test_a_newer_format(path):
    header = {"format": archive.FORMAT + 1, "torch": "9.9.0", "something": "new"}
    rewrite(path, {HEADER: json.dumps(header).encode()})
    assert_expected_inline(
        message_of(path),
        """\
CM518: the file has format 2, written with torch 9.9.0; the newest known is 1
  where: PATH
  what to do: upgrade compile_modes""",
    )


def test_compressed_records_are_refused(path):
    rewrite(path, {}, zipfile.ZIP_DEFLATED)
    assert "compressed or encrypted" in message_of(path)


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_no_code_of_the_file_is_run(path, tmp_path):
    target = tmp_path / "made"
    buffer = io.BytesIO()
    torch.save(Hostile(target), buffer)
    with zipfile.ZipFile(path) as zipped:
        config = json.loads(zipped.read("archive/data/weights/train_weights_config.json"))
    whole = path.read_bytes()

    rewrite(path, {"archive/data/sample_inputs/train.pt": buffer.getvalue()})
    with pytest.warns(UserWarning, match="were left out"):
        archive.read(path)
    for prefix, data in (("weight_0", buffer.getvalue()), ("opaque_obj_0", pickle.dumps(Hostile(target)))):
        path.write_bytes(whole)
        config["config"]["0.weight"].update(use_pickle=True, path_name=prefix)
        changed = json.dumps(config).encode()
        rewrite(
            path, {f"archive/data/weights/{prefix}": data, "archive/data/weights/train_weights_config.json": changed}
        )
        with pytest.raises(cm.ArchiveError):
            archive.read(path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "message"), [("no/model.pt2", "No such file or directory"), (".", "the path is a directory")]
)
def test_places_that_can_not_be_written(tmp_path, name, message):
    with pytest.raises(cm.ArchiveError, match=message):
        archive.write(tmp_path / name, {"train": program()}, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("programs", [{}, {"a/b": program}, {"": program}, {"train": lambda: nn.Linear(2, 2)}])
def test_what_is_no_program_is_refused(tmp_path, programs):
    programs = {name: make() for name, make in programs.items()}
    with pytest.raises(cm.ArchiveError, match=r"program|Program"):
        archive.write(tmp_path / "model.pt2", programs, {})
    assert os.listdir(tmp_path) == []


class Full(io.RawIOBase):
    """A disk that is full after some bytes."""

    def __init__(self, room: int, error: BaseException) -> None:
        self.room, self.error = room, error

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise self.error
        return len(data)


@pytest.mark.parametrize("room", [0, 100, 2000, 5000])
def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(room):
    sink = container.Sink(Full(room, OSError(errno.ENOSPC, "No space left on device")))
    records = [("a", b"a" * 3000), ("b", torch.zeros(3000, dtype=torch.uint8))]
    with pytest.raises(OSError, match="No space left"), container.PT2ArchiveWriter(sink) as file:
        write_all(container.Writer(file, sink), records)


def write_all(writer, records) -> None:
    for name, data in records:
        (writer.write if isinstance(data, bytes) else writer.write_tensor)(name, data)


FULL_DISK = """
import os, resource, signal, sys, torch
from torch import nn
import compile_modes as cm
from compile_modes.archive import programs as archive
program = torch.export.export(nn.Linear(500, 500), (torch.randn(2, 500),))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    archive.write(sys.argv[1], {"train": program}, {})
except cm.ArchiveError as error:
    print(error.cause, type(error.__cause__).__name__, end="")
"""


@pytest.mark.slow
def test_nothing_is_left_of_a_file_that_could_not_be_written_whole(path):
    """With a limit on the size of files, which makes the system refuse to write, as a full disk does."""
    whole = path.read_bytes()
    command = [sys.executable, "-c", FULL_DISK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.startswith("the file can't be written: "), done.stderr
    assert done.stdout.endswith("OSError")
    assert path.read_bytes() == whole
    assert os.listdir(path.parent) == ["model.pt2"]


def test_nothing_is_left_when_the_user_interrupts(path, monkeypatch):
    whole = path.read_bytes()

    def interrupt(self, name, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(container.Writer, "write_tensor", interrupt)
    with pytest.raises(KeyboardInterrupt):
        archive.write(path, {"train": program()}, {})
    assert path.read_bytes() == whole
    assert os.listdir(path.parent) == ["model.pt2"]
