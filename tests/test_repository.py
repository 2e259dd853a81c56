"""House rules that no single module can show: who imports whom, what is pinned, what documents and Makefile name."""

import ast
import functools
import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "personalize_jax"
FOLDERS = ("personalize_jax", "configs", "experiments", "launch", "tests")
SOURCES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
DOCUMENTS = [*ROOT.glob("*.md"), *sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.md"))]
TEXTS = [*SOURCES, *DOCUMENTS, ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".ci" / "run"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# In the order in which data passes through them; each imports only what stands before it. `command` is here because
# rooms may hold commands. Other modules of the package's top level may import everything, and no room imports them.
ROOMS = (
    "runtime",
    "diffusion",
    "models",
    "formats",
    "families",
    "pipeline",
    "subject",
    "training",
    "metrics",
    "world",
    "benchmark",
    "planning",
    "method",
    "evaluation",
)
COMMANDS = ("personalize", "sample", "evaluate", "export", "plan", "pretrain")

COMPARES = ("tests/", "experiments/benchmark_peers.py", "experiments/peers/")  # what may import the tests' references
LAUNCHES = ("tests/", "launch/")  # what may import Ray
PICKLE_READERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch"}
MAX_LINES = 400
MAX_README_WORDS = 1800
MAX_ASSETS_BYTES = 40 * 2**20


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@functools.cache
def syntax(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), name_of(file))


def imports(file: Path) -> set[str]:
    """Dotted names of all that a file imports, at its top and inside functions."""
    found = set()
    for node in ast.walk(syntax(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)} imports relatively; this project names modules in full"
            # The names too: `from personalize_jax import command` imports a module.
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def requirements(file: Path) -> dict[str, str]:
    """Versions by normalised distribution name."""
    lines = [line.strip() for line in file.read_text().splitlines()]
    pins = [line for line in lines if line and not line.startswith(("#", "-c ", "-r "))]
    loose = [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin)]
    assert not loose, f"{name_of(file)} must pin exact versions under normalised names: {loose}"
    return dict(pin.split("==") for pin in pins)


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def third_party(file: Path) -> set[str]:
    """Top-level modules that a file imports and that neither Python nor this repository has."""
    return {name.split(".")[0] for name in imports(file)} - set(FOLDERS) - sys.stdlib_module_names


def ranges(extra: str | None = None) -> dict[str, Requirement]:
    """Dependencies that pyproject.toml declares, or those of one of its extras, by normalised distribution name."""
    project = PROJECT["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {normalised(requirement.name): requirement for requirement in map(Requirement, lines)}


def test_rooms_import_only_the_rooms_before_them() -> None:
    assert {folder.parent.name for folder in PACKAGE.glob("*/__init__.py")} == set(ROOMS)
    wrong = [
        f"{name_of(file)} imports {other}"
        for i, room in enumerate(ROOMS)
        for file in (PACKAGE / room).rglob("*.py")
        for other in {name.split(".")[1] for name in imports(file) if name.startswith("personalize_jax.")}
        if other not in ROOMS[: i + 1]
    ]
    assert not wrong


def test_commands_alone_stand_outside_rooms_and_know_no_other_command() -> None:
    assert {file.stem for file in PACKAGE.glob("[!_]*.py")} == set(COMMANDS)
    others = {f"personalize_jax.{command}" for command in COMMANDS}
    assert not [name for name in COMMANDS if others & imports(PACKAGE / f"{name}.py")]


def test_the_package_imports_nothing_around_it() -> None:
    around = {"configs", "experiments", "launch", "tests", "pytest"}
    assert not [name_of(f) for f in PACKAGE.rglob("*.py") if around & {name.split(".")[0] for name in imports(f)}]


def test_only_the_networks_know_flax() -> None:
    """So that everything else works on plain dictionaries of arrays."""
    outside = [file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE / "models"]
    assert not [name_of(file) for file in outside if "flax" in {name.split(".")[0] for name in imports(file)}]


def test_no_pickle_is_loaded() -> None:
    wrong = []
    for file in SOURCES:
        if not name_of(file).startswith(COMPARES):
            wrong += [f"{name_of(file)} imports {n}" for n in imports(file) if n.split(".")[0] in PICKLE_READERS]
        for node in ast.walk(syntax(file)):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                refused = isinstance(node.value, ast.Constant) and node.value.value is False
                wrong += [] if refused else [f"{name_of(file)}:{node.value.lineno} allows pickles"]
    assert not wrong


def test_no_path_of_one_machine() -> None:
    somebodys = re.compile(r"(?<![\w.~/])/(?:root|work|home/(?!me/)|Users|mnt|opt)/\w")
    found = [
        f"{name_of(file)}:{number}: {line.strip()[:80]}"
        for file in TEXTS
        if file != Path(__file__)
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if somebodys.search(line)
    ]
    assert not found


def test_files_are_short() -> None:
    lengths = {name_of(file): len(file.read_text().splitlines()) for file in SOURCES}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


def test_assets_are_small_and_no_pickles() -> None:
    files = [file for file in (PACKAGE / "assets").rglob("*") if file.is_file()]
    assert files
    assert sum(file.stat().st_size for file in files) < MAX_ASSETS_BYTES
    assert {file.suffix for file in files} <= {".html", ".json", ".safetensors", ".png", ".jpg", ".md"}


def test_whatever_is_imported_is_pinned_as_installed() -> None:
    pins = requirements(ROOT / "requirements.txt")
    test_pins = requirements(ROOT / "tests" / "requirements.txt")
    launch_pins = requirements(ROOT / "launch" / "requirements.txt")
    distributions = importlib.metadata.packages_distributions()
    for file in SOURCES:
        known = pins | (test_pins if name_of(file).startswith(COMPARES) else {})
        known |= launch_pins if name_of(file).startswith(LAUNCHES) else {}
        for module in third_party(file):
            owners = {normalised(owner) for owner in distributions.get(module, [])}
            assert owners & known.keys(), f"{name_of(file)} imports {module}, which no requirement provides"
    drifted = {name: pin for name, pin in pins.items() if importlib.metadata.version(name) != pin}
    assert not drifted, "the environment is not that of requirements.txt; run make test"


def test_nothing_is_left_to_the_resolver() -> None:
    pins = requirements(ROOT / "requirements.txt")
    pending = {(name, "") for name in pins}
    seen = set(pending)
    while pending:
        name, extra = pending.pop()
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                assert normalised(requirement.name) in pins, f"{name} needs {requirement}"
                new = {(requirement.name, wanted) for wanted in requirement.extras} - seen
                seen |= new
                pending |= new


def test_whatever_the_package_imports_is_a_dependency_and_nothing_else_is() -> None:
    distributions = importlib.metadata.packages_distributions()
    imported = set().union(*map(third_party, PACKAGE.rglob("*.py")))
    owners = {module: {normalised(owner) for owner in distributions.get(module, [])} for module in imported}
    assert not {module: names for module, names in owners.items() if not names & ranges().keys()}
    # tensorflow-datasets imports array-record to write the rendered world's dataset, and asks for it on Linux only.
    assert ranges().keys() - set().union(*owners.values()) == {"array-record"}


@pytest.mark.parametrize("extra", [None, *PROJECT["project"]["optional-dependencies"]])
def test_pins_lie_within_the_ranges_of_the_package(extra: str | None) -> None:
    pins = requirements(ROOT / "requirements.txt")
    pins |= requirements(ROOT / "tests" / "requirements.txt") | requirements(ROOT / "launch" / "requirements.txt")
    pins |= re.findall(r"pip install (wandb)==(\S+)", (ROOT / "requirements.txt").read_text())
    own = {normalised(PROJECT["project"]["name"])}
    outside = [str(r) for name, r in ranges(extra).items() if name not in own and pins[name] not in r.specifier]
    assert not outside, "requirements files and pyproject.toml disagree"
    if extra is None:
        unbounded = [name for name, r in ranges().items() if not any(s.operator == ">=" for s in r.specifier)]
        assert not unbounded, "any version, however old, would do"


def test_the_installed_package_has_all_assets() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["personalize_jax"]
    installed = {file for pattern in patterns for file in PACKAGE.glob(pattern)}
    assert {file for file in (PACKAGE / "assets").rglob("*") if file.is_file()} == installed


@pytest.mark.parametrize("document", [f for f in TEXTS if f != Path(__file__)], ids=name_of)
def test_commands_named_exist(document: Path) -> None:
    text = document.read_text()
    for module in re.findall(r"python -m ((?:personalize_jax|experiments|launch|tests)[\w.]*)", text):
        found = importlib.util.find_spec(module)
        assert found and '__name__ == "__main__"' in Path(found.origin).read_text(), f"python -m {module}"
    for config in re.findall(r"--config=(configs/[\w/]+\.py)", text):
        assert (ROOT / config).is_file(), config


def anchors(document: Path) -> set[str]:
    """Fragments by which GitHub links to a document's headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_documents_name_what_exists(document: Path) -> None:
    text = document.read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    code = "\n".join(re.findall(r"```.*?```|`[^`]+`", text, flags=re.DOTALL))
    assert set(re.findall(r"\bmake ([a-z][\w-]*)", code)) <= targets
    for link, _, fragment in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)", text) if "://" not in link):
        target = document.parent / link if link else document
        assert target.exists(), link
        assert not fragment or fragment in anchors(target), f"{link}#{fragment}"
    files = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)(?::\w+)?`", text)
    assert not [file for file in files if not (ROOT / file).exists()]
    commands = [file for folder in FOLDERS if folder != "configs" for file in (ROOT / folder).rglob("*.py")]
    defined = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", "".join(file.read_text() for file in commands)))
    assert set(re.findall(r"(?<!tensorboard)[ `]--(\w+)[= `]", text)) <= defined


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= MAX_README_WORDS
