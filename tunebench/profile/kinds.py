"""The kinds of kernels, by the names that both frameworks and their libraries give them."""

import re

from tunebench.profile.trace import ATTENTION, COMPILED, COPY, FILL, OPERATOR, RANGE, Event
from tunebench.record import KernelKind

# Of operators: PyTorch's without `aten::`, Paddle's, and those of gradients without their ending. The whole name fits.
OPERATORS: tuple[tuple[KernelKind, str], ...] = (
    (
        "communication",
        r"(gloo|nccl|c10d|_c10d_functional):.*|record_param_comms|(mp_|c_|partial_)?all_?(reduce|gather|to_?all).*|"
        r"reduce_scatter.*|broadcast_?|barrier|p_?send.*|p_?recv.*|wait_tensor|reduce",
    ),
    ("loss", r".*cross_entropy.*|_?log_softmax.*|nll_loss.*"),
    ("attention", r".*(attention|attn|flash|sdpa).*|(_safe)?_?softmax.*|bmm|baddbmm|_?scaled_dot_product.*"),
    ("optimizer", r".*(adamw?|lamb)_?|_foreach_.*|squared_l2_norm|p_norm|linalg_vector_norm|.*check_finite.*"),
    ("norms", r".*(layer_?norm|rms_?norm).*|_?rsqrt_?"),
    ("matrix products", r"mm|addmm|addmm_|mv|addmv|dot|matmul|matmul_v2|linear|mul_mat|fc|fused_gemm.*|fused_linear.*"),
    (
        "copies",
        r"copy_|_to_copy|to|clone|contiguous|cat|concat|stack|assign.*|cast|transpose|slice|strided_slice|split.*|"
        r"tile|fill_?|zero_|zeros(_like)?|full.*|ones(_like)?|set_value.*|memcpy.*|share_data.*|slice_backward|"
        r"select_backward|pad|constant_pad_nd|set_constant|index_put.*|view.*|reshape.*|_?unsafe_view|_reshape_alias|"
        r"flatten.*|(un)?squeeze_?|expand.*|select|narrow|as_strided.*|t|permute|detach_?|alias|empty.*|new_.*|"
        r"arange|resize_|resolve_conj|resolve_neg|lift_fresh|unbind.*|chunk|repeat|split_with_sizes|embedding.*|"
        r"index|index_.*|gather.*|scatter.*|take_along_axis|one_hot",
    ),
    (
        "elementwise",
        r"r?(add|sub|subtract|mul|multiply|div|divide)_?n?_?|addcmul_?|addcdiv_?|elementwise_.*|scale_?|pow_?|square|"
        r"sqrt_?|exp_?|log|neg|abs|cos|sin|tanh.*|gelu.*|silu.*|swish|swiglu|sigmoid.*|relu.*|where|masked_fill_?|"
        r"maximum|minimum|max|min|clamp.*|clip_?|sum|mean|reduce_(sum|mean|max)|cumsum|tril|triu|"
        r"(eq|ne|lt|le|gt|ge|equal|not_equal|less_than|less_equal|greater_than|greater_equal)_?|"
        r"bitwise_.*|logical_.*|isfinite|isinf|isnan|reciprocal.*|dropout|threshold.*|fused_.*rot.*|grad_add|all|any|"
        r"div_scale|erf|__and__|compiledfxgraph",
    ),
)
# Of kernels on a GPU: a part of the name fits.
KERNELS: tuple[tuple[KernelKind, str], ...] = (
    ("communication", r"nccl|all_?reduce|all_?gather|reduce_?scatter"),
    ("attention", r"flash|fmha|attention|attn|softmax(?!.*(log_softmax|cross|loss))"),
    ("loss", r"cross_?entropy|log_?softmax|nll_?loss"),
    ("optimizer", r"adam|multi_tensor|lpnorm"),
    ("norms", r"layer_?norm|rms_?norm|rsqrt"),
    ("matrix products", r"(?<!fb)gemm|gemv|cutlass|cublas|nvjet|xmma|splitk|matmul|wgmma"),
    ("copies", r"copy|memcpy|memset|cat_?array|concat|transpose|fill"),
    ("elementwise", r"elementwise|vectorized|triton_|reduce_kernel|broadcast|unrolled"),
)
# Ranges of an optimizer's step.
OPTIMIZER = re.compile(r"Optimizer\.(step|zero_grad)#.*|Optimization Step")
NORM = re.compile(r"[A-Za-z0-9]*Norm")  # the name of a layer's class
# What the frameworks do around operators: their engines of the backward pass; in Paddle also the calls from Python, the
# results' shapes, and the notes for the backward pass.
BOOKKEEPING = re.compile(
    r"autograd::engine.*|torch::autograd::.*|.*Backward\d*|.*GradNode.*|backward|CompiledFunction|"
    r"Torch-Compiled Region.*|TorchDynamo Cache Lookup|"
    r".* (infer_meta|node_creation|pybind_imperative_func|pybind_patch_func)"
)
_BY_NAME = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in OPERATORS)
_BY_KERNEL = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in KERNELS)
_ENDING = re.compile(r" (dygraph|kernel launch|infer_meta|node_creation|pybind_imperative_func)$")
_GRADIENT = re.compile(r"(_double)?_grad$")


def is_bookkeeping(event: Event) -> bool:
    """Whether the event itself computes nothing, but is what a framework does around operators."""
    return event.category != OPERATOR or BOOKKEEPING.fullmatch(event.name) is not None


def name_of(event: Event) -> str:
    """The name of an operator without Paddle's endings, which tell its events apart, and Inductor's digests."""
    return "CompiledFxGraph" if event.name.startswith(COMPILED) else _ENDING.sub("", event.name)


def told_by(event: Event) -> tuple[KernelKind, Event] | None:
    """The kind of an event on the host, and the event that tells it: itself or one around it. None where none does.

    The optimizer's step and the norms have all that runs in them but communication.
    """
    found = None
    inner: Event | None = event
    while inner is not None:
        if found is None and inner.category == OPERATOR and (kind := _of_operator(inner)):
            found = kind, inner
            if kind == "communication":
                break
        if inner.category == RANGE and OPTIMIZER.fullmatch(inner.name):
            return "optimizer", found[1] if found else event
        if inner.category == RANGE and NORM.fullmatch(inner.name):
            return "norms", found[1] if found else event
        if found is not None and found[0] == "matrix products" and (inner.attends or inner.name == ATTENTION):
            found = "attention", found[1]
        inner = inner.parent
    if event.of_norm and (found is None or found[0] != "communication"):
        return "norms", found[1] if found else event
    return found


def kind_on_device(event: Event, launch: Event | None) -> KernelKind:
    """The kind of what ran on a GPU. `launch` is the call that started it. Its operators know more than the name."""
    if event.category in (COPY, FILL):
        return "copies"
    named = next((kind for kind, pattern in _BY_KERNEL if pattern.search(event.name)), None)
    told = None if launch is None or named == "communication" else told_by(launch)
    if told is not None and (told[0] not in ("elementwise", "copies") or named is None):
        return told[0]
    return named or "other"


def _of_operator(event: Event) -> KernelKind | None:
    name = _GRADIENT.sub("", name_of(event).removeprefix("aten::"))
    kind = next((kind for kind, pattern in _BY_NAME if pattern.fullmatch(name)), None)
    if kind == "matrix products" and len(event.dims) > 1 and min(event.dims[:2]) > 2:
        return "attention"  # a product of two batches: the layers' weights are matrices
    return kind
