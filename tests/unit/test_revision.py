"""A model's revision tells its files apart, and a commit of the Hub is taken as it is."""

from __future__ import annotations

from pathlib import Path

from legit_worker.models.revision import revision_of


def test_a_folder_has_the_hash_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = revision_of(str(tmp_path), None)
    assert first is not None
    assert first.startswith("sha256:")
    (tmp_path / "notes.log").write_text("nothing that computes")
    assert revision_of(str(tmp_path), None) == first
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    second = revision_of(str(tmp_path), None)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    assert len({first, second, revision_of(str(tmp_path), None)}) == 3


def test_a_snapshot_of_the_hub_has_its_commit(tmp_path: Path) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / ("c0ffee" * 6 + "1234")
    folder.mkdir(parents=True)
    assert revision_of(str(folder), None) == folder.name


def test_a_folder_of_ones_own_among_snapshots_has_the_hash_of_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / "minilm"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    assert (revision_of(str(folder), None) or "").startswith("sha256:")


def test_a_model_that_is_not_here_has_none(tmp_path: Path) -> None:
    assert revision_of(str(tmp_path / "nothing"), None) is None
