"""`clipo eval` where no response could be graded: the result is kept, and the command fails."""

from types import SimpleNamespace

import pytest

from clipo_megatron.config.schema import RunConfig
from clipo_megatron.evaluation.errors import EvaluationError
from clipo_megatron.evaluation.results import Evaluation, ProblemResult, read_result
from clipo_megatron.training import eval_run


@pytest.mark.parametrize("ungraded", [2, 1])
def test_figures_of_no_verdict_are_no_success(tmp_path, monkeypatch, ungraded):
    """Else a machine whose graders fail reports a model that solves nothing."""
    result = Evaluation(0, {"exam/0": ProblemResult(2, 0, ungraded=ungraded)})
    reporter = SimpleNamespace(say=lambda line: None)
    session = SimpleNamespace(
        close=lambda: None, output=tmp_path, reporter=reporter, eval_prompts=[1], is_main=True, layout=None
    )
    engine = SimpleNamespace(close=lambda: None, update_weights=lambda step: None, evaluate=lambda step: result)
    monkeypatch.setattr(eval_run, "Session", lambda *_, **__: session)
    monkeypatch.setattr(eval_run, "PolicyEngine", lambda *_: engine)
    monkeypatch.setattr(eval_run, "newest", lambda *_: None)
    file = tmp_path / "result.json"
    if ungraded == 2:
        with pytest.raises(EvaluationError, match="no response could be graded"):
            eval_run.evaluate_run(RunConfig(), file=file)
    else:
        eval_run.evaluate_run(RunConfig(), file=file)
    assert read_result(file) == result
