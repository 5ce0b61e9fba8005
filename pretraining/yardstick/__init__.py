"""Figures by which runs are compared: `python -m pretraining.evaluate --suite=yardstick`."""
