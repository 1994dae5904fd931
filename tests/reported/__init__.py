"""Public bug reports of other trainers, tried here. `reports.py` is their register, docs/generated/ has the page."""
