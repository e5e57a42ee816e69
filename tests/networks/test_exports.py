"""The room's public names."""

import pagoda.networks as networks


def test_public_names_exist_and_are_sorted():
    assert networks.__all__ == sorted(networks.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert all(hasattr(networks, name) for name in networks.__all__)
