"""The pretrained model and the vision-language model."""

import json
import shutil
from pathlib import Path

import torch

from .cases import Case, kind
from .damage import block, damage_file, damage_json, files_in, read_tensors, remove, write_tensors
from .lab import SUBJECTS, Scene


WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
WITH_VLM = ("flux2-vlm", "zimage")


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def any_checkpoint(scene: Scene, *, vlm: bool | None = None) -> tuple[str, Path, dict[str, Path]]:
    """Subject, copied checkpoint and the flag that names it: the model or, in a third of the cases, its VLM."""
    is_vlm = scene.rng.random() < 1 / 3 if vlm is None else vlm
    if is_vlm:
        subject = scene.rng.choice(WITH_VLM)
        folder = scene.vlm(subject)
        return subject, folder, {"vlm_model_name_or_path": folder}
    subject = scene.subject()
    folder = scene.checkpoint(subject)
    return subject, folder, {"pretrained_model_name_or_path": folder}


def weight_files(folder: Path) -> list[Path]:
    return [path for path in files_in(folder) if path.suffix == ".safetensors"]


def name_in(folder: Path, path: Path) -> str:
    return f"{folder.name}/{path.relative_to(folder)}"


@kind
def weights_damaged(scene: Scene) -> Case:
    subject, folder, flags = any_checkpoint(scene)
    path = scene.rng.choice(weight_files(folder))
    return Case(f"{name_in(folder, path.parent)}/{damage_file(scene.rng, path)}", subject, flags)


@kind
def other_file_damaged(scene: Scene) -> Case:
    subject, folder, flags = any_checkpoint(scene)
    path = scene.rng.choice([path for path in files_in(folder) if path.suffix != ".safetensors"])
    return Case(f"{name_in(folder, path.parent)}/{damage_file(scene.rng, path)}", subject, flags)


@kind
def file_missing(scene: Scene) -> Case:
    subject, folder, flags = any_checkpoint(scene)
    files = files_in(folder)
    path = scene.rng.choice([*files, *sorted({path.parent for path in files} - {folder})])
    what = f"{name_in(folder, path)} missing"
    remove(path)
    must = "refuse" if path.suffix == ".safetensors" and "vlm" not in folder.name else None
    return Case(what, subject, flags, must=must)


@kind
def configuration_damaged(scene: Scene) -> Case:
    subject, folder, flags = any_checkpoint(scene)
    path = scene.rng.choice([path for path in files_in(folder) if path.suffix == ".json"])
    return Case(f"{name_in(folder, path.parent)}/{damage_json(scene.rng, path)}", subject, flags)


def any_tensor(scene: Scene, folder: Path) -> tuple[Path, str]:
    """A weight file, and a tensor in it. Of a VLM, only the vision tower is read."""
    found = [
        (path, name)
        for path in weight_files(folder)
        for name, tensor in sorted(read_tensors(path).items())
        if ("visual" in name or folder.name != "vlm") and tensor.is_floating_point()
    ]
    components = sorted({path.parent.name for path, _ in found})
    component = scene.rng.choice(components)
    return scene.rng.choice([item for item in found if item[0].parent.name == component])


def change(path: Path, edit) -> None:
    tensors = read_tensors(path)
    edit(tensors)
    write_tensors(tensors, path)


@kind
def tensor_missing(scene: Scene) -> Case:
    subject, folder, flags = any_checkpoint(scene)
    path, name = any_tensor(scene, folder)
    prefix = name.rpartition(".")[0] if scene.rng.random() < 0.3 else name
    change(path, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(prefix)])
    return Case(f"{name_in(folder, path)}: {prefix} missing", subject, flags, must="refuse")


@kind
def tensor_renamed(scene: Scene) -> Case:
    """As by another version or trainer: a prefix for all tensors, or another name for one."""
    rng = scene.rng
    subject, folder, flags = any_checkpoint(scene)
    path, name = any_tensor(scene, folder)
    prefix = rng.choice(["module.", "_orig_mod.", "x.", "encoder.", "ema."])
    if rng.random() < 0.5:
        change(path, lambda tensors: tensors.update({prefix + name: tensors.pop(name)}))
        what = f"{name} is called {prefix}{name}"
    else:
        change(path, lambda tensors: tensors.update({prefix + key: tensors.pop(key) for key in list(tensors)}))
        what = f"all tensors begin with {prefix}"
    return Case(f"{name_in(folder, path)}: {what}", subject, flags, must="refuse")


@kind
def tensor_extra(scene: Scene) -> Case:
    subject, folder, flags = any_checkpoint(scene)
    path, name = any_tensor(scene, folder)
    extra = scene.rng.choice(["x", f"{name}.extra", f"{name[:-6]}lora_A.weight", f"{name}.scale", ""])
    change(path, lambda tensors: tensors.update({extra: torch.ones(3)}))
    # Not compared with the reference: the file's tensors have another alignment, which changes how PyTorch rounds.
    return Case(f"{name_in(folder, path)}: also {extra!r}", subject, flags)


@kind
def tensor_of_another_shape(scene: Scene) -> Case:
    subject, folder, flags = any_checkpoint(scene)
    path, name = any_tensor(scene, folder)
    shape = scene.rng.choice(["one more", "empty", "scalar", "flat", "one less"])

    def edit(tensors):
        tensor = tensors[name]
        tensors[name] = {
            "one more": lambda: torch.cat([tensor, tensor[:1]]),
            "empty": lambda: tensor[:0],
            "scalar": lambda: torch.tensor(1.0),
            "flat": lambda: tensor.reshape(1, -1).repeat(1, 2),
            "one less": lambda: tensor[1:],
        }[shape]().contiguous()

    change(path, edit)
    return Case(f"{name_in(folder, path)}: {name}: {shape}", subject, flags, must="refuse")


@kind
def tensor_of_another_dtype(scene: Scene) -> Case:
    subject, folder, flags = any_checkpoint(scene)
    path, name = any_tensor(scene, folder)
    dtype = scene.rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
    every = scene.rng.random() < 0.5
    chosen = (lambda key: True) if every else (lambda key: key == name)
    change(path, lambda tensors: tensors.update({key: tensors[key].to(dtype) for key in tensors if chosen(key)}))
    return Case(f"{name_in(folder, path)}: {'all tensors' if every else name} in {dtype}", subject, flags)


@kind
def tensor_not_finite(scene: Scene) -> Case:
    subject, folder, flags = any_checkpoint(scene)
    path, name = any_tensor(scene, folder)
    value = scene.rng.choice([float("nan"), float("inf"), 1e38])
    change(path, lambda tensors: tensors.update({name: torch.full_like(tensors[name], value)}))
    return Case(f"{name_in(folder, path)}: {name} is {value}", subject, flags)


def split(path: Path) -> Path:
    """Writes the weights as two shards; returns their index."""
    tensors = read_tensors(path)
    names = sorted(tensors)
    half = {
        name: f"{path.stem}-0000{1 if number % 2 else 2}-of-00002.safetensors" for number, name in enumerate(names)
    }
    for file in sorted({*half.values()}):
        write_tensors({name: tensors[name] for name in names if half[name] == file}, path.parent / file)
    path.unlink()
    index = path.with_name(path.name + ".index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": half}))
    return index


@kind
def index_damaged(scene: Scene) -> Case:
    rng = scene.rng
    subject, folder, flags = any_checkpoint(scene)
    if folder.name == "vlm":
        index = folder / "model.safetensors.index.json"
    else:
        index = split(rng.choice(weight_files(folder)))
    value = json.loads(index.read_text())
    files, names = value["weight_map"], sorted(value["weight_map"])
    if folder.name == "vlm":
        names = [name for name in names if "visual" in name]
    name = rng.choice(names)
    outside = scene.folder / "outside.safetensors"
    write_tensors({name: torch.ones(1)}, outside)
    must = "refuse"
    if rng.random() < 0.3:
        what, must = damage_json(rng, index), None
    else:
        file = rng.choice(
            ["nowhere.safetensors", str(outside), "../outside.safetensors", "", "a\0b", 7, None, "config.json"]
        )
        what = rng.choice(["a shard missing", "a tensor not listed", "a tensor elsewhere", "an unlisted shard"])
        if what == "a shard missing":
            (index.parent / files[name]).unlink()
        elif what == "a tensor not listed":
            del files[name]
        elif what == "a tensor elsewhere":
            files[name], what = file, f"{name} in {file!r}"
        else:
            files["x"], must = "nowhere.safetensors", None
        index.write_text(json.dumps(value))
    return Case(f"{name_in(folder, index)}: {what}", subject, flags, must=must)


@kind
def code_in_checkpoint(scene: Scene) -> Case:
    """Configurations that name code of their own."""
    rng, payload = scene.rng, scene.folder / "executed"
    subject, folder, flags = any_checkpoint(scene)
    path = rng.choice([path for path in files_in(folder) if path.name.endswith(("config.json", "index.json"))])
    path = path if "safetensors" not in path.name else folder / "config.json"
    (path.parent / "code.py").write_text(f"open({str(payload)!r}, 'w')\nclass Model: pass\n")
    value = json.loads(path.read_text())
    value["auto_map"] = {
        name: "code.Model"
        for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoImageProcessor")
    }
    if path.name == "tokenizer_config.json":
        value["auto_map"]["AutoTokenizer"] = ["code.Model", "code.Model"]
        value["tokenizer_class"] = "Model"
    unknown = rng.random() < 0.7
    if unknown:
        value |= {
            "model_type": "unknown",
            "_class_name": rng.choice(["Model", "code.Model", "os", value.get("_class_name")]),
        }
    path.write_text(json.dumps(value))
    return Case(f"{name_in(folder, path)}: auto_map, unknown {unknown}", subject, flags, payload=payload)


@kind
def pickled_weights(scene: Scene) -> Case:
    rng, payload = scene.rng, scene.folder / "executed"
    subject, folder, flags = any_checkpoint(scene, vlm=False)
    component = rng.choice(list(WEIGHTS))
    path = folder / component / WEIGHTS[component]
    name = "pytorch_model.bin" if component == "text_encoder" else "diffusion_pytorch_model.bin"
    content = dict(read_tensors(path))
    malicious = rng.random() < 0.7
    if malicious:
        content["x"] = Payload(payload)
    as_safetensors = rng.random() < 0.3
    torch.save(content, path if as_safetensors else path.with_name(name))
    if not as_safetensors:
        path.unlink()
    what = f"{component}/{path.name if as_safetensors else name} is a pickle{' with code' if malicious else ''}"
    return Case(what, subject, flags, payload=payload)


@kind
def tokenizer_damaged(scene: Scene) -> Case:
    rng = scene.rng
    subject, folder, flags = any_checkpoint(scene, vlm=False)
    tokenizer = folder / "tokenizer"
    path = tokenizer / rng.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
    value = json.loads(path.read_text())
    kinds = {
        "a token's number beyond the embeddings": lambda: value["added_tokens"][-1].update(id=10**6),
        "a negative number": lambda: value["added_tokens"][0].update(id=-1),
        "no vocabulary": lambda: value["model"].update(vocab={}),
        "another kind": lambda: value["model"].update(type="Unigram"),
        "no pre-tokenizer": lambda: value.update(pre_tokenizer=None),
        "an expression that never ends": lambda: value.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a*)*b"}, "behavior": "Isolated", "invert": False}
        ),
        "truncation to one token": lambda: value.update(
            truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
        ),
    }
    if path.name == "tokenizer.json" and rng.random() < 0.6:
        what = rng.choice(list(kinds))
        kinds[what]()
        path.write_text(json.dumps(value))
    elif path.name == "tokenizer_config.json" and rng.random() < 0.6:
        name, new = rng.choice(
            [("tokenizer_class", "X"), ("model_max_length", "x"), ("model_max_length", 1), ("pad_token", None)]
            + [("pad_token", 7), ("eos_token", {"x": 1}), ("padding_side", "up"), ("added_tokens_decoder", {"x": 1})]
            + [("tokenizer_class", "BertTokenizer"), ("pad_token", "unknown"), ("chat_template", {"x": 1})]
        )
        path.write_text(json.dumps(value | {name: new}))
        what = f"{name} = {new!r}"
    else:
        what = damage_json(rng, path)
    return Case(f"tokenizer/{path.name}: {what}", subject, flags)


@kind
def chat_template(scene: Scene) -> Case:
    rng, payload = scene.rng, scene.folder / "executed"
    subject, folder, flags = any_checkpoint(scene, vlm=False)
    loop = "{% for i in range(99999) %}"
    templates = {
        "an endless loop": loop * 3 + "x" + "{% endfor %}" * 3,
        "a long output": loop + "x" * 1000 + "{% endfor %}",
        "a wrong syntax": "{% for",
        "an unknown filter": "{{ messages | nothing }}",
        "an unknown name": "{{ nothing.nothing }}",
        "an exception": "{{ raise_exception('no') }}",
        "a division by zero": "{{ 1 / 0 }}",
        "an attribute of Python": "{{ messages.__class__.__mro__ }}",
        "code": f"{{{{ cycler.__init__.__globals__.os.system('touch {payload}') }}}}",
        "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "nothing": "",
        "no prompt": "a fixed text",
        "a huge power": "{{ 9 ** 9 ** 9 }}",
        "a huge string": "{{ 'x' * 10 ** 12 }}",
        "an include": "{% include '/etc/passwd' %}",
        "bytes": None,
    }
    what = rng.choice(list(templates))
    path = folder / "tokenizer/chat_template.jinja"
    if what == "bytes":
        what = damage_file(rng, path)
    else:
        path.write_text(templates[what])
    return Case(f"chat template: {what}", subject, flags, payload=payload)


@kind
def blocked_file(scene: Scene) -> Case:
    subject, folder, flags = any_checkpoint(scene)
    files = files_in(folder)
    path = scene.rng.choice([*files, *sorted({path.parent for path in files} - {folder})])
    return Case(f"{name_in(folder, path.parent)}/{block(scene.rng, path)}", subject, flags)


@kind
def another_model(scene: Scene) -> Case:
    """The checkpoint of something else, or with a component of something else."""
    rng, lab = scene.rng, scene.lab
    subject, folder, flags = any_checkpoint(scene, vlm=False)
    other = lab.model("zimage" if subject.startswith("flux2") else "flux2").path
    component = rng.choice([*WEIGHTS, "tokenizer", "scheduler"])
    vlm_subject = rng.choice(WITH_VLM)
    kinds = {
        "the other model": lambda: flags.update(pretrained_model_name_or_path=other),
        "a VLM": lambda: flags.update(pretrained_model_name_or_path=lab.model(vlm_subject).vlm_path),
        "one component": lambda: flags.update(pretrained_model_name_or_path=folder / component),
        "a weight file": lambda: flags.update(pretrained_model_name_or_path=weight_files(folder)[0]),
        "an empty folder": lambda: (
            (scene.folder / "empty").mkdir() or flags.update(pretrained_model_name_or_path=scene.folder / "empty")
        ),
        "mixed": lambda: (remove(folder / component), shutil.copytree(other / component, folder / component)),
        "mixed configuration": lambda: [
            shutil.copy(path, folder / component) for path in (other / component).glob("*.json")
        ],
    }
    what = rng.choice([*kinds, "mixed", "mixed configuration"])
    kinds[what]()
    return Case(f"{what} ({component})", subject, flags)


@kind
def another_vlm(scene: Scene) -> Case:
    rng, lab = scene.rng, scene.lab
    subject = rng.choice(WITH_VLM)
    other = next(name for name in WITH_VLM if name != subject)
    paths = {
        "the other model's": lab.model(other).vlm_path,
        "the model itself": lab.model(subject).path,
        "the text encoder": lab.model(subject).path / "text_encoder",
        "the pictures": lab.photos(with_metadata=False),
        "its configuration": lab.model(subject).vlm_path / "config.json",
    }
    what = rng.choice(list(paths))
    return Case(f"--vlm_model_name_or_path: {what}", subject, {"vlm_model_name_or_path": paths[what]})


assert {*WITH_VLM} <= {*SUBJECTS}
