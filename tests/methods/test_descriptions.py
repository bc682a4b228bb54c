"""How methods present themselves to reports."""

from maple.descriptions import MethodDescription
from maple.methods import METHODS, describe_methods


def test_order_titles_and_roles() -> None:
    described = describe_methods()
    assert list(described) == list(METHODS)
    assert [one.order for one in described.values()] == list(range(len(METHODS)))
    assert described["vpt"].title == "VPT", "the short title, where there is one"
    assert [name for name, one in described.items() if one.is_zero_shot] == ["zero_shot"]
    assert [name for name, one in described.items() if "headline" in one.roles] == ["maple"]
    assert max(one.order for one in described.values()) < MethodDescription("unknown").order


def test_no_two_methods_are_drawn_alike() -> None:
    styles = [one.plot_style for one in describe_methods().values() if one.plot_style]
    for part in ("color", "marker", "line"):
        values = [getattr(style, part) for style in styles]
        assert len(set(values)) == len(values), part
