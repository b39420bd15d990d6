"""A site is plain data: what it accepts, refuses and shows, without any model."""

import pytest

from reftheads.graph.site import BLOCK_COMPONENTS, COMPONENTS, HEAD_COMPONENTS, STACK_COMPONENTS, Site


@pytest.mark.parametrize("component", BLOCK_COMPONENTS)
def test_a_component_of_a_block_needs_a_layer(component):
    assert Site(-1, component).layer == -1
    for layer in (None, "3", True, 1.0):
        with pytest.raises(ValueError, match="needs a layer: an integer"):
            Site(layer, component)


@pytest.mark.parametrize("component", [*STACK_COMPONENTS, "model.layers.3.mlp.gate_proj"])
def test_a_component_of_no_block_takes_no_layer(component):
    assert Site(None, component).layer is None
    with pytest.raises(ValueError, match="belongs to no layer: leave layer out, got 3"):
        Site(3, component)


@pytest.mark.parametrize("component", COMPONENTS)
def test_only_components_made_of_heads_take_a_head(component):
    layer = 0 if component in BLOCK_COMPONENTS else None
    if component in HEAD_COMPONENTS:
        assert str(Site(layer, component, head=2)) == f"{component}[0].head[2]"
    else:
        with pytest.raises(ValueError, match="has no attention heads: head=2 goes with query_output"):
            Site(layer, component, head=2)


def test_an_unknown_component_is_refused_with_the_whole_vocabulary():
    with pytest.raises(ValueError) as error:
        Site(0, "block_ouput")
    assert "unknown component 'block_ouput'" in str(error.value)
    assert all(component in str(error.value) for component in COMPONENTS)
    assert "dotted path" in str(error.value)


def test_stack_and_side_take_their_own_words_only():
    with pytest.raises(ValueError, match="stack must be 'encoder', 'decoder' or None, got 'left'"):
        Site(0, stack="left")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="side must be 'input' or 'output', got 'top'"):
        Site(None, "model.norm", side="top")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'mlp_output' says its side by its name"):
        Site(0, "mlp_output", side="input")


def test_sites_are_shown_in_one_short_form():
    assert str(Site(3)) == "block_output[3]"
    assert str(Site(-1, "query_output", head=0)) == "query_output[-1].head[0]"
    assert str(Site(0, stack="encoder")) == "encoder block_output[0]"
    assert str(Site(None, "final_norm_output")) == "final_norm_output"
    assert str(Site(None, "model.norm", side="input")) == "model.norm:input"


def test_equal_sites_are_one_key():
    assert Site(1, "mlp_output") == Site(1, "mlp_output")
    assert len({Site(1), Site(1), Site(2), Site(1, head=None)}) == 2
