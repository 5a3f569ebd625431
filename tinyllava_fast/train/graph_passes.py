"""Improvements that torch.compile does not find by itself on a CPU, as passes over the graphs that it makes.

A pass sees the graph of a training step after torch has split it into forward and backward, so stock modules need no
change, and what is not compiled runs as before.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from tinyllava_fast.ops import _cpp, _policy
from tinyllava_fast.ops.gemm import gemm, pays
from tinyllava_fast.ops.splice import splice_bwd, splice_bwd_add

aten, prims = torch.ops.aten, torch.ops.prims


class TrainingPasses(CustomGraphPass):
    """The passes of this file over one graph, forward or backward."""

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph in place."""
        replace_products(graph)
        add_to_tied_gradients(graph)
        keep_rotary_tables(graph)

    def uuid(self) -> tuple[bytes, str]:
        """Return a part of the key of Inductor's cache: the replacements depend on the ISA too."""
        return get_hash_for_files((__file__, _policy.__file__)), _cpp.isa()


def replace_products(graph: fx.Graph) -> None:
    """Products of large bfloat16 matrices on a CPU become ``gemm``, wherever that is faster: x Wᵀ, dy W and dyᵀ x."""
    for target, places in ((aten.mm.default, (0, 1, None)), (aten.addmm.default, (1, 2, 0))):
        for node in graph.find_nodes(op="call_function", target=target):
            left, right, bias = (None if place is None else node.args[place] for place in places)
            if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
                continue
            shifted = isinstance(bias, fx.Node) and (bias.meta["val"].dim() != 1 or node.kwargs)
            if shifted or not pays(left.meta["val"], right.meta["val"]):
                continue
            with graph.inserting_before(node):
                new = graph.call_function(gemm.op._opoverload, (left, right, bias))
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)


def add_to_tied_gradients(graph: fx.Graph) -> None:
    """The gradient of a tied embedding is added to the head's row by row, not as a second tensor of its size.

    splice's rows are few and the rest of its gradient is zeros: to be filled, read again and added to nothing.
    """
    for node in graph.find_nodes(op="call_function", target=splice_bwd.op._opoverload):
        parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        grad, ids, slots, vocab, want_weight, want_features = node.args
        if not want_weight or node.meta["val"][0].device.type != "cpu" or 0 not in parts:
            continue
        total = next(iter(parts[0].users))
        if len(parts[0].users) > 1 or total.target is not aten.add.Tensor or total.kwargs or len(total.args) != 2:
            continue
        (base,) = [arg for arg in total.args if arg is not parts[0]] or [None]
        if not isinstance(base, fx.Node) or not _alike(base, total):
            continue
        with graph.inserting_before(total):
            arguments = {"base": base, "grad": grad, "input_ids": ids, "slots": slots}
            both = graph.call_function(auto_functionalized, (splice_bwd_add.op._opoverload,), arguments)
            summed = graph.call_function(operator.getitem, (both, 1))
        both.meta["val"], summed.meta["val"] = (None, total.meta["val"]), total.meta["val"]
        total.replace_all_uses_with(summed)
        graph.erase_node(total)
        node.args = (grad, ids, slots, vocab, False, want_features)
        node.meta["val"] = (node.meta["val"][0][:0], node.meta["val"][1])
    graph.eliminate_dead_code()


def _alike(one: fx.Node, other: fx.Node) -> bool:
    a, b = one.meta["val"], other.meta["val"]
    return bool(a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous() and b.is_contiguous())


def keep_rotary_tables(graph: fx.Graph) -> None:
    """Sines and cosines that several operators read are computed once, into memory.

    Inductor counts them as cheap and repeats them in every kernel that reads them: each layer, each head.
    """
    for target in (aten.cos.default, aten.sin.default):
        for node in graph.find_nodes(op="call_function", target=target):
            if node.meta["val"].device.type == "cpu":
                _materialize(graph, _scaled(node))


def _scaled(node: fx.Node) -> fx.Node:
    """The last of the operators that only scale the node or change its dtype."""
    while len(node.users) == 1:
        (user,) = node.users
        scales = user.target is aten.mul.Tensor and len(user.all_input_nodes) == 1
        if not scales and user.target is not prims.convert_element_type.default:
            break
        node = user
    return node


def _materialize(graph: fx.Graph, node: fx.Node) -> None:
    value = node.meta["val"]
    with graph.inserting_after(node):
        kept = graph.call_function(prims.inductor_force_stride_order.default, (node, list(value.stride())))
    kept.meta["val"] = value
    node.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)


def options(*, cuda_graphs: bool = False) -> dict[str, str | int | bool | Callable[..., object]]:
    """Return options of torch.compile's Inductor backend for a training step."""
    return {"post_grad_custom_post_pass": TrainingPasses(), "triton.cudagraphs": cuda_graphs}
