"""Samples of training batches are recognized by their content, in any order and from any loader."""

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset, WeightedRandomSampler

from lightning_ntk.data.reference import Batch, Reference
from lightning_ntk.data.sample_index import SampleIndex, UnknownSamplesError


def samples(count: int = 11, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(count, 2, 3, dtype=dtype), torch.randint(0, 3, (count,))


def index_of(data: Any, **options: Any) -> SampleIndex:
    return SampleIndex(Reference(data, batch_size=4, **options).batches())


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Every third sample comes with noise."""

    def __init__(self, inputs: Tensor, target: Tensor) -> None:
        self.inputs, self.target = inputs, target

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        noise = 1e-3 * torch.randn(self.inputs.shape[1:]) if row % 3 == 0 else 0
        return self.inputs[row] + noise, self.target[row]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sampler", ["shuffle", "with replacement", "weighted"])
def test_every_sampler_is_recognized(sampler: str, workers: int) -> None:
    inputs, _ = samples()
    data = TensorDataset(inputs, torch.arange(11))  # the target is the row
    generator = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {
        "shuffle": {"shuffle": True},
        "with replacement": {"sampler": RandomSampler(data, replacement=True, generator=generator)},
        "weighted": {"sampler": WeightedRandomSampler([1.0] * 10 + [9.0], 30, generator=generator)},
    }[sampler]
    loader = DataLoader(data, batch_size=4, num_workers=workers, generator=generator, **options)
    index = index_of(data)
    for batch, target in loader:
        rows = index.rows(batch, target)
        assert rows.dtype == torch.int64
        assert torch.equal(rows, target)


def test_inputs_may_be_trees_of_tensors() -> None:
    images, target = samples()
    tokens = torch.randint(0, 50, (11, 5))
    mask = tokens > 20
    rows = torch.tensor([10, 3, 3, 0])
    trees: list[tuple[Any, Any]] = [
        ({"image": images, "mask": mask}, {"image": images[rows], "mask": mask[rows]}),
        (
            (images, [tokens, mask]),
            [images[rows], (tokens[rows], mask[rows])],
        ),  # pinning memory turns tuples into lists
        (torch.complex(images, -images), torch.complex(images, -images)[rows]),
        (images.bfloat16(), images.bfloat16()[rows]),
    ]
    for inputs, batch in trees:
        assert torch.equal(index_of((inputs, target)).rows(batch, target[rows]), rows)


def test_what_is_no_tensor_is_not_compared() -> None:
    images, target = samples(4)

    def unpack(batch: Any) -> tuple[Any, Tensor]:
        return {"image": batch[0], "name": [f"sample {i}" for i in range(len(batch[0]))]}, batch[1]

    index = index_of(TensorDataset(images, target), unpack=unpack)
    assert index.rows({"image": images[1:3], "name": ["?", "?"]}, target[1:3]).tolist() == [1, 2]


def test_inputs_without_targets() -> None:
    images, _ = samples()
    assert index_of(images).rows(images[4:6], None).tolist() == [4, 5]


def test_the_target_is_part_of_a_sample() -> None:
    images, target = samples()
    index = index_of((images, target))
    with pytest.raises(UnknownSamplesError, match="11 of its 11"):
        index.rows(images, (target + 1) % 3)
    twice = index_of((torch.cat([images, images]), torch.cat([target, target + 3])))
    assert twice.rows(images, target + 3).tolist() == list(range(11, 22))


def test_duplicates_are_found_as_the_first() -> None:
    images, target = samples(6)
    order = torch.tensor([0, 1, 2, 1, 0, 3])
    index = index_of((images[order], target[order]))
    assert index.rows(images[order], target[order]).tolist() == [0, 1, 2, 1, 0, 5]


def test_negative_zero_is_zero_and_nan_is_itself() -> None:
    values = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    index = index_of(values)
    complex_values = torch.complex(values[:, 0], values[:, 1])
    assert index_of(complex_values).rows(torch.complex(torch.tensor([-0.0]), torch.tensor([1.0])), None).tolist() == [0]
    assert index.rows(torch.tensor([[float("inf"), 1.0], [-0.0, 1.0], [float("nan"), 1.0]]), None).tolist() == [2, 0, 1]


def test_numbers_whose_low_bits_are_zero_are_told_apart() -> None:
    # Small whole numbers in float64 differ in their highest bits only, where simple multiplicative hashes are blind.
    torch.manual_seed(0)
    values = torch.randint(0, 4, (2000, 16)).double()
    assert len(values.unique(dim=0)) == 2000
    index = SampleIndex(Reference(values).batches())
    order = torch.randperm(2000)
    assert torch.equal(index.rows(values[order], None), order)


def test_batches_converted_to_another_precision() -> None:
    images, target = samples()
    index = index_of((images, target))
    assert index.rows(images[3:7].double(), target[3:7]).tolist() == [3, 4, 5, 6]
    noisy = images[3:7].double()
    noisy[2] += 1e-12  # no float32
    with pytest.raises(UnknownSamplesError, match=r"1 of its 4 samples are not in it, at the positions 2\."):
        index.rows(noisy, target[3:7])
    with pytest.raises(UnknownSamplesError, match="4 of its 4"):
        index.rows(images[3:7].half(), target[3:7])
    whole = torch.arange(-0.0, 8.0).reshape(4, 2)  # half precision loses nothing here
    whole[0, 0] = -0.0
    assert index_of(whole).rows(whole.half(), None).tolist() == [0, 1, 2, 3]


def test_random_augmentation_is_named() -> None:
    images, target = samples()
    index = index_of((images, target))
    batch, labels = next(iter(DataLoader(Augmented(images, target), batch_size=11)))
    message = r"4 of its 11 samples are not in it, at the positions 0, 3, 6, 9\. .*augments"
    with pytest.raises(UnknownSamplesError, match=message):
        index.rows(batch, labels)


def test_many_unknown_samples_are_not_listed_all() -> None:
    images, target = samples()
    with pytest.raises(UnknownSamplesError, match=r"positions 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\."):
        index_of((images, target)).rows(images + 1, target)


def test_other_shapes_and_types_are_described() -> None:
    images, target = samples()
    index = index_of((images, target))
    expected = r"inputs float32 of shape \(2, 3\) and target int64 of shape \(\), but got "
    with pytest.raises(UnknownSamplesError, match=expected + r"inputs float32 of shape \(6,\) and target int64"):
        index.rows(images.flatten(1), target)
    with pytest.raises(UnknownSamplesError, match=r"target int32 of shape \(\)"):
        index.rows(images, target.int())
    with pytest.raises(UnknownSamplesError, match=r"inputs\['image'\] float32"):
        index.rows({"image": images}, target)
    with pytest.raises(ValueError, match=r"inputs of shape \(10, 2, 3\), target of shape \(11,\)"):
        index.rows(images[1:], target)


def test_a_reference_of_changing_shapes_is_refused() -> None:
    data = [(torch.ones(2 + row // 4), torch.tensor(row)) for row in range(8)]
    index = index_of(data)  # its fingerprint has a meaning all the same
    assert index.fingerprint != index_of(data[::-1]).fingerprint
    with pytest.raises(ValueError, match=r"shape \(3,\).* after inputs float32 of shape \(2,\)"):
        index.rows(torch.ones(1, 2), torch.zeros(1))


def test_memory_layout_does_not_matter() -> None:
    images, target = samples()
    index = index_of((images, target))
    transposed = images.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not transposed.is_contiguous()
    assert index.rows(transposed.requires_grad_(), target).tolist() == list(range(11))


def padded(rows: list[int], width: int, *, left: bool = False) -> dict[str, Tensor]:
    """Sentences of 2 to 5 tokens, padded with whatever is there."""
    lengths = [2 + row % 4 for row in rows]
    kept = torch.stack([torch.arange(width) < length for length in lengths])
    kept = kept.flip(1) if left else kept
    ids = torch.full((len(rows), width), 7 + width)
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[number, kept[number]] = row + torch.arange(length)
    return {"input_ids": ids, "attention_mask": kept.long(), "labels": torch.tensor(rows) % 3}


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_no_content(left: bool) -> None:
    index = SampleIndex(
        Batch(slice(start, start + 4), padded(list(range(start, start + 4)), width), torch.arange(start, start + 4) % 3)
        for start, width in ((0, 5), (4, 7))
    )
    batch = padded([6, 1, 3], 9, left=left)
    assert index.rows(batch, batch["labels"]).tolist() == [6, 1, 3]
    assert index.rows(UserDict(batch), batch["labels"]).tolist() == [6, 1, 3]
    batch["attention_mask"][2, 4 if left else 3] = 0
    with pytest.raises(UnknownSamplesError, match="at the positions 2"):
        index.rows(batch, batch["labels"])
    del batch["attention_mask"]
    with pytest.raises(UnknownSamplesError, match="Expected samples like those"):
        index.rows(batch, batch["labels"])
