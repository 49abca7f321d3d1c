"""Write data/demo: 1,100 synthetic soundscapes of 5 s with labels and known onsets [ours].

    python tests/demo.py

In the manner of URBAN-SED: colored noise and 1-5 overlapping events of random class, onset, length,
pitch and level. The classes differ in how they move, not in where they lie: 'up' and 'down' have
the same mean spectrum, and every pitch is random. The same bytes every time.
"""

import csv
import os
import shutil
import sys

import numpy as np
import soundfile

CLASSES = ("beeps", "bell", "buzz", "clicks", "down", "hiss", "siren", "tremolo", "up", "warble")
SPLITS = {"train": 700, "valid": 100, "test": 300}  # clips
RATE, SECONDS, SEED = 16000, 5, 2509

def make(root="data/demo", splits=SPLITS):
    """Write soundscapes (16 kHz, 16 bit), manifest.csv and events.csv below root, all or none."""
    new = root + ".making"
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(os.path.join(new, "audio"))
    rng = np.random.default_rng(SEED)
    manifest, events = [("path", "split", "labels")], [("path", "onset", "offset", "label")]
    for split, clips in splits.items():
        for i in range(clips):
            path = f"audio/{split}{i:04d}.wav"
            wave, heard = soundscape(rng)
            pcm = np.round(wave * 32767).astype(np.int16)
            soundfile.write(os.path.join(new, path), pcm, RATE)
            manifest.append((path, split, ";".join(sorted({label for *_, label in heard}))))
            events += [(path, *event) for event in heard]
    for name, rows in (("manifest.csv", manifest), ("events.csv", events)):
        with open(os.path.join(new, name), "w", newline="", encoding="utf-8") as f:
            csv.writer(f, lineterminator="\n").writerows(rows)
    os.rename(new, root)

def soundscape(rng):
    """(wave float64 (80000,), [(onset s, offset s, class)])"""
    size = SECONDS * RATE
    tilt = np.arange(1, size // 2 + 2) ** -rng.uniform(0, 0.75)  # white to nearly pink
    wave = np.fft.irfft(np.fft.rfft(rng.standard_normal(size)) * tilt, size)
    wave *= 0.01 / wave.std()
    events = []
    for _ in range(rng.integers(1, 6)):
        name = CLASSES[rng.integers(len(CLASSES))]
        seconds = rng.uniform(0.5, 2.0)
        onset = rng.uniform(0, SECONDS - seconds)
        sound = event(name, np.arange(int(seconds * RATE)) / RATE, rng)
        fade = np.minimum(1, np.arange(len(sound)) / 160)      # 10 ms
        sound *= fade * fade[::-1]
        sound *= 0.01 * 10 ** (rng.uniform(6, 20) / 20) / sound.std()  # 6-20 dB above the noise
        wave[int(onset * RATE):][:len(sound)] += sound
        events.append((round(onset, 3), round(onset + seconds, 3), name))
    return wave * min(1, 0.95 / np.abs(wave).max()), sorted(events)

def tone(hz, t):
    return np.sin(2 * np.pi * np.cumsum(hz + 0 * t) / RATE)

def event(name, t, rng):
    """One sound of class `name` at the times t (s)."""
    pitch = 300 * 2 ** rng.uniform(0, 3.5)                     # 300-3400 Hz
    noise = rng.standard_normal(len(t))
    if name in ("up", "down"):      # two octaves in 0.3-0.6 s, again and again
        ramp = t / rng.uniform(0.3, 0.6) % 1
        return tone(pitch * 2 ** (2 * (ramp if name == "up" else 1 - ramp)) / 2, t)
    if name in ("siren", "warble"):  # slow swing over an octave, fast swing over a third
        width, low, high = (0.5, 0.8, 1.6) if name == "siren" else (0.17, 8, 14)
        return tone(pitch * 2 ** (width * np.sin(2 * np.pi * t * rng.uniform(low, high))), t)
    if name == "beeps":             # a tone, on and off
        return tone(pitch, t) * (t * rng.uniform(4, 8) % 1 < 0.5)
    if name == "tremolo":           # a rough tone
        return tone(pitch, t) * (1 + np.sin(2 * np.pi * t * rng.uniform(25, 45)))
    if name == "bell":              # inharmonic partials that ring off
        ring = np.exp(-(t % 0.5) * rng.uniform(6, 12))
        return ring * sum(tone(pitch * p, t) for p in (1, 1.52, 2.13, 2.76))
    if name == "buzz":              # all harmonics of a low voice
        return 2 * (t * rng.uniform(90, 220) % 1) - 1
    if name == "clicks":            # short impulses, irregular
        return noise * np.exp(-(t * rng.uniform(9, 18) + rng.uniform(0, 1) % 1) % 1 * 25)
    low = rng.uniform(300, 4000)    # hiss: steady noise of a band
    spectrum = np.fft.rfft(noise)
    hz = np.fft.rfftfreq(len(t), 1 / RATE)
    return np.fft.irfft(spectrum * ((hz > low) & (hz < 2 * low)), len(t))

if __name__ == "__main__":
    if os.path.exists("data/demo"):
        sys.exit("data/demo already exists")
    make()
    print("data/demo: 1,100 soundscapes of 5 s, manifest.csv, events.csv")
