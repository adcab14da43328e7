"""Hugging Face and GGUF folders in, Orbax out."""
