"""Stacked layers: `encoder/layers/0/mlp/wo/kernel`, `encoder/layers/1/..` as one array `encoder/layers/mlp/wo/kernel`.

Scanned layers (`stacks.Execution`) are stacked in memory, with the layer as first axis; on disk every layer has its own
arrays. `stack` and `unstack` convert parameters and trees that mirror them. `layerwise` shows an optimizer one layer at
a time, so that its per-array results (Adafactor's clipping, scaling and factors) do not depend on stacking.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

_LAYER = re.compile(r"^(encoder|decoder)/layers/(\d+)/(.+)$")
_STACK = re.compile(r"^(encoder|decoder)/layers/(?!\d)")


def stacks(names: Iterable[str]) -> dict[str, list[str]]:
    """Maps each stacked name to its layers' names in order, and any other name to itself."""
    groups: dict[str, dict[int, str]] = {}
    for name in names:
        match = _LAYER.match(name)
        if match is None:
            groups[name] = {-1: name}
        else:
            groups.setdefault(f"{match[1]}/layers/{match[3]}", {})[int(match[2])] = name
    return {stacked: [of[index] for index in sorted(of)] for stacked, of in groups.items()}


def is_stacked(name: str) -> bool:
    """Returns True for the name of a stacked parameter."""
    return _STACK.match(name) is not None


def stack(tree: Any) -> Any:
    """Stacks the layers of parameters, or of a tree with dictionaries of their names (an optimizer's state)."""

    def one(named: Mapping[str, Any]) -> dict[str, Any]:
        return {
            stacked: jax.tree.map(lambda *layers: jnp.stack(layers), *(named[name] for name in of))
            if _LAYER.match(of[0])
            else named[stacked]
            for stacked, of in stacks(named).items()
        }

    return _map_dictionaries(one, tree)


def unstack(tree: Any) -> Any:
    """Inverts `stack`; other arrays stay as they are."""

    def one(named: Mapping[str, Any]) -> dict[str, Any]:
        whole: dict[str, Any] = {}
        for name, value in named.items():
            leaves = jax.tree.leaves(value)
            if not is_stacked(name) or not leaves:
                whole[name] = value
                continue
            side, _, rest = name.partition("/layers/")
            for index in range(leaves[0].shape[0]):
                whole[f"{side}/layers/{index}/{rest}"] = jax.tree.map(lambda x, i=index: x[i], value)
        return whole

    return _map_dictionaries(one, tree)


def _map_dictionaries(function: Callable[[Mapping[str, Any]], Any], tree: Any) -> Any:
    def is_dictionary(x: Any) -> bool:
        return isinstance(x, dict)

    return jax.tree.map(lambda x: function(x) if is_dictionary(x) else x, tree, is_leaf=is_dictionary)


def layerwise(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies an optimizer to stacked parameters one layer at a time, with the result of unstacked layers.

    ValueError for an optimizer that mixes parameters (a global norm, an average over all): one layer is not enough.
    """

    def init(params: Any) -> Any:
        return _per_layer(optimizer.init, params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return _per_layer(optimizer.update, updates, state, params)

    return optax.GradientTransformation(init, update)


def _per_layer(function: Callable[..., Any], *arguments: Any) -> Any:
    """Applies `function` to each layer's slice of the stacked arrays and stacks the results."""
    for side in ("encoder", "decoder"):
        function = _over(function, side)
    return function(*arguments)


def _over(function: Callable[..., Any], side: str) -> Callable[..., Any]:
    """Maps `function` over the first axis of one side's stacked arrays."""

    def axes(tree: Any) -> list[int | None]:
        return [
            0 if any(is_stacked(name) and name.startswith(side) for name in _names(path)) else None
            for path, _ in jax.tree_util.tree_leaves_with_path(tree)
        ]

    def mapped(*arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        over = axes(arguments)
        if all(axis is None for axis in over):
            return function(*arguments)
        results = []  # structure of the result, known after tracing

        def flat(*values: Any) -> list[Any]:
            found = function(*jax.tree.unflatten(structure, values))
            results.append(jax.tree.structure(found))
            return jax.tree.leaves(found)

        def slices(values: list[Any]) -> list[Any]:
            return [
                value if axis is None else jax.ShapeDtypeStruct(value.shape[1:], value.dtype)
                for value, axis in zip(values, over, strict=True)
            ]

        out = jax.eval_shape(function, *jax.tree.unflatten(structure, slices(leaves)))
        try:
            found = jax.vmap(flat, in_axes=over, out_axes=axes(out))(*leaves)
        except ValueError as error:
            raise ValueError(
                "The optimizer mixes parameters of different layers (a global norm or average), which is impossible "
                "with scanned layers. Use TrainConfig.clip_norm for the norm, or "
                f't5.Execution.layers = "unrolled". ({error})'
            ) from error
        return jax.tree.unflatten(results[-1], found)

    return mapped


def _names(path: tuple[Any, ...]) -> list[str]:
    return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
