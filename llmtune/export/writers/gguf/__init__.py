"""GGUF, as llama.cpp reads it."""
