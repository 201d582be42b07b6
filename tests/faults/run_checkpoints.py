"""A run's own checkpoints. A resumed run ends with exactly the weights of an undisturbed one, or refuses."""

import json
import os
import shutil
from pathlib import Path

import torch

from .cases import Case, kind
from .damage import ODD_VALUES, block, damage_file, damage_json, damaged, files_in, read_tensors, write_tensors
from .lab import Scene
from .model_checkpoints import Payload


STATE, ADAPTERS, TRAINER = "state.json", "adapters.safetensors", "trainer_state.pt"


def newest(scene: Scene, subject: str) -> Path:
    return scene.run(subject) / "checkpoint-4"


def resumed(scene: Scene, subject: str, what: str, **case) -> Case:
    """The run is resumed from the latest checkpoint or, half of the time, from checkpoint-4 by its name."""
    wanted = scene.rng.choice(["latest", "checkpoint-4"])
    flags = {"resume_from_checkpoint": wanted, **case.pop("flags", {})}
    return scene.resumed(f"{what}; resumed from {flags['resume_from_checkpoint']}", subject, flags=flags, **case)


@kind
def checkpoint_bytes(scene: Scene) -> Case:
    subject = scene.subject()
    checkpoint = newest(scene, subject)
    return resumed(scene, subject, damage_file(scene.rng, scene.rng.choice(files_in(checkpoint))))


@kind
def checkpoint_bit(scene: Scene) -> Case:
    """One flipped bit in a file that decides the weights."""
    rng, subject = scene.rng, scene.subject()
    path = newest(scene, subject) / rng.choice([ADAPTERS, TRAINER, STATE])
    data = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(bytes(data))
    return resumed(scene, subject, f"{path.name}: bit {bit} of byte {place} flipped")


@kind
def checkpoint_file_missing(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    checkpoint = newest(scene, subject)
    gone = rng.sample(files_in(checkpoint), rng.choice([1, 1, 2, 4]))
    for path in gone:
        path.unlink()
    return resumed(scene, subject, f"missing: {', '.join(path.name for path in gone)}")


@kind
def checkpoint_files_swapped(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    checkpoint = newest(scene, subject)
    older = checkpoint.with_name("checkpoint-2")
    names = rng.sample([ADAPTERS, TRAINER, STATE], rng.choice([1, 1, 2]))
    how = rng.choice(["from checkpoint-2", "to checkpoint-2", "swapped"])
    for name in names:
        new, old = (checkpoint / name).read_bytes(), (older / name).read_bytes()
        if how != "to checkpoint-2":
            (checkpoint / name).write_bytes(old)
        if how != "from checkpoint-2":
            (older / name).write_bytes(new)
    if how == "to checkpoint-2":
        shutil.rmtree(checkpoint)
        flags = {"resume_from_checkpoint": rng.choice(["latest", "checkpoint-2"])}
        return resumed(scene, subject, f"{', '.join(names)} of checkpoint-4 in checkpoint-2", flags=flags)
    return resumed(scene, subject, f"{', '.join(names)} {how}")


@kind
def checkpoint_of_another_run(scene: Scene) -> Case:
    """A file, or the whole checkpoint, of a run on another model."""
    rng, subject = scene.rng, scene.subject()
    checkpoint = newest(scene, subject)
    other = scene.lab.reference("zimage" if subject.startswith("flux2") else "flux2").run / "checkpoint-4"
    names = rng.choice([[ADAPTERS], [TRAINER], [STATE], [ADAPTERS, TRAINER, STATE]])
    for name in names:
        shutil.copy(other / name, checkpoint / name)
    return resumed(scene, subject, f"{', '.join(names)} of another model's run")


@kind
def step_edited(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    path = newest(scene, subject) / STATE
    state = json.loads(path.read_text())
    state["step"] = step = rng.choice(
        [0, 2, 3, 5, 6, 7, 10**9, 10**30, -1, 4.0, 4.5, "4", None, [], True, float("nan")]
    )
    path.write_text(json.dumps(state))
    return resumed(scene, subject, f"step = {step!r}")


@kind
def settings_edited(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    path = newest(scene, subject) / STATE
    state = json.loads(path.read_text())
    what = rng.choice(["whole", "one", "deleted", "added", "rank", "top level"])
    if what == "whole":
        state["settings"] = value = rng.choice([None, {}, [], "x", 0, [["--rank", 4]]])
        what = f"settings = {value!r}"
    elif what == "one":
        name = rng.choice(sorted(state["settings"]))
        state["settings"][name] = value = rng.choice(ODD_VALUES)
        what = f"settings[{name!r}] = {value!r}"
    elif what == "deleted":
        names = sorted(state["settings"])
        for name in rng.sample(names, rng.choice([1, 2, len(names)])):
            del state["settings"][name]
            what = f"settings without {name!r} and perhaps others"
    elif what == "added":
        state["settings"][rng.choice(["--new", "x", "", "é"])] = rng.choice([None, 1, {}])
        what = "settings of a later version"
    elif what == "rank":
        state["settings"]["--rank"] = 8
        what = "another rank"
    else:
        name = rng.choice(sorted(state))
        if rng.random() < 0.5:
            del state[name]
            what = f"without {name!r}"
        else:
            state[name] = value = rng.choice(ODD_VALUES)
            what = f"{name} = {value!r}"
    path.write_text(json.dumps(state))
    return resumed(scene, subject, f"{STATE}: {what}")


@kind
def state_damaged(scene: Scene) -> Case:
    subject = scene.subject()
    return resumed(scene, subject, damage_json(scene.rng, newest(scene, subject) / STATE))


@kind
def adapters_edited(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    path = newest(scene, subject) / ADAPTERS
    tensors = read_tensors(path)
    name = rng.choice(sorted(tensors))
    edits = {
        "missing": lambda: tensors.pop(name),
        "renamed": lambda: tensors.update({f"x.{name}": tensors.pop(name)}),
        "extra": lambda: tensors.update(x=torch.ones(2)),
        "of another shape": lambda: tensors.update({name: torch.cat([tensors[name]] * 2)}),
        "in bfloat16": lambda: tensors.update({name: tensors[name].bfloat16()}),
        "not finite": lambda: tensors.update({name: tensors[name] * float("nan")}),
        "doubled": lambda: tensors.update({name: tensors[name] * 2 + 1}),
        "all missing": lambda: tensors.clear(),
    }
    what = rng.choice(list(edits))
    edits[what]()
    write_tensors(tensors, path)
    return resumed(scene, subject, f"{ADAPTERS}: {name} {what}")


@kind
def trainer_state_edited(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    path = newest(scene, subject) / TRAINER
    payload = scene.folder / "executed"
    state = torch.load(path, weights_only=True)
    moments = state["optimizer"]["state"]
    edits = {
        "no optimizer": lambda: state.pop("optimizer"),
        "no schedule": lambda: state.pop("lr_scheduler"),
        "no moments": lambda: moments.clear(),
        "one moment missing": lambda: moments.pop(next(iter(moments))),
        "a moment of another shape": lambda: next(iter(moments.values())).update(exp_avg=torch.ones(3)),
        "a moment in bfloat16": lambda: next(iter(moments.values())).update(exp_avg=torch.ones(3).bfloat16()),
        "another learning rate": lambda: state["optimizer"]["param_groups"][0].update(lr=1.0),
        "more parameters": lambda: state["optimizer"]["param_groups"][0]["params"].append(9999),
        "another step of the schedule": lambda: state["lr_scheduler"].update(last_epoch=2),
        "a schedule of text": lambda: state.update(lr_scheduler="x"),
        "an optimizer of None": lambda: state.update(optimizer=None),
        "code": lambda: state.update(x=Payload(payload)),
    }
    what = rng.choice(list(edits))
    edits[what]()
    torch.save(state, path)
    return resumed(scene, subject, f"{TRAINER}: {what}", payload=payload)


@kind
def trainer_state_of_another_type(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    path = newest(scene, subject) / TRAINER
    value = rng.choice(
        [None, [], {}, "x", 7, torch.ones(3), {"optimizer": {}, "lr_scheduler": {}}, {"x": [torch.ones(1)]}]
    )
    torch.save(value, path)
    return resumed(scene, subject, f"{TRAINER} holds {value!r:.40}")


@kind
def odd_names(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    run = scene.run(subject)
    name = rng.choice(
        [
            "checkpoint-00002",
            "checkpoint-99999999999",
            "checkpoint-6",
            "checkpoint-3",
            "checkpoint--4",
            "checkpoint-4.0",
        ]
        + [
            "checkpoint-４",
            "checkpoint-²",
            "checkpoint-",
            "checkpoint-x",
            "checkpoint-4 (copy)",
            "checkpoint-04",
            "Checkpoint-9",
        ]
        + ["checkpoint-" + "9" * 200, "checkpoint-5\n", "checkpoint-\udcff"]
    )
    source = rng.choice(["checkpoint-2", "checkpoint-4"])
    is_moved = rng.random() < 0.3
    if is_moved:
        (run / source).rename(run / name)
    else:
        shutil.copytree(run / source, run / name)
    wanted = rng.choice(["latest", "latest", name])
    what = f"{source} {'moved' if is_moved else 'copied'} to {name!a:.40}"
    return resumed(scene, subject, what, flags={"resume_from_checkpoint": wanted})


@kind
def odd_wishes(scene: Scene) -> Case:
    """Names of checkpoints that are not there, or not what they seem."""
    rng, subject = scene.rng, scene.subject()
    run = scene.run(subject)
    wanted = rng.choice(
        [
            "",
            " ",
            ".",
            "..",
            "checkpoint-3",
            "checkpoint-",
            "Latest",
            "latest ",
            "checkpoint-4/",
            "./checkpoint-4",
            "4",
        ]
        + ["checkpoint-4/state.json", str(run / "checkpoint-4"), str(run / "checkpoint-2"), str(run), "é", "a" * 300]
        + ["checkpoint-4\n", "\udcff", "context_cache", "../run/checkpoint-4", "None", "true", "checkpoint-2"]
    )
    case = resumed(scene, subject, "an intact run", flags={"resume_from_checkpoint": None})
    return Case(
        f"an intact run, resumed from {wanted!a:.60}",
        subject,
        case.flags,
        (f"--resume_from_checkpoint={wanted}",),
        weights=case.weights,
    )


@kind
def blocked_checkpoint(scene: Scene) -> Case:
    """Something else in the place of a checkpoint, of the next one, or of one of its files."""
    rng, subject = scene.rng, scene.subject()
    checkpoint = newest(scene, subject)
    run = checkpoint.parent
    place = rng.choice(
        [checkpoint, run / "checkpoint-2", run / "checkpoint-6", run / ".checkpoint-6.tmp", run / "checkpoint-5"]
        + [checkpoint / name for name in (STATE, ADAPTERS, TRAINER, "pytorch_lora_weights.safetensors")]
    )
    what = block(rng, place)
    # Without a checkpoint to continue from, the run may begin again: in an output folder with a LoRA, it refuses.
    return resumed(scene, subject, what)


@kind
def extra_files(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    checkpoint = newest(scene, subject)
    run = checkpoint.parent
    name = rng.choice(
        ["x", "model.safetensors", ".x", "random_states_0.pkl", "optimizer.bin", "é", "\udcff", "a\nb", "sub/x"]
    )
    place = rng.choice([checkpoint, run, run / ".checkpoint-6.tmp", run / ".checkpoint-2.tmp"]) / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(damaged(rng, b"x" * 100)[0])
    return resumed(scene, subject, f"also {place.relative_to(run)!s:.40}".encode("ascii", "replace").decode())


@kind
def linked_checkpoint(scene: Scene) -> Case:
    """The checkpoint, or one of its files, is on another disk."""
    rng, subject = scene.rng, scene.subject()
    checkpoint = newest(scene, subject)
    place = rng.choice([checkpoint, *files_in(checkpoint), checkpoint.parent])
    elsewhere = scene.folder / "elsewhere"
    os.rename(place, elsewhere)
    place.symlink_to(elsewhere)
    return resumed(scene, subject, f"{place.name} is a link to another folder")


@kind
def every_checkpoint_damaged(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    run = scene.run(subject)
    done = [damage_file(rng, run / f"checkpoint-{step}" / rng.choice([ADAPTERS, TRAINER])) for step in (2, 4)]
    return resumed(scene, subject, f"{done[0]} of checkpoint-2, {done[1]} of checkpoint-4")
