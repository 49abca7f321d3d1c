"""datasets.txt, its readers on miniatures of every official layout, bad tables, downloads."""

import contextlib
import csv
import hashlib
import http.server
import io
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import soundfile
from conftest import ROOT, refused, script

import extract
from extract import Stop

ASSETS = ROOT / "tests/assets/datasets"


def put(root, files):
    """Write {path: text or bytes} below data/<root>/."""
    for name, content in files.items():
        file = pathlib.Path("data", root, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode("latin-1"))


def noise(seconds, rate=16000, channels=1):
    """A wav file of noise."""
    wave = np.random.default_rng(0).normal(0, 0.1, (round(seconds * rate), channels))
    soundfile.write(file := io.BytesIO(), wave, rate, format="WAV")
    return file.getvalue()


def read(name, rows=None):
    """({(path, start): (split, labels)}, missing, classes, events) of data/<name>/."""
    extract.files_by_name.cache_clear()
    rows = rows or extract.READERS.get(name, extract.manifest)(f"data/{name}")
    task = "single" if name in ("esc50", "sc2", "fsdd") else "multi"
    clips, *others = extract.read_clips(f"data/{name}", rows, task)
    return {clip[:2]: (clip.split, ";".join(sorted(clip.labels))) for clip in clips}, *others


# ---- datasets.txt
def test_all_datasets_and_their_files():
    """Task, seconds, classes and the names of all files, as listed in assets/datasets/all.txt."""
    sets = extract.read_datasets(ROOT / "datasets.txt")
    urls = [url for *_, some in sets.values() for url in some]
    files = {url: re.sub("[?#].*", "", url).split("/")[-1] for url in urls}
    lines = [" ".join([name, task, f"{seconds:g} {classes}", *(files[url] for url in some)])
             for name, (task, seconds, classes, some) in sets.items()]
    assert lines == (ASSETS / "all.txt").read_text().splitlines()
    assert all(re.fullmatch("https://[^{}]+", url) for url in urls)
    assert len(set(files.values())) == len(urls), "two files of one name"
    assert re.search("#[0-9a-f]{64}$", sets["sc2"][3][0])


def test_lines_of_datasets_txt():
    pathlib.Path("datasets.txt").write_text(
        "\ufeff# a comment\n\none multi 2.5 3  # another\n  # more\ntwo single 1 2 "
        "http://h/d/{08..10}.tar?a  # {1..2}\n    {1..2}.csv http://i/a.zip#00ff\n# between\n"
        "\tb.zip\n", "utf-8")
    assert extract.read_datasets() == {"one": ("multi", 2.5, 3, []), "two": ("single", 1, 2, [
        "http://h/d/08.tar?a", "http://h/d/09.tar?a", "http://h/d/10.tar?a", "http://h/d/1.csv",
        "http://h/d/2.csv", "http://i/a.zip#00ff", "http://i/b.zip"])}


@pytest.mark.parametrize("text", [
    "one", "one multi 10", "one many 10 2", "one multi ten 2", "one multi nan 2", "one 10 2 multi",
    "one multi 10 2.5", "one multi -1 2", "one multi 10 http://a/b.zip", "one multi 10 2 b.zip",
    "  one multi 10 2", "  http://a/b.zip", "one multi 10 2\none single 1 2"])
def test_malformed_last_line_of_datasets_txt(text):
    put("..", {"datasets.txt": f"# comment\n\n{text}\n"})
    with pytest.raises(Stop, match=f"datasets.txt:{3 + text.count(chr(10))}:"):
        extract.read_datasets()


# ---- miniatures of every official layout: in assets/datasets/, <name>/ are the tables as they
# unpack; <name>.clips.csv and <name>.events.csv what is read; <name>.missing.csv has no audio
SAME_TABLES = {"desed_public": "desed", "spass28": "spass"}
NOT_READ = {"sc2": ["_background_noise_/tap.wav"], "mine": ["id_3.0_4.wav"]}


def put_miniature(name):
    """Write it, with empty audio, and return what must be read from it."""
    def stored(kind):
        file = ASSETS / f"{name}.{kind}.csv"
        return list(csv.reader(file.read_text().splitlines()[1:])) if file.exists() else []

    clips, missing = ({(path, float(start)): (split, labels) for path, start, split, labels in
                       stored(kind)} for kind in ("clips", "missing"))
    events = [(path, float(a), float(b), label) for path, a, b, label in stored("events")]
    shutil.copytree(ASSETS / SAME_TABLES.get(name, name), f"data/{name}")
    put(name, dict.fromkeys([*(path for path, _ in clips), *NOT_READ.get(name, [])], ""))
    classes = {*";".join(labels for _, labels in (clips | missing).values()).split(";")} - {""}
    return clips, {key: split for key, (split, _) in missing.items()}, sorted(classes), events


@pytest.mark.parametrize("name", [
    "as20k", "fsd50k", "desed", "desed_public", "urban", "esc50", "sc2", "fsdd", "spass", "spass28",
    "mine"])
def test_miniature(name):
    assert put_miniature(name) == read(name)


def test_files_below_spass():
    """Folders may be links; two files of one name are refused."""
    clips = put_miniature("spass")[0]
    shutil.move("data/spass/Park audio files", "elsewhere")
    os.symlink(os.path.abspath("elsewhere"), "data/spass/Park audio files")
    assert read("spass")[0] == clips
    put("spass/copy", {"park_wind.wav": ""})
    with pytest.raises(Stop, match="(Park audio files|copy)/park_wind.* and .*/park_wind.wav"):
        read("spass")


# ---- BirdSet
def bird(path, code, events=((0.5, 1.5),), clusters=(0,), secondary=(), length=12, labels=()):
    return {"filepath": path, "ebird_code": code, "ebird_code_multilabel": list(labels),
            "ebird_code_secondary": list(secondary), "length": length, "call_type": ["song"],
            "detected_events": [list(map(float, event)) for event in events],
            "event_cluster": list(clusters)}


@pytest.mark.parametrize("name", ["hsn", "nbp", "nes", "per", "pow", "sne", "uhh"])
def test_birdset(name):
    """70 recordings of one species, three of others, three segments."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    train = [bird(f"XC{i:04d}.ogg", "daejun", [(3, 5), (8, 9)], [0, 0]) for i in range(70)]
    train += [bird("XC1000.ogg", "whcspa", [(1, 2), (6.5, 8.5), (20, 30)], [1, 1, -1]),
              bird("XC1001.ogg", "whcspa", length=21), bird("XC1002.ogg", "rare", [], [], ["x"])]
    test = [bird(f"{name}_{i}.ogg", None, [], [], length=None, labels=labels)
            for i, labels in enumerate((["daejun", "whcspa"], [], ["onlytest"]))]
    put(name, {f"shard_1/train/{row['filepath']}": "" for row in train})
    put(name, {row["filepath"]: "" for row in test})
    for split, rows in (("train", train), ("test_5s", test)):
        types = pyarrow.Table.from_pylist(train + test).schema
        parquet.write_table(pyarrow.Table.from_pylist(rows, types),
                            f"data/{name}/{name.upper()}_metadata_{split}.parquet")
    clips, missing, classes, events = read(name)
    assert classes == ["daejun", "onlytest", "rare", "whcspa"] and not missing and not events
    assert {path: labels for (path, _), (split, labels) in clips.items() if split == "test"} == {
        f"{name}_0.ogg": "daejun;whcspa", f"{name}_1.ogg": "", f"{name}_2.ogg": "onlytest"}
    juncos = {key for key, clip in clips.items() if clip == ("train", "daejun")}
    assert len(juncos) == 64 == len({path for path, _ in juncos})  # one clip per recording
    assert {start for _, start in juncos} == {1.5, 6}  # 5 s around (3, 5) or (8, 9)
    assert {key for key, clip in clips.items() if clip[0] == "train"} - juncos == {
        ("shard_1/train/XC1000.ogg", 0), ("shard_1/train/XC1000.ogg", 5)}  # no fill-up
    assert read(name)[0] == clips != read(name, extract.birdset(f"data/{name}", seed=2))[0]


def test_birdset_needs_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(Stop, match="pip install pyarrow"):
        read("hsn")


@pytest.mark.parametrize("starts, events, clusters, more", [
    ([4.5], [(6, 8)], [0], {}), ([0], [(0.5, 1)], [0], {}), ([7], [(11, 12)], [0], {}),  # centered
    ([9], [(11, 12)], [0], {"length": 0}), ([0], [(1, 2)], [0], {"length": 3}),    # 0: not known
    ([4.5], [(6, 8)], [0], {"length": 20}), ([], [(6, 8)], [0], {"length": 20.5}),
    ([], [(6, 8)], [0], {"secondary": ["y"]}), ([0], [], [], {}),      # no event: the first 5 s
    ([4.5], [(6, 8)], [-1], {}), ([0], [(6, 8), (8, 9)], [-1, -1], {}),  # noise, if it is alone
    ([3], [(6, 8), (1, 8), (4, 7)], [-1, -1, 3], {}),
    ([3, 6], [(3, 4), (5, 6), (8, 9)], [2, 7, 7], {}),                 # the larger cluster
    ([3, 6], [(3, 4), (5, 6), (8, 9), (7, 8)], [2, 1, 1, 2], {}),      # the first of equals
    ([3.5], [(3, 9), (4, 5), (6, 7)], [0, 0, 0], {}),                  # events inside another
    ([1.5, 3.5], [(3, 9), (3, 5)], [0, 0], {}), ([0], [(0, 1), (1, 2)], [0, 0], {})])  # equal clips
def test_few_shot_clips_of_a_recording(starts, events, clusters, more):
    rows = [bird("a", "x", events, clusters, **more)]
    assert sorted(start for _, start in extract.few_shot(rows, 9, 5, 1)) == starts


def test_few_shot_counts():
    rows = [bird(f"a{i:02d}", "many", [(3, 4), (8, 9)], [0, 0]) for i in range(30)]
    rows += [bird(f"b{i}", "few", [(3, 4), (6, 7), (9, 10)], [0, 0, 0]) for i in range(3)]

    def shots(k, rows, seed=1):
        return [(row["ebird_code"], row["filepath"], start)
                for row, start in extract.few_shot(rows, k, 5, seed)]

    many, few, one = ([shot for shot in shots(5, rows + [bird("c", "one")]) if shot[0] == name]
                      for name in ("many", "few", "one"))
    assert len(many) == 5 == len({path for _, path, _ in many})  # primaries before the others
    assert len(set(few)) == 5 == len(few) and {path for _, path, _ in few} == {"b0", "b1", "b2"}
    assert one == [("one", "c", 0)]  # no fill-up
    assert sum(name == "few" for name, _, _ in shots(99, rows)) == 9
    assert shots(5, rows) == shots(5, rows[::-1]) != shots(5, rows, seed=2)


# ---- tables
def test_splits_and_audio_endings():
    names = ("train training dev Train valid val Val validate validation test eval evaluation "
             "testing").split()
    put("mine", dict.fromkeys([*names, "a.ogg", "c.mp3", "shard/deep/d.flac"], ""))
    clips = read("mine", [(name, name, []) for name in names])[0]
    assert [split for split, _ in clips.values()] == 4 * ["train"] + 5 * ["valid"] + 4 * ["test"]
    wanted = "a.wav", "b.wav", "c.flac", "**/d.ogg", "**/e.wav"
    clips, missing, *_ = read("mine", [(path, "fold A", ["x"]) for path in wanted])
    assert [path for path, _ in clips] == ["a.ogg", "c.mp3", "shard/deep/d.flac"]
    assert missing == dict.fromkeys([("b.wav", 0), ("**/e.wav", 0)], "fold A")


MANY = "\nb.wav,test,y"
BROKEN = (
    ("manifest.csv:2", "a.wav,train,x,y"), ("0 classes", ""), ("1 classes", "a.wav,train,x"),
    ("manifest.csv:5", "\n# comment\na.wav,train,x\nb.wav,test"), ("split", "a.wav,,x"),
    ("UTF-8", "a.wav,train,h\xfcndin"), ("labels", 'a.wav,train,"x' + 9 * MANY),
    ("quote", '"a.wav,train,x' + 9 * MANY), ("limit", '"a.wav,train,x' + 20000 * MANY),
    ("a.wav", "a.wav,train,\n" + MANY), ("b.wav", "a.wav,train,x\nb.wav,test,x;y"),
    ("gone.wav", "gone.wav,train,x\na.wav,train,y"))


@pytest.mark.parametrize("name, table, text, word", [
    *(("mine", "manifest.csv", "path,split,labels\n" + text, word) for word, text in BROKEN),
    *(("mine", "manifest.csv", f"path,split,labels,start\na.wav,train,x,{start}", start)
      for start in ("soon", "-1", "nan")),
    ("mine", "manifest.csv", "file,split,labels\na.wav,train,x", "need"),
    ("mine", "manifest.csv", "path;split;labels\na.wav;train;x", "need"),
    ("mine", "manifest.csv", "", "0 classes"), ("fsd50k", "a.wav", "", "data/fsd50k"),
    ("urban", "annotations/test/a.txt", "0\t1\tx;y", "x;y"), ("gone", "a.wav", "", "gone"),
    ("urban", "annotations/test/a.txt", "0\tend\tx", "end"),
    ("urban", "annotations/test/a.txt", "0\t1", "values"),
    ("hsn", "HSN_metadata_train.parquet", "version https://git-lfs.github.com/", "arquet")])
def test_tables_that_cannot_be_read(name, table, text, word):
    if name == "hsn":
        pytest.importorskip("pyarrow")
    put(name, {table: text, "a.wav": "", "b.wav": "", "audio/test/a.wav": ""})
    sets = "mine single 1 2\nfsd50k multi 1 2\nurban multi 1 2\nhsn multi 1 2\n"
    put("..", {"datasets.txt": sets})
    refused(script("extract.py", "--data", name), word)


def test_tokens_do_not_depend_on_the_order_of_the_table():
    rows = [f"{i}.wav,{'test' if i % 3 else 'train'},{'xy'[i % 2]},{i / 8}" for i in range(11)]
    events, dumps = "path,onset,offset,label\n3.wav,0.5,1.25,y\n", []
    put("mine", {f"{i}.wav": noise(2 + i / 4, 8000 if i == 3 else 16000) for i in range(11)})
    put("..", {"datasets.txt": "mine multi 1 2\n"})
    for order in rows, rows[::2] + rows[1::2]:
        manifest = "\n".join(["path,split,labels,start", *order])
        put("mine", {"manifest.csv": manifest, "events.csv": events})
        assert script("extract.py", "--data", "mine", "--overwrite").returncode == 0
        dump = pathlib.Path("tokens/mine/logmel")
        clips = [line.split(",")[0] for line in (dump / "clips.csv").read_text().splitlines()[1:]]
        assert clips == [row.split(",")[0] for row in order]
        assert (dump / "events.csv").read_text() == events
        tokens = np.load(dump / "tokens.npy")
        dumps.append({clip: x.tobytes() for clip, x in zip(clips, tokens, strict=True)})
    assert dumps[0] == dumps[1] and len(set(dumps[0].values())) == 11


# ---- downloads and archives
class Server(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        name = self.path.split("?")[0][1:]
        self.server.log.append(name)
        if name not in self.server.files:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.files[name])))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # whoever only wants the length hangs up
            self.wfile.write(self.server.files[name][:self.server.cut])


@pytest.fixture
def site():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.files, server.log, server.cut = {}, [], None
        server.url = f"http://127.0.0.1:{server.server_port}/"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


BODY = bytes(range(256)) * 4000
SHA256 = "#" + hashlib.sha256(BODY).hexdigest()


@pytest.mark.parametrize("url, body, cut, word", [
    ("{}a.bin?download=1", BODY, None, ""), ("{}a.bin" + SHA256, BODY, None, ""),
    ("{}a.bin" + SHA256, BODY[:-1] + b"x", None, "hash"), ("{}a.bin", BODY, 400000, "1,024,000"),
    ("{}a.bin", BODY, 0, "1,024,000"), ("{}b.bin", BODY, None, "404"),
    ("http://127.0.0.1:9/a.bin", BODY, None, "127.0.0.1:9")])
def test_download(site, url, body, cut, word):
    site.files["a.bin"], site.cut = body, cut
    with pytest.raises(Stop, match=f"{word}.*by hand") if word else contextlib.nullcontext():
        extract.download(url.format(site.url), "got/a.bin")
    assert os.path.exists("got/a.bin") != bool(word)  # a failed one never passes as complete
    site.files["a.bin"], site.cut = BODY, None
    extract.download(site.url + "a.bin", "got/a.bin")
    assert pathlib.Path("got/a.bin").read_bytes() == BODY and os.listdir("got") == ["a.bin"]


TREE = {"audio/a.wav": np.random.default_rng(0).bytes(200000), "audio/b.wav": b"", "b.csv": b"x"}


def archive(kind, files):
    out = io.BytesIO()
    with (zipfile.ZipFile(out, "w") if kind == "zip" else
          tarfile.open(fileobj=out, mode="w:gz" if kind == "tar.gz" else "w")) as f:
        for name, content in files.items():
            if kind == "zip":
                f.writestr(name, content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                f.addfile(info, io.BytesIO(content))
    return out.getvalue()


def fetch(site):
    """The tree in data/one/ after fetching all files of the site."""
    extract.fetch_dataset("data/one", [f"{site.url}{name}?download=1" for name in site.files])
    assert os.listdir("data") == ["one"]
    return {path.relative_to("data/one").as_posix(): path.read_bytes()
            for path in pathlib.Path("data/one").rglob("*") if path.is_file()}


@pytest.mark.parametrize("files", [
    *({f"a.{kind}": archive(kind, {top + name: TREE[name] for name in TREE})}
      for kind in ("zip", "tar", "tar.gz") for top in ("", "ESC-50-5983fb0/")),
    {"a.zip": archive("zip", {"audio/a.wav": TREE["audio/a.wav"]}), "b.csv": TREE["b.csv"],
     "b.tar.gz": archive("tar.gz", {"audio/b.wav": b""})}])
def test_archives(site, files):
    site.files = files
    assert fetch(site) == TREE


@pytest.mark.skipif(not shutil.which("zip"), reason="needs the program zip")
@pytest.mark.parametrize("lack, word", [("", ""), ("part", "zip cannot"), ("zip", "program zip")])
def test_split_zips(site, monkeypatch, lack, word):
    tree = {f"{name}/{i}.wav": np.random.bytes(40000) for name in "ab" for i in range(5)}
    put("..", tree)
    for name in "ab":
        subprocess.run(["zip", "-qrs", "64k", f"{name}.zip", name], check=True)
        site.files |= {str(p): p.read_bytes() for p in sorted(pathlib.Path().glob(f"{name}.z*"))}
    assert len(site.files) == 8
    if lack == "part":
        del site.files["a.z02"]
    monkeypatch.setenv("PATH", "" if lack == "zip" else os.environ["PATH"])
    with pytest.raises(Stop, match=word) if lack else contextlib.nullcontext():
        assert fetch(site) == tree
    assert os.path.exists("data/one") == (not lack)


@pytest.mark.parametrize("name", ["../out.wav", "a/../../out.wav", "{}/out.wav"])
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_members_outside_the_folder_do_not_escape(site, tmp_path, kind, name):
    site.files[f"a.{kind}"] = archive(kind, {"good.wav": b"1", name.format(tmp_path): b"2"})
    with contextlib.suppress(Stop):
        fetch(site)
    assert os.listdir() == ["data"]
    assert {*os.listdir("data")} <= {"one", "one.download", "one.unpacking"}


ZIP, TAR, TAR_GZ = (archive(kind, TREE) for kind in ("zip", "tar", "tar.gz"))


@pytest.mark.parametrize("name, body", [
    ("a.zip", ZIP[:-30]), ("a.zip", ZIP[:999] + bytes(9) + ZIP[1008:]), ("a.zip", b"<html>log in"),
    ("a.tar.gz", TAR_GZ[:99999]), ("a.tar.gz", TAR_GZ[:99999] + bytes(9) + TAR_GZ[100008:]),
    ("a.tar", TAR[:99999]), ("a.tar", b"<html>")])
def test_damaged_archives(site, name, body):
    site.files[name] = body
    with pytest.raises(Stop, match="cannot be unpacked.*delete it"):
        fetch(site)
    assert not os.path.exists("data/one")
    os.remove(f"data/one.download/{name}")
    site.files[name] = archive(name[2:], TREE)
    assert fetch(site) == TREE


def test_interrupted_fetch_downloads_nothing_twice(site, monkeypatch):
    def killed(file, folder, **kwargs):
        put("one.unpacking", {"audio/half of it.wav": ""})
        raise KeyboardInterrupt

    site.files = {"a.zip": ZIP}
    with pytest.raises(Stop, match="404"):
        extract.fetch_dataset("data/one", [site.url + "a.zip", site.url + "c.csv"])
    site.files["c.csv"], site.log[:] = b"y", []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "unpack_archive", killed)
        fetch(site)
    assert {*site.log} == {"c.csv"} and {*os.listdir("data")} == {"one.download", "one.unpacking"}
    site.log.clear()
    assert fetch(site) == TREE | {"c.csv": b"y"} and not site.log


def test_as20k_from_its_addresses_to_tokens(site):
    clips, _, classes, _ = put_miniature("as20k")
    sounds = noise(2, 48000), noise(9, 44100, 2), noise(12, 16000, 6)
    put("as20k", {path: sound for (path, _), sound in zip(clips, sounds)})
    site.files = {path.name: path.read_bytes() for path in pathlib.Path("data/as20k").glob("*.csv")}
    shutil.make_archive("audio", "tar", "data/as20k", "audio")
    site.files["bal_train.tar"] = pathlib.Path("audio.tar").read_bytes()
    shutil.rmtree("data")
    line = f"as20k multi 10 6 {site.url}bal_train.tar\n  {' '.join([*site.files][:3])}\n"
    put("..", {"datasets.txt": line})
    refused(script("extract.py", "--data", "as20k"), "1 of 4", "0gone", "--allow-bad")
    run = script("extract.py", "--data", "as20k", "--allow-bad")
    report = [row.split() for row in run.stdout.splitlines()]
    assert [row[:4] + row[-1:] for row in report if row[0] in ("train", "test")] == [
        ["train", "2", "1", "0", "25.0%"], ["test", "1", "0", "0", "33.3%"]], run.stderr
    dump = pathlib.Path("tokens/as20k/logmel")
    assert dump.joinpath("classes.txt").read_text().splitlines() == classes
    assert np.load(dump / "labels.npy").tolist() == [
        [name in labels.split(";") for name in classes] for _, labels in clips.values()]
    assert np.load(dump / "tokens.npy").any((1, 2)).tolist() == [True] * 3
