"""Serves `Colours` on a free port, which it prints; the limits come as JSON."""

import json
import sys

from serve_helpers import Colours

from maple.serve import listen
from maple.serve.api import create_app
from maple.serve.examples import TrainedDataset, find_examples
from maple.serve.limits import Limits

if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    answerer = Colours(seconds=values.pop("seconds", 0.0), fails=False)
    token = values.pop("token", None)
    limits = Limits(**values)
    listening = listen.bind("127.0.0.1", 0)
    app = create_app(
        answerer,
        limits,
        token=token,
        hosts=listen.allowed_hosts(listening, "127.0.0.1", []),
        find_examples=lambda: find_examples(TrainedDataset("emoji-food/twemoji"), answerer.trained_names),
    )
    port = listening.getsockname()[1]
    listen.run(app, listening, limits, started=lambda: sys.stdout.write(f"{port}\n") and sys.stdout.flush())
