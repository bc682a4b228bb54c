"""Load any predictor by its path: a run on PyTorch, or an export on onnxruntime."""

from pathlib import Path

from maple.inference.manifest import is_export
from maple.inference.onnx_predictor import OnnxPredictor
from maple.inference.predictor import Predictor


def load_predictor(source: str | Path, *, zero_shot: bool = False, device: str | None = None) -> Predictor:
    """Load a finished run's folder, a prompts file, `hf-hub:OWNER/NAME`, or the folder of an export to ONNX.

    PyTorch is imported for the first three only.

    Args:
        zero_shot: classify with the frozen CLIP too.
        device: cpu, cuda ...; by default a GPU if there is one.

    Raises:
        MapleError: the path is none of these, is damaged, or the device does not exist.

    Example:
        >>> predictor = load_predictor("exported", device="cpu")
        >>> for prediction in predictor.stream(find_images(["photos"])):
        ...     print(prediction.source, prediction.best[0].name)
    """
    if is_export(source):
        return OnnxPredictor.load(source, zero_shot=zero_shot, device=device)
    from maple.inference.torch_predictor import TorchPredictor

    return TorchPredictor.load(source, zero_shot=zero_shot, device=device)
