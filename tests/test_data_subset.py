"""Orders, subsets, shards and held-out sets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robeval.core.errors import RobevalError
from robeval.core.images import Images
from robeval.data.order import stratified_order
from robeval.data.subset import holdout, read_shard, shard, subset


def images(y: list[int], start: int = 0) -> Images:
    labels = torch.tensor(y)
    x = torch.linspace(0, 1, len(y)).view(-1, 1, 1, 1)
    return Images(x, labels, torch.arange(start, start + len(y)), "toy/test", [str(i) for i in range(max(y) + 1)])


LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=80)


@given(LABELS)
@settings(max_examples=60, deadline=None)
def test_order_is_a_stable_permutation(y: list[int]) -> None:
    order = stratified_order(torch.tensor(y))
    assert sorted(order.tolist()) == list(range(len(y)))
    assert torch.equal(order, stratified_order(torch.tensor(y)))


@given(st.integers(1, 5), st.integers(1, 20), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_every_prefix_of_equal_classes_is_balanced(classes: int, each: int, random: object) -> None:
    y = [k for k in range(classes) for _ in range(each)]
    random.shuffle(y)  # type: ignore[attr-defined]
    labels = torch.tensor(y)[stratified_order(torch.tensor(y))]
    for count in range(1, len(y) + 1):
        seen = labels[:count].bincount(minlength=classes)
        assert int(seen.max() - seen.min()) <= 1


@given(LABELS)
@settings(max_examples=60, deadline=None)
def test_prefixes_of_unequal_classes_keep_the_shares(y: list[int]) -> None:
    labels = torch.tensor(y)
    whole, ordered = labels.bincount(minlength=5), labels[stratified_order(labels)]
    for count in range(1, len(y) + 1):
        share = whole * count / len(y)
        assert float((ordered[:count].bincount(minlength=5) - share).abs().max()) <= 1 + 5 / 2


def test_order_is_frozen_and_does_not_put_one_class_first() -> None:
    # A change of this order would change every published subset.
    assert stratified_order(torch.tensor([0, 1, 2] * 4)).tolist() == [5, 4, 0, 11, 6, 10, 8, 3, 1, 7, 9, 2]
    firsts = {int(t) for t in torch.tensor([0, 1, 2] * 4)[stratified_order(torch.tensor([0, 1, 2] * 4))][::3]}
    assert len(firsts) > 1


def test_count_range_and_first() -> None:
    data = images([0, 1] * 20, start=100)
    fifty = subset(data, "10")
    assert fifty.y.bincount().tolist() == [5, 5]
    assert fifty.note == "first 10 of the fixed stratified shuffle"
    assert torch.equal(subset(data, "0:10").ids, fifty.ids)
    parts = torch.cat([subset(data, "0:7").ids, subset(data, "7:31").ids, subset(data, "31:").ids])
    assert torch.equal(parts, subset(data, "40").ids)
    assert subset(data, "7:31").note == "7:31 of the fixed stratified shuffle"
    for first in (subset(data, "first:3"), subset(data, first=3)):
        assert first.ids.tolist() == [100, 101, 102]
        assert first.note == "first 3 in file order"
    assert subset(data) is data


def test_ids_keep_their_images() -> None:
    data = images([0, 1, 2] * 10)
    for chosen in (subset(data, "11"), subset(data, "4:9"), subset(data, "29,3,17"), shard(data, 2, 4)):
        assert torch.equal(chosen.x, data.x[chosen.ids])
        assert torch.equal(chosen.y, data.y[chosen.ids])


def test_ids_by_list_and_by_file(tmp_path: Path) -> None:
    data = images([0] * 5, start=10)
    assert subset(data, "14,10").ids.tolist() == [14, 10]
    (tmp_path / "ids.txt").write_text("11\n13, 12\n")
    chosen = subset(data, f"@{tmp_path / 'ids.txt'}")
    assert (chosen.ids.tolist(), chosen.note) == ([11, 13, 12], "3 ids from ids.txt")


@pytest.mark.parametrize(
    "text",
    ["0", "41", "5:5", "9:3", "0:41", "-3", "first:0", "first:41", "first:x", "1,1", "1,99", "", "a,b", "1.5", "::"],
)
def test_nonsense_is_a_usage_error(text: str) -> None:
    with pytest.raises(RobevalError) as caught:
        subset(images([0, 1] * 20), text)
    assert (caught.value.exit_code, caught.value.code) == (2, "A04")


def test_missing_list_and_doubled_options() -> None:
    with pytest.raises(RobevalError, match="no file of ids") as caught:
        subset(images([0]), "@/nowhere/ids")
    assert caught.value.exit_code == 3
    with pytest.raises(RobevalError, match="not both"):
        subset(images([0]), "1", first=1)


@given(st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_shards_partition(count: int, parts: int) -> None:
    data = images([i % 2 for i in range(count)])
    if parts > count:
        with pytest.raises(RobevalError, match="would be empty"):
            shard(data, 1, parts)
        return
    ids = [shard(data, i, parts).ids.tolist() for i in range(1, parts + 1)]
    assert sorted(i for part in ids for i in part) == list(range(count))
    assert max(map(len, ids)) - min(map(len, ids)) <= 1


def test_shard_numbers() -> None:
    assert read_shard("2/3") == (2, 3)
    assert shard(subset(images([0] * 6), "4"), 1, 2).note == "first 4 of the fixed stratified shuffle; shard 1/2"
    for text in ("0/3", "4/3", "1", "1/0", "a/b", "1/2/3"):
        with pytest.raises(RobevalError) as caught:
            read_shard(text)
        assert caught.value.code == "A04"
    with pytest.raises(RobevalError, match="shard 3/2 does not exist"):
        shard(images([0] * 6), 3, 2)


def test_holdout_is_stratified_disjoint_and_not_the_default_order() -> None:
    data = images([0, 1, 2, 3] * 25)
    train, validation = holdout(data, 20)
    assert validation.y.bincount().tolist() == [5, 5, 5, 5]
    assert sorted(train.ids.tolist() + validation.ids.tolist()) == list(range(100))
    assert set(validation.ids.tolist()) != set(subset(data, "20").ids.tolist())
    for count in (0, 100):
        with pytest.raises(RobevalError, match="cannot hold out"):
            holdout(data, count)
