r"""Where a response's answer is found: after thinking, in the form that the prompt asks for, in one box or several."""

import pytest

from clipo_megatron.config.schema import GraderMode, RewardConfig
from clipo_megatron.data.asked import asked_forms, opens_thinking
from clipo_megatron.flow import Prompt, Rollout, RolloutGroup
from clipo_megatron.rewards import GraderPool, grade
from clipo_megatron.rewards.final_answer import gold_answer
from clipo_megatron.rewards.voting import answer_key

BOX = "Put your final answer within \\boxed{}."
HASHES = 'Let\'s think step by step and output the final answer after "####".'
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem."
)
TAGS = "Give the reasoning in <think> </think> and the answer in <answer> </answer> tags."
OPENED = f"<|im_start|>user\n1+4? {BOX}<|im_end|>\n<|im_start|>assistant\n<think>\n"
CLOSED = f"<|im_start|>user\n1+4? {BOX}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.mark.parametrize("mode", ["math", "number", "choice", "auto"])
@pytest.mark.parametrize(
    ("response", "prompt", "right"),
    [
        ("<think> \\boxed{5}</think> So \\boxed{6}", BOX, False),
        ("<think>\nPerhaps \\boxed{5}? No, let me check", BOX, False),
        ("</think> \\boxed{5} <think> or", BOX, False),
        ("<think>\\boxed{6}</think> \\boxed{5}", BOX, True),
        ("\\boxed{5}", BOX, True),
        ("Perhaps \\boxed{5}? No, let me", OPENED, False),
        ("Perhaps \\boxed{6}.</think> \\boxed{5}", OPENED, True),
        ("\\boxed{5}", CLOSED, True),
        ("[THINK] \\boxed{5}", BOX, False),
    ],
)
def test_only_what_follows_closed_thinking_counts(response, prompt, right, mode):
    assert grade(response, "5", data_source="my/set", mode=mode, prompt=prompt) == float(right)


FAMILIES = [
    *(("<think>", "</think>"), ("<Think>", "</THINK>"), ("< think >", "</think >"), ("<thinking>", "</thinking>")),
    *(("<thoughts>", "</thoughts>"), ("<reasoning>", "</reasoning>"), ("<scratchpad>", "</scratchpad>")),
    *(("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"), ("<seed:think>", "</seed:think>"), ("<cot>", "</cot>")),
    *(("<|begin_of_thought|>", "<|end_of_thought|>"), ("<|START_THINKING|>", "<|END_THINKING|>")),
    *(("<|think_start|>", "<|think_end|>"), ("<longcat_think>", "</longcat_think>"), ("<|think|>", "<|/think|>")),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
]


@pytest.mark.parametrize(("opening", "closing"), FAMILIES)
def test_thinking_is_told_by_the_tags_of_every_family(opening, closing):
    def verdict(response: str) -> float | None:
        return grade(response, "5", data_source="my/set", prompt=BOX)

    assert verdict(f"{opening} Perhaps \\boxed{{5}}? No, let me check") == 0.0
    assert verdict(f"{opening} \\boxed{{5}} {closing} So it is six.") == 0.0
    assert verdict(f"{opening} \\boxed{{6}} {closing} So \\boxed{{5}}") == 1.0
    assert verdict(f"{opening} a {closing} \\boxed{{5}} {opening} no, \\boxed{{5}}") == 0.0
    assert verdict(f"{opening} <reflection> no </reflection> \\boxed{{5}}") == 0.0  # what is inside closes itself alone
    assert opens_thinking(f"Put it in \\boxed{{}}.{opening}\n") and not opens_thinking(f"{opening}\n{closing}\n")
    assert grade(f"no </reflection> \\boxed{{5}} {closing} Six", "5", prompt=f"{BOX}{opening}\n") == 0.0
    assert grade(f"no \\boxed{{5}} {closing} \\boxed{{5}}", "5", prompt=f"{BOX}{opening}\n") == 1.0


def test_brackets_of_mathematics_are_no_tags():
    said = "a < b, [think about it], <thinking about x> and f[x] > 1"
    assert grade(f"{said}: \\boxed{{5}}", "5", data_source="my/set", prompt=BOX) == 1.0


def test_unclosed_thinking_holds_no_text_for_generators_and_votes():
    assert grade("<think>7", "7", data_source="reasoning_gym/chain_sum", mode="auto") == 0.0
    assert answer_key("<think> \\boxed{5}", data_source="math", mode="math") is None


FORMS = [
    ("It is 42.\n#### 42", HASHES, True),
    ("It is 42.\n#### 42<|im_end|>", HASHES, True),
    ("It is \\boxed{42}", HASHES, False),
    ("#### 41\nno: #### 42", HASHES, True),
    ("so\n\nAnswer: 42", DAPO, True),
    ("so\n\nAnswer: $42$.", DAPO, True),
    ("**Answer:** \\boxed{42}", DAPO, True),
    ("Answer: 42 or rather\nAnswer: 41", DAPO, False),
    ("Answer: 41, no. Answer: 42", DAPO, True),
    ("Answer: 42, no. Answer: 41", DAPO, False),
    ("Answer:\n\\[\n42\n\\]", DAPO, True),
    ("#### Answer: 42", HASHES, True),
    ("#### 4 2", HASHES, False),
    ("<answer>The answer is 42.</answer>", TAGS, True),
    ("It is 42", DAPO, False),
    ("<think>a</think><answer>42</answer>", TAGS, True),
    ("<answer>\\boxed{42}</answer>", TAGS, True),
    ("<answer>41</answer><answer> 42 </answer>", TAGS, True),
    ("\\boxed{42}", TAGS, False),
    ("#### 42", BOX, False),
    ("The final answer is 42.", "Finish with: The final answer is X.", True),
    ("The final answer is $42$. I hope it is correct.", "Finish with: The final answer is X.", True),
]


@pytest.mark.parametrize(("response", "prompt", "right"), FORMS)
def test_the_form_that_the_prompt_asks_for_counts(response, prompt, right):
    for gold in ("42", "She has 6*7 = <<6*7=42>>42.\n#### 42"):
        assert grade(response, gold, data_source="openai/gsm8k", prompt=prompt) == float(right)


@pytest.mark.parametrize("response", ["#### 42", "<answer>42</answer>", "so\nAnswer: 42"])
def test_a_form_that_cannot_be_mistaken_counts_where_the_prompt_is_not_known(response):
    assert grade(response, "42", data_source="openai/gsm8k") == 1.0
    assert grade(f"\\boxed{{41}} {response}", "42", data_source="openai/gsm8k") == 0.0


@pytest.mark.parametrize(
    ("text", "forms"),
    [
        (BOX, ("boxed",)),
        (HASHES, ("hashes",)),
        (DAPO, ("line",)),
        (TAGS, ("<answer>",)),
        ("The last line ... should be: 'Answer: $LETTER' (without quotes)", ("line",)),
        ("The best answer is [the_answer_letter].", ("sentence",)),
        ("请把答案写在 \\boxed{} 中", ("boxed",)),
        ("What is 1+1?", ()),
        ("Question: 1+1?\nAnswer:", ()),
        ("#### Task\nAdd 1 and 1.", ()),
    ],
)
def test_prompts_are_understood(text, forms):
    assert asked_forms(text) == forms


def test_a_prompt_that_opens_thinking_is_told_from_one_that_closes_it():
    assert opens_thinking(OPENED) and not opens_thinking(CLOSED)
    assert not opens_thinking("Write <think> and </think>.")


BOXES = [
    ("\\boxed {5}", "5"),
    ("\\boxed\n{5}", "5"),
    ("\\fbox{5}", "5"),
    ("\\boxed 5", "5"),
    ("\\boxed{5}. I gave it in a \\boxed environment.", "5"),
    ("\\boxed{5}, as \\boxed{} asks", "5"),
    ("\\boxed{\\boxed{5}}", "5"),
    ("$$\\boxed{5}$$<|im_end|>", "5"),
    ("\\boxed{5.}", "5"),
    ("\\boxed{(-2,18)} and \\boxed{(8,38)}", "the points $\\boxed{(-2,18)}$ and $\\boxed{(8,38)}$."),
    ("\\boxed{(8,38),(-2,18)}", "the points $\\boxed{(-2,18)}$ and $\\boxed{(8,38)}$."),
    ("\\boxed{\\pm(2x+1)}", "Then $g(x)=\\boxed{2x+1}$ or $g(x)=\\boxed{-2x-1}$."),
    ("\\boxed{2-b}", "$\\boxed{-b+2}$, or $\\boxed{2 - b}$"),
    ("\\boxed{12, 18}", "$h = \\boxed{12}$ and $k = \\boxed{18}$"),
    ("\\boxed{(12, 18)}", "$h = \\boxed{12}$ and $k = \\boxed{18}$"),
    ("$h=\\boxed{12}$, $k=\\boxed{18}$", "$h = \\boxed{12}$ and $k = \\boxed{18}$"),
    ("$k=\\boxed{-3}$ or $k=\\boxed{5}$", "$k = \\boxed{5}$ or $k = \\boxed{-3}$"),
    ("\\boxed{30^\\circ} or \\boxed{150^\\circ}", "$\\boxed{30^\\circ}$ or $\\boxed{150^\\circ}.$"),
    ("\\boxed{5} or rather \\boxed{6}", "6"),
    ("\\boxed{4} \\boxed{5}", "5"),
    ("$x = -\\boxed{5}$", "-5"),
    ("$7-\\boxed{5}=2$", "5"),
    ("\\boxed{5\\}", "5"),
    ("- \\boxed{2}\n- \\boxed{3}", "$\\boxed{2}$ and $\\boxed{3}$"),
    ("1. \\boxed{2}\n2. \\boxed{3}", "$\\boxed{2}$ and $\\boxed{3}$"),
    ("\\boxed{2} as well as \\boxed{3}", "$\\boxed{2}$ and $\\boxed{3}$"),
]
NOT_BOXES = [
    ("$x = -\\boxed{5}$", "5"),
    ("\\boxed{5", "5"),
    ("\\boxed{4} \\boxed{5", "4"),
    ("\\boxed{18} or \\boxed{19}", "19"),
    ("\\boxed{(-2,18)}", "the points $\\boxed{(-2,18)}$ and $\\boxed{(8,38)}$."),
    ("\\boxed{(8,38)}", "the points $\\boxed{(-2,18)}$ and $\\boxed{(8,38)}$."),
    ("\\boxed{2x+1}", "Then $g(x)=\\boxed{2x+1}$ or $g(x)=\\boxed{-2x-1}$."),
    ("\\boxed{18, 12}", "$h = \\boxed{12}$ and $k = \\boxed{18}$"),
]


@pytest.mark.parametrize(("response", "gold"), BOXES)
def test_boxes_are_read(response, gold):
    assert grade(response, gold, data_source="my/set") == 1.0


@pytest.mark.parametrize(("response", "gold"), NOT_BOXES)
def test_half_an_answer_and_open_boxes_are_wrong(response, gold):
    assert grade(response, gold, data_source="my/set") == 0.0


def test_the_last_statement_of_a_worked_solution_is_the_gold_answer():
    assert gold_answer("Solution 1: \\boxed{4}. Solution 2: it is \\boxed{5}.") == "5"
    assert gold_answer("6*7 = 42\n#### 42") == "42"
    assert gold_answer("a long solution that ends so.\nThe answer is: 42") == "42"
    assert gold_answer("\\frac{1}{2}") == "\\frac{1}{2}"


def test_the_pool_reads_forms_and_thinking_from_the_prompt():
    import torch

    def group(position: int, prompt: Prompt, text: str) -> RolloutGroup:
        versions = torch.zeros(1, dtype=torch.int64)
        return RolloutGroup(position, prompt, [Rollout(prompt.tokens, torch.zeros(1), text, "stop", versions, 0)])

    turns = ({"role": "user", "content": f"6*7? {HASHES}"},)
    tokens = torch.tensor([1])
    asks = Prompt("a/0", turns, tokens, "openai/gsm8k", "42")
    opened = Prompt("a/1", turns, tokens, "openai/gsm8k", "42", {}, ("hashes",), True)
    with GraderPool(RewardConfig(mode=GraderMode.math)) as pool:
        texts = [(asks, "#### 42"), (asks, "\\boxed{42}"), (opened, "#### 42"), (opened, "</think>#### 42")]
        begun = [pool.grade(group(position, *each)) for position, each in enumerate(texts)]
        correct = [each.result().verdicts[0].correct for each in begun]
    assert correct == [True, False, False, True]
