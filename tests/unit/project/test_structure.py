"""The house rules: who may import whom, what only one subpackage may say, and what no committed file may hold."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from paths import ROOT, TOOLS

PACKAGE = ROOT / "clipo_megatron"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A subpackage imports subpackages that stand before it in this list, and no others.
SUBPACKAGES = (
    "flow",
    "config",
    "runtime",
    "data",
    "rewards",
    "rollout",
    "algorithms",
    "weights",
    "evaluation",
    "serving",
    "checkpoint",
    "policy",
    "sync",
    "conversion",
    "checks",
    "telemetry",
    "planning",
    "report",
    "slurm",
    "training",
    "cli",
)
MOST_ARROWS = 100  # pairs of subpackages of which one imports the other; the programs in tools/ count as one

# package -> the subpackages that may import it, anywhere in a file
ONLY_IN = {
    "megatron": {"policy", "weights"},
    "transformer_engine": {"policy"},
    "apex": {"policy"},
    "transformers": {"data", "rollout", "conversion"},
    "reasoning_gym": {"data", "rewards"},
    "math_verify": {"rewards"},
    "sympy": {"rewards"},
    "omegaconf": {"config"},
    "aiohttp": {"rollout"},
    "orjson": {"rollout"},
    "rich": {"telemetry", "cli", "conversion", "planning"},
}
DEVICE_WORDS = re.compile("cuda|nccl|gloo", re.IGNORECASE)
# Names of Megatron's own, and of the platform's adapter to them, which cannot be spelt otherwise.
DEVICE_WORDS_ELSEWHERE = {
    "use_gloo_process_groups",
    "create_gloo_process_groups",
    "model_parallel_cuda_manual_seed",
    "enable_cuda_graph",
    "external_cuda_graph",
    "cuda_graph_impl",
    "cuda_graph_scope",
    "cuda_tensor_names",
}
# Modules outside the subpackages without torch that a command line or the start of a rank needs before there is torch.
TORCH_FREE = {("runtime", "slurm_env.py"), ("runtime", "launch.py"), ("runtime", "warning_filters.py")}
# What servers import in environments of their own
RUNS_IN_SERVERS = {"stand_ins", "vllm_extension", "engine_extension"}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
LONGEST_FILE = 400
MOST_PARAMETERS = 8
HOMES = ("home", "root", "work", "tmp")
REGISTRIES = ("pypi", "pythonhosted", "download.pytorch", "anaconda", "conda.io")


def subpackage_of(path: Path) -> str:
    """The subpackage of a module; flow.py counts as one."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(path.read_text(), filename=str(path))


def imports_of(node: ast.AST) -> list[tuple[int, str]]:
    """Line and dotted name of everything that one statement imports."""
    if isinstance(node, ast.Import):
        return [(node.lineno, alias.name) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        prefix = "." * node.level + (node.module or "")
        return [(node.lineno, f"{prefix}.{alias.name}") for alias in node.names]
    return []


@cache
def imports(path: Path) -> list[tuple[int, str]]:
    """Line and dotted name of everything that a module imports, in functions and under TYPE_CHECKING too."""
    return [each for node in ast.walk(tree_of(path)) for each in imports_of(node)]


def statements_run(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: those of functions and under TYPE_CHECKING do not."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield statement
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            yield from statements_run(statement.orelse)
            continue
        for part in ("body", "orelse", "finalbody"):
            yield from statements_run(getattr(statement, part, []))
        for handler in getattr(statement, "handlers", []):
            yield from statements_run(handler.body)


def loaded_by(names: Iterable[str]) -> set[str]:
    """Every module of this package, and what it names of others, that is imported when these modules are."""
    paths = {name_of(path): path for path in MODULES}
    loaded: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        parents = [name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)]
        for module in (name, *parents):
            if module in loaded:
                continue
            loaded.add(module)
            if module in paths:
                run = statements_run(tree_of(paths[module]).body)
                todo += [other for statement in run for _, other in imports_of(statement)]
    return loaded


def name_of(path: Path) -> str:
    """The dotted name of a module of the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def committed_files() -> list[Path]:
    """Files under version control that still exist; those of the source folders where there is no git."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
        names = listed.stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        names = []
    files = [ROOT / name for name in names if name] or [
        path
        for folder in ("clipo_megatron", "tests", "tools", "examples", "docs")
        for path in (ROOT / folder).rglob("*")
    ]
    return [path for path in files if path.is_file() and "__pycache__" not in path.parts]


def lines_with(pattern: re.Pattern[str]) -> list[str]:
    """ "file:line: text" of each line of a committed text file that `pattern` matches."""
    found = []
    for path in committed_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            for number, line in enumerate(text.splitlines(), start=1)
            if pattern.search(line)
        ]
    return found


def python(script: str, *arguments: str) -> None:
    """Run a script in a fresh interpreter; its assertions are this test's."""
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_there_is_something_to_judge():
    assert len(MODULES) > 50
    assert len(committed_files()) > 80
    assert {subpackage_of(path) for path in MODULES} - {"__init__"} == set(SUBPACKAGES), (
        "give the new subpackage its place in SUBPACKAGES"
    )
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "flow.py"}


def subpackages_imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and subpackage of each import from this package."""
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] == "clipo_megatron" and parts[1] != "__version__":
            yield line, parts[1]


def test_imports_point_inward():
    outward = []
    for path in MODULES:
        subpackage = subpackage_of(path)
        for line, other in subpackages_imported(path):
            if other != subpackage and SUBPACKAGES.index(other) > SUBPACKAGES.index(subpackage):
                outward.append(f"{path.relative_to(ROOT)}:{line}: {subpackage} imports {other}")
    assert outward == []


def test_imports_are_written_out_in_full():
    assert [f"{path}:{line}" for path in MODULES for line, name in imports(path) if name.startswith(".")] == []


def test_few_subpackages_know_each_other():
    arrows = {(subpackage_of(path), other) for path in MODULES for _, other in subpackages_imported(path)}
    arrows |= {("tools", other) for path in TOOLS.glob("*.py") for _, other in subpackages_imported(path)}
    assert len({(subpackage, other) for subpackage, other in arrows if subpackage != other}) <= MOST_ARROWS


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions and under TYPE_CHECKING count too."""
    names = {name_of(path): path for path in MODULES}
    graph = {
        name: {other if other in names else other.rpartition(".")[0] for _, other in imports(path)} & set(names)
        for name, path in names.items()
    }
    try:
        tuple(TopologicalSorter({name: others - {name} for name, others in graph.items()}).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


def classes() -> Iterator[tuple[Path, ast.ClassDef]]:
    """Every class of the package."""
    for path in MODULES:
        if not RUNS_IN_SERVERS & set(path.parts):
            yield from ((path, node) for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef))


def test_a_class_name_means_one_thing():
    places: dict[str, list[str]] = {}
    for path, node in classes():
        places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_no_constructor_takes_many_parameters():
    long = []
    for path, node in classes():
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                count = len(method.args.posonlyargs + method.args.args + method.args.kwonlyargs) - 1
                if count > MOST_PARAMETERS:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} takes {count}")
    assert long == []


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_a_package_is_imported_where_it_belongs(package):
    subpackages = {
        subpackage_of(path) for path in MODULES for _, name in imports(path) if name.split(".")[0] == package
    }
    assert subpackages <= ONLY_IN[package]


def test_importing_configuration_and_command_loads_no_torch():
    names = [
        name_of(path)
        for path in MODULES
        if (subpackage_of(path) in ("flow", "config", "serving", "checks") or path.parts[-2:] in TORCH_FREE)
        and not RUNS_IN_SERVERS & set(path.parts)
    ]
    assert "clipo_megatron.config.schema" in names
    python(
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    for heavy in ('torch', 'megatron', 'transformers'):\n"
        "        assert heavy not in sys.modules, f'{name} imports {heavy}'",
        *names,
    )


def test_importing_inner_subpackages_loads_no_megatron():
    inner = ("flow", "config", "runtime", "data", "rewards", "rollout", "algorithms")
    loaded = loaded_by(name_of(path) for path in MODULES if subpackage_of(path) in inner)
    assert "torch" in loaded and "megatron" not in loaded


def test_what_evaluates_cannot_train():
    """No optimizer, critic or reference policy is within reach of `clipo eval`."""
    loaded = loaded_by(["clipo_megatron.training.eval_run"])
    assert "megatron" in loaded, "it evaluates with the policy's model"
    training = {f"clipo_megatron.policy.{name}" for name in ("actor", "critic", "optimizer", "contrastive")}
    assert training <= {name_of(path) for path in MODULES} and not training & loaded


def words_in_code(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every identifier and string of a module, docstrings left out."""
    tree = tree_of(path)
    bodies = (node.body for node in ast.walk(tree) if hasattr(node, "body") and isinstance(node.body, list))
    spoken = {
        id(statement.value) for body in bodies for statement in body if isinstance(statement, ast.Expr)
    }  # a string that stands alone is a docstring
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in spoken:
            yield line, node.value
        for attribute in ("id", "attr", "arg", "name", "module", "asname"):
            if isinstance(value := getattr(node, attribute, None), str):
                yield line, value


def test_one_module_knows_the_devices():
    """Beside what runs in servers, where the package is not installed."""
    said, excused = [], set()
    for path in MODULES:
        if path.parts[-2:] == ("runtime", "platform.py") or RUNS_IN_SERVERS & set(path.parts):
            continue
        for line, word in words_in_code(path):
            if word in DEVICE_WORDS_ELSEWHERE:
                excused.add(word)
            elif DEVICE_WORDS.search(word):
                said.append(f"{path.relative_to(ROOT)}:{line}: {word}")
    assert said == []
    assert excused == DEVICE_WORDS_ELSEWHERE, "an exception that nobody needs"


def test_names_say_what_is_in_a_file():
    names = [path.relative_to(ROOT).with_suffix("") for path in MODULES]
    assert [str(name) for name in names if VAGUE_NAMES & set(name.parts)] == []


def test_files_stay_readable():
    assert [path.name for path in MODULES if len(path.read_text().splitlines()) > LONGEST_FILE] == []


def test_no_committed_file_names_a_place_of_one_machine():
    assert lines_with(re.compile(rf"(?<![\w./}})]){'/'}({'|'.join(HOMES)})(/|\b)")) == []


def test_no_committed_file_names_a_package_registry():
    registries = "|".join(re.escape(host) for host in REGISTRIES)
    here = str(Path(__file__).relative_to(ROOT))
    found = lines_with(re.compile(rf"https?://[^\s\"']*({registries})|index.url[= ]\S*://", re.IGNORECASE))
    assert [line for line in found if not line.startswith(here)] == []


def test_shipped_configurations_load_without_torch():
    configurations = sorted((ROOT / "examples").rglob("*.yaml"))
    assert configurations
    python(
        "import sys\n"
        "from clipo_megatron.config.load import load\n"
        "for path in sys.argv[1:]:\n"
        "    assert load(path).name\n"
        "assert 'torch' not in sys.modules",
        *map(str, configurations),
    )
