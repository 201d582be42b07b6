"""What processes share, on one machine and on several."""

import shutil
from collections import Counter

import pytest
from PIL import Image

from dopsd.command_line import parse_settings
from dopsd.context_cache import ContextCache
from dopsd.data import checking, folder, images
from dopsd.data.sidecars import read_lines
from dopsd.data.training_data import load_training_data
from dopsd.errors import InputError, OutputError
from dopsd.sharing import failing_together, machine_share, share_on_each_machine
from models import EVERY_CONTEXT, ONE_MODEL
from processes import Processes
from short_runs import one_process, same_tensors


def test_results_are_in_order_and_known_to_all(monkeypatch):
    processes = Processes(monkeypatch, 3, 1)
    items = list(range(10))

    def double(accelerator):
        return share_on_each_machine(lambda part: [2 * item for item in part], items, accelerator)

    doubled = [2 * item for item in items]
    assert processes.run(double) == [[doubled, doubled]] * 4
    shares = processes.run(lambda accelerator: machine_share(items, accelerator))
    assert sorted(map(len, shares)) == [3, 3, 4, 10] and sum(shares[:3], []) == shares[3] == items


def test_fewer_items_than_processes(monkeypatch):
    find = Processes(monkeypatch, 3).run(lambda one: share_on_each_machine(lambda part: part, ["a"], one))
    assert find == [[["a"]]] * 3


def test_an_error_is_raised_in_all_processes(monkeypatch):
    def fail(accelerator):
        with failing_together():
            if accelerator.process_index == 1:
                raise OutputError("the disk is full")

    errors = Processes(monkeypatch, 2, 1).run(fail)
    assert [(type(error), str(error)) for error in errors] == 3 * [(OutputError, "the disk is full")]


def test_of_several_errors_all_processes_raise_the_first(monkeypatch):
    def fail(accelerator):
        with failing_together():
            raise InputError(f"error {accelerator.process_index}")

    assert [str(error) for error in Processes(monkeypatch, 2).run(fail)] == ["error 0", "error 0"]


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), failing_together():
        raise ZeroDivisionError


# Training data


@pytest.fixture
def load(monkeypatch, arguments, model, photos, tmp_path):
    """Loads training data in each of some processes: (sizes of machines, folder of each machine)."""

    def run(*sizes, folders=(photos, photos)):
        processes = Processes(monkeypatch, *sizes)

        def load_one(accelerator):
            machine = processes.machines[accelerator.process_index]
            flags = {"instance_data_dir": folders[machine], "context_cache_dir": tmp_path / f"cache of {machine}"}
            settings = parse_settings(model.script.MODEL, "", arguments(**flags))
            return load_training_data(settings, model.script.MODEL.sizes, accelerator)

        return processes.run(load_one)

    return run


@pytest.fixture
def decoded(monkeypatch):
    """Names of the pictures that are decoded."""
    names, decode = [], checking.decode
    monkeypatch.setattr(checking, "decode", lambda picture: names.append(picture.name) or decode(picture))
    return names


@ONE_MODEL
@pytest.mark.parametrize("sizes", [(1,), (2,), (2, 2)])
def test_every_picture_is_decoded_once_on_each_machine(load, decoded, sizes):
    results = load(*sizes)
    assert sorted(decoded) == sorted(["0.png", "1.png", "2.png"] * len(sizes))
    assert all((data.digests, data.examples) == (results[0].digests, results[0].examples) for data in results)
    assert [example.picture for example in results[0].examples] == [0, 1, 2] and len({*results[0].digests}) == 3


@ONE_MODEL
def test_every_picture_is_read_once(load, monkeypatch):
    read, source_bytes = [], images.source_bytes
    monkeypatch.setattr(images, "source_bytes", lambda picture: read.append(picture.name) or source_bytes(picture))
    load(1)
    assert sorted(read) == ["0.png", "1.png", "2.png"]


@ONE_MODEL
@pytest.mark.parametrize("name", ["0.png", "2.png"])
def test_a_damaged_picture_in_one_processs_share_ends_all(load, photos, tmp_path, name):
    folder = shutil.copytree(photos, tmp_path / "damaged")
    (folder / name).write_bytes(b"no picture")
    errors = load(2, folders=[folder])
    assert [type(error) for error in errors] == [InputError, InputError] and str(errors[0]) == str(errors[1])
    assert str(errors[0]).startswith(f"{name}: cannot be read as a picture")


@pytest.fixture
def settled(monkeypatch):
    monkeypatch.setattr("dopsd.findings.SETTLED_NANOSECONDS", 0)


@ONE_MODEL
def test_another_start_decodes_only_what_is_new(load, decoded, settled, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "more")
    first = load(2, folders=[folder])[0]
    decoded.clear()
    assert [data.digests for data in load(1, folders=[folder])] == [first.digests] and decoded == []
    shutil.copy(folder / "0.png", folder / "10.png")
    results = load(3, folders=[folder])
    assert decoded == ["10.png"] and [len(data.pictures) for data in results] == [4, 4, 4]


@ONE_MODEL
@pytest.mark.parametrize("flag", ["dry_run", "no_context_cache"])
def test_without_a_cache_nothing_is_written(arguments, model, tmp_path, settled, flag):
    settings = parse_settings(model.script.MODEL, "", arguments(**{flag: True}))
    load_training_data(settings, model.script.MODEL.sizes, one_process())
    assert not (tmp_path / "run").exists()


@pytest.fixture
def captioned(photos, tmp_path):
    """The photos with .txt files."""
    folder = shutil.copytree(photos, tmp_path / "captioned")
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"ball {number}")
    return folder


@ONE_MODEL
@pytest.mark.parametrize("sizes", [(1,), (2,), (2, 1)])
def test_every_caption_is_read_once_on_each_machine(load, captioned, monkeypatch, sizes):
    names = []
    monkeypatch.setattr(folder, "read_lines", lambda path, name: names.append(name) or read_lines(path, name))
    results = load(*sizes, folders=[captioned] * 2)
    assert sorted(names) == sorted(["0.txt", "1.txt", "2.txt"] * len(sizes))
    assert all(data.captions == ["ball 0", "ball 1", "ball 2"] for data in results)


@ONE_MODEL
@pytest.mark.parametrize("name", ["0.txt", "2.txt"])
def test_a_bad_caption_in_one_processs_share_ends_all(load, captioned, name):
    (captioned / name).write_bytes(b"\xff")
    errors = load(2, folders=[captioned])
    assert [str(error) for error in errors] == [f"{name}: is not UTF-8 text (byte 0); save it as UTF-8"] * 2


@ONE_MODEL
def test_a_folder_that_one_machine_lacks_ends_all(load, photos, tmp_path):
    errors = load(1, 1, folders=[photos, tmp_path / "missing"])
    assert [str(error) for error in errors] == [
        f"--instance_data_dir {tmp_path / 'missing'}: does not exist; check the path"
    ] * 2


@ONE_MODEL
@pytest.mark.parametrize("change", ["content", "number"])
def test_pictures_that_differ_between_machines_are_refused(load, photos, tmp_path, change):
    folder = shutil.copytree(photos, tmp_path / "other")
    if change == "content":
        Image.new("RGB", (64, 64), "red").save(folder / "0.png")
    else:
        (folder / "2.png").unlink()
    errors = load(1, 1, folders=[photos, folder])
    assert all(
        str(error).endswith("the pictures differ between the machines of this run; copy the same ones to each")
        for error in errors
    )


# The cache


def entries(folder):
    """Name and modification time of each entry."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*/*.safetensors")}


@ONE_MODEL
def test_processes_share_the_encoding(prepare, tmp_path, monkeypatch):
    shares = {}

    def fill(accelerator):
        run, share = prepare(), shares.setdefault(accelerator.process_index, [])
        encode_batch = run.contexts.encode_batch
        run.contexts.encode_batch = lambda batch: share.extend(map(run.contexts.key, batch)) or encode_batch(batch)
        run.fill_cache(tmp_path, accelerator)

    assert Processes(monkeypatch, 2).run(fill) == [None, None]
    assert sorted(map(len, shares.values())) == [2, 3] and len({*shares[0], *shares[1]}) == 5


@ONE_MODEL
def test_each_process_uses_every_encoder_and_decodes_its_own_pictures(prepare, captioned, monkeypatch, tmp_path):
    shares, decoded = {}, {}

    def fill(accelerator):
        run = prepare(instance_data_dir=captioned, instance_prompt=None, random_flip=True)
        share, pictures = (kept.setdefault(accelerator.process_index, []) for kept in (shares, decoded))
        encode_batch, pixels = run.contexts.encode_batch, run.data.pixels
        run.contexts.encode_batch = lambda batch: share.extend(batch) or encode_batch(batch)
        run.data.pixels = lambda crop: pictures.append(crop.file.name) or pixels(crop)
        run.fill_cache(tmp_path / "cache", accelerator)

    assert Processes(monkeypatch, 3).run(fill) == [None] * 3
    for share in shares.values():
        assert Counter(encoding.encoder.name for encoding in share) == {"text": 2, "vae": 2}
    assert decoded == {index: [f"{index}.png"] * 2 for index in range(3)}


@ONE_MODEL
def test_after_a_kill_only_what_is_missing_is_encoded(prepare, monkeypatch, tmp_path):
    saved, save = [], ContextCache.save

    def save_three(cache, key, tensor):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(key)
        save(cache, key, tensor)

    monkeypatch.setattr(ContextCache, "save", save_three)
    with pytest.raises(KeyboardInterrupt):
        prepare().fill_cache(tmp_path, one_process())
    before = entries(tmp_path)
    monkeypatch.setattr(ContextCache, "save", lambda cache, key, tensor: saved.append(key) or save(cache, key, tensor))
    assert Processes(monkeypatch, 2).run(lambda one: prepare().fill_cache(tmp_path, one)) == [None, None]
    assert len(saved) == len({*saved}) == 5 and before.items() <= entries(tmp_path).items()


@ONE_MODEL
def test_processes_share_the_check_of_the_cache(prepare, tmp_path, monkeypatch):
    prepare().fill_cache(tmp_path, one_process())
    checked = []
    is_valid = ContextCache.is_valid
    monkeypatch.setattr(ContextCache, "is_valid", lambda cache, key: checked.append(key) or is_valid(cache, key))
    before = entries(tmp_path)
    processes = Processes(monkeypatch, 2)
    assert processes.run(lambda accelerator: prepare().fill_cache(tmp_path, accelerator)) == [None, None]
    assert len(checked) == len({*checked}) == 5
    # A damaged entry is encoded once, whoever finds it.
    damaged = sorted(tmp_path.glob("*/*.safetensors"))[-1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert processes.run(lambda accelerator: prepare().fill_cache(tmp_path, accelerator)) == [None, None]
    after = entries(tmp_path)
    assert [name for name in before if after[name] != before[name]] == [damaged.name]
    assert ContextCache(tmp_path).is_valid(damaged.stem)


@EVERY_CONTEXT
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1)])
def test_machines_with_disks_of_their_own_all_have_every_entry(prepare, tmp_path, monkeypatch, sizes):
    prepare().fill_cache(tmp_path / "expected", one_process())
    processes = Processes(monkeypatch, *sizes)

    def fill(accelerator):
        run, machine = prepare(), processes.machines[accelerator.process_index]
        run.fill_cache(tmp_path / str(machine), accelerator)
        return run.all_contexts()

    results = processes.run(fill)
    assert all(same_tensors(results[0], result) for result in results)
    for machine in (0, 1):
        assert entries(tmp_path / str(machine)).keys() == entries(tmp_path / "expected").keys()
    # Damaged entries are replaced here too if another machine encodes them.
    for damaged in sorted((tmp_path / "1").glob("*/*.safetensors"))[:3]:
        damaged.write_bytes(damaged.read_bytes()[:-1])
    results = processes.run(fill)
    assert all(same_tensors(results[0], result) for result in results)


@ONE_MODEL
def test_machines_that_share_a_disk_encode_everything_once(prepare, tmp_path, monkeypatch):
    saved = []
    save = ContextCache.save
    monkeypatch.setattr(ContextCache, "save", lambda cache, key, tensor: saved.append(key) or save(cache, key, tensor))
    assert Processes(monkeypatch, 1, 1).run(lambda one: prepare().fill_cache(tmp_path, one)) == [None, None]
    assert len(saved) == len({*saved}) == 5


@ONE_MODEL
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_ends_all(prepare, tmp_path, monkeypatch, failing):
    def fill(accelerator):
        run = prepare()
        if accelerator.process_index == failing:
            run.contexts.load_text_encoder = raise_input_error
        run.fill_cache(tmp_path, accelerator)

    def raise_input_error():
        raise InputError("the text encoder is broken")

    errors = Processes(monkeypatch, 2).run(fill)
    assert [(type(error), str(error)) for error in errors] == 2 * [(InputError, "the text encoder is broken")]
