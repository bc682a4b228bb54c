"""Whether torch.compile pays: MaPLe's image tower, forward and backward, as it is and compiled, in alternation.

Usage: python -m benchmarks.compiled [--precision fp32|bf16] [--batch 4] [--rounds 5] [--output FOLDER]
Prints the seconds of compilation, and after how many steps these are saved, if ever.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import alternate, class_names, write
from benchmarks.floors import noise_images
from maple.clip import LayerEdit, load_clip
from maple.methods.maple import MaPLe, MaPLeSettings
from maple.prompts import encode_image


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="ViT-B-16")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    clip = load_clip(arguments.backbone, "random:0", precision=arguments.precision)
    depth = min(9, clip.text.depth, clip.image.depth)
    method = MaPLe(MaPLeSettings(prompt_depth=depth), clip, class_names(10), torch.Generator().manual_seed(0))
    images = noise_images(clip, arguments.batch)

    def encode(edits: list[LayerEdit]) -> Tensor:
        return encode_image(clip.image, images, edits)

    compiled = torch.compile(encode, dynamic=False)

    def run(way: object) -> Tensor:
        features: Tensor = way(method.vision_edits())  # type: ignore[operator]
        features.float().sum().backward()
        method.zero_grad(set_to_none=True)
        return features.detach().float()

    start = time.perf_counter()
    features = run(compiled)
    cost = time.perf_counter() - start
    difference = float((features - run(encode)).abs().max() / features.abs().max())
    timed = alternate({"compiled": lambda: run(compiled), "as it is": lambda: run(encode)}, arguments.rounds)
    gain = timed["seconds"]["as it is"] - timed["seconds"]["compiled"]
    paid = f"paid after {cost / gain:.0f} steps" if gain > 0 else "never paid"
    print(
        f"{arguments.precision}: as it is {timed['seconds']['as it is']:.3f} s, compiled "
        f"{timed['seconds']['compiled']:.3f} s ({timed['ratio']['as it is']:.2f}x), compiling {cost:.0f} s, {paid}; "
        f"largest difference {difference:.1e}"
    )
    results = {**timed, "compiling": cost, "largest_difference": difference}
    write(arguments.output, f"compiled-{arguments.precision}", vars(arguments), results)


if __name__ == "__main__":
    main()
