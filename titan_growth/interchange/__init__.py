"""Hugging Face folders: read as checkpoints (`reader.py`), made from and into step folders."""
