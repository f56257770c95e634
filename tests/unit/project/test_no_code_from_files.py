"""Nothing in the package runs text that it reads: it unpickles in one restricted way, and takes no code of a model."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from paths import ROOT

PACKAGE = ROOT / "clipo_megatron"
# Calls that run or unpickle what they are given, whatever their arguments.
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load",
    "marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "dill.load",
    "dill.loads", "cloudpickle.load", "cloudpickle.loads", "pandas.read_pickle", "os.system", "os.popen",
    "runpy.run_path", "torch.hub.load",
}  # fmt: skip
# Calls that are safe with one argument only.
NEEDS = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "from_pretrained": ("trust_remote_code", False),
    "from_config": ("trust_remote_code", False),
}
# A subclass of pickle.Unpickler finds what it names itself.
UNPICKLERS = {
    "weights/formats/archive.py": "_TensorUnpickler",
    "weights/formats/metadata.py": "_MetadataUnpickler",
    "serving/vllm_extension/clipo_weights.py": "_Unpickler",
}
ALLOWED = {("conversion/logits.py", "from_pretrained")}  # of a class of transformers, with a configuration at hand


def has(call: ast.Call, name: str, value: object) -> bool:
    return any(
        each.arg == name and isinstance(each.value, ast.Constant) and each.value.value is value
        for each in call.keywords
    )


def dangers(path: Path) -> Iterator[str]:
    place = str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else path.name
    nodes = list(ast.walk(ast.parse(path.read_text())))
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        if name in FORBIDDEN:
            yield f"{place}:{call.lineno}: {name}"
        for end, (argument, value) in NEEDS.items():
            is_it = name == end or ("." not in end and name.endswith(f".{end}"))
            if is_it and not has(call, argument, value) and (place, end) not in ALLOWED:
                yield f"{place}:{call.lineno}: {name} without {argument}={value}"
    for node in nodes:
        if isinstance(node, ast.ClassDef) and any("Unpickler" in ast.unparse(base) for base in node.bases):
            methods = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
            if UNPICKLERS.get(place) != node.name or "find_class" not in methods:
                yield f"{place}:{node.lineno}: class {node.name} unpickles"


def test_no_module_runs_what_it_reads():
    assert [danger for path in sorted(PACKAGE.rglob("*.py")) for danger in dangers(path)] == []


def test_each_kind_of_danger_would_be_found(tmp_path):
    lines = [f"{name}(x)" for name in (*FORBIDDEN, *NEEDS, "AutoTokenizer.from_pretrained")]
    (tmp_path / "module.py").write_text("\n".join([*lines, "class A(pickle.Unpickler): ..."]))
    assert len(list(dangers(tmp_path / "module.py"))) == len(lines) + 1
