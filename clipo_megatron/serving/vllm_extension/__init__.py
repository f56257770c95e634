"""A folder for the PYTHONPATH of a vLLM server: what its workers load besides vLLM."""
