"""The registry of artifacts: what it keeps over a restart, and what it clears up."""

import json
from pathlib import Path

import pytest

from unslothd.v1.artifact_pb2 import Artifact, ArtifactFile, ExportFormat
from unslothd_server.app.artifacts import Artifacts
from unslothd_server.errors import NotFoundError
from unslothd_server.export_folder import partial_of

MERGED = ExportFormat.EXPORT_FORMAT_MERGED_16BIT


def finished(artifacts: Artifacts, folder: Path) -> Artifact:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    artifact = artifacts.begin(folder, MERGED)
    artifact.files.append(ArtifactFile(name="model.safetensors", num_bytes=7, sha256="0" * 64))
    artifacts.finish(artifact)
    return artifact


def refusal(artifacts: Artifacts, artifact_id: str) -> str:
    with pytest.raises(NotFoundError) as raised:
        artifacts.get(artifact_id)
    assert raised.value.reason_name == "ARTIFACT_NOT_FOUND"
    return raised.value.message


def test_a_finished_artifact_is_known_to_the_next_server(tmp_path: Path):
    artifact = finished(Artifacts(tmp_path / "state"), tmp_path / "export")
    assert Artifacts(tmp_path / "state").get(artifact.artifact_id) == artifact


def test_an_artifact_whose_folder_is_gone_is_not_found(tmp_path: Path):
    artifacts = Artifacts(tmp_path / "state")
    artifact = finished(artifacts, tmp_path / "export")
    (tmp_path / "export").rename(tmp_path / "moved")
    assert str(tmp_path / "export") in refusal(artifacts, artifact.artifact_id)


def test_an_artifact_that_is_being_written_is_not_found_yet(tmp_path: Path):
    artifacts = Artifacts(tmp_path / "state")
    assert refusal(artifacts, artifacts.begin(tmp_path / "export", MERGED).artifact_id)


def test_what_an_earlier_server_left_half_written_is_removed(tmp_path: Path):
    artifact = Artifacts(tmp_path / "state").begin(tmp_path / "export", MERGED)
    partial = partial_of(tmp_path / "export")
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert refusal(Artifacts(tmp_path / "state"), artifact.artifact_id)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert list((tmp_path / "state").iterdir()) == []


@pytest.mark.parametrize("content", ["", "[]", '{"version": 99}', '{"version": 1, "artifact": {"files": 3}}'])
def test_a_file_that_cannot_be_read_is_passed_over(tmp_path: Path, content: str):
    artifact = finished(Artifacts(tmp_path / "state"), tmp_path / "export")
    (tmp_path / "state" / "artifact-other.json").write_text(content)
    assert Artifacts(tmp_path / "state").get(artifact.artifact_id) == artifact


def test_the_file_of_an_artifact_says_its_version_and_is_nobody_elses_to_read(tmp_path: Path):
    artifact = finished(Artifacts(tmp_path / "state"), tmp_path / "export")
    path = tmp_path / "state" / f"{artifact.artifact_id}.json"
    assert json.loads(path.read_text())["version"] == 1
    assert path.stat().st_mode & 0o777 == 0o600


def test_discarding_removes_a_folder_only_if_it_is_the_exports_own(tmp_path: Path):
    artifacts = Artifacts(tmp_path / "state")
    (tmp_path / "export").mkdir()
    artifact = artifacts.begin(tmp_path / "export", MERGED)
    artifacts.discard(artifact, folder_is_ours=False)
    assert (tmp_path / "export").is_dir()
    artifacts.discard(artifact, folder_is_ours=True)
    assert not (tmp_path / "export").exists()
