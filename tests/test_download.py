"""data.py's downloads, from a server of this machine in the place of VOC's own."""

import functools
import hashlib
import http.server
import shutil
import socket
import tarfile
import threading
from pathlib import Path

import pytest
from conftest import write_voc
from torchvision.datasets import voc as torchvision_voc

import data


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """Two small archives on a server of this machine in the place of VOC's own."""
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path / "data")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    given = {"2007": {"train": 2, "val": 1}, "2007-test": {"test": 2}, "2012": {"val": 3}}
    for key, splits in given.items():
        write_voc(tmp_path / key / "VOCdevkit" / f"VOC{key[:4]}", splits)
        archive = tmp_path / f"{key}.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(tmp_path / key / "VOCdevkit", "VOCdevkit")
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        local = {"url": f"http://127.0.0.1:{server.server_port}/{archive.name}", "md5": md5}
        entry = torchvision_voc.DATASET_YEAR_DICT[key] | local
        monkeypatch.setitem(torchvision_voc.DATASET_YEAR_DICT, key, entry)
    yield tmp_path
    server.shutdown()
    server.server_close()
    socket.setdefaulttimeout(None)


def test_download_fetches_only_what_is_missing(archives, capsys):
    labels = []

    def progress(items, label):
        labels.append(label)
        return items

    assert len(data.load_dataset("voc2007", "train", 32, progress=progress)) == 2
    assert labels == ["reading train, 0.0 GiB"]
    fetched = sorted(path.name for path in (archives / "data").glob("*.tar"))
    assert fetched == ["VOCtrainval_06-Nov-2007.tar"]
    (archives / "2007.tar").unlink()  # it is there already, so it is not asked for again
    (archives / "data" / "VOCtrainval_06-Nov-2007.tar").unlink()
    assert len(data.load_dataset("voc2007", "val", 32)) == 1
    assert capsys.readouterr().out.count("downloading") == 1
    assert len(data.load_dataset("voc2007", "test", 32)) == 2
    val = data.load_dataset("voc2012", "val", 32)
    assert len(val) == 3 and val.root == (archives / "data/VOCdevkit/VOC2012").resolve()
    with pytest.raises(data.DataError, match="VOC2012: has no test.txt; .* or take val.* all"):
        data.load_dataset("voc2012", "test", 32)


ERROR = r"^http://\S+: .*; save it as \S+data/VOCtrainval\S+ \(md5 [0-9a-f]{32}\) by other means$"


def test_an_archive_that_is_cut_short_or_a_web_page_is_refused_and_then_repaired(archives):
    archive = archives / "2007.tar"
    whole = archive.read_bytes()
    for wrong in (whole[: len(whole) // 2], b"<html>this page has moved</html>"):
        archive.write_bytes(wrong)
        with pytest.raises(data.DataError, match=ERROR):
            data.load_dataset("voc2007", "train", 32)
        assert not (archives / "data" / "VOCdevkit").exists()
    archive.write_bytes(whole)
    assert len(data.load_dataset("voc2007", "train", 32)) == 2


def test_unpacking_that_was_interrupted_is_done_again(archives, monkeypatch):
    copy = tarfile.copyfileobj
    for whole in range(6):  # 3 images and 3 masks; a list, the sign of the end, is written at once
        left = iter([copy] * whole)

        def interrupted(source, target, *args, left=left, **kwargs):
            if part := next(left, None):
                return part(source, target, *args, **kwargs)
            target.write(source.read(3))
            raise KeyboardInterrupt

        shutil.rmtree(archives / "data", ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(tarfile, "copyfileobj", interrupted)
            with pytest.raises(KeyboardInterrupt):
                data.download_voc("voc2007", "train")
        assert len(data.load_dataset("voc2007", "train", 32)) == 2


def test_hosts_that_are_down_silent_or_lack_the_file_are_one_clear_error(archives, monkeypatch):
    (archives / "2007.tar").unlink()
    with pytest.raises(data.DataError, match=ERROR):  # 404
        data.load_dataset("voc2007", "train", 32)
    monkeypatch.setattr(data, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/2007.tar"
        entry = torchvision_voc.DATASET_YEAR_DICT["2007"] | {"url": address}
        monkeypatch.setitem(torchvision_voc.DATASET_YEAR_DICT, "2007", entry)
        with pytest.raises(data.DataError, match=ERROR):
            data.load_dataset("voc2007", "train", 32)
    with pytest.raises(data.DataError, match=ERROR):  # now nobody listens there
        data.load_dataset("voc2007", "train", 32)


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python has no such check")
@pytest.mark.parametrize("name", ["../outside.txt", "/tmp/outside-of-the-folder.txt"])
def test_an_archive_with_paths_outside_the_folder_writes_nothing_there(archives, monkeypatch, name):
    archive = archives / "2007.tar"
    with tarfile.open(archive, "a") as tar:
        tar.addfile(tarfile.TarInfo(name))
    entry = torchvision_voc.DATASET_YEAR_DICT["2007"]
    entry |= {"md5": hashlib.md5(archive.read_bytes()).hexdigest()}
    monkeypatch.setitem(torchvision_voc.DATASET_YEAR_DICT, "2007", entry)
    if name.startswith("/"):  # made relative to the folder, as tar does
        data.load_dataset("voc2007", "train", 32)
        assert not Path(name).exists()
    else:
        with pytest.raises(data.DataError, match=ERROR):
            data.load_dataset("voc2007", "train", 32)
    assert not (archives / "outside.txt").exists()
