"""`clipo report`: one or several runs as a single HTML file. Imports no torch."""
