"""What this machine's GPU makes of rlvla: speed, memory and FLOP/s of a real-size Qwen-VLA with drawn weights.

    python scripts/gpu_check.py [--size 4b] [--device cuda] [--output runs/gpu_check]

Needs torch, transformers, tensordict and jaxtyping; no simulator, no Ray, no Hydra, no network. It measures

* a large matrix product, which achieved FLOP/s are compared with;
* deciding (context once, every denoising step), batch by batch;
* one PPO minibatch forward, back and Adam's step, batch by batch: with the backbone frozen and the whole expert
  trained, and with LoRA on both;
* the most memory of each, beside what `rlvla doctor` plans.

A batch that does not fit is recorded as such, and larger ones are not tried. Results are written after each
measurement: DIRECTORY/result.json and result.md. The last line on stdout is the JSON.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from synthetic import algo_config, draw_policy, observe, play, policy_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rlvla.acting import Actor
from rlvla.config import Attention, ComputeConfig, DoctorConfig, LoraConfig, Precision
from rlvla.learner import Learner
from rlvla.memory import learner_phases
from rlvla.policies.base import ValueHead, trained_groups
from rlvla.policies.footprint import build_unallocated, footprint
from rlvla.policies.groups import require_gradients
from rlvla.policies.lora import add_lora
from rlvla.policies.numerics import set_up
from rlvla.samplers import training_sampler
from rlvla.seeding import Stream, keyed_rng
from rlvla_envs.base import SuiteConfig

SIZES = {"4b": ("qwen_vla_4b", 224, 8192), "small": ("qwen_vla_small", 160, 2048), "tiny": ("qwen_vla_toy", 32, 256)}
"""By name: a file of configs/policy, pixels of its camera, and the side of the matrices that are multiplied."""
LORA_RANK = 32
MODES = {
    "frozen_vlm": "backbone frozen, its contexts stored; the whole expert trained",
    "lora": f"LoRA of rank {LORA_RANK} on backbone and expert; images encoded again",
}
PACKAGES = ("torch", "transformers", "tensordict", "flash-linear-attention", "causal-conv1d", "triton")


class Bench:
    """Measurements on one device, in the order they were made."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device: str = arguments.device
        self.name, self.pixels, self.side = SIZES[arguments.size]
        self.compute = ComputeConfig(
            precision=Precision(arguments.precision),
            compile=arguments.compile,
            recompute=arguments.recompute,
            attention=Attention(arguments.attention),
        )
        self.result: dict[str, Any] = {
            "machine": machine(self.device),
            "policy": self.name,
            "compute": {
                "precision": arguments.precision,
                "compile": arguments.compile,
                "recompute": arguments.recompute,
                "attention": arguments.attention,
            },
            "matrix_product": {},
            "deciding": [],
            "updating": [],
        }

    # --- measuring

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any]) -> float:
        """Median of several runs, after one that warms up."""
        run()
        times = []
        for _ in range(self.arguments.repeats):
            self.wait()
            started = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - started)
        return sorted(times)[len(times) // 2]

    def peak(self, run: Callable[[], Any]) -> int | None:
        """Most bytes that tensors took; None where nobody counts, on a CPU."""
        if not self.device.startswith("cuda"):
            run()
            return None
        torch.cuda.reset_peak_memory_stats()
        run()
        return int(torch.cuda.max_memory_allocated())

    def free(self) -> None:
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def write(self) -> None:
        folder: Path = self.arguments.output
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps(self.result, indent=1) + "\n")
        (folder / "result.md").write_text(page(self.result))

    def over_batches(self, kind: str, measure: Callable[[int], dict[str, Any]], **about: str) -> None:
        """Every batch size until one does not fit."""
        for rows in self.arguments.batches:
            try:
                found = measure(rows)
            except torch.OutOfMemoryError as error:
                found = {"rows": rows, "out_of_memory": str(error).split(". ")[0]}
            self.result[kind].append(about | found)
            self.write()
            if "out_of_memory" in found:
                # Outside the handler: the error holds on to the tensors that it was in the middle of.
                self.free()
                return

    # --- what is measured

    def matrix_product(self) -> None:
        n = self.side
        for dtype in (torch.bfloat16, torch.float32):
            a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
            seconds = self.seconds(lambda a=a, b=b: a @ b)  # type: ignore[misc]
            name = str(dtype).removeprefix("torch.")
            self.result["matrix_product"][name] = {"side": n, "seconds": seconds, "tflops": 2e-12 * n**3 / seconds}
        self.write()

    def make(self, mode: str) -> tuple[Any, Any, Any, Learner]:
        train_vlm = mode == "lora"
        config = algo_config(train_vlm=train_vlm, minibatch_size=2)
        policy = draw_policy(policy_config(self.name), self.pixels, self.device)
        trained = trained_groups(policy, train_vlm)
        require_gradients(policy, trained)
        if mode == "lora":
            add_lora(policy, LoraConfig(rank=LORA_RANK), trained)
            require_gradients(policy, trained)
        set_up(policy, self.compute)
        head, sampler = ValueHead(policy.value_size).to(self.device), training_sampler(policy, config)
        learner = Learner(policy, head, config, sampler, seed=0, total_iterations=1, compute=self.compute)
        return policy, head, sampler, learner

    def decide(self) -> None:
        policy, _, sampler, _ = self.make("frozen_vlm")
        groups = policy.parameter_groups()
        self.result["parameters"] = {name: sum(p.numel() for p in of) for name, of in groups.items()}
        self.result["tokens"] = policy.context_length(observe(policy, 1, 0).instruction[0])

        def measure(rows: int) -> dict[str, Any]:
            actor = Actor(policy, block=rows, device=self.device)
            seen = observe(policy, rows, 0)

            def run() -> None:
                rngs = [keyed_rng(0, Stream.ROLLOUT, 0, row, 0) for row in range(rows)]
                actor.decide(seen, rngs, temperature=1.0, sampler=sampler)

            flops = count_flops(run)
            seconds = self.seconds(run)
            peak = self.peak(run)
            planned = self.plan(policy, "frozen_vlm", rows, "collecting")
            return self.row(rows, seconds, flops, peak, planned) | {"decisions_per_s": rows / seconds}

        self.over_batches("deciding", measure)

    def update(self, mode: str) -> None:
        policy, head, sampler, learner = self.make(mode)

        def measure(rows: int) -> dict[str, Any]:
            # A minibatch has at least two rows.
            learner.config = replace(learner.config, minibatch_size=max(2, rows))
            block = min(rows, 16)
            rollout = play(
                policy,
                head,
                sampler,
                episodes=rows,
                decisions=1,
                block=block,
                device=self.device,
                store_context=mode == "frozen_vlm",
            )
            data = rollout[rollout["valid"]]
            part = next(iter(learner._minibatches(data, 0, 0)))

            def run() -> None:
                learner._policy_optimizer.zero_grad(set_to_none=True)
                learner._value_optimizer.zero_grad(set_to_none=True)
                for piece in learner._passes(part):
                    learner._descend(piece, None)
                learner._clip_gradients()
                learner._policy_optimizer.step()
                learner._value_optimizer.step()

            flops = count_flops(run)
            seconds = self.seconds(run)
            peak = self.peak(run)
            planned = self.plan(policy, mode, rows, "updating")
            found = self.row(rows, seconds, flops, peak, planned)
            # Drawn advantages move the weights at random; a few steps of this rate leave them finite.
            finite = all(bool(torch.isfinite(p).all()) for p in policy.parameters() if p.requires_grad)
            return found | {"decisions_per_s": rows / seconds, "finite": finite}

        self.over_batches("updating", measure, mode=mode)

    def row(self, rows: int, seconds: float, flops: int, peak: int | None, planned: int) -> dict[str, Any]:
        rate = 1e-12 * flops / seconds
        name = "bfloat16" if self.compute.precision is Precision.bf16 else "float32"
        best = self.result["matrix_product"][name]["tflops"]
        return {
            "rows": rows,
            "seconds": seconds,
            "tflop": 1e-12 * flops,
            "tflops": rate,
            "of_matrix_product": rate / best,
            "peak_bytes": peak,
            "planned_bytes": planned,
        }

    def plan(self, policy: Any, mode: str, rows: int, phase: str) -> int:
        """What `rlvla doctor` would plan on a GPU for a rollout of ``rows`` decisions, CUDA itself left out: torch does
        not count it."""
        train_vlm = mode == "lora"
        spec = policy.env_spec
        config = DoctorConfig(
            policy=self.name,
            suite=SuiteConfig(
                name="toy",
                chunk_size=spec.chunk_size,
                max_episode_steps=spec.chunk_size,
                image_size=self.pixels,
            ),
            algo=algo_config(train_vlm=train_vlm, minibatch_size=max(2, rows)),
            lora=LoraConfig(rank=LORA_RANK if mode == "lora" else 0),
            episodes_per_iteration=rows,
            inference_batch=rows if phase == "collecting" else min(rows, 16),
            compute=self.compute,
        )
        empty = build_unallocated(policy.config, spec, policy.tokenizer)
        trained = trained_groups(empty, train_vlm)
        require_gradients(empty, trained)
        add_lora(empty, config.lora, trained)
        require_gradients(empty, trained)
        size = footprint(empty, self.result["tokens"], config.compute)
        phases = dict(learner_phases(config, size))
        return sum(item.bytes for item in phases[phase])


def count_flops(run: Callable[[], Any]) -> int:
    """Multiplications and additions of all matrix products and convolutions of one run, forward and back.

    `torch.utils.flop_counter`'s formulas: 2 m n k of a product. Attention is counted as the products of its plain form,
    the only one that is counted everywhere. Kernels that are no operators of torch's, such as those of
    flash-linear-attention, are not seen.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def machine(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"device": device, "platform": platform.platform(), "python": platform.python_version()}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    machine, compute = result["machine"], result["compute"]
    parameters = ", ".join(f"{name} {number / 1e9:.3f} B" for name, number in result.get("parameters", {}).items())
    lines = [
        f"# GPU check: {machine.get('gpu', machine['device'])}",
        "",
        f"{result['policy']} with drawn weights ({parameters}), {result.get('tokens', '?')} tokens of context; "
        + ", ".join(f"{key} {value}" for key, value in compute.items())
        + ".",
        "",
        "| " + " | ".join(key for key in machine) + " |",
        "|" + "---|" * len(machine),
        "| " + " | ".join(str(value) for value in machine.values()) + " |",
        "",
        "| matrix product | side | TFLOP/s |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {of['side']} | {of['tflops']:.2f} |" for name, of in result["matrix_product"].items()]
    lines += ["", "## Deciding", "", *table(result["deciding"])]
    for mode, words in MODES.items():
        rows = [row for row in result["updating"] if row["mode"] == mode]
        lines += ["", f"## One minibatch of PPO: {words}", "", *table(rows)]
    lines += [
        "",
        "Share: of the matrix product's rate in the same precision. Memory is of tensors, without CUDA itself.",
    ]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| rows | ms | decisions/s | TFLOP | TFLOP/s | share | peak GB | planned GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "out_of_memory" in row:
            lines.append(f"| {row['rows']} | out of memory | | | | | | |")
            continue
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
        lines.append(
            f"| {row['rows']} | {1e3 * row['seconds']:.1f} | {row['decisions_per_s']:.1f} | {row['tflop']:.3g} "
            f"| {row['tflops']:.3g} | {row['of_matrix_product']:.0%} | {peak} | {row['planned_bytes'] / 1e9:.2f} |"
        )
    return lines


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="4b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--precision", choices=[p.value for p in Precision], default="bf16")
    parser.add_argument("--attention", choices=[a.value for a in Attention], default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"))
    arguments = parser.parse_args(words)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no GPU here. Use --device cpu --size tiny to try the script.")
    bench = Bench(arguments)
    bench.matrix_product()
    bench.decide()
    for mode in arguments.modes:
        # A policy is gone once what measured it has returned, but for cycles.
        bench.free()
        bench.update(mode)
    bench.write()
    print(json.dumps(bench.result))


if __name__ == "__main__":
    main()
