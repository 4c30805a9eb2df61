"""Where the time of a training step goes on this CPU: `python -m benchmarks.step_profile 2m bf16`, or `"D 128" fp32` for the paper's shapes.

Times are those of torch's profiler, kernel by kernel, whose own work adds about a tenth; what the step takes without it is
told first. The bits for dropout are numpy's and no kernel of torch: they are in the difference.
"""

import sys
import time

import torch

from finpatch.memory import keep_memory

from .paper_shapes import SIZES, ways_of
from .presets import PRECISIONS, make_data, own_step

KINDS = {
    "matrix products of layers": ("aten::mm", "aten::addmm", "aten::linear"),
    "products, softmax of attention": ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data", "aten::amax",
                                       "aten::exp_", "aten::addcmul", "UnevenSoftmax", "UnevenSoftmaxBackward"),
    "GELU": ("aten::gelu", "aten::gelu_backward"),
    "layer norms": ("aten::native_layer_norm", "aten::native_layer_norm_backward"),
    "products of single numbers: dropout": ("aten::mul", "aten::mul_", "aten::ge"),
    "copies and casts": ("aten::copy_", "aten::clone", "aten::cat", "aten::_to_copy", "aten::index_select"),
    "sums and residuals": ("aten::add", "aten::add_", "aten::sum"),
    "AdamW and the norm of gradients": ("aten::_fused_adamw_", "Optimizer.step#AdamW.step", "aten::linalg_vector_norm", "aten::_foreach_norm"),
}  # fmt: skip


def profile(budget: str, precision: str, n_windows: int = 64, n_steps: int = 20) -> tuple[float, dict[str, float]]:
    "Return the milliseconds of a step, and those of each kind of kernel."
    keep_memory()
    if budget in SIZES:
        step = ways_of("Hugging Face", budget, 0.2, 32)[f"finpatch {PRECISIONS[precision]}"][2]
    else:
        step = own_step(budget, make_data(), precision, n_windows)
    for _ in range(5):
        step()
    began = time.perf_counter()
    for _ in range(n_steps):
        step()
    took = (time.perf_counter() - began) / n_steps * 1e3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        for _ in range(n_steps):
            step()
    own = {e.key: e.self_cpu_time_total / n_steps / 1e3 for e in seen.key_averages()}
    parts = {kind: sum(own.pop(name, 0.0) for name in names) for kind, names in KINDS.items()}
    return took, parts | {"views, allocation, autograd": sum(own.values())}


def main(budget: str, precision: str) -> None:
    took, parts = profile(budget, precision)
    print(f"{budget}, {precision}, {torch.get_num_threads()} threads: {took:.1f} ms a step")
    for kind, ms in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"{kind:38}{ms:8.1f} ms {ms / sum(parts.values()):6.0%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
