"""The ways of computing a block, by its width."""

from convnext_cli.catalog.ways import count_kept_widths, list_ways


def test_narrow_blocks_need_not_keep_their_hidden_units_and_wide_ones_do():
    assert list_ways(96, grn=False) == ("plain", "positions", "kept", "recomputed")
    assert list_ways(256, grn=False)[-1] == "recomputed"
    assert list_ways(384, grn=False)[-1] == "kept"


def test_grn_needs_all_hidden_units_at_once():
    assert list_ways(96, grn=True)[-1] == "positions"


def test_widths_that_the_tensor_cores_do_not_take_have_half_of_a_block_in_kernels():
    assert list_ways(40, grn=True)[-1] == "positions"
    assert list_ways(80, grn=False)[-1] == "positions"


def test_the_more_is_fused_the_less_is_kept():
    for grn in (False, True):
        kept = [
            count_kept_widths(way, grn=grn, layer_scale=not grn) for way in list_ways(96, grn=grn)
        ]
        assert kept == sorted(kept, reverse=True)
    assert count_kept_widths("recomputed", grn=False, layer_scale=True) == 2
