"""datasets.txt and its readers on a miniature of every official layout; tables that cannot be
read; BirdSet's few-shot rule; downloads and archives."""

import contextlib
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

BIRDS = {"hsn": 21, "nbp": 51, "nes": 89, "per": 132, "pow": 48, "sne": 56, "uhh": 27}
CLASSES = BIRDS | {"as20k": 527, "fsd50k": 200, "desed": 10, "spass": 33, "urban": 10, "esc50": 50,
                   "sc2": 35, "demo": 10, "desed_public": 10, "spass28": 28, "fsdd": 10}
SINGLE = {"esc50", "sc2", "fsdd"}


def put(root, files):
    """Write {path: text or bytes} below data/<root>/."""
    for name, content in files.items():
        file = pathlib.Path("data", root, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode("latin-1"))


def noise(seconds, rate=16000, channels=1):
    """A wav file of noise."""
    shape = round(seconds * rate), channels
    wave = np.random.default_rng(round(99 * seconds)).normal(0, 0.1, shape)
    soundfile.write(file := io.BytesIO(), wave, rate, format="WAV")
    return file.getvalue()


def read(name, rows=None):
    """({path or (path, start): (split, labels)}, missing, classes, events) of data/<name>/."""
    extract.files_by_name.cache_clear()
    rows = rows or extract.READERS.get(name, extract.manifest)(f"data/{name}")
    task = "single" if name in SINGLE else "multi"
    clips, *others = extract.read_clips(f"data/{name}", rows, task)
    return {(clip.path, clip.start) if clip.start else clip.path:
            (clip.split, ";".join(sorted(clip.labels))) for clip in clips}, *others


# ---- datasets.txt

def test_all_datasets_and_their_addresses():
    sets = extract.read_datasets(ROOT / "datasets.txt")
    assert {name: row[2] for name, row in sets.items()} == CLASSES
    assert {name for name, row in sets.items() if row[0] == "single"} == SINGLE
    assert {name: row[1] for name, row in sets.items() if row[1] != 10} == dict.fromkeys(
        [*BIRDS, "demo", "esc50"], 5) | {"sc2": 1, "fsdd": 1}
    files = {name: [re.sub("[?#].*", "", x).split("/")[-1] for x in sets[name][3]] for name in sets}
    assert files["as20k"] == [
        "balanced_train_segments.csv", "eval_segments.csv", "class_labels_indices.csv",
        *(f"bal_train0{i}.tar" for i in range(10)), *(f"eval0{i}.tar" for i in range(9))]
    assert files["fsd50k"] == ["FSD50K." + end for end in (
        "ground_truth.zip", *(f"dev_audio.z0{i}" for i in range(1, 6)), "dev_audio.zip",
        "eval_audio.z01", "eval_audio.zip")]
    for name, shards in zip(BIRDS, (7, 32, 13, 11, 9, 21, 5), strict=True):
        assert files[name] == [f"{name.upper()}_{end}" for end in (
            "metadata_train.parquet", "metadata_test_5s.parquet",
            *(f"train_shard_{i + 1:04d}.tar.gz" for i in range(shards)),
            "test5s_shard_0001.tar.gz")]
    assert re.search("#[0-9a-f]{64}$", sets["sc2"][3][0])
    assert all(re.fullmatch("https://[^{}]+", url) for row in sets.values() for url in row[3])
    assert all(len(set(names)) == len(names) for names in files.values()), "two of one name"


def test_lines_of_datasets_txt():
    pathlib.Path("datasets.txt").write_text(
        "\ufeff# a comment\n\none multi 2.5 3\n  # more\ntwo single 1 2 http://h/d/{08..10}.tar?a\n"
        "    {1..2}.csv http://i/a.zip#00ff\n# between\n\tb.zip\n", "utf-8")
    assert extract.read_datasets() == {"one": ("multi", 2.5, 3, []), "two": ("single", 1, 2, [
        "http://h/d/08.tar?a", "http://h/d/09.tar?a", "http://h/d/10.tar?a", "http://h/d/1.csv",
        "http://h/d/2.csv", "http://i/a.zip#00ff", "http://i/b.zip"])}


@pytest.mark.parametrize("line", [
    "one", "one multi 10", "one many 10 2", "one multi ten 2", "one multi nan 2",
    "one multi 10 2.5", "one multi -1 2", "one 10 2 multi", "one multi 10 http://a/b.zip"])
def test_malformed_lines_of_datasets_txt(line):
    put("..", {"datasets.txt": f"# comment\n\n{line}\n"})
    with pytest.raises(Stop, match="datasets.txt:3"):
        extract.read_datasets()


# ---- a miniature of every official layout: its tables and what is read from them. The audio of
# "clips" is there and that of "missing" is not; "files" are there and not read.

SPASS = ("talk crowd music bird dog car_moving wind steps car_idling motorcycle_idling "
         "motorcycle_moving horn rain bus_moving bus_idling shouting truck_moving air_conditioner "
         "truck_idling siren airborne water alarm bells drilling cutting impact braking Vwater "
         "waves fireworks river explosives").split()
PUBLIC = ("filename\tonset\toffset\tevent_label\n1Ro_72.wav\t0.000\t2.081\tSpeech\n1Ro_72.wav\t"
          "3.847\t10.000\tFrying\nNiY_12.wav\t4.444\t4.694\tDishes\n")
PUBLIC_EVENTS = [("audio/eval/public/" + file, *times) for file, *times in (
    ("1Ro_72.wav", 0, 2.081, "Speech"), ("1Ro_72.wav", 3.847, 10, "Frying"),
    ("NiY_12.wav", 4.444, 4.694, "Dishes"))]
MINIATURES = {
    "as20k": {"tables": {
        "balanced_train_segments.csv": "# Segments csv created Sun Mar  5 10:54:31 2017\n# YTID, "
        'start_seconds, end_seconds, positive_labels\n--PJ, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n'
        '-0Dd, 50.000, 60.000, "/m/05z"\n0gone, 0.000, 10.000, "/m/only_here"\n',
        "eval_segments.csv": '# YTID, ...\n-0RW, 420.000, 430.000, "/m/03v3yw,/m/0k4j"\n',
        "class_labels_indices.csv": 'index,mid,display_name\n0,/m/09x0r,"Speech"\n'
                                    '1,/m/05z,"Male speech, man speaking"\n2,/m/0k4j,"Car"\n'},
        "clips": {"audio/bal_train/--PJ.flac": ("train", "/t/dd00088;Speech"),
                  "audio/bal_train/-0Dd.wav": ("train", "Male speech, man speaking"),
                  "audio/eval/-0RW.flac": ("test", "/m/03v3yw;Car")},
        "missing": {("audio/bal_train/0gone.flac", 0): "train"}, "also": ["/m/only_here"]},
    "fsd50k": {"tables": {
        "FSD50K.ground_truth/dev.csv": 'fname,labels,mids,split\n64,"Guitar,Music","/m/03,/m/04"'
                                       ",train\n16,Bark,/m/05tny_,val\n",
        "FSD50K.ground_truth/eval.csv": 'fname,labels,mids\n37,"Bark,Dog","/m/05tny_,/m/0bt9lr"\n'},
        "clips": {"FSD50K.dev_audio/64.wav": ("train", "Guitar;Music"),
                  "FSD50K.dev_audio/16.wav": ("valid", "Bark"),
                  "FSD50K.eval_audio/37.wav": ("test", "Bark;Dog")}},
    "desed": {"tables": {
        "metadata/train/weak.tsv": "filename\tevent_labels\nYKK_30.000_40.000.wav\tBlender,Cat\n"
                                   "Y-6_0.000_10.000.wav\tDog\n",
        "metadata/train/unlabel_in_domain.tsv": "filename\nYnot_read_0.000_10.000.wav\n",
        "metadata/validation/validation.tsv": "filename\tonset\toffset\tevent_label\nY00_350.wav\t"
        "0.000\t9.971\tCat\nY00_350.wav\t8.524\t9.391\tSpeech\nYU0_30.000_40.000.wav\t\t\t\n",
        "metadata/eval/public.tsv": PUBLIC},
        "clips": {"audio/train/weak/YKK_30.000_40.000.wav": ("train", "Blender;Cat"),
                  "audio/validation/Y00_350.wav": ("valid", "Cat;Speech"),
                  "audio/validation/YU0_30.000_40.000.wav": ("valid", ""),  # no event: a negative
                  "audio/eval/public/1Ro_72.wav": ("test", "Frying;Speech"),
                  "audio/eval/public/NiY_12.wav": ("test", "Dishes")},
        "missing": {("audio/train/weak/Y-6_0.000_10.000.wav", 0): "train"}, "also": ["Dog"],
        "events": [("audio/validation/Y00_350.wav", 0, 9.971, "Cat"),
                   ("audio/validation/Y00_350.wav", 8.524, 9.391, "Speech"), *PUBLIC_EVENTS]},
    "desed_public": {"tables": {"metadata/eval/public.tsv": PUBLIC}, "events": PUBLIC_EVENTS,
                     "clips": {"audio/eval/public/1Ro_72.wav": ("train", "Frying;Speech"),
                               "audio/eval/public/NiY_12.wav": ("test", "Dishes")}},
    "urban": {"tables": {"annotations/train/a.txt": "0.5\t1.25\tsiren\n0.75\t2\tgun_shot\n",
                         "annotations/validate/b.txt": "0\t1\tsiren\n",
                         "annotations/test/c.txt": "3\t4\tdrilling\n"},
              "files": ["annotations/train/a.jams", "audio/train/a.jams"],
              "clips": {"audio/train/a.wav": ("train", "gun_shot;siren"), "audio/validate/b.wav":
                        ("valid", "siren"), "audio/test/c.wav": ("test", "drilling")},
              "events": [
                  ("audio/test/c.wav", 3, 4, "drilling"), ("audio/train/a.wav", 0.5, 1.25, "siren"),
                  ("audio/train/a.wav", 0.75, 2, "gun_shot"),
                  ("audio/validate/b.wav", 0, 1, "siren")]},
    "esc50": {"tables": {"meta/esc50.csv": "filename,fold,target,category,esc10,src_file,take\n"
                         "1-1-A-0.wav,1,0,dog,True,1,A\n2-9-A-36.wav,2,36,hen,False,9,A\n"},
              "clips": {"audio/1-1-A-0.wav": ("1", "dog"), "audio/2-9-A-36.wav": ("2", "hen")}},
    "sc2": {"tables": {"testing_list.txt": "yes/a_nohash_0.wav\nno/b_nohash_0.wav\n",
                       "validation_list.txt": "yes/b_nohash_0.wav\n"},
            "files": ["_background_noise_/tap.wav", "_background_noise_/README.md", "LICENSE"],
            "clips": {"yes/a_nohash_0.wav": ("test", "yes"), "no/b_nohash_0.wav": ("test", "no"),
                      "yes/b_nohash_0.wav": ("valid", "yes"), "no/a_nohash_0.wav": ("train", "no"),
                      "yes/c_nohash_1.wav": ("train", "yes")}},
    "fsdd": {"clips": {f"recordings/{digit}_{who}_32.wav": (who, str(digit))
                       for digit in range(10) for who in ("jackson", "lucas")}},
    "mine": {"tables": {"manifest.csv": "path,split,labels,start\nlong one.wav,train,rain; wind,0\n"
             'long one.wav,dev,,10\n\n# comment\n"a,b.wav",test,"frog, common",\nx/c.wav,val,'
             "rain,2.5\nlong one.wav,test,hail,0\ngone.wav,eval,gone,1.25\nid_3.0_4.000,test,x,\n"},
             "clips": {"long one.wav": ("train", "hail;rain;wind"),
                       ("long one.wav", 10): ("train", ""),
                       "a,b.wav": ("test", "frog, common"), ("x/c.flac", 2.5): ("valid", "rain")},
             "files": ["id_3.0_4.wav"], "also": ["gone", "x"],  # .000 is no audio ending
             "missing": {("gone.wav", 1.25): "test", ("id_3.0_4.000", 0): "test"}}}


def spass(merged):
    """A clip per class in five scenes, each with a bird as well."""
    tables, clips, events = {}, {}, []
    for i, scene in enumerate(("Market", "Park", "Square", "Street", "Waterfront")):
        rows = "audio_filename,class,start (s),end (s)\n"
        for label in SPASS[i::5]:
            file, new = f"{scene.lower()}_{label}.wav", merged.get(label, label)
            path, share = f"{scene} audio files/{file}", hashlib.md5(file.encode()).digest()[:4]
            rows += f"{file},{label},0.5,2\n{file},bird,3,4.25\n"
            events += [(path, 0.5, 2, new), (path, 3, 4.25, "bird")]
            clips[path] = ("train" if int.from_bytes(share, "big") < 0.7 * 2**32 else "test",
                           ";".join(sorted({new, "bird"})))
        tables[f"{i + 1}_MatrixLabels{scene}.csv"] = rows
    return {"tables": tables, "clips": clips, "events": events}


MINIATURES |= {"spass": spass({}), "spass28": spass({
    "car_idling": "car", "car_moving": "car", "bus_idling": "bus_truck", "bus_moving": "bus_truck",
    "truck_idling": "bus_truck", "truck_moving": "bus_truck", "motorcycle_idling": "motorcycle",
    "motorcycle_moving": "motorcycle"})}


def put_miniature(name):
    """Write it and return what must be read of it."""
    mini = {"tables": {}, "files": [], "missing": {}, "events": [], "also": []} | MINIATURES[name]
    clips = {key if isinstance(key, str) else key[0]: b"" for key in mini["clips"]}
    put(name, mini["tables"] | dict.fromkeys(mini["files"], "") | clips)
    labels = ";".join([*mini["also"], *(labels for _, labels in mini["clips"].values())])
    return mini["clips"], mini["missing"], sorted({*labels.split(";")} - {""}), mini["events"]


@pytest.mark.parametrize("name", MINIATURES)
def test_miniature(name):
    expected = put_miniature(name)
    assert read(name) == expected
    assert not name.startswith("spass") or len(expected[2]) == CLASSES[name]


# ---- BirdSet

def bird(path, code, events=((0.5, 1.5),), clusters=(0,), secondary=(), length=12, labels=()):
    return {"filepath": path, "ebird_code": code, "ebird_code_multilabel": list(labels),
            "ebird_code_secondary": list(secondary), "length": length, "call_type": ["song"],
            "detected_events": [list(map(float, event)) for event in events],
            "event_cluster": list(clusters)}


def put_birds(name):
    """A BirdSet: 70 recordings of one species, three of others, three segments."""
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


@pytest.mark.parametrize("name", BIRDS)
def test_birdset(name):
    put_birds(name)
    clips, missing, classes, events = read(name)
    assert classes == ["daejun", "onlytest", "rare", "whcspa"] and not missing and not events
    assert {key: labels for key, (split, labels) in clips.items() if split == "test"} == {
        f"{name}_0.ogg": "daejun;whcspa", f"{name}_1.ogg": "", f"{name}_2.ogg": "onlytest"}
    juncos = {key for key, clip in clips.items() if clip == ("train", "daejun")}
    assert len(juncos) == 64 == len({path for path, _ in juncos})  # one clip per recording
    assert {start for _, start in juncos} == {1.5, 6}  # 5 s around (3, 5) or (8, 9)
    assert {key for key, clip in clips.items() if clip[0] == "train"} - juncos == {
        "shard_1/train/XC1000.ogg", ("shard_1/train/XC1000.ogg", 5)}  # no fill-up
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

    many, few, one = ([t for t in shots(5, rows + [bird("c", "one")]) if t[0] == name]
                      for name in ("many", "few", "one"))
    assert len(many) == 5 == len({t[1] for t in many})  # primaries before the others
    assert len(set(few)) == 5 == len(few) and {t[1] for t in few} == {"b0", "b1", "b2"}
    assert one == [("one", "c", 0)]  # no fill-up
    assert sum(t[0] == "few" for t in shots(99, rows)) == 9
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
    assert clips == dict.fromkeys(["a.ogg", "c.mp3", "shard/deep/d.flac"], ("fold A", "x"))
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
    ("mine", "manifest.csv", "file,split,labels\na.wav,train,x", "needed"),
    ("mine", "manifest.csv", "path;split;labels\na.wav;train;x", "needed"),
    ("mine", "manifest.csv", "", "0 classes"),
    ("urban", "annotations/test/a.txt", "0\t1\tx;y", "x;y"), ("fsd50k", "a.wav", "", "data/fsd50k"),
    ("urban", "annotations/test/a.txt", "0\tend\tx", "end"), ("gone", "a.wav", "", "gone"),
    ("urban", "annotations/test/a.txt", "0\t1", "values"),
    ("hsn", "HSN_metadata_train.parquet", "version https://git-lfs.github.com/", "arquet")])
def test_tables_that_cannot_be_read(name, table, text, word):
    put(name, {table: text, "a.wav": "", "b.wav": "", "audio/test/a.wav": ""})
    sets = "mine single 1 2\nfsd50k multi 1 2\nurban multi 1 2\nhsn multi 1 2\n"
    put("..", {"datasets.txt": sets})
    refused(script("extract.py", "--data", name), word)


def test_tokens_do_not_depend_on_the_order_of_the_table():
    rows = [f"{i}.wav,{'test' if i % 3 else 'train'},{'xy'[i % 2]},{i / 8}\n" for i in range(11)]
    events, dumps = "path,onset,offset,label\n3.wav,0.5,1.25,y\n", []
    put("mine", {f"{i}.wav": noise(2 + i / 4, 8000 if i == 3 else 16000) for i in range(11)})
    put("..", {"datasets.txt": "mine multi 1 2\n"})
    for order in rows, rows[::-1], rows[::2] + rows[1::2]:
        manifest = "".join(["path,split,labels,start\n", *order])
        put("mine", {"manifest.csv": manifest, "events.csv": events})
        assert script("extract.py", "--data", "mine", "--overwrite").returncode == 0
        dump = pathlib.Path("tokens/mine/logmel")
        rows_written = dump.joinpath("clips.csv").read_text().splitlines()[1:]
        clips = [row.split(",")[0] for row in rows_written]
        assert clips == [row.split(",")[0] for row in order]
        assert dump.joinpath("events.csv").read_text() == events
        tokens = np.load(dump / "tokens.npy")
        dumps.append({clip: x.tobytes() for clip, x in zip(clips, tokens, strict=True)})
    assert dumps[0] == dumps[1] == dumps[2] and len(set(dumps[0].values())) == 11


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


@pytest.mark.parametrize("lack, word", [
    ("", ""),
    ("part", "zip cannot"),
    ("zip", "program zip")])
def test_split_zips(site, monkeypatch, lack, word):
    if not shutil.which("zip"):
        pytest.skip("needs the program zip")
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


@pytest.mark.parametrize("name, body", [
    ("a.zip", archive("zip", TREE)[:-30]), ("a.zip", b"<html>please log in</html>"),
    ("a.zip", archive("zip", TREE).replace(TREE["audio/a.wav"][:9], b"x" * 9)),
    ("a.tar.gz", archive("tar.gz", TREE)[:99999]), ("a.tar", archive("tar", TREE)[:99999]),
    ("a.tar", b"<html>")])
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

    site.files = {"a.zip": archive("zip", TREE)}
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
    put("as20k", dict(zip(clips, (noise(2, 48000), noise(9, 44100, 2), noise(12, 16000, 6)))))
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
