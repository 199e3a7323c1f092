"""What cannot be used is refused in a sentence; what fails in other code says where it was called."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_ntk import Linearization, LinearizationMonitor, LinearizedTraining, empirical_ntk
from lightning_ntk.data.reference import unpack_pair
from lightning_ntk.solvers.lanczos import Lanczos
from tests.problems import flatten, make, relative_error

MLP, X, Y = make("mlp")
NAN = X * torch.nan


class Samples(Dataset):
    def __init__(self, length: Any = 11, sample: Callable[[int], Any] = lambda i: (X[i], Y[i])) -> None:
        self.length, self.sample = length, sample

    def __len__(self) -> int:
        return self.length() if callable(self.length) else self.length

    def __getitem__(self, index: int) -> Any:
        return self.sample(index)


class NoForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)


class Listed(nn.Module):
    """A weight that is read from a Python list."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 4), nn.Linear(4, 3)
        self.weights = [self.head.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).tanh() @ self.weights[0].T


def without_gradient(context: Any) -> Callable[[nn.Module, Tensor], Tensor]:
    def predict(module: nn.Module, x: Tensor) -> Tensor:
        with context():
            return module(x)

    return predict


def autocast(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.linear(x.float(), module[0].weight.float()).to(x)


def train(data: Any = (X, Y), module: Any = MLP, **options: Any) -> LinearizedTraining:
    return LinearizedTraining(module, data, **{"lr": 0.1, "progress": False} | options)


def quantized() -> Tensor:
    return torch.quantize_per_tensor(X.float(), 0.1, 0, torch.qint8)


BOTH = {  # refused alike by empirical_ntk and LinearizedTraining
    "coupled samples": ({"predict": lambda m, x: m(x) - m(x).mean(0)}, "those of sample 0 differ when it is alone"),
    "dropout": ({"predict": lambda m, x: F.dropout(m(x))}, "two passes in eval mode differ"),
    "detached": ({"predict": lambda m, x: m(x).detach()}, "depend on none of"),
    "no_grad": ({"predict": without_gradient(torch.no_grad)}, "depend on none of"),
    "inference_mode": ({"predict": without_gradient(torch.inference_mode)}, "depend on none of"),
    "bool outputs": ({"predict": lambda m, x: m(x) > 0}, r"real floating-point outputs, .* bool of shape \(3, 3\)"),
    "complex outputs": ({"predict": lambda m, x: m(x) * 1j}, "real floating-point outputs, .* complex128"),
    "no outputs": ({"predict": lambda m, x: m(x)[:, :0]}, "at least one of each sample"),
    "sparse outputs": ({"predict": lambda m, x: m(x).to_sparse()}, "outputs in dense tensors but got one that is sparse"),
    "outputs of other rows": ({"predict": lambda m, x: m(x)[::2]}, "2 rows for 3 samples"),
    "NaN outputs": ({"predict": lambda m, x: m(x) * torch.nan}, "finite outputs but sample 0"),
    "float32 outputs": ({"predict": lambda m, x: m(x).float()}, "torch.float64, but they are torch.float32"),
    "own autocast": ({"predict": autocast}, "forward in full precision"),
    "predict is no function": ({"predict": "logits"}, "`predict` to be a function or None but got 'logits'"),
    "unpack is no function": ({"unpack": 1}, "`unpack` to be a function or None but got 1"),
    "unpack gives no pair": ({"unpack": lambda batch: batch[0]}, "return a pair .* but got Tensor"),
    "unpack gives three": ({"unpack": lambda batch: (*batch, 0)}, "return a pair"),
    "batch size": ({"batch_size": "4"}, "`batch_size` to be an integer, at least 1, but got '4'"),
    "text module": ({"module": "net"}, "`module` to be an nn.Module, .* but got 'net'"),
    "class": ({"module": nn.Linear}, "an object and not its class, but got <class 'torch"),
    "no forward": ({"module": NoForward()}, "a method `forward` but NoForward has none"),
    "list of modules": ({"module": nn.ModuleList([nn.Linear(6, 3)])}, "a method `forward` but ModuleList has none"),
    "weight in a list": ({"module": Listed().double()}, r"it reads \['head.weight'\] elsewhere"),
    "module without values": ({"module": nn.Linear(6, 3, device="meta")}, "parameter `weight` .* on the meta device"),
    "NaN inputs": ({"data": (NAN, Y)}, "finite inputs but sample 0"),
    "other features": ({"data": (X[:, :5], Y)}, r"Sequential over inputs float64 of shape \(3, 5\) failed: .*mat1 and mat2"),
    "integers": ({"data": (X.long(), Y)}, r"over inputs int64 of shape \(3, 6\) failed"),
    "complex inputs": ({"data": (X + 0j, Y)}, "over inputs complex128 .* failed"),
    "quantized inputs": ({"data": quantized}, "inputs in dense tensors but got one that is quantized"),
    "nested inputs": ({"data": lambda: torch.nested.nested_tensor([X[0], X[1]])}, "one that is nested"),
    "sparse inputs": ({"data": (X.to_sparse(), Y)}, "inputs in dense tensors but got one that is sparse"),
    "meta targets": ({"data": (X, Y.to("meta"))}, "targets in dense tensors but got one that is on the meta device"),
    "arrays": ({"data": (X.numpy(), Y.numpy())}, "inputs in tensors but got ndarray"),
    "lists": ({"data": (X, Y.tolist())}, "targets in tensors but got list"),
    "unequal lengths": ({"data": (X, Y[:3])}, "same number of samples"),
    "dict": ({"data": {"x": X}}, "a Dataset, a DataLoader, a tuple .* but got dict"),
    "text": ({"data": "train"}, "a Dataset, a DataLoader, a tuple .* but got str"),
    "negative length": ({"data": Samples(-1)}, "a data set with a length but Samples has none"),
    "length that is no integer": ({"data": Samples(2.5)}, "a data set with a length but Samples has none"),
    "samples that are None": ({"data": Samples(sample=lambda i: None)}, "Reading the samples 0, 5, 10 of the data set failed"),
    "ragged samples": ({"data": Samples(sample=lambda i: (X[i, : i + 1], Y[i]))}, "stack expects each tensor to be equal"),
    "texts": ({"data": Samples(sample=lambda i: ("a", Y[i]))}, "inputs that hold tensors but got"),
    "samples that are dicts": ({"data": Samples(sample=lambda i: {"x": X[i]})}, "a dict with the keys"),
    "no batches": ({"data": DataLoader(TensorDataset(X, Y), batch_size=None)}, "one with batch_size=None"),
}  # fmt: skip
ONE: dict[str, tuple[Callable[[], Any], str]] = {
    "method": (lambda: empirical_ntk(MLP, X, method="dense"), "`method` to be one of"),
    "memory limit": (lambda: empirical_ntk(MLP, X, memory_limit="1G"), "`memory_limit` to be an integer, at least 1"),
    "weights in a list": (lambda: empirical_ntk(MLP, X, params=[X]), r"weights by name, a dict of tensors, but got \[tensor"),
    "second data": (lambda: empirical_ntk(MLP, X, X[:, :2]), r"float64 of shape \(3, 2\) failed"),
    "NaN later": (lambda: empirical_ntk(MLP, X.index_fill(0, torch.tensor(3), torch.nan)), "that of sample 3 of the first"),
    "solver": (lambda: train(solver="svd"), "`solver` to be one of .* but got 'svd'"),
    "jacobian": (lambda: train(jacobian="dense"), "`jacobian` to be one of .* but got 'dense'"),
    "loss by name": (lambda: train(loss="mse"), "`loss` to be a function or None but got 'mse'"),
    "complex targets": (lambda: train((X, Y + 0j)), "real targets but got torch.complex128"),
    "dtype by name": (lambda: train(dtype="float64"), "torch.float32, torch.float64 or None but got 'float64'"),
    "half precision": (lambda: train(dtype=torch.float16), "torch.float32, torch.float64 or None"),
    "matrix_free": (lambda: train(solver="lanczos", matrix_free="x"), "`matrix_free` to be one of True, False, None but got 'x'"),
    "horizon": (lambda: train(horizon="10"), "`horizon` to be a number of optimizer steps or None but got '10'"),
    "tolerance": (lambda: Lanczos(tolerance="small"), "`tolerance` to be a number between 0 and 1 but got 'small'"),
    "kernel": (lambda: train(ntk=np.eye(33)), "`ntk` to be a tensor but got array"),
    "rates in a list": (lambda: train(lr_scales=[1.0]), r"`lr_scales` to be a dict of numbers by parameter but got \[1.0\]"),
    "rate by name": (lambda: train(lr_scales={"0.weight": "a"}), "`lr_scales` to be a dict of numbers by parameter"),
    "rate of each": (lambda: train(lr_scales={"0.weight": X}), "`lr_scales` to be a dict of numbers by parameter"),
    "buffers in a list": (lambda: train(momentum=0.9, momentum_buffers=[X]), "by name, a dict of tensors"),
    "batches": (lambda: train(batches="abc"), "`batches` to be a list with the rows of every step but got 'abc'"),
    "time": (lambda: train().weights("3"), "`t` to be a number of optimizer steps or None but got '3'"),
    "times": (lambda: train().weights_at(3), "`times` to be a list of times but got 3"),
    "recorded time": (lambda: train(batches=[[0]]).weights("1"), "`t` to be a number of optimizer steps but got '1'"),
    "new data": (lambda: train().predictions(3, NAN), "finite outputs but sample 0"),
    "closest": (lambda: train().closest([1.0]), "a displacement by name"),
    "closest NaN": (lambda: train().closest({n: p * torch.nan for n, p in MLP.named_parameters()}), "a finite displacement"),
    "cotangent": (lambda: Linearization(MLP).vjp([1], X), r"`cotangent` to be a tensor \(B, K\) but got \[1\]"),
    "tangent": (lambda: Linearization(MLP).jvp([1], X), "by name, a dict of tensors"),
    "batch": (lambda: Linearization(MLP).vjp(Y, X[:, :2]), r"over inputs float64 of shape \(11, 2\) failed"),
    "steps in an array": (lambda: LinearizationMonitor(steps=np.array([1, 2])), "a list of integers .* but got array"),
    "steps": (lambda: LinearizationMonitor(steps=[True]), "a positive integer, a list of integers"),
    "evaluation": (lambda: LinearizationMonitor(evaluation="val"), "`evaluation` to be a data set, a DataLoader, or None"),
    "reference": (lambda: LinearizationMonitor(reference=3), 'to be a data set, a DataLoader, "train" or None but got 3'),
    "class of a loss": (lambda: train(loss=torch.nn.MSELoss), r"got the class MSELoss. Pass an instance, such as MSELoss\(\)"),
    "class of a monitored loss": (lambda: LinearizationMonitor(loss=torch.nn.MSELoss), "got the class MSELoss"),
    "loss without a closed form": (lambda: train(loss=torch.nn.HuberLoss()), "recorded minibatches, `batches=`"),
    "batch of three": (lambda: unpack_pair((X, Y, Y)), r"got a tuple of 3.*`lambda batch: batch\[:2\]`"),
    "batch in a dict": (lambda: unpack_pair({"x": X}), r"a dict with the keys \['x'\].*batch\[\"x\"\]"),
    "monitored loss": (lambda: LinearizationMonitor(loss="mse"), "`loss` to be a function or None but got 'mse'"),
    "network": (lambda: LinearizationMonitor(network=3), r"names of submodules but got \[3\]"),
    "monitored solver": (lambda: LinearizationMonitor(solver="svd"), "`solver` to be one of"),
    "monitored jacobian": (lambda: LinearizationMonitor(jacobian="dense"), "`jacobian` to be one of"),
    "monitored batch size": (lambda: LinearizationMonitor(batch_size=0), "`batch_size` to be an integer, at least 1"),
    "name": (lambda: LinearizationMonitor(name=""), "`name` to be a prefix of tags"),
    "flag": (lambda: LinearizationMonitor(taylor="no"), "`taylor` to be one of True, False but got 'no'"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.quantize|The PyTorch API of nested")
@pytest.mark.parametrize("function", ["empirical_ntk", "LinearizedTraining"])
@pytest.mark.parametrize("case", BOTH)
def test_a_kernel_and_training_refuse_alike(case: str, function: str) -> None:
    options, message = BOTH[case]
    given = {"module": MLP, "data": (X, Y)} | options
    module, data = given.pop("module"), given.pop("data")
    data = data() if callable(data) else data
    call = partial(empirical_ntk, module, data) if function == "empirical_ntk" else partial(train, data, module)
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ONE)
def test_what_cannot_be_used_gets_a_sentence(case: str) -> None:
    call, message = ONE[case]
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def fail(*_: Any) -> Any:
    raise KeyError("mine")


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"data": Samples(sample=fail)}, "Reading the samples 0, 5, 10 of the data set failed"),
        ({"data": Samples(12, lambda i: [(X[j], Y[j]) for j in range(11)][i])}, "Reading the samples 0, 5, 11 of"),
        ({"data": Samples(fail)}, "Asking the data set for its length failed"),
        ({"data": DataLoader(TensorDataset(X, Y), collate_fn=fail)}, "Reading the samples"),
        ({"unpack": fail}, "Reading the samples"),
        ({"predict": fail}, r"The pass of Sequential over inputs float64 of shape (3, 6) failed"),
        ({"loss": fail}, "The loss of the first outputs, float64 of shape (11, 3), failed"),
    ],
)
def test_errors_of_other_code_stay_and_say_where_it_was_called(options: dict[str, Any], note: str) -> None:
    with pytest.raises((KeyError, IndexError)) as caught:
        train(**options)
    assert [text.startswith(note) for text in caught.value.__notes__] == [True]


def test_what_torch_has_raised_is_the_cause() -> None:
    with pytest.raises(ValueError, match="mat1 and mat2 shapes cannot be multiplied") as caught:
        empirical_ntk(MLP, X[:, :5])
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_batch_sampler_is_no_missing_batch_size() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_sampler=[[3, 4], [0, 1, 2]])
    torch.testing.assert_close(train(loader).weights(3), train().weights(3))


@pytest.mark.filterwarnings("error:Per-sample Jacobians", "error:The rules")
@pytest.mark.parametrize(
    "options", [{"jacobian": "stored"}, {"method": "contraction"}, {"method": "structured"}], ids=str
)
def test_autocast_around_a_kernel_changes_nothing(options: dict[str, Any]) -> None:
    module, inputs = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), X.float()

    def result() -> Tensor:
        if "method" in options:
            return empirical_ntk(module, inputs, **options)
        return flatten(train((inputs, Y.float()), module, **options).displacement(3))

    expected = result()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(result(), expected) < 1e-6
