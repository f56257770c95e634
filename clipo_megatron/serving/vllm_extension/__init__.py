"""A folder for the PYTHONPATH of a vLLM server, from which its workers load an extension."""
