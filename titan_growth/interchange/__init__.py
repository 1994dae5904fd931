"""Hugging Face folders: read as checkpoints (`reader.py`), and converted from and to step folders."""
