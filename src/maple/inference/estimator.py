"""scikit-learn's side of an estimator, or the little of it that is needed where scikit-learn is not installed."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from maple.config import SECTIONS
from maple.errors import ConfigError, MapleError, one_of


class PlainEstimator:
    """Parameters by name, as scikit-learn's BaseEstimator has them."""

    @classmethod
    def _names(cls) -> list[str]:
        return list(inspect.signature(cls).parameters)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters of the constructor with their values."""
        del deep  # no parameter is an estimator
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self, **params: Any) -> Self:
        """Change some of them.

        Raises:
            ConfigError: an unknown name.
        """
        for name, value in params.items():
            if name not in self._names():
                raise ConfigError(one_of("parameter", name, self._names()))
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        defaults = {name: parameter.default for name, parameter in inspect.signature(type(self)).parameters.items()}
        changed = [f"{name}={value!r}" for name, value in self.get_params().items() if value != defaults[name]]
        return f"{type(self).__name__}({', '.join(changed)})"


class PlainNotFittedError(Exception):
    """Stands where scikit-learn's NotFittedError would."""


class PlainClassifier:
    """Stands where scikit-learn's ClassifierMixin would."""


if TYPE_CHECKING:
    Estimator: TypeAlias = PlainEstimator
    Classifier: TypeAlias = PlainClassifier
    NotFitted: TypeAlias = PlainNotFittedError
else:
    try:
        from sklearn.base import BaseEstimator as Estimator
        from sklearn.base import ClassifierMixin as Classifier
        from sklearn.exceptions import NotFittedError as NotFitted
    except ImportError:
        Estimator, Classifier, NotFitted = PlainEstimator, PlainClassifier, PlainNotFittedError


class NotTrainedError(MapleError, NotFitted):
    """A classifier is asked before it was trained or loaded; also a NotFittedError of scikit-learn, if installed."""


def sections_of(settings: Any) -> Mapping[str, Any]:
    """The `settings` of an estimator, {section: {setting: value}}; none is an empty one.

    Raises:
        ConfigError: of another form, or with a seed, which is a parameter of its own.
    """
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise ConfigError(f'settings is {settings!r:.80}; give sections, as in {{"train": {{"optimizer": "adamw"}}}}')
    if "seed" in settings:
        raise ConfigError(f"settings holds the seed {settings['seed']!r}; give it as seed={settings['seed']!r}")
    for section, values in settings.items():
        if section in SECTIONS and not isinstance(values, Mapping):
            raise ConfigError(f"settings has {section} = {values!r:.80}; give a section, {{{section!r}: {{...}}}}")
    return settings
