"""Every message that docs/troubleshooting.md quotes is printed by the code, and README's snippet trains a head."""

from __future__ import annotations

import ast
import re
import types

import pytest
import torch
from paths import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
README = (ROOT / "README.md").read_text()
MESSAGES = re.findall(r"^\| `(.+?)` \| .+? \| .+? \|$", PAGE, re.MULTILINE)
PLACE = "\0"  # where a message has a value


def texts() -> list[str]:
    """Every text of the code, with PLACE for each value; neighbouring literals are one text, as Python joins them."""
    found = [path.read_text() for path in (ROOT / "clipo_megatron" / "slurm" / "scripts").iterdir()]
    for path in (ROOT / "clipo_megatron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else PLACE for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


TEXTS = texts()


def test_the_page_quotes_messages_of_every_part():
    assert len(MESSAGES) > 25 and len(set(MESSAGES)) == len(MESSAGES)
    assert [title for title in re.findall(r"^## (.+)$", PAGE, re.MULTILINE)] == [
        "Before the first step",
        "While it trains",
        "Servers",
        "Slurm",
    ]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_one_of_the_code(message):
    """All of it is in one text, in this order; `...` stands for what the code fills in."""
    parts = message.split("...")
    pattern = ".*?".join(map(re.escape, parts))
    candidates = [text for text in TEXTS if all(part in text for part in parts)]
    assert any(re.search(pattern, text, re.DOTALL) for text in candidates), message


def test_the_snippet_of_the_readme_is_complete_and_trains_the_head():
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    snippet = types.ModuleType("snippet")
    exec(compile(code, "README.md", "exec"), vars(snippet))
    asked = "What is 6 x 7? Put your final answer within \\boxed{}."
    other = 'What is 2 + 3? Let\'s think step by step and output the final answer after "####".'
    texts = [
        "It is \\boxed{42}.",
        "So \\boxed{42}",
        "\\boxed{41}",
        "I do not know",
        "#### 5",
        "5\n#### 5",
        "#### 6",
        "#### 1",
    ]
    prompts, golds = [asked] * 4 + [other] * 4, ["42"] * 4 + ["5"] * 4
    group = torch.tensor([0] * 4 + [1] * 4)
    pooled = torch.randn(8, 896, generator=torch.Generator().manual_seed(0))
    before = snippet.head.projection.detach().clone()
    first = snippet.rewards(prompts, texts, golds, group, pooled)
    assert [reward > 0 for reward in first.tolist()] == [True, True, False, False] * 2, "right ones, in either form"
    assert not torch.equal(snippet.head.projection, before), "the head has learned"
    for _ in range(30):
        last = snippet.rewards(prompts, texts, golds, group, pooled)
    right = torch.tensor([True, True, False, False] * 2)
    assert last[right].mean() > first[right].mean(), "correct rollouts have come closer to each other"
    assert (last[~right] == 0).all()
