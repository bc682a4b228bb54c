"""The model, its losses and its training run."""

import json
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maple.data.emoji.scenes import EmojiArchive
from small_clip.captions import CAPTIONS, CONTEXT, caption_tables
from small_clip.exam import Exam
from small_clip.scenes import SEEN_STYLES, Scenes

VOCABULARY = 49408
FULL_CONTEXT = 77
WIDENED = 0.2  # share of drawings in another manner, in the later part of the training
BANK_FROM = 400  # steps before images are also held against the remembered captions of all concepts

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
    """Both directions of CLIP's loss; two images per caption.

    Args:
        image: (2 n, embed) unit vectors: the n concepts once, and once more.
        text: (n, embed) unit vectors.
        scale: the temperature's inverse.
    """
    rows = torch.arange(len(text))
    logits = scale * text @ image.T
    to_text = F.cross_entropy(logits.T, rows.repeat(2))
    chances = logits.log_softmax(1)
    to_image = -(chances[rows, rows] + chances[rows, rows + len(text)]).mean() / 2
    return (to_text + to_image) / 2


def remembered_loss(image: Tensor, scale: Tensor, bank: Tensor, concepts: Tensor) -> Tensor:
    """Images (2 n, embed) against the remembered captions of all concepts, `bank` (concepts, embed).

    The right caption is a remembered one too. If it were fresh, the towers could distinguish it from the others by its
    age alone, and they did: they drift together, all captions of a batch become alike, and nothing is learned.
    """
    return F.cross_entropy(scale * image @ bank.T, concepts.repeat(2))


class Trainer:
    """The training run: everything that a checkpoint holds."""

    def __init__(self, run: Path, seconds: float, batch: int, peak: float) -> None:
        self.run, self.budget, self.batch, self.peak = run, seconds, batch, peak
        self.archive = EmojiArchive()
        self.concepts = self.archive.concepts()
        self.tokens, self.rows = caption_tables(self.concepts)
        self.lengths = (self.tokens == len(self.rows) - 1).float().argmax(-1) + 1
        torch.manual_seed(0)
        self.generator = torch.Generator().manual_seed(0)
        self.scenes = Scenes(self.archive, self.concepts, self.generator)
        self.model = build_model(len(self.rows), CONTEXT).train()
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), eps=1e-6)
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.bank = F.normalize(torch.randn(len(self.concepts), EMBED), dim=1)
        self.step, self.seconds = 0, 0.0
        self.order = torch.empty(0, dtype=torch.long)
        self.exam = Exam(self.archive, ("food", "animals"), scenes=1)
        self._resume()

    def _resume(self) -> None:
        path = self.run / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            self.average, self.bank = state["average"], state["bank"]
            self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Write the checkpoint; a reader sees the old one or the new one."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "average": self.average,
            "bank": self.bank,
            "step": self.step,
            "seconds": self.seconds,
            "rows": self.rows,
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
        concepts, images = self.draw(hardest, widening)
        caption = torch.randint(CAPTIONS, (len(concepts),), generator=self.generator)
        tokens = self.tokens[concepts, caption][:, : int(self.lengths[concepts, caption].max())]
        image = F.normalize(self.model.visual(images), dim=1)
        text = F.normalize(self.text(tokens), dim=1)
        loss = contrastive_loss(image, text, self.model.logit_scale.exp())
        if self.step >= BANK_FROM:
            loss = loss + 0.5 * remembered_loss(image, self.model.logit_scale.detach().exp(), self.bank, concepts)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, 4.6052)
            self.bank[concepts] = text.detach()
            keep = min(0.9985, (1 + self.step) / (10 + self.step))
            state = self.model.state_dict()
            torch._foreach_lerp_(list(self.average.values()), [state[name] for name in self.average], 1 - keep)
        self.step += 1
        return loss.item()

    def draw(self, hardest: float, widening: float) -> tuple[Tensor, Tensor]:
        """The next concepts (n,) of the running permutation, and two images of each in different styles."""
        count = self.batch // 2
        if len(self.order) < count:
            self.order = torch.randperm(len(self.concepts), generator=self.generator)
        concepts, self.order = self.order[:count], self.order[count:]
        first = torch.randint(len(SEEN_STYLES), (count,), generator=self.generator)
        second = (first + torch.randint(1, len(SEEN_STYLES), (count,), generator=self.generator)) % len(SEEN_STYLES)
        return concepts, self.scenes.batch(torch.cat([first, second]), concepts.repeat(2), hardest, widening)

    def text(self, tokens: Tensor) -> Tensor:
        """The text tower on tokens of any length up to CONTEXT."""
        model, length = self.model, tokens.shape[1]
        states = model.token_embedding(tokens) + model.positional_embedding[:length]
        states = model.transformer(states, attn_mask=model.attn_mask[:length, :length])
        states = model.ln_final(states)
        return states[torch.arange(len(tokens)), tokens.argmax(-1)] @ model.text_projection

    def averaged(self) -> nn.Module:
        """A model with the averaged weights."""
        model = build_model(len(self.rows), CONTEXT).eval()
        model.load_state_dict(self.average)
        return model

    def reduced(self, texts: list[str]) -> Tensor:
        """Tokens of `texts` in the reduced vocabulary; unknown words become its first row."""
        tokens = open_clip.SimpleTokenizer(context_length=CONTEXT)(texts)
        places = torch.searchsorted(self.rows, tokens).clamp_max(len(self.rows) - 1)
        return torch.where(self.rows[places] == tokens, places, 0)
