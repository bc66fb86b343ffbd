"""Who may import whom (the star), and that importing a package costs nothing: read from the source, nothing is run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cluster", "configs", "learner", "reward_service", "rollout", "segmentation_service")
# Light modules of the segmentation service that others may import, and what they themselves may: arithmetic, and the reading of videos.
ARITHMETIC = {"segmentation_service.geometry": {"numpy", "scipy"}, "segmentation_service.masks": {"numpy", "scipy"}}
VIDEOS = {"segmentation_service.video": {"numpy", "PIL"}, "segmentation_service.video_file": {"numpy", "av"}}
MAY_IMPORT = {
    "segmentation_service": set(),
    "reward_service": {"segmentation_service"},
    "rollout": {*ARITHMETIC, *VIDEOS},
    "learner": {*ARITHMETIC},
    "configs": set(),
    "cluster": set(PACKAGES),
}
HEAVY = {"torch", "torchvision", "vllm", "ray", "deepspeed", "transformers", "sam2", "pandas", "pyarrow", "omegaconf", "scipy"}
HEAVY |= {"cv2", "av", "PIL", "numpy", "rich", "tensorboard"}


def imports_of(tree, module, top_level_only=False):
    """(dotted name, line) of every import in a module, relative ones made absolute."""
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import module` names the module, so that leaves can be told from the rest.
            yield from ((f"{name}.{alias.name}", node.lineno) for alias in node.names)


def modules(package):
    for file in sorted((ROOT / package).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        yield file, ".".join(parts), ast.parse(file.read_text(encoding="utf-8"), str(file))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_star(package):
    allowed = MAY_IMPORT[package]
    wrong = []
    for file, module, tree in modules(package):
        for name, line in imports_of(tree, module):
            top = name.split(".")[0]
            if top == package or top not in PACKAGES:
                continue
            if not (top in allowed or any(name == leaf or name.startswith(leaf + ".") for leaf in allowed)):
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_installed_imports_what_is_not(package):
    found = [(f"{f}:{line} imports {name}", name) for f, m, tree in modules(package) for name, line in imports_of(tree, m)]
    assert not [text for text, name in found if name.split(".")[0] in ("tests", "benchmarks", "examples")]


@pytest.mark.parametrize("package", PACKAGES)
def test_package_files_import_nothing_heavy(package):
    file = ROOT / package / "__init__.py"
    assert file.is_file(), f"{package} has no __init__.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{package}/__init__.py does not say what the package is"
    heavy = [name for name, _ in imports_of(tree, f"{package}.__init__", top_level_only=True) if name.split(".")[0] in HEAVY]
    assert not heavy, f"{package}/__init__.py imports {heavy}"


@pytest.mark.parametrize("leaf, allowed", sorted((ARITHMETIC | VIDEOS).items()))
def test_leaves_are_light(leaf, allowed):
    tree = ast.parse((ROOT / (leaf.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    imported = {name for name, _ in imports_of(tree, leaf)}
    assert not [name for name in imported if name.split(".")[0] in HEAVY - allowed]
    assert not [name for name in imported if name.split(".")[0] in PACKAGES and not name.startswith(tuple(ARITHMETIC | VIDEOS))]


def test_importing_the_packages_and_the_settings_is_light():
    """Run for real, in one fresh process: what the imports reach must be light too, not only what they name."""
    slow = sorted(HEAVY - {"numpy", "PIL", "omegaconf"})  # the prompt's settings live beside code that uses numpy and PIL
    code = (
        "import sys\n"
        + "".join(f"import {p}\n" for p in PACKAGES)
        + f"assert not [m for m in {sorted(HEAVY)} if m in sys.modules], 'packages'\n"
        + "import cluster.config, cluster.config_resolve, cluster.config_dump\n"
        + f"found = [m for m in {slow} if m in sys.modules]\nassert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_files_say_what_they_are_about_and_stay_readable(package):
    for file, _, tree in modules(package):
        docstring = ast.get_docstring(tree)
        assert docstring and docstring.splitlines()[0].strip(), f"{file} has no first line that says what it is about"
        lines = len(file.read_text(encoding="utf-8").splitlines())
        assert lines <= 500, f"{file} has {lines} lines"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_catch_all_names(package):
    for file, _, tree in modules(package):
        assert file.stem not in ("utils", "common", "helpers", "misc"), file
        classes = [n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
        assert not [c for c in classes if c.endswith(("Manager", "Factory", "Handler"))], f"{file}: {classes}"
