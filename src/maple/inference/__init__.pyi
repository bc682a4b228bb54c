from .image_sources import ImageSource as ImageSource
from .image_sources import find_images as find_images
from .predictor import Prediction as Prediction
from .predictor import Predictor as Predictor
from .predictor import UnreadableImage as UnreadableImage
from .predictor import load_predictor as load_predictor
from .torch_predictor import TorchPredictor as TorchPredictor
