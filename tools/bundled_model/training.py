"""The training loop: bf16 compute with f32 master weights, Muon for the matrices and Adam for the rest."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tools.bundled_model import copying, corpus, tokenizer
from tools.bundled_model.model import Network, Shape, export
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """What a run does. The same plan gives the same data in the same order."""

    seed: int = 0
    batch: int = 18
    micro_batches: int = 3
    matrix_rate: float = 0.01
    other_rate: float = 0.004
    schedule: tuple[tuple[int, float], ...] = (
        (0, 0.017),
        (59, 1.0),
        (1950, 1.0),
        (2350, 0.619),
        (3239, 0.296),
        (4300, 0.02),
    )
    """(step, learning rate multiplier), linear in between; training ends with the last."""
    prompt_weight: float = 0.1
    """Loss weight of the tokens that the model does not have to write, up to `prompt_steps`; the answers weigh 1."""
    prompt_steps: int = 3239
    """From this step on only the answers count: by then the rest of the loss is the noise of made-up values."""
    average: float = 0.995
    """Decay of the running mean of the weights, which is what is exported."""

    @property
    def steps(self) -> int:
        """The number of steps of a whole run."""
        return self.schedule[-1][0]

    def rate(self, step: int) -> float:
        """The learning rate multiplier of `step`."""
        for (start, first), (end, last) in itertools.pairwise(self.schedule):
            if step <= end:
                return first + (last - first) * (step - start) / (end - start)
        return self.schedule[-1][1]


@dataclass(frozen=True)
class Batch:
    """One padded micro-batch: ids and labels [B, T] int64, weights [B, T] f32."""

    ids: Tensor
    labels: Tensor
    weights: Tensor
    num_tokens: int


class Batches:
    """Batches of the plan from `first_step` on, cut into micro-batches of similar lengths."""

    def __init__(self, plan: Plan, bpe: Tokenizer, first_step: int) -> None:
        self.plan = plan
        self.bpe = bpe
        self.first_step = first_step
        self.pad, self.start, self.end, self.role = (
            int(bpe.token_to_id(token) or 0)
            for token in (tokenizer.END_OF_TEXT, tokenizer.IM_START, tokenizer.IM_END, "assistant")
        )
        self.source = corpus.training(plan.seed, first_step * plan.batch)

    def __iter__(self) -> Iterator[list[Batch]]:
        for step in itertools.count(self.first_step):
            weight = self.plan.prompt_weight if step < self.plan.prompt_steps else 0.0
            examples = [self._example(next(self.source).text(), weight) for _ in range(self.plan.batch)]
            examples.sort(key=lambda example: len(example[0]))
            size = self.plan.batch // self.plan.micro_batches
            yield [self._padded(examples[place : place + size]) for place in range(0, len(examples), size)]

    def _example(self, text: str, prompt_weight: float) -> tuple[list[int], list[float]]:
        """Ids, and per id the weight of predicting it: 1 from the start of an answer to its end marker.

        `prompt_weight` is that of all others.
        """
        ids = self.bpe.encode(text.removesuffix("\n")).ids
        weights = [prompt_weight] * len(ids)
        inside = False
        for place in range(3, len(ids)):
            inside = inside or (ids[place - 3] == self.start and ids[place - 2] == self.role)
            if inside:
                weights[place] = 1.0
                inside = ids[place] != self.end
        return ids, weights

    def _padded(self, examples: list[tuple[list[int], list[float]]]) -> Batch:
        length = max(len(ids) for ids, _ in examples)
        ids = torch.full((len(examples), length), self.pad)
        weights = torch.zeros(len(examples), length)
        for row, (tokens, importance) in enumerate(examples):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            weights[row, : len(tokens)] = torch.tensor(importance)
        return Batch(ids[:, :-1], ids[:, 1:], weights[:, 1:], sum(len(tokens) for tokens, _ in examples))


class Optimizer:
    """Muon for weight matrices of the layers, Adam for the embedding and the norms; owns the f32 weights."""

    def __init__(self, network: Network, plan: Plan) -> None:
        self.plan = plan
        self.parameters = dict(network.named_parameters())
        self.master = {name: parameter.detach().float().clone() for name, parameter in self.parameters.items()}
        self.average = {name: weight.clone() for name, weight in self.master.items()}
        self.momentum = {name: torch.zeros_like(weight) for name, weight in self.master.items()}
        self.square = {name: torch.zeros_like(w) for name, w in self.master.items() if not _is_matrix(name, w)}

    @torch.no_grad()
    def step(self, index: int, scale: float) -> None:
        """Applies the gradients, each divided by `scale`, at step `index`."""
        rate = self.plan.rate(index)
        keep = min(self.plan.average, (index + 1) / (index + 10))
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            gradient = parameter.grad.float() / scale
            weight, momentum = self.master[name], self.momentum[name]
            if name in self.square:
                momentum.lerp_(gradient, 0.1)
                self.square[name].lerp_(gradient.square(), 0.05)
                corrected = momentum / (1 - 0.9 ** (index + 1))
                spread = (self.square[name] / (1 - 0.95 ** (index + 1))).sqrt() + 1e-10
                # The last gain starts at a tenth of the others' size (see copying).
                other_rate = self.plan.other_rate * (0.1 if name == "norm" else 1.0)
                weight.sub_(corrected / spread, alpha=rate * other_rate)
            else:
                momentum.lerp_(gradient, 0.05)
                update = _orthogonal(gradient.lerp(momentum, 0.95))
                stretch = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.sub_(update, alpha=rate * self.plan.matrix_rate * stretch)
            self.average[name].lerp_(weight, 1 - keep)
            parameter.copy_(weight)
            parameter.grad = None

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a resumed run needs."""
        return {"master": self.master, "average": self.average, "momentum": self.momentum, "square": self.square}

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Continues from `state`."""
        self.master, self.average = state["master"], state["average"]
        self.momentum, self.square = state["momentum"], state["square"]
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.master[name])


def _is_matrix(name: str, weight: Tensor) -> bool:
    return weight.ndim == 2 and name != "embed"


def _orthogonal(update: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, by five Newton-Schulz steps in bf16 (Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = update.shape[0] <= update.shape[1]
    x: Tensor = (update if wide else update.T).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x if wide else x.T).float()


def train(plan: Plan, shape: Shape, directory: Path, minutes: float, log_every: int = 20) -> None:
    """Trains (or resumes) in `directory`: state.pt every few minutes, and the exported model in `directory`/model.

    Stops after `minutes` of wall time at the latest; calling it again continues.
    """
    model_path, state_path = directory / "model", directory / "state.pt"
    model_path.mkdir(parents=True, exist_ok=True)
    if not (model_path / "tokenizer.json").exists():
        tokenizer.save(tokenizer.train(plan.seed), model_path)
        (model_path / "tokenizer_config.json").write_text(json.dumps(tokenizer.config(), indent=2) + "\n")
    bpe = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    torch.manual_seed(plan.seed)
    network = Network(shape)
    copying.install(network)
    optimizer = Optimizer(network, plan)
    network.bfloat16()
    first, tokens, seconds = 0, 0, 0.0
    if state_path.exists():
        saved = torch.load(state_path)
        optimizer.load(saved["optimizer"])
        first, tokens, seconds = saved["step"], saved["tokens"], saved["seconds"]
    began = mark = time.monotonic()
    losses: list[float] = []
    for step, batches in zip(range(first, plan.steps), Batches(plan, bpe, first), strict=False):
        losses.append(_accumulate(network, optimizer, batches, step))
        tokens += sum(batch.num_tokens for batch in batches)
        now = time.monotonic()
        if (step + 1) % log_every == 0:
            elapsed = seconds + now - began
            print(
                f"step {step + 1} loss {sum(losses) / len(losses):.4f} tokens {tokens / 1e6:.2f}M "
                f"minutes {elapsed / 60:.1f} tokens/s {tokens / elapsed:.0f}",
                flush=True,
            )
            losses.clear()
        stop = now - began > 60 * minutes or step + 1 == plan.steps
        if stop or now - mark > 120:
            mark = now
            spent = {"step": step + 1, "tokens": tokens, "seconds": seconds + now - began}
            torch.save({"optimizer": optimizer.state(), **spent}, state_path)
            export(optimizer.average, shape, model_path)
            (directory / "progress.json").write_text(json.dumps(spent) + "\n")
        if stop:
            return


def _accumulate(network: Network, optimizer: Optimizer, batches: list[Batch], step: int) -> float:
    """One optimizer step; returns the mean weighted loss."""
    total = 0.0
    for batch in batches:
        loss = network.loss(batch.ids, batch.labels, batch.weights)
        torch.autograd.backward(loss)
        total += loss.item()
    scale = sum(float(batch.weights.sum()) for batch in batches)
    optimizer.step(step, scale)
    return total / scale
