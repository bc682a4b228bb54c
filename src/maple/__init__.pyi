from .checkpoint import load_prompts as load_prompts
from .checkpoint import save_prompts as save_prompts
from .clip import Backbone as Backbone
from .clip import load_clip as load_clip
from .data import load_dataset as load_dataset
from .errors import MapleError as MapleError
from .evaluation import evaluate as evaluate
from .fitting import FitResult as FitResult
from .fitting import fit as fit
from .fitting import fit_candidates as fit_candidates
from .fitting import fit_settings as fit_settings
from .inference.classifier import PromptClassifier as PromptClassifier
from .methods import METHODS as METHODS
from .methods import Method as Method
from .methods import build_method as build_method

__version__: str
__all__: list[str]
