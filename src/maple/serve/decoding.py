"""Decode images in processes of their own, each within a time limit.

A small file can keep a decoder busy for minutes: a JPEG of many scans, a TIFF of many strips, a PNG of empty chunks.
The decoders are C code and loops of Pillow's, which no thread can interrupt, but a process can be ended.
"""

import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import IO, Any

from maple.data.images.eval_transform import EvalView, Floats
from maple.data.images.reading import read_image
from maple.errors import ImageError

# Not `multiprocessing`, which would import the main module of the program again; a script that calls `create_app`
# without `if __name__ == "__main__"` would start a second server.
_COMMAND = "import sys; sys.path[:] = {path!r}; from maple.serve.decoding import main; main()"


class Decoder:
    """A process that decodes one image after the other; started when the first one arrives, and again after it ended.

    Args:
        preprocess: applied to each image, in the process.
        pixels: of the largest image.
        seconds: that an image may take.
        draft: whether large JPEGs are decoded at a part of their size (`EvalView.least_side`).
    """

    def __init__(self, preprocess: EvalView, pixels: int, seconds: float, *, draft: bool = False) -> None:
        self._seconds = seconds
        self._arguments = (preprocess, pixels, seconds, preprocess.least_side if draft else None)
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, content: bytes) -> Floats:
        """Return the preprocessed image [3, R, R]. Not for several threads at once.

        Raises:
            ImageError: it cannot be read, or its decoder crashes.
            TimeoutError: it takes longer than allowed; the process has ended.
        """
        if self._process is None or self._process.poll() is not None:
            self._start()
        began = time.monotonic()
        try:
            reply = self._ask(content)
        except (EOFError, OSError, pickle.UnpicklingError):
            status = self.close()
            if time.monotonic() - began < self._seconds:
                raise ImageError(
                    f"its decoder failed (exit status {status}); save it again, or as another format"
                ) from None
            limit = f"{self._seconds:g} seconds"
            raise TimeoutError(f"takes more than {limit} to decode; save it again, or scale it down") from None
        if isinstance(reply, str):
            raise ImageError(reply)
        view: Floats = reply
        return view

    def kill(self) -> None:
        """End the process; for any thread. An image that it decodes fails."""
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> int | None:
        """End the process, and return its exit status; None if there is none."""
        self.kill()
        process, self._process = self._process, None
        if process is None:
            return None
        process.communicate()
        return process.returncode

    def _start(self) -> None:
        self.close()
        # In a session of its own, so that Ctrl-C does not reach it before it ignores it.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._ask(self._arguments)

    def _ask(self, message: Any) -> Any:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        _send(self._process.stdin, message)
        return pickle.load(self._process.stdout)


def _send(stream: IO[bytes], message: Any) -> None:
    pickle.dump(message, stream, pickle.HIGHEST_PROTOCOL)
    stream.flush()


def main() -> None:
    """The process of a `Decoder`: answer each image on the standard input by its view, or by why it cannot be read."""
    # The server receives these too. It then finishes its requests, and ends its decoders.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    images, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as devnull, suppress(EOFError, OSError, pickle.UnpicklingError):
        preprocess, pixels, seconds, least_side = pickle.load(images)
        reply: Floats | str = "started"
        while True:  # until the server ends, however it ends
            _send(replies, reply)
            content = pickle.load(images)
            # A thread in C, which ends the process even if the decoder never gives up Python's lock, and even if the
            # server has been killed meanwhile.
            faulthandler.dump_traceback_later(seconds, exit=True, file=devnull)
            try:
                reply = preprocess(read_image(content, max_pixels=pixels, least_side=least_side))
            except ImageError as error:
                reply = str(error).removeprefix("<bytes>: ")
            faulthandler.cancel_dump_traceback_later()
