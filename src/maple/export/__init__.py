"""Write trained methods in the formats of other libraries: ONNX, TorchScript, open_clip, transformers."""

from maple.export.export_run import FORMATS, ExportResult, export_run

__all__ = ["FORMATS", "ExportResult", "export_run"]
