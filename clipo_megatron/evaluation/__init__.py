"""Held-out problems: asked, graded, counted, written down, and compared problem by problem."""
