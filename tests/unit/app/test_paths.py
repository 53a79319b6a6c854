"""Paths in requests: whatever they are written like, they reach nothing outside the roots and hang nothing."""

import os
import socket
import unicodedata
from pathlib import Path

import pytest

from unslothd.v1.dataset_pb2 import DatasetSource
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.app import paths
from unslothd_server.app.dataset_sources import resolve_dataset
from unslothd_server.app.files import open_inside
from unslothd_server.app.paths import AllowedRoots
from unslothd_server.app.sources import resolve_model_source
from unslothd_server.app.training_store import TrainingStore
from unslothd_server.errors import InvalidFieldsError, NotFoundError, PermissionDeniedError, UnslothdError

ODD_NAMES = {
    "zero byte": "rows\0.jsonl",
    "long part": "a" * 300 + "/rows.jsonl",
    "long whole": "/".join(["b"] * 2040),
    "links in a circle": "./circle/rows.jsonl",
    "home of nobody": "~nobody-of-that-name/rows.jsonl",
    "below a file": "./rows.jsonl/more.jsonl",
    "right to left": "\u202elnosj.swor",
    "wide dots": "\uff0e\uff0e/secret.jsonl",
    "backslashes": "..\\secret.jsonl",
    "a URL": "file:///secret.jsonl",
    "blank": " ",
}
LEADING_OUT = {
    "parent": "../secret.jsonl",
    "parents in the middle": "folder/../../secret.jsonl",
    "many parents": "../" * 60 + "etc/hosts",
    "absolute": "/etc/hosts",
    "device": "/dev/zero",
    "standard input": "/dev/stdin",
    "environment of the server": "/proc/self/environ",
    "open file of the server": "/proc/self/fd/0",
    "home": "~/rows.jsonl",
    "last part is a link": "link.jsonl",
    "middle part is a link": "outside/secret.jsonl",
    "link to a link": "twice.jsonl",
    "link to a device": "zero.jsonl",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Rows in a root, a secret beside it, and every link that leads from the one to the other."""
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (root / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    (root / "circle").symlink_to("circle")
    (root / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (root / "twice.jsonl").symlink_to("link.jsonl")
    (root / "zero.jsonl").symlink_to("/dev/zero")
    (root / "outside").symlink_to(tmp_path)
    return root


@pytest.fixture
def roots(root: Path) -> AllowedRoots:
    return AllowedRoots([root])


def rows_at(name: str, roots: AllowedRoots) -> Path:
    return Path(resolve_dataset(DatasetSource(path=name), "train_dataset", roots, Path).path)


def no_result(training_id: str, step: int) -> Path:
    raise NotFoundError(ErrorReason.ERROR_REASON_TRAINING_NOT_FOUND, training_id)


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
def test_an_odd_name_of_rows_is_nothing_there(name: str, roots: AllowedRoots):
    with pytest.raises(NotFoundError):
        rows_at(name, roots)


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
def test_an_odd_name_of_a_model_is_an_error_of_ours(name: str, roots: AllowedRoots):
    with pytest.raises((NotFoundError, InvalidFieldsError)):
        resolve_model_source(name, roots, no_result)


@pytest.mark.parametrize("name", LEADING_OUT.values(), ids=LEADING_OUT)
def test_rows_outside_the_roots_are_refused(name: str, roots: AllowedRoots):
    with pytest.raises(PermissionDeniedError, match="lies outside"):
        rows_at(name, roots)


@pytest.mark.parametrize("name", LEADING_OUT.values(), ids=LEADING_OUT)
def test_a_model_outside_the_roots_is_refused(name: str, roots: AllowedRoots):
    with pytest.raises(PermissionDeniedError, match="lies outside"):
        resolve_model_source(name if "/" in name else f"./{name}", roots, no_result)


def test_two_spellings_of_a_letter_are_two_names(root: Path, roots: AllowedRoots):
    composed, decomposed = (unicodedata.normalize(form, "é.jsonl") for form in ("NFC", "NFD"))
    (root / composed).write_text("{}\n")
    assert rows_at(composed, roots) == root / composed
    with pytest.raises(NotFoundError):
        rows_at(decomposed, roots)


def test_a_link_within_the_roots_is_followed_to_the_file_that_was_checked(root: Path, roots: AllowedRoots):
    (root / "latest.jsonl").symlink_to("rows.jsonl")
    assert rows_at("latest.jsonl", roots) == root / "rows.jsonl"


@pytest.mark.timeout(20)
def test_a_pipe_and_a_socket_are_no_rows_and_are_not_waited_for(root: Path, roots: AllowedRoots):
    os.mkfifo(root / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(root / "socket.jsonl"))
        for name in ("pipe.jsonl", "socket.jsonl"):
            with pytest.raises(NotFoundError):
                rows_at(name, roots)


@pytest.mark.parametrize("kind", ["rows", "model"])
@pytest.mark.parametrize("inside", ["link to a file", "link to a folder", "pipe", "link in a linked folder"])
@pytest.mark.timeout(20)
def test_a_folder_that_holds_a_way_out_or_a_pipe_is_refused(kind: str, inside: str, root: Path, roots: AllowedRoots):
    folder = root / "folder"
    (folder / "config.json").write_text("{}")
    match inside:
        case "link to a file":
            (folder / "model.safetensors").symlink_to(root.parent / "secret.jsonl")
        case "link to a folder":
            (folder / "more").symlink_to(root.parent)
        case "pipe":
            os.mkfifo(folder / "adapter_config.json")
        case _:
            (root / "beside").mkdir()
            (root / "beside" / "data.arrow").symlink_to(root.parent / "secret.jsonl")
            (folder / "more").symlink_to(root / "beside")
    read = rows_at if kind == "rows" else lambda name, roots: resolve_model_source(name, roots, no_result)
    with pytest.raises(PermissionDeniedError) as caught:
        read("./folder", roots)
    assert caught.value.reason_name == "PATH_NOT_ALLOWED"


def test_a_folder_with_links_that_stay_within_the_roots_is_taken(root: Path, roots: AllowedRoots):
    """As the Hub's cache has them: names that link to blobs."""
    (root / "blobs").mkdir()
    (root / "blobs" / "0a1b").write_text("{}")
    (root / "folder" / "config.json").symlink_to("../blobs/0a1b")
    (root / "folder" / "self").symlink_to(".")
    assert resolve_model_source("./folder", roots, no_result).path == root / "folder"


def test_a_folder_with_the_files_of_a_whole_disk_is_refused(
    root: Path, roots: AllowedRoots, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(paths, "MOST_ENTRIES", 10)
    for number in range(11):
        (root / "folder" / str(number)).touch()
    with pytest.raises(PermissionDeniedError, match="more than 10 files"):
        rows_at("folder", roots)


def test_rows_that_are_a_pickle_are_refused(root: Path, roots: AllowedRoots):
    for name in ("rows.pkl", "rows.pickle", "rows.pt", "rows.npy", "rows.zip", "rows.tar.gz", "rows.py"):
        (root / name).write_bytes(b"\x80\x04.")
        with pytest.raises(InvalidFieldsError, match="must end in"):
            rows_at(name, roots)


def test_a_link_with_a_good_name_to_a_pickle_is_refused(root: Path, roots: AllowedRoots):
    (root / "rows.pkl").write_bytes(b"\x80\x04.")
    (root / "good.jsonl").symlink_to("rows.pkl")
    with pytest.raises(InvalidFieldsError):
        rows_at("good.jsonl", roots)


def test_the_servers_own_folders_are_allowed_but_not_told(root: Path, tmp_path: Path):
    cache = tmp_path / "home" / "cache"
    (cache / "gguf-1").mkdir(parents=True)
    (cache / "gguf-1" / "config.json").write_text("{}")
    roots = AllowedRoots([root], untold=[cache])
    assert resolve_model_source(str(cache / "gguf-1"), roots, no_result).path == cache / "gguf-1"
    (cache / "way-out").symlink_to(tmp_path / "secret.jsonl")
    for name in ("no such thing", "./missing", "../secret.jsonl", "/etc/passwd", "./way-out"):
        with pytest.raises(UnslothdError) as caught:
            resolve_model_source(name, roots, no_result)
        assert str(cache) not in caught.value.message


def test_results_are_not_written_through_a_link_out_of_the_output_root(tmp_path: Path):
    (tmp_path / "output").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "output" / "link").symlink_to(tmp_path / "outside")
    store = TrainingStore(tmp_path / "trainings", tmp_path / "output")
    for name in ("link", "link/run"):
        with pytest.raises(PermissionDeniedError):
            store.free_output_dir(name, explicit=True, taken=[])


class TestOpenInside:
    """What `open_inside` opens is what lies in the folder at that moment."""

    def test_a_file_in_the_folder_is_opened(self, root: Path):
        with open_inside(root / "rows.jsonl", root) as stream:
            assert stream.read() == b'{"text": "a"}\n'

    def test_a_link_is_not_even_to_a_file_in_the_folder(self, root: Path):
        (root / "latest.jsonl").symlink_to("rows.jsonl")
        with pytest.raises(OSError, match="symbolic links"):
            open_inside(root / "latest.jsonl", root)

    @pytest.mark.parametrize("name", ["link.jsonl", "outside/secret.jsonl", "../secret.jsonl", "zero.jsonl", "folder"])
    def test_what_lies_elsewhere_is_not(self, name: str, root: Path):
        with pytest.raises(OSError, match=r"another place|no regular file|symbolic links"):
            open_inside(root / name, root)

    @pytest.mark.timeout(20)
    def test_a_pipe_is_not_waited_for(self, root: Path):
        os.mkfifo(root / "pipe")
        with pytest.raises(OSError, match="no regular file"):
            open_inside(root / "pipe", root)

    def test_a_folder_that_becomes_a_link_after_the_look_is_noticed(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        (root / "folder" / "secret.jsonl").write_text("harmless")
        real_open = os.open

        def swap_then_open(path: Path, flags: int) -> int:
            (root / "folder").rename(root / "was")
            (root / "folder").symlink_to(root.parent)
            return real_open(path, flags)

        monkeypatch.setattr(os, "open", swap_then_open)
        with pytest.raises(OSError, match="another place"):
            open_inside(root / "folder" / "secret.jsonl", root)
