"""Pretrain the small CLIP of the package on emoji scenes, on a CPU, and export it in open_clip's format.

    python scripts/pretrain_small_clip.py train --run DIR --minutes 90
    python scripts/pretrain_small_clip.py export --run DIR [--output src/maple/assets/small_clip]

`train` resumes from DIR/checkpoint.pt if there is one; the schedule follows the training time, not the steps.
`export` takes the averaged weights of the last checkpoint, scatters the trained rows of the vocabulary into CLIP's
49,408, and measures the exported folder as any user would load it.

Scenes are composed in batches by tensor operations from the glyphs of three styles; the measurements use
`maple.data.emoji.scenes.render_scene`, in all five.
"""

import argparse
from pathlib import Path

import torch
from small_clip.export import export
from small_clip.training import Trainer


def main() -> None:
    """Train or export."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("train", "export"))
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoint and the log")
    parser.add_argument("--minutes", type=float, default=90, help="training time, all resumed parts together")
    parser.add_argument("--batch", type=int, default=128, help="images per step; half as many captions")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "src/maple/assets/small_clip")
    parser.add_argument("--remark", default="", help="an additional remark on this run for the model card")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    options.run.mkdir(parents=True, exist_ok=True)
    if options.action == "train":
        Trainer(options.run, options.minutes * 60, options.batch, options.learning_rate).train()
    else:
        export(options.run, options.output, options.remark)


if __name__ == "__main__":
    main()
