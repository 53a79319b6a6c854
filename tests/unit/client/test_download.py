"""Files arrive whole, checked and inside their folder, however often the connection breaks."""

import asyncio
import errno
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

import unslothd
from unslothd import _download_folder, errors
from unslothd.v1 import artifact_pb2, service_pb2

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 40, "sub/empty.txt": b""}
CHUNK = 1000


def described(name: str, content: bytes) -> artifact_pb2.ArtifactFile:
    return artifact_pb2.ArtifactFile(name=name, num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def artifact(files: dict[str, bytes]) -> artifact_pb2.Artifact:
    return artifact_pb2.Artifact(artifact_id="a1", files=[described(*each) for each in files.items()])


def serving(files: dict[str, bytes], *, breaks_after: int | None = None) -> Callable[..., Iterator[object]]:
    """Serves files as the contract says; breaks the connection after so many bytes of content."""

    def serve(request: service_pb2.DownloadArtifactRequest, context: grpc.ServicerContext) -> Iterator[object]:
        left, offset = breaks_after, request.offset
        for name in sorted(request.names or files):
            content = files[name]
            if offset > len(content):
                context.abort(grpc.StatusCode.OUT_OF_RANGE, "beyond the end")
            yield service_pb2.DownloadArtifactResponse(file=described(name, content))
            if request.headers_only:
                continue
            for start in range(offset, len(content), CHUNK):
                if left is not None and left <= 0:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
                chunk = content[start : start + CHUNK]
                left = None if left is None else left - len(chunk)
                yield service_pb2.DownloadArtifactResponse(chunk=chunk)
            offset = 0

    return serve


def download_sync(target: str, source: object, folder: Path, **more: object) -> list[Path]:
    with unslothd.Client(target) as client:
        return client.download(source, folder, **more)


def download_async(target: str, source: object, folder: Path, **more: object) -> list[Path]:
    async def main() -> list[Path]:
        async with asyncio.timeout(30), unslothd.AsyncClient(target) as client:
            return await client.download(source, folder, **more)

    return asyncio.run(main())


@pytest.fixture(params=[download_sync, download_async], ids=["sync", "async"])
def download(request: pytest.FixtureRequest) -> Callable[..., list[Path]]:
    return request.param


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("source", ["a1", artifact(FILES)], ids=["by id", "by message"])
def test_all_files_of_an_artifact_arrive(server, tmp_path, download, source):
    server.script.on("DownloadArtifact", *[serving(FILES)] * 4)
    paths = download(server.target, source, tmp_path / "new")
    assert paths == [tmp_path / "new" / name for name in sorted(FILES)]
    assert contents(tmp_path / "new") == FILES


def test_only_the_named_files_arrive(server, tmp_path, download):
    server.script.on("DownloadArtifact", serving(FILES))
    download(server.target, ("t", 40), tmp_path, names=["adapter_config.json"])
    assert contents(tmp_path) == {"adapter_config.json": b"{}"}
    assert server.script.calls("DownloadArtifact") == [
        service_pb2.DownloadArtifactRequest(
            checkpoint=artifact_pb2.TrainingCheckpoint(training_id="t", step=40), names=["adapter_config.json"]
        )
    ]


def test_a_broken_download_goes_on_with_the_bytes_that_are_missing(server, tmp_path, download):
    server.script.on("DownloadArtifact", serving(FILES), *[serving(FILES, breaks_after=4000)] * 2, serving(FILES))
    server.script.on("DownloadArtifact", serving(FILES))
    download(server.target, artifact(FILES), tmp_path)
    assert contents(tmp_path) == FILES
    big = [each for each in server.script.calls("DownloadArtifact") if each.names == ["adapter_model.safetensors"]]
    assert [each.offset for each in big] == [0, 4000, 8000]


def test_a_broken_download_of_files_that_are_not_known_by_name_sends_nothing_twice(server, tmp_path, download):
    whole, broken = serving(FILES), serving(FILES, breaks_after=4000)
    server.script.on("DownloadArtifact", broken, whole, broken, broken, whole, whole)
    download(server.target, "a1", tmp_path)
    assert contents(tmp_path) == FILES
    assert [each.offset for each in server.script.calls("DownloadArtifact")] == [0, 0, 0, 4000, 8000, 0]


def test_a_single_large_file_whose_name_is_not_known_goes_on_where_it_stopped(server, tmp_path, download):
    files = {"model.gguf": bytes(range(256)) * 40}
    whole, broken = serving(files), serving(files, breaks_after=4000)
    server.script.on("DownloadArtifact", whole, broken, broken, *[whole] * 3)
    for _ in range(2):
        download(server.target, "a1", tmp_path)
        assert contents(tmp_path) == files
    assert [each.offset for each in server.script.calls("DownloadArtifact")] == [0, 0, 4000, 8000, 0, 0]


def test_a_later_call_goes_on_where_an_earlier_one_stopped(server, say, tmp_path):
    source = artifact(FILES)
    server.script.on("DownloadArtifact", serving(FILES), serving(FILES, breaks_after=4000), *[say.lose()] * 20)
    with (
        unslothd.Client(server.target, reconnect_timeout=0.2) as client,
        pytest.raises(errors.Unavailable, match="Socket closed"),
    ):
        client.download(source, tmp_path)
    assert set(contents(tmp_path)) == {"adapter_config.json", "adapter_model.safetensors.part"}
    server.script.handlers.clear()
    server.script.requests.clear()
    server.script.on("DownloadArtifact", *[serving(FILES)] * 3)
    download_sync(server.target, source, tmp_path)
    assert contents(tmp_path) == FILES
    assert [each.offset for each in server.script.calls("DownloadArtifact")] == [0, 4000, 0]


def test_what_is_here_is_not_written_again(server, tmp_path):
    server.script.on("DownloadArtifact", *[serving(FILES)] * 8)
    download_sync(server.target, "a1", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert len(download_sync(server.target, "a1", tmp_path)) == 3
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_unfinished_file_of_another_download_is_found_out_and_taken_anew(server, tmp_path, download):
    (tmp_path / "adapter_model.safetensors.part").write_bytes(b"of another file")
    server.script.on("DownloadArtifact", *[serving(FILES)] * 2)
    download(server.target, "a1", tmp_path, names=["adapter_model.safetensors"])
    assert contents(tmp_path) == {"adapter_model.safetensors": FILES["adapter_model.safetensors"]}
    assert [each.offset for each in server.script.calls("DownloadArtifact")] == [15, 0]


def test_an_unfinished_file_that_is_longer_than_the_file_is_taken_anew(server, tmp_path):
    (tmp_path / "adapter_config.json.part").write_bytes(b"longer than two bytes")
    server.script.on("DownloadArtifact", *[serving(FILES)] * 2)
    download_sync(server.target, "a1", tmp_path, names=["adapter_config.json"])
    assert contents(tmp_path) == {"adapter_config.json": b"{}"}


def test_bytes_with_another_hash_are_not_kept(server, say, tmp_path, download):
    file = described("x.bin", b"right")
    responses = [
        service_pb2.DownloadArtifactResponse(file=file),
        service_pb2.DownloadArtifactResponse(chunk=b"wrong"),
    ]
    server.script.on("DownloadArtifact", *[say.messages(*responses)] * 2)
    with pytest.raises(errors.UnslothdError, match="another sha256") as caught:
        download(server.target, "a1", tmp_path)
    assert caught.value.code is grpc.StatusCode.DATA_LOSS
    assert contents(tmp_path) == {}


def test_a_file_of_the_same_name_is_kept_unless_overwriting_is_allowed(server, tmp_path):
    (tmp_path / "adapter_config.json").write_text("mine")
    server.script.on("DownloadArtifact", *[serving(FILES)] * 6)
    with pytest.raises(FileExistsError, match="another file of this name"):
        download_sync(server.target, "a1", tmp_path)
    assert contents(tmp_path) == {"adapter_config.json": b"mine"}
    download_sync(server.target, "a1", tmp_path, overwrite=True)
    assert contents(tmp_path) == FILES


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "", ".", "..", "a//b", "a\\b", "c:x", "a\0b"])
def test_a_name_that_leads_out_of_the_folder_is_refused(server, say, tmp_path, name):
    folder = tmp_path / "folder"
    response = service_pb2.DownloadArtifactResponse(file=described(name, b"evil"))
    server.script.on("DownloadArtifact", say.messages(response, service_pb2.DownloadArtifactResponse(chunk=b"evil")))
    with pytest.raises(errors.PermissionDenied, match="would not stay inside"):
        download_sync(server.target, "a1", folder)
    assert contents(tmp_path) == {}


def test_a_link_that_leads_out_of_the_folder_is_not_followed(server, tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    (folder / "sub").symlink_to(outside)
    server.script.on("DownloadArtifact", serving({"sub/x": b"evil"}))
    with pytest.raises(errors.PermissionDenied, match="would not stay inside"):
        download_sync(server.target, "a1", folder)
    assert list(outside.iterdir()) == []


def test_an_unfinished_file_that_is_a_link_is_not_written_through(server, tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.write_text("mine")
    folder.mkdir()
    (folder / "x.part").symlink_to(outside)
    server.script.on("DownloadArtifact", *[serving({"x": b"evil"})] * 2)
    with pytest.raises(OSError, match=r"x\.part"):
        download_sync(server.target, "a1", folder)
    assert outside.read_text() == "mine"


def test_a_full_disk_is_said_and_what_has_come_is_kept(server, tmp_path, monkeypatch):
    class FullDisk(_download_folder.FileIO):
        def write(self, data: bytes) -> int:
            if self.tell() >= 3000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    server.script.on("DownloadArtifact", *[serving(FILES)] * 2)
    name = "adapter_model.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(_download_folder, "FileIO", FullDisk)
        with pytest.raises(errors.ResourceExhausted, match="on this machine is full; free some space"):
            download_sync(server.target, "a1", tmp_path, names=[name])
    assert (tmp_path / f"{name}.part").stat().st_size == 3000
    download_sync(server.target, "a1", tmp_path, names=[name])
    assert contents(tmp_path) == {name: FILES[name]}


def test_progress_counts_the_bytes_that_are_here(server, tmp_path, download):
    name = "adapter_model.safetensors"
    (tmp_path / f"{name}.part").write_bytes(FILES[name][:9500])
    server.script.on("DownloadArtifact", serving(FILES))
    seen: list[unslothd.DownloadProgress] = []
    download(server.target, "a1", tmp_path, names=[name], on_progress=seen.append)
    assert [(each.name, each.done, each.num_bytes) for each in seen] == [(name, 9500, 10240), (name, 10240, 10240)]


def test_a_download_of_what_was_deleted_is_the_servers_error(server, say, tmp_path):
    refusal = say.refuse(grpc.StatusCode.NOT_FOUND, "ARTIFACT_NOT_FOUND", "the files are gone")
    server.script.on("DownloadArtifact", refusal)
    with pytest.raises(errors.NotFound, match="the files are gone"):
        download_sync(server.target, "a1", tmp_path / "new")
    assert not (tmp_path / "new").exists()
