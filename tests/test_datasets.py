"""datasets.txt, its readers on miniatures of every official layout, bad tables, downloads."""

import contextlib
import csv
import functools
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

def read(name, rows=None):
    """({(path, start): (split, labels)}, missing, classes, events) of data/<name>/."""
    extract.files_by_name.cache_clear()
    rows = rows or (extract.READERS[name](f"data/{name}") if name in extract.READERS else
                    extract.own(f"data/{name}", 10))
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
        "\ufeff# a comment\n\none multi 2.5 3  # another\n  # more\ntwo single 1 2 http://h/d/"
        "{08..10}.tar?a  # {1..2}\n  {1..2}.csv http://i/a.zip#00ff\n# between\n\tb.zip\n", "utf-8")
    assert extract.read_datasets() == {"one": ("multi", 2.5, 3, []), "two": ("single", 1, 2, [
        "http://h/d/08.tar?a", "http://h/d/09.tar?a", "http://h/d/10.tar?a", "http://h/d/1.csv",
        "http://h/d/2.csv", "http://i/a.zip#00ff", "http://i/b.zip"])}

@pytest.mark.parametrize("text", [
    "one multi 10", "one many 10 2", "one multi nan 2", "one multi 10 2.5", "one multi -1 2",
    "one multi 10 2 b.zip", "  one multi 10 2", "  http://a/b.zip", 2 * "one single 1 2\n"])
def test_malformed_last_line_of_datasets_txt(text):
    put("..", {"datasets.txt": f"# comment\n\n{text}\n"})
    with pytest.raises(Stop, match=f"datasets.txt:{2 + len(text.splitlines())}:"):
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

@pytest.mark.parametrize("name", "as20k fsd50k desed desed_public urban esc50 sc2 fsdd spass "
                                 "spass28 mine".split())
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
            "ebird_code_secondary": list(secondary), "length": length,
            "detected_events": [[*map(float, event)] for event in events],
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
    types = pyarrow.Table.from_pylist(train + test).schema
    for split, rows, folder in (("train", train, "shard_1/train/"), ("test_5s", test, "")):
        put(name, {folder + row["filepath"]: "" for row in rows})
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
    assert read(name)[0] == clips

def test_birdset_needs_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    put("hsn", {"a.ogg": ""})
    shutil.copy(ROOT / "datasets.txt", "datasets.txt")
    refused(script("extract.py", "--data", "hsn"), "pyarrow")

@pytest.mark.parametrize("starts, events, clusters, more", [
    ([0], [(0.5, 1)], [0], {}), ([7], [(11, 12)], [0], {}), ([0], [], [], {}),  # at both ends, none
    ([9], [(11, 12)], [0], {"length": 0}), ([0], [(1, 2)], [0], {"length": 3}),    # 0: not known
    ([4.5], [(6, 8)], [0], {"length": 20}), ([], [(6, 8)], [0], {"length": 20.5}),  # centered
    ([], [(6, 8)], [0], {"secondary": ["y"]}), ([3], [(6, 8), (1, 8), (4, 7)], [-1, -1, 3], {}),
    ([4.5], [(6, 8)], [-1], {}), ([0], [(6, 8), (8, 9)], [-1, -1], {}),  # noise, if it is alone
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
    span = [("a.wav", "train", ["x"], 0, times) for times in ((0.0, 1.0), ("", ""), ("0", ""))]
    assert read("mine", span)[3] == [("a.ogg", 0, 1, "x")]
    put("mine", {"manifest.csv": "# mine\n\npath,split,labels\na.wav,test,x\n"})
    assert read("mine")[0] == {("a.ogg", 0): ("test", "x")}
    wanted = "a.wav", "b.wav", "c.flac", "**/d.ogg", "**/e.wav"
    clips, missing, *_ = read("mine", [(path, "fold A", ["x"]) for path in wanted])
    assert [path for path, _ in clips] == ["a.ogg", "c.mp3", "shard/deep/d.flac"]
    assert missing == dict.fromkeys([("b.wav", 0), ("**/e.wav", 0)], "fold A")

MANY = "\nb.wav,test,y"
BROKEN = (
    ("manifest.csv:2", "a.wav,train,x,y"), ("gone.wav", "gone.wav,train,x\na.wav,train,y"),
    ("manifest.csv:5", "\n# comment\na.wav,train,x\nb.wav,test"), ("split", "a.wav,,x"),
    ("UTF-8", "a.wav,train,h\xfcndin"), ("labels", 'a.wav,train,"x' + 9 * MANY),
    ("quote", '"a.wav,train,x' + 9 * MANY), ("limit", '"a.wav,train,x' + 20000 * MANY),
    ("a.wav", "a.wav,train,\n" + MANY), ("b.wav", "a.wav,train,x\nb.wav,test,x;y"))

@pytest.mark.parametrize("name, table, text, word", [
    *(("mine", "manifest.csv", "path,split,labels\n" + text, word) for word, text in BROKEN),
    *(("mine", "manifest.csv", f"path,split,labels,start\na.wav,train,x,{start}", start)
      for start in ("soon", "-1", "nan")),
    ("mine", "manifest.csv", "path,path,split,labels\na.wav,x,train,y", "manifest.csv:2"),
    ("mine", "manifest.csv", "path;split;labels\na.wav;train;x", "need"),
    ("mine", "manifest.csv", "", "0 classes"), ("gone", "a.wav", "", "gone"),
    *(("urban", "annotations/test/a.txt", text, word) for text, word in
      (("0\t1\tx;y", "x;y"), ("0\tend\tx", "end"), ("0\t1", "a.txt:1"))),
    ("fsd50k", "a.wav", "", "data/fsd50k"),
    ("hsn", "HSN_metadata_train.parquet", "version https://git-lfs.github.com/", "arquet")])
def test_tables_that_cannot_be_read(name, table, text, word):
    if name == "hsn":
        pytest.importorskip("pyarrow")
    put(name, {table: text, "a.wav": "", "b.wav": "", "audio/test/a.wav": ""})
    put("..", {"datasets.txt": "mine single 1 2\nfsd50k multi 1 2\nurban multi 1 2\nhsn multi 1 2"})
    refused(script("extract.py", "--data", name), word)

# ---- downloads and archives
class Server(http.server.SimpleHTTPRequestHandler):
    """Of each file below site/, the first `cut` bytes."""

    def log_message(self, *args):
        self.server.log.add(self.path.split("?")[0][1:])

    def copyfile(self, source, out):
        with contextlib.suppress(ConnectionError):  # whoever only wants the length hangs up
            out.write(source.read(self.server.cut))

@pytest.fixture
def site():
    handler = functools.partial(Server, directory="site")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.url, server.log, server.cut = f"http://127.0.0.1:{server.server_port}/", set(), None
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()

BODY = bytes(range(256)) * 4000
SHA256 = "#" + hashlib.sha256(BODY).hexdigest()

@pytest.mark.parametrize("url, body, cut, word", [
    ("{}a.bin?download=1", BODY, None, ""), ("{}a.bin" + SHA256, BODY, None, ""),
    ("{}a.bin" + SHA256, BODY[:-1] + b"x", None, "hash"), ("{}a.bin", BODY, 400000, "1,024,000"),
    ("{}b.bin", BODY, None, "404"), ("http://127.0.0.1:9/a.bin", BODY, None, "127.0.0.1:9")])
def test_download(site, url, body, cut, word):
    put("../site", {"a.bin": body})
    site.cut = cut
    with pytest.raises(Stop, match=f"{word}.*by hand") if word else contextlib.nullcontext():
        extract.download(url.format(site.url), "got/a.bin")
    assert os.path.exists("got/a.bin") != bool(word)  # a failed one never passes as complete
    put("../site", {"a.bin": BODY})
    site.cut = None
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

def fetch(site, files):
    """The tree in data/one/ after these files are put into site/ and fetched."""
    put("../site", files)
    extract.fetch_dataset("data/one", [f"{site.url}{name}?download=1" for name in files])
    assert os.listdir("data") == ["one"]
    return {path.relative_to("data/one").as_posix(): path.read_bytes()
            for path in pathlib.Path("data/one").rglob("*") if path.is_file()}

@pytest.mark.parametrize("files", [
    *({f"a.{kind}": archive(kind, {top + name: TREE[name] for name in TREE})}
      for kind in ("zip", "tar", "tar.gz") for top in ("", "ESC-50-5983fb0/")),
    {"a.zip": archive("zip", {"audio/a.wav": TREE["audio/a.wav"]}), "b.csv": TREE["b.csv"],
     "b.tar.gz": archive("tar.gz", {"audio/b.wav": b""})}])
def test_archives(site, files):
    assert fetch(site, files) == TREE

@pytest.mark.skipif(not shutil.which("zip"), reason="needs the program zip")
@pytest.mark.parametrize("lack, word", [("", ""), ("part", "zip cannot"), ("zip", "zip -s 0")])
def test_split_zips(site, monkeypatch, lack, word):
    tree = {f"{name}/{i}.wav": np.random.bytes(40000) for name in "ab" for i in range(5)}
    put("..", tree)
    for name in "ab":
        subprocess.run(["zip", "-qrs", "64k", f"{name}.zip", name], check=True)
    files = {str(path): path.read_bytes() for path in sorted(pathlib.Path().glob("*.z*"))}
    assert len(files) == 8
    if lack == "part":
        del files["a.z02"]
    monkeypatch.setenv("PATH", "" if lack == "zip" else os.environ["PATH"])
    with pytest.raises(Stop, match=word) if lack else contextlib.nullcontext():
        assert fetch(site, files) == tree
    assert os.path.exists("data/one") == (not lack)

@pytest.mark.parametrize("name", ["../out.wav", "a/../../out.wav", "{}/out.wav"])
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_members_outside_the_folder_do_not_escape(site, tmp_path, kind, name):
    with contextlib.suppress(Stop):
        fetch(site, {f"a.{kind}": archive(kind, {"good.wav": b"1", name.format(tmp_path): b"2"})})
    assert {*os.listdir()} == {"data", "site"}
    assert {*os.listdir("data")} <= {"one", "one.download"}

ZIP, TAR, TAR_GZ = (archive(kind, TREE) for kind in ("zip", "tar", "tar.gz"))

@pytest.mark.parametrize("name, body", [
    ("a.zip", ZIP[:-30]), ("a.zip", ZIP[:999] + bytes(9) + ZIP[1008:]), ("a.zip", b"<html>log in"),
    ("a.tar.gz", TAR_GZ[:99999]), ("a.tar", TAR[:99999]), ("a.tar", b"<html>")])
def test_damaged_archives(site, name, body):
    with pytest.raises(Stop, match="cannot be unpacked.*delete it"):
        fetch(site, {name: body})
    assert not os.path.exists("data/one")
    os.remove(f"data/one.download/{name}")
    assert fetch(site, {name: archive(name[2:], TREE)}) == TREE

def test_interrupted_fetch_downloads_nothing_twice(site, monkeypatch):
    def killed(file, folder, **kwargs):
        put("one.download/unpacked", {"audio/half of it.wav": ""})
        raise KeyboardInterrupt
    files = {"a.zip": ZIP, "c.csv": b"y"}
    put("../site", {"a.zip": ZIP})
    with pytest.raises(Stop, match="404"):
        extract.fetch_dataset("data/one", [site.url + name for name in files])
    site.log.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "unpack_archive", killed)
        fetch(site, files)
    assert site.log == {"c.csv"} and os.listdir("data") == ["one.download"]
    site.log.clear()
    assert fetch(site, files) == TREE | {"c.csv": b"y"} and not site.log

def test_as20k_from_its_addresses_to_tokens(site):
    clips, _, classes, _ = put_miniature("as20k")
    for (path, _), rate, channels in zip(clips, (48000, 44100, 16000), (1, 2, 6)):
        soundfile.write(f"data/as20k/{path}", np.random.normal(0, 0.1, (rate, channels)), rate)
    shutil.make_archive("site/audio", "tar", "data/as20k", "audio")
    for file in pathlib.Path("data/as20k").glob("*.csv"):
        shutil.move(file, "site")
    shutil.rmtree("data")
    files = " ".join(sorted(os.listdir("site")))
    put("..", {"datasets.txt": f"as20k multi 10 6 {site.url}{files}\n"})
    refused(script("extract.py", "--data", "as20k"), "more than 1%", "0gone", "--allow-bad")
    run = script("extract.py", "--data", "as20k", "--allow-bad")
    report = [row.split() for row in run.stdout.splitlines()]
    assert [row[:4] + row[-1:] for row in report if row[0] in ("train", "test")] == [
        ["train", "2", "1", "0", "25.0%"], ["test", "1", "0", "0", "33.3%"]], run.stderr
    labels, tokens = (np.load(f"tokens/as20k/logmel/{name}.npy") for name in ("labels", "tokens"))
    assert labels.tolist() == [[name in names.split(";") for name in classes]
                               for _, names in clips.values()] and tokens.any((1, 2)).all()
