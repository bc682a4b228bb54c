"""Pretrain the small CLIP of the package on drawings of emoji and icons, and export it in open_clip's format.

    python scripts/pretrain_small_clip.py prepare --work DIR
    python scripts/pretrain_small_clip.py train --work DIR --run DIR --minutes 90
    python scripts/pretrain_small_clip.py export --work DIR --run DIR [--output src/maple/assets/small_clip]

`prepare` downloads the icon sets (npm and resvg-py are needed) and draws them, once, in a few minutes. `train` resumes
from the run's checkpoint if there is one; the schedule follows the training time, not the steps. `export` takes the
averaged weights of the last checkpoint, scatters the trained rows of the vocabulary into CLIP's 49,408, and measures
the exported folder as any user would load it.

Training scenes are composed in batches by tensor operations; the measurements use the images of the bundled data sets.
"""

import argparse
from pathlib import Path

import torch
from small_clip.corpus import Corpus, prepare
from small_clip.exam import Exam
from small_clip.export import export
from small_clip.training import Trainer


def main() -> None:
    """Prepare the drawings, train, or export."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("prepare", "train", "export"))
    parser.add_argument("--work", type=Path, required=True, help="folder of the icon sets and the drawings")
    parser.add_argument("--run", type=Path, help="folder of the checkpoint and the log")
    parser.add_argument("--minutes", type=float, default=90, help="training time, all resumed parts together")
    parser.add_argument("--batch", type=int, default=128, help="images per step, and captions")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda, where the towers compute in bfloat16")
    parser.add_argument("--initial", type=Path, help="exported folder whose weights a new run starts from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "src/maple/assets/small_clip")
    parser.add_argument("--remark", default="", help="an additional remark on this run for the model card")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    drawings = options.work / "drawings"
    if options.action == "prepare":
        options.work.mkdir(parents=True, exist_ok=True)
        prepare(options.work, drawings, options.threads)
        return
    if options.run is None:
        parser.error("--run is needed")
    options.run.mkdir(parents=True, exist_ok=True)
    if options.action == "train":
        exam = Exam()
        for topic in ("outdoors", "devices"):
            exam.add_icons(topic, drawings=1)
        exam.add_emoji("animals", scenes=1, difficulty=0.25)
        numbers = {"seconds": options.minutes * 60, "batch": options.batch, "peak": options.learning_rate}
        Trainer(options.run, Corpus(drawings), exam, **numbers, device=options.device, initial=options.initial).train()
    else:
        export(options.run, drawings, options.output, options.remark, has_initial=options.initial is not None)


if __name__ == "__main__":
    main()
