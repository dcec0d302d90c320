"""The reader of traces, on hand-made events: each moment in one share, own times, kinds of kernels, memory."""

import gzip
import json

import pytest

from tunebench.profile.summary import rank_profile
from tunebench.profile.trace import WINDOW, read_trace, write_trace
from tunebench.record import Shares


def event(name, category, start, end, thread=1, **arguments):
    """An event as torch's profiler writes it; times in microseconds."""
    return {
        "ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, "ts": start, "dur": end - start,
        "args": arguments,
    }  # fmt: skip


def memory(time, size, device):
    """An event of bytes that a tensor took or gave back."""
    arguments = {"Bytes": size, "Device Type": device}
    return {
        "ph": "i",
        "cat": "cpu_instant_event",
        "name": "[memory]",
        "pid": 1,
        "tid": 1,
        "ts": time,
        "args": arguments,
    }


def profile_of(folder, *events, steps=1):
    """The profile of these events and of traced steps from 0 to 100 microseconds."""
    write_trace(folder / "made.json.gz", [event(WINDOW, "user_annotation", 0, 100), *events])
    return rank_profile(folder / "made.json.gz", steps)


def shares(**changes):
    """Shares, those that are not named are 0."""
    return Shares(**(dict.fromkeys(Shares.model_fields, 0.0) | changes)).model_dump()


def test_on_a_cpu_each_moment_is_in_one_share(tmp_path):
    profile = profile_of(
        tmp_path,
        event("Optimizer.step#AdamW.step", "user_annotation", 80, 95),
        event("aten::linear", "cpu_op", 0, 30),
        event("aten::mm", "cpu_op", 5, 25),
        event("autograd::engine::evaluate_function: AddBackward0", "cpu_op", 40, 60),
        event("aten::add", "cpu_op", 45, 55),
        event("aten::copy_", "cpu_op", 70, 75),
        event("aten::_foreach_mul_", "cpu_op", 85, 90),
        event("gloo:all_reduce", "user_annotation", 50, 70, thread=2),
        event("aten::mul", "cpu_op", 200, 300),  # after the steps
    )
    assert profile.shares.model_dump() == pytest.approx(
        shares(
            computing=0.30 + 0.05 + 0.05,
            communication_hidden=0.05,
            communication_alone=0.15,
            copies=0.05,
            waiting_for_host=0.10 + 0.05 + 0.10 + 0.05,
            idle=0.05,  # of the engine, before the addition
        )
    )
    assert {kind: seconds for kind, seconds in profile.kinds.items() if seconds} == pytest.approx(
        {"matrix products": 3e-5, "elementwise": 1e-5, "copies": 5e-6, "optimizer": 5e-6, "communication": 2e-5}
    )
    assert [(each.name, round(each.seconds * 1e6), each.calls) for each in profile.longest[:3]] == [
        *(("aten::mm", 20, 1), ("gloo:all_reduce", 20, 1), ("aten::linear", 10, 1))
    ]


def test_on_a_gpu_a_gap_ends_with_a_launch_or_is_idle(tmp_path):
    def kernel(name, start, end, launched, number, stream=7, category="kernel"):
        call = event("cudaLaunchKernel", "cuda_runtime", launched - 2, launched, correlation=number)
        return [call, event(name, category, start, end, thread=f"stream {stream}", correlation=number)]

    profile = profile_of(
        tmp_path,
        event("aten::mm", "cpu_op", 0, 8),
        event("aten::add", "cpu_op", 10, 36),
        *kernel("ampere_sgemm_128x64_tn", 10, 30, launched=6, number=1),
        *kernel("vectorized_elementwise_kernel", 40, 50, launched=35, number=2),
        *kernel("ncclDevKernel_AllReduce_Sum", 45, 65, launched=38, number=3, stream=20),
        *kernel("Memcpy HtoD", 65, 70, launched=39, number=4, category="gpu_memcpy"),
        memory(5, 3000, 0),
        memory(20, 500, 1),
        memory(30, -200, 1),
    )
    assert profile.shares.model_dump() == pytest.approx(
        shares(
            computing=0.20 + 0.05,
            communication_hidden=0.05,
            communication_alone=0.15,
            copies=0.05,
            waiting_for_host=0.06 + 0.05 + 0.30,  # up to the ends of the launches; nothing is launched after the last
            idle=0.04 + 0.05,
        )
    )
    assert {kind: seconds for kind, seconds in profile.kinds.items() if seconds} == pytest.approx(
        {"matrix products": 2e-5, "elementwise": 1e-5, "communication": 2e-5, "copies": 5e-6}
    )
    assert [size for _, size in profile.memory] == [0, 500, 300]  # of the GPU, not of the CPU


def test_marks_tell_attention_and_norms(tmp_path):
    """Paddle's matrix products have one name; the norms of both sides consist of operators with other uses."""
    profile = profile_of(
        tmp_path,
        event("attention", "user_annotation", 0, 10),
        event("matmul dygraph", "cpu_op", 1, 9),
        event("matmul kernel launch", "cpu_op", 2, 8),
        event("LlamaRMSNorm", "user_annotation", 10, 20),
        event("aten::mul", "cpu_op", 11, 15),
        event("Global_MatmulGradNode", "cpu_op", 20, 40),
        event("attention", "user_annotation", 21, 21),
        event("matmul_grad kernel launch", "cpu_op", 22, 30),
        event("matmul_grad kernel launch", "cpu_op", 50, 52),
        event("Global_MultiplyGradNode", "cpu_op", 60, 70),
        event("backward pass of a norm begins", "user_annotation", 61, 61),
        event("multiply_grad kernel launch", "cpu_op", 62, 66),
        event("Global_AddGradNode", "cpu_op", 70, 80),
        event("backward pass of a norm ends", "user_annotation", 71, 71),
        event("add_grad kernel launch", "cpu_op", 72, 75),
    )
    assert {(each.name, each.kind): round(each.seconds * 1e6) for each in profile.longest} == {
        ("matmul", "attention"): 8,
        ("aten::mul", "norms"): 4,
        ("matmul_grad", "attention"): 8,
        ("matmul_grad", "matrix products"): 2,
        ("multiply_grad", "norms"): 4,
        ("add_grad", "elementwise"): 3,
    }
    assert {each.calls for each in profile.longest} == {1}  # an operator's inner events are no calls of their own


def test_figures_are_per_step_and_memory_keeps_its_peaks(tmp_path):
    changes = [memory(time, size, 0) for time, size in ((10, 100), (10.1, 900), (10.2, -900), (60, -150))]
    profile = profile_of(tmp_path, event("aten::mm", "cpu_op", 0, 50), *changes, steps=2)
    assert (profile.seconds, profile.kinds["matrix products"]) == pytest.approx((5e-5, 2.5e-5))
    assert (profile.longest[0].calls, profile.trace) == (0.5, "made.json.gz")
    assert profile.memory == [(0, 0), (pytest.approx(1.01e-5), 1000), (pytest.approx(6e-5), -50)]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"traceEvents": []}, "0 ranges are named traced steps, not one"),
        ({"traceEvents": [event(WINDOW, "user_annotation", 0, 1)] * 2}, "2 ranges are named traced steps, not one"),
    ],
)
def test_a_file_without_traced_steps_is_refused(tmp_path, content, fault):
    file = tmp_path / "made.json.gz"
    file.write_bytes(gzip.compress(json.dumps(content).encode()))
    with pytest.raises(ValueError, match=fault):
        read_trace(file)
