"""LoRA files for --init_lora."""

import json
import shutil
import struct
from pathlib import Path

import torch

from command_line import LORA_FILE

from .cases import Case, kind
from .damage import block, damage_file, read_tensors, write_tensors
from .lab import Scene
from .model_checkpoints import Payload


def trained(scene: Scene, subject: str) -> Path:
    """A copy of a LoRA that fits."""
    return Path(shutil.copy(scene.lab.reference(subject).run / LORA_FILE, scene.folder / "lora.safetensors"))


def case(scene: Scene, subject: str, what: str, path: Path | str | None = None, **rest) -> Case:
    path = scene.folder / "lora.safetensors" if path is None else path
    return Case(f"--init_lora: {what}", subject, {"init_lora": path}, **rest)


@kind
def lora_bytes(scene: Scene) -> Case:
    subject = scene.subject()
    return case(scene, subject, damage_file(scene.rng, trained(scene, subject)))


@kind
def lora_header(scene: Scene) -> Case:
    """The JSON at the start of a safetensors file."""
    rng, subject = scene.rng, scene.subject()
    path = trained(scene, subject)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    what = rng.choice(["length", "offsets", "shape", "dtype", "metadata", "brackets"])
    if what == "length":
        number = rng.choice([0, 2**63, 2**64 - 1, 10**9, length - 1, length + 1])
        path.write_bytes(struct.pack("<Q", number) + data[8:])
        return case(scene, subject, f"header of {number} bytes")
    if what == "metadata":
        values = ["{", "[]", "null", '{"r": "x"}', '{"transformer.r": -1}', '{"transformer.r": 10000000000}', "é" * 9]
        header["__metadata__"] = {"lora_adapter_metadata": rng.choice(values), "format": rng.choice(["pt", "tf"])}
    else:
        header[name] |= {
            "offsets": {"data_offsets": rng.choice([[0, 0], [4, 2], [0, 2**62], [-1, 4]])},
            "shape": {"shape": rng.choice([[], [2**62, 4], [-1, 4], [4, 4]])},
            "dtype": {"dtype": rng.choice(["F16", "I64", "X", "BOOL"])},
            "brackets": {},
        }[what]
    text = json.dumps(header).encode()
    if what == "brackets":
        text = b"[" * 100_000
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return case(scene, subject, f"its header's {what} of {name}")


@kind
def lora_tensors(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    path = trained(scene, subject)
    tensors = read_tensors(path)
    downs = sorted(name for name in tensors if "lora_A" in name)
    name = rng.choice(downs)
    up = name.replace("lora_A", "lora_B")
    module = name.partition(".lora_A")[0]
    must = "refuse"
    what = rng.choice(
        [
            "no B",
            "no A",
            "other ranks",
            "another width",
            "not finite",
            "no tensors",
            "empty tensors",
            "a norm's weight",
        ]
        + ["an unknown module", "DoRA", "LoKr", "LoHa", "OFT", "integers", "kohya's names", "3-d", "alpha not finite"]
        + ["text encoder only", "alpha of zero", "every rank another"]
    )
    if what == "no B":
        del tensors[up]
    elif what == "no A":
        del tensors[name]
    elif what == "other ranks":
        tensors[name] = torch.cat([tensors[name]] * 2)
    elif what == "another width":
        tensors[name] = torch.cat([tensors[name]] * 2, dim=1)
    elif what == "not finite":
        tensors[name] = torch.full_like(tensors[name], rng.choice([float("nan"), float("inf")]))
        tensors[up] += 0.1
    elif what == "no tensors":
        tensors = {}
    elif what == "empty tensors":
        tensors = {key: tensor[:0] for key, tensor in tensors.items()}
    elif what == "a norm's weight":
        tensors["transformer.norm_out.weight"] = torch.ones(4)
    elif what == "an unknown module":
        tensors[name.replace(module, "transformer.nowhere")] = tensors.pop(name)
        tensors[up.replace(module, "transformer.nowhere")] = tensors.pop(up)
    elif what == "DoRA":
        tensors |= {f"{module}.lora_magnitude_vector": torch.ones(tensors[up].shape[0])}
    elif what in ("LoKr", "LoHa", "OFT"):
        parts = {"LoKr": ["lokr_w1", "lokr_w2"], "LoHa": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]}
        names = parts.get(what, ["oft_blocks"])
        prefix = rng.choice(["lycoris_", "transformer.", "diffusion_model.", "lora_unet_"])
        bare = [key.partition(".lora_A")[0].removeprefix("transformer.") for key in downs]
        bare = [key.replace(".", "_") for key in bare] if prefix.endswith("_") else bare
        tensors = {f"{prefix}{key}.{part}": torch.ones(4, 4) for key in bare for part in names}
    elif what == "integers":
        tensors = {key: tensor.to(torch.int32) for key, tensor in tensors.items()}
        must = None
    elif what == "kohya's names":
        rename = {"lora_A": "lora_down", "lora_B": "lora_up"}
        tensors = {
            "lora_unet_"
            + key.removeprefix("transformer.").partition(".lora_")[0].replace(".", "_")
            + f".{rename['lora_A' if 'lora_A' in key else 'lora_B']}.weight": tensor
            for key, tensor in tensors.items()
        }
        must = None
    elif what == "3-d":
        tensors[name] = tensors[name][None].contiguous()
    elif what == "alpha not finite":
        tensors[f"{module}.alpha"] = torch.tensor(float("nan"))
    elif what == "text encoder only":
        tensors = {f"text_encoder.{key}": tensor for key, tensor in tensors.items()}
    elif what == "alpha of zero":
        tensors[f"{module}.alpha"] = torch.tensor(0.0)
        must = None
    else:
        for number, key in enumerate(downs):
            rank = 1 + number % 3
            other = key.replace("lora_A", "lora_B")
            tensors[key], tensors[other] = tensors[key][:rank].clone(), tensors[other][:, :rank].contiguous()
        must = None
    write_tensors(tensors, path)
    return case(scene, subject, f"{what} ({module})", must=must)


@kind
def lora_of_another(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    other = "zimage" if subject.startswith("flux2") else "flux2"
    lab = scene.lab
    paths = {
        "the other model's LoRA": lab.reference(other).run / LORA_FILE,
        "the other model's checkpoint": lab.reference(other).run / "checkpoint-2",
        "the transformer": lab.model(subject).path / "transformer/diffusion_pytorch_model.safetensors",
        "the transformer's folder": lab.model(subject).path / "transformer",
        "the model": lab.model(subject).path,
        "the pictures": lab.photos(with_metadata=False),
        "a picture": lab.photos(with_metadata=False) / "0.png",
        "adapters": lab.reference(subject).run / "checkpoint-2/adapters.safetensors",
    }
    what = rng.choice(list(paths))
    return case(scene, subject, what, paths[what], must="refuse")


@kind
def lora_folder(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    good = trained(scene, subject)
    folder = scene.folder / "loras"
    folder.mkdir()
    kinds = {
        "empty": lambda: None,
        "two files": lambda: [shutil.copy(good, folder / name) for name in ("a.safetensors", "b.safetensors")],
        "one file of another name": lambda: shutil.copy(good, folder / "a.safetensors"),
        "the usual name and another": lambda: [
            shutil.copy(good, folder / name) for name in (LORA_FILE, "b.safetensors")
        ],
        "a folder of the usual name": lambda: (folder / LORA_FILE).mkdir(),
        "an empty file": lambda: (folder / LORA_FILE).write_bytes(b""),
        "a text file": lambda: (folder / "a.safetensors").write_text("x"),
        "a .bin file": lambda: torch.save(read_tensors(good), folder / "pytorch_lora_weights.bin"),
        "a hidden file": lambda: shutil.copy(good, folder / ".a.safetensors"),
        "an odd name": lambda: shutil.copy(good, folder / "\udcffé\n.safetensors"),
    }
    what = rng.choice(list(kinds))
    kinds[what]()
    return case(scene, subject, f"a folder: {what}", folder, must="refuse" if what == "two files" else None)


@kind
def lora_pickled(scene: Scene) -> Case:
    rng, subject = scene.rng, scene.subject()
    payload = scene.folder / "executed"
    good = trained(scene, subject)
    content = dict(read_tensors(good)) | ({"x": Payload(payload)} if rng.random() < 0.7 else {})
    path = scene.folder / rng.choice(["lora.safetensors", "lora.bin", "lora.pt", "lora.ckpt"])
    torch.save(content, path)
    return case(scene, subject, f"a pickle as {path.name}", path, payload=payload)


@kind
def lora_blocked(scene: Scene) -> Case:
    subject = scene.subject()
    return case(scene, subject, block(scene.rng, trained(scene, subject)))
