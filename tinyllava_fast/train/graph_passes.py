"""What torch.compile does not find by itself on a CPU, as passes over the graphs that it makes.

A pass sees the graph of a training step after torch has split it into forward and backward, so stock modules need no
change, and what is not compiled runs as before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops.gemm import gemm, pays

aten, prims = torch.ops.aten, torch.ops.prims


class TrainingPasses(CustomGraphPass):
    """The passes of this file over one graph, forward or backward."""

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph in place."""
        replace_products(graph)
        keep_rotary_tables(graph)

    def uuid(self) -> Any:
        """The key of Inductor's cache has this in it: what is replaced depends on the ISA too."""
        module = _cpp.load()[0]
        return get_hash_for_files((__file__,)), module.isa() if module else ""


def replace_products(graph: fx.Graph) -> None:
    """Products of large bfloat16 matrices on a CPU become ``gemm``, wherever that is faster: x Wᵀ, dy W and dyᵀ x."""
    left: Any
    right: Any
    bias: Any
    for target, places in ((aten.mm.default, (0, 1, None)), (aten.addmm.default, (1, 2, 0))):
        for node in graph.find_nodes(op="call_function", target=target):
            left, right, bias = (None if place is None else node.args[place] for place in places)
            shifted = bias is not None and (bias.meta["val"].dim() != 1 or node.kwargs)
            if shifted or not pays(left.meta["val"], right.meta["val"]):
                continue
            with graph.inserting_before(node):
                new = graph.call_function(gemm.op._opoverload, (left, right, bias))
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)


def keep_rotary_tables(graph: fx.Graph) -> None:
    """Sines and cosines that several operators read are computed once, into memory.

    Inductor counts them as cheap and repeats them in every kernel that reads them: each layer, each head.
    """
    for target in (aten.cos.default, aten.sin.default):
        for node in graph.find_nodes(op="call_function", target=target):
            if node.meta["val"].device.type == "cpu":
                _materialise(graph, _scaled(node))


def _scaled(node: fx.Node) -> fx.Node:
    """The last of the operators that only scale the node or change its dtype."""
    while len(node.users) == 1:
        (user,) = node.users
        scales = user.target is aten.mul.Tensor and len(user.all_input_nodes) == 1
        if not scales and user.target is not prims.convert_element_type.default:
            break
        node = user
    return node


def _materialise(graph: fx.Graph, node: fx.Node) -> None:
    value = node.meta["val"]
    with graph.inserting_after(node):
        kept = graph.call_function(prims.inductor_force_stride_order.default, (node, list(value.stride())))
    kept.meta["val"] = value
    node.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)


def options() -> dict[str, Any]:
    """Options of torch.compile's Inductor backend for a training step."""
    return {"post_grad_custom_post_pass": TrainingPasses()}
