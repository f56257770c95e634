"""Runs the servers of generation engines: their environments, command lines and supervisor. Imports no torch."""
