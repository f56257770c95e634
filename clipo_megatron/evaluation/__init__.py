"""Evaluation on held-out problems: responses, figures, result files, and comparisons problem by problem."""
