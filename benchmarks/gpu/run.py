"""One script for a card: builds nothing, checks everything, times everything, in under ten minutes.

    PYTHONPATH=src python3 benchmarks/gpu/run.py --out benchmarks/results          (on a machine with a CUDA GPU)
    TRITON_INTERPRET=1 python benchmarks/gpu/run.py --dry --out /tmp/gpu           (anywhere: tiny shapes, no figures)

Needs torch, triton, numpy, msgspec, tokenizers, llguidance and safetensors; not the native core. Writes gpu.json and
gpu.md: each figure beside its floor, the bytes or multiplications it needs over the card's limits measured in the same
run. Random weights of Llama 3.1 8B's shape; the requests' tokens are random, too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TEST_TIMEOUT_S = 200  # of one file
PYTEST_NOTHING_COLLECTED = 5
MOST_OF_TRANSFORMERS = 32
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
DRY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 512, "torch_dtype": "float32",
}  # fmt: skip


@dataclass
class Sizes:
    """What is run: on a card, or dry."""

    batches: tuple[int, ...] = (1, 8, 32, 128, 256)
    context: int = 1024
    decode_steps: int = 64
    captured_after: int = 24  # steps of a shape after which it is worth a capture (runner/graph_policy.py)
    prefill: int = 8192
    prefills: int = 3
    shared_prefix: int = 4096
    shared_requests: int = 32
    shared_output: int = 128
    copy_bytes: int = 4 << 30
    matrix: int = 8192
    repeats: int = 20


DRY_SIZES = Sizes((1, 3), 20, 3, 2, 40, 1, 32, 2, 2, 1 << 16, 32, 1)


@dataclass
class Report:
    """Rows of figures and what they were made with."""

    facts: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, what: str, seconds: float, floor_s: float, **more: Any) -> None:
        row = {"what": what, "ms": seconds * 1e3, "floor_ms": floor_s * 1e3, "share": floor_s / seconds, **more}
        self.rows.append(row)
        print(f"{what:<44}{row['ms']:>10.3f} ms  floor {row['floor_ms']:>9.3f}  {row['share']:>6.1%}  {more or ''}")

    def markdown(self) -> str:
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        table = "\n".join(
            f"| {row['what']} | {row['ms']:.3f} | {row['floor_ms']:.3f} | {row['share']:.2f} | "
            + ", ".join(f"{name} {row[name]:,.1f}" for name in row if name not in ("what", "ms", "floor_ms", "share"))
            + " |"
            for row in self.rows
        )
        notes = "\n".join(f"- {note}" for note in self.notes)
        head = "| what | ms | floor, ms | floor / measured | |\n|---|---|---|---|---|"
        return f"# One GPU\n\n{facts}\n\n{head}\n{table}\n\n{notes}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for gpu.json and gpu.md")
    parser.add_argument("--dry", action="store_true", help="on the CPU, interpreted, with tiny shapes")
    parser.add_argument("--skip", action="append", default=[], help="tests, kernels, engine, fp8, transformers")
    options = parser.parse_args()
    if not options.dry:
        os.environ["TRITON_INTERPRET"] = "0"
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import torch

    if options.dry:  # the interpreter's faults are corrected where the tests keep that
        sys.path.insert(0, str(ROOT / "tests"))
        import triton_interpreter

        triton_interpreter.repair()
    device = torch.device("cpu" if options.dry else "cuda")
    sizes = DRY_SIZES if options.dry else Sizes()
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(facts_of(torch, device))
    bandwidth, flops = limits(torch, device, sizes)
    report.facts |= {"copy bandwidth, TB/s": bandwidth / 1e12, "bf16 matrix rate, TFLOP/s": flops / 1e12}
    phases: dict[str, Callable[[], None]] = {
        "tests": lambda: run_tests(report, options.dry),
        "kernels": lambda: time_kernels(report, options.out, options.dry),
        "engine": lambda: time_engine(sizes, report, options.dry, (bandwidth, flops), None),
        "fp8": lambda: time_engine(sizes, report, options.dry, (bandwidth, flops), "fp8"),
        "transformers": lambda: time_transformers(torch, sizes, report, options.dry),
    }
    for name, run in phases.items():
        if name in options.skip or (options.dry and name == "fp8"):
            report.notes.append(f"{name}: not run")
            continue
        started = time.perf_counter()
        try:
            run()
        except Exception as error:  # one phase must not take the others' figures with it
            report.notes.append(f"{name}: failed: {type(error).__name__}: {error}")
            if options.dry:
                raise
        report.facts[f"seconds of {name}"] = round(time.perf_counter() - started, 1)
    content = {"facts": report.facts, "rows": report.rows, "notes": report.notes}
    (options.out / "gpu.json").write_text(json.dumps(content, indent=1))
    (options.out / "gpu.md").write_text(report.markdown())
    print("\n".join(report.notes))
    return 1 if any("failed" in note for note in report.notes) else 0


def facts_of(torch: Any, device: Any) -> dict[str, Any]:
    facts = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
    }
    facts |= {"torch": torch.__version__, "triton": importlib.metadata.version("triton")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"card": properties.name, "multiprocessors": properties.multi_processor_count}
        facts["memory, GB"] = round(torch.cuda.mem_get_info()[1] / 1e9, 1)
    else:
        facts["card"] = "none: a dry run, its times mean nothing"
    return facts


def median_seconds(torch: Any, device: Any, call: Callable[[], Any], repeats: int) -> float:
    """Of single calls, by events on a card; warmed up first."""
    for _ in range(min(repeats, 3)):
        call()
    taken = []
    for _ in range(repeats):
        if device.type != "cuda":
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
            continue
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def limits(torch: Any, device: Any, sizes: Sizes) -> tuple[float, float]:
    """(bytes a second of a copy, read and written; operations a second of a bf16 product), of random data."""
    source = torch.randint(0, 255, (sizes.copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = median_seconds(torch, device, lambda: target.copy_(source), sizes.repeats)
    a, b = (torch.randn((sizes.matrix, sizes.matrix), device=device).bfloat16() for _ in range(2))
    multiplied = median_seconds(torch, device, lambda: a @ b, sizes.repeats)
    return 2 * sizes.copy_bytes / copied, 2 * sizes.matrix**3 / multiplied


def run_tests(report: Report, dry: bool) -> None:
    """The parity of every kernel and of whole models on the card: a process a file, for compiling takes the time."""
    if dry:
        report.notes.append("tests: not run dry")
        return
    files = sorted(path for path in (ROOT / "tests/kernels/triton").glob("test_*.py"))
    with ThreadPoolExecutor(max(len(os.sched_getaffinity(0)) - 1, 1)) as pool:
        for path, (passed, last) in zip(files, pool.map(test_on_card, files), strict=True):
            report.notes.append(f"{path.name} on the card: {'passed' if passed else 'failed'}: {last}")


def test_on_card(path: Path) -> tuple[bool, str]:
    """(whether nothing failed, the last line that pytest says) of a file; most have no test that is for a card."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(path)]
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=TEST_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return False, f"not done in {TEST_TIMEOUT_S} s"
    last = (found.stdout.strip().splitlines() or ["no output"])[-1]
    return found.returncode in (0, PYTEST_NOTHING_COLLECTED), last


def time_kernels(report: Report, out: Path, dry: bool) -> None:
    """benchmarks/gpu/kernels.py, in a process of its own; its rows are written beside."""
    command = [sys.executable, str(ROOT / "benchmarks/gpu/kernels.py"), "--json", str(out / "gpu-kernels.json")]
    subprocess.run(command + ["--tiny"] * dry, check=True, timeout=240)
    report.notes.append("kernels: in gpu-kernels.json")


def time_engine(
    sizes: Sizes, report: Report, dry: bool, machine: tuple[float, float], quantization: str | None
) -> None:
    """Whole steps: decoding at several batches, a prefill, a shared prefix; and the phases of the start."""
    with tempfile.TemporaryDirectory() as directory:
        core, config, ready = build(Path(directory), dry, sizes, quantization)
        try:
            label = quantization or config.dtype
            for phase, seconds in ready.phases:
                report.facts[f"start {label}: {phase}, s"] = round(seconds, 2)
            steps = Steps(core, config)
            weight_bits = 8 if quantization else 16
            for batch in sizes.batches:
                time_decode(report, steps, config, (label, weight_bits, batch), sizes, machine)
            time_prefill(report, steps, config, label, sizes, machine)
            time_shared_prefix(report, steps, label, sizes)
        finally:
            core.close()


def build(directory: Path, dry: bool, sizes: Sizes, quantization: str | None) -> tuple[Any, Any, Any]:
    from penstock.config.resolve import EngineOptions, MachineFacts, resolve_engine_config
    from penstock.engine.build import build_engine
    from penstock.loader import read_model_config

    (directory / "config.json").write_text(json.dumps({**LLAMA_8B, **(DRY if dry else {})}))
    options = EngineOptions(
        device="cpu" if dry else "cuda", kernels="triton", load_format="dummy", quantization=quantization or "none",
        max_num_seqs=max(sizes.batches), max_num_batched_tokens=sizes.prefill, max_memory=64 << 20 if dry else 0,
        max_model_len=min(512, 4 * sizes.prefill) if dry else sizes.prefill + sizes.shared_prefix,
    )  # fmt: skip
    model = read_model_config(directory)
    config = resolve_engine_config(str(directory), model, options, MachineFacts(num_cores=1), target_step_s=0.0)
    core, ready = build_engine(config, lambda _phase, _fraction: None)
    return core, config, ready


class Steps:
    """Drives an engine and takes the time of its steps."""

    def __init__(self, core: Any, config: Any) -> None:
        self.core = core
        self._vocab_size = config.model.vocab_size
        self._random = random.Random(1)
        self._count = 0
        self._gaps = Gaps(core.executor.runner) if config.device == "cuda" else None

    def add(self, prompt: list[int], max_tokens: int) -> None:
        from penstock.messages import EngineRequest, SamplingParams

        self._count += 1
        sampling = SamplingParams(temperature=0.0, ignore_eos=True)
        request = EngineRequest(
            request_id=str(self._count), prompt_token_ids=prompt, sampling=sampling, max_tokens=max_tokens
        )
        refusal = self.core.add(request)
        assert refusal is None, refusal

    def prompt(self, length: int) -> list[int]:
        return [self._random.randrange(3, self._vocab_size) for _ in range(length)]

    def settle(self) -> None:
        """What was run is captured, as an idle engine does."""
        while self.core.prepare():
            pass

    def share_replayed(self, since: tuple[int, int] = (0, 0)) -> float:
        """Of the steps since `counts`."""
        replayed, launched = (now - then for now, then in zip(self.counts(), since, strict=True))
        return replayed / max(replayed + launched, 1)

    def counts(self) -> tuple[int, int]:
        """Steps (replayed, launched kernel by kernel) so far."""
        captures = self.core.stats().captures
        return captures.num_replayed, captures.num_launched

    def gap_us(self) -> dict[str, float]:
        """Since the last call, how long the card typically had nothing to do between two steps."""
        return {} if self._gaps is None else {"gap_us": self._gaps.take_us()}

    def drain(self) -> tuple[list[tuple[float, int]], float]:
        """((seconds, tokens given) of each turn of the loop, seconds of all)."""
        turns = []
        begun = time.perf_counter()
        while self.core.has_work():
            started = time.perf_counter()
            outputs = self.core.step()
            assert not any(output.error for output in outputs), outputs
            turns.append((time.perf_counter() - started, sum(len(output.token_ids) for output in outputs)))
        return turns, time.perf_counter() - begun


class Gaps:
    """Marks in the card's stream before and after each step: between them it waits for the host."""

    def __init__(self, runner: Any) -> None:
        import torch

        self._marks: list[tuple[Any, Any]] = []
        launch = runner.launch

        def marked(output: Any) -> Any:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step = launch(output)
            end.record()
            self._marks.append((start, end))
            return step

        runner.launch = marked

    def take_us(self) -> float:
        """The median since the last call."""
        marks, self._marks = self._marks, []
        if marks:
            marks[-1][1].synchronize()
        gaps = [1e3 * end.elapsed_time(start) for (_, end), (start, _) in itertools.pairwise(marks)]
        return statistics.median(gaps) if gaps else 0.0


def parameter_count(model: Any) -> float:
    from penstock.bench.step_time import HardwareStepTime

    return HardwareStepTime.of_model(model, 1.0, 1.0).num_parameters


def time_decode(
    report: Report, steps: Steps, config: Any, case: tuple[str, int, int], sizes: Sizes, machine: tuple[float, float]
) -> None:
    """The median turn in which the whole batch got a token: what a user of a full batch sees."""
    from penstock.bench.step_time import kv_bytes_per_token

    label, weight_bits, batch = case
    turns, before = [], (0, 0)
    for num_steps in (sizes.captured_after, sizes.decode_steps):
        steps.settle()
        before = steps.counts()
        steps.gap_us()
        for _ in range(batch):
            steps.add(steps.prompt(sizes.context), num_steps)
        turns, _ = steps.drain()
    full = [seconds for seconds, tokens in turns if tokens == batch]
    taken = statistics.median(full[len(full) // 4 :])
    keys = batch * (sizes.context + sizes.decode_steps / 2) * kv_bytes_per_token(config.model)
    floor_s = (parameter_count(config.model) * weight_bits / 8 + keys) / machine[0]
    more = {"tokens_per_s": batch / taken, "replayed": steps.share_replayed(before)} | steps.gap_us()
    report.add(f"{label} decode step, batch {batch}", taken, floor_s, **more)


def time_prefill(
    report: Report, steps: Steps, config: Any, label: str, sizes: Sizes, machine: tuple[float, float]
) -> None:
    times = []
    for _ in range(sizes.prefills):
        steps.add(steps.prompt(sizes.prefill), 1)
        times.append(steps.drain()[1])
    taken = statistics.median(times)
    flops = 2 * parameter_count(config.model) * sizes.prefill
    report.add(f"{label} prefill of {sizes.prefill}", taken, flops / machine[1], tokens_per_s=sizes.prefill / taken)


def time_shared_prefix(report: Report, steps: Steps, label: str, sizes: Sizes) -> None:
    """Requests with one long beginning, which is in the cache: output tokens a second."""
    prefix = steps.prompt(sizes.shared_prefix)
    steps.add(prefix, 1)
    steps.drain()
    taken = 0.0
    for num_steps in (sizes.captured_after, sizes.shared_output):
        steps.settle()
        for _ in range(sizes.shared_requests):
            steps.add(prefix + steps.prompt(8), num_steps)
        _, taken = steps.drain()
    rate = sizes.shared_requests * sizes.shared_output / taken
    report.add(f"{label} shared prefix of {sizes.shared_prefix}", taken, taken, tokens_per_s=rate)
    report.notes.append(f"{label} shared prefix: no floor is given")


def time_transformers(torch: Any, sizes: Sizes, report: Report, dry: bool) -> None:
    """transformers on the same card, in the same shape, at the same batches: generate, and its continuous batching."""
    from transformers import LlamaConfig, LlamaForCausalLM

    report.facts["transformers"] = importlib.metadata.version("transformers")
    device = "cpu" if dry else "cuda"
    with torch.device(device):
        shape = {**LLAMA_8B, **(DRY if dry else {})}
        model = LlamaForCausalLM(LlamaConfig(**shape)).to(torch.float32 if dry else torch.bfloat16).eval()
    for batch in [batch for batch in sizes.batches if batch <= MOST_OF_TRANSFORMERS]:
        source = random.Random(batch)
        prompts = [[source.randrange(3, shape["vocab_size"]) for _ in range(sizes.context)] for _ in range(batch)]
        for name, step_seconds in (("generate", of_generate), ("continuous batching", of_continuous_batching)):
            taken = step_seconds(torch, model, prompts, 4 if dry else 32)
            report.add(f"transformers {name}, batch {batch}", taken, taken, tokens_per_s=batch / taken)
    report.notes.append("transformers: no floor is given")


def of_generate(torch: Any, model: Any, prompts: list[list[int]], count: int) -> float:
    """Seconds that a token of each takes: what `count` more take, over their number."""
    ids = torch.tensor(prompts, device=model.device)

    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        found = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        found.tolist()  # waits for it
        assert found.shape[1] == ids.shape[1] + tokens, found.shape
        return time.perf_counter() - started

    seconds(2)
    fewer = seconds(2)
    return max(seconds(count + 2) - fewer, 1e-9) / count


def of_continuous_batching(_torch: Any, model: Any, prompts: list[list[int]], count: int) -> float:
    """Seconds between two tokens of a request, the median of all: `generate_batch` plans its memory at each call."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig()
    if model.device.type == "cpu":  # dry: it would take half of the machine's memory
        batching = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    found = model.generate_batch(prompts, config, batching, record_timestamps=True, progress_bar=False).values()
    assert [(each.error, len(each.generated_tokens)) for each in found] == [(None, count)] * len(prompts), found
    return statistics.median(b - a for each in found for a, b in itertools.pairwise(each.timestamps))


if __name__ == "__main__":
    sys.exit(main())
