"""The command line `clipo`; each command is a file of its own."""
