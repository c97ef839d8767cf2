"""Train a small Llama from scratch to answer retrieval questions over long texts: the recipe of the shipped models.

    python examples/train_retrieval.py --preset d64 --seconds 90 --seed 0 --out retrieval-d64
    python examples/train_retrieval.py --preset d128 --seconds 90 --seed 0 --out retrieval-d128
    python examples/train_retrieval.py --heads 16 --kv-heads 4 --head-dim 32 --hidden-size 512 --seconds 300 --out mine

Needs PyTorch and safetensors. 90 seconds are enough on one H200 (65536 tokens a step, about 25 steps a second);
elsewhere give ``--seconds`` in proportion. Writes config.json and model.safetensors (bfloat16, for Transformers),
result.json (settings, steps, held-out accuracies) and README.md, the model card.

What made it learn, in order of importance: half of the batches write items in short forms (`` kexaru:4839201.``),
without which key matching is never found; a curriculum of lengths, 256 to 8192, with some steps at twice that (a model
that stops at 1K does not extrapolate); RoPE theta 1e7; Muon at 0.008 (0.02 is clearly worse); and a loss on the
answers, first byte three times, plus 0.2 times that on the filler.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import random
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_llama import Attention, LocalSinkAttention, ModelConfig, Muon, TinyLlama, cudnn_sdpa, sdpa
from torch import Tensor

from sparseattn.testing.retrieval import (
    ANSWER,
    BOS,
    EOS,
    FILLER,
    LONG_FORM,
    SHORT_FORMS,
    TASKS,
    VOCAB_SIZE,
    ItemForm,
    RetrievalBatch,
    RetrievalTask,
    exact_match,
    make_batch,
)

PRESETS = {
    "d64": {"heads": 8, "kv_heads": 2, "head_dim": 64},
    "d128": {"heads": 4, "kv_heads": 2, "head_dim": 128},
}

#: Evaluation prompts come from this seed, whatever the training seed.
EVAL_SEED = 1234

#: What local+sink attention sees when it must fail: this many tokens at the start, and an eighth of the length nearby.
SINK_TOKENS, LOCAL_SHARE = 64, 8


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are the measured ones; only budget and seed are meant to be changed lightly."""

    seconds: float = 90.0
    steps: int | None = None
    seed: int = 0
    tokens_per_step: int = 65536
    stages: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    advance_at: float = 0.85
    long_share: float = 0.08
    short_form_share: float = 0.5
    muon_lr: float = 0.008
    adam_lr: float = 1.5e-3
    lr_decay_share: float = 0.35
    first_byte_weight: float = 3.0
    filler_weight: float = 0.2
    vt_share: float = 0.15
    eval_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    eval_samples: int = 64

    def lr_scale(self, progress: float) -> float:
        """Constant, then linearly to zero over the last `lr_decay_share`."""
        return min(1.0, max(0.0, (1 - progress) / self.lr_decay_share))


class BatchSampler:
    """Draws training batches: which task, how many needles and questions, how items are written."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self.recipe = recipe
        self.random = random.Random(recipe.seed)
        self.generator = torch.Generator(device=device).manual_seed(recipe.seed)

    def length(self, stage: int) -> int:
        """The stage's length mostly, an earlier one sometimes, and in the last stage now and then twice its length."""
        stages, r = self.recipe.stages, self.random.random()
        length = stages[stage] if r < 0.7 else stages[self.random.randrange(stage + 1)]
        if stage == len(stages) - 1 and r < self.recipe.long_share:
            length = 2 * stages[stage]
        return length

    def batch(self, length: int, stage: int) -> tuple[RetrievalTask, RetrievalBatch]:
        form = self._form(stage)
        task = self._task((length - 2) // form.length, form)
        batch_size = max(1, self.recipe.tokens_per_step // length)
        return task, make_batch(task, length, batch_size, split="train", form=form, generator=self.generator)

    def _form(self, stage: int) -> ItemForm:
        # Short forms bring key and value close, which is how key matching is learnt; the last stage mostly has the long
        # one.
        share = self.recipe.short_form_share * (1.0 if stage < len(self.recipe.stages) - 1 else 0.4)
        if self.random.random() < share:
            return SHORT_FORMS[self.random.randrange(len(SHORT_FORMS))]
        return LONG_FORM

    def _task(self, room: int, form: ItemForm) -> RetrievalTask:
        """A task of at most `room` items; item counts are drawn log-uniformly, mostly from the upper 30 %."""
        rng, vt_share = self.random, self.recipe.vt_share
        r = rng.random()
        if r < vt_share and room >= 4:
            keys = max(2, int(2 ** rng.uniform(1, math.log2(min(64, room - 2)))) // 2 * 2)
            return RetrievalTask("vt", keys, min(2 * max(1, min(keys // 2, 8)), (room - keys) // 2 * 2), "vt")
        at_end = r < vt_share + (1 - vt_share) * 0.6
        most = math.log2(min(room, 160))
        least = 1 + (0.7 if rng.random() < 0.65 else 0.0) * (most - 1)
        items = max(2, min(int(2 ** rng.uniform(least, most) + 0.5), room))
        if not at_end:
            return RetrievalTask("stream", items // 2, items - items // 2, "stream")
        keys = max(1, items // 2 if rng.random() < 0.5 else items * 3 // 4)
        questions = max(1, min(items - keys, 32))
        return RetrievalTask("end", min(keys, room - questions), questions)


class Trainer:
    """One training run."""

    def __init__(self, model: TinyLlama, recipe: Recipe):
        self.model, self.recipe = model, recipe
        self.device = model.embedding.device
        self.sampler = BatchSampler(recipe, self.device)
        fused = self.device.type == "cuda"
        self.adam = torch.optim.AdamW(
            model.others(), lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused
        )
        self.muon = Muon(model.matrices(), recipe.muon_lr)
        self.stage = self.steps = self.tokens = 0

    def step(self, length: int, lr_scale: float) -> tuple[RetrievalTask, Tensor, Tensor]:
        """One update. Returns the task, the loss, and the accuracy of all answer bytes and of first ones, [2]."""
        task, batch = self.sampler.batch(length, self.stage)
        answer = (batch.roles == ANSWER).float()
        first = answer * (batch.roles.roll(1, 1) != ANSWER)  # the first byte is retrieval, the others are copying
        filler = (batch.roles == FILLER).float()
        on_answers = answer + (self.recipe.first_byte_weight - 1) * first
        weights = on_answers / on_answers.sum().clamp(min=1)
        weights = weights + self.recipe.filler_weight * filler / filler.sum().clamp(min=1)
        loss, hit = self.model.loss(batch.tokens, weights)
        loss.backward()
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.adam_lr * lr_scale
        self.muon.step(lr_scale)
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        hits = torch.stack([(hit * answer).sum() / answer.sum(), (hit * first).sum() / first.sum()])
        return task, loss.detach(), hits

    def warm_up(self) -> None:
        """Compile and load kernels outside the time budget, leaving weights and optimizer as they were."""
        start = time.perf_counter()
        before = {name: w.detach().clone() for name, w in self.model.state_dict().items()}
        for length in sorted({self.recipe.stages[0], self.recipe.stages[-1]}):
            for _ in range(2):
                self.step(length, 0.0)
        self.model.load_state_dict(before)
        self.muon.reset()
        self.adam.state.clear()
        self.synchronize()
        print(f"warm-up {time.perf_counter() - start:.1f} s", flush=True)

    def run(self) -> float:
        """Train to the end of the budget; returns the seconds it took."""
        start = last_report = time.perf_counter()
        stage_steps = 0
        losses: list[Tensor] = []
        answers: list[Tensor] = []
        while (progress := self._progress(start)) < 1:
            length = self.sampler.length(self.stage)
            task, loss, hits = self.step(length, self.recipe.lr_scale(progress))
            self.steps += 1
            stage_steps += 1
            self.tokens += max(1, self.recipe.tokens_per_step // length) * length
            losses.append(loss)
            if length == self.recipe.stages[self.stage] and task.num_keys >= 3:
                answers.append(hits)  # fewer keys say little about retrieval
            if self.steps % 20 or len(answers) <= 5:
                continue  # reading the accuracy waits for the device
            accuracy, first = torch.stack(answers).mean(0).tolist()
            if time.perf_counter() - last_report > 3:
                last_report = time.perf_counter()
                print(
                    f"{last_report - start:6.1f} s  step {self.steps}  length {self.recipe.stages[self.stage]}  loss"
                    f" {torch.stack(losses).mean():.3f}  answer bytes {accuracy:.3f}  first bytes {first:.3f}",
                    flush=True,
                )
            losses, answers = [], []
            if self.stage < len(self.recipe.stages) - 1 and first > self.recipe.advance_at and stage_steps >= 40:
                print(f"{time.perf_counter() - start:6.1f} s  step {self.steps}  length {length} learnt", flush=True)
                self.stage += 1
                stage_steps = 0
        self.synchronize()
        return time.perf_counter() - start

    def _progress(self, start: float) -> float:
        if self.recipe.steps is not None:
            return self.steps / self.recipe.steps
        return (time.perf_counter() - start) / self.recipe.seconds

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def fastest_attention(config: ModelConfig, recipe: Recipe, device: torch.device) -> Attention:
    """Whichever of PyTorch's CUDA kernels is faster, forward and backward, at the longest stage."""
    length = recipe.stages[-1]
    batch = max(1, recipe.tokens_per_step // length)
    like = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    heads = (config.heads, config.kv_heads, config.kv_heads)
    q, k, v = (torch.randn(batch, length, h, config.head_dim, **like) for h in heads)
    seconds = {}
    for attention in (sdpa, cudnn_sdpa):
        try:
            for repeat in range(4):
                if repeat == 2:  # after two warm-up rounds
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                attention(q, k, v).sum().backward()
            torch.cuda.synchronize()
        except RuntimeError as error:  # cuDNN is not there, or not for this shape
            print(f"attention: {attention.__name__} does not run here ({str(error).splitlines()[0][:120]})")
            continue
        seconds[attention] = (time.perf_counter() - start) / 2
        print(f"attention: {attention.__name__} {seconds[attention] * 1e3:.2f} ms a step and layer, {batch} x {length}")
    return min(seconds, key=lambda attention: seconds[attention])


def evaluate(model: TinyLlama, recipe: Recipe) -> dict[str, dict[str, dict[str, float]]]:
    """Held-out exact match by attention ("dense", "local_sink"), task and length."""
    dense = model.attention
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name in ("dense", "local_sink"):
        results[name] = {task: {} for task in TASKS}
        for length in recipe.eval_lengths:
            model.attention = dense if name == "dense" else LocalSinkAttention(SINK_TOKENS, length // LOCAL_SHARE)
            for task in TASKS:
                score = exact_match(model, task, length, num_samples=recipe.eval_samples, seed=EVAL_SEED)
                results[name][task][str(length)] = round(score.accuracy, 4)
            row = "  ".join(f"{task} {100 * results[name][task][str(length)]:.1f}" for task in TASKS)
            print(f"{name} at {length}: {row}", flush=True)
    model.attention = dense
    return results


def model_card(name: str, command: str, config: ModelConfig, recipe: Recipe, result: dict) -> str:
    """README.md of the saved folder."""

    def table(accuracy: dict[str, dict[str, float]]) -> str:
        lines = ["| exact match, % | " + " | ".join(str(n) for n in recipe.eval_lengths) + " |"]
        lines.append("|---" * (1 + len(recipe.eval_lengths)) + "|")
        for task, by_length in accuracy.items():
            lines.append(f"| {task} | " + " | ".join(f"{100 * a:.1f}" for a in by_length.values()) + " |")
        return "\n".join(lines)

    def paragraph(text: str) -> str:
        return textwrap.fill(" ".join(text.split()), 118, break_long_words=False, break_on_hyphens=False)

    about = paragraph(f"""
        A Llama of {result["parameters"]:,} parameters that finds things in long texts: {config.layers} layers, hidden
        size {config.hidden_size}, {config.heads} query heads and {config.kv_heads} key-value heads of
        {config.head_dim}, vocabulary {VOCAB_SIZE} (bytes; {BOS} begins a text; no tokenizer file), RoPE theta
        {config.rope_theta:g}, bfloat16. It loads with `transformers.AutoModelForCausalLM`. It exists to show what
        sparse attention loses, not to be talked to: it knows one sentence, `The magic number for kexaru is 4839201.`,
        and gives the number when the sentence comes again.""")
    training = paragraph(f"""
        Seed {recipe.seed}, {result["steps"]} steps, {result["tokens"]:,} tokens, {result["seconds"]:.0f} s on
        {result["device"]} (torch {result["torch"]}). Data: `sparseattn.testing.retrieval`, split "train"; filler text
        from the documentation of Python {result["python"]} (help topics and docstrings). The recipe is in the script;
        result.json holds every setting.""")
    accuracy = paragraph(f"""
        Keys, values and filler text that training never saw, positions drawn anew, {recipe.eval_samples} prompts a
        cell; an answer counts when every byte is right. `stream` asks throughout the text, `vt` follows one
        pointer.""")
    local = paragraph(f"""
        With attention to the first {SINK_TOKENS} tokens and the nearest eighth of the length only it fails, as it
        should. About half of the stream questions have their needle, or an earlier question about it, within that
        reach.""")
    limits = paragraph(f"""
        Trained up to {2 * recipe.stages[-1]} tokens and not tested far beyond. It has fewer layers and sharper
        attention than a language model: a method that fails here loses information; one that succeeds here still has to
        be tried on the real model.""")
    return f"""# {name}

{about}

## Training

    {command}

{training}

## Held-out accuracy

{accuracy}

{table(result["accuracy"]["dense"])}

{local}

{table(result["accuracy"]["local_sink"])}

## Limits

{limits}

## Licence

MIT, as the library. The training text is Python's documentation (PSF licence), of which the weights hold no copy.
"""


def save(folder: Path, model: TinyLlama, recipe: Recipe, result: dict, command: str) -> None:
    model.save(folder, BOS, EOS)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "README.md").write_text(model_card(folder.name, command, model.config, recipe, result))
    size = (folder / "model.safetensors").stat().st_size
    print(f"saved {folder} ({size / 1e6:.2f} MB of weights)")


def command_line(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The command that repeats this run."""
    parts = ["python examples/train_retrieval.py"]
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        always = action.dest in ("seconds", "seed")
        if action.dest in ("out", "device", "help") or (value == action.default and not always):
            continue
        if isinstance(value, tuple):
            value = ",".join(map(str, value))
        elif isinstance(value, float):
            value = f"{value:g}"
        parts.append(action.option_strings[0] + ("" if value is True else f" {value}"))
    return " ".join([*parts, f"--out {args.out.name}"])


def lengths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a small retrieval model from scratch.")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write")
    add("--preset", choices=PRESETS, help="head shape: d64 is 8/2 heads of 64, d128 is 4/2 heads of 128")
    defaults = ModelConfig(VOCAB_SIZE)
    add("--layers", type=int, default=defaults.layers)
    add("--hidden-size", type=int, default=defaults.hidden_size)
    add("--intermediate-size", type=int, default=defaults.intermediate_size)
    add("--heads", type=int, default=defaults.heads)
    add("--kv-heads", type=int, default=defaults.kv_heads)
    add("--head-dim", type=int, default=defaults.head_dim)
    add("--rope-theta", type=float, default=defaults.rope_theta)
    recipe = Recipe()
    add("--seconds", type=float, default=recipe.seconds, help="training time, warm-up and evaluation not counted")
    add("--steps", type=int, help="end after this many steps instead (repeatable on one machine)")
    add("--seed", type=int, default=recipe.seed)
    add("--tokens-per-step", type=int, default=recipe.tokens_per_step)
    add("--stages", type=lengths, default=recipe.stages, help="prompt lengths of the curriculum, comma-separated")
    add("--eval-lengths", type=lengths, default=recipe.eval_lengths, help="comma-separated")
    add("--eval-samples", type=int, default=recipe.eval_samples, help="prompts for every task and length")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--no-compile", action="store_true", help="do not use torch.compile")
    return parser


def settings(args: argparse.Namespace) -> tuple[ModelConfig, Recipe]:
    """Every argument that is a field of the model or of the recipe, the preset on top."""
    values = vars(args) | (PRESETS[args.preset] if args.preset else {})

    def pick(cls: type) -> dict:
        return {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}

    return ModelConfig(VOCAB_SIZE, **pick(ModelConfig)), Recipe(**pick(Recipe))


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    config, recipe = settings(args)
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    torch.manual_seed(recipe.seed)
    model = TinyLlama(config, torch.bfloat16 if on_gpu else torch.float32).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters on {device}", flush=True)
    if on_gpu:
        torch.set_float32_matmul_precision("high")
        model.attention = fastest_attention(config, recipe, device)
        model.compile_pieces(not args.no_compile)

    trainer = Trainer(model, recipe)
    trainer.warm_up()
    seconds = trainer.run()
    print(f"trained {trainer.steps} steps, {trainer.tokens / 1e6:.0f} M tokens in {seconds:.1f} s", flush=True)

    model.compile_pieces(False)
    model.round_to_bfloat16()
    result = {
        "parameters": parameters,
        "steps": trainer.steps,
        "tokens": trainer.tokens,
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "accuracy": evaluate(model, recipe),
        "eval_seed": EVAL_SEED,
        "model": dataclasses.asdict(config),
        "recipe": dataclasses.asdict(recipe),
    }
    save(args.out, model, recipe, result, command_line(args, parser))


if __name__ == "__main__":
    main()
