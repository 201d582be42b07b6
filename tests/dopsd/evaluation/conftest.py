from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def feature_models(tmp_path_factory):
    """Tiny CLIP, DINO and CLIPSeg models: name -> folder."""
    from tiny_features import make_tiny_clip, make_tiny_clipseg, make_tiny_dino

    folder = tmp_path_factory.mktemp("features")
    made = {"clip": make_tiny_clip, "dino": make_tiny_dino, "clipseg": make_tiny_clipseg}
    return {name: make(folder / name) for name, make in made.items()}


@pytest.fixture
def make_comparison(tmp_path, make_picture):
    """What was drawn by the base, two LoRAs at three strengths, and both together: (prompts, drawn).

    The first LoRA draws as the base does, the second one other pictures.
    """
    from dopsd.evaluation.comparison import Contender, LoRA, Prompt

    def make(num_seeds: int = 2, names=("same", "other"), **images):
        prompts = [
            Prompt("a sks dog on grass", "a dog on grass", "concept", **images),
            Prompt("a sks dog in snow", "a dog in snow", "concept", **images),
            Prompt("a boat", "a boat", "unrelated", **images),
            Prompt("a dog on grass", "a dog on grass", "neighbour", **images),
            Prompt("a kebidu dog on grass", "a dog on grass", "other_word", **images),
        ]
        same, other = (LoRA(name, Path(name), name) for name in names)
        contenders = [Contender()]
        contenders += [Contender((lora,), strength) for lora in (same, other) for strength in (0.5, 1.0, 1.5)]
        contenders.append(Contender((same, other)))
        drawn = {}
        for contender in contenders:
            is_whole = contender.strength == 1 and len(contender.loras) < 2
            shift = 0 if contender.loras in ((), (same,)) else 7
            drawn[contender] = {}
            for number, prompt in enumerate(prompts):
                if not is_whole and prompt.role not in ("concept", "unrelated"):
                    continue
                drawn[contender][prompt] = []
                for seed in range(num_seeds):
                    path = tmp_path / f"{contender.name}-{number}-{seed}.png".replace("/", "-")
                    make_picture(10 * number + seed + shift).save(path)
                    drawn[contender][prompt].append(path)
        return prompts, drawn

    return make
