"""Serves `Colours` on a free port, which it prints; the limits come as JSON."""

import json
import sys

from serve_helpers import Colours

from maple.data import load_dataset
from maple.serve import listen
from maple.serve.api import create_app
from maple.serve.examples import find_examples
from maple.serve.limits import Limits
from maple.serve.middleware import LOOPBACK

if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    predictor = Colours(seconds=values.pop("seconds", 0.0), fails=False)
    token = values.pop("token", None)
    limits = Limits(**values)
    listening = listen.bind("127.0.0.1", 0)
    app = create_app(
        predictor,
        limits,
        token=token,
        hosts=LOOPBACK,
        find_examples=lambda: find_examples(load_dataset("emoji-food/twemoji", None), predictor.trained_names),
    )
    listening.listen()
    sys.stdout.write(f"{listening.getsockname()[1]}\n")
    sys.stdout.flush()
    listen.run(app, listening, limits)
