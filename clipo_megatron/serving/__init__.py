"""Servers of generation engines: their environments, command lines, and the supervisor behind `clipo serve`."""
