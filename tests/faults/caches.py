"""The context cache. A damaged entry is made again, or the run refuses; it never trains on it."""

import os
import shutil
import time
from pathlib import Path

import torch

from .cases import Case, kind
from .damage import block, damage_file, files_in, read_tensors, remove, write_tensors
from .lab import Scene


def cache_of(scene: Scene, subject: str) -> Path:
    return scene.copy(scene.lab.reference(subject).run / "context_cache", "cache")


def case(scene: Scene, subject: str, what: str, **rest) -> Case:
    weights = scene.lab.reference(subject).after_two
    return Case(what, subject, {"context_cache_dir": scene.folder / "cache"}, weights=weights, **rest)


@kind
def entry_bytes(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    entries = files_in(cache_of(scene, subject))
    chosen = rng.sample(entries, rng.choice([1, len(entries)]))
    done = [damage_file(rng, path) for path in chosen]
    return case(scene, subject, f"{len(done)} entries: {done[0]}", must="train")


@kind
def entry_edited(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    path = rng.choice(files_in(cache_of(scene, subject)))
    tensor = read_tensors(path)["tensor"]
    edits = {
        "other values": {"tensor": tensor + 1},
        "not finite": {"tensor": tensor * float("nan")},
        "another shape": {"tensor": tensor[None]},
        "empty": {"tensor": tensor[:0]},
        "another dtype": {"tensor": tensor.half()},
        "another name": {"x": tensor},
        "no tensors": {},
        "two tensors": {"tensor": tensor, "x": torch.ones(1)},
    }
    what = rng.choice(list(edits))
    write_tensors({name: value.contiguous() for name, value in edits[what].items()}, path)
    return case(scene, subject, f"an entry: {what}", must="train")


@kind
def entries_swapped(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    first, second = rng.sample(files_in(cache_of(scene, subject)), 2)
    how = rng.choice(["swapped", "copied", "linked", "hard-linked"])
    if how == "swapped":
        data = first.read_bytes()
        shutil.copy(second, first)
        second.write_bytes(data)
    else:
        first.unlink()
        {"copied": shutil.copy, "linked": os.symlink, "hard-linked": os.link}[how](second, first)
    return case(scene, subject, f"two entries {how}", must="train")


@kind
def entry_of_another(scene: Scene) -> Case:
    """Another model's encoding under this one's name."""
    rng, subject = scene.rng, scene.subject()
    other = "zimage" if subject != "zimage" else "flux2"
    path = rng.choice(files_in(cache_of(scene, subject)))
    source = rng.choice(files_in(scene.lab.reference(other).run / "context_cache"))
    shutil.copy(source, path)
    return case(scene, subject, f"an entry of {other}", must="train")


@kind
def entries_missing(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    cache = cache_of(scene, subject)
    entries = files_in(cache)
    gone = rng.sample(entries, rng.randrange(1, len(entries) + 1))
    with_folders = rng.random() < 0.5
    for path in gone:
        remove(path.parent if with_folders else path)
    return case(scene, subject, f"{len(gone)} of {len(entries)} entries missing", must="train")


@kind
def entry_blocked(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    path = rng.choice(files_in(cache_of(scene, subject)))
    return case(scene, subject, block(rng, rng.choice([path, path, path.parent])))


@kind
def cache_blocked(scene: Scene) -> Case:
    subject = scene.subject()
    return case(scene, subject, block(scene.rng, cache_of(scene, subject)))


@kind
def extra_entries(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    cache = cache_of(scene, subject)
    entry = rng.choice(files_in(cache))
    temporary = entry.with_name(f"{entry.stem}.{'0' * 32}.safetensors.tmp")
    kinds = {
        "a fresh temporary file": lambda: temporary.write_bytes(b"x"),
        "an old temporary file": lambda: (temporary.write_bytes(b"x"), os.utime(temporary, (0, 0))),
        "a temporary folder": lambda: (temporary.mkdir(), os.utime(temporary, (0, 0))),
        "a dangling temporary link": lambda: temporary.symlink_to("nowhere"),
        "odd names": lambda: [(cache / name).write_text("x") for name in ("x", "é", "\udcff", "a\nb", "00")],
        "another entry": lambda: shutil.copy(entry, entry.with_name("0" * 64 + ".safetensors")),
        "a file from the future": lambda: os.utime(entry, (time.time() + 10**9,) * 2),
        "an entry in upper case": lambda: shutil.copy(entry, entry.with_name(entry.name.upper())),
    }
    what = rng.choice(list(kinds))
    kinds[what]()
    return case(scene, subject, f"also {what}", must="train")


@kind
def linked_cache(scene: Scene) -> Case:
    """The cache, one of its folders or an entry is on another disk."""
    rng, subject = scene.rng, scene.subject()
    cache = cache_of(scene, subject)
    entry = rng.choice(files_in(cache))
    place = rng.choice([cache, entry.parent, entry])
    elsewhere = scene.folder / "elsewhere"
    os.rename(place, elsewhere)
    place.symlink_to(elsewhere)
    return case(scene, subject, f"{place.name:.20} is a link", must="train")


@kind
def resumed_with_damage(scene: Scene) -> Case:
    """A run that is resumed finds its cache damaged."""
    rng, subject = scene.rng, scene.subject()
    cache = scene.run(subject) / "context_cache"
    kinds = {
        "removed": lambda: remove(cache),
        "emptied": lambda: [remove(path) for path in cache.iterdir()],
        "damaged": lambda: [damage_file(rng, path) for path in files_in(cache)],
    }
    what = rng.choice(list(kinds))
    kinds[what]()
    return scene.resumed(f"its cache is {what}", subject, must="train")
