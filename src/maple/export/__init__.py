"""Trained methods in the formats of others: ONNX, TorchScript, open_clip, transformers."""

from maple.export.write import FORMATS, Written, export_run

__all__ = ["FORMATS", "Written", "export_run"]
