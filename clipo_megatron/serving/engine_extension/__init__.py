"""A folder for the PYTHONPATH of servers of every engine, whose ranks load it where weights arrive as changes."""
