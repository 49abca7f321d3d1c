"""datasets.txt and the reading of datasets: a miniature of every official layout, read with the
real lines; the grammar and its errors; parquet; few-shot subsets; downloads and archives."""

import csv
import hashlib
import http.server
import io
import json
import os
import pathlib
import shutil
import struct
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
PAPER = ["as20k", "fsd50k", "desed", "spass", "urban", *BIRDS, "esc50", "sc2"]


def put(name, text=""):
    """A file below data/, with its folders; empty where only its being there counts."""
    file = pathlib.Path("data", name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def put_wave(name, seconds, rate=16000, channels=1, value=0.25):
    file = put(name)
    wave = np.full((round(seconds * rate), channels), value) * np.arange(1, channels + 1)
    soundfile.write(file, wave / channels, rate, subtype="PCM_16")


def lines(*text):
    pathlib.Path("datasets.txt").write_text("\n".join(text) + "\n")
    return extract.read_datasets("datasets.txt")


def read(name, classes=None, file=ROOT / "datasets.txt", **kwargs):
    """The real lines, with the class count of the miniature where it cannot have them all."""
    data = extract.read_datasets(file)[name]
    data["classes"] = classes or data["classes"]
    return extract.read_clips(f"data/{name}", data, **kwargs)


def short(clips):
    """{path: (split, "label;label")}, or {(path, start): ...} where clips have a start."""
    return {(c["path"], c["start"]) if c["start"] else c["path"]:
            (c["split"], ";".join(sorted(c["labels"]))) for c in clips}


# the fourteen, and the others in datasets.txt

def test_all_sets_are_there():
    sets = extract.read_datasets(ROOT / "datasets.txt")
    assert set(PAPER) | {"demo", "desed_public", "spass28", "fsdd"} == set(sets)
    assert {n: d["classes"] for n, d in sets.items() if n in PAPER} == BIRDS | {
        "as20k": 527, "fsd50k": 200, "desed": 10, "spass": 33, "urban": 10, "esc50": 50, "sc2": 35}
    assert {n for n, d in sets.items() if d["task"] == "single"} == {"esc50", "sc2", "fsdd"}
    assert sets["as20k"]["rules"][0]["prototypes"] == "10"
    for name, data in sets.items():
        assert len(data["lines"]) == len(data["rules"])
        assert not any("url=" in line for line in data["lines"])


def test_addresses():
    sets = extract.read_datasets(ROOT / "datasets.txt")
    names = {n: [u.split("?")[0].split("/")[-1] for u, _ in d["urls"]] for n, d in sets.items()}
    assert names["as20k"] == [
        "balanced_train_segments.csv", "eval_segments.csv", "class_labels_indices.csv",
        *(f"bal_train0{i}.tar" for i in range(10)), *(f"eval0{i}.tar" for i in range(9))]
    assert names["fsd50k"] == ["FSD50K.ground_truth.zip",
                               *(f"FSD50K.dev_audio.z0{i}" for i in range(1, 6)),
                               "FSD50K.dev_audio.zip", "FSD50K.eval_audio.z01",
                               "FSD50K.eval_audio.zip"]
    shards = {n: sum("train_shard" in x for x in names[n]) for n in BIRDS}
    assert shards == {"hsn": 7, "nbp": 32, "nes": 13, "per": 11, "pow": 9, "sne": 21, "uhh": 5}
    for name in BIRDS:
        assert all(x.startswith(name.upper() + "_") for x in names[name])
        assert {f"{name.upper()}_{what}" for what in (
            "metadata_train.parquet", "metadata_test_5s.parquet",
            "test5s_shard_0001.tar.gz")} < set(names[name])
    assert all(md5 for name in ("fsd50k", "urban", "sc2") for _, md5 in sets[name]["urls"])
    assert not sets["esc50"]["urls"][0][1]  # the archive of a commit has no stable checksum
    for name in sets:
        assert len(set(names[name])) == len(names[name]), "two archives with one file name"


def write_as20k():
    put("as20k/balanced_train_segments.csv",
        "# Segments csv created Sun Mar  5 10:54:31 2017\n"
        "# num_ytids=22160, num_segs=22160, num_unique_labels=527, num_positive_labels=52882\n"
        "# YTID, start_seconds, end_seconds, positive_labels\n"
        '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n'
        '-0DdlOuIFUI, 50.000, 60.000, "/m/0l14jd"\n'
        '0gone000000, 0.000, 10.000, "/m/only_here"\n')
    put("as20k/eval_segments.csv",
        "# Segments csv created Sun Mar  5 10:54:25 2017\n"
        "# num_ytids=20383, num_segs=20383, num_unique_labels=527, num_positive_labels=51804\n"
        "# YTID, start_seconds, end_seconds, positive_labels\n"
        '-0RWZT-miFs, 420.000, 430.000, "/m/03v3yw,/m/0k4j"\n')
    put("as20k/class_labels_indices.csv", 'index,mid,display_name\n0,/m/09x0r,"Speech"\n'
        '1,/m/05zppz,"Male speech, man speaking"\n')
    put_wave("as20k/audio/bal_train/--PJHxphWEs.flac", 10, 48000)
    put_wave("as20k/audio/bal_train/-0DdlOuIFUI.wav", 1, 44100, channels=2)  # short: padded
    put_wave("as20k/audio/eval/-0RWZT-miFs.flac", 10)


def test_as20k():
    write_as20k()
    clips, missing, classes, events = read("as20k", 6)
    assert short(clips) == {
        "audio/bal_train/--PJHxphWEs.flac": ("train", "/m/09x0r;/t/dd00088"),
        "audio/bal_train/-0DdlOuIFUI.wav": ("train", "/m/0l14jd"),  # found with another ending
        "audio/eval/-0RWZT-miFs.flac": ("test", "/m/03v3yw;/m/0k4j")}
    assert [c["start"] for c in clips] == [0, 0, 0]  # the files are the segments, cut already
    assert missing == {"train": ["audio/bal_train/0gone000000.flac"]}
    assert classes == sorted(["/m/09x0r", "/t/dd00088", "/m/0l14jd", "/m/only_here", "/m/03v3yw",
                              "/m/0k4j"]), "the classes of missing clips stay in the list"
    assert not events
    names = extract.read_table("data/as20k/class_labels_indices.csv")
    assert {r["mid"]: r["display_name"] for r in names} == {
        "/m/09x0r": "Speech", "/m/05zppz": "Male speech, man speaking"}


def test_as20k_through_the_script():
    write_as20k()
    text = (ROOT / "datasets.txt").read_text().splitlines()
    lines(*(line.replace("527", "6", 1) for line in text if line.startswith("as20k ")))
    refused(script("extract.py", "--data", "as20k"), "1 of 4 clips are missing", "0gone000000",
            "--allow-bad")
    run = script("extract.py", "--data", "as20k", "--allow-bad")
    assert run.returncode == 0, run.stderr
    meta = json.loads(pathlib.Path("tokens/as20k/logmel/meta.json").read_text())
    assert meta["names"] == {"/m/09x0r": "Speech", "/m/05zppz": "Male speech, man speaking"}
    assert meta["prototypes"] == 10 and not any("url=" in line for line in meta["dataset_lines"])
    report = [line.split() for line in run.stdout.splitlines()]
    assert ["train", "2", "1", "0", "1.50", "25.0%"] in report
    assert ["test", "1", "0", "0", "2.00", "33.3%"] in report


def test_as20k_as_parquet():
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow
    text = (ROOT / "datasets.txt").read_text().splitlines()
    lines(*(line[2:] for line in text if line.startswith("# as20k ")))
    audio = io.BytesIO()
    soundfile.write(audio, np.full(800, 0.5), 8000, format="FLAC")
    for folder, ids, mids in (("bal_train", ["-a", "b"], [["/m/1", "/m/2"], ["/m/1"]]),
                              ("eval", ["c"], [["/m/3"]])):
        os.makedirs(f"data/as20k/data/{folder}")
        parquet.write_table(pyarrow.table({
            "video_id": ids, "labels": mids,
            "audio": [{"bytes": audio.getvalue(), "path": f"{i}.flac"} for i in ids],
            "human_labels": [["Male speech, man speaking"] for _ in ids]}),
            f"data/as20k/data/{folder}/00.parquet")
    clips, missing, _, _ = read("as20k", 3, "datasets.txt")
    assert short(clips) == {"-a": ("train", "/m/1;/m/2"), "b": ("train", "/m/1"),
                            "c": ("test", "/m/3")}
    assert not missing
    waves, bad, _ = extract.Blocks(clips, 0.2, 8)[0]
    assert waves.shape == (3, 3200) and not bad
    assert waves[:, 200:1400].sub(0.5).abs().max() < 0.05 and waves[:, 1700:].abs().max() == 0


def test_fsd50k():
    put("fsd50k/FSD50K.ground_truth/dev.csv", "fname,labels,mids,split\n"
        '64760,"Electric_guitar,Guitar,Music","/m/02sgy,/m/0342h,/m/04rlf",train\n'
        "16399,Bark,/m/05tny_,val\n"
        '83299,"Bark,Dog","/m/05tny_,/m/0bt9lr",train\n')
    put("fsd50k/FSD50K.ground_truth/eval.csv", "fname,labels,mids\n"
        '37199,"Electric_guitar,Music","/m/02sgy,/m/04rlf"\n')
    put("fsd50k/FSD50K.ground_truth/vocabulary.csv", "0,Accelerating_and_revving,/m/07q2z82\n")
    put_wave("fsd50k/FSD50K.dev_audio/64760.wav", 12, 8000)
    put("fsd50k/FSD50K.dev_audio/16399.wav")
    put("fsd50k/FSD50K.dev_audio/83299.wav")
    put("fsd50k/FSD50K.eval_audio/37199.wav")
    clips, missing, classes, _ = read("fsd50k", 5)
    assert short(clips) == {
        "FSD50K.dev_audio/64760.wav": ("train", "Electric_guitar;Guitar;Music"),
        "FSD50K.dev_audio/16399.wav": ("valid", "Bark"),
        "FSD50K.dev_audio/83299.wav": ("train", "Bark;Dog"),
        "FSD50K.eval_audio/37199.wav": ("test", "Electric_guitar;Music")}
    assert not missing and classes == ["Bark", "Dog", "Electric_guitar", "Guitar", "Music"]
    wave = extract.read_wave(clips[0]["source"], 0, 10)  # longer than a clip: cropped
    assert wave.shape == (160000,) and wave[-2000:-100].sub(0.25).abs().max() < 0.01


DESED = ("Alarm_bell_ringing Blender Cat Dishes Dog Electric_shaver_toothbrush Frying "
         "Running_water Speech Vacuum_cleaner").split()
PUBLIC = ("filename\tonset\toffset\tevent_label\n1Ro0FgMWTUE_120_130.wav\t0.000\t2.081\tSpeech\n"
          "1Ro0FgMWTUE_120_130.wav\t2.618\t4.679\tSpeech\n"
          "1Ro0FgMWTUE_120_130.wav\t3.847\t10.000\tFrying\n"
          "NiY7nu3xu5Q_290_300.wav\t4.444\t4.694\tDishes\n")


def test_desed():
    put("desed/metadata/train/weak.tsv", "filename\tevent_labels\n"
        f"YKK227gPpRn4_30.000_40.000.wav\t{','.join(DESED)}\n"
        "Y-6p32k2WUCs_0.000_10.000.wav\tAlarm_bell_ringing\n")
    put("desed/metadata/train/unlabel_in_domain.tsv", "filename\nYnot_read_0.000_10.000.wav\n")
    put("desed/metadata/validation/validation.tsv", "filename\tonset\toffset\tevent_label\n"
        "Y00pbt6aJV8Y_350.000_360.000.wav\t0.000\t9.971\tVacuum_cleaner\n"
        "Y00pbt6aJV8Y_350.000_360.000.wav\t8.524\t9.391\tSpeech\n"
        "YU0Cg_t_3TdI_30.000_40.000.wav\t\t\t\n")
    put("desed/metadata/eval/public.tsv", PUBLIC)
    for file in ("train/weak/YKK227gPpRn4_30.000_40.000.wav",
                 "validation/YU0Cg_t_3TdI_30.000_40.000.wav",
                 "validation/Y00pbt6aJV8Y_350.000_360.000.wav",
                 "eval/public/NiY7nu3xu5Q_290_300.wav"):
        put("desed/audio/" + file)
    put_wave("desed/audio/eval/public/1Ro0FgMWTUE_120_130.wav", 0.1, channels=6)
    clips, missing, classes, events = read("desed")
    assert short(clips) == {
        "audio/train/weak/YKK227gPpRn4_30.000_40.000.wav": ("train", ";".join(DESED)),
        "audio/validation/Y00pbt6aJV8Y_350.000_360.000.wav": ("valid", "Speech;Vacuum_cleaner"),
        "audio/validation/YU0Cg_t_3TdI_30.000_40.000.wav": ("valid", ""),  # no event: a negative
        "audio/eval/public/1Ro0FgMWTUE_120_130.wav": ("test", "Frying;Speech"),
        "audio/eval/public/NiY7nu3xu5Q_290_300.wav": ("test", "Dishes")}
    assert classes == DESED
    assert missing == {"train": ["audio/train/weak/Y-6p32k2WUCs_0.000_10.000.wav"]}
    assert events == [
        ("audio/validation/Y00pbt6aJV8Y_350.000_360.000.wav", 0, 9.971, "Vacuum_cleaner"),
        ("audio/validation/Y00pbt6aJV8Y_350.000_360.000.wav", 8.524, 9.391, "Speech"),
        ("audio/eval/public/1Ro0FgMWTUE_120_130.wav", 0, 2.081, "Speech"),
        ("audio/eval/public/1Ro0FgMWTUE_120_130.wav", 2.618, 4.679, "Speech"),
        ("audio/eval/public/1Ro0FgMWTUE_120_130.wav", 3.847, 10, "Frying"),
        ("audio/eval/public/NiY7nu3xu5Q_290_300.wav", 4.444, 4.694, "Dishes")]
    six = next(c for c in clips if "1Ro0" in c["path"])["source"]
    assert soundfile.info(six).channels == 6  # channels are 1/6, 2/6, ... 6/6 of 0.25
    assert extract.read_wave(six, 0, 0.1).sub(0.25 * 3.5 / 6).abs().max() < 1e-4


def test_desed_public():
    put("desed_public/metadata/eval/public.tsv", PUBLIC)
    for name in ("1Ro0FgMWTUE_120_130", "NiY7nu3xu5Q_290_300"):
        put(f"desed_public/audio/eval/public/{name}.wav")
    clips, missing, _, events = read("desed_public", 3)
    assert {p: l for p, (_, l) in short(clips).items()} == {
        "audio/eval/public/1Ro0FgMWTUE_120_130.wav": "Frying;Speech",
        "audio/eval/public/NiY7nu3xu5Q_290_300.wav": "Dishes"}
    assert {c["split"] for c in clips} <= {"train", "test"} and not missing and len(events) == 4


SPASS = ("talk crowd music bird dog car_moving wind steps car_idling motorcycle_idling "
         "motorcycle_moving horn rain bus_moving bus_idling shouting truck_moving air_conditioner "
         "truck_idling siren airborne water alarm bells drilling cutting impact braking Vwater "
         "waves fireworks river explosives").split()


def write_spass(name):
    scenes = "Market", "Park", "Square", "Street", "Waterfront"
    for i, scene in enumerate(scenes, 1):
        rows = ["audio_filename,class,start (s),end (s)"]
        for clip in range(1, 41):
            wave = f"{scene.lower()}{clip:05d}.wav"
            put(f"{name}/{scene} audio files/{wave}")
            for k in range(3):
                rows.append(f"{wave},{SPASS[(7 * i + clip + 11 * k) % 33]},{k}.5,{k + 2}.25")
            rows.append(rows[-1])  # the same class once more
        put(f"{name}/{i}_MatrixLabels{scene}.csv", "\n".join(rows) + "\n")


def test_spass():
    write_spass("spass")
    clips, missing, classes, events = read("spass")
    assert len(clips) == 200 and not missing and classes == sorted(SPASS) and len(classes) == 33
    assert {c["path"].split("/")[0] for c in clips} == {
        f"{s} audio files" for s in ("Market", "Park", "Square", "Street", "Waterfront")}
    first = next(c for c in clips if c["path"] == "Market audio files/market00001.wav")
    assert first["labels"] == {SPASS[8], SPASS[19], SPASS[30]}
    train = sum(c["split"] == "train" for c in clips)
    assert 120 <= train <= 160 and {c["split"] for c in clips} == {"train", "test"}
    assert not events
    # with the columns of the strong labels named, as the comment says
    text = (ROOT / "datasets.txt").read_text().splitlines()
    line = next(line for line in text if line.startswith("spass "))
    lines(line + ' onset="{start (s)}" offset="{end (s)}"')
    again, _, _, events = read("spass", file="datasets.txt")
    assert short(again) == short(clips) and len(events) == 800
    assert events[0] == ("Market audio files/market00001.wav", 0.5, 2.25, SPASS[8])


def test_spass_with_28_classes():
    write_spass("spass28")
    clips, _, classes, _ = read("spass28")
    assert set(SPASS) - set(classes) == {n for n in SPASS if n.endswith(("_moving", "_idling"))}
    assert set(classes) - set(SPASS) == {"car", "motorcycle", "bus_truck"} and len(classes) == 28
    assert {"water", "Vwater", "fireworks", "explosives"} < set(classes)
    assert all(c["labels"] <= set(classes) for c in clips)


URBAN = ("air_conditioner car_horn children_playing dog_bark drilling engine_idling gun_shot "
         "jackhammer siren street_music").split()


def test_urban():
    for split, names in (("train", URBAN), ("validate", ["siren"]),
                         ("test", ["gun_shot", "drilling"])):
        stem = f"soundscape_{split}_bimodal0"
        put(f"urban/annotations/{split}/{stem}.txt",
            "".join(f"{i}.5\t{i + 1}.25\t{name}\n" for i, name in enumerate(names)))
        put(f"urban/annotations/{split}/{stem}.jams", '{"role": "background", "label": "park"}')
        put_wave(f"urban/audio/{split}/{stem}.wav", 10, 8000)
        put(f"urban/audio/{split}/{stem}.jams")
    clips, missing, classes, events = read("urban")
    assert short(clips) == {
        "audio/train/soundscape_train_bimodal0.wav": ("train", ";".join(URBAN)),
        "audio/validate/soundscape_validate_bimodal0.wav": ("valid", "siren"),
        "audio/test/soundscape_test_bimodal0.wav": ("test", "drilling;gun_shot")}
    assert classes == URBAN and not missing, "the background is no class"
    assert len(events) == 13
    assert events[:2] == [("audio/test/soundscape_test_bimodal0.wav", 0.5, 1.25, "gun_shot"),
                          ("audio/test/soundscape_test_bimodal0.wav", 1.5, 2.25, "drilling")]
    # the same through the script: what is written beside the tokens
    shutil.copy(ROOT / "datasets.txt", "datasets.txt")
    run = script("extract.py", "--data", "urban")
    assert run.returncode == 0, run.stderr
    with open("tokens/urban/logmel/events.csv", newline="") as f:
        table = list(csv.DictReader(f))
    assert [(r["path"], float(r["onset"]), float(r["offset"]), r["label"]) for r in table] == events
    assert pathlib.Path("tokens/urban/logmel/classes.txt").read_text().split() == URBAN
    labels = np.load("tokens/urban/logmel/labels.npy")
    assert labels.sum(1).tolist() == [2, 10, 1]  # test, train, validate: in order of the tables
    assert "10 classes found, 10 declared; 2 have a positive among the tested clips" in run.stdout


def bird(path, code, events=((0.5, 1.5),), clusters=(0,), secondary=(), length=12, **more):
    return {"filepath": path, "ebird_code": code, "ebird_code_multilabel": [code] if code else [],
            "ebird_code_secondary": list(secondary), "length": length, "start_time": None,
            "detected_events": [list(e) for e in events], "event_cluster": list(clusters),
            "call_type": ["song"], "quality": "A", **more}


@pytest.mark.parametrize("name", BIRDS)
def test_birdset(name):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow
    ds = name.upper()
    train = [bird(f"XC{i:04d}.ogg", "daejun", [(3, 5), (8, 9)], [0, 0]) for i in range(70)]
    train += [bird("XC1000.ogg", "whcspa", [(1, 2), (6.5, 8.5), (20, 30)], [1, 1, -1]),
              bird("XC1001.ogg", "whcspa", length=21),
              bird("XC1002.ogg", "rare", secondary=["daejun"])]
    segments = [(f"{ds}_093_20150712_085105_{i:03d}_{i + 5:03d}.ogg", codes) for i, codes in
                ((235, ["daejun", "whcspa"]), (240, []), (245, ["onlytest"]))]
    test = [bird(path, None, length=None, events=(), clusters=()) | {"ebird_code_multilabel": codes}
            for path, codes in segments]
    for row in train:
        put(f"{name}/{ds}_train_shard_0001/train/{row['filepath']}")
    for row in test:
        put(f"{name}/{row['filepath']}")
    for split, rows in (("train", train), ("test_5s", test)):
        kinds = {"detected_events": pyarrow.list_(pyarrow.list_(pyarrow.float64())),
                 "event_cluster": pyarrow.list_(pyarrow.int64()),
                 "length": pyarrow.float64(), "start_time": pyarrow.float64()}
        texts = {True: pyarrow.list_(pyarrow.string()), False: pyarrow.string()}
        schema = pyarrow.schema([(k, kinds.get(k, texts[isinstance(v, list)]))
                                 for k, v in train[0].items()])
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema),
                            f"data/{name}/{ds}_metadata_{split}.parquet")
    clips, missing, classes, _ = read(name, 4)
    assert classes == ["daejun", "onlytest", "rare", "whcspa"] and not missing
    tested = [c for c in clips if c["split"] == "test"]
    assert list(short(tested).items()) == [
        (segments[0][0], ("test", "daejun;whcspa")), (segments[1][0], ("test", "")),  # no bird
        (segments[2][0], ("test", "onlytest"))]
    trained = [c for c in clips if c["split"] == "train"]
    assert all(len(c["labels"]) == 1 for c in trained), "training is single-label"
    juncos = [c for c in trained if c["labels"] == {"daejun"}]
    assert len(juncos) == 64 and len({c["path"] for c in juncos}) == 64  # one clip a recording
    assert {c["start"] for c in juncos} == {1.5, 6.0}  # 5 s around (3, 5) or (8, 9)
    # all primaries, then left-overs: no fill-up from what the rule leaves out
    assert sorted(c["start"] for c in trained if c["labels"] == {"whcspa"}) == [0, 5]
    assert not [c for c in clips if "rare" in c["labels"]]
    assert short(read(name, 4)[0]) == short(clips)
    assert short(read(name, 4, seed=2)[0]) != short(clips)


def test_esc50():
    put("esc50/meta/esc50.csv", "filename,fold,target,category,esc10,src_file,take\n"
        "1-100032-A-0.wav,1,0,dog,True,100032,A\n"
        "2-100210-A-36.wav,2,36,vacuum_cleaner,False,100210,A\n"
        "3-100210-B-36.wav,3,36,vacuum_cleaner,False,100210,B\n"
        "4-1-A-12.wav,4,12,crackling_fire,True,1,A\n"
        "5-9032-A-0.wav,5,0,dog,True,9032,A\n")
    for name in ("1-100032-A-0", "2-100210-A-36", "3-100210-B-36", "4-1-A-12", "5-9032-A-0"):
        put(f"esc50/audio/{name}.wav")
    clips, missing, classes, _ = read("esc50", 3)
    assert short(clips) == {
        "audio/1-100032-A-0.wav": ("1", "dog"), "audio/2-100210-A-36.wav": ("2", "vacuum_cleaner"),
        "audio/3-100210-B-36.wav": ("3", "vacuum_cleaner"),
        "audio/4-1-A-12.wav": ("4", "crackling_fire"), "audio/5-9032-A-0.wav": ("5", "dog")}
    assert not missing and classes == ["crackling_fire", "dog", "vacuum_cleaner"]


WORDS = ("backward bed bird cat dog down eight five follow forward four go happy house learn left "
         "marvin nine no off on one right seven sheila six stop three tree two up visual wow yes "
         "zero").split()


def test_sc2():
    for word in WORDS:
        for speaker in ("0a7c2a8d", "bb05582b", "f1b3"):
            put(f"sc2/{word}/{speaker}_nohash_0.wav")
    put_wave("sc2/yes/0a7c2a8d_nohash_0.wav", 0.5)
    put("sc2/_background_noise_/running_tap.wav")
    put("sc2/_background_noise_/README.md")
    put("sc2/testing_list.txt", "".join(f"{w}/bb05582b_nohash_0.wav\n" for w in WORDS))
    put("sc2/validation_list.txt", "".join(f"{w}/f1b3_nohash_0.wav\n" for w in WORDS[:30]))
    put("sc2/LICENSE")
    clips, missing, classes, _ = read("sc2")
    assert classes == WORDS and len(WORDS) == 35 and not missing
    assert short(clips) == {
        f"{w}/{s}_nohash_0.wav": ("test" if s == "bb05582b" else
                                  "valid" if s == "f1b3" and w in WORDS[:30] else "train", w)
        for w in WORDS for s in ("0a7c2a8d", "bb05582b", "f1b3")}
    wave = extract.read_wave("data/sc2/yes/0a7c2a8d_nohash_0.wav", 0, 1)
    assert wave.shape == (16000,) and wave[7999] > 0.2 and wave[8000:].abs().max() == 0  # padded


def test_fsdd():
    for digit in range(10):
        for speaker in ("jackson", "lucas"):
            put(f"fsdd/recordings/{digit}_{speaker}_32.wav")
    clips, _, classes, _ = read("fsdd")
    assert classes == list("0123456789") and len(clips) == 20
    assert short(clips)["recordings/7_lucas_32.wav"] == ("lucas", "7")


def test_own_audio():
    text = (ROOT / "datasets.txt").read_text().splitlines()
    lines(*(line[2:] for line in text if line.startswith("# mine ")))
    put("mine/manifest.csv", "path,split,labels,start\nlong recording.wav,train,rain; wind,0\n"
        'long recording.wav,train,,10\n"a,b.wav",test,"frog, common",\n'
        "x/c.wav,validation,rain,2.5\n")
    for path in ("long recording.wav", "a,b.wav", "x/c.flac"):
        put("mine/" + path)
    clips, missing, classes, _ = read("mine", file="datasets.txt")
    assert short(clips) == {"long recording.wav": ("train", "rain;wind"),
                            ("long recording.wav", 10): ("train", ""),
                            "a,b.wav": ("test", "frog, common"),
                            ("x/c.flac", 2.5): ("valid", "rain")}
    assert classes == ["frog, common", "rain", "wind"] and not missing


# the grammar

@pytest.mark.parametrize("text, words", [
    (["one multi 10"], ["datasets.txt:1", "3 words"]),
    (["# c", "", "one multi 10 2 colour=red"], ["datasets.txt:3", "'colour=red'", "table"]),
    (["one multi 10 2 table"], ["datasets.txt:1", "'table'", "key=value"]),
    (["one multi 10 2 sep="], ["datasets.txt:1", "'sep='"]),
    (["one many 10 2"], ["datasets.txt:1", "'many'", "'single' or 'multi'"]),
    (["one multi ten 2"], ["datasets.txt:1", "positive numbers"]),
    (["one multi nan 2"], ["datasets.txt:1", "positive numbers"]),
    (["one multi 10 0"], ["datasets.txt:1", "positive numbers"]),
    (["one/two multi 10 2"], ["datasets.txt:1", "'one/two'", "folder"]),
    ([".. multi 10 2"], ["datasets.txt:1", "'..'"]),
    (["one multi 10 2 table=a.csv", "one multi 10 3 table=b.csv"], ["datasets.txt:2", "differ"]),
    (["one multi 10 2", "one single 10 2 table=b.csv"], ["datasets.txt:2", "differ"]),
    (['one multi 10 2 path="a b.wav'], ["datasets.txt:1", "quotation"]),
    (["one multi 10 2 shots=few"], ["datasets.txt:1", "'few'", "whole number"]),
    (["one multi 10 2 shots=0"], ["datasets.txt:1", "'0'", "whole number"]),
    (["one multi 10 2 map=a-b"], ["datasets.txt:1", "'a-b'", "old:new"]),
    (["one multi 10 2 url=ftp://a/b.zip"], ["datasets.txt:1", "http"]),
    (["one multi 10 2 md5=" + 32 * "0"], ["datasets.txt:1", "url="]),
    (["one multi 10 2 url=http://a/{1..2}.zip md5=" + 32 * "0"], ["datasets.txt:1", "one file"]),
    (["one multi 10 2 url=http://a/b.zip md5=abc"], ["datasets.txt:1", "'abc'", "32"]),
    (["one multi 10 2 onset={a}"], ["datasets.txt:1", "offset="]),
    (["one multi 10 2 url=http://a/b.zip"], ["datasets.txt", "one has url=", "table=manifest.csv"]),
])
def test_malformed_lines(text, words):
    with pytest.raises(Stop) as e:
        lines(*text)
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)


def test_no_datasets_file():
    with pytest.raises(Stop, match="nowhere.txt: No such file"):
        extract.read_datasets("nowhere.txt")


def test_what_a_line_means():
    sets = lines("\ufeff# a comment that isn't closed", "  one multi 2.5 3 # its comment",
                 'two single 1 2 path="a b/{x}.wav" sep=, url=http://h/{08..10}.tar '
                 "url=http://h/a.zip",
                 "two single 1 2 url=http://h/b.zip md5=" + 32 * "a")
    assert list(sets) == ["one", "two"] and sets["one"]["lines"] == ["one multi 2.5 3"]
    assert sets["one"]["seconds"] == 2.5 and sets["one"]["classes"] == 3
    assert sets["one"]["rules"] == [extract.RULE | {"where": "datasets.txt:2"}]
    assert len(sets["two"]["rules"]) == 1  # the line of url= and md5= adds none
    assert sets["two"]["rules"][0]["path"] == "a b/{x}.wav"
    assert sets["two"]["rules"][0]["sep"] == ","
    assert sets["two"]["urls"] == [["http://h/08.tar", ""], ["http://h/09.tar", ""],
                                   ["http://h/10.tar", ""], ["http://h/a.zip", ""],
                                   ["http://h/b.zip", 32 * "a"]]


# reading

def read_one(manifest, line="one multi 1 2", audio=("a.wav", "b.wav"), name="manifest.csv"):
    put("one/" + name, manifest)
    for file in audio:
        put("one/" + file)
    return extract.read_clips("data/one", lines(line)["one"])


@pytest.mark.parametrize("manifest, line, words", [
    ("path,split,labels\na.wav,train,x,y\n", "one multi 1 2",
     ["manifest.csv:2", "4 values for 3 columns", "double quotes"]),
    ("path,split,labels\n\n# a comment\na.wav,train,x\nb.wav,train,x,y\n", "one multi 1 2",
     ["manifest.csv:5", "4 values"]),
    ('path,split,labels\na.wav,train,"x\n' + "b.wav,test,y\n" * 9, "one multi 1 2",
     ["manifest.csv:11", "line break", "close quotes"]),
    ("file,split,labels\na.wav,train,x\n", "one multi 1 2",
     ["manifest.csv:2", "'path'", "file split labels", "datasets.txt:1"]),
    ("path;split;labels\na.wav;train;x\n", "one multi 1 2",
     ["manifest.csv:2", "the columns here are path;split;labels;", "commas separate columns"]),
    (b"path,split,labels\na.wav,train,h\xfcndin\n", "one multi 1 1", ["manifest.csv:2", "UTF-8"]),
    ("path,split,labels\na.wav,train,x\nb.wav,tst,y\n", "one multi 1 2",
     ["manifest.csv:3", "'tst'", "others are train"]),
    ("path,split,labels\na.wav,train,x\n", "one multi 1 2 labels={parts[5]}",
     ["manifest.csv:2", "labels={parts[5]}"]),
    ("path,split,labels\na.wav,train,x\n", "one multi 1 2 labels={labels", ["labels={labels"]),
    ("path,split,labels,start\na.wav,train,x,soon\n", "one multi 1 2", ["manifest.csv:2", "soon"]),
    ("path,split,labels,start\na.wav,train,x,-1\n", "one multi 1 2", ["manifest.csv:2", "-1"]),
    ("path,split,labels,start\na.wav,train,x,nan\n", "one multi 1 2", ["manifest.csv:2", "nan"]),
    ("path,split,labels,a,b\na.wav,train,x,0,end\n", "one multi 1 2 onset={a} offset={b}",
     ["manifest.csv:2", "0 end", "seconds"]),
    ("path,split,labels\na.wav,,x\n", "one multi 1 2", ["manifest.csv:2", "empty split"]),
    ("path,split,labels\n,train,x\n", "one multi 1 2", ["manifest.csv:2", "empty path"]),
    ("path,split,labels\na.wav,train,x\nb.wav,test,x;y\n", "one single 1 2",
     ["manifest.csv:3", "b.wav has 2 labels (x; y)", "multi"]),
    ("path,split,labels\na.wav,train,\nb.wav,test,x\n", "one single 1 1",
     ["manifest.csv:2", "a.wav has 0 labels"]),
    ("path,split,labels\na.wav,train,x\nb.wav,test,y\n", "one multi 1 3",
     ["datasets.txt:1", "3 classes declared, 2 found (x, y)"]),
    ('path,split,labels\na.wav,train,"x;y,z"\n', "one multi 1 2 sep=,", ["manifest.csv:2", "';'"]),
    ("path,split,labels\n", "one multi 1 2", ["no row"]),
    ("", "one multi 1 2 table=other/*.csv", ["datasets.txt:1", "other/*.csv"]),
    ("", "one multi 1 2 files=other/*.wav", ["datasets.txt:1", "other/*.wav"]),
    ("path,split,labels\na.wav,train,x\n", "one multi 1 2 shots=4",
     ["manifest.csv:2", "ebird_code", "BirdSet"]),
])
def test_what_cannot_be_read(manifest, line, words):
    with pytest.raises(Stop) as e:
        read_one(manifest, line)
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value), (word, str(e.value))


def test_quotes_that_never_close_are_one_sentence():
    rows = "".join(f"{i}.wav,train,x\n" for i in range(20000))  # longer than csv's own limit
    with pytest.raises(Stop, match=r"table.csv:20002: 1 values for 3 columns.*close"):
        read_one('path,split,labels\n"a.wav,train,x\n' + rows, "one multi 1 2 table=table.csv",
                 name="table.csv")


def test_rows_of_one_clip_add_up_and_its_first_split_stays():
    clips, _, _, events = read_one(
        "path,split,labels,on,off\na.wav,train,x,0,0.5\nb.wav,test,y,,\na.wav,test,y;x,0.25,0.75\n",
        "one multi 1 2 onset={on} offset={off}")
    assert short(clips) == {"a.wav": ("train", "x;y"), "b.wav": ("test", "y")}
    assert events == [("a.wav", 0, 0.5, "x"), ("a.wav", 0.25, 0.75, "x"),
                      ("a.wav", 0.25, 0.75, "y")]


def test_spellings_of_splits(capsys):
    rows = ["training", "dev", "Val", "validate", "validation", "eval", "Test"]
    names = [f"{r}.wav" for r in rows]
    clips, _, _, _ = read_one("path,split,labels\n" + "".join(
        f"{n},{r},x\n" for n, r in zip(names, rows)), "one multi 1 1", names)
    assert [c["split"] for c in clips] == ["train", "train", "valid", "valid", "valid", "test",
                                           "test"]
    extract.print_report({"classes": 1}, clips, {}, {}, ["x"])
    split, dev, *_ = capsys.readouterr().out.splitlines()
    assert dev.split()[:2] == ["train", "2"] and dev.endswith("(dev)  (training)")


def test_split_by_hash_does_not_depend_on_the_disk():
    names = [f"recording{i:04d}.wav" for i in range(1000)]
    manifest = "path,labels\n" + "".join(f"{n},x\n" for n in names)
    clips, _, _, _ = read_one(manifest, "one multi 1 1 split=70/30", names)
    for name, clip in zip(names, clips):  # the rule once more, in other words
        share = int.from_bytes(hashlib.md5(name.encode()).digest()[:4], "big") / 2**32
        assert clip["split"] == ("train" if share < 0.7 else "test")
    assert 650 < sum(c["split"] == "train" for c in clips) < 750
    shutil.rmtree("data")
    names = [n[:-3] + "flac" for n in names]
    flac, _, _, _ = read_one(manifest, "one multi 1 1 split=70/30", names)
    assert [c["split"] for c in flac] == [c["split"] for c in clips]


def test_missing_files_are_counted_and_other_endings_tried(capsys):
    clips, missing, classes, _ = read_one(
        "path,split,labels\na.wav,train,x\nb.wav,train,y\nc.wav,test,x\nd.wav,test,\n"
        "e.wav,test,z\n", "one multi 1 3", ["a.ogg", "c.mp3", "d.flac"])
    assert [c["path"] for c in clips] == ["a.ogg", "c.mp3", "d.flac"]
    assert missing == {"train": ["b.wav"], "test": ["e.wav"]}
    extract.print_report({"classes": 3}, clips, missing, {1: "broken"}, classes)
    out = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert out[0] == ["split", "clips", "missing", "unreadable", "labels/clip", "prevalence"]
    assert out[1] == ["train", "1", "1", "0", "1.00", "33.3%"]
    assert out[2] == ["test", "1", "1", "1", "0.00", "0.0%"]  # the one left has no label
    assert " ".join(out[3]) == ("3 classes found, 3 declared; 0 have a positive among the tested "
                                "clips")


def test_numbers_at_the_end_of_a_name_are_no_ending():
    clips, missing, _, _ = read_one("path,split,labels\nid_30.0_40.000,train,x\nb.2,test,x\n",
                                    "one multi 1 1", ["id_30.0_40.000.flac", "b.wav"])
    assert [c["path"] for c in clips] == ["id_30.0_40.000.flac"] and missing == {"test": ["b.2"]}


def test_names_looked_for_in_all_folders():
    put("one/table.csv", "name,split,labels\na.wav,train,x\nb.wav,test,x\n")
    for path in ("one/shard 1/a.wav", "one/shard 2/deep/b.ogg"):
        put(path)
    line = "one multi 1 1 table=table.csv path=**/{name}"
    clips, _, _, _ = extract.read_clips("data/one", lines(line)["one"])
    assert [c["path"] for c in clips] == ["shard 1/a.wav", "shard 2/deep/b.ogg"]
    put("one/shard 3/a.wav")
    extract.files_by_name.cache_clear()
    with pytest.raises(Stop, match="shard 1/a.wav and shard 3/a.wav have the same name"):
        extract.read_clips("data/one", lines(line)["one"])


# parquet

def test_embedded_audio():
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow
    rows = []
    for i, kind in enumerate(["WAV", "FLAC", "OGG", "WAV", "WAV"]):
        audio = io.BytesIO()
        soundfile.write(audio, np.full((1600, 1 + i % 2), (i + 1) / 10), 16000, format=kind)
        rows.append({"audio": {"bytes": audio.getvalue()[:20 if i == 3 else None], "path": "x.wav"},
                     "labels": [["dog", "cat, wild"], [], ["cat, wild"], ["dog"], None][i]})
    os.makedirs("data/one/data")
    parquet.write_table(pyarrow.Table.from_pylist(rows), "data/one/data/train-0.parquet",
                        row_group_size=2)
    parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), "data/one/data/test-0.parquet")
    sets = lines("one multi 0.1 2 table=data/train-*.parquet path={audio} split=train",
                 "one multi 0.1 2 table=data/test-*.parquet split=test")
    clips, missing, classes, _ = extract.read_clips("data/one", sets["one"])
    assert classes == ["cat, wild", "dog"] and not missing
    assert short(clips) == {
        "data/train-0.parquet#0": ("train", "cat, wild;dog"),
        "data/train-0.parquet#1": ("train", ""),
        "data/train-0.parquet#2": ("train", "cat, wild"),
        "data/train-0.parquet#3": ("train", "dog"),
        "data/train-0.parquet#4": ("train", ""),
        "data/test-0.parquet#0": ("test", "cat, wild;dog")}
    blocks = extract.Blocks(clips, 0.1, 4)
    waves, bad, lengths = blocks[0]
    assert lengths == [1600] * 3 and list(bad) == [3] and waves[3].abs().max() == 0  # a cut file, silent and named
    for i in (0, 1):
        assert waves[i].sub((i + 1) / 10).abs().max() < 1e-3
    assert waves[2].mean().sub(0.3).abs() < 0.05  # ogg is lossy
    waves, bad, _ = blocks[1]
    assert not bad and waves[0].sub(0.5).abs().max() < 1e-3 and waves[1].sub(0.1).abs().max() < 1e-3


def test_numbers_as_labels():
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow
    os.makedirs("data/one")
    put("one/a.wav")
    parquet.write_table(pyarrow.table({"file": ["a.wav"], "label": [[3, 12]], "fold": [2],
                                       "at": [1.5]}), "data/one/t.parquet")
    sets = lines("one multi 1 2 table=t.parquet path={file} labels={label} split={fold} start={at}")
    clips, _, classes, _ = extract.read_clips("data/one", sets["one"])
    assert short(clips) == {("a.wav", 1.5): ("2", "12;3")} and classes == ["12", "3"]


def test_without_pyarrow(monkeypatch):
    put("one/t.parquet", b"PAR1")
    data = lines("one multi 1 2 table=t.parquet")["one"]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(Stop, match="t.parquet: reading parquet needs .* pip install pyarrow"):
        extract.read_clips("data/one", data)


def test_a_parquet_file_that_is_not_whole():
    pytest.importorskip("pyarrow.parquet")
    put("one/t.parquet", b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(Stop, match="t.parquet: not a whole parquet file"):
        extract.read_clips("data/one", lines("one multi 1 2 table=t.parquet")["one"])


# few-shot

def shots(rows, k, seed=1):
    rows = [row | {"where": "t"} for row in rows]
    return [(r["filepath"], r["ebird_code"], r["start"])
            for r in extract.few_shot(rows, k, 5, seed)]


def test_few_shot_by_hand():
    def take(*args, **kwargs):
        return [start for _, _, start in shots([bird("a", "x", *args, **kwargs)], 9)]

    assert take([(6, 8)], [0]) == [4.5]                            # centred on the event
    assert take([(0.5, 1)], [0]) == [0] and take([(11, 12)], [0]) == [7]  # kept inside the file
    assert take([(11, 12)], [0], length=0) == [9]                  # a length that is not known
    assert take([(1, 2)], [0], length=3) == [0]
    assert take([(6, 8)], [0], length=20) == [4.5] and not take([(6, 8)], [0], length=20.5)
    assert not take([(6, 8)], [0], secondary=["y"])
    assert take([], []) == [0]                                     # no event: the first 5 s
    assert take([(6, 8)], [-1]) == [4.5]                           # noise, if it is the only event
    assert take([(6, 8), (8, 9)], [-1, -1]) == [0]                 # several of noise: as none
    assert take([(6, 8), (1, 8), (4, 7)], [-1, -1, 3]) == [3]
    assert sorted(take([(3, 4), (5, 6), (8, 9)], [2, 7, 7])) == [3, 6]  # the larger cluster
    assert sorted(take([(3, 4), (5, 6), (8, 9), (7, 8)], [2, 1, 1, 2])) == [3, 6]  # tie: the first
    assert take([(3, 9), (4, 5), (6, 7)], [0, 0, 0]) == [3.5]      # events inside another
    assert sorted(take([(3, 9), (3, 5)], [0, 0])) == [1.5, 3.5]    # one end shared: not inside
    assert take([(0, 1), (1, 2)], [0, 0]) == [0]                   # the same clip counts once


def test_few_shot_counts():
    rows = [bird(f"a{i:02d}", "many", [(3, 4), (8, 9)], [0, 0]) for i in range(30)]
    rows += [bird(f"b{i}", "few", [(3, 4), (6, 7), (9, 10)], [0, 0, 0]) for i in range(3)]
    rows += [bird("c", "one")]
    taken = shots(rows, 5)
    assert len(taken) == len(set(taken)) == 11
    many = [t for t in taken if t[1] == "many"]
    assert len(many) == 5 and len({t[0] for t in many}) == 5       # primaries before left-overs
    few = [t for t in taken if t[1] == "few"]
    assert len(few) == 5 and {t[0] for t in few} == {"b0", "b1", "b2"}
    assert [t for t in taken if t[1] == "one"] == [("c", "one", 0)]  # no fill-up
    assert len([t for t in shots(rows, 99) if t[1] == "few"]) == 9
    assert shots(rows, 5) == taken == shots(rows[::-1], 5)         # whatever the order of the table
    assert shots(rows, 5, seed=2) != taken


# downloads

class Server(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        site, name = self.server, self.path.split("?")[0].lstrip("/")
        site.log.append((self.command, name, self.headers.get("Range")))
        if name not in site.files:
            return self.send_error(404)
        body, first = site.files[name], 0
        if self.headers.get("Range") and site.ranges:
            first = int(self.headers["Range"][6:-1])
            if first >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if site.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        if self.command == "GET":
            head = b"%x\r\n" % (len(body) - first) if site.chunked else b""
            tail = b"\r\n0\r\n\r\n" if site.chunked and not site.cut else b""
            self.wfile.write(head + body[first:][:site.cut or None] + tail)


@pytest.fixture
def site():
    Server.protocol_version = "HTTP/1.0"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.files, server.log, server.ranges, server.cut, server.chunked = {}, [], True, 0, False
        server.url = f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


BODY = bytes(range(256)) * 4000  # 1 MB
GOOD = hashlib.md5(BODY).hexdigest()


def download(site, digest="", name="a.bin"):
    extract.download(site.url + name, "got/" + name, digest, "do it by hand")
    return pathlib.Path("got", name).read_bytes()


@pytest.mark.parametrize("digest", ["", GOOD, hashlib.sha256(BODY).hexdigest()])
def test_download(site, digest):
    site.files["a.bin"] = BODY
    assert download(site, digest) == BODY
    assert site.log == [("GET", "a.bin", None)] and os.listdir("got") == ["a.bin"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_is_gone_on_with(site, ranges):
    site.files["a.bin"], site.ranges = BODY, ranges
    os.makedirs("got")
    pathlib.Path("got/a.bin.part").write_bytes(BODY[:300000])
    assert download(site, GOOD) == BODY and os.listdir("got") == ["a.bin"]
    assert site.log == [("GET", "a.bin", "bytes=300000-")]  # answered 206, or 200 from the start


@pytest.mark.parametrize("chunked", [False, True])
def test_a_connection_that_breaks_off(site, chunked):
    Server.protocol_version = "HTTP/1.1" if chunked else "HTTP/1.0"
    site.files["a.bin"], site.cut, site.chunked = BODY, 400000, chunked
    with pytest.raises(Stop):
        download(site)
    assert os.listdir("got") == ["a.bin.part"], "it never passes as complete"
    had = os.path.getsize("got/a.bin.part")
    site.cut = 0
    assert download(site) == BODY
    assert site.log[-1] == ("GET", "a.bin", f"bytes={had}-" if had else None)


def test_a_part_that_is_whole_or_too_long(site):
    site.files["a.bin"] = BODY
    os.makedirs("got")
    pathlib.Path("got/a.bin.part").write_bytes(BODY)
    assert download(site) == BODY
    os.remove("got/a.bin")
    pathlib.Path("got/a.bin.part").write_bytes(BODY + b"more")
    with pytest.raises(Stop, match="run the same command again"):
        download(site)
    assert not os.listdir("got") and download(site) == BODY


def test_wrong_checksum(site):
    site.files["a.bin"] = BODY[:-1] + b"x"
    with pytest.raises(Stop, match=f"checksum {GOOD}.*do it by hand"):
        download(site, GOOD)
    assert not os.listdir("got")
    site.files["a.bin"] = BODY
    assert download(site, GOOD) == BODY


def test_not_there_and_nobody_there(site):
    with pytest.raises(Stop, match="answered 404 Not Found; do it by hand"):
        download(site)
    with pytest.raises(Stop, match="cannot reach http://127.0.0.1:9/a .*do it by hand"):
        extract.download("http://127.0.0.1:9/a", "got/a", "", "do it by hand")


def test_no_room(site, monkeypatch):
    site.files["a.bin"] = site.files["a.zip"] = BODY
    full = shutil.disk_usage(".")._replace(free=len(BODY) - 1)
    monkeypatch.setattr(extract.shutil, "disk_usage", lambda path: full)
    with pytest.raises(Stop, match="download of a.bin needs .* GB free; make room"):
        download(site)
    with pytest.raises(Stop, match="data/one .*needs .* GB free; make room"):
        extract.fetch_dataset("data/one", {"urls": [[site.url + "a.zip", ""]]})
    assert site.log[-1][0] == "HEAD", "the sizes are asked for before anything is fetched"
    with pytest.raises(Stop, match="unpacking a.zip needs"):
        extract.unpack(str(put("a.zip", zip_of({"a": os.urandom(len(BODY))}))), "data")


# archives

def zip_of(files, links=()):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (0o120777 if name in links else 0o100644) << 16
            archive.writestr(info, content)
    return out.getvalue()


def tar_of(files, mode="w", **odd):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, (kind, target) in odd.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    return out.getvalue()


def split_zip(name, files, size):
    """name.z01, name.z02, ... name.zip: the archive cut every `size` bytes; the places in its
    directory are (part, place in that part), as `zip -s` writes them."""
    whole = b"PK\7\x08" + zip_of(files)                     # the mark of a split archive
    end = whole.rindex(b"PK\5\6")
    first = int.from_bytes(whole[end + 16:end + 20], "little") + 4
    whole, at = bytearray(whole), first
    while at < end:
        lengths = struct.unpack_from("<3H", whole, at + 28)
        place, = struct.unpack_from("<I", whole, at + 42)
        struct.pack_into("<H", whole, at + 34, (place + 4) // size)
        struct.pack_into("<I", whole, at + 42, (place + 4) % size)
        at += 46 + sum(lengths)
    cuts = [*range(0, end, size), len(whole)]               # the end record stays in one piece
    parts = len(cuts) - 1
    struct.pack_into("<HHHHII", whole, end + 4, parts - 1, first // size, len(files), len(files),
                     end - first, first % size)
    names = [f"{name}.z{i:02d}" for i in range(1, parts)] + [f"{name}.zip"]
    return {n: bytes(whole[a:b]) for n, a, b in zip(names, cuts, cuts[1:])}


TREE = {"meta/esc50.csv": b"filename,fold\n", "audio/1-a.wav": bytes(5000), "audio/empty": b""}


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in pathlib.Path(folder).rglob("*") if p.is_file()}


def fetch(site, **files):
    """fetch_dataset over files of the site, whose names have - for ."""
    site.files |= {name.replace("_", "."): content for name, content in files.items()}
    urls = [[site.url + name + "?download=1", ""] for name in site.files]
    extract.fetch_dataset("data/one", {"urls": urls})
    return tree("data/one")


@pytest.mark.parametrize("top", ["", "ESC-50-5983fb0/"])
@pytest.mark.parametrize("kind", ["zip", "tar", "tar_gz"])
def test_unpacked(site, kind, top, capsys):
    files = {top + name: content for name, content in TREE.items()}
    body = zip_of(files) if kind == "zip" else tar_of(files, "w:gz" if kind == "tar_gz" else "w")
    assert fetch(site, **{"a_" + kind: body}) == TREE  # one folder at the top is left out
    assert os.listdir("data") == ["one"]
    assert "fetching 1 files into data/one.download (0.00 GB stated)" in capsys.readouterr().err


def test_pythons_without_the_filter_of_tarfile(site, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter", raising=False)  # before 3.10.12 and 3.11.4
    assert fetch(site, a_tar=tar_of(TREE)) == TREE


def test_several_archives_and_plain_files(site):
    got = fetch(site, a_tar=tar_of({"audio/a.wav": b"a"}), eval_csv=b"x,y\n",
                b_tar_gz=tar_of({"audio/b.wav": b"b"}, "w:gz"))
    assert got == {"audio/a.wav": b"a", "audio/b.wav": b"b", "eval.csv": b"x,y\n"}


def test_split_zip(site):
    rng = np.random.default_rng(0)
    files = {f"FSD50K.dev_audio/{i}.wav": rng.bytes(int(rng.integers(0, 3000))) for i in range(40)}
    eval_ = {"FSD50K.eval_audio/7.wav": rng.bytes(9999)}
    dev = split_zip("FSD50K.dev_audio", files, 9000)
    assert len(dev) > 5
    assert zipfile.ZipFile(io.BytesIO(b"".join(dev.values()))).testzip()  # zipfile alone: a bad one
    site.files = dev | split_zip("FSD50K.eval_audio", eval_, 1000)
    assert fetch(site) == files | eval_


def test_split_zip_without_a_part(site):
    site.files = split_zip("a", {f"{i}.wav": os.urandom(900) for i in range(20)}, 5000)
    del site.files["a.z02"]
    with pytest.raises(Stop, match="a.zip: not a whole archive"):
        fetch(site)
    assert not os.path.exists("data/one") and not os.path.exists("data/one.unpacking")


@pytest.mark.parametrize("name", ["../out.wav", "/tmp/out.wav", "a/../../out.wav", "\\out.wav",
                                  "a\\..\\..\\out.wav", "C:/out.wav"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_outside_the_folder(site, name, kind):
    body = (zip_of if kind == "zip" else tar_of)({"good.wav": b"1", name: b"2"})
    with pytest.raises(Stop, match="refused, its member"):
        fetch(site, **{"a_" + kind: body})
    assert os.listdir("data") == ["one.download"], "nothing was written, not even the good member"


@pytest.mark.parametrize("kind, target", [
    (tarfile.SYMTYPE, "/etc"), (tarfile.SYMTYPE, "inside"), (tarfile.LNKTYPE, "inside"),
    (tarfile.CHRTYPE, ""), (tarfile.FIFOTYPE, "")])
def test_links_and_devices_in_a_tar(site, kind, target):
    with pytest.raises(Stop, match="refused, its member 'odd'"):
        fetch(site, a_tar=tar_of({"inside": b"1"}, odd=(kind, target)))
    assert os.listdir("data") == ["one.download"]


def test_link_in_a_zip(site):
    with pytest.raises(Stop, match="refused, its member 'odd'"):
        fetch(site, a_zip=zip_of({"inside": b"1", "odd": b"/etc"}, links=["odd"]))
    assert os.listdir("data") == ["one.download"]


def test_more_bytes_than_can_be(site):
    with pytest.raises(Stop, match="refused, it declares 10,000,000 bytes from"):
        fetch(site, a_zip=zip_of({"a.wav": bytes(10_000_000)}))
    site.files = {}
    with pytest.raises(Stop, match="refused, it declares 10,000,000 bytes from"):
        fetch(site, b_tar_gz=tar_of({"a.wav": bytes(10_000_000)}, "w:gz"))
    assert not os.path.exists("data/one")


def test_killed_while_unpacking(site, monkeypatch):
    def half(archive, folder, **kwargs):
        archive.extract("audio/1-a.wav", folder)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", half)
        with pytest.raises(KeyboardInterrupt):
            fetch(site, a_zip=zip_of(TREE))
    assert os.listdir("data") == ["one.download"]
    put("one.unpacking/audio/left over from a kill.wav")
    site.log.clear()
    assert fetch(site) == TREE and os.listdir("data") == ["one"]
    assert not [x for x in site.log if x[0] == "GET"], "what was fetched is not fetched again"


@pytest.mark.parametrize("name, body", [
    ("a_zip", zip_of(TREE)[:-30]), ("a_zip", b"<html>please log in</html>"),
    ("a_tar_gz", tar_of({"a": os.urandom(9000)}, "w:gz")[:5000]), ("a_tar", b"<html>"),
    ("a_zip", zip_of({"a": bytes(range(256))}).replace(b"\x80\x81", b"\x81\x80"))])
def test_archives_that_are_not_whole(site, name, body):
    with pytest.raises(Stop, match="not a whole archive.*by hand"):
        fetch(site, **{name: body})
    assert os.listdir("data") == ["one.download"] and not os.listdir("data/one.download")
    site.files = {}
    assert fetch(site, b_zip=zip_of(TREE)) == TREE


def test_a_compression_that_python_lacks(site):
    """Deflate64, as Windows writes it above 2 GB; the archive is kept, since it may be whole."""
    body = bytearray(zip_of({"a.wav": bytes(5000)}))
    struct.pack_into("<H", body, 8, 9)
    struct.pack_into("<H", body, body.rindex(b"PK\1\2") + 10, 9)
    with pytest.raises(Stop, match="a.zip: Python cannot unpack it .*by hand into data/one/"):
        fetch(site, a_zip=bytes(body))
    assert os.listdir("data") == ["one.download"] and os.listdir("data/one.download") == ["a.zip"]


def test_a_dataset_from_address_to_clips(site):
    top = "ESC-50-5983fb0c35e751b452e7c562d9207f27b76ddf0d/"
    site.files["5983fb0.zip"] = zip_of({
        top + "meta/esc50.csv": b"filename,fold,target,category,esc10,src_file,take\n"
                                b"1-100032-A-0.wav,1,0,dog,True,100032,A\n",
        top + "audio/1-100032-A-0.wav": b"", top + "README.md": b"ESC-50"})
    sets = lines(f"esc50 single 5 1 url={site.url}5983fb0.zip",
                 "esc50 single 5 1 table=meta/esc50.csv path=audio/{filename} labels={category} "
                 "split={fold}")
    extract.fetch_dataset("data/esc50", sets["esc50"])
    clips, _, _, _ = extract.read_clips("data/esc50", sets["esc50"])
    assert short(clips) == {"audio/1-100032-A-0.wav": ("1", "dog")}
