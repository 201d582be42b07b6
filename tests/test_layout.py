"""The layout's rules: which way imports point, what `dopsd/` and `pipelines/` may know, how long files are."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(ROOT.glob("train_*.py"))
FILES = sorted(
    path
    for top in (ROOT, *(ROOT / name for name in ("dopsd", "pipelines", "benchmarks", "tests")))
    for path in (top.glob("*.py") if top == ROOT else top.rglob("*.py"))
)
PACKAGES = ("dopsd", "pipelines", "benchmarks")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES if "tests" not in path.parts}


def imports(path: Path) -> set[str]:
    """Modules of this project that a file imports, anywhere in it."""
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys()


GRAPH = {name: imports(path) for name, path in MODULES.items()}


def top(module: str) -> str:
    return module.partition(".")[0]


def test_imports_point_one_way():
    allowed = {
        "dopsd": {"dopsd"},
        "pipelines": {"pipelines", "dopsd"},
        "benchmarks": {"benchmarks", "pipelines", "dopsd"},
        "script": {"pipelines", "dopsd"},
    }
    wrong = [
        f"{name} -> {imported}"
        for name, found in GRAPH.items()
        for imported in found
        if top(imported) not in allowed[top(name) if top(name) in PACKAGES else "script"]
    ]
    assert not wrong


def test_no_import_cycle():
    finished = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in finished:
            for imported in GRAPH[name]:
                visit(imported, (*path, name))
            finished.add(name)

    for name in GRAPH:
        visit(name, ())
    assert len(GRAPH) > 30 and "dopsd.rollout" in GRAPH["dopsd.step"]


@pytest.mark.parametrize("path", sorted((ROOT / "dopsd").rglob("*.py")), ids=module_name)
def test_dopsd_names_no_model(path):
    named = re.search(r"klein|flux|z[-_]?image|qwen", path.read_text(encoding="utf-8"), re.IGNORECASE)
    assert named is None, f"{path.name} names {named[0]}"


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").rglob("*.py")), ids=module_name)
def test_pipelines_know_no_flag(path):
    flag = re.search(r"--[a-z]\w+", path.read_text(encoding="utf-8"))
    assert flag is None, f"{path.name} names the flag {flag[0]}"


def test_files_stay_short():
    limits = {path: 350 if path in SCRIPTS else 500 for path in FILES}
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > limits[path]}


def training_section(script: Path) -> str:
    text = script.read_text(encoding="utf-8")
    assert text.count("\n# Training. ") == 1
    return text[text.index("\n# Training. ") :]


def test_the_scripts_share_their_training_section():
    first, *others = map(training_section, SCRIPTS)
    assert len(first.splitlines()) > 100
    assert all(other == first for other in others) and others


def test_the_training_loop_is_in_the_script():
    main = next(
        node
        for node in ast.parse(SCRIPTS[0].read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    )
    loop = next(ast.unparse(node) for node in ast.walk(main) if isinstance(node, ast.For))
    order = [
        loop.index(call) for call in ("train_step(", "metrics_log.write(", "checkpoints.save(", "gallery.validate(")
    ]
    assert order == sorted(order)
