"""Sites by the names of transformers' modules."""

import pytest

from interp_steer.model.site import Site


@pytest.mark.parametrize("component", ["resid_post", "mlp_out", "attn_out"])
def test_a_module_of_transformers_and_back(component):
    site = Site(component, 15)
    assert Site.parse(f"model.{site.module}") == site


def test_what_a_block_reads_is_what_the_one_before_writes():
    assert Site("resid_pre", 3).module == Site("resid_post", 2).module == "layers.2"
    assert Site("resid_pre", 0).module == "embed_tokens" and Site("z", 3, 1).module is None
