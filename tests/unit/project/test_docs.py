"""The documentation is true: its examples run, its tables agree with the code, and what it names exists."""

import re
import sys
import types

import pytest
import yaml
from paths import ROOT

from clipo_megatron.config.load import load
from clipo_megatron.config.reference import settings
from clipo_megatron.rewards import MODES, grade

PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXT = {page.name: page.read_text() for page in PAGES}
WITH_EXAMPLES = [name for name, text in TEXT.items() if "```python" in text]
GRADERS = ("math", "reference", "choice", "number")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def spans(text: str) -> set[str]:
    """What stands in backquotes outside fenced blocks."""
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)))


def verdicts() -> list[tuple[str, str, str, dict[str, str]]]:
    """Rows of the table of verdicts: response, ground truth, data source, sign by mode."""
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (\w+) \| ([-+| ]+) \|$", TEXT["data.md"], re.MULTILINE)
    return [(r, g, source, dict(zip(GRADERS, signs.split(" | "), strict=True))) for r, g, source, signs in rows]


def test_there_are_pages_of_readable_length():
    assert {"architecture.md", "data.md", "extending.md", "method.md"} <= set(TEXT)
    assert {name: len(text.splitlines()) for name, text in TEXT.items() if len(text.splitlines()) > 150} == {}


@pytest.mark.parametrize("page", WITH_EXAMPLES)
def test_examples_run(page, monkeypatch):
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)  # where dataclasses look their module up
    exec(compile("\n".join(blocks(TEXT[page], "python")), f"docs/{page}", "exec"), vars(module))


def test_example_sources_are_valid(tmp_path):
    file = tmp_path / "run.yaml"
    for example in blocks(TEXT["data.md"], "yaml"):
        file.write_text(yaml.safe_dump({"model": {"path": "some/folder"}, **yaml.safe_load(example)}))
        assert len(load(file).data.train) == 2


def test_the_configuration_of_the_readme_is_one(tmp_path):
    file = tmp_path / "mine.yaml"
    (example,) = blocks((ROOT / "README.md").read_text(), "yaml")
    file.write_text(example)
    config = load(file)
    assert (config.name, config.layout.tp, len(config.data.train), len(config.data.eval)) == ("mine", 1, 1, 1)


@pytest.mark.parametrize(("response", "gold", "source", "signs"), verdicts())
def test_the_table_of_verdicts_is_true(response, gold, source, signs):
    found = {mode: "+" if grade(response, gold, data_source=source, mode=mode) == 1.0 else "-" for mode in GRADERS}
    assert found == signs


def test_the_tables_are_whole():
    assert len(verdicts()) > 20
    assert all(f"| `{mode}` |" in TEXT["data.md"] for mode in MODES if mode != "auto")


@pytest.mark.parametrize("page", sorted(TEXT))
def test_paths_settings_and_metrics_exist(page):
    # "data.train[].path" also makes data.train a key
    keys = {key for setting in settings() for key in (setting.key, setting.key.partition("[")[0])}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    code = "\n".join(path.read_text() for path in (ROOT / "clipo_megatron").rglob("*.py"))
    missing = []
    for span in spans(TEXT[page]):
        section, dot, _ = span.partition(".")
        if re.fullmatch(r"[a-z_/]+(\.py|/)", span):
            places = [ROOT / span, ROOT / "clipo_megatron" / span, ROOT / "clipo_megatron/weights/families" / span]
            exists = any(place.exists() for place in places)
        elif dot and section in sections and re.fullmatch(r"[a-z_.]+", span):
            exists = span in keys
        elif re.fullmatch(r"(policy|clipo|reward|rollout|speed|time)/[a-z_]+", span):
            exists = f'"{span}"' in code
        else:
            continue
        missing += [] if exists else [span]
    assert missing == []


def test_the_architecture_names_every_subpackage():
    subpackages = {
        path.relative_to(ROOT / "clipo_megatron").parts[0] for path in (ROOT / "clipo_megatron").rglob("*.py")
    }
    named = {span.rstrip("/") for span in spans(TEXT["architecture.md"])}
    assert subpackages - named - {"__init__.py"} == set()


@pytest.mark.parametrize("page", sorted(TEXT))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT[page]):
        assert (ROOT / "docs" / target).exists(), target
