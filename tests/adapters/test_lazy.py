from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtl_export.adapters import family
from mtl_export.adapters.lazy import KEPT, LazyLayers
from mtl_export.adapters.normal_form import LayerAdapter
from tests.merge import bases


def test_large_checkpoints_are_read_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the limit, indexing gives the same layers as reading all of them."""
    base = bases.write_base(tmp_path / "base")
    checkpoint = bases.write_checkpoint(tmp_path / "adapter")
    eager = bases.bound_model(base, checkpoint).adapters.layers
    monkeypatch.setattr(family, "LAZY_BYTES", 0)
    lazy = bases.bound_model(base, checkpoint).adapters.layers
    assert not isinstance(eager, LazyLayers)
    assert isinstance(lazy, LazyLayers)
    assert list(lazy) == list(eager)
    for module, layer in eager.items():
        assert isinstance(layer, LayerAdapter)
        found, outline = lazy[module], lazy.outlines[module]
        assert isinstance(found, LayerAdapter)
        assert isinstance(outline, LayerAdapter)
        np.testing.assert_array_equal(found.down, layer.down)
        np.testing.assert_array_equal(found.up, layer.up)
        np.testing.assert_array_equal(outline.core, layer.core)
        assert (outline.down.shape, outline.up.shape) == (layer.down.shape, layer.up.shape)


def test_only_the_last_few_are_kept() -> None:
    """What was asked for just now is not computed again; what was long ago is."""
    computed: list[str] = []
    layers = {
        name: LayerAdapter(name, np.ones((1, 3)), np.ones((1, 1, 1)), np.ones((2, 1)))
        for name in "abcdefgh"
    }

    def load(name: str) -> LayerAdapter:
        computed.append(name)
        return layers[name]

    lazy = LazyLayers.of(layers, load)
    computed.clear()
    for name in "aabbaa":
        assert lazy[name] is layers[name]
    assert computed == ["a", "b"]
    for name in "cdefgh":
        lazy[name]
    lazy["a"]
    assert computed == [*"abcdefgh", "a"]
    assert len(layers) > KEPT
    assert "a" in lazy
    assert "z" not in lazy
    with pytest.raises(KeyError):
        lazy["z"]
