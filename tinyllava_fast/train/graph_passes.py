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
from tinyllava_fast.ops.weight_gradient import pays, weight_gradient

aten = torch.ops.aten


class WeightGradients(CustomGraphPass):
    """Products dyᵀ x of large bfloat16 matrices on a CPU become ``weight_gradient``, wherever that is faster."""

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph in place."""
        for node in list(graph.find_nodes(op="call_function", target=aten.mm.default)):
            left, x = node.args
            if left.target is not aten.permute.default or list(left.args[1]) != [1, 0]:
                continue
            grad = left.args[0]
            given, other = grad.meta["val"], x.meta["val"]
            rows, outputs = given.shape
            if given.device.type != "cpu" or not (given.is_contiguous() and other.is_contiguous()):
                continue
            if not pays(rows, outputs, other.shape[1], given.dtype):
                continue
            with graph.inserting_before(node):
                new = graph.call_function(weight_gradient.op._opoverload, (grad, x))
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        """The key of Inductor's cache has this in it: what is replaced depends on the ISA too."""
        module = _cpp.load()[0]
        return get_hash_for_files((__file__,)), module.isa() if module else ""


def options() -> dict[str, Any]:
    """Options of torch.compile's Inductor backend for a training step."""
    return {"post_grad_custom_post_pass": WeightGradients()}
