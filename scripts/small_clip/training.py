"""The model, its losses and its training run."""

import json
import math
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from small_clip.captions import CAPTIONS, CONTEXT, caption_tables
from small_clip.corpus import Corpus
from small_clip.exam import Exam
from small_clip.scenes import Scenes

VOCABULARY = 49408
FULL_CONTEXT = 77
WIDENED = 0.3  # share of drawings in another manner, in the later part of the training
FOREIGN = 0.5  # share of the steps in which tokens without meaning enter the blocks
EMOJI_WEIGHT = 3.0  # the least weight of a name that an emoji has: few families draw it

VISION = {"image_size": 64, "layers": 6, "width": 192, "patch_size": 16, "head_width": 64}
TEXT = {"context_length": FULL_CONTEXT, "vocab_size": VOCABULARY, "width": 128, "heads": 2, "layers": 4}
EMBED = 128


def build_model(vocabulary: int, context: int) -> nn.Module:
    """The small CLIP with random weights."""
    return open_clip.CLIP(
        embed_dim=EMBED,
        vision_cfg=dict(VISION),
        text_cfg={**TEXT, "context_length": context, "vocab_size": vocabulary},
        quick_gelu=True,
    )


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss in both directions on unit vectors, both (n, embed)."""
    rows = torch.arange(len(text), device=text.device)
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2


class ForeignTokens:
    """Tokens without meaning, which are written into the first blocks of a tower, the same for all rows of a batch.

    A small CLIP that has never met such tokens loses much of its accuracy to untrained prompts; large ones do not.
    """

    def __init__(self, generator: torch.Generator, width: int, layers: int) -> None:
        def draw(low: float, high: float) -> float:
            return low + (high - low) * torch.rand((), generator=generator, device=generator.device).item()

        self.count, depth = int(draw(1, 5)), int(draw(1, layers + 1))
        spread = math.exp(draw(math.log(0.02), math.log(0.5)))
        shape = depth, self.count, width
        self.rows = spread * torch.randn(shape, generator=generator, device=generator.device)

    def write(self, states: Tensor, layer: int, start: int) -> Tensor:
        """States [N, n, H] with the tokens of this block at the rows from `start` on."""
        if layer >= len(self.rows):
            return states
        tokens = self.rows[layer].to(states.dtype).expand(len(states), -1, -1)
        return torch.cat([states[:, :start], tokens, states[:, start + self.count :]], dim=1)


def image_features(visual: Any, images: Tensor, foreign: ForeignTokens | None) -> Tensor:
    """What `visual` computes, with foreign tokens after the patches: [N, embed].

    The towers of `maple.clip` insert prompts too, but compute no gradients of their weights.
    """
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    first = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    states = torch.cat([first, patches], dim=1) + visual.positional_embedding
    rows = states.shape[1]
    if foreign is not None:
        states = torch.cat([states, states[:, : foreign.count]], dim=1)  # room, which is overwritten at once
        states = foreign.write(states, 0, rows)
    states = visual.ln_pre(states)
    for layer, block in enumerate(visual.transformer.resblocks):
        states = states if foreign is None or layer == 0 else foreign.write(states, layer, rows)
        states = block(states)
    return visual.ln_post(states[:, 0]) @ visual.proj


def text_features(model: Any, tokens: Tensor, foreign: ForeignTokens | None) -> Tensor:
    """What the text tower computes of tokens of any length up to CONTEXT, with foreign ones for the first words."""
    length = tokens.shape[1]
    states = model.token_embedding(tokens)
    if foreign is not None:
        states = foreign.write(states, 0, 1)
    states = states + model.positional_embedding[:length]
    for layer, block in enumerate(model.transformer.resblocks):
        states = states if foreign is None or layer == 0 else foreign.write(states, layer, 1)
        states = block(states, attn_mask=model.attn_mask[:length, :length])
    states = model.ln_final(states)
    return states[torch.arange(len(tokens)), tokens.argmax(-1)] @ model.text_projection


class Trainer:
    """The training run: everything that a checkpoint holds."""

    def __init__(
        self,
        run: Path,
        corpus: Corpus,
        exam: Exam,
        *,
        seconds: float,
        batch: int,
        peak: float,
        device: str,
        initial: Path | None,
    ) -> None:
        self.run, self.budget, self.batch, self.peak, self.device = run, seconds, batch, peak, device
        self.corpus, self.exam = corpus, exam
        self.tokens, self.rows = caption_tables(corpus.names, corpus.keywords)
        self._group_drawings()
        self.lengths = (self.tokens == len(self.rows) - 1).float().argmax(-1) + 1
        torch.manual_seed(0)
        self.generator = torch.Generator(device).manual_seed(0)
        self.scenes = Scenes(corpus, self.generator)
        self.model = build_model(len(self.rows), CONTEXT).to(device).train()
        self.tokens, self.lengths = self.tokens.to(device), self.lengths.to(device)
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        self.proxies = nn.Parameter(0.1 * torch.randn(len(corpus.names), EMBED, device=device))
        groups = [
            {"params": decayed, "weight_decay": 0.1},
            {"params": [*others, self.proxies], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), eps=1e-6)
        if initial is not None:
            self._load_weights(initial)
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        self._resume()

    def _load_weights(self, folder: Path) -> None:
        """Start from an exported folder; words that it does not know keep their random vectors."""
        state = load_file(folder / "open_clip_model.safetensors", device=self.device)
        known = {name: value.float() for name, value in state.items()}
        embedding = known["token_embedding.weight"][self.rows.to(self.device)]
        trained = embedding.abs().amax(1, keepdim=True) > 0
        known["token_embedding.weight"] = torch.where(trained, embedding, self.model.token_embedding.weight.detach())
        known["positional_embedding"] = known["positional_embedding"][:CONTEXT]
        known["logit_scale"] = self.model.logit_scale.detach()  # low again, for the new proxies
        self.model.load_state_dict(known)

    def _resume(self) -> None:
        path = self.run / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, weights_only=True, map_location=self.device)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"].cpu())
            self.proxies.data.copy_(state["proxies"])
            self.average = state["average"]
            self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Write the checkpoint; a reader sees the old one or the new one."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "average": self.average,
            "proxies": self.proxies.detach(),
            "step": self.step,
            "seconds": self.seconds,
            "rows": self.rows,
            "batch": self.batch,
        }
        torch.save(state, self.run / "checkpoint.tmp")
        (self.run / "checkpoint.tmp").replace(self.run / "checkpoint.pt")

    def train(self) -> None:
        """Train until the time is used up, logging every 50 steps and saving every three minutes."""
        log = self.run / "training_log.jsonl"
        losses: list[float] = []
        saved = examined = self.seconds
        while self.seconds < self.budget:
            started = time.perf_counter()
            losses.append(self.one_step())
            self.seconds += time.perf_counter() - started
            if self.step % 50 == 0:
                record = {
                    "step": self.step,
                    "seconds": round(self.seconds),
                    "loss": round(sum(losses) / len(losses), 4),
                }
                record["logit_scale"] = round(float(self.model.logit_scale.detach().exp()), 2)
                if self.seconds - examined > 240:
                    examined = self.seconds
                    record["zero_shot"] = self.exam.measure(self.averaged(), self.reduced)
                with log.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(record, flush=True)
                losses.clear()
            if self.seconds - saved > 180:
                saved = self.seconds
                self.save()
        self.save()

    def one_step(self) -> float:
        """One optimiser step; returns the loss."""
        progress = self.seconds / self.budget
        warm = min(1.0, (self.step + 1) / 100)
        rate = warm * self.peak * (0.01 + 0.99 * 0.5 * (1 + torch.cos(torch.tensor(progress * torch.pi)).item()))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        hardest = min(0.5, 0.1 + max(0.0, progress - 0.25))
        widening = 0.0 if progress < 0.4 else WIDENED
        names, images = self.draw(hardest, widening)
        caption = torch.randint(CAPTIONS, (len(names),), generator=self.generator, device=self.device)
        if foreign := self.scenes.uniform(0, 1, 1).item() < FOREIGN:
            caption.zero_()  # in the plain template, whose first four words are not those of the name
        tokens = self.tokens[names, caption][:, : int(self.lengths[names, caption].max())]
        loss = self.losses(images, tokens, names, foreign=foreign)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, 4.6052)
            keep = min(0.9985, (1 + self.step) / (10 + self.step))
            state = self.model.state_dict()
            torch._foreach_lerp_(list(self.average.values()), [state[name] for name in self.average], 1 - keep)
        self.step += 1
        return loss.item()

    def losses(self, images: Tensor, tokens: Tensor, names: Tensor, *, foreign: bool) -> Tensor:
        """The sum of CLIP's loss and of both towers' classification among all names.

        Each name has a learned vector, its proxy (Movshovitz-Attias et al., ICCV 2017). A batch holds a fiftieth of the
        names, so CLIP's loss alone rarely sees two that are alike. The captions come near their proxies within a few
        hundred steps, long before the images do.
        """
        kind = self.generator.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            in_images, in_text = (
                ForeignTokens(self.generator, sizes["width"], sizes["layers"]) if foreign else None
                for sizes in (VISION, TEXT)
            )
            image = image_features(self.model.visual, images, in_images)
            text = text_features(self.model, tokens, in_text)
        image, text = F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)
        scale = self.model.logit_scale.exp()
        proxies = F.normalize(self.proxies, dim=1)
        return (
            contrastive_loss(image, text, scale)
            + F.cross_entropy(scale * image @ proxies.T, names)
            + F.cross_entropy(scale * text @ proxies.T, names)
        )

    def _group_drawings(self) -> None:
        """Sort the drawings by name, and weigh each name by the number of families that draw it."""
        names, families = (torch.from_numpy(self.corpus.drawings[:, column]) for column in (0, 1))
        counts = torch.bincount(names, minlength=len(self.corpus.names))
        pairs = torch.unique(torch.stack([names, families]), dim=1)
        weights = torch.bincount(pairs[0], minlength=len(self.corpus.names)).float()
        emoji = torch.tensor([family.startswith("emoji-") for family in self.corpus.families])
        drawn_as_emoji = torch.unique(pairs[0][emoji[pairs[1]]])
        weights[drawn_as_emoji] = weights[drawn_as_emoji].clamp_min(EMOJI_WEIGHT)
        places = names.argsort(stable=True), counts, counts.cumsum(0) - counts, weights
        self.by_name, self.counts, self.first, self.weights = (each.to(self.device) for each in places)

    def draw(self, hardest: float, widening: float) -> tuple[Tensor, Tensor]:
        """Different random names (n,), and an image of each."""
        names = torch.multinomial(self.weights, self.batch, generator=self.generator)
        chances = self.scenes.uniform(0, 1, len(names))
        drawings = self.by_name[self.first[names] + (chances * self.counts[names]).long()]
        return names, self.scenes.batch(drawings, hardest, widening)

    def averaged(self) -> nn.Module:
        """A model with the averaged weights."""
        model = build_model(len(self.rows), CONTEXT).eval()
        model.load_state_dict(self.average)  # on the CPU, where it is measured
        return model

    def reduced(self, texts: list[str]) -> Tensor:
        """Tokens of `texts` in the reduced vocabulary; unknown words become its first row."""
        tokens = open_clip.SimpleTokenizer(context_length=CONTEXT)(texts)
        places = torch.searchsorted(self.rows, tokens).clamp_max(len(self.rows) - 1)
        return torch.where(self.rows[places] == tokens, places, 0)
